"""The record of a finished layer: its rewritten nodes as JSON and its tensors by name, and back.

A record can express calls of the dialect that passes write (coded experts, quantized linears) and
held tensors. A digest of the layer's graph text tells whether restoring gave the same layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import partial

from torch import Tensor, fx

from moecc.checkpoint.files import TensorFile
from moecc.ir import ops
from moecc.ir.program import Program, stage_nodes
from moecc.ir.tensors import Held
from moecc.types import Json

_OPS = {str(t): t for t in (*sorted(ops.MOE_OPS, key=str), ops.Q_LINEAR)}


def made(program: Program, stage: int, before: Held) -> dict[str, Tensor]:
    """Return the held tensors of a layer that are not in `before`, by name."""
    held = [n for n in _held(program, stage) if not program.tensors.same(before, n)]
    return {name: program.tensors[name] for name in held}


def describe(program: Program, stage: int, names: Iterable[str]) -> Json:
    """Return the record of a layer. names: the tensors that its passes made."""
    nodes = [n for n in stage_nodes(program, stage) if n.target in _OPS.values()]
    made = set(names)
    return {
        "nodes": [_describe(program, n) for n in nodes],
        "order": [name for name in _placeholders(program) if name in made],
        "rounded": [name for name in names if name in program.rounded],
        "text": _digest(program, stage),
    }


def restore(program: Program, stage: int, record: Json, tensors: TensorFile) -> Program | None:
    """Return a copy of `program` with the layer as recorded; None if it is not the same layer.

    Raise KeyError or MoeccError if record and tensors do not fit the program.
    """
    copy = program.copy()
    for entry in record["nodes"]:
        _restore(copy, entry, tensors)
    for name in tensors.keys() - {w for e in record["nodes"] for w in _weights_in(e)}:
        copy.add(name, tensors[name])
    before, placeholders = _placeholders(program), _placeholders(copy)
    for name in record["order"]:
        if name not in before:  # it came after all that were there
            copy.user_inputs[0].prepend(placeholders[name])
    copy.rounded.update(record["rounded"])
    return copy if _digest(copy, stage) == record["text"] else None


def spill(program: Program, names: Iterable[str], file: TensorFile) -> None:
    """Leave these tensors to `file`, so that a finished layer takes no memory."""
    for name in names:
        if name in program.tensors:
            program.tensors.spill(name, partial(file.__getitem__, name), file.entries[name].read)


def _describe(program: Program, node: fx.Node) -> Json:
    def describe(value: fx.node.Argument) -> Json:
        if not isinstance(value, fx.Node):
            return {"value": value}
        weight = program.weights.get(value.name)
        return {"node": value.name} if weight is None else {"weight": weight.name}

    return {
        "name": node.name,
        "op": str(node.target),
        "args": [describe(a) for a in node.args],
        "kwargs": dict(node.kwargs),
    }


def _weights_in(entry: Json) -> list[str]:
    return [a["weight"] for a in entry["args"] if "weight" in a]


def _restore(program: Program, entry: Json, tensors: TensorFile) -> None:
    """Make one node the call that `entry` describes."""
    nodes = {n.name: n for n in program.graph.nodes}
    placeholders = _placeholders(program)

    def operand(arg: Json) -> fx.node.Argument:
        if "weight" in arg:
            name = arg["weight"]
            return program.add(name, tensors[name]) if name in tensors else placeholders[name]
        found: fx.node.Argument = nodes[arg["node"]] if "node" in arg else arg["value"]
        return found

    args = tuple(operand(a) for a in entry["args"])
    program.replace(nodes[entry["name"]], _OPS[entry["op"]], args, entry["kwargs"])


def _placeholders(program: Program) -> dict[str, fx.Node]:
    """Return the placeholders of weights by the weights' names, in graph order."""
    weights = program.weights
    return {weights[n.name].name: n for n in program.graph.nodes if n.name in weights}


def _held(program: Program, stage: int) -> list[str]:
    """Return the names of the held tensors that a layer reads, directly or by derived weights."""
    inputs = {i.name for n in stage_nodes(program, stage) for i in n.all_input_nodes}
    weights = [program.weights[i] for i in inputs if i in program.weights]
    names = {s for w in weights for s in (w.name, *w.sources)}
    return sorted(name for name in names if name in program.tensors)


def _digest(program: Program, stage: int) -> str:
    """Return a digest of the layer's lines of the graph text, those of its inputs included."""
    nodes = stage_nodes(program, stage)
    shown = {*nodes, *(i for n in nodes for i in n.all_input_nodes)}
    lines = [program.line(n) for n in program.graph.nodes if n in shown]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()

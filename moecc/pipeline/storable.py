"""Check after every pass that an artifact can hold the program, so that writing it cannot fail.

A compiled model runs its family's code, except for coded experts and quantized linears. Hence three
rules: every other node is as it was traced; a parameter keeps its shape; a held tensor has a place,
which is the name of a parameter or an operand of such a node.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from moecc.errors import MoeccError
from moecc.ir import ops
from moecc.ir.program import Program

# op -> the number of leading operands that must be the model's own
_OWN_OPERANDS: dict[object, int] = {op: 3 for op in ops.MOE_OPS - {ops.EXPERTS}} | {ops.Q_LINEAR: 1}
# op -> the ops of the traced model in whose place it may be
_REPLACES: dict[object, frozenset[object]] = dict.fromkeys(_OWN_OPERANDS, ops.MOE_OPS) | {
    ops.Q_LINEAR: frozenset({torch.ops.aten.linear.default, ops.Q_LINEAR})
}
_SAY_IT_IN_WEIGHTS = (
    "a compiled model runs its family's code for all but coded experts and quantized linears, "
    "so say it in weights"
)


def require_nodes(program: Program, traced: Program, stage: int | None = None) -> None:
    """Raise MoeccError if a node of `stage` (None: of any) differs from `traced`.

    traced: the program before all passes.
    """
    before = {n.name: n for n in _calls(traced, stage)}
    changed = []
    for node in _calls(program, stage):
        was = before.pop(node.name, None)
        if was is None:
            changed.append(f"added {program.line(node)}")
        elif not _replaces(node, was):
            changed.append(f"made {traced.line(was)} to {program.line(node)}")
    changed += [f"removed {traced.line(node)}" for node in before.values()]
    if changed:
        raise MoeccError(f"a pass {changed[0]}; {_SAY_IT_IN_WEIGHTS}")


def require_tensors(program: Program, traced: Program) -> None:
    """Raise MoeccError if a pass left a tensor without a place, or a parameter of another shape."""
    store = program.store
    if store is None:
        return
    parameters = {n for n in store.names() if n not in store.tied}
    places = parameters | set(_operands(program))
    for name in program.tensors:
        if program.tensors.same(traced.tensors, name):
            continue
        if name not in places:
            tied = f"it is tied to {store.tied[name]}" if name in store.tied else ""
            why = tied or "the model has no parameter of that name"
            raise MoeccError(f"a pass gave {name} a value that can't be stored: {why}")
        shape = program.tensors.shape(name)
        if name in parameters and shape is not None and shape != tuple(store.shape(name)):
            want = f"its configuration says {list(store.shape(name))}"
            raise MoeccError(f"a pass gave {name} the shape {list(shape)}, but {want}")


def _calls(program: Program, stage: int | None) -> Iterable[fx.Node]:
    nodes = (n for n in program.graph.nodes if n.op == "call_function")
    return nodes if stage is None else (n for n in nodes if n.meta["layer"] == stage)


def _operands(program: Program) -> Iterable[str]:
    """Yield the names of the weights that coded experts and quantized linears read."""
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in _OWN_OPERANDS:
            for i in node.all_input_nodes:
                if i.name in program.weights:
                    yield program.weights[i.name].name


def _replaces(node: fx.Node, was: fx.Node) -> bool:
    """Return whether an artifact can hold `node` where the trace has `was`."""
    became = node.target
    fits = was.target in _REPLACES.get(became, {became})
    return fits and _own_part(node, became) == _own_part(was, became)


def _own_part(node: fx.Node, became: fx.node.Target) -> object:
    """Return the part of a node that a pass may not change if it makes it a call of `became`."""
    operands = _OWN_OPERANDS.get(became)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.name)
    return args[:operands] if operands else (node.target, args, kwargs)

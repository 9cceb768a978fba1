"""torch.export of a skeleton: one `moecc::experts` node per MoE layer, dynamic batch and sequence.

  1. Export, with everything in place that a trace needs (`moecc.frontend.traceable`). No weight is
     read.
  2. Refuse a graph that holds for some shapes only (guards, bounded ranges), except for families
     whose own code bounds the sequence (`moecc.frontend.shapes`).
  3. Strip what changes no result (`moecc.frontend.simplify`).
  4. Check that every experts module is either one node or absent.
  5. Mark every node with its stage and its module path (`moecc.frontend.stages`).

The result's `graph_module.meta`
  layers       number L of decoder layers
  restriction  the `Restriction` of the shapes that the graph holds for
  unreached    names of the experts parameters that no node reads
Every node's `meta`
  layer        0 before the first decoder layer, i + 1 in layer i, L + 1 after the last; it never
               falls along an edge
  path         the deepest module; for an experts node, its own
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from moecc.errors import MoeccError
from moecc.frontend import shapes, stages
from moecc.frontend.simplify import simplify
from moecc.frontend.skeleton import Skeleton
from moecc.frontend.traceable import logits_alone, only_input_ids, traceable
from moecc.ir import ops
from moecc.ir.restriction import Restriction

# Families whose own code bounds the sequence length; their graphs are right within the bound.
BOUNDED = ("deepseek_v4", "minimax")


def capture(found: Skeleton, *, batch: int = 2, sequence: int = 16) -> ExportedProgram:
    """Return the program `input_ids [B, S] -> logits` of a skeleton, traced at batch x sequence.

    A model without a head gives hidden states instead of logits. Raise MoeccError if the model
    can't be traced, or only for some shapes.
    """
    program = _export(found, batch, sequence)
    meta = program.graph_module.meta
    meta["restriction"] = _restriction(found, program)
    simplify(program)
    owners = _owners(found, program)
    meta["unreached"] = _unreached(found, set(owners.values()))
    meta["layers"] = stages.mark(found.model, program.graph_module, found.experts)
    for node, path in owners.items():
        node.meta["path"] = path
    program.validate()
    return program


def _export(found: Skeleton, batch: int, sequence: int) -> ExportedProgram:
    with found.mode or nullcontext():
        ids = torch.zeros(batch, sequence, dtype=torch.long)
    dynamic = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    with traceable(found), logits_alone(found.model), only_input_ids(found.model):
        return torch.export.export(
            found.model, (), {"input_ids": ids}, dynamic_shapes=dynamic, strict=False
        )


def _restriction(found: Skeleton, program: ExportedProgram) -> Restriction:
    """Return the shapes that the graph holds for.

    Raise MoeccError if it is bounded and the family's own code isn't.
    """
    try:
        found_shapes, bounded = shapes.restriction(program)
    except MoeccError as error:
        raise MoeccError(f"{found.model_type}: {error}") from error
    if bounded and found.model_type not in BOUNDED:
        raise MoeccError(f"{found.model_type}: the trace would hold for {found_shapes} only")
    return found_shapes


# ---------------------------------------------------------------- experts nodes and their modules


def _owners(found: Skeleton, program: ExportedProgram) -> dict[fx.Node, str]:
    """Return the path of the experts module behind each experts node.

    Raise MoeccError unless every experts module that the graph reads is exactly one node.
    """
    names = _state_names(program)
    owners: dict[fx.Node, str] = {}
    for node in program.graph_module.graph.nodes:
        if node.target in ops.MOE_OPS:
            operands = _operand_names(node, names)
            owners[node] = next(
                (p for p in found.experts if any(o.startswith(p + ".") for o in operands)),
                node.name,
            )
    repeated = {path for path in owners.values() if list(owners.values()).count(path) > 1}
    touched = {p for p in found.experts if _read_names(program, p)} - set(owners.values())
    if repeated or touched or not owners:
        path = next(iter(sorted(repeated | touched)), "no experts module")
        raise MoeccError(
            f"{found.model_type}: {path} isn't one experts node of the trace; "
            "the family isn't supported"
        )
    return owners


def _state_names(program: ExportedProgram) -> dict[str, str]:
    """Return the parameter or buffer of each placeholder."""
    signature = program.graph_signature
    return {**signature.inputs_to_parameters, **signature.inputs_to_buffers}


def _operand_names(node: fx.Node, names: dict[str, str]) -> set[str]:
    """Return the names of the parameters that make an experts node's weight operands."""
    found, pending, seen = set(), [a for a in node.args[3:] if isinstance(a, fx.Node)], set()
    while pending:
        operand = pending.pop()
        if operand in seen:
            continue
        seen.add(operand)
        if operand.op == "placeholder":
            found.add(names.get(operand.name, operand.name))
        pending += operand.all_input_nodes
    return found


def _read_names(program: ExportedProgram, path: str) -> set[str]:
    """Return the names of parameters and buffers under `path` that some node of the graph reads."""
    names, nodes = _state_names(program), program.graph_module.graph.find_nodes(op="placeholder")
    return {
        names[n.name] for n in nodes if n.users and names.get(n.name, "").startswith(path + ".")
    }


def _unreached(found: Skeleton, reached: set[str]) -> tuple[str, ...]:
    """Return the names of the parameters and buffers of experts modules that are no node.

    A text trace has no vision experts, and no prediction layers that don't run.
    """
    missing: list[str] = []
    for path, module in found.experts.items():
        if path not in reached:
            missing += [f"{path}.{name}" for name, _ in _state(module)]
    return tuple(missing)


def _state(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()

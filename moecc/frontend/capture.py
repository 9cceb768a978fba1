"""torch.export of a skeleton: one `moecc::experts` node per MoE layer, dynamic batch and sequence, no weight read.

  1. export with use_cache off, the experts implementation "moecc", adapters and opaque scans in place
  2. refuse a graph that holds for some shapes only (guards, bounded ranges), but for families known to be bounded
  3. strip assertions, casts to the dtype a tensor has already, dropout that is off, and what is dead then
  4. check that every experts module is either one node or not there at all
  5. mark every node with its stage and its module path

`graph_module.meta` of the result: layers (decoder layers L), restriction (text, "" if the graph holds for every shape),
unreached (names of experts parameters that no node reads). `node.meta`: layer (0 before the first decoder layer, i + 1
in layer i, L + 1 after the last, never falling along an edge), path (the deepest module; for an experts node, its own).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from moecc.errors import MoeccError, reason
from moecc.frontend import experts, shapes, stages
from moecc.frontend.families import adapted
from moecc.frontend.scans import opaque_scans
from moecc.frontend.skeleton import Skeleton
from moecc.ir import ops

# Families whose own code bounds the sequence length, and by what; their graphs are right inside the bound.
BOUNDED = ("deepseek_v4", "minimax")

aten = torch.ops.aten
ASSERTIONS = {
    aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg,
    aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default,
}  # fmt: skip
# What returns its input itself when there is nothing to convert. Copies stay: the graph may write to them in place.
CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default}
ALIASES = {aten.alias.default, aten.detach_.default}


def capture(found: Skeleton, *, batch: int = 2, sequence: int = 16) -> ExportedProgram:
    """The program `input_ids [B, S] -> logits` (or hidden states) of a skeleton, traced at batch x sequence.

    MoeccError where the model can't be traced, or only for some shapes.
    """
    program = _export(found, batch, sequence)
    meta = program.graph_module.meta
    meta["restriction"] = _restriction(found, program)
    simplify(program)
    owners = _owners(found, program)
    meta["unreached"] = _unreached(found, program, set(owners.values()))
    meta["layers"] = stages.mark(found.model, program.graph_module, found.experts)
    for node, path in owners.items():
        node.meta["path"] = path
    program.validate()
    return program


# ---------------------------------------------------------------- 1. export


@contextmanager
def _moecc_experts(model: Any) -> Iterator[None]:
    """The model in evaluation mode with moecc's experts; as it was afterwards."""
    experts.register()
    training, dispatch = model.training, getattr(model, "_can_set_experts_implementation", bool)()
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    model.eval()
    if dispatch:
        model.set_experts_implementation(experts.IMPLEMENTATION)
    try:
        yield
    finally:
        model.train(training)
        if dispatch:
            model.set_experts_implementation(before or "eager")


@contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """use_cache off in every configuration: a cache would be an output of the program."""
    configs: dict[int, Any] = {
        id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None
    }
    before = [
        (config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")
    ]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in before:
            config.use_cache = value


@contextmanager
def _only_input_ids(model: Any) -> Iterator[None]:
    """torch.export reads the signature; `**kwargs` in it would become an input of its own."""
    forward = model.forward

    def input_ids_only(input_ids: torch.Tensor) -> Any:
        return forward(input_ids=input_ids)

    had = "forward" in model.__dict__
    model.forward = input_ids_only
    try:
        yield
    finally:
        if had:
            model.forward = forward
        else:
            del model.forward


@contextmanager
def _broadcast_masks() -> Iterator[None]:
    """Masks that a model composes itself, by broadcast indices: vmap would leave its own calls in the graph."""
    from transformers import masking_utils

    original = getattr(masking_utils, "_vmap_expansion_sdpa", None)
    broadcast = getattr(masking_utils, "_non_vmap_expansion_sdpa", None)
    if original is None or broadcast is None:
        yield
        return
    module: Any = masking_utils
    module._vmap_expansion_sdpa = lambda mask: lambda *indices: mask(*broadcast(*indices))
    try:
        yield
    finally:
        module._vmap_expansion_sdpa = original


@contextmanager
def _one_line() -> Iterator[None]:
    """Without the traceback that torch logs by itself where an op can't be traced; the error that is raised says it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def traceable(found: Skeleton) -> Iterator[None]:
    """The model with everything in place that a trace needs; whatever its code raises is a MoeccError that names it."""
    model = found.model
    try:
        # Under no_grad: otherwise parts of the graph hide in set_grad_enabled sub-graphs. It stays differentiable.
        with (
            torch.no_grad(), _moecc_experts(model), adapted(model), opaque_scans(model), _broadcast_masks(), _one_line(),
        ):  # fmt: skip
            yield
    except MoeccError:
        raise
    except Exception as error:
        raise MoeccError(
            f"{found.name}: the model can't be traced: {reason(error)}{found.advice}"
        ) from error


def _export(found: Skeleton, batch: int, sequence: int) -> ExportedProgram:
    with found.mode or nullcontext():
        ids = torch.zeros(batch, sequence, dtype=torch.long)
    shapes = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    with traceable(found), _no_cache(found.model), _only_input_ids(found.model):
        return torch.export.export(
            found.model, (), {"input_ids": ids}, dynamic_shapes=shapes, strict=False
        )


# ---------------------------------------------------------------- 2. shapes


def _restriction(found: Skeleton, program: ExportedProgram) -> str:
    """For which shapes the graph holds, "" for all. It is bounded only where the family's code is."""
    try:
        text, bounded = shapes.restriction(program)
    except MoeccError as error:
        raise MoeccError(f"{found.model_type}: {error}") from error
    if bounded and found.model_type not in BOUNDED:
        raise MoeccError(f"{found.model_type}: the trace would hold for {text} only")
    return text


# ---------------------------------------------------------------- 3. simplification


def _same(node: fx.Node, other: Any) -> bool:
    """Whether both are tensors of one dtype and device."""
    a: Any = node.meta.get("val")
    b: Any = other.meta.get("val") if isinstance(other, fx.Node) else None
    return (
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and bool(a.dtype == b.dtype and a.device == b.device)
    )


def _copies(node: fx.Node) -> bool:
    schema = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return bool(node.kwargs.get("copy") or (dict(zip(schema, node.args, strict=False)).get("copy")))


def _does_nothing(node: fx.Node) -> bool:
    if node.target in CASTS:
        return _same(node, node.args[0]) and not _copies(node)
    if node.target is aten.dropout.default:
        return bool(node.args[2] is False or node.args[1] == 0)
    return node.target in ALIASES


def _has_effect(node: fx.Node) -> bool:
    """In-place ops, and functorch's calls that open and close a vmap: they have no result that is read."""
    return node.is_impure() or getattr(node.target, "__module__", "").startswith("torch._functorch")


def simplify(program: ExportedProgram) -> None:
    """Strip assertions and nodes that do nothing, then what nobody reads. Placeholders stay."""
    module = program.graph_module
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in ASSERTIONS:
            module.graph.erase_node(node)
        elif _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            program.graph_signature.replace_all_uses(
                node.name, node.args[0].name
            )  # it may be a result
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code(is_impure_node=_has_effect)
    module.graph.lint()
    module.recompile()


# ---------------------------------------------------------------- 4. experts


def _state_names(program: ExportedProgram) -> dict[str, str]:
    signature = program.graph_signature
    return {**signature.inputs_to_parameters, **signature.inputs_to_buffers}


def _operand_names(node: fx.Node, names: dict[str, str]) -> set[str]:
    """The parameters that an experts node's weight operands are made of."""
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


def _owners(found: Skeleton, program: ExportedProgram) -> dict[fx.Node, str]:
    """The experts module of each experts node. Every module that the graph touches must be exactly one node."""
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
            f"{found.model_type}: {path} isn't one experts node of the trace; the family isn't supported"
        )
    return owners


def _read_names(program: ExportedProgram, path: str) -> set[str]:
    """Names of state under `path` that some node of the graph reads."""
    names, nodes = _state_names(program), program.graph_module.graph.find_nodes(op="placeholder")
    return {
        names[n.name] for n in nodes if n.users and names.get(n.name, "").startswith(path + ".")
    }


def _unreached(found: Skeleton, program: ExportedProgram, reached: set[str]) -> tuple[str, ...]:
    """Experts parameters that no node reads: vision experts of a text trace, prediction layers that don't run."""
    missing: list[str] = []
    for path, module in found.experts.items():
        if path not in reached:
            missing += [f"{path}.{name}" for name, _ in _state(module)]
    return tuple(missing)


def _state(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()

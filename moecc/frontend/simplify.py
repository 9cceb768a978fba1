"""Strip assertions from an exported program, and casts and dropout that do nothing."""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram

aten = torch.ops.aten
ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
# These return their input itself if there is nothing to convert. Copies stay, because the graph may
# write to them in place.
CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default}
ALIASES = {aten.alias.default, aten.detach_.default}


def simplify(program: ExportedProgram) -> None:
    """Erase assertions and nodes that do nothing, then unread nodes. Placeholders stay."""
    module = program.graph_module
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in ASSERTIONS:
            module.graph.erase_node(node)
        elif _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            # The signature names results, and the node may be one.
            program.graph_signature.replace_all_uses(node.name, node.args[0].name)
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code(is_impure_node=_has_effect)
    module.graph.lint()
    module.recompile()


def _does_nothing(node: fx.Node) -> bool:
    if node.target in CASTS:
        return _same_type(node, node.args[0]) and not _copies(node)
    if node.target is aten.dropout.default:
        return bool(node.args[2] is False or node.args[1] == 0)
    return node.target in ALIASES


def _same_type(node: fx.Node, other: object) -> bool:
    """Return whether both are tensors of one dtype and device."""
    a: object = node.meta.get("val")
    b: object = other.meta.get("val") if isinstance(other, fx.Node) else None
    return (
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and bool(a.dtype == b.dtype and a.device == b.device)
    )


def _copies(node: fx.Node) -> bool:
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = [argument.name for argument in node.target._schema.arguments]
    return bool(node.kwargs.get("copy") or (dict(zip(schema, node.args, strict=False)).get("copy")))


def _has_effect(node: fx.Node) -> bool:
    """Return whether a node without a reader must stay.

    In-place ops must, and so must functorch's calls that open and close a vmap.
    """
    return node.is_impure() or getattr(node.target, "__module__", "").startswith("torch._functorch")

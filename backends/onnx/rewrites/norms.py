"""RMS norms in the form that ONNX Runtime's kernels want."""

from __future__ import annotations

import onnx_ir as ir

from moecc.backends.onnx.graph import MICROSOFT, Ops, producer


def cast_to_scale(model: ir.Model) -> None:
    """Cast the input of each norm to the type of its scale.

    RMSNormalization may have two types in ONNX; ONNX Runtime's kernel has one.
    """
    for node in _norms(model):
        x, scale = node.inputs[:2]
        assert x is not None and scale is not None
        if scale.dtype is not None and x.dtype != scale.dtype:
            op = Ops()
            cast = op.Cast(x, to=int(scale.dtype))
            cast.name, cast.shape, cast.type = f"{node.name}.x", x.shape, scale.type
            model.graph.insert_before(node, *op.tape.nodes)
            node.replace_input_with(0, cast)


def join_with_sums(model: ir.Model) -> None:
    """Join each norm with the sum before it, which is needed itself too, in one operator."""
    for node in _norms(model):
        total, norm = node.inputs[:2]
        add = producer(total)
        if total is None or norm is None or add is None or not _joinable(node, total, norm, add):
            continue
        op = Ops()
        normed, summed = op.value(), op.value()
        unused = [ir.Value(name=""), ir.Value(name="")]
        joined = ir.Node(
            MICROSOFT,
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, norm],
            outputs=[normed, *unused, summed],
            attributes=[ir.AttrFloat32("epsilon", node.attributes["epsilon"].as_float())],
            name=f"{node.name}.joined",
        )
        model.graph.insert_after(add, joined)
        for old, new in ((node.outputs[0], normed), (total, summed)):
            new.name, new.shape, new.type = f"{old.name}.joined", old.shape, old.type
            old.replace_all_uses_with(new)
        model.graph.remove([node, add], safe=True)


def _norms(model: ir.Model) -> list[ir.Node]:
    return [n for n in model.graph if n.op_type == "RMSNormalization"]


def _joinable(node: ir.Node, total: ir.Value, scale: ir.Value, add: ir.Node) -> bool:
    if add.op_type != "Add" or node.attributes["axis"].as_int() != -1:
        return False
    if total.is_graph_output() or node.outputs[0].is_graph_output():
        return False
    # The nodes of a computed scale may stand behind the sum, and the operator has one type for all.
    if scale.producer() is not None or scale.dtype != total.dtype:
        return False
    left, right = (None if v is None else v.shape for v in add.inputs)
    return left is not None and len(left) == 3 and left == right

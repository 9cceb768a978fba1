"""The rules of the IR: well-formed graph, node metadata, matching operands, finite weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from moecc.errors import MoeccError
from moecc.ir import ops, vq4
from moecc.ir.moe import MoE, operand, operand_names
from moecc.ir.tensors import Held, Weight, nonfinite
from moecc.ir.text import SHORT, node_text, type_text


def verify(graph: fx.Graph, weights: Mapping[str, Weight], tensors: Held) -> None:
    """Raise MoeccError, with node and shape, if a graph breaks a rule of the IR.

    weights: by placeholder name; tensors: the held ones, by weight name.
    """
    try:
        graph.lint()
    except RuntimeError as e:  # torch.fx appends the whole graph to its message
        raise MoeccError(f"the graph isn't one: {str(e).splitlines()[0]}") from e
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in weights:
            _verify_weight(node, weights[node.name].name, tensors)
        if node.op != "call_function":
            continue
        _verify_metadata(node)
        if node.target in ops.MOE_OPS or node.target is ops.Q_LINEAR:
            _verify_call(node)


def _verify_weight(node: fx.Node, name: str, tensors: Held) -> None:
    held = tensors.in_memory(name)
    if held is None:  # a spilled tensor was checked before it was spilled
        return
    val = node.meta["val"]
    if held.shape != val.shape or held.dtype != val.dtype:
        raise MoeccError(f"weight {name} is {type_text(held)} but its node says {type_text(val)}")
    if found := nonfinite(held):
        raise MoeccError(f"weight {name} holds {found}")


def _verify_metadata(node: fx.Node) -> None:
    if "val" not in node.meta or "layer" not in node.meta:
        raise MoeccError(f"{node_text(node)} lacks meta 'val' or 'layer'; a pass must set both")
    stage = node.meta["layer"]
    late = next((i for i in node.all_input_nodes if i.meta["layer"] > stage), None)
    if late is not None:
        reads = f"reads %{late.name} of stage {late.meta['layer']}"
        raise MoeccError(f"node %{node.name} in stage {stage} {reads}")


def _verify_call(node: fx.Node) -> None:
    """Run an op of the dialect on fake tensors, then compare the shapes of its operands."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    values = [i.meta["val"] for i in node.all_input_nodes]
    mode = next(v.fake_mode for v in values if hasattr(v, "fake_mode"))
    assert callable(node.target)
    try:
        with mode:
            node.target(*args, **kwargs)
        if node.target in ops.MOE_OPS:
            _verify_operands(node)
    except MoeccError:
        raise
    except Exception as e:
        raise MoeccError(f"{node_text(node)} does not type-check: {e}") from e


def _verify_operands(node: fx.Node) -> None:
    """Compare the shapes and types of an experts node's weights with each other."""
    moe = MoE(node, "", 0, None)
    given = {n: v for n in operand_names(node) if (v := operand(node, n)) is not None}
    shapes = {name: tuple(v.meta["val"].shape) for name, v in given.items()}
    wanted = _plain_shapes(moe)
    for projection in moe.projections:
        names = {t: projection.operand_name(t) for t in vq4.TENSORS}
        own = {t: shapes[name] for t, name in names.items() if name in shapes}
        found = vq4.fault(
            own, projection.shape, input_side=projection.input_side, called=names.__getitem__
        )
        if found:
            raise MoeccError(f"{node_text(node)}: {found}")
    for name, want in wanted.items():
        if name in shapes and shapes[name] != want:
            raise MoeccError(f"{node_text(node)}: {name} is {shapes[name]}, expected {want}")
    if node.target is ops.VQ_EXPERTS:
        _verify_types(node, given)


def _plain_shapes(moe: MoE) -> dict[str, vq4.Shape]:
    """Return the shapes of the operands that depend on the layer's sizes alone."""
    wanted: dict[str, vq4.Shape] = {p.name: p.shape for p in moe.projections}
    for part in ("bias", "slope", "offset"):  # one value per row
        wanted.update({p.operand_name(part): p.shape[:2] for p in moe.projections})
    wanted["post_norm"] = moe.sizes[2:3]
    return wanted


def _verify_types(node: fx.Node, given: Mapping[str, fx.Node]) -> None:
    for name, value in given.items():
        kind = name.removeprefix("gate_up_").removeprefix("down_").removeprefix(vq4.MEAN)
        val = value.meta["val"]
        if kind in vq4.DTYPES and val.dtype not in vq4.DTYPES[kind]:
            want = " or ".join(SHORT[d] for d in vq4.DTYPES[kind])
            raise MoeccError(f"{node_text(node)}: {name} is {type_text(val)}, expected {want}")

"""`moecc inspect`: what a model is made of and what a pipeline would make of it, without reading a weight.

  1. The model is traced from its configuration; every experts node says experts, top-k, shapes and gate, and the nodes
     between the router's linear and the chosen indices say how it routes.
  2. Every parameter is counted under a role, in the dtype on disk (or, without weights, that of the configuration).
  3. A pipeline is judged by what its passes provide and their options: a coded projection costs what `moecc.ir.vq4` says.
     What a pass decides only when it sees weights (codebooks, offsets) gives a low and a high estimate. A mean and a shared
     basis that are automatic are left out: they are taken where they save more bits at equal error than they cost.

Shapes: E experts, N rows and K columns of a projection, D hidden, F intermediate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from torch import fx, nn

from moecc.artifact.audit import role_of
from moecc.checkpoint.files import size
from moecc.errors import MoeccError
from moecc.frontend.capture import capture
from moecc.frontend.skeleton import skeleton
from moecc.frontend.trace import program_of
from moecc.ir import ops, vq4
from moecc.ir.graph import ancestors
from moecc.ir.moe import MoE
from moecc.ir.program import Program
from moecc.pipeline.bits import expert_weights
from moecc.pipeline.order import require_whole, resolve
from moecc.pipeline.parse import parse_passes
from moecc.pipeline.passes import Pass

_SILENT = {
    "view",
    "reshape",
    "getitem",
    "to",
    "_to_copy",
    "unsqueeze",
    "squeeze",
    "expand",
    "zeros_like",
    "flatten",
}


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer. router: the operations from the router's logits to the chosen experts."""

    path: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    gate: str
    layout: str
    router: str
    form: str


def inspect_model(
    model: str, *, passes: str | None = None, bits: float | None = None
) -> dict[str, Any]:
    """What `moecc inspect --json` prints. `model` is a folder or a hub id; MoeccError where it can't be traced."""
    wanted = _resolved(passes, bits) if passes is not None else None
    found = skeleton(model)
    program = program_of(capture(found), found, model)
    sizes = _sizes(program, found.model)
    layers = [_layer(program, moe) for moe in program.moe_layers()]
    total = sum(s["bytes"] for s in sizes.values())
    result: dict[str, Any] = {
        "model": model, "model_type": found.model_type, "class": type(found.model).__name__,
        "decoder_layers": program.layers - 2, "restriction": program.restriction,
        "has_weights": program.store is not None,
        "moe_layers": [asdict(layer) for layer in layers], "sizes": sizes,
        "parameters": sum(s["parameters"] for s in sizes.values()), "bytes": total,
        "has_shared_expert": "shared expert" in sizes,
    }  # fmt: skip
    if wanted is not None:
        if any(layer.form != "moecc::experts" for layer in layers):
            raise MoeccError(f"{model} is compressed already; give the checkpoint it was made from")
        result["estimate"] = _estimate(program, found.model, sizes, wanted)
    return result


def least_bytes(program: Program, passes: Sequence[Pass]) -> int:
    """Bytes that a compilation of a checkpoint's program takes on disk at its end, at least.

    The artifact, and beside it the journal, which holds the coded experts once more."""
    written: int = _estimate(program, None, _sizes(program), passes)["bytes"][0]
    if not any("vq" in p.provides for p in passes):
        return written
    return written + round(sum(_experts_bits(moe, passes)[0] for moe in program.moe_layers()) / 8)


def _resolved(passes: str, bits: float | None) -> list[Pass]:
    found = resolve(parse_passes(passes, bits=bits)[0])[0]
    require_whole(found)
    return found


# ---------------------------------------------------------------- structure


def _layer(program: Program, moe: MoE) -> MoELayer:
    experts, _, hidden, intermediate = moe.sizes
    attributes = moe.attributes
    gate = (
        attributes["act"]
        if attributes["gate"] == "none"
        else f"{attributes['act']}, {attributes['gate']}"
    )
    form = str(moe.node.target).removesuffix(".default").replace(".", "::")
    return MoELayer(
        moe.path,
        experts,
        moe.top_k,
        hidden,
        intermediate,
        gate,
        _layout(program, moe),
        _router(program, moe),
        form,
    )


def _layout(program: Program, moe: MoE) -> str:
    """How the checkpoint's experts become canonical: nothing to do, or the operations that do it."""
    if moe.node.target is not ops.EXPERTS:
        return "compressed"
    parts = []
    for projection in ("gate_up", "down"):
        recipe = program.weights[moe.operand(projection).name].recipe  # type: ignore[union-attr]
        calls = [] if recipe is None else [n for n in recipe.graph.nodes if n.op == "call_function"]
        parts.append(" ".join(_short(n) for n in calls) or "canonical")
    return parts[0] if parts[0] == parts[1] else f"gate_up {parts[0]}; down {parts[1]}"


def _router(program: Program, moe: MoE) -> str:
    """Names of the operations between the router's logits and topk_index, bookkeeping left out."""
    index = moe.node.args[1]
    if moe.logits is None:
        return "no linear found before the choice"
    above = ancestors([index])  # type: ignore[list-item]
    below: set[fx.Node] = {moe.logits}
    names = []
    for node in program.graph.nodes:
        if node in above and node not in below and any(i in below for i in node.all_input_nodes):
            below.add(node)
            names.append(_short(node))
    return " > ".join(name for name, _ in groupby(n for n in names if n not in _SILENT)) or "linear"


def _short(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.rpartition("::")[2]).rstrip("_")
    return str(getattr(target, "__name__", target))


# ---------------------------------------------------------------- sizes


def _sizes(program: Program, model: nn.Module | None = None) -> dict[str, dict[str, int]]:
    """parameters and bytes by role, largest first."""
    sizes: dict[str, dict[str, int]] = {}
    moes, linears = program.moe_layers(), _quantized_linears(program)
    for name, shape, itemsize in _parameters(program, model):
        routed = next((m for m in moes if name.startswith(m.path + ".")), None)
        row = sizes.setdefault(
            "routed experts" if routed else role_of(name), {"parameters": 0, "bytes": 0}
        )
        row["bytes"] += math.prod(shape) * itemsize
        path, _, leaf = name.rpartition(".")
        if (
            routed is None or routed.node.target is ops.EXPERTS
        ):  # of compressed experts the floats they stand for count
            packed = 8 // linears[path]["bits"] if path in linears else 1
            row["parameters"] += (
                math.prod(shape) * packed
                if path not in linears or leaf in ("weight", "bias")
                else 0
            )
    if "routed experts" in sizes:
        compressed = (m for m in moes if m.node.target is not ops.EXPERTS)
        sizes["routed experts"]["parameters"] += sum(expert_weights(m) for m in compressed)
    return dict(sorted(sizes.items(), key=lambda item: -item[1]["bytes"]))


def _quantized_linears(program: Program) -> dict[str, Any]:
    settings = getattr(program.config, "quantization_config", None) or {}
    linears: dict[str, Any] = (
        settings.get("linears", {}) if isinstance(settings, dict) else settings.linears
    )
    return linears


def _parameters(
    program: Program, model: nn.Module | None
) -> Iterable[tuple[str, tuple[int, ...], int]]:
    """(name, shape, bytes per element) of everything that a checkpoint stores, tied tensors once; without one, of `model`."""
    store: Any = program.store
    if store is not None:
        for name in store.names():
            if name not in store.tied:
                yield name, tuple(store.shape(name)), store.dtype(name).itemsize
        return
    assert model is not None
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, p in model.named_parameters():
        if name not in tied:
            yield name, tuple(p.shape), p.dtype.itemsize


# ---------------------------------------------------------------- what a pipeline would give


def _estimate(
    program: Program,
    model: nn.Module | None,
    sizes: dict[str, dict[str, int]],
    passes: Sequence[Pass],
) -> dict[str, Any]:
    """Bytes and bits per weight, low and high, behind `passes`. Bits are per parameter of the float model."""
    low = high = weights_of_experts = 0.0
    moes = program.moe_layers()
    for moe in moes:
        a, b = _experts_bits(moe, passes)
        low, high, weights_of_experts = low + a, high + b, weights_of_experts + expert_weights(moe)
    routed = sizes.get("routed experts", {"bytes": 0})["bytes"]
    if not any("vq" in p.provides for p in passes):
        low = high = 8.0 * routed
    elif budget := next((p for p in passes if "budget" in p.provides), None):
        if low > (high := weights_of_experts * budget.bits):  # type: ignore[attr-defined]
            raise MoeccError(
                f"{budget}: too few bits; with scales and codebooks the least is {low / weights_of_experts:.3f}"
            )
    high += sum(_absorbed_bits(moe, passes) for moe in moes)
    rest = 8.0 * (sum(s["bytes"] for s in sizes.values()) - routed) - _dense_saving(
        program, model, passes
    )
    weights = sum(s["parameters"] for s in sizes.values())
    return {
        "pipeline": ",".join(map(str, passes)),
        "bytes": [round((low + rest) / 8), round((high + rest) / 8)],
        "bits_per_weight_experts": [low / weights_of_experts, high / weights_of_experts],
        "bits_per_weight": [(low + rest) / weights, (high + rest) / weights],
        "automatic_basis": not any("budget" in p.provides for p in passes)
        and any(
            "basis" in p.provides and "auto" in (getattr(p, "rank", ""), getattr(p, "mean", ""))
            for p in passes
        ),
        "not_estimated": [p.name for p in passes if p.file],
    }


def _experts_bits(moe: MoE, passes: Sequence[Pass]) -> tuple[float, float]:
    """Bits of one layer's routed experts in the format `vq4`, at least and at most."""
    experts = moe.sizes[0]
    low = high = 0.0
    for n, k, input_side in _projections(moe):
        a, b = _projection_bits(experts, n, k, passes, input_side)
        low, high = low + a, high + b
    return low, high


def _absorbed_bits(moe: MoE, passes: Sequence[Pass]) -> int:
    """Bits of the rows by which an adapter of the experts, if there is one, makes the layer's bases grow."""
    rank, experts = _option(passes, "absorbed", "rank", 0), moe.sizes[0]
    grown = (
        vq4.basis_bits(min(rank, k if side else n), experts, n, k, input_side=side)
        for n, k, side in _projections(moe)
    )
    return sum(grown) if rank else 0


def _projections(moe: MoE) -> tuple[tuple[int, int, bool], ...]:
    """N, K and whether the basis is on the input's side, of gate_up and down."""
    _, rows, hidden, intermediate = moe.sizes
    return (rows, hidden, True), (hidden, intermediate, False)


def _projection_bits(
    experts: int, rows: int, columns: int, passes: Sequence[Pass], input_side: bool
) -> tuple[float, float]:
    bits = _option(passes, "vq", "bits", 2)
    low, high = (vq4.coded_bits(experts, rows, columns, bits, books=n) for n in (1, experts))
    planned = any("budget" in p.provides for p in passes)
    chosen = _option(passes, "budget" if planned else "vq", "codebook", "auto")
    low, high = (high if chosen == "expert" else low), (low if chosen == "layer" else high)
    offset = (
        _option(passes, "affine", "offset", "auto")
        if any("affine" in p.provides for p in passes)
        else "off"
    )
    low, high = (
        low + 16 * experts * rows * (offset == "on"),
        high + 16 * experts * rows * (offset != "off"),
    )
    if not any("basis" in p.provides for p in passes):
        return low, high
    rank, mean = _option(passes, "basis", "rank", "auto"), _option(passes, "basis", "mean", "auto")
    certain = (
        0
        if rank == "auto"
        else vq4.basis_bits(int(rank), experts, rows, columns, input_side=input_side)
    )
    certain += 0 if mean in ("auto", "off") else vq4.coded_bits(1, rows, columns, int(mean))
    return low + certain, high + certain


def _dense_saving(program: Program, model: nn.Module | None, passes: Sequence[Pass]) -> float:
    """Bits that group quantization of attention and shared-expert matrices saves."""
    if not any("dense" in p.provides for p in passes):
        return 0.0
    bits, group = _option(passes, "dense", "bits", 8), _option(passes, "dense", "group", 64)
    saving = 0.0
    for name, shape, itemsize in _parameters(program, model):
        if (
            len(shape) == 2
            and role_of(name) in ("attention", "shared expert")
            and shape[1] % group == 0
        ):
            saving += math.prod(shape) * (8 * itemsize - bits - 24 / group) if shape[0] >= 32 else 0
    return saving


def _option(passes: Sequence[Pass], fact: str, option: str, default: Any) -> Any:
    """The value of `option` of the pass that provides `fact`; its default where no pass has it."""
    return next(
        (getattr(p, option) for p in passes if fact in p.provides and hasattr(p, option)), default
    )


# ---------------------------------------------------------------- for people


def table(found: dict[str, Any]) -> str:
    """What `moecc inspect` prints without --json."""
    lines = [
        f"{found['model']}: {found['class']} ({found['model_type']}), {found['decoder_layers']} decoder layers, "
        f"{len(found['moe_layers'])} of them MoE, {_count(found['parameters'])} parameters, {size(found['bytes'])}"
        + ("" if found["has_weights"] else " (from the configuration)"),
        "",
    ]
    same = ("experts", "top_k", "hidden", "intermediate", "gate", "layout", "router", "form")
    for _, group in groupby(found["moe_layers"], lambda layer: [layer[k] for k in same]):
        lines += _layer_lines(list(group), found["has_shared_expert"])
    width = max(len(role) for role in found["sizes"])
    for role, row in found["sizes"].items():
        share = 100 * row["bytes"] / max(found["bytes"], 1)
        lines.append(
            f"  {role:<{width}}  {_count(row['parameters']):>10}  {size(row['bytes']):>10}  {share:5.1f} %"
        )
    if found["restriction"]:
        lines += ["", f"The trace holds for {found['restriction']} only."]
    if "estimate" in found:
        lines += ["", *_estimate_lines(found["estimate"])]
    return "\n".join(lines)


def _layer_lines(group: list[dict[str, Any]], shared: bool) -> list[str]:
    one, last = group[0], group[-1]
    names = (
        one["path"] if len(group) == 1 else f"{one['path']} .. {last['path']} ({len(group)} layers)"
    )
    return [
        names,
        f"  {one['experts']} experts, top-{one['top_k']}, hidden {one['hidden']}, intermediate {one['intermediate']}, "
        f"{one['gate']}{', shared expert' if shared else ''}",
        f"  layout {one['layout']}; router {one['router']}; {one['form']}",
        "",
    ]


def _estimate_lines(found: dict[str, Any]) -> list[str]:
    def span(values: list[float], form: str) -> str:
        low, high = (format(v, form) for v in values)
        return low if low == high else f"{low} to {high}"

    low, high = (size(n) for n in found["bytes"])
    return [
        f"with {found['pipeline']}",
        f"  about {low if low == high else f'{low} to {high}'}: {span(found['bits_per_weight_experts'], '.3f')} bits "
        f"per routed-expert weight, {span(found['bits_per_weight'], '.3f')} over everything",
        *(
            ["  a shared mean and basis come on top where they earn their bits"]
            if found["automatic_basis"]
            else []
        ),
        *(
            [f"  what {', '.join(found['not_estimated'])} would change isn't known"]
            if found["not_estimated"]
            else []
        ),
    ]


def _count(n: int) -> str:
    return next(
        (f"{n / d:.2f} {unit}" for unit, d in (("B", 1e9), ("M", 1e6), ("k", 1e3)) if n >= d),
        str(n),
    )

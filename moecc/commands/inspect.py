"""`moecc inspect`: what a model is made of and what a pipeline would make of it, without reading a weight.

  1. The model is traced from its configuration; every experts node says experts, top-k, shapes and gate, and the nodes
     between the router's linear and the chosen indices say how it routes.
  2. Every parameter is counted under a role, in the dtype on disk (or, without weights, that of the configuration).
  3. Every pass of a pipeline says what it would store (`Pass.estimate`), at least and at most where it decides only when it
     sees weights.

Shapes: E experts, N rows and K columns of a projection, D hidden, F intermediate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from torch import fx, nn

from moecc.checkpoint.files import size
from moecc.checkpoint.roles import ROUTED, role_of
from moecc.checkpoint.schema import Compression
from moecc.errors import MoeccError
from moecc.frontend.capture import capture
from moecc.frontend.skeleton import skeleton
from moecc.frontend.trace import program_of
from moecc.ir import ops
from moecc.ir.graph import ancestors
from moecc.ir.moe import MoE
from moecc.ir.program import Program
from moecc.pipeline.bits import per_weight
from moecc.pipeline.estimate import Estimate, Matrix, Outlook
from moecc.pipeline.order import require_whole, resolve
from moecc.pipeline.parse import parse_passes
from moecc.pipeline.passes import Pass
from moecc.types import Json

# bookkeeping that says nothing about how a router chooses
_SILENT = frozenset(
    "view reshape getitem to _to_copy unsqueeze squeeze expand zeros_like flatten".split()
)


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
        result["estimate"] = _estimated(
            _estimate(program, found.model, wanted), wanted, result["parameters"]
        )
    return result


def least_bytes(program: Program, passes: Sequence[Pass]) -> int:
    """Bytes that a compilation of a checkpoint's program takes on disk at its end, at least.

    The artifact, and beside it the journal, which holds the coded experts once more.
    """
    found = _estimate(program, None, passes)
    return round((found.experts[0] + found.rest + found.coded) / 8)


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
    for projection in moe.projections:
        recipe = program.weights[projection.operand().name].recipe  # type: ignore[union-attr]
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
    linears = Compression.of(program.config).linears
    for name, role, shape, itemsize in _parameters(program, model):
        row = sizes.setdefault(role, {"parameters": 0, "bytes": 0})
        row["bytes"] += math.prod(shape) * itemsize
        path, _, leaf = name.rpartition(".")
        packed = 8 // linears[path].bits if path in linears else 1
        if path not in linears or leaf in ("weight", "bias"):
            row["parameters"] += math.prod(shape) * packed
    if ROUTED in sizes and any(m.node.target is not ops.EXPERTS for m in program.moe_layers()):
        # of compressed experts the weights that they stand for count
        sizes[ROUTED]["parameters"] = sum(m.weights for m in program.moe_layers())
    return dict(sorted(sizes.items(), key=lambda item: -item[1]["bytes"]))


def _parameters(
    program: Program, model: nn.Module | None
) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """(name, role, shape, bytes per element) of all that a checkpoint stores, tied tensors once; without one, of `model`."""
    paths = tuple(m.path + "." for m in program.moe_layers())

    def role(name: str) -> str:
        return ROUTED if name.startswith(paths) else role_of(name)

    store = program.store
    if store is not None:
        for name in store.names():
            if name not in store.tied:
                yield name, role(name), tuple(store.shape(name)), store.dtype(name).itemsize
        return
    assert model is not None
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, p in model.named_parameters():
        if name not in tied:
            yield name, role(name), tuple(p.shape), p.dtype.itemsize


# ---------------------------------------------------------------- what a pipeline would give


def _estimate(program: Program, model: nn.Module | None, passes: Sequence[Pass]) -> Estimate:
    """What `passes` would make of the model's parameters."""
    others: dict[str, Matrix] = {}
    routed = 0
    for name, role, shape, itemsize in _parameters(program, model):
        if role == ROUTED:
            routed += 8 * math.prod(shape) * itemsize
        else:
            others[name] = Matrix(shape, role, 8 * math.prod(shape) * itemsize)
    projections = [p for moe in program.moe_layers() for p in moe.projections]
    share = per_weight(routed, sum(p.weights for p in projections))  # biases count with the weights
    outlooks = [
        Outlook(p.path, *p.shape, p.input_side, share * p.weights, share * p.weights)
        for p in projections
    ]
    return Estimate(outlooks, others).run(passes)


def _estimated(found: Estimate, passes: Sequence[Pass], weights: int) -> Json:
    """Bytes and bits per weight, low and high. weights: the float model's."""
    both = [experts + found.rest for experts in found.experts]
    return {
        "pipeline": ",".join(map(str, passes)),
        "bytes": [round(bits / 8) for bits in both],
        "bits_per_weight_experts": [per_weight(bits, found.weights) for bits in found.experts],
        "bits_per_weight": [per_weight(bits, weights) for bits in both],
        "remarks": found.remarks,
        "not_estimated": found.unknown,
    }


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
        *(f"  {remark}" for remark in found["remarks"]),
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

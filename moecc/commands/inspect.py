"""`moecc inspect`: describe a model and what a pipeline would store, without reading a weight.

1. The model is traced from its configuration. Every experts node gives experts, top-k, shapes and
   gate; the nodes between the router's linear and the chosen indices show how it routes.
2. Every parameter is counted under a role, in the dtype on disk, or in that of the configuration
   if there are no weights.
3. Every pass of a pipeline estimates what it would store (`Pass.estimate`): a least and a most if
   it decides only when it sees weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby

import torch
from torch import fx, nn

from moecc.checkpoint.files import size
from moecc.checkpoint.roles import ROUTED, role_of
from moecc.checkpoint.schema import Compression
from moecc.errors import MoeccError, printable_lines
from moecc.frontend.capture import capture
from moecc.frontend.resize import expert_groups
from moecc.frontend.skeleton import skeleton
from moecc.frontend.trace import program_of, store_of
from moecc.ir import ops
from moecc.ir.graph import ancestors
from moecc.ir.moe import MoE
from moecc.ir.program import Program
from moecc.ir.restriction import Restriction
from moecc.pipeline.bits import per_weight
from moecc.pipeline.device import device_called
from moecc.pipeline.estimate import Estimate, Matrix, Outlook
from moecc.pipeline.order import require_whole, resolve
from moecc.pipeline.parse import parse_passes
from moecc.pipeline.passes import Pass
from moecc.pipeline.plan import BATCH, planned
from moecc.target import Sizes
from moecc.types import Json

# bookkeeping, which does not show how a router chooses
_SILENT = frozenset(
    "view reshape getitem to _to_copy unsqueeze squeeze expand zeros_like flatten".split()
)


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer.

    layout: how the checkpoint's experts become canonical. router: the operations from the router's
    logits to the chosen experts. form: the op that computes the experts.
    """

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
    model: str,
    *,
    passes: str | None = None,
    bits: float | None = None,
    rows: int = 64,
    length: int = 512,
    workers: int | None = None,
    max_memory: int | None = None,
    device: str = "cpu",
) -> Json:
    """Return what `moecc inspect --json` prints of `model`, a folder or a hub id.

    passes: a pipeline to estimate and to plan. bits: the default of its options of that name. The
    others are those of `compile_model`, for the plan. Raise MoeccError if the model cannot be
    traced, if its weights do not fit it, if it is compressed already and a pipeline is given, or if
    the pipeline takes more than `max_memory` bytes.
    """
    wanted = _resolved(passes, bits) if passes is not None else None
    where = device_called(device)
    found = skeleton(model)
    store = store_of(found)
    if store is not None:
        store.check()
    program = program_of(capture(found), found, model, store)
    sizes = _sizes(program, found.model)
    layers = [_layer(program, moe) for moe in program.moe_layers()]
    result: Json = {
        "model": model,
        "model_type": found.model_type,
        "class": type(found.model).__name__,
        "decoder_layers": program.layers - 2,
        "restriction": program.restriction.as_json(),
        "has_weights": program.store is not None,
        "moe_layers": [asdict(layer) for layer in layers],
        "sizes": sizes,
        "parameters": sum(s["parameters"] for s in sizes.values()),
        "bytes": sum(s["bytes"] for s in sizes.values()),
        "has_shared_expert": "shared expert" in sizes,
    }
    if wanted is not None:
        if any(layer.form != "moecc::experts" for layer in layers):
            raise MoeccError(f"{model} is compressed already; give the checkpoint it was made from")
        estimate = _estimate(program, found.model, wanted)
        experts = sum(moe.weights for moe in program.moe_layers())
        rest = result["parameters"] - experts
        result["estimate"] = _estimated(estimate, wanted, rest, estimate.weights / experts)
        tokens, row = rows * length, min(rows, BATCH) * length
        there = replace(program, device=where)
        intended = planned(there, wanted, tokens, row, workers=workers, most=max_memory)
        result["estimate"]["plan"] = intended.lines(wanted, torch.get_num_threads())
    return result


def least_sizes(program: Program, passes: Sequence[Pass]) -> tuple[Sizes, int]:
    """Return the least sizes of the artifact that `passes` make of a checkpoint's program.

    Beside it, the least bytes of the journal at the end, which has the coded experts once more.
    """
    found = _estimate(program, None, passes)
    weights = found.weights + sum(m.weights for m in found.others.values())
    return Sizes(weights, round((found.experts[0] + found.rest) / 8)), round(found.coded / 8)


def _resolved(passes: str, bits: float | None) -> list[Pass]:
    found = resolve(parse_passes(passes, bits=bits)[0])[0]
    require_whole(found)
    return found


# ---------------------------------------------------------------- structure


def _layer(program: Program, moe: MoE) -> MoELayer:
    experts, _, hidden, intermediate = moe.sizes
    act, gate = moe.attributes["act"], moe.attributes["gate"]
    return MoELayer(
        path=moe.path,
        experts=experts,
        top_k=moe.top_k,
        hidden=hidden,
        intermediate=intermediate,
        gate=act if gate == "none" else f"{act}, {gate}",
        layout=_layout(program, moe),
        router=_router(program, moe),
        form=str(moe.node.target).removesuffix(".default").replace(".", "::"),
    )


def _layout(program: Program, moe: MoE) -> str:
    """Return the operations that make the checkpoint's experts canonical, per projection.

    Return "canonical" if they are so already, "compressed" if the experts are coded.
    """
    if moe.node.target is not ops.EXPERTS:
        return "compressed"
    parts = []
    for projection in moe.projections:
        recipe = program.weights[projection.operand().name].recipe  # type: ignore[union-attr]
        calls = [] if recipe is None else [n for n in recipe.graph.nodes if n.op == "call_function"]
        parts.append(" ".join(_short(n) for n in calls) or "canonical")
    return parts[0] if parts[0] == parts[1] else f"gate_up {parts[0]}; down {parts[1]}"


def _router(program: Program, moe: MoE) -> str:
    """Return the names of the operations from the router's logits to topk_index.

    Bookkeeping is left out, and a name that repeats stands once.
    """
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
    """Return parameters and bytes by role, most bytes first."""
    sizes: dict[str, dict[str, int]] = {}
    linears = Compression.of(program.config).linears
    for name, role, shape, itemsize in _parameters(program, model):
        row = sizes.setdefault(role, {"parameters": 0, "bytes": 0})
        row["bytes"] += math.prod(shape) * itemsize
        path, _, leaf = name.rpartition(".")
        # scales of a quantized linear are no parameters, and a byte of its codes holds several
        if path not in linears or leaf == "bias":
            row["parameters"] += math.prod(shape)
        elif leaf == "weight":
            row["parameters"] += math.prod(shape) * (8 // linears[path].bits)
    if ROUTED in sizes and any(m.node.target is not ops.EXPERTS for m in program.moe_layers()):
        # compressed experts count as the weights that they stand for
        sizes[ROUTED]["parameters"] = sum(m.weights for m in program.moe_layers())
    return dict(sorted(sizes.items(), key=lambda item: -item[1]["bytes"]))


def _parameters(
    program: Program, model: nn.Module | None
) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Yield (name, role, shape, bytes per element) of every tensor that the checkpoint stores.

    Without a checkpoint these are the tensors in the state of `model`. Tied tensors come once.
    """
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
    state = model.state_dict().keys() - (getattr(model, "all_tied_weights_keys", None) or {}).keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state:
            yield name, role(name), tuple(tensor.shape), tensor.dtype.itemsize


# ---------------------------------------------------------------- what a pipeline would store


def _estimate(program: Program, model: nn.Module | None, passes: Sequence[Pass]) -> Estimate:
    """Return what `passes` would store of the model's parameters."""
    others: dict[str, Matrix] = {}
    routed = 0
    for name, role, shape, itemsize in _parameters(program, model):
        if role == ROUTED:
            routed += 8 * math.prod(shape) * itemsize
        else:
            others[name] = Matrix(shape, role, 8 * math.prod(shape) * itemsize)
    projections = [p for moe in program.moe_layers() for p in moe.projections]
    share = per_weight(routed, sum(p.weights for p in projections))  # biases count with the weights
    groups = expert_groups(program.config)
    outlooks = [
        Outlook(
            p.path,
            *p.shape,
            p.input_side,
            low=share * p.weights,
            high=share * p.weights,
            top_k=p.moe.top_k,
            groups=groups,
        )
        for p in projections
    ]
    return Estimate(outlooks, others).run(passes)


def _estimated(found: Estimate, passes: Sequence[Pass], rest: int, left: float) -> Json:
    """Return bytes and bits per weight that is left, each as [low, high].

    rest: weights besides the routed experts'. left: the share of theirs that isn't pruned.
    """
    both = [experts + found.rest for experts in found.experts]
    weights = rest + found.weights
    return {
        "pipeline": ",".join(map(str, passes)),
        "bytes": [round(bits / 8) for bits in both],
        "bits_per_weight_experts": [per_weight(bits, found.weights) for bits in found.experts],
        "bits_per_weight": [per_weight(bits, weights) for bits in both],
        "experts_left": left,
        "remarks": found.remarks,
        "not_estimated": found.unknown,
    }


# ---------------------------------------------------------------- for people


def table(found: Json) -> str:
    """Return what `moecc inspect` prints without --json."""
    lines = [_model_line(found), ""]
    same = ("experts", "top_k", "hidden", "intermediate", "gate", "layout", "router", "form")
    for _, group in groupby(found["moe_layers"], lambda layer: [layer[k] for k in same]):
        lines += _layer_lines(list(group), found["has_shared_expert"])
    width = max(len(role) for role in found["sizes"])
    for role, row in found["sizes"].items():
        share = 100 * row["bytes"] / max(found["bytes"], 1)
        counts = f"{_count(row['parameters']):>10}  {size(row['bytes']):>10}"
        lines.append(f"  {role:<{width}}  {counts}  {share:5.1f} %")
    if found["restriction"]:
        held = Restriction.of_json(found["restriction"])
        lines += ["", f"The trace holds for {held} only."]
    if "estimate" in found:
        lines += ["", *_estimate_lines(found["estimate"])]
    return printable_lines(lines)


def _model_line(found: Json) -> str:
    kind = f"{found['class']} ({found['model_type']})"
    layers = f"{found['decoder_layers']} decoder layers, {len(found['moe_layers'])} of them MoE"
    sizes = f"{_count(found['parameters'])} parameters, {size(found['bytes'])}"
    origin = "" if found["has_weights"] else " (from the configuration)"
    return f"{found['model']}: {kind}, {layers}, {sizes}{origin}"


def _layer_lines(group: list[Json], shared: bool) -> list[str]:
    one, paths = group[0], group[0]["path"]
    if len(group) > 1:
        paths = f"{paths} .. {group[-1]['path']} ({len(group)} layers)"
    sizes = f"hidden {one['hidden']}, intermediate {one['intermediate']}"
    gate = f"{one['gate']}{', shared expert' if shared else ''}"
    return [
        paths,
        f"  {one['experts']} experts, top-{one['top_k']}, {sizes}, {gate}",
        f"  layout {one['layout']}; router {one['router']}; {one['form']}",
        "",
    ]


def _estimate_lines(found: Json) -> list[str]:
    experts, everything = found["bits_per_weight_experts"], found["bits_per_weight"]
    lines = [
        f"with {found['pipeline']}",
        f"  about {_span([size(n) for n in found['bytes']])}: {_span(_bits(experts))} bits "
        f"per routed-expert weight, {_span(_bits(everything))} over everything",
        *(f"  {remark}" for remark in found["remarks"]),
    ]
    if found["experts_left"] < 1:
        share = f"{100 * found['experts_left']:.2f} %"
        lines.append(f"  {share} of the routed experts' weights are left; bits are per these")
    if found["not_estimated"]:
        lines.append(f"  what {', '.join(found['not_estimated'])} would change isn't known")
    return [*lines, *(f"  {line}" for line in found["plan"])]


def _bits(values: list[float]) -> list[str]:
    return [f"{value:.3f}" for value in values]


def _span(texts: list[str]) -> str:
    low, high = texts
    return low if low == high else f"{low} to {high}"


def _count(n: int) -> str:
    for unit, d in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= d:
            return f"{n / d:.2f} {unit}"
    return str(n)

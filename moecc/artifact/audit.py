"""The artifact: a folder that transformers loads, with an account of every weight in it.

  config.json            the model's own, with the quantization_config of `moecc.artifact.hf`
  model*.safetensors     compressed tensors in the canonical form of `moecc.ir.vq4`, everything else as it was
  tokenizer and other small files of the source
  moecc.json             format and package versions, resolved pipeline, source digest, notes, audit
  report.html            the audit to look at

The audit has a row for every parameter of the model, a row for what the source held and the model does not use, and a row for the
files' own headers; its bytes add up to the size of the model*.safetensors files exactly, or writing fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from moecc.checkpoint.files import LazyTensor
from moecc.errors import MoeccError
from moecc.ir import ops, vq4
from moecc.ir.moe import MoE
from moecc.ir.moe import operand as operand_of
from moecc.ir.program import Program
from moecc.pipeline.passes import Context


@dataclass
class Row:
    """One line of the audit. `bits` are per weight of the parameter, everything stored for it counted."""

    name: str
    role: str
    shape: tuple[int, ...]
    became: str
    nbytes: int
    bits: float = 0.0
    error: float | None = None
    tokens: list[int] | None = None
    fallback: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Plan:
    """What will be written: tensors by name (read when written), and the audit rows that account for them."""

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    experts: dict[str, Any] = field(default_factory=dict)
    linears: dict[str, Any] = field(default_factory=dict)
    held: set[str] = field(
        default_factory=set
    )  # names that the program has for what is stored of experts and linears

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def put(self, name: str, tensor: LazyTensor) -> None:
        if name in self.tensors:
            raise MoeccError(
                f"{name}: two tensors of the artifact have this name; rename the one a pass adds"
            )
        self.tensors[name] = tensor


# ---- what is stored


def plan(program: Program, original: Program, ctx: Context) -> Plan:
    """Everything an artifact stores. `original` is the program before any pass, with the same store."""
    found, taken = Plan(), {}
    for moe in program.moe_layers():
        taken.update(_plan_experts(found, program, original, moe, ctx))
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target is ops.Q_LINEAR:
            taken.update(_plan_linear(found, program, node, ctx))
    _plan_rest(found, program, taken, ctx)
    _require_storable(found, program, original)
    _note_unused(found, program, ctx)
    return found


def _require_storable(found: Plan, program: Program, original: Program) -> None:
    """MoeccError where a pass left what the folder can't say: other nodes than the model's, or a weight that has no place."""
    before = {n.name: n for n in original.graph.nodes if n.op == "call_function"}
    changed = []
    for node in (n for n in program.graph.nodes if n.op == "call_function"):
        was = before.pop(node.name, None)
        if was is None:
            changed.append(f"added {program.line(node)}")
        elif _own_part(node, node.target) != _own_part(was, node.target):
            changed.append(f"made {original.line(was)} to {program.line(node)}")
    changed += [f"removed {original.line(node)}" for node in before.values()]
    if changed:
        raise MoeccError(
            f"a pass {changed[0]}; a compiled model runs its family's code for all but coded experts and quantized linears, "
            "so say it in weights"
        )
    store: Any = program.store
    places = found.held.union(n for n in store.names() if n not in getattr(store, "tied", {}))
    new = (name for name in program.tensors if not program.tensors.same(original.tensors, name))
    if lost := next((name for name in new if name not in places), None):
        why = (
            f"it is tied to {store.tied[lost]}"
            if lost in store.names()
            else "the model has no parameter of that name"
        )
        raise MoeccError(f"a pass gave {lost} a value that can't be stored: {why}")


def _own_part(node: fx.Node, became: Any) -> Any:
    """What of a node must be as the model has it, for a call of `became`: all, but weights and attributes of what is coded."""
    operands = {ops.VQ_EXPERTS: 3, ops.Q_LINEAR: 1}.get(became)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.name)
    return args[:operands] if operands else (node.target, args, kwargs)


def _note_unused(found: Plan, program: Program, ctx: Context) -> None:
    """What was recorded of names that have no row goes to the notes."""
    projections = {f"{m.path}.{p}" for m in program.moe_layers() for p in ("gate_up", "down")}
    for name in sorted(ctx.audit.keys() - projections - {r.name for r in found.rows}):
        ctx.notes.append(f"{name}: recorded, but no weight is called so: {ctx.audit[name]}")


def _plan_experts(
    found: Plan, program: Program, original: Program, moe: MoE, ctx: Context
) -> dict[str, str]:
    """Plans one layer's experts; parameter -> projection that stands for it now. Nothing for experts left dense."""
    if moe.node.target is ops.EXPERTS:
        return {}
    if moe.node.target is not ops.VQ_EXPERTS:
        raise MoeccError(
            f"{moe.path}: still {moe.node.target} after the last pass; add 'vq' to the pipeline"
        )
    before = next(m for m in original.moe_layers() if m.path == moe.path)
    entry: dict[str, Any] = {"attributes": moe.attributes, "remove": []}
    taken: dict[str, str] = {}
    for projection in ("gate_up", "down"):
        stored = _operands(
            program, moe.node, [f"{projection}_{t}" for t in vq4.TENSORS], projection
        )
        entry[projection] = {k: _spec(node) for k, (node, _) in stored.items()}
        for tensor, (node, name) in stored.items():
            found.put(f"{moe.path}.{projection}.{tensor}", _held(program, node, name))
            found.held.add(name)
        sources = _origins(original, before, projection)
        weights = before.operand(projection).meta["val"].numel()  # type: ignore[union-attr]
        _experts_rows(found, original, moe, projection, sources, stored, weights, ctx)
        taken.update({s: f"{moe.path}.{projection}" for s in sources})
    entry["remove"] = [name.removeprefix(moe.path + ".") for name in taken]
    found.experts[moe.path] = entry
    return taken


def _origins(original: Program, moe: MoE, projection: str) -> list[str]:
    names = []
    for operand in (projection, f"{projection}_bias"):
        node = moe.operand(operand)
        if node is not None:
            names += [
                s for s in original.origins(original.weights[node.name].name) if s not in names
            ]
    return names


def _experts_rows(
    found: Plan, original: Program, moe: MoE, projection: str, sources: list[str], stored: Stored, weights: int,
    ctx: Context,
) -> None:  # fmt: skip
    facts = ctx.audit.get(f"{moe.path}.{projection}", {})
    parts = {k: _nbytes(node) for k, (node, _) in stored.items()}
    nbytes = sum(parts.values())
    starved = facts.get("starved") or {}
    fallback = facts.get("fallback", "")
    if starved:
        fallback = f"experts {sorted(map(int, starved))} saw too few tokens; calibrated on tokens sent to them"
    for i, name in enumerate(sources):
        own = _details(ctx.audit.get(name, {}))
        found.rows.append(
            Row(
                name, "routed experts", tuple(_shape(original, name)), facts.get("became", "vq4") if i == 0 else f"in {sources[0]}",
                nbytes if i == 0 else 0, 8 * nbytes / weights if i == 0 else 0.0, facts.get("error"), facts.get("tokens"), fallback,
                {"bytes": parts, "source_bits": _source_bits(original, name), **_details(facts), **own} if i == 0 else own,
            )
        )  # fmt: skip


def _plan_linear(found: Plan, program: Program, node: fx.Node, ctx: Context) -> dict[str, str]:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    # held as <path>.codes, stored as the module's own `weight`
    path = program.weights[weight.name].name.rpartition(".")[0]
    stored = _operands(program, node, ["weight", "scale", "zero"], "")
    for tensor, (operand, name) in stored.items():
        found.put(f"{path}.{tensor}", _held(program, operand, name))
        found.held.add(name)
    specs = {k: _spec(operand) for k, (operand, _) in stored.items()}
    bias = node.args[4]
    if isinstance(bias, fx.Node):  # stored with the rest, in the checkpoint's own type
        name = program.weights[bias.name].name
        specs["bias"] = [list(bias.meta["val"].shape), _dtype_name(_disk_dtype(program, name))]
    found.linears[path] = {"bits": node.kwargs["bits"], "tensors": specs}
    shape = node.args[0].meta["val"].shape[-1], stored["scale"][0].meta["val"].shape[0]  # type: ignore[union-attr]
    nbytes = sum(_nbytes(operand) for operand, _ in stored.values())
    facts = ctx.audit.get(f"{path}.weight", {})
    found.rows.append(
        Row(
            f"{path}.weight",
            role_of(path),
            (shape[1], shape[0]),
            facts.get("became", f"{node.kwargs['bits']} bit groups"),
            nbytes,
            8 * nbytes / math.prod(shape),
            facts.get("error"),
            details={"source_bits": _source_bits(program, f"{path}.weight"), **_details(facts)},
        )
    )
    return {f"{path}.weight": path}


def _plan_rest(found: Plan, program: Program, taken: Mapping[str, str], ctx: Context) -> None:
    """Every other tensor of the checkpoint, as it was or as a pass left it; what the model does not use is named."""
    store: Any = program.store
    tied = getattr(store, "tied", {})
    recorded = _dense_experts(program)
    for name in store.names():
        if name in taken:
            continue
        if name in tied and tied[name] != name:
            found.rows.append(
                Row(name, role_of(name), tuple(store.shape(name)), f"tied to {tied[name]}", 0)
            )
            continue
        rewritten, shape = name in program.tensors, tuple(store.shape(name))
        if rewritten:
            tensor = _rewritten(program, name)
        else:
            tensor = LazyTensor(shape, store.dtype(name), partial(store.read, name))
        found.put(name, tensor)
        facts = {**ctx.audit.get(recorded.get(name, ""), {}), **ctx.audit.get(name, {})}
        reason = (
            "no path of the trace reads it"
            if name in program.unreached
            else facts.get("fallback", "")
        )
        details = (
            {"source_bits": _source_bits(program, name), **_details(facts)}
            if rewritten or facts
            else {}
        )
        bits = 8 * tensor.nbytes / max(math.prod(shape), 1)
        became = facts.get("became", "rewritten" if rewritten else "as it was")
        found.rows.append(
            Row(
                name, role_of(name), shape, became, tensor.nbytes, bits, facts.get("error"), facts.get("tokens"), reason, details
            )
        )  # fmt: skip
    for name in (*getattr(store, "unexpected", ()), *getattr(store, "ignored", ())):
        found.rows.append(
            Row(
                name,
                "not part of the model",
                (),
                "left out",
                0,
                fallback="no parameter of the model takes it",
            )
        )


def _dense_experts(program: Program) -> dict[str, str]:
    """The name in the context's audit by the first parameter of each projection that is left dense."""
    dense = [m for m in program.moe_layers() if m.node.target is ops.EXPERTS]
    return {_origins(program, m, p)[0]: f"{m.path}.{p}" for m in dense for p in ("gate_up", "down")}


def _details(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that a row has no field of its own for."""
    return {
        k: v
        for k, v in facts.items()
        if k not in ("became", "error", "tokens", "starved", "fallback")
    }


Stored = dict[
    str, tuple[fx.Node, str]
]  # short name of a stored tensor -> its placeholder, the weight's name


def _operands(program: Program, node: fx.Node, operands: Iterable[str], projection: str) -> Stored:
    """Those operands of a node that are there, by their short names."""
    found = {}
    for operand in operands:
        value = operand_of(node, operand)
        if value is not None:
            short = operand.removeprefix(projection + "_") if projection else operand
            found[short] = value, program.weights[value.name].name
    return found


def _held(program: Program, node: fx.Node, name: str) -> LazyTensor:
    """The weight `name` as its placeholder describes it; it may lie on disk, and is read when it is written."""
    val: Tensor = node.meta["val"]
    return LazyTensor(tuple(val.shape), val.dtype, partial(program.read, name))


def _rewritten(program: Program, name: str) -> LazyTensor:
    """A weight of the checkpoint that a pass changed: in the checkpoint's type where that holds it exactly, else the program's."""
    dtype = program.stored_dtype(name) if name in program.rounded else program.dtype
    return LazyTensor(
        _shape(program, name), dtype, lambda: program.tensors[name].to(dtype).contiguous()
    )


def _nbytes(node: fx.Node) -> int:
    val: Tensor = node.meta["val"]
    return int(val.numel() * val.element_size())


def _spec(node: fx.Node) -> list[Any]:
    return [list(node.meta["val"].shape), _dtype_name(node.meta["val"].dtype)]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _source_bits(program: Program, name: str) -> int:
    """Bits per weight that a parameter took in the checkpoint."""
    return _disk_dtype(program, name).itemsize * 8


def _disk_dtype(program: Program, name: str) -> torch.dtype:
    dtype: torch.dtype = program.store.dtype(name)  # type: ignore[union-attr]
    return dtype


def _shape(program: Program, name: str) -> tuple[int, ...]:
    return tuple(program.store.shape(name))  # type: ignore[union-attr]


def role_of(name: str) -> str:
    """What a parameter is for, by the names that transformers' families use; for reading, nothing depends on it."""
    parts = name.lower().split(".")
    rules = [
        ("embeddings", ("embed", "wte", "lm_head", "embed_out")), ("shared expert", ("shared",)),
        ("norm", ("norm", "layernorm", "ln_")), ("attention", ("attn", "attention", "conv", "mamba")),
        ("router", ("gate", "router", "gating")), ("routed experts", ("experts",)), ("dense MLP", ("mlp", "ffn", "feed_forward")),
        ("attention", ("mixer",)),
    ]  # fmt: skip
    for role, words in rules:
        if role == "router" and any("gate_proj" in p or "gate_up" in p for p in parts):
            continue
        if any(word in p for p in parts for word in words):
            return role
    return "other"


def summary(rows: Iterable[Row]) -> dict[str, Any]:
    """Bytes by role (headers included), and bits per weight over the routed experts and over everything (tensors alone)."""
    roles: dict[str, int] = {}
    stored = weights = everything = 0
    for row in rows:
        roles[row.role] = roles.get(row.role, 0) + row.nbytes
        count = math.prod(row.shape) if row.shape and not row.became.startswith("tied to") else 0
        everything += count
        if row.role == "routed experts" and row.bits and row.became != "as it was":
            stored, weights = stored + row.nbytes, weights + round(8 * row.nbytes / row.bits)
        elif row.role == "routed experts" and row.became == "as it was":
            stored, weights = stored + row.nbytes, weights + count
    total = sum(roles.values())
    tensors = total - roles.get("file format", 0)
    return {
        "bytes": total, "bytes_by_role": roles, "bits_per_weight_experts": 8 * stored / weights if weights else None,
        "bits_per_weight": 8 * tensors / everything if everything else None,
    }  # fmt: skip

"""The plan of an artifact: one row per parameter, and the changes that it refuses to store."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make
from made import checkpoint
from torch import Tensor, fx

from moecc.artifact.audit import Plan, plan
from moecc.artifact.schema import Row, summary
from moecc.checkpoint.files import LazyTensor
from moecc.checkpoint.roles import ROUTED, role_of
from moecc.errors import MoeccError
from moecc.frontend.trace import trace
from moecc.ir import ops
from moecc.ir.moe import MoE
from moecc.ir.program import Program
from moecc.pipeline.fate import HEADER, KEPT, REWRITTEN, UNUSED, Fate
from moecc.pipeline.order import resolve
from moecc.pipeline.parse import parse_passes
from moecc.pipeline.passes import Context
from moecc.pipeline.run import run_passes

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once")


# ---- refusals


def test_two_tensors_of_one_name_are_refused() -> None:
    found = Plan()
    one = LazyTensor((1,), torch.float32, lambda: torch.ones(1))
    found.put("a", one)
    with pytest.raises(MoeccError, match="two tensors of the artifact have this name"):
        found.put("a", one)


def test_a_rewritten_tensor_stays_on_disk_until_it_is_written(tmp_path: Path) -> None:
    program = trace(checkpoint(tmp_path / "model"), dtype=torch.float32)
    original, name, read = program.copy(), "model.norm.weight", []
    program.add(name, torch.ones(32))
    program.tensors.spill(name, lambda: read.append(name) or torch.ones(32))
    found = plan(program, original, Context())
    assert not read and found.tensors[name].nbytes == 128
    assert [str(row.fate) for row in found.rows if row.name == name] == ["rewritten"]
    assert torch.equal(found.tensors[name].read(), torch.ones(32)) and read


Change = Callable[[Program, MoE], object]


def planned(family: str, change: Change, ctx: Context | None = None) -> Plan:
    """Plan the artifact of a tiny model after `change(program, its first MoE layer)`."""
    program = trace(make(family), dtype=torch.float32)
    original = program.copy()
    change(program, program.moe_layers()[0])
    program.verify()
    return plan(program, original, ctx or Context())


def test_what_cannot_be_stored_is_refused(tiny: Callable[[str], Program]) -> None:
    program = tiny("M")
    original = program.copy()
    program.add("mine", torch.ones(2))
    with pytest.raises(MoeccError, match="a pass gave mine a value that can't be stored"):
        plan(program, original, Context())
    program = original.copy()
    program.moe_layers()[0].node.update_kwarg("act", "gelu")
    with pytest.raises(MoeccError, match="a pass made %experts"):
        plan(program, original, Context())


def test_experts_of_another_layout_are_changed_through_their_parameters() -> None:
    path = "model.layers.0.mlp.experts"
    message = f"{path}.gate_up is computed from {path}.gate_up_proj; give that its new value"
    with pytest.raises(MoeccError, match=re.escape(message)):
        planned("gpt_oss", lambda p, moe: p.add(f"{path}.gate_up", torch.zeros(1)))
    down = f"{path}.down_proj"
    plan = planned("gpt_oss", lambda p, moe: p.rewrite(down, p.read(down) / 2))
    assert [r.name for r in plan.rows if str(r.fate) == "rewritten"] == [down]


# ---- rows


def test_recorded_values_are_in_the_rows_of_plain_weights() -> None:
    ctx, path = Context(), "model.layers.0.mlp.experts"
    ctx.record("model.norm.weight", fate=REWRITTEN, error=0.5, by=2)
    ctx.record(f"{path}.gate_up", looked_at=True)
    ctx.record("model.norm.wait", by=2)
    rows = {r.name: r for r in planned("qwen2_moe", lambda p, moe: None, ctx).rows}
    norm, experts = rows["model.norm.weight"], rows[f"{path}.gate_up_proj"]
    assert (norm.fate, norm.error, norm.details["by"]) == (REWRITTEN, 0.5, 2)
    assert (str(experts.fate), experts.details["looked_at"]) == ("as it was", True)
    assert ctx.notes == ["model.norm.wait: recorded, but no weight is called so: {'by': 2}"]


def test_recorded_values_are_in_the_rows_of_coded_experts(batches: list[Tensor]) -> None:
    program, ctx = trace(make("qwen2_moe"), dtype=torch.float32), Context()
    original, name = program.copy(), "model.layers.0.mlp.experts.gate_up_proj"
    run_passes(program, resolve(parse_passes("vq{rounds=1}")[0])[0], ctx, batches)
    ctx.record(name, lora="rank 2")
    row = next(r for r in plan(program, original, ctx).rows if r.name == name)
    assert str(row.fate) == "vq4 2 bit"
    assert row.details["lora"] == "rank 2"
    assert row.details["codebook"]
    assert not [note for note in ctx.notes if "recorded, but" in note]


@pytest.mark.parametrize(
    ("passes", "name", "fate"),
    [
        ("vq{rounds=1,bits=3}", "model.layers.0.mlp.experts.gate_up_proj", "vq4 3 bit"),
        (
            "dense{bits=4,group=16}",
            "model.layers.0.self_attn.q_proj.weight",
            "4 bit, groups of 16",
        ),
    ],
)
def test_the_fate_of_a_weight_is_whole_if_its_pass_says_none(
    passes: str, name: str, fate: str, batches: list[Tensor]
) -> None:
    program, ctx = trace(make("qwen2_moe"), dtype=torch.float32), Context()
    original = program.copy()
    run_passes(program, resolve(parse_passes(passes)[0])[0], ctx, batches)
    for facts in ctx.audit.values():
        facts.pop("fate", None)
    row = next(r for r in plan(program, original, ctx).rows if r.name == name)
    assert str(row.fate) == fate


@pytest.mark.parametrize("passes", ["", "vq{rounds=1}"])
def test_why_a_projection_stayed_float_is_in_each_of_its_rows(
    passes: str, batches: list[Tensor]
) -> None:
    program, ctx = trace(make("gpt_oss"), dtype=torch.float32), Context()
    original, path = program.copy(), "model.layers.0.mlp.experts"
    if passes:
        run_passes(program, resolve(parse_passes(passes)[0])[0], ctx, batches)
    ctx.record(f"{path}.gate_up", fallback="too small")
    found = {r.name: r.fallback for r in plan(program, original, ctx).rows}
    assert [name for name, why in found.items() if why == "too small"] == [
        f"{path}.gate_up_proj",
        f"{path}.gate_up_proj_bias",
    ]


def test_every_row_of_a_small_program_has_its_bytes_its_bits_and_its_fate(
    tiny: Callable[[str], Program], batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, ctx = tiny("M"), Context()
    store: Any = program.store
    store.tensors |= {n: store.tensors[n].bfloat16() for n in ("embed.weight", "head.weight")}
    store.tensors["tied"] = store.tensors["head.weight"]
    for name, value in dict(
        tied={"tied": "head.weight"}, unexpected=["stray"], ignored=["mtp"]
    ).items():
        monkeypatch.setattr(store, name, value)
    original = program.copy()
    run_passes(program, resolve(parse_passes("vq{rounds=1}")[0])[0], ctx, batches)
    program.rewrite("head.weight", 3 * program.read("head.weight"))
    program.add("embed.weight", 3 * program.read("embed.weight"))
    program.unreached = ("layers.0.gate.weight",)
    ctx.record("layers.0.gate.weight", more=1)
    found = plan(program, original, ctx)
    tensors = {name: t.read() for name, t in found.tensors.items()}
    assert all((t.shape, t.dtype) == (x.shape, x.dtype) for t, x in pairs(found, tensors))
    rows = {r.name: r for r in found.rows}
    assert list(rows) == [
        "layers.0.gate_up",
        "layers.0.down",
        *("embed.weight", "head.weight", "layers.0.gate.weight", "tied", "stray", "mtp"),
    ]
    # coded experts
    for side, weights in (("gate_up", 4 * 16 * 16), ("down", 4 * 16 * 8)):
        row, path = rows[f"layers.0.{side}"], f"layers.0.{side}."
        parts = {n.removeprefix(path): t for n, t in tensors.items() if n.startswith(path)}
        nbytes = {part: t.numel() * t.element_size() for part, t in parts.items()}
        recorded = ctx.audit[f"layers.0.{side}"]
        assert row.nbytes == sum(nbytes.values()) and row.bits == 8 * row.nbytes / weights
        assert row.details["bytes"] == nbytes and row.details["source_bits"] == 32
        assert (row.role, row.experts, row.projection, row.layer) == (ROUTED, "layers.0", side, 0)
        assert (row.error, row.tokens) == (recorded.get("error"), recorded.get("tokens"))
        assert row.in_sample_error == recorded["in_sample_error"] and row.tokens
        assert row.starved == recorded["starved"] and row.starved
        assert str(row.fate) == "vq4 2 bit" and row.fallback == ""
        stored = getattr(found.compression.experts["layers.0"], side)
        assert stored == {n: (tuple(t.shape), str(t.dtype)[6:]) for n, t in parts.items()}
    coded = found.compression.experts["layers.0"]
    assert coded.remove == ["gate_up", "down"] and not found.compression.linears
    assert coded.attributes["gate"] == "glu" and coded.attributes["act"] == "silu"
    assert found.compression.guard == ["layers.0.gate_up"]
    assert tensors["layers.0.gate_up"].shape == (0,)
    assert tensors["layers.0.gate_up"].dtype == torch.uint8 and "layers.0.down" not in tensors
    # the rest
    for name, dtype, times, bits in (
        ("head.weight", torch.bfloat16, 3, 16),
        ("embed.weight", torch.float32, 3, 32),
        ("layers.0.gate.weight", torch.float32, 1, 32),
    ):
        value = (times * store.tensors[name].float()).to(dtype)
        assert tensors[name].dtype == dtype and torch.equal(tensors[name], value)
        assert rows[name].nbytes == value.numel() * bits // 8 and rows[name].bits == bits
        assert rows[name].fate == (KEPT if times == 1 else REWRITTEN)
        assert rows[name].shape == tuple(value.shape) and rows[name].layer is None
    assert rows["head.weight"].details == rows["embed.weight"].details == {"source_bits": 16}
    assert rows["layers.0.gate.weight"].details == {"source_bits": 32, "more": 1}
    assert rows["layers.0.gate.weight"].fallback == "no path of the trace reads it"
    assert rows["tied"] == Row("tied", "other", (16, 16), Fate("tied", of="head.weight"), 0)
    for name in ("stray", "mtp"):
        reason = "no parameter of the model takes it"
        assert rows[name] == Row(name, "not part of the model", (), UNUSED, 0, fallback=reason)
    assert "tied" not in tensors and found.nbytes == sum(t.nbytes for t in tensors.values())
    assert sum(r.nbytes for r in found.rows) == found.nbytes
    assert not [note for note in ctx.notes if "recorded, but" in note]


def pairs(found: Plan, tensors: dict[str, Tensor]) -> list[tuple[Any, Tensor]]:
    return [(t, tensors[name]) for name, t in found.tensors.items()]


def with_bias(program: Program, name: str, bias: Tensor) -> fx.Node:
    """Give a small float32 program one more parameter, and return its placeholder."""
    store: Any = program.store
    store.tensors[name] = bias
    node = program.add(name, bias.float())
    program.tensors.pop(name)
    return node


def test_a_bias_of_coded_experts_of_a_small_program_is_in_the_row_of_their_weight(
    tiny: Callable[[str], Program], batches: list[Tensor]
) -> None:
    program, ctx, path = tiny("DM"), Context(), "layers.1.gate_up"
    moe = program.moe_layers()[0]
    bias = with_bias(program, f"{path}_bias", torch.ones(4, 16))
    program.replace(moe.node, ops.EXPERTS, (*moe.node.args[:5], bias, None, None), moe.attributes)
    original = program.copy()
    run_passes(program, resolve(parse_passes("vq{rounds=1}")[0])[0], ctx, batches)
    for facts in ctx.audit.values():
        facts.pop("fate", None)
    ctx.record(path, fallback="too small")
    found = plan(program, original, ctx)
    rows = {r.name: r for r in found.rows}
    first, part = rows[path], rows[f"{path}_bias"]
    for row in (first, part):
        assert (row.role, row.experts, row.projection, row.layer) == (
            ROUTED,
            "layers.1",
            "gate_up",
            1,
        )
        assert row.fallback == "too small" and rows["layers.1.down"].fallback == ""
        assert row.in_sample_error == ctx.audit[path]["in_sample_error"] and row.tokens
        assert row.tokens == first.tokens and row.starved == first.starved and row.starved
    assert (str(first.fate), str(part.fate), part.nbytes) == ("vq4 2 bit", f"in {path}", 0)
    assert found.compression.experts["layers.1"].remove == ["gate_up", "gate_up_bias", "down"]
    assert f"{path}.bias" in found.tensors and f"{path}_bias" not in found.tensors


@pytest.mark.parametrize(("rewritten", "dtype"), [(False, "bfloat16"), (True, "float32")])
def test_a_quantized_linear_of_a_small_program_has_its_bytes_its_bits_and_its_fate(
    rewritten: bool, dtype: str, tiny: Callable[[str], Program]
) -> None:
    program, ctx, path = tiny("DM"), Context(), "layers.0.linear"
    bias = with_bias(program, f"{path}.bias", torch.ones(16).bfloat16())
    original = program.copy()
    if rewritten:
        program.add(f"{path}.bias", torch.full((16,), 1 / 3))
    made = {
        "weight": torch.arange(128, dtype=torch.uint8).view(16, 8),
        "scale": torch.rand(16, 2).half(),
        "zero": torch.full((16, 2), 7, dtype=torch.uint8),
    }
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.tanh.default).args[0]
    held = [program.add(f"{path}.{'codes' if k == 'weight' else k}", t) for k, t in made.items()]
    program.replace(node, ops.Q_LINEAR, (node.args[0], *held, bias), {"bits": 4})
    program.verify()
    ctx.record(f"{path}.weight", error=0.5, looked=True)
    found = plan(program, original, ctx)
    for part, tensor in made.items():
        assert torch.equal(found.tensors[f"{path}.{part}"].read(), tensor)
    stored = found.tensors[f"{path}.bias"].read()
    assert torch.equal(stored, torch.full((16,), 1 / 3) if rewritten else torch.ones(16).bfloat16())
    entry = found.compression.linears[path]
    assert entry.bits == 4 and entry.tensors == {
        "weight": ((16, 8), "uint8"),
        "scale": ((16, 2), "float16"),
        "zero": ((16, 2), "uint8"),
        "bias": ((16,), dtype),
    }
    (row,) = (r for r in found.rows if r.name == f"{path}.weight")
    assert row.nbytes == 16 * (8 + 2 * 2 + 2) and row.bits == 8 * row.nbytes / 256
    assert str(row.fate) == "4 bit, groups of 8" and row.shape == (16, 16)
    assert row.error == 0.5 and row.details == {"source_bits": 32, "looked": True}
    (row,) = (r for r in found.rows if r.name == f"{path}.bias")
    assert row.fate == (REWRITTEN if rewritten else KEPT) and row.nbytes == stored.nbytes


def test_dense_experts_of_a_small_program_are_placed_and_keep_what_was_recorded(
    tiny: Callable[[str], Program],
) -> None:
    program, ctx = tiny("DM"), Context()
    ctx.record("layers.1.down", fallback="too small", looked=True, error=0.5)
    found = plan(program, program.copy(), ctx)
    rows = {r.name: r for r in found.rows}
    for side in ("gate_up", "down"):
        row = rows[f"layers.1.{side}"]
        assert (row.role, row.experts, row.projection, row.layer) == (ROUTED, "layers.1", side, 1)
        assert row.fate == KEPT and row.bits == 32
    assert rows["layers.1.down"].fallback == "too small" and rows["layers.1.down"].error == 0.5
    assert rows["layers.1.down"].details == {"source_bits": 32, "looked": True}
    assert rows["layers.1.gate_up"].fallback == "" and rows["layers.1.gate_up"].details == {}
    assert rows["layers.0.linear.weight"].experts == "" and not found.compression.guard
    assert found.tensors.keys() == rows.keys() == set(program.store.names())  # type: ignore[union-attr]


def test_summary_counts_whole_bits() -> None:
    rows = [
        Row("e", "routed experts", (4, 8, 8), Fate("coded", bits=2, format="vq4"), 96, 3.0),
        Row("b", "routed experts", (4, 8), Fate("part", of="e"), 0),
        Row("d", "routed experts", (4, 8, 8), KEPT, 512, 16.0),
        Row("n", "norm", (8,), KEPT, 16, 16.0),
        Row("h", "file format", (), HEADER, 8),
    ]
    got = summary(rows)
    assert got["bytes"] == 632 and got["bytes_by_role"]["routed experts"] == 608
    assert got["bits_per_weight_experts"] == pytest.approx(8 * 608 / 512)
    assert got["bits_per_weight"] == pytest.approx(8 * (632 - 8) / (2 * 256 + 32 + 8))
    assert summary([])["bits_per_weight"] is None


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "embeddings"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", "router"),
        ("model.layers.0.mlp.experts.gate_up_proj", "routed experts"),
        ("model.layers.0.mlp.gate_proj.weight", "dense MLP"),
        ("model.layers.0.mlp.shared_expert.down_proj.weight", "shared expert"),
        ("model.norm.weight", "norm"),
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.1.mixer.in_proj.weight", "attention"),
        ("model.layers.1.mixer.gate.weight", "router"),
        ("model.layers.1.mixer.experts.down_proj", "routed experts"),
        ("model.layers.0.self_attention.experts.input_linear.weight", "attention"),
    ],
)
def test_a_name_has_a_role(name: str, role: str) -> None:
    assert role_of(name) == role

"""Merging LoRA adapters of PEFT: the results equal PEFT's own; what cannot be merged is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import adapter, linear
from families import make
from safetensors.torch import save_file
from torch import Tensor

from moecc.commands.inspect import inspect_model
from moecc.errors import MoeccError
from moecc.frontend.trace import trace
from moecc.ir import vq4
from moecc.ir.program import Program
from moecc.passes._tune.adapter_settings import Settings
from moecc.passes._tune.peft import Adapter
from moecc.pipeline.bits import experts_bits
from moecc.pipeline.order import resolve
from moecc.pipeline.parse import find_pass, parse_passes
from moecc.pipeline.passes import Context
from moecc.pipeline.run import run_passes
from moecc.pipeline.stream import run_program
from moecc.types import FamilyModule

pytestmark = pytest.mark.usefixtures("traced_once")

IDS = [torch.arange(24).view(1, 24) % 64]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def merge(model: FamilyModule, folder: Path) -> tuple[Program, Context]:
    """Trace a model and merge an adapter into it."""
    program, ctx = trace(model), Context()
    run_passes(program, parse_passes(f"lora{{path={folder}}}")[0], ctx)
    return program, ctx


def logits(program: Program) -> Tensor:
    return torch.cat(run_program(program, IDS))


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({}, 8 / 2),
        ({"use_rslora": True}, 8 / math.sqrt(2)),
        ({"alpha_pattern": {"q_proj": 3}}, 3 / 2),
    ],
)
def test_a_merged_linear_is_its_weight_plus_scaled_b_a(
    tmp_path: Path, options: dict[str, Any], scaling: float
) -> None:
    model = make("qwen2_moe")
    module = "model.layers.1.self_attn.q_proj"
    tensors = adapter(tmp_path / "a", linear(module, 32, 32), **options)
    program, ctx = merge(model, tmp_path / "a")
    a, b = (tensors[f"base_model.model.{module}.lora_{s}.weight"] for s in "AB")
    got = logits(program)  # before the model that it reads is changed
    with torch.no_grad():
        model.get_submodule(module).weight += scaling * b @ a
    torch.testing.assert_close(got, logits(trace(model)), rtol=1e-5, atol=1e-6)
    assert ctx.audit[f"{module}.weight"]["lora"] == f"rank 2, scaling {scaling:g}"


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])  # [E, out, in], and transposed
def test_experts_are_adapted_one_by_one(tmp_path: Path, family: str) -> None:
    """Multiply as `lora.ParamWrapper` of PEFT 0.21 does.

    It is the einsum "o r e, e r i -> e o i", or "-> e i o" for transposed experts.
    """
    model = make(family)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    down = experts.down_proj
    count, rows, columns = down.shape if family == "qwen2_moe" else down.mT.shape
    path = "model.layers.0.mlp.experts"
    shapes = linear(path, rows, columns, 2 * count)
    tensors = adapter(tmp_path / "a", shapes, target_parameters=EXPERTS[1:])
    program, _ = merge(model, tmp_path / "a")
    a, b = (tensors[f"base_model.model.{path}.lora_{s}.weight"] for s in "AB")
    out, got = "eoi" if family == "qwen2_moe" else "eio", logits(program)
    with torch.no_grad():
        b, a = b.reshape(rows, 2, count), a.reshape(count, 2, columns)
        down += 4 * torch.einsum(f"ore,eri->{out}", b, a)
    torch.testing.assert_close(got, logits(trace(model)), rtol=1e-5, atol=1e-6)


def test_nested_names_are_told_apart_by_depth(tmp_path: Path) -> None:
    """PEFT names no parameter: of two that it adapts, the last one's matrices are the outermost."""
    model = make("qwen2_moe")
    e, n, d = model.get_submodule("model.layers.0.mlp.experts").gate_up_proj.shape
    path = "model.layers.0.mlp.experts"
    outer, inner = linear(path, d, n // 2, 2 * e), linear(f"{path}.base_layer", n, d, 2 * e)
    adapter(tmp_path / "a", {**outer, **inner}, target_parameters=EXPERTS)
    _, ctx = merge(model, tmp_path / "a")
    assert set(ctx.audit) == {f"{path}.gate_up_proj", f"{path}.down_proj"}


def test_passes_behind_a_merge_code_the_merged_experts(tmp_path: Path) -> None:
    """They compare with the merged model too."""
    model = make("qwen2_moe")
    shapes = linear("model.layers.0.mlp.experts", 32, 16, 8)
    adapter(tmp_path / "a", shapes, target_parameters=EXPERTS[1:])
    resolved, _ = resolve(parse_passes(f"vq{{bits=4}},lora{{path={tmp_path / 'a'}}}")[0])
    assert [p.name for p in resolved] == ["lora", "moments", "vq"]
    program, ctx = trace(model), Context()
    merged = logits(merge(model, tmp_path / "a")[0])
    run_passes(program, resolved, ctx, IDS)
    assert ctx.reference is not None
    torch.testing.assert_close(logits(ctx.reference), merged)
    far, near = (float((logits(program) - x).norm()) for x in (logits(trace(model)), merged))
    assert near < 0.5 * far


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_merging_equals_the_merge_of_peft(tmp_path: Path, family: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "o_proj"],
        target_parameters=["down_proj", "gate_up_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"o_proj": 6},
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(make(family), config)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    wrapped.save_pretrained(tmp_path / "a")
    program, ctx = merge(make(family), tmp_path / "a")
    whole = wrapped.merge_and_unload()
    parameters = dict(whole.named_parameters())
    assert len(ctx.audit) == 8 and any("experts.gate_up_proj" in name for name in ctx.audit)
    for name in ctx.audit:
        want = parameters[name].detach()
        torch.testing.assert_close(program.tensors[name], want, rtol=1e-6, atol=1e-6)
        assert not torch.equal(want, make(family).get_parameter(name))


Q_PROJ = "model.layers.0.self_attn.q_proj"
NOT_THERE = "model.layers.7.self_attn.q_proj"
DORA = "use_dora in its adapter_config.json can't be merged here; merge it with PEFT first"
SHAPES = r"updates \[32, 16\], but the weight is \[32, 32\]"


@pytest.mark.parametrize(
    ("shapes", "config", "message"),
    [
        ({}, {"use_dora": True}, DORA),
        ({}, {"init_lora_weights": "pissa"}, "init_lora_weights='pissa' in its"),
        ({}, {"bias": "all"}, "bias in its"),
        ({}, {"peft_type": "IA3"}, "an adapter of type 'IA3'"),
        ({}, {"modules_to_save": ["lm_head"]}, "modules_to_save in its"),
        (linear(Q_PROJ, 32, 16), {}, SHAPES),
        (linear(NOT_THERE, 32, 32), {}, f"no weight for the adapter of '{NOT_THERE}'"),
        ({f"{Q_PROJ}.lora_A": (2, 32)}, {}, "q_proj' has lora_A alone"),
        ({f"{Q_PROJ}.lora_A": (), f"{Q_PROJ}.lora_B": (32, 2)}, {}, "lora_A.weight' is no LoRA"),
        ({f"{Q_PROJ}.lora_A": (2, 32, 1), f"{Q_PROJ}.lora_B": (32, 2)}, {}, "is no LoRA matrix"),
        (
            {f"{Q_PROJ}.lora_A": (2, 32), f"{Q_PROJ}.lora_B": (32, 3)},
            {},
            "q_proj' has lora_A of rank 2 and lora_B of rank 3",
        ),
        ({"model.embed_tokens.lora_embedding_A": (2, 64)}, {}, "no LoRA matrix of a linear"),
        (linear(Q_PROJ, 32, 32), {"lora_alpha": None}, "no lora_alpha"),
        ({}, {"lora_alpha": "8"}, "'lora_alpha' is '8'; save the adapter again"),
        ({}, {"lora_alpha": 10**400}, "'lora_alpha' is '1000"),
        ({}, {"lora_alpha": math.nan}, "'lora_alpha' is 'nan'"),
        ({}, {"alpha_pattern": "q_proj"}, "'alpha_pattern' is 'q_proj'"),
        ({}, {"alpha_pattern": {"q_proj": True}}, "'q_proj' is 'True'"),
        ({}, {"target_parameters": 1}, "'target_parameters' is '1'"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused_in_one_line(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, Any], message: str
) -> None:
    adapter(tmp_path / "a", shapes, **config)
    with pytest.raises(MoeccError, match=message) as found:
        merge(make("qwen2_moe"), tmp_path / "a")
    assert "\n" not in str(found.value)


def test_matrices_that_hold_no_numbers_are_refused(tmp_path: Path) -> None:
    tensors = adapter(tmp_path / "a", linear(Q_PROJ, 32, 32))
    name = f"base_model.model.{Q_PROJ}.lora_A.weight"
    for value, says in ((tensors[name].int(), "is no LoRA matrix"), (math.nan, "holds 64 NaN")):
        wrong = value if isinstance(value, Tensor) else torch.full_like(tensors[name], value)
        save_file({**tensors, name: wrong}, tmp_path / "a" / "adapter_model.safetensors")
        with pytest.raises(MoeccError, match=says):
            Adapter.read("lora", str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("pattern", "module"),
    [
        ("v_proj", "model.layers.0.self_attn.v_proj"),
        ("^model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.v_proj"),
        (r"layers\.\d+\..*v_proj$", "model.layers.17.self_attn.v_proj"),
        ("layers.[0-9]+.self_attn.(?:q_proj|v_proj)", "model.layers.17.self_attn.v_proj"),
    ],
)
def test_patterns_choose_alpha_as_in_peft(pattern: str, module: str, tmp_path: Path) -> None:
    from peft.utils.other import get_pattern_key

    adapter(tmp_path / "a", {}, alpha_pattern={pattern: 3})
    settings = Settings.read(tmp_path / "a" / "adapter_config.json")
    for name in (module, module.replace("v_proj", "o_proj"), "v_proj_2", "y.v_proj"):
        matches = get_pattern_key([pattern], name) == pattern
        assert settings.scaling(name, 2) == (3 if matches else 8) / 2
    assert settings.scaling(module, 0) == 3  # a matrix without rows


@pytest.mark.parametrize(
    "pattern", ["(a+)+", "(.*)*", ".*.*.*", "(a|a)*", "(", "[", "x{9}", "a" * 501, "\\1", "(?i)a"]
)
def test_a_pattern_that_could_take_hours_is_refused(pattern: str, tmp_path: Path) -> None:
    adapter(tmp_path / "a", {}, alpha_pattern={pattern: 3})
    with pytest.raises(MoeccError, match="in alpha_pattern is no simple pattern"):
        Settings.read(tmp_path / "a" / "adapter_config.json")


@pytest.mark.parametrize("passes", ["lora{path=%s}", "vq,affine,fold,absorb{path=%s}"])
@pytest.mark.parametrize(
    ("module", "other"), [("lm_head", "model.embed_tokens"), ("model.embed_tokens", "lm_head")]
)
def test_an_adapter_of_a_tied_weight_is_refused(
    tmp_path: Path, passes: str, module: str, other: str
) -> None:
    """The artifact stores one tensor for both, so it cannot hold an update of one of them."""
    model = make("qwen2_moe")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    adapter(tmp_path / "a", linear(module, 64, 32))
    resolved, _ = resolve(parse_passes(passes % (tmp_path / "a"))[0])
    ctx = Context()
    message = f"updates {module}.weight, which is tied to {other}.weight; untie them"
    with pytest.raises(MoeccError, match=message):
        run_passes(trace(model), resolved, ctx, IDS)
    assert not ctx.ledger  # refused before any pass has run


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    model = make("qwen2_moe")
    with pytest.raises(MoeccError, match=r"no adapter_config.json; give a folder that PEFT saved"):
        merge(model, tmp_path)
    with pytest.raises(MoeccError, match=r"write lora\{path=FOLDER\}"):
        run_passes(trace(model), [find_pass("lora")()], Context())
    adapter(tmp_path, {})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(MoeccError, match="no valid safetensors header"):
        merge(model, tmp_path)


# ---- an adapter that was trained on the compressed model


def absorbed(
    tmp_path: Path,
    options: str,
    *,
    before: str = "klt{rank=2,mean=2},vq,affine,fold",
    size: float = 1.0,
) -> tuple[Program, Program, Context]:
    """Compress a qwen2_moe and absorb an adapter of routed experts and attention.

    Return the program without the adapter, the program with it, and the latter's context.
    """
    model = make("qwen2_moe")
    e, n, d = model.get_submodule("model.layers.0.mlp.experts").gate_up_proj.shape
    path = "model.layers.0.mlp.experts"
    shapes = {**linear(path, d, n // 2, 2 * e), **linear(f"{path}.base_layer", n, d, 2 * e)}
    shapes |= linear("model.layers.1.self_attn.q_proj", 32, 32)
    adapter(tmp_path / "a", shapes, target_parameters=EXPERTS, lora_alpha=8 * size)
    plain, ctx = trace(model), Context()
    program = plain.copy()
    run_passes(plain, resolve(parse_passes(before)[0])[0], Context(), IDS)
    text = f"{before},absorb{{path={tmp_path / 'a'}{options}}}"
    run_passes(program, resolve(parse_passes(text)[0])[0], ctx, IDS)
    return plain, program, ctx


def decoded(program: Program, layer: int, projection: str) -> Tensor:
    """Return the dense [E, N, K] that a compressed projection stands for."""
    moe = program.moe_layers()[layer]
    nodes = {name: moe.operand(f"{projection}_{name}") for name in vq4.TENSORS}
    t = {
        name: None if node is None else program.read(program.weights[node.name].name)
        for name, node in nodes.items()
    }
    hidden = moe.node.args[0].meta["val"].shape[1]
    intermediate = moe.operand("gate_up_scale").meta["val"].shape[1] // 2
    columns = hidden if projection == "gate_up" else intermediate
    codes, codebook, scale = t["codes"], t["codebook"], t["scale"]
    assert codes is not None and codebook is not None and scale is not None
    coded = vq4.decode(codes, t["signs"], codebook, columns, torch.float32)
    coded = coded * scale.float().unsqueeze(-1)
    shared = vq4.shared_part(t, columns, torch.float32, input_side=projection == "gate_up")
    return coded if shared is None else coded + shared


@pytest.mark.parametrize("before", ["klt{rank=2,mean=2},vq,affine,fold", "vq,affine,fold"])
def test_a_large_enough_basis_absorbs_the_whole_adapter(tmp_path: Path, before: str) -> None:
    plain, program, ctx = absorbed(tmp_path, ",rank=32", before=before)
    updates = Adapter.read("lora", str(tmp_path / "a")).updates(trace(make("qwen2_moe")))
    for projection, name in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
        update = updates[f"model.layers.0.mlp.experts.{name}"].delta()
        moved = decoded(program, 0, projection) - decoded(plain, 0, projection)
        assert float((moved - update).norm() / update.norm()) < 0.02
        assert 0 < ctx.audit[f"model.layers.0.mlp.experts.{projection}"]["lora_lost"] < 1e-3
        assert torch.equal(decoded(program, 1, projection), decoded(plain, 1, projection))
        assert "lora_lost" not in ctx.audit[f"model.layers.1.mlp.experts.{projection}"]
    name = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(program.read(name), plain.read(name) + updates[name].delta())
    assert ctx.audit[name]["lora"] == "rank 2, scaling 4"


@pytest.mark.parametrize("before", ["klt{rank=4,mean=off},vq,affine,fold", "vq,affine,fold"])
def test_a_small_adapter_survives_beside_large_weights(tmp_path: Path, before: str) -> None:
    _, _, ctx = absorbed(tmp_path, ",rank=32", before=before, size=0.002)
    assert all(v["lora_lost"] < 0.02 for v in ctx.audit.values() if "lora_lost" in v)


def test_transposed_experts_absorb_an_adapter_as_they_are_stored(tmp_path: Path) -> None:
    model = make("gpt_oss")
    path = "model.layers.0.mlp.experts"
    e, k, n = model.get_submodule(path).down_proj.shape
    adapter(tmp_path / "a", linear(path, n, k, 2 * e), target_parameters=EXPERTS[1:])
    plain, program = trace(model), trace(model)
    text = "vq,affine,fold"
    run_passes(plain, resolve(parse_passes(text)[0])[0], Context(), IDS)
    absorbing = f"{text},absorb{{path={tmp_path / 'a'},rank=32}}"
    run_passes(program, resolve(parse_passes(absorbing)[0])[0], Context(), IDS)
    updates = Adapter.read("lora", str(tmp_path / "a")).updates(trace(model))
    update = updates[f"{path}.down_proj"].delta().mT
    moved = decoded(program, 0, "down") - decoded(plain, 0, "down")
    assert float((moved - update).norm() / update.norm()) < 0.02


def test_inspect_counts_the_basis_rows_that_an_adapter_may_add(tmp_path: Path) -> None:
    before = "klt{rank=2,mean=2},vq,affine{offset=off},fold"
    _, program, _ = absorbed(tmp_path, ",rank=4", before=before)
    make("qwen2_moe").save_pretrained(tmp_path / "model")

    def most(passes: str) -> float:
        found = inspect_model(str(tmp_path / "model"), passes=passes)["estimate"]
        return float(found["bits_per_weight_experts"][1])

    taken = f"{before},absorb{{path={tmp_path / 'a'},rank=4}}"
    assert most(before) < experts_bits(program) <= most(taken)
    assert most(taken.replace("rank=4", "rank=8")) > most(taken)


def test_a_small_basis_loses_some_of_an_adapter_and_records_it(tmp_path: Path) -> None:
    _, small, ctx = absorbed(tmp_path, ",rank=2")
    lost = [v["lora_lost"] for v in ctx.audit.values() if "lora_lost" in v]
    assert len(lost) == 2 and all(0.05 < share < 1 for share in lost)
    basis = small.moe_layers()[0].operand("down_basis")
    assert basis is not None and basis.meta["val"].shape[0] == 4

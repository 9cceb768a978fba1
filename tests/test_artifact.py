"""The artifact's account of a model: a row for every parameter, bytes that equal the disk's, and what is stored untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ALL, FAMILIES, make
from made import EVERYTHING, QUICK, checkpoint, load, logits
from safetensors.torch import load_file, save_file
from torch import fx

from moecc.artifact import hf
from moecc.artifact.audit import Plan, plan
from moecc.artifact.schema import Row, summary
from moecc.checkpoint.files import LazyTensor, TensorFile
from moecc.checkpoint.roles import role_of
from moecc.errors import MoeccError
from moecc.frontend.trace import trace
from moecc.ir.moe import MoE
from moecc.ir.program import Program
from moecc.pipeline.fate import HEADER, KEPT, REWRITTEN, Fate
from moecc.pipeline.order import resolve
from moecc.pipeline.parse import parse_passes
from moecc.pipeline.passes import Context
from moecc.pipeline.run import run_passes

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once")
SAMPLE = ("qwen2_moe", "gpt_oss", "deepseek_v3", "nemotron_h")


class Artifact:
    """A compiled model and what it was made from."""

    def __init__(self, model: Path, out: Path):
        self.model, self.out, self.manifest = (
            model,
            out,
            json.loads((out / "moecc.json").read_text()),
        )
        self.rows = {row["name"]: row for row in self.manifest["audit"]}

    def stored(self) -> dict[str, torch.Tensor]:
        return {k: v for f in self.out.glob("model*.safetensors") for k, v in load_file(f).items()}


@pytest.fixture
def made(compile: Any, tmp_path: Path) -> Any:
    """made(family, passes, *options): the artifact of a tiny model."""

    def build(family: str = "mixtral", passes: str = QUICK, *options: str) -> Artifact:
        model = tmp_path / "model"
        if not model.exists():
            checkpoint(model, family)
        got = compile(model, tmp_path / "out", passes, *options)
        assert got.code == 0, got.err
        return Artifact(model, tmp_path / "out")

    return build


def became(row: dict[str, Any]) -> str:
    """The fate of a row of moecc.json, in words."""
    return str(Fate.of_json(row["fate"]))


def on_disk(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("model*.safetensors"))


# ---------------------------------------------------------------- the audit


@pytest.mark.family
@pytest.mark.parametrize("family", sorted(FAMILIES) if ALL else SAMPLE)
def test_the_audit_has_every_parameter_once_and_every_byte(family: str, made: Any) -> None:
    """And routers and gates are the checkpoint's own bits, whatever passes ran."""
    got = made(family, EVERYTHING)
    names = [row["name"] for row in got.manifest["audit"]]
    before, after = hf.load(str(got.model), torch.float32).state_dict(), got.stored()
    assert sorted(names) == sorted([*before, "(safetensors headers)"])
    assert (
        sum(row["nbytes"] for row in got.manifest["audit"])
        == on_disk(got.out)
        == got.manifest["summary"]["bytes"]
    )
    assert sum(got.manifest["summary"]["bytes_by_role"].values()) == on_disk(got.out)
    routers = [n for n, row in got.rows.items() if row["role"] == "router"]
    assert routers and all(became(got.rows[n]) == "as it was" for n in routers)
    kept = [n for n, row in got.rows.items() if became(row) == "as it was"]
    assert all(torch.equal(before[n].to(after[n].dtype), after[n]) for n in kept)
    gates = [n for n in before if "shared_expert_gate" in n or "correction_bias" in n]
    assert set(gates) <= set(kept)


def test_rows_of_compressed_experts_say_what_became_of_them(made: Any) -> None:
    got = made("qwen2_moe", EVERYTHING, "--bits", "3")
    routed = {n: r for n, r in got.rows.items() if r["role"] == "routed experts"}
    assert len(routed) == 4
    stored = got.stored()
    for name, row in routed.items():
        path = name.replace("gate_up_proj", "gate_up").replace("down_proj", "down")
        parts = {
            k.removeprefix(path + "."): v.nbytes
            for k, v in stored.items()
            if k.startswith(path + ".")
        }
        assert row["details"]["bytes"] == parts and row["nbytes"] == sum(parts.values())
        assert {"basis", "mean_codes", "mean_codebook", "mean_scale"} <= parts.keys()
        assert "mean_signs" not in parts
        assert row["bits"] == pytest.approx(8 * row["nbytes"] / torch.Size(row["shape"]).numel())
        assert became(row) == "vq4 3 bit"
        assert 0 < row["error"] < 1
        assert sum(row["tokens"]) == 8 * 32 * 2
    shared = [r for n, r in got.rows.items() if ".shared_expert." in n]
    assert shared and all(r["role"] == "shared expert" for r in shared)
    linear = got.rows["model.layers.0.self_attn.q_proj.weight"]
    assert became(linear).startswith("8 bit") and 8 < linear["bits"] <= 8 + 24 / 16
    assert got.rows["model.layers.0.mlp.shared_expert_gate.weight"]["fallback"] == "float: gate"


def test_a_layout_made_canonical_is_accounted_to_its_parameters(made: Any) -> None:
    got = made("gpt_oss", EVERYTHING)
    prefix = "model.layers.0.mlp.experts."
    assert got.rows[f"{prefix}gate_up_proj"]["shape"] == [4, 32, 96]
    assert got.rows[f"{prefix}gate_up_proj"]["nbytes"] > 0
    assert became(got.rows[f"{prefix}gate_up_proj_bias"]) == f"in {prefix}gate_up_proj"
    assert got.rows[f"{prefix}gate_up_proj_bias"]["nbytes"] == 0
    stored = got.stored()
    assert f"{prefix}gate_up.bias" in stored and f"{prefix}gate_up_proj" not in stored


def test_experts_that_are_left_dense_are_named(made: Any) -> None:
    got = made("mixtral", "dense{group=16}")
    routed = [r for r in got.rows.values() if r["role"] == "routed experts"]
    assert len(routed) == 4 and all(became(r) == "as it was" and r["bits"] == 32 for r in routed)
    assert got.manifest["summary"]["bits_per_weight_experts"] == 32
    assert json.loads((got.out / "config.json").read_text())["quantization_config"]["experts"] == {}


def test_tensors_that_fit_nothing_are_named(made: Any, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.7.odd.weight"] = torch.ones(3)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    got = made()
    row = got.rows["model.layers.7.odd.weight"]
    assert became(row) == "left out" and row["nbytes"] == 0 and row["fallback"]
    assert "model.layers.7.odd.weight" not in got.stored()


def test_tied_weights_are_stored_once(made: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    made_model = make("mixtral")
    made_model.config.tie_word_embeddings = True
    made_model.tie_weights()
    checkpoint(model)
    made_model.save_pretrained(model)
    got = made()
    assert became(got.rows["lm_head.weight"]) == "tied to model.embed_tokens.weight"
    assert got.rows["lm_head.weight"]["nbytes"] == 0 and "lm_head.weight" not in got.stored()
    loaded = load(got.out)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_an_expert_that_sees_few_tokens_is_named(made: Any, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", "qwen2_moe")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.gate.weight"][3] *= (
        1e-3  # never among the two highest of four by much
    )
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    got = made("qwen2_moe", "moments{min_tokens=100},vq{rounds=1}")
    row = next(r for n, r in got.rows.items() if "tokens" in r and "layers.0" in n)
    starved = [e for e, count in enumerate(row["tokens"]) if count < 100]
    assert starved
    assert sorted(map(int, row["starved"])) == starved
    assert set(row["starved"].values()) == {100}
    assert any("calibrated on 100 sent to it on purpose" in note for note in got.manifest["notes"])


# ---------------------------------------------------------------- files


def test_sharded_files_load_and_add_up(
    made: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = made("mixtral", EVERYTHING)
    want = logits(load(whole.out))
    whole.out.rename(tmp_path / "whole")
    monkeypatch.setattr("moecc.artifact.write.SHARD_BYTES", 20_000)
    got = made("mixtral", EVERYTHING)
    files = sorted(f.name for f in got.out.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((got.out / "model.safetensors.index.json").read_text())["weight_map"]
    assert {n: f for f in files for n in TensorFile(got.out / f)} == index
    assert sum(row["nbytes"] for row in got.manifest["audit"]) == on_disk(got.out)
    assert torch.equal(logits(load(got.out)), want)


def test_the_folder_is_complete(made: Any) -> None:
    got = made("mixtral", QUICK)
    names = {f.name for f in got.out.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "moecc.json",
        "report.html",
    } <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert got.manifest["pipeline"] == "moments,vq{codebook=layer,rounds=1}"
    assert got.manifest["seed"] == 0
    assert {"moecc", "torch", "transformers"} <= got.manifest["versions"].keys()
    assert len(got.manifest["source_digest"]) == 64 and got.manifest["calibration_digest"]
    assert [p["pass"] for p in got.manifest["passes"]] == ["moments", "vq{codebook=layer,rounds=1}"]


CODE = {
    "modeling_mine.py": "raise RuntimeError('the code of the model is run')",
    "configuration_mine.py": "from transformers import MixtralConfig\nclass Config(MixtralConfig): ...",
    "tokenization_mine.py": "from transformers import PreTrainedTokenizerFast\nclass Mine(PreTrainedTokenizerFast): ...",
}


@pytest.mark.parametrize("tokenizer", [False, True])
def test_code_beside_a_known_family_is_for_its_tokenizer(
    tokenizer: bool, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is transformers' own in any case; code is copied where the tokenizer needs it."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    model = checkpoint(tmp_path / "model")
    for name, text in CODE.items():
        (model / name).write_text(text)
    maps = {
        "config.json": {
            "AutoConfig": "configuration_mine.Config",
            "AutoModelForCausalLM": "modeling_mine.Model",
        }
    }
    if tokenizer:
        maps["tokenizer_config.json"] = {"AutoTokenizer": [None, "tokenization_mine.Mine"]}
    for name, classes in maps.items():
        (model / name).write_text(
            json.dumps({**json.loads((model / name).read_text()), "auto_map": classes})
        )
    got = made("mixtral", QUICK, "--trust-remote-code")
    assert {f.name for f in got.out.glob("*.py")} == (set(CODE) if tokenizer else set())
    assert logits(load(got.out)).isfinite().all()


# ---------------------------------------------------------------- parts


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


def planned(family: str, change: Any, ctx: Context | None = None) -> Plan:
    """The plan of a tiny model's program after `change(program, its first experts node)`."""
    program = trace(make(family), dtype=torch.float32)
    original = program.copy()
    change(program, program.moe_layers()[0])
    program.verify()
    return plan(program, original, ctx or Context())


def refused(family: str, change: Any) -> str:
    with pytest.raises(MoeccError) as error:
        planned(family, change)
    return str(error.value)


def scaled(program: Program, moe: MoE) -> None:
    """A factor on what enters the experts."""
    x = moe.node.args[0]
    assert isinstance(x, fx.Node)
    factor = program.add(f"{moe.path}.factor", torch.ones(x.meta["val"].shape[-1]))
    with program.graph.inserting_before(moe.node):
        product = program.graph.call_function(torch.ops.aten.mul.Tensor, (x, factor))
    product.meta.update(val=x.meta["val"], layer=moe.layer, path=moe.path)
    moe.node.update_arg(0, product)


def negated(program: Program, moe: MoE) -> None:
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.silu.default)
    node.target = torch.ops.aten.neg.default


def bypassed(program: Program, moe: MoE) -> None:
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.silu.default)
    node.replace_all_uses_with(node.args[0])
    program.graph.erase_node(node)


def test_nodes_that_nothing_stores_are_refused() -> None:
    end = "; a compiled model runs its family's code for all but coded experts and quantized linears, so say it in weights"
    added = refused("qwen2_moe", scaled)
    assert added.startswith("a pass made %experts : f32[") or added.startswith("a pass added %mul")
    assert added.endswith(end)
    changed = refused("qwen2_moe", negated)
    assert "= aten.silu(" in changed
    assert "= aten.neg(" in changed
    assert changed.startswith("a pass made %silu")
    assert refused("qwen2_moe", bypassed).startswith("a pass ")
    assert refused("qwen2_moe", lambda p, moe: moe.node.update_kwarg("act", "gelu")).startswith(
        "a pass made %experts"
    )


def test_weights_that_have_no_place_are_refused() -> None:
    name = "model.layers.0.mine"
    assert refused("qwen2_moe", lambda p, moe: p.add(name, torch.ones(2))) == (
        f"a pass gave {name} a value that can't be stored: the model has no parameter of that name"
    )
    program = trace(Path(__file__).parents[1] / "examples" / "tinymoe", dtype=torch.float32)
    original = program.copy()
    program.add("lm_head.weight", program.read("lm_head.weight") * 2)
    with pytest.raises(MoeccError) as error:
        plan(program, original, Context())
    assert str(error.value) == (
        "a pass gave lm_head.weight a value that can't be stored: it is tied to model.embed_tokens.weight"
    )


def test_experts_of_another_layout_are_changed_by_what_they_are_computed_from() -> None:
    path = "model.layers.0.mlp.experts"
    with pytest.raises(
        MoeccError,
        match=rf"{path}.gate_up is computed from {path}.gate_up_proj; give that its new value",
    ):
        planned("gpt_oss", lambda p, moe: p.add(f"{path}.gate_up", torch.zeros(1)))
    plan = planned(
        "gpt_oss", lambda p, moe: p.rewrite(f"{path}.down_proj", p.read(f"{path}.down_proj") / 2)
    )
    assert [r.name for r in plan.rows if str(r.fate) == "rewritten"] == [f"{path}.down_proj"]


def test_what_passes_record_is_in_the_rows_of_plain_weights_too() -> None:
    ctx, path = Context(), "model.layers.0.mlp.experts"
    ctx.record("model.norm.weight", fate=REWRITTEN, error=0.5, by=2)
    ctx.record(f"{path}.gate_up", looked_at=True)
    ctx.record("model.norm.wait", by=2)
    rows = {r.name: r for r in planned("qwen2_moe", lambda p, moe: None, ctx).rows}
    norm, experts = rows["model.norm.weight"], rows[f"{path}.gate_up_proj"]
    assert (norm.fate, norm.error, norm.details["by"]) == (REWRITTEN, 0.5, 2)
    assert (str(experts.fate), experts.details["looked_at"]) == ("as it was", True)
    assert ctx.notes == ["model.norm.wait: recorded, but no weight is called so: {'by': 2}"]


def test_what_is_recorded_of_a_parameter_is_in_the_rows_of_coded_experts(
    batches: list[torch.Tensor],
) -> None:
    program, ctx = trace(make("qwen2_moe"), dtype=torch.float32), Context()
    original, name = program.copy(), "model.layers.0.mlp.experts.gate_up_proj"
    run_passes(program, resolve(parse_passes("vq{rounds=1}")[0])[0], ctx, batches)
    ctx.record(name, lora="rank 2")
    row = next(r for r in plan(program, original, ctx).rows if r.name == name)
    assert str(row.fate) == "vq4 2 bit"
    assert row.details["lora"] == "rank 2"
    assert row.details["codebook"]
    assert not [note for note in ctx.notes if "recorded, but" in note]


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
def test_roles(name: str, role: str) -> None:
    assert role_of(name) == role

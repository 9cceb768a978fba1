"""A model with fewer experts: `prune` on families of every kind, and what is refused at once."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from families import ALL, FAMILIES
from made import ROOT, Command, Compile, checkpoint, load
from pipelines import compiled
from refusals import edit_tensors
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from moecc.artifact.schema import read_manifest
from moecc.checkpoint.cut import Cut
from moecc.commands.compile import compile_model
from moecc.commands.evaluate import evaluate_models, table
from moecc.commands.export import export_artifact
from moecc.commands.inspect import inspect_model
from moecc.commands.rows import token_rows, tokenizer_of
from moecc.errors import MoeccError
from moecc.frontend.skeleton import EXPERT_COUNTS
from moecc.frontend.trace import trace
from moecc.ir.program import Program
from moecc.pipeline.order import resolve
from moecc.pipeline.parse import parse_passes
from moecc.pipeline.passes import Layer
from moecc.pipeline.stream import Stream, run_program

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once")
PRUNE = str(ROOT / "examples" / "prune.py")
# In this order, they have groups and a router's bias, transposed weights with biases, and experts
# that do nothing.
SAMPLE = ("deepseek_v3", "gpt_oss", "longcat_flash")
# Their routers choose from groups first, so a quarter of four experts cannot go.
GROUPED = ("glm4_moe", "deepseek_v3")
# Its checkpoint holds whole numbers that may stand for experts.
TABLES = ("deepseek_v4",)


def trace_of(folder: Path) -> Program:
    return trace(folder, dtype=torch.float32)


def pruned(source: Path, out: Path, passes: str) -> Program:
    compile_model(str(source), passes, out, rows=4, length=16)
    return trace_of(out)


@pytest.mark.family
@pytest.mark.parametrize("family", sorted(FAMILIES) if ALL else SAMPLE)
def test_prune_composes_with_coding_in_every_family(family: str, tmp_path: Path) -> None:
    """`compile` itself compares what transformers loads with the program."""
    more = dict.fromkeys(EXPERT_COUNTS, 8) if family in GROUPED else {}
    source = checkpoint(tmp_path / "model", family, **more)
    passes = f"kbvq{{rounds=1,rank=0,mean=off,feedback=false}},{PRUNE}{{keep=0.75}}"
    if family in TABLES:
        with pytest.raises(MoeccError, match="holds whole numbers, which may stand for experts"):
            pruned(source, tmp_path / "out", passes)
        assert not (tmp_path / "out").exists()
        return
    before = {m.path: (m.sizes[0], m.top_k) for m in trace_of(source).moe_layers()}
    program = pruned(source, tmp_path / "out", passes)
    for moe in program.moe_layers():
        experts, top_k = before[moe.path]
        assert max(top_k, experts // 2) <= moe.sizes[0] <= experts and moe.top_k == top_k
    assert any(m.sizes[0] < before[m.path][0] for m in program.moe_layers())


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "model", "qwen2_moe")


def test_the_experts_that_stay_are_the_same_and_so_are_their_routers_rows(
    qwen: Path, tmp_path: Path
) -> None:
    pruned(qwen, tmp_path / "out", f"{PRUNE}{{keep=0.5}}")
    kept = json.loads((tmp_path / "out" / "moecc.json").read_text())["experts_kept"]
    before, after = (load_file(p / "model.safetensors") for p in (qwen, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts"] == 2
    source, stored = trace_of(qwen), trace_of(tmp_path / "out")
    assert kept.keys() == {m.path for m in source.moe_layers()}
    for moe, original in zip(stored.moe_layers(), source.moe_layers(), strict=True):
        rows, router = kept[moe.path], moe.path.replace("experts", "gate.weight")
        assert torch.equal(after[router], before[router][rows])
        for ours, theirs in zip(moe.projections, original.projections, strict=True):
            node, other = ours.operand(), theirs.operand()
            assert node is not None and other is not None
            assert torch.equal(stored.value(node), source.value(other)[rows])


def test_keeping_all_experts_changes_nothing(qwen: Path, tmp_path: Path) -> None:
    pruned(qwen, tmp_path / "out", f"{PRUNE}{{keep=1}}")
    manifest = json.loads((tmp_path / "out" / "moecc.json").read_text())
    assert "experts_kept" not in manifest
    before, after = (load_file(p / "model.safetensors") for p in (qwen, tmp_path / "out"))
    ids = torch.arange(32).view(2, 16)
    logits = [run_program(trace_of(p), [ids])[0] for p in (qwen, tmp_path / "out")]
    assert torch.equal(*logits) and sum(t.numel() for t in before.values()) == sum(
        t.numel() for t in after.values()
    )


def test_experts_that_nothing_chooses_go_first(qwen: Path, tmp_path: Path) -> None:
    """Without them the model computes what it did: the router never chose them."""

    def leave_out_expert_1(tensors: dict[str, Tensor]) -> None:
        """Let the first entry of every token be positive, and only expert 1 look at it."""
        tensors["model.embed_tokens.weight"][:, 0] = 1.0
        for name, tensor in tensors.items():
            if name.endswith("mlp.gate.weight"):
                tensor[:, 0] = 0.0
                tensor[1] = 0.0
                tensor[1, 0] = -1000.0

    edit_tensors(qwen, leave_out_expert_1)
    before, after = trace_of(qwen), pruned(qwen, tmp_path / "out", f"{PRUNE}{{keep=0.75}}")
    kept = json.loads((tmp_path / "out" / "moecc.json").read_text())["experts_kept"]
    assert kept == {m.path: [0, 2, 3] for m in before.moe_layers()}
    rows = token_rows(tokenizer_of(qwen), count=4, length=16)
    want, got = (run_program(program, [rows])[0] for program in (before, after))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_eval_numbers_experts_as_in_the_source(qwen: Path, tmp_path: Path) -> None:
    passes = f"{PRUNE}{{keep=0.75}},vq{{rounds=1,feedback=false}}"
    pruned(qwen, tmp_path / "out", passes)
    found = evaluate_models(str(tmp_path / "out"), str(qwen), rows=2, length=16)
    first = found["per_layer"][0]
    # before the first experts both see the same: what differs is what was taken out
    assert 0.4 < first["agreement"] < 1
    # bits are per weight that is left, whoever counts them
    manifest = tmp_path / "out" / "moecc.json"
    summary = json.loads(manifest.read_text())["summary"]
    estimate = inspect_model(str(qwen), passes=passes)["estimate"]
    assert found["experts_left"] == estimate["experts_left"] == 0.75
    for key in ("bits_per_weight_experts", "bits_per_weight"):
        assert found[key] == pytest.approx(summary[key])
        assert estimate[key] == pytest.approx([found[key]] * 2, rel=0.01)
    assert "75.00 % of the routed experts' weights; bits" in table(found)
    manifest.unlink()
    with pytest.raises(
        MoeccError, match="the reference has 4 experts, the compiled program 3, and"
    ):
        evaluate_models(str(tmp_path / "out"), str(qwen), rows=2, length=16)


def test_experts_keep_their_numbers_when_the_float_model_is_compiled_again(
    qwen: Path, compile: Compile, tmp_path: Path
) -> None:
    pruned(qwen, tmp_path / "first", f"{PRUNE}{{keep=0.75}}")
    export_artifact(str(tmp_path / "first"), "dense", tmp_path / "float")
    run = compile(tmp_path / "float", tmp_path / "again", f"{PRUNE}{{keep=0.7}}")
    assert run.code == 0, run.err
    numbers = [read_manifest(tmp_path / f)["experts_kept"] for f in ("first", "float", "again")]
    assert numbers[0] == numbers[1] and numbers[0] != numbers[2]
    for path, rows in numbers[2].items():
        assert set(rows) < set(numbers[0][path])
    found = evaluate_models(str(tmp_path / "again"), str(tmp_path / "float"), rows=2, length=16)
    assert found["bits_per_weight_experts"] == pytest.approx(32)  # of the weights that are left


def test_what_is_possible_is_said_before_any_pass_runs(qwen: Path, tmp_path: Path) -> None:
    program = trace_of(qwen)
    paths = [m.path for m in program.moe_layers()]
    for counts, line in (
        ({p: 1 for p in paths}, "a token takes 2, so 2 to 4 are possible"),
        ({p: 5 for p in paths}, "a token takes 2, so 2 to 4 are possible"),
        ({paths[0]: 3}, "its configuration has one number for all layers; keep as many in each"),
    ):
        with pytest.raises(MoeccError, match=re.escape(line)):
            program.require_experts(counts)
    for rows in ([1, 1], [3, 1], [-2, -1], [1, 9]):
        with pytest.raises(MoeccError, match="give ascending numbers of its 4 experts"):
            program.keep_experts(dict.fromkeys(paths, rows))
    grouped = trace_of(checkpoint(tmp_path / "grouped", "deepseek_v3"))
    paths = [m.path for m in grouped.moe_layers()]
    with pytest.raises(MoeccError, match="its router chooses from 2 groups, so multiples of 2"):
        grouped.require_experts({p: grouped.moe_layers()[0].sizes[0] - 1 for p in paths})


@pytest.mark.parametrize(
    ("passes", "became"),
    [("dense{group=16}", "moecc.q_linear"), ("vq{rounds=1,feedback=false}", "moecc.vq_experts")],
)
def test_experts_that_are_coded_or_beside_coded_linears_stay(
    passes: str, became: str, qwen: Path
) -> None:
    program = compiled(trace_of(qwen), passes).program
    before, facts = program.text(), set(program.facts)
    with pytest.raises(MoeccError) as error:
        program.keep_experts({m.path: [0, 1, 3] for m in program.moe_layers()})
    assert f"a pass made it {became} already, which would be lost" in str(error.value)
    assert program.text() == before and program.facts == facts


def test_experts_of_a_program_without_weights_stay(qwen: Path) -> None:
    program = trace(AutoConfig.from_pretrained(qwen))
    program.resizer.found = trace_of(qwen).resizer.found  # type: ignore[union-attr]
    with pytest.raises(MoeccError, match="it was traced without weights; give a checkpoint"):
        program.keep_experts({m.path: [0, 1, 3] for m in program.moe_layers()})


def test_experts_taken_out_twice_are_numbered_as_in_the_source(qwen: Path) -> None:
    program, source = trace_of(qwen), trace_of(qwen)
    first, second = (m.path for m in program.moe_layers())
    program.keep_experts({first: [0, 2, 3], second: [1, 2, 3]})
    program.keep_experts({first: [0, 1, 2]})  # all of one layer, and none of the other
    assert program.kept == {first: (0, 2, 3), second: (1, 2, 3)}
    program.keep_experts({first: [1, 2], second: [0, 2]})
    assert program.kept == {first: (2, 3), second: (1, 3)}
    for moe, whole in zip(program.moe_layers(), source.moe_layers(), strict=True):
        for ours, theirs in zip(moe.projections, whole.projections, strict=True):
            node, other = ours.operand(), theirs.operand()
            assert node is not None and other is not None
            rows = list(program.kept[moe.path])
            assert torch.equal(program.value(node), source.value(other)[rows])


@pytest.mark.parametrize(
    ("family", "keep"), [("qwen2_moe", 0.01), ("qwen2_moe", 0.75), ("deepseek_v3", 0.6)]
)
def test_inspect_estimates_as_many_experts_as_prune_keeps(
    moecc: Command, family: str, keep: float, tmp_path: Path
) -> None:
    """A token takes 2 of qwen2_moe's, and deepseek_v3 keeps as many of each of 2 groups."""
    more = dict.fromkeys(EXPERT_COUNTS, 8) if family in GROUPED else {}
    source = checkpoint(tmp_path / "model", family, **more)
    passes = f"{PRUNE}{{keep={keep}}}"
    found = moecc("inspect", source, "--passes", passes, "--json").json
    (before,) = {layer["experts"] for layer in found["moe_layers"]}
    (after,) = {m.sizes[0] for m in pruned(source, tmp_path / "out", passes).moe_layers()}
    routed = found["sizes"]["routed experts"]["bytes"]
    assert found["estimate"]["bytes"] == [found["bytes"] - routed * (before - after) // before] * 2


def test_a_pass_that_makes_the_reference_runs_first() -> None:
    passes, _ = resolve(parse_passes(f"kbvq,{PRUNE},dense")[0])
    assert passes[0].name == "prune"


@pytest.mark.parametrize(
    ("cut", "want"),
    [
        (Cut(0, (1, 3)), [[2, 3], [6, 7]]),
        (Cut(1, (1,)), [[1], [3], [5], [7]]),
        (Cut(0, (0, 1)), [[0, 1], [2, 3]]),
    ],
)
def test_a_cut_keeps_its_rows_in_order(cut: Cut, want: list[list[int]]) -> None:
    assert cut.apply(torch.arange(8).view(4, 2)).tolist() == want


def test_scores_are_the_mean_of_weighted_norms(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a loop over tokens in float64."""
    spec = importlib.util.spec_from_file_location("prune_example", PRUNE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "prune_example", module)
    spec.loader.exec_module(module)
    assert module.highest(torch.tensor([3.0, 1.0, 2.0, 0.0]), 2) == [0, 2]
    assert module.highest(torch.tensor([3.0, 1.0, 0.5, 0.0]), 2, groups=2) == [0, 2]
    program = trace_of(qwen)
    stream = Stream(program, [torch.arange(12).view(2, 6)])
    stream.advance()
    moe = next(m for m in program.moe_layers() if m.layer == 1)
    layer = Layer(1, program, program, stream, stream)
    got = module.expert_scores(layer, moe)
    x, index, weight = (
        layer.tap([n.name])[n.name][0].flatten(0, -2)  # type: ignore[union-attr]
        for n in moe.node.args[:3]
    )
    gate_up, down = (layer.weight(p) for p in moe.projections)
    assert gate_up is not None and down is not None
    want = torch.zeros(moe.sizes[0], dtype=torch.float64)
    for t in range(len(x)):
        for e, w in zip(index[t].tolist(), weight[t].tolist(), strict=True):
            want[e] += w * expert(x[t], gate_up[e], down[e]).norm() / len(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)


def expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up.double() @ x.double()).chunk(2)
    return down.double() @ (torch.nn.functional.silu(gate) * up)


def test_a_loaded_model_has_the_smaller_router(qwen: Path, tmp_path: Path) -> None:
    pruned(qwen, tmp_path / "out", f"{PRUNE}{{keep=0.5}},vq{{rounds=1,feedback=false}}")
    model = load(tmp_path / "out")
    assert model.config.num_experts == 2
    assert all(len(m.mlp.gate.weight) == 2 for m in model.model.layers)

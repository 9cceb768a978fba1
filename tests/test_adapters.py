"""Updates of weights, `lora`, `merge` and the options of `rilq`, on programs of a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import Tiny, resolved
from safetensors.torch import save_file
from torch import Tensor

from moecc.errors import MoeccError
from moecc.ir.program import Program
from moecc.passes import rilq
from moecc.passes._tune.low_rank import attach, attached
from moecc.passes._tune.update import Update, merge_into
from moecc.passes.lora import MergeLora
from moecc.passes.merge import MergeAdapters
from moecc.passes.rilq import ModelLossAdapters
from moecc.pipeline.passes import Context
from moecc.pipeline.run import run_passes

LINEAR = "layers.0.linear.weight"


def bfloat16(program: Program) -> Program:
    """Return the program with a checkpoint that stores bfloat16."""
    store: Any = program.store
    store.tensors = {name: t.bfloat16() for name, t in store.tensors.items()}
    return program


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- updates


def test_the_update_of_a_matrix_is_its_scaled_product() -> None:
    a, b = normal(2, 5), normal(3, 2, seed=1)
    update = Update(a.half(), b.half(), 1.5)
    want = [
        [
            1.5 * sum(float(b.half()[n, r]) * float(a.half()[r, k]) for r in range(2))
            for k in range(5)
        ]
        for n in range(3)
    ]
    torch.testing.assert_close(update.delta(), torch.tensor(want))
    assert update.delta().dtype == torch.float32
    assert update.shape() == (3, 5) and update.rank == 2
    assert str(update) == "rank 2, scaling 1.5"


@pytest.mark.parametrize("transposed", [False, True])
def test_the_update_of_experts_is_a_product_for_each(transposed: bool) -> None:
    """A has the rows of one expert after the other; in B the expert runs fastest."""
    experts, rank, rows, columns = 3, 2, 4, 5
    a, b = normal(experts * rank, columns), normal(rows, rank * experts, seed=1)
    update = Update(a, b, 0.5, experts, transposed)
    want = torch.zeros(experts, rows, columns)
    for e in range(experts):
        for r in range(rank):
            want[e] += 0.5 * torch.outer(b[:, r * experts + e], a[e * rank + r])
    want = want.mT if transposed else want
    torch.testing.assert_close(update.delta(), want)
    assert update.shape() == tuple(want.shape) and update.rank == rank


def test_merged_updates_add_up_and_are_rounded_to_the_checkpoint_s_type(tiny: Tiny) -> None:
    program = bfloat16(tiny("D"))
    want = program.read(LINEAR)
    for seed in range(2):
        update = Update(normal(2, 16, seed=seed), normal(16, 2, seed=seed + 5), 0.3)
        merge_into(program, LINEAR, update)
        want = (want.float() + update.delta()).bfloat16().to(want.dtype)
        assert torch.equal(program.read(LINEAR), want)
        assert program.read(LINEAR).dtype == want.dtype
    assert program.rounded == {LINEAR}


def test_lora_merges_every_weight_of_its_folder_and_says_so(tiny: Tiny, tmp_path: Path) -> None:
    a, b = normal(2, 16), normal(16, 2, seed=1)
    name = f"base_model.model.{LINEAR.removesuffix('.weight')}"
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    program, ctx = tiny("D"), Context()
    want = program.read(LINEAR) + 1.5 * b @ a
    reports = run_passes(program, [MergeLora(path=str(tmp_path))], ctx)
    torch.testing.assert_close(program.read(LINEAR), want)
    assert ctx.audit == {LINEAR: {"lora": "rank 2, scaling 1.5"}}
    assert [r.changed for r in reports] == [True]
    assert MergeLora(path=str(tmp_path)).files() == [
        tmp_path / n for n in ("adapter_config.json", "adapter_model.safetensors")
    ]


def test_lora_without_a_folder_is_refused_by_name_at_every_step(tiny: Tiny) -> None:
    nothing, program = MergeLora(), tiny("D")
    for step in (
        nothing.files,
        lambda: nothing.check(program),
        lambda: nothing.run(program, Context()),
    ):
        with pytest.raises(MoeccError, match=r"^lora: no adapter given; write lora\{path=FOLDER\}"):
            step()


# ---- rilq and merge


def test_merge_makes_each_adapted_weight_plain_and_tells_its_rounding(tiny: Tiny) -> None:
    program, ctx = bfloat16(tiny("DD")), Context()
    want = {}
    for placeholder, weight in list(program.weights.items()):
        if weight.name.endswith("linear.weight"):
            a, b = normal(2, 16), normal(16, 2, seed=len(want))
            want[weight.name] = program.read(weight.name).float() + b @ a
            attach(program, placeholder, a, b)
    assert len(attached(program)) == 2
    assert MergeAdapters().run(program, ctx) is True
    assert not attached(program) and set(ctx.audit) == set(want)
    for name, whole in want.items():
        kept = whole.bfloat16().float()
        assert torch.equal(program.read(name).float(), kept)
        lost = float((kept - whole).double().square().sum() / whole.double().square().sum())
        row = ctx.audit[name]
        assert row["adapter"] == "merged" and row["rounding"] == pytest.approx(lost, rel=1e-4)
    assert MergeAdapters().run(program, ctx) is False


@pytest.mark.parametrize(("after", "head"), [(0.5, True), (1.0, True), (1.5, False)])
def test_rilq_trains_with_its_options_and_stores_only_what_is_better(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, after: float, head: bool
) -> None:
    made: dict[str, tuple[Any, ...]] = {}

    class Trained:
        parameters = (1,)

        def __init__(self, *args: Any, **options: Any):
            made["trained"] = (*args, options)

        def store(self, *, better: bool) -> str:
            return f"better={better}"

    class Loss:
        def __init__(self, *args: Any, **options: Any):
            made["loss"] = (*args, options)

    class Training:
        def __init__(self, *args: Any):
            made["training"] = args

        def run(self) -> tuple[dict[str, float], dict[str, float]]:
            return {"loss": 1.0, "kl": 1.0}, {"loss": after, "kl": 2.0}

    fakes = {"Trained": Trained, "ModelLoss": Loss, "Training": Training}
    for name, fake in fakes.items():
        monkeypatch.setattr(rilq, name, fake)
    monkeypatch.setattr(rilq, "output_logits", lambda program: 1 if head else None)
    program, ctx = tiny("M"), Context()
    options = dict(rank=3, experts=False, steps=5, batches=7, lr=2.0, patience=4)
    weights = dict(hidden=1.0, kl=2.0, lm=3.0, routing=4.0)
    changed = ModelLossAdapters(**options, **weights).run(program, ctx)  # type: ignore[arg-type]
    assert changed == f"better={after < 1}"
    *same, given = made["trained"]
    assert same == [program, ctx] and given == dict(rank=3, experts=False, lr=2.0)
    _, trained, _, told, has = made["loss"]
    assert isinstance(trained, Trained) and told == weights and has == {"has_head": head}
    assert made["loss"][0] is program and made["loss"][2] is ctx
    assert isinstance(made["training"][0], Loss) and made["training"][1:] == (ctx, 5, 7, 4)
    for p in program.moe_layers()[0].projections:
        assert ctx.audit[p.path]["rilq"] == {
            "before": {"loss": 1.0, "kl": 1.0},
            "after": {"loss": after, "kl": 2.0},
        }
    notes = [n for n in ctx.notes if n.startswith("rilq: the model gives no logits")]
    assert len(notes) == (not head)


def test_rilq_without_anything_to_train_changes_nothing(tiny: Tiny) -> None:
    (train,) = [p for p in resolved("rilq{rank=0,experts=false}") if p.name == "rilq"]
    program, ctx = tiny("M"), Context()
    assert isinstance(train, ModelLossAdapters)
    assert train.run(program, ctx) is False and not ctx.audit

"""`rilq` trains adapters of the whole model, and `merge` adds them to the weights."""

from __future__ import annotations

import pytest
import torch
from families import make
from pipelines import TOKENS, compiled

from moecc.errors import MoeccError
from moecc.frontend.trace import trace
from moecc.ir.program import Program
from moecc.passes._tune.low_rank import attached
from moecc.pipeline.order import require_whole, resolve
from moecc.pipeline.parse import find_pass, parse_passes
from moecc.pipeline.run import run_passes
from moecc.pipeline.stream import run_program

pytestmark = pytest.mark.usefixtures("traced_once")


def test_rilq_lowers_the_held_out_loss_and_merge_only_rounds(
    traced: Program,
) -> None:
    more = list(torch.randint(0, 64, (16, 4, 64), generator=torch.Generator().manual_seed(0)))
    text = "vq{codebook=layer},affine,fold,rilq{steps=20,rank=4,lr=3}"
    run = compiled(traced, text, batches=more)
    told = run.ctx.audit["model.layers.0.mlp.experts.down"]["rilq"]
    assert told["after"]["loss"] < told["before"]["loss"] and run.differed["rilq"]
    adapted = attached(run.program)
    names = [a.weight for a in adapted]
    assert any("self_attn.q_proj" in n for n in names)
    assert any("shared_expert.down_proj" in n for n in names)
    assert not any("mlp.gate." in n or "shared_expert_gate" in n or "lm_head" in n for n in names)
    assert run.ctx.audit["model.layers.0.mlp.gate.weight"]["adapter"] == "none: router"
    with pytest.raises(MoeccError, match="rilq leaves what can't be stored before 'merged'"):
        require_whole(resolve(parse_passes("rilq")[0])[0])

    before, program = run.output(), run.program
    run_passes(program, [find_pass("merge")()], run.ctx)
    assert not attached(program) and "lora" not in program.text()
    assert not any("lora" in n for n in program.tensors)
    after = torch.cat(run_program(program, TOKENS))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert all(run.ctx.audit[n]["rounding"] < 1e-12 for n in names)  # the checkpoint is float32


def test_rilq_of_a_model_without_a_head_trains_on_hidden_state_and_routing() -> None:
    bare = trace(make("qwen2_moe").model)
    more = list(torch.randint(0, 64, (16, 2, 64), generator=torch.Generator().manual_seed(0)))
    coded = "vq{rounds=1,codebook=layer},affine,fold"
    run = compiled(bare, f"{coded},rilq{{steps=20,rank=2,lr=3}}", batches=more)
    told = run.ctx.audit[f"{bare.moe_layers()[0].path}.down"]["rilq"]
    assert told["before"].keys() == {"loss", "hidden", "routing"}
    assert told["before"]["loss"] == pytest.approx(2)
    assert told["after"]["loss"] < 2
    note = "rilq: the model gives no logits of its vocabulary; kl and lm are left out of the loss"
    assert run.ctx.notes.count(note) == 1
    message = "gives no logits, so kl and lm can't be measured; give hidden a weight"
    with pytest.raises(MoeccError, match=message):
        compiled(bare, f"{coded},rilq{{hidden=0}}")


def test_rilq_measures_the_loss_on_next_tokens_only_with_a_weight(traced: Program) -> None:
    always = {"loss", "hidden", "kl", "routing"}
    for options, terms in (("", always), (",lm=1", {*always, "lm"})):
        rilq = f"rilq{{steps=1,rank=2{options}}}"
        run = compiled(traced, f"vq{{rounds=1,codebook=layer}},affine,fold,{rilq}")
        told = run.ctx.audit["model.layers.0.mlp.experts.down"]["rilq"]
        assert told["before"].keys() == terms


def test_rilq_without_a_gain_changes_nothing(traced: Program) -> None:
    run = compiled(
        traced, "vq{bits=4},affine,fold,rilq{steps=1,lr=100,hidden=0,rank=2,patience=1},merge"
    )
    assert not run.differed["rilq"] and not run.differed["merge"]
    with pytest.raises(MoeccError, match="patience=11 is out of range"):  # there are ten checks
        parse_passes("rilq{patience=11}")

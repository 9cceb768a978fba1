"""Evaluation: a model against itself, against transformers' own loss, against a damaged copy."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from families import ALL, SAMPLE, make
from made import TINYMOE
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralModel

from moecc.commands.agreement import LayerAgreement, LayerSums, Totals, compare_sets
from moecc.commands.evaluate import Evaluation, evaluate, table
from moecc.errors import MoeccError
from moecc.frontend.trace import trace
from moecc.ir.program import Program
from moecc.ir.restriction import Restriction
from moecc.pipeline.bits import everything_bits, experts_bits
from moecc.types import FamilyModule

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once")


def tokens(count: int, length: int, vocabulary: int = 64) -> Tensor:
    return torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tinymoe() -> Program:
    return trace(TINYMOE, dtype=torch.float32)


def scaled(program: Program, layer: int, factor: float) -> Program:
    """Copy a program and multiply gate_up of one of its MoE layers by `factor`."""
    copy = program.copy()
    name = copy.weights[copy.moe_layers()[layer].operand("gate_up").name].name
    copy.add(name, copy.read(name) * factor)
    return copy


def test_a_model_does_not_diverge_from_itself(tinymoe: Program) -> None:
    found = evaluate(tinymoe, tinymoe, tokens(3, 40, 4096), batch=2)
    assert found.kl == 0 and found.agreement == 1 and found.exact_agreement == 1
    assert found.perplexity == found.reference_perplexity
    assert [layer.path for layer in found.per_layer] == [m.path for m in tinymoe.moe_layers()]
    assert all(layer.output_error == 0 and layer.agreement == 1 for layer in found.per_layer)
    assert found.tokens == 3 * 39
    assert found.bits_per_weight == found.bits_per_weight_experts == 16


@torch.no_grad()
def test_perplexity_is_that_of_transformers_loss(tinymoe: Program) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINYMOE, dtype=torch.float32)
    rows = tokens(4, 32, 4096)
    loss = model(rows, labels=rows).loss
    for batch in (1, 3, 8):
        found = evaluate(tinymoe, tinymoe, rows, batch=batch)
        assert found.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)


def test_damage_shows_in_its_own_layer_and_behind_it(tinymoe: Program) -> None:
    rows = tokens(2, 64, 4096)
    little, much = (evaluate(scaled(tinymoe, 1, f), tinymoe, rows) for f in (1.1, 3.0))
    assert 0 < little.kl < much.kl
    assert 1 > little.agreement > much.agreement > 0
    assert little.agreement >= little.exact_agreement
    # the checkpoint holds bfloat16, and gate_up of one layer is float32 now
    experts = sum(m.weights for m in tinymoe.moe_layers())
    part = tinymoe.moe_layers()[1].gate_up.weights
    assert much.bits_per_weight_experts == 16 + 16 * part / experts
    assert 16 < much.bits_per_weight < much.bits_per_weight_experts
    first, damaged, *later = much.per_layer
    assert first.agreement == 1 and first.output_error == 0
    # the damaged layer's router still reads what the reference's reads
    assert damaged.agreement == 1 and damaged.output_error > 0.1
    assert all(layer.agreement < 1 for layer in later)


def test_an_experts_layer_of_zeros_has_output_error_one(tinymoe: Program) -> None:
    found = evaluate(scaled(tinymoe, 2, 0.0), tinymoe, tokens(2, 16, 4096))
    assert found.per_layer[2].output_error == pytest.approx(1.0)


Choices = list[tuple[list[set[int]], Tensor]]


@torch.no_grad()
def observed(model: FamilyModule, rows: Tensor) -> tuple[Choices, list[list[list[float]]]]:
    """Return what a model of transformers computes.

    By MoE layer: the experts chosen for each token and the experts' output [T, D]. By row and
    place: the probability of every token.
    """
    layers: Choices = []

    def note(module: object, args: tuple[Tensor, ...], output: Tensor) -> None:
        layers.append(([set(chosen) for chosen in args[1].tolist()], output.double()))

    handles = [x.mlp.experts.register_forward_hook(note) for x in model.model.layers]
    probabilities = model(input_ids=rows).logits.double().softmax(-1).tolist()
    for handle in handles:
        handle.remove()
    return layers, probabilities


@pytest.fixture(scope="module")
def twins() -> tuple[FamilyModule, FamilyModule]:
    """A tiny qwen2_moe, and its copy with other routers and smaller experts."""
    original = make("qwen2_moe")
    changed = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(1)
    for layer in changed.model.layers:
        router = layer.mlp.gate.weight.data
        router += 0.5 * router.std() * torch.randn(router.shape, generator=generator)
        layer.mlp.experts.down_proj.data *= 0.8
    return original, changed


def test_chosen_experts_and_output_errors_are_those_of_two_models_of_transformers(
    twins: tuple[FamilyModule, FamilyModule],
) -> None:
    rows = tokens(5, 23)
    reference, program = (observed(model, rows)[0] for model in twins)
    found = evaluate(*(trace(m, dtype=torch.float32) for m in reversed(twins)), rows, batch=2)
    same, whole = [], []
    for (theirs, before), (ours, after), layer in zip(
        reference, program, found.per_layer, strict=True
    ):
        pairs = list(zip(theirs, ours, strict=True))
        same.append(sum(len(a & b) for a, b in pairs) / (2 * len(pairs)))
        whole.append(sum(a == b for a, b in pairs) / len(pairs))
        assert layer.agreement == pytest.approx(same[-1], rel=1e-12)
        assert layer.exact_agreement == pytest.approx(whole[-1], rel=1e-12)
        error = float((after - before).square().sum() / before.square().sum())
        assert layer.output_error == pytest.approx(error, rel=1e-4)
    # as many tokens and choices in each layer
    assert found.agreement == pytest.approx(sum(same) / 2, rel=1e-12)
    assert found.exact_agreement == pytest.approx(sum(whole) / 2, rel=1e-12)
    assert len({*same, *whole}) == 4, "the shares must differ, or one could pass for another"


def test_perplexity_and_kl_are_those_of_two_models_of_transformers(
    twins: tuple[FamilyModule, FamilyModule],
) -> None:
    rows = tokens(5, 23)
    reference, program = (observed(model, rows)[1] for model in twins)
    found = evaluate(*(trace(m, dtype=torch.float32) for m in reversed(twins)), rows, batch=2)
    nll, reference_nll, kl = 0.0, 0.0, 0.0
    for b, row in enumerate(rows.tolist()):
        for place, following in enumerate(row[1:]):
            p, q = reference[b][place], program[b][place]
            nll -= math.log(q[following])
            reference_nll -= math.log(p[following])
            kl += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    assert found.tokens == 5 * 22
    assert found.kl == pytest.approx(kl / found.tokens, rel=1e-3)
    assert found.perplexity == pytest.approx(math.exp(nll / found.tokens), rel=1e-5)
    want = math.exp(reference_nll / found.tokens)
    assert found.reference_perplexity == pytest.approx(want, rel=1e-5)
    assert abs(found.perplexity - found.reference_perplexity) > 1e-2


@pytest.mark.family
@pytest.mark.parametrize(
    "family", SAMPLE if ALL else ("qwen2_moe", "gpt_oss", "nemotron_h", "muse_spark_text")
)
@torch.no_grad()
def test_every_family_has_a_perplexity(family: str) -> None:
    model, rows = make(family), tokens(2, 17)
    program = trace(model, dtype=torch.float32)
    if family == "muse_spark_text":  # a text tower without a head
        assert "needs a causal language model" in refused(program, program, rows)
        return
    logits = model(input_ids=rows).logits[:, :-1].float().flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten())
    found = evaluate(program, program, rows)
    assert found.perplexity == pytest.approx(float(expected.exp()), rel=1e-4)
    assert found.kl == 0 and found.agreement == 1 and found.bits_per_weight == 32


def test_an_evaluation_can_be_written_as_json(tinymoe: Program) -> None:
    found = evaluate(tinymoe, tinymoe, tokens(1, 8, 4096)).as_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["per_layer"][0].keys() == {"path", "agreement", "exact_agreement", "output_error"}


def test_the_table_shows_every_figure_in_its_unit() -> None:
    layers = (
        LayerAgreement("model.layers.0.mlp.experts", 0.5, 0.25, 0.0123456),
        LayerAgreement("model.layers.10.mlp.experts", 1.0, 0.98765, 1.5),
    )
    found = Evaluation(12.34567, 11.25, 0.0123456, 0.75, 0.6251, 1234, 2.0625, 3.14159, layers)
    assert table(found.as_dict()).splitlines() == [
        "perplexity      12.3457   reference 11.2500",
        "KL              0.01235 nats per token, over 1234 tokens",
        "experts chosen  75.00 % the same, whole set 62.51 %",
        "bits per weight 2.062 over routed experts, 3.142 over everything",
        "",
        "layer                        same experts  whole set  output error",
        "model.layers.0.mlp.experts        50.00 %    25.00 %       0.01235",
        "model.layers.10.mlp.experts      100.00 %    98.77 %       1.50000",
    ]
    below = table({**found.as_dict(), "kl": -1e-9}).splitlines()[1]  # of a model with itself
    assert below.split()[1] == "0.00000"


# ---- the statistics


@pytest.mark.parametrize("k", [1, 2, 8, 33])
def test_chosen_experts_are_compared_as_sets(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    a, b = (
        torch.stack([torch.randperm(40, generator=generator)[:k] for _ in range(50)])
        for _ in range(2)
    )
    same = sum(len(set(x) & set(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True))
    exact = sum(set(x) == set(y) for x, y in zip(a.tolist(), b.tolist(), strict=True))
    assert compare_sets(a, b) == (same, exact)
    assert compare_sets(a, a.flip(1)) == (50 * k, 50)


def test_a_slot_without_an_expert_is_not_expert_0() -> None:
    ours = torch.tensor([[-1, 2], [0, 2], [-1, -1], [-1, -1]])
    theirs = torch.tensor([[0, 2], [2, 0], [-1, 3], [-1, -1]])
    found = [compare_sets(x[None], y[None]) for x, y in zip(ours, theirs, strict=True)]
    assert found == [(1, 0), (2, 1), (1, 0), (2, 1)]


def test_identity_experts_are_not_expert_0() -> None:
    """Let one longcat_flash choose experts 0 and 1, and another two experts that are identities."""
    traced = trace(make("longcat_flash"), dtype=torch.float32)
    names = (w.name for w in traced.weights.values())
    name = next(n for n in names if n.endswith("1.mlp.router.e_score_correction_bias"))

    def preferring(experts: list[int]) -> Program:
        program, bias = traced.copy(), torch.zeros(6)
        bias[experts] = 9.0
        program.add(name, bias)
        return program

    real, identity = preferring([0, 1]), preferring([4, 5])
    assert evaluate(identity, real, tokens(2, 16)).per_layer[-1].agreement == 0
    assert evaluate(identity, identity, tokens(2, 16)).agreement == 1


def test_a_layer_s_sums_become_shares_of_its_choices_tokens_and_output() -> None:
    chosen = torch.tensor([[0, 1, 2], [0, 1, 2], [3, 4, 5], [-1, 0, 1], [5, 4, 3]])
    reference = torch.tensor([[2, 1, 0], [0, 1, 9], [3, 8, 9], [-1, 1, 0], [0, 1, 2]])
    same, whole = 3 + 2 + 1 + 3 + 0, 2
    ours = torch.arange(10.0).view(5, 2)
    theirs = ours.flip(0) / 4
    sums = LayerSums("experts")
    for part in (slice(0, 2), slice(2, 5)):  # two batches
        sums.add([(chosen[part], ours[part].half())], [(reference[part], theirs[part])])
    found = sums.layer()
    assert (found.path, found.agreement, found.exact_agreement) == ("experts", same / 15, whole / 5)
    pairs = list(zip(ours.flatten().tolist(), theirs.flatten().tolist(), strict=True))
    error = sum((x - y) ** 2 for x, y in pairs) / sum(y * y for _, y in pairs)
    assert found.output_error == pytest.approx(error, rel=1e-12)
    both = LayerSums("experts")
    both.add([(chosen, ours), (chosen, ours)], [(reference, theirs), (chosen, ours)])
    assert both.layer().agreement == (same + 15) / 30
    assert both.layer().exact_agreement == (whole + 5) / 10


@pytest.mark.parametrize(("size", "error"), [(0.0, 0.0), (1e-3, 1.0), (7.0, 1.0)])
def test_any_output_where_the_reference_has_none_is_an_error_of_one(
    size: float, error: float
) -> None:
    index, zeros = torch.tensor([[0]]), torch.zeros(1, 4)
    sums = LayerSums("experts")
    sums.add([(index, zeros + size)], [(index, zeros)])
    assert sums.layer().output_error == error


@pytest.mark.parametrize("at_once", [1, 16, 1 << 24])
def test_log_likelihoods_and_kl_are_sums_over_places_and_vocabulary(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """A masked token adds nothing, and the last place of a row predicts nothing."""
    monkeypatch.setattr("moecc.commands.agreement._PROBABILITIES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 2, 6, 7, generator=generator)
    ours[..., 6] = theirs[..., 6] = -torch.inf
    ids = torch.randint(0, 6, (2, 6), generator=generator)
    totals = Totals()
    for row in range(2):
        totals.add(ours[row : row + 1], theirs[row : row + 1], ids[row : row + 1])
    nll, reference_nll, kl = 0.0, 0.0, 0.0
    q, p = (x[..., :6].double().softmax(-1).tolist() for x in (ours, theirs))
    for b, row in enumerate(ids.tolist()):
        for place, following in enumerate(row[1:]):
            nll -= math.log(q[b][place][following])
            reference_nll -= math.log(p[b][place][following])
            pairs = zip(p[b][place], q[b][place], strict=True)
            kl += sum(x * math.log(x / y) for x, y in pairs)
    found = [float(x) for x in (totals.nll, totals.reference_nll, totals.kl)]
    assert found == pytest.approx([nll, reference_nll, kl], rel=1e-5)
    assert totals.tokens == 10


# ---- sizes


def test_bits_count_new_tensors_and_not_those_they_replaced(tinymoe: Program) -> None:
    program = tinymoe.copy()
    moe = program.moe_layers()[0]
    operand = moe.operand("gate_up")
    name = program.weights[operand.name].name
    halves = program.read(name).to(torch.float16).view(torch.uint8)[..., ::2].contiguous()
    args = (*moe.node.args[:3], program.add("small", halves), *moe.node.args[4:])
    program.replace(moe.node, moe.node.target, args, moe.attributes)
    weights, part = 9_200_000, tinymoe.read(name).numel()
    assert 16 - everything_bits(program, tinymoe) == pytest.approx(8 * part / weights, rel=0.01)
    assert experts_bits(program) == pytest.approx(16 - 8 * (2 / 3) / 4)
    assert everything_bits(tinymoe, tinymoe) == 16


# ---- refusals


def refused(program: Program, reference: Program, rows: Tensor) -> str:
    """Return the one line with which evaluate refuses its arguments."""
    with pytest.raises(MoeccError) as error:
        evaluate(program, reference, rows)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_different_models_are_refused(tinymoe: Program) -> None:
    other = trace(make("mixtral"))
    assert "MoE layers" in refused(other, tinymoe, tokens(1, 8))
    config = make("mixtral").config
    config.vocab_size = 96
    wider = trace(AutoModelForCausalLM.from_config(config))
    assert "vocabulary of 96" in refused(wider, other, tokens(1, 8))
    config.vocab_size, config.num_experts_per_tok = 64, 1
    fewer = trace(AutoModelForCausalLM.from_config(config))
    assert "chooses 2 experts" in refused(fewer, other, tokens(1, 8))


def test_a_model_without_a_head_is_refused() -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    program = trace(MixtralModel(config).eval())
    assert "needs a causal language model" in refused(program, program, tokens(1, 8))


def test_rows_that_do_not_fit_are_refused(tinymoe: Program) -> None:
    assert "outside the model's vocabulary" in refused(tinymoe, tinymoe, torch.full((1, 8), 4096))
    assert "token -1 is outside" in refused(tinymoe, tinymoe, torch.full((1, 8), -1))
    assert "token rows must be" in refused(tinymoe, tinymoe, tokens(1, 1))
    assert "token rows must be" in refused(tinymoe, tinymoe, tokens(1, 8)[0])
    program = trace(make("minimax"))
    assert "--length 63" in refused(program, program, tokens(1, 64))
    program.config.max_position_embeddings = 32
    assert "positions for 32" in refused(program, program, tokens(1, 33))
    program = tinymoe.copy()
    program.restriction = Restriction(excluded=(2,))  # as zaya's
    message = "holds for sequence other than 2 only; give --length 5"
    assert message in refused(program, tinymoe, tokens(1, 2))
    assert evaluate(program, tinymoe, tokens(1, 3)).kl == 0


def test_logits_that_are_not_numbers_are_refused() -> None:
    model = make("mixtral")
    program, broken = trace(model), trace(model)
    name = broken.weights[broken.moe_layers()[0].operand("down").name].name
    broken.add(name, broken.read(name) * torch.nan)
    message = "the compiled program computes logits that are not numbers"
    assert message in refused(broken, program, tokens(1, 8))

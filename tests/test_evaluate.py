"""Evaluation: a model against itself, against transformers' own loss, against a damaged copy."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import fails
from families import ALL, SAMPLE, make
from made import TINYMOE
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralModel

from moecc.checkpoint.module import ModuleStore
from moecc.commands import evaluate as command
from moecc.commands.agreement import LayerAgreement, LayerSums, Totals, compare_sets
from moecc.commands.evaluate import Evaluation, evaluate, table
from moecc.commands.rows import rows_digest
from moecc.errors import MoeccError
from moecc.frontend.trace import trace
from moecc.ir.program import Program
from moecc.ir.restriction import Restriction
from moecc.ir.tensors import CPU
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
    assert [layer.path for layer in found.per_layer] == [
        f"model.layers.{i}.mlp.experts" for i in range(2)
    ]
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
    pruned = table({**found.as_dict(), "experts_left": 0.87654}).splitlines()
    says = "weights left    87.65 % of the routed experts' weights; bits are per these"
    assert pruned == [*table(found.as_dict()).splitlines()[:4], says, *pruned[5:]]
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
    program = trace(make("minimax"))
    assert "--length 63" in refused(program, program, tokens(1, 64))
    program.config.max_position_embeddings = 32
    assert "positions for 32" in refused(program, program, tokens(1, 33))
    program = tinymoe.copy()
    program.restriction = Restriction(excluded=(2,))  # as zaya's
    message = "holds for sequence other than 2 only; give --length 5"
    assert message in refused(program, tinymoe, tokens(1, 2))
    assert evaluate(program, tinymoe, tokens(1, 3)).kl == 0


def test_rows_of_another_kind_are_refused(twins: tuple[FamilyModule, FamilyModule]) -> None:
    program = trace(twins[0], dtype=torch.float32)
    for rows in (tokens(1, 8)[0], tokens(0, 8), tokens(1, 8).int(), tokens(1, 8)[None]):
        assert f"not {rows.dtype} {list(rows.shape)}" in refused(program, program, rows)


def test_logits_that_are_not_numbers_are_refused() -> None:
    model = make("mixtral")
    program, broken = trace(model), trace(model)
    broken.add("lm_head.weight", broken.read("lm_head.weight") * torch.nan)
    message = "the compiled program computes logits that are not numbers"
    assert message in refused(broken, program, tokens(1, 8))
    name = broken.weights[broken.moe_layers()[0].operand("down").name].name
    broken.add(name, broken.read(name) * torch.nan)
    assert "what layer 0 gives is NaN" in refused(broken, program, tokens(1, 8))


@pytest.mark.parametrize(
    ("vocabulary", "hidden", "width", "fits"),
    [
        (16, 32, 16, True),
        (16, 32, 15, False),
        (16, 32, 32, False),
        (16, 32, 20, True),  # a head that is padded
        (16, 32, 33, True),
        (64, 32, 32, False),
        (32, 32, 32, True),
    ],
)
def test_a_program_ends_in_logits_if_its_width_is_no_hidden_state_s(
    vocabulary: int, hidden: int, width: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: Any = MixtralConfig(vocab_size=vocabulary, hidden_size=hidden)
    monkeypatch.setattr(command, "_width", lambda program: width)
    program: Any = SimpleNamespace(config=config)
    if fits:
        command._check_head(program, "it")
        command._check_head(SimpleNamespace(config=None), "it")  # type: ignore[arg-type]
    else:
        said = f"it ends in {width} values per token, not in logits over {vocabulary}"
        fails(lambda: command._check_head(program, "it"), said)


def test_layers_are_paired_by_their_paths_if_those_are_the_same() -> None:
    a, b, c, d = (SimpleNamespace(path=path) for path in "abab")
    pairs: Any = command._pairs
    assert pairs([a, b], [d, c]) == [(b, d), (a, c)] and pairs([a], [d]) == [(a, d)]
    with pytest.raises(ValueError, match="argument 2"):
        pairs([a, b], [c])


@pytest.mark.parametrize(
    ("batch", "most", "sizes"),
    [(8, 99, [7]), (3, 99, [3, 3, 1]), (8, 4, [4, 3]), (8, 1, [1] * 7), (8, 0, [1] * 7)],
)
def test_a_batch_holds_no_more_logits_than_fit(
    batch: int, most: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 5 tokens, each with 11 logits."""

    def stop(program: object, moes: object, batches: list[Tensor]) -> None:
        raise InterruptedError([len(b) for b in batches])

    monkeypatch.setattr(command, "_check", lambda *args: [])
    monkeypatch.setattr(command, "_width", lambda program: 11)
    monkeypatch.setattr(command, "_LOGITS_AT_ONCE", most * 5 * 11 + 54)
    monkeypatch.setattr(command, "_Side", stop)
    with pytest.raises(InterruptedError) as found:
        evaluate(None, None, torch.zeros(7, 5), batch=batch)  # type: ignore[arg-type]
    assert found.value.args == (sizes,)


def test_an_evaluation_is_made_of_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [
        SimpleNamespace(same=s, slots=n, exact=e, tokens=t, layer=lambda s=s: s)
        for s, n, e, t in ((3, 8, 1, 4), (5, 12, 2, 6))
    ]
    sizes = {"ours": (6, 10), "theirs": (12, 20)}
    ours, theirs = (
        SimpleNamespace(moe_layers=lambda k=k: [SimpleNamespace(weights=n) for n in sizes[k]])
        for k in sizes
    )
    monkeypatch.setattr(command, "experts_bits", lambda program: (program is ours) * 2.5)
    monkeypatch.setattr(command, "_weights", lambda program: (program is ours) * 77)
    monkeypatch.setattr(command, "everything_bits", lambda *args: args)
    totals = SimpleNamespace(nll=8.0, reference_nll=4.0, kl=2.0, tokens=4)
    made: Any = command._evaluation
    assert made(totals, layers, ours, theirs) == Evaluation(
        math.exp(2), math.exp(1), 0.5, 8 / 20, 3 / 10, 4, 2.5, (ours, theirs, 77), (3, 5), 0.5
    )
    for name, who in (("nll", "the compiled program"), ("reference_nll", "the reference")):
        broken = SimpleNamespace(**{**vars(totals), name: math.nan})
        says = "computes logits that are not numbers (NaN); its weights or dtype don't hold this"
        fails(lambda broken=broken: made(broken, layers, ours, theirs), f"{who} {says} model")


def test_a_perplexity_is_a_number_however_large() -> None:
    assert command._exp(2.0) == math.exp(2) and command._exp(1e9) == math.exp(700)


# ---- experts that a pass has taken out


def test_chosen_experts_have_the_source_s_numbers(twins: tuple[FamilyModule, FamilyModule]) -> None:
    model, rows, order = twins[0], tokens(3, 11), (2, 0, 1, 3)
    reference = trace(model, dtype=torch.float32)
    program, path = reference.copy(), reference.moe_layers()[0].path
    program.kept = {path: order}
    first, second = evaluate(program, reference, rows, batch=2).per_layer
    chosen = observed(model, rows)[0][0][0]
    same = sum(len({order[e] for e in one} & one) for one in chosen) / (2 * len(chosen))
    assert first.agreement == pytest.approx(same, rel=1e-12) and same < 1
    assert second.agreement == 1 and first.output_error == 0


def test_experts_that_the_reference_lacks_are_refused(
    twins: tuple[FamilyModule, FamilyModule],
) -> None:
    program = trace(twins[0], dtype=torch.float32)
    path, rows = program.moe_layers()[0].path, tokens(1, 8)
    pruned, larger = program.copy(), program.copy()
    pruned.kept = {path: (0, 1, 2, 4)}
    assert f"{path}: the reference lacks experts" in refused(pruned, program, rows)
    larger.kept = {path: (0, 1, 2, 3, 4)}
    said = f"{path}: the reference has 5 experts, the compiled program 4, and nothing says which"
    assert said in refused(program, larger, rows)
    assert evaluate(pruned, larger, rows).kl == 0


# ---- the command


FOUND = Evaluation(2.0, 1.5, 0.25, 0.75, 0.5, 30, 2.5, 3.5, (LayerAgreement("a", 1.0, 1.0, 0.0),))


@pytest.mark.parametrize("own", [True, False])
def test_the_command_compares_on_the_reference_s_own_tokens(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, said, seen = tokens(5, 7), [], {}
    programs = {
        "model": SimpleNamespace(restriction=""),
        "source": SimpleNamespace(restriction="" if own else "even lengths"),
    }

    def noting(name: str, result: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            seen[name] = args, options
            return result

        return call

    digest = rows_digest(ids) if own else "another"
    monkeypatch.setattr(command, "checkpoint_folder", lambda name: tmp_path / name)
    monkeypatch.setattr(command, "tokenizer_of", noting("tokenizer_of", "tokenizer"))
    monkeypatch.setattr(command, "token_rows", noting("token_rows", ids))
    monkeypatch.setattr(
        command, "read_manifest", noting("manifest", {"calibration_digest": digest})
    )
    monkeypatch.setattr(command, "_traced", lambda path, device, say: programs[path.name])
    monkeypatch.setattr(command, "evaluate", noting("evaluate", FOUND))
    say, progress = said.append, lambda items, label: items
    options: Any = dict(text=Path("t"), rows=6, length=8, batch=3, progress=progress, say=say)
    found = command.evaluate_models("model", "source", **options, trust_remote_code=own)
    assert found == {
        "model": "model",
        "reference": "source",
        "rows": 5,
        "length": 7,
        "rows_digest": rows_digest(ids),
        **FOUND.as_dict(),
    }
    assert seen["tokenizer_of"] == ((tmp_path / "source",), {"trust_remote_code": own})
    asked = {"count": 6, "length": 8, "purpose": "evaluation", "say": say}
    assert seen["token_rows"] == (("tokenizer", Path("t")), asked)
    assert seen["manifest"] == ((tmp_path / "model",), {})
    args, options = seen["evaluate"]
    assert args[:2] == (programs["model"], programs["source"]) and args[2] is ids
    assert options == {"batch": 3, "progress": progress}
    rest = "they say little about others"
    calibrated = f"note: model was calibrated on these very rows; {rest}"
    assert said == ([calibrated] if own else ["note: the trace holds for even lengths only"])


def test_a_traced_model_has_weights_that_fit_and_numbers_of_its_experts(
    tmp_path: Path, twins: tuple[FamilyModule, FamilyModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, said, asked = trace(twins[0], dtype=torch.float32), [], []

    def tracing(folder: Path, dtype: torch.dtype) -> Program:
        asked.append((folder, dtype))
        return program.copy()

    monkeypatch.setattr(command, "trace", tracing)
    path = program.moe_layers()[0].path

    def kept(**rows: list[int]) -> dict[str, tuple[int, ...]]:
        manifest = {"experts_kept": {path if k == "first" else k: v for k, v in rows.items()}}
        (tmp_path / "moecc.json").write_text(json.dumps(manifest))
        return command._traced(tmp_path, CPU, said.append).kept

    assert command._traced(tmp_path, CPU, said.append).kept == {}
    assert said == [f"tracing {tmp_path}"] and asked == [(tmp_path, torch.float32)]
    assert kept(first=[1, 2, 5, 9]) == {path: (1, 2, 5, 9)}
    for name, rows in (
        ("first", [2, 1, 5, 9]),
        ("first", [1, 1, 5, 9]),
        ("first", [1, 5, 9]),
        ("first", [1, 2, 5, 9, 10]),
        ("other", [0]),
    ):
        shown = repr(path if name == "first" else name)
        fails(
            lambda name=name, rows=rows: kept(**{name: rows}),
            f"{tmp_path / 'moecc.json'}: experts_kept of {shown} isn't one ascending number",
        )
    checked: list[bool] = []
    monkeypatch.setattr(ModuleStore, "check", lambda self: checked.append(True))
    monkeypatch.setattr(command, "trace", tracing)
    (tmp_path / "moecc.json").unlink()
    command._traced(tmp_path, CPU, said.append)
    assert checked == [True]

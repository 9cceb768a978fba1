"""The values that tuning moves: their units, rates and rounding, and what is stored of them."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_batches, tiny_program
from pipelines import resolved
from torch import Tensor, fx

from moecc.ir.program import Program
from moecc.ir.tensors import Weight
from moecc.passes._tune.trained import Trained
from moecc.passes._tune.tuned import RATES, Tuned, split
from moecc.pipeline.passes import Context
from moecc.pipeline.run import run_passes

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture(scope="module")
def coded() -> Program:
    """A layer with codes at 3 bit, a basis, a mean of 3 bit, and biases; tests take copies."""
    program = tiny_program("M")
    passes = resolved("klt{rank=2,mean=3},vq{bits=3,rounds=1},affine{offset=on},fold")
    run_passes(program, passes, Context(), tiny_batches())
    return program


@pytest.fixture
def program(coded: Program) -> Program:
    """`coded`, which a test may change."""
    return coded.copy()


@pytest.fixture
def whole(compressed: Program) -> Program:
    """A model with attention and shared experts too, which a test may change."""
    return compressed.copy()


@pytest.fixture
def tuned(program: Program) -> Tuned:
    return Tuned(program, program.moe_layers())


@pytest.mark.parametrize(
    ("batches", "trained", "held_out"),
    [
        (1, [0], [0]),
        (2, [0], [1]),
        (7, [0, 1, 2, 3, 4, 5], [6]),
        (8, [0, 1, 2, 3, 4, 5, 6], [7]),
        (9, [0, 1, 2, 3, 4, 5, 6, 8], [7]),
        (17, [*range(7), *range(8, 15), 16], [7, 15]),
    ],
)
def test_an_eighth_of_the_batches_is_held_out(
    batches: int, trained: list[int], held_out: list[int]
) -> None:
    assert split(batches) == (trained, held_out)


def test_untouched_values_are_stored_as_they_were(program: Program, tuned: Tuned) -> None:
    kinds = {kind: [k for k, found in tuned.kinds.items() if found == kind] for kind in RATES}
    assert all(len(found) in (2, 4) for found in kinds.values()), kinds
    for placeholder, value in tuned.stored().items():
        held = program.read(tuned.names[placeholder])
        assert held.dtype == value.dtype and torch.equal(held, value), tuned.names[placeholder]
    for placeholder, value in tuned.rounded().items():
        torch.testing.assert_close(value, program.read(tuned.names[placeholder]).float())
    before = program.text()
    assert tuned.store() is False and program.text() == before


def test_values_move_in_units_of_their_kind(program: Program, tuned: Tuned) -> None:
    for k, kind in tuned.kinds.items():
        held = program.read(tuned.names[k]).float()
        unit = tuned.unit[k].expand_as(held)
        if kind in ("codebook", "mean_codebook", "coef"):
            want = torch.ones_like(held)
        elif kind in ("scale", "mean_scale", "coef_scale"):
            want = held.abs()
        else:
            want = torch.full_like(held, float(held.abs().mean()))
        torch.testing.assert_close(unit, want)


def test_bits_are_those_of_the_codes_that_a_value_belongs_to() -> None:
    program = tiny_program("M")
    passes = resolved("klt{rank=2,mean=4},vq{bits=2,rounds=1},affine,fold")
    run_passes(program, passes, Context(), tiny_batches())
    tuned = Tuned(program, program.moe_layers())
    found = {
        kind: {tuned.bits[k] for k, own in tuned.kinds.items() if own == kind} for kind in RATES
    }
    assert found["mean_codebook"] == found["mean_scale"] == {4}
    assert found["codebook"] == found["scale"] == found["coef"] == {2}


def test_each_extra_bit_divides_the_rate_by_three(tuned: Tuned) -> None:
    for (k, kind), group in zip(tuned.kinds.items(), tuned.groups(0.5), strict=True):
        assert group["params"] == [tuned.parameters[k]] and tuned.bits[k] == 3
        assert group["lr"] == pytest.approx(RATES[kind] * 0.5 / 3)
    tuned.bits = dict.fromkeys(tuned.bits, 2)
    rates = [group["lr"] for group in tuned.groups(2.0)]
    assert rates == pytest.approx([2 * RATES[kind] for kind in tuned.kinds.values()])


def test_moved_values_are_rounded_to_the_format_and_their_gradient_goes_through(
    program: Program, tuned: Tuned
) -> None:
    with torch.no_grad():
        for p in tuned.parameters.values():
            p += 0.7
            p.view(-1)[0], p.view(-1)[-1] = 1e3, -1e3
    low = {"codebook": 0, "mean_codebook": 0, "coef": -127}  # at 3 bit
    values, stored = tuned.rounded(), tuned.stored()
    for k, kind in tuned.kinds.items():
        moved = (tuned.parameters[k] * tuned.unit[k]).detach()
        want = moved.round().clamp(low[kind], 127) if kind in low else moved
        assert torch.equal(values[k].detach(), want), kind
        if kind in low:
            assert stored[k].dtype == torch.int8 and torch.equal(stored[k].float(), want)
        else:
            assert stored[k].dtype in (torch.float16, torch.bfloat16)
            torch.testing.assert_close(stored[k].float(), want, rtol=1e-2, atol=1e-6)
        (slope,) = torch.autograd.grad(values[k].sum(), tuned.parameters[k])
        torch.testing.assert_close(slope, tuned.unit[k].expand_as(slope))


def test_a_state_comes_back_and_only_changes_are_stored(program: Program, tuned: Tuned) -> None:
    start = tuned.state()
    moved = next(k for k, kind in tuned.kinds.items() if kind == "coef")
    with torch.no_grad():
        tuned.parameters[moved].fill_(5)
    assert not torch.equal(start[moved], tuned.parameters[moved])
    before = {name: program.read(name) for name in tuned.names.values()}
    assert tuned.store() is True
    for name, value in before.items():
        changed = not torch.equal(program.read(name), value)
        assert changed == (name == tuned.names[moved])
    tuned.restore(start)
    assert all(torch.equal(p, start[k]) for k, p in tuned.parameters.items())
    assert tuned.store() is True and torch.equal(
        program.read(tuned.names[moved]), before[tuned.names[moved]]
    )


def test_only_the_wanted_values_are_made(tuned: Tuned) -> None:
    some = set(list(tuned.parameters)[1:3])
    assert tuned.rounded(some).keys() == tuned.stored(some).keys() == some
    assert tuned.rounded(set()) == tuned.stored(set()) == {}


def drawn(trained: Trained) -> None:
    with torch.no_grad():
        for b in trained.b.values():
            b.normal_()


def test_an_adapter_adds_its_product_to_the_weight(whole: Program) -> None:
    trained = Trained(whole, Context(), rank=3, experts=False, lr=2.0)
    assert trained.a and trained.placeholders == set(trained.a)
    values: dict[str, Tensor] = dict(trained.values(trained.placeholders))
    for k, value in values.items():  # it starts at nothing
        assert torch.equal(value, whole.read(whole.weights[k].name))
    drawn(trained)
    for k, value in trained.values(trained.placeholders).items():
        rows, columns = value.shape
        rank = min(3, rows, columns)
        assert trained.a[k].shape == (rank, columns) and trained.b[k].shape == (rows, rank)
        want = values[k] + trained.b[k] @ trained.a[k]
        torch.testing.assert_close(value, want)
        assert float(trained.a[k].detach().std()) == pytest.approx(columns**-0.5, rel=0.35)
    (group,) = trained.groups()
    assert group["lr"] == pytest.approx(6e-4) and len(group["params"]) == 2 * len(trained.a)


def test_an_adapter_starts_with_numbers_of_its_own(whole: Program) -> None:
    ctx = Context()
    for _ in range(2):  # the same again
        trained = Trained(whole, ctx, rank=3, experts=False, lr=1.0)
        for k, a in trained.a.items():
            seed = ctx.seed_for("rilq", whole.weights[k].name)
            draw = torch.randn(a.shape, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(a.detach(), draw / a.shape[1] ** 0.5)
            assert not trained.b[k].any()


def test_a_linear_without_an_adapter_has_its_reason_in_the_audit(whole: Program) -> None:
    ctx = Context()
    derived, *others = Trained(whole, ctx, rank=1, experts=False, lr=1.0).a
    name = whole.weights[derived].name
    assert name not in ctx.audit
    assert ctx.audit["model.layers.0.mlp.gate.weight"] == {"adapter": "none: router"}
    recipe = fx.symbolic_trace(torch.nn.Identity())
    whole.weights[derived] = Weight(name, recipe, ("another",))
    assert list(Trained(whole, ctx, rank=1, experts=False, lr=1.0).a) == others
    assert ctx.audit[name] == {"adapter": "none: computed from other weights"}


def test_experts_may_be_trained_without_adapters(whole: Program) -> None:
    trained = Trained(whole, Context(), rank=0, experts=True, lr=2.0)
    assert trained.placeholders == set(trained.experts.parameters) and not trained.a
    rates = [g["lr"] for g in trained.experts.groups(0.3)]
    assert [g["lr"] for g in trained.groups()] == rates and rates


def test_trained_adapters_are_left_in_the_program_only_if_they_are_better(
    whole: Program,
) -> None:
    trained = Trained(whole, Context(), rank=3, experts=True, lr=1.0)
    drawn(trained)
    before = whole.text()
    assert trained.store(better=False) is False and whole.text() == before
    want = trained.stored(trained.placeholders)
    assert trained.store(better=True) is True
    for k in trained.placeholders:
        torch.testing.assert_close(whole.read(whole.weights[k].name), want[k])
    assert [g["lr"] for g in trained.groups()[1:]] == [
        g["lr"] for g in trained.experts.groups(0.15)
    ]


def test_a_state_of_everything_comes_back(whole: Program) -> None:
    trained = Trained(whole, Context(), rank=2, experts=True, lr=1.0)
    start = trained.state()
    assert len(start) == 2 * len(trained.a) + len(trained.experts.parameters)
    with torch.no_grad():
        for p in trained.parameters:
            p += 1
    trained.restore(start)
    assert all(torch.equal(p, s) for p, s in zip(trained.parameters, start, strict=True))
    assert not Trained(whole, Context(), rank=0, experts=False, lr=1.0).parameters

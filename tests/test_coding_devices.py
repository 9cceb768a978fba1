"""Coding on a device that is not the CPU (`stand_in`): all of it there, the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from coders import BITS, E, costs, drawn, relative
from stand_in import back, device
from torch import Tensor

from moecc.passes._code import codebooks, native, sums
from moecc.passes._code.basis import common_mean, factorize
from moecc.passes._code.codebooks import kmeans
from moecc.passes._code.coding import encode
from moecc.passes._code.metric import pivots, weighted_error


@pytest.fixture(autouse=True)
def _without_compiled_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "compiled", lambda: None)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("feedback", [False, True])
def test_a_device_codes_as_the_cpu_does(bits: int, coupled: bool, feedback: bool) -> None:
    """To the last bit: the numbers of an expert are added up in the same order."""
    weight, moment = drawn(bits, rows=20, columns=24)
    output = costs(1.0, rows=20, blocks=2) if coupled else None
    options = dict(bits=bits, shared=False, seed=3, rounds=3, feedback=feedback)
    want = encode(weight, moment, output, **options)
    with device() as there:
        given = None if output is None else there(output)
        got = encode(there(weight), there(moment), given, **options)
        stored = got.stored()
    for name, tensor in vars(want).items():
        found = vars(got)[name]
        assert (found is None) == (tensor is None)
        assert tensor is None or torch.equal(back(found), tensor), name
    assert {name: None if t is None else back(t).dtype for name, t in stored.items()} == {
        name: None if t is None else t.dtype for name, t in want.stored().items()
    }


def test_a_shared_codebook_on_a_device_is_as_good_as_on_the_cpu() -> None:
    """It is a sum over experts, in another order."""
    weight, moment = drawn(1, rows=20, columns=24)
    want = encode(weight, moment, bits=2, shared=True, seed=3)
    with device() as there:
        got = encode(there(weight), there(moment), bits=2, shared=True, seed=3)
        dense = got.dense()
    error = float(weighted_error(back(dense) - weight, moment).sum())
    assert error == pytest.approx(relative(weight, moment, want) * whole(weight, moment), rel=0.02)
    assert len(got.codebook) == 1


def whole(weight: Tensor, moment: Tensor) -> float:
    return float(weighted_error(weight, moment).sum())


def test_draws_are_the_same_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of points, of first centroids, and of others for centroids without points."""
    monkeypatch.setattr(codebooks, "_SAMPLE", 300)
    target = torch.randint(-2, 3, (2, 20, 64), generator=torch.Generator().manual_seed(1)).float()
    importance = 1 + torch.arange(64.0).expand(2, 64)
    want = kmeans(target, importance, bits=2, seed=5, turns=3)
    with device() as there:
        got = kmeans(there(target), there(importance), bits=2, seed=5, turns=3)
    assert torch.equal(back(got), want)


@pytest.mark.parametrize("books", [1, E])
@pytest.mark.parametrize("together", [7, 1 << 18])
def test_numbers_are_added_up_by_code(
    books: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of experts or whole, a code without groups among them."""
    monkeypatch.setattr(sums, "_TOGETHER", together)
    g = torch.Generator().manual_seed(2)
    codes = torch.randint(1, 9, (E, 3, 10), generator=g)
    values = torch.randn(E, 3, 10, 4, generator=g)
    want = torch.zeros(books, 256, 4, dtype=torch.float64)
    for e, n, i in torch.cartesian_prod(*map(torch.arange, codes.shape)).tolist():
        want[e % books, codes[e, n, i]] += values[e, n, i].double()
    with device() as there:
        got = sums.sums_by_code(there(codes), books)(there(values))
    for found in (back(got), sums.sums_by_code(codes, books)(values)):
        torch.testing.assert_close(found, want.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("input_side", [True, False])
def test_a_shared_part_is_found_where_the_weights_are(input_side: bool) -> None:
    weight, moment = drawn(1, rows=24, columns=16)
    mean = weight.mean(0, keepdim=True)
    with device() as there:
        taken = common_mean(there(mean), 2, 1, input_side=input_side)
        basis = factorize(there(weight), there(moment), 4, input_side=input_side)
        left = (taken | basis).left_of(there(weight))
        cost = pivots(there(moment))
    want = common_mean(mean, 2, 1, input_side=input_side) | factorize(
        weight, moment, 4, input_side=input_side
    )
    assert torch.equal(back(left), want.left_of(weight))
    assert torch.equal(back(cost), pivots(moment))


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda x: x @ torch.eye(3), "takes tensors of the CPU"),
        (lambda x: torch.zeros(()).add_(x.sum()), "takes tensors of the CPU"),
        (lambda x: torch.stack([x.sum(), torch.zeros(())]), "takes tensors of the CPU"),
        (lambda x: x.gather(0, torch.zeros(3, 3, dtype=torch.long)), "takes tensors of the CPU"),
        (lambda x: torch.randn(3, generator=torch.Generator(), device=x.device), "generator of"),
        (lambda x: x.new_zeros(3, 3).index_add_(0, x[0].long(), x), "adds in any order"),
        (lambda x: x.numpy(), "not supported for tensor subclasses"),
    ],
)
def test_the_stand_in_refuses_what_a_gpu_refuses(
    step: Callable[[Tensor], object], said: str
) -> None:
    with device() as there, pytest.raises((AssertionError, RuntimeError), match=said):
        step(there(torch.ones(3, 3)))

"""The shared basis of `klt` against numpy's SVD, and the shapes in which it is stored."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from coders import drawn
from layers import bits_of
from torch import Tensor

from moecc.ir import vq4
from moecc.passes._code.basis import common_mean, directions, factorize, largest, root_of
from moecc.passes._code.coded import pad_columns
from moecc.passes._code.coding import encode
from moecc.pipeline.bits import basis_bits


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_the_vectors_of_a_large_matrix_hold_as_much_as_its_eigenvectors(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The matrix is made of its eigenvalues, steep ones and almost equal ones."""
    monkeypatch.setattr("moecc.passes._code.basis._SMALL", 0)
    size = 4 * (rank + 16) + 40
    draw = torch.Generator().manual_seed(3)
    vectors = torch.linalg.qr(torch.randn(size, size, generator=draw))[0]
    for values in (torch.arange(size, 0, -1.0).pow(-0.5), torch.linspace(1.5, 1, size)):
        gram = (vectors * values) @ vectors.T
        found = largest(gram, rank)
        torch.testing.assert_close(found.T @ found, torch.eye(rank), rtol=1e-4, atol=1e-4)
        each = (found * (gram @ found)).sum(0)
        assert float(each.sum()) > 0.98 * float(values[:rank].sum())
        assert each.tolist() == sorted(each.tolist(), reverse=True)
        assert torch.equal(largest(gram, rank), found)


@pytest.mark.parametrize("input_side", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_the_shared_basis_against_the_svd_of_numpy(
    input_side: bool, rank: int, spread: float
) -> None:
    """Moments whose columns are of very unequal sizes are decided by their damping."""
    weight, moment = drawn(7, experts=3, rows=10, columns=8)
    size = 10 ** (-spread * torch.linspace(0, 2, 8))
    moment = size * moment * size.unsqueeze(-1)
    shared = factorize(weight, moment, rank, input_side=input_side)
    got, metric = (weight - shared.left_of(weight)).double().numpy(), np.eye(8)
    w, h = weight.double().numpy(), moment.double().numpy()
    if input_side:
        c = h.mean(0)
        c = c + np.eye(8) * (1e-3 * np.diag(c).mean())
        values, vectors = np.linalg.eigh(c)
        root, inverse = (vectors * values**p @ vectors.T for p in (0.5, -0.5))
        v = np.linalg.svd(np.concatenate(list(w @ root)))[2][:rank].T
        want, metric = w @ root @ v @ v.T @ inverse, root
    else:
        parts = []
        for e in range(3):
            c = h[e] + np.eye(8) * (1e-3 * np.diag(h[e]).mean())
            # any root of C has the same left singular vectors
            parts.append(w[e] @ np.linalg.cholesky(c))
        u = np.linalg.svd(np.concatenate(parts, axis=1))[0][:, :rank]
        want = u @ u.T @ w
    # coefficients, which are products with the metric, are rounded to 8 bits
    assert np.abs((got - want) @ metric).max() <= 0.012 * np.abs(want @ metric).max()


def test_a_full_basis_leaves_only_rounding() -> None:
    weight, moment = drawn(8, experts=3, rows=10, columns=8)
    for input_side, rank in ((True, 8), (False, 10)):
        left = factorize(weight, moment, rank, input_side=input_side).left_of(weight)
        assert float(left.abs().max()) < 0.03 * float(weight.abs().max())


@pytest.mark.parametrize("input_side", [True, False])
def test_a_basis_can_be_cut_and_joined_with_a_mean(input_side: bool) -> None:
    weight, moment = drawn(8, experts=3, rows=10, columns=12)
    mean = common_mean(weight.mean(0, keepdim=True), 3, 5, input_side=input_side)
    alike = torch.eye(12).unsqueeze(0)
    plain = encode(
        *pad_columns(weight.mean(0, keepdim=True), alike), bits=3, shared=True, seed=5
    ).stored()
    for name, tensor in plain.items():
        got = mean.tensors[vq4.MEAN + name]
        assert got is not None and tensor is not None and torch.equal(got, tensor), name
    whole = factorize(weight, moment, 4, input_side=input_side)
    cut = whole.first(2)
    basis, coef, scale = (whole.tensors[n] for n in ("basis", "coef", "coef_scale"))
    assert basis is not None and coef is not None and scale is not None
    taken = torch.zeros_like(weight)
    for e in range(3):
        numbers = coef[e].float() * scale[e].float().unsqueeze(-1)
        for r in range(2):
            row = basis[r].float()
            pair = (numbers[:, r], row) if input_side else (row, numbers[r])
            taken[e] += torch.outer(*pair)
    torch.testing.assert_close(cut.left_of(weight), weight - taken)
    both = mean | cut
    assert both.tensors.keys() == {*mean.tensors, *cut.tensors}
    left = mean.left_of(weight) - taken
    torch.testing.assert_close(both.left_of(weight), left)
    assert float(mean.left_of(weight).mean(0).abs().max()) < 0.2  # the mean is gone


@pytest.mark.parametrize("input_side", [True, False])
@pytest.mark.parametrize("seen", [16, 2])
def test_directions_of_some_experts_become_those_of_all_if_all_turn_them_once(
    input_side: bool, seen: int
) -> None:
    """They hold all but a hundredth of the energy that the directions of all experts hold."""
    weight, moment = drawn(8, experts=16, rows=24, columns=24)
    draw = torch.Generator().manual_seed(1)
    few = torch.randn(3, 24, generator=draw)
    own = torch.randn(16, 24, 3, generator=draw)
    weight = weight + 2 * (own @ few if input_side else (own @ few).mT)
    root = root_of(moment.mean(0)) if input_side else None
    roots = torch.linalg.cholesky(moment)

    def pull(span: Tensor) -> Tensor:
        whole = weight.mT @ weight if input_side else weight @ moment @ weight.mT
        return whole.sum(0) @ span

    def held(onto: Tensor, basis: Tensor) -> float:
        part = weight @ onto @ basis if input_side else basis.T @ (onto.T @ weight)
        left = weight - part
        return float((left @ root if root is not None else left @ roots).square().sum())

    begun = directions(weight[:seen], moment[:seen], 6, input_side=input_side)
    found = begun.turned(pull, root, 3)
    best = directions(weight, moment, 3, input_side=input_side)
    assert found.onto.shape == (24, 3) and found.basis.shape == (3, 24)
    torch.testing.assert_close(found.basis @ found.onto, torch.eye(3), rtol=1e-3, atol=1e-3)
    nothing, least = held(found.onto * 0, found.basis), held(best.onto, best.basis)
    assert nothing - held(found.onto, found.basis) > 0.99 * (nothing - least)
    alone = directions(weight[:seen], moment[:seen], 3, input_side=input_side)
    assert held(found.onto, found.basis) <= held(alone.onto, alone.basis) * 1.001


@pytest.mark.parametrize("input_side", [True, False])
def test_the_part_of_some_experts_is_theirs_of_the_whole(input_side: bool) -> None:
    weight, moment = drawn(8, experts=5, rows=10, columns=8)
    mean = common_mean(weight.mean(0, keepdim=True), 2, 5, input_side=input_side)
    basis = factorize(mean.left_of(weight), moment, 2, input_side=input_side)
    for shared in (mean, basis, mean | basis):
        some = shared.of([3, 0])
        assert some.tensors.keys() == shared.tensors.keys()
        torch.testing.assert_close(
            some.left_of(weight[[3, 0]]), shared.left_of(weight)[[3, 0]], rtol=0, atol=0
        )


def test_a_stored_basis_has_the_shapes_of_the_format() -> None:
    weight, moment = drawn(8, experts=3, rows=10, columns=8)
    for input_side, basis, coef in ((True, (2, 8), (3, 10, 2)), (False, (2, 10), (3, 2, 8))):
        got = factorize(weight, moment, 2, input_side=input_side)
        want = {
            "basis": (basis, torch.float16),
            "coef": (coef, torch.int8),
            "coef_scale": (coef[:2], torch.float16),
        }
        stored = {n: t for n, t in got.tensors.items() if t is not None}
        assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == want
        bits = 16 * math.prod(basis) + 8 * math.prod(coef) + 16 * math.prod(coef[:2])
        assert bits_of(got.tensors) == bits
        assert basis_bits(2, 3, 10, 8, input_side=input_side) == bits
    assert basis_bits(0, 3, 10, 8, input_side=True) == 0

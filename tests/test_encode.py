"""`encode`: all rounds of coding together, padding, and what it stores."""

from __future__ import annotations

import pytest
import torch
from coders import BITS, E, K, N, costs, drawn, relative
from hypothesis import given
from hypothesis import strategies as st
from layers import bits_of

from moecc.ir import vq4
from moecc.passes._code.coded import pad_columns
from moecc.passes._code.coding import encode
from moecc.passes._code.metric import weighted_error
from moecc.pipeline.bits import coded_bits


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("likeness", "blocks"), [(1.0, 1), (10.0, 1), (10.0, 2)])
def test_codes_follow_the_cost_of_output_errors(bits: int, likeness: float, blocks: int) -> None:
    weight, moment = drawn(5, rows=64, columns=64)
    cost = costs(likeness, blocks=blocks)
    plain, knowing = (
        encode(weight, moment, output, bits=bits, shared=False, seed=0).dense() - weight
        for output in (None, cost)
    )
    assert float(weighted_error(knowing, moment, cost).sum()) < 0.95 * float(
        weighted_error(plain, moment, cost).sum()
    )
    # each row still stands for its own weights
    assert float(weighted_error(knowing, moment).sum()) < 0.5 * float(
        weighted_error(weight, moment).sum()
    )


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_codes_do_not_depend_on_the_unit_of_costs(size: float) -> None:
    weight, moment = drawn(5, rows=32)
    cost = costs(1.0, rows=32)
    want, got = (
        encode(weight, moment, c, bits=2, shared=False, seed=0) for c in (cost, cost * size)
    )
    errors = [float(weighted_error(c.dense() - weight, moment, cost).sum()) for c in (want, got)]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


@pytest.mark.parametrize("blocks", [1, 4])
def test_equal_costs_change_nothing(blocks: int) -> None:
    weight, moment = drawn(5, rows=64, columns=64)
    coded = (
        encode(weight, moment, c, bits=2, shared=False, seed=0)
        for c in (None, torch.eye(64 // blocks).expand(E, blocks, -1, -1))
    )
    plain, same = (float(weighted_error(c.dense() - weight, moment).sum()) for c in coded)
    assert abs(same / plain - 1) < 0.05  # so much lies between two searches for the same minimum


@pytest.mark.parametrize("shared", [True, False])
@given(seed=st.integers(0, 10_000))
def test_error_falls_as_bits_rise(shared: bool, seed: int) -> None:
    weight, moment = drawn(seed, rows=96, columns=32)
    errors = [
        relative(weight, moment, encode(weight, moment, bits=b, shared=shared, seed=0, rounds=2))
        for b in BITS
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shared", [True, False])
def test_coded_experts_can_be_stored_in_the_format(bits: int, shared: bool) -> None:
    weight, moment = drawn(2)
    coded = encode(weight, moment, bits=bits, shared=shared, seed=0)
    v = vq4.group_size(bits)
    assert coded.codes.shape == (E, N, K // v)
    assert 0 <= int(coded.codes.min()) <= int(coded.codes.max()) <= 255
    assert coded.codebook.shape == (1 if shared else E, 256, v)
    assert torch.equal(coded.codebook, coded.codebook.to(torch.int8).float())
    assert (coded.negative is not None) == (bits == 3) and bool((coded.scale > 0).all())
    assert bits != 3 or int(coded.codebook.min()) >= 0
    stored = coded.stored()
    assert tuple(stored) == vq4.CODED and (stored["signs"] is None) == (bits != 3)
    assert [t.dtype for t in stored.values() if t is not None and t.dtype != torch.uint8] == [
        torch.int8,
        torch.float16,
    ]
    part = {vq4.MEAN + n: t for n, t in stored.items()}
    torch.testing.assert_close(
        vq4.mean_part(part, K, torch.float32), coded.dense(), rtol=1e-3, atol=1e-6
    )
    assert bits_of(stored) == coded_bits(E, N, K, bits, books=1 if shared else E)


@pytest.mark.parametrize("bits", BITS)
def test_the_same_seed_gives_the_same_codes(bits: int) -> None:
    weight, moment = drawn(3)
    first, again = (encode(weight, moment, bits=bits, shared=False, seed=5) for _ in range(2))
    for name in ("codes", "codebook", "scale"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [12, 13])
def test_padded_columns_cost_nothing(bits: int, columns: int) -> None:
    weight, moment = drawn(4, rows=64, columns=columns)
    wide, wide_moment = pad_columns(weight, moment)
    assert wide.shape[-1] == 16 and wide_moment.shape[-2:] == (16, 16)
    assert not wide[..., columns:].any()
    assert not wide_moment[:, columns:].any() and not wide_moment[..., columns:].any()
    coded = encode(wide, wide_moment, bits=bits, shared=False, seed=0)
    kept = weighted_error(coded.dense()[..., :columns] - weight, moment)
    torch.testing.assert_close(kept, weighted_error(coded.dense() - wide, wide_moment))
    assert float((kept / weighted_error(weight, moment)).max()) < {2: 0.3, 3: 0.06, 4: 0.02}[bits]


def test_a_multiple_of_eight_is_not_padded() -> None:
    weight, moment = drawn(4)
    assert pad_columns(weight, moment) == (weight, moment)


def test_rows_of_zeros_stay_zero_and_finite() -> None:
    weight, moment = drawn(5)
    weight[:, 1] = 0
    coded = encode(weight, moment, bits=2, shared=False, seed=0)
    assert bool(torch.isfinite(coded.dense()).all())
    assert float(coded.dense()[:, 1].abs().max()) < 1e-9


def test_an_expert_without_moments_is_coded_all_the_same() -> None:
    weight, moment = drawn(6)
    moment[0] = 0
    coded = encode(weight, moment, bits=2, shared=False, seed=0)
    error = (coded.dense() - weight)[0].square().sum() / weight[0].square().sum()
    assert bool(torch.isfinite(coded.dense()).all()) and float(error) < 0.5

"""The format: `moecc.ir.vq4` and `moecc::vq_experts` against a decoder written index by index."""

from __future__ import annotations

import numpy as np
import pytest
import slow_vq4 as slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import bits_of
from torch import Tensor

from moecc.ir import vq4
from moecc.ir.ops import VQ_EXPERTS
from moecc.passes._code.stored import CodedProjection


def operands(
    gate_up: slow.Projection, down: slow.Projection, post_norm: Tensor | None = None
) -> list[Tensor | None]:
    """Return the positional operands of vq_experts after x and the routing."""
    sides = [[*slow.tensors(p).values(), None, None] for p in (gate_up, down)]
    return [*sides[0], *sides[1], post_norm]


def run_op(
    x: np.ndarray,
    index: np.ndarray,
    weight: np.ndarray,
    gate_up: slow.Projection,
    down: slow.Projection,
    post_norm: Tensor | None = None,
) -> np.ndarray:
    """Return what vq_experts gives for tokens x [T, D]."""
    routed = map(torch.from_numpy, (x, index, weight))
    result = VQ_EXPERTS(*routed, *operands(gate_up, down, post_norm), **slow.SILU_GLU)
    return np.asarray(result.numpy())


def assert_layers_equal(
    x: np.ndarray,
    index: np.ndarray,
    weight: np.ndarray,
    gate_up: slow.Projection,
    down: slow.Projection,
) -> None:
    """The op gives what the slow layer gives."""
    got = run_op(x, index, weight, gate_up, down)
    want = slow.layer(x, index, weight, gate_up, down, slow.silu_glu)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


# ---- parts of the format


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [8, 12, 13, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_decode_reads_every_weight_as_the_format_says(
    bits: int, columns: int, shared: bool
) -> None:
    p = slow.draw(bits, experts=3, rows=5, columns=columns, bits=bits, shared=shared)
    t = slow.tensors(p)
    got = vq4.decode(t["codes"], t["signs"], t["codebook"], columns, torch.float32)
    assert got.shape == (3, 5, columns)
    np.testing.assert_array_equal(got.numpy(), slow.unscaled(p, columns))


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 3, 4]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 40),
    st.booleans(),
)
def test_decode_of_any_shape(
    salt: int, bits: int, experts: int, rows: int, columns: int, shared: bool
) -> None:
    p = slow.draw(salt, experts=experts, rows=rows, columns=columns, bits=bits, shared=shared)
    t = slow.tensors(p)
    got = vq4.decode(t["codes"], t["signs"], t["codebook"], columns, torch.float64)
    np.testing.assert_array_equal(got.numpy(), slow.unscaled(p, columns))


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_signs_come_back_from_their_bits(rows: int, bytes_: int, salt: int) -> None:
    negative = torch.from_numpy(slow.numbers(salt, rows, 8 * bytes_) % 2 == 1)
    packed = vq4.pack_signs(negative)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, bytes_)
    assert torch.equal(vq4.unpack_signs(packed), negative)


def test_a_sign_bit_sits_where_the_format_puts_it() -> None:
    """Bit c of a nibble is the sign of component c: low nibbles for even groups, high for odd."""
    for column in range(16):
        negative = torch.zeros(16, dtype=torch.bool)
        negative[column] = True
        packed = vq4.pack_signs(negative).tolist()
        group, component = column // 4, column % 4
        want = [0, 0]
        want[group // 2] = (1 << component) if group % 2 == 0 else (1 << component) * 16
        assert packed == want


def test_sizes_of_the_format() -> None:
    assert [vq4.group_size(bits) for bits in (2, 3, 4)] == [4, 4, 2]
    assert [vq4.padded(n) for n in (1, 7, 8, 9, 16, 17)] == [8, 8, 8, 16, 16, 24]


def test_tensors_stay_on_their_device() -> None:
    with torch.device("meta"):
        codes, book = torch.zeros(3, 5, 4, dtype=torch.uint8), torch.zeros(3, 256, 4)
        negative = torch.zeros(3, 5, 16, dtype=torch.bool)
    signs = vq4.pack_signs(negative)
    assert signs.is_meta and signs.shape == (3, 5, 2)
    weight = vq4.decode(codes, signs, book, 13, torch.float32)
    assert weight.is_meta and weight.shape == (3, 5, 13)


@pytest.mark.parametrize("input_side", [True, False])
def test_basis_part_against_the_loop(input_side: bool) -> None:
    p = slow.draw(3, experts=2, rows=6, columns=10, bits=2, rank=3, input_side=input_side)
    whole, t = slow.dense(p, 10, input_side=input_side), slow.tensors(p)
    coded = slow.unscaled(p, 10) * np.asarray(p["scale"], dtype=np.float64)[..., None]
    low = vq4.basis_part(
        t["coef"], t["coef_scale"], t["basis"], torch.float64, input_side=input_side
    )
    np.testing.assert_allclose(coded + low.numpy(), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("input_side", [True, False])
@pytest.mark.parametrize(("bits", "rank"), [(2, 0), (3, 0), (4, 0), (2, 3), (3, 3), (4, 3), (0, 3)])
def test_shared_part_against_the_loop(bits: int, rank: int, input_side: bool) -> None:
    """Basis and mean are everything in a projection but the experts' own codes."""
    p = slow.draw(
        4, experts=2, rows=6, columns=10, bits=2, rank=rank, mean=bits, input_side=input_side
    )
    t = slow.tensors(p)
    want = slow.dense({**p, "scale": np.zeros_like(p["scale"])}, 10, input_side=input_side)
    got = vq4.shared_part(t, 10, torch.float64, input_side=input_side)
    mean = vq4.mean_part(t, 10, torch.float64)
    assert got is not None and (mean is None) == (bits == 0)
    assert mean is None or mean.shape == (1, 6, 10)
    assert got.shape == ((2, 6, 10) if rank else (1, 6, 10))
    np.testing.assert_allclose(got.expand(2, -1, -1).numpy(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("input_side", [True, False])
@pytest.mark.parametrize(("rank", "mean"), [(0, 0), (2, 0), (0, 3), (2, 4)])
def test_affine_reads_a_projection_as_the_format_says(
    rank: int, mean: int, input_side: bool
) -> None:
    """It fits the experts' own codes, and takes the rest off the target."""
    shape = dict(experts=2, rows=6, columns=10)
    p = slow.draw(6, **shape, bits=3, rank=rank, mean=mean, bias=True, input_side=input_side)
    x = slow.uniform(7, 5, 10)
    coded = CodedProjection(slow.tensors(p), input_side)
    own = slow.unscaled(p, 10) * p["scale"].astype(np.float64)[..., None]
    for e, whole in enumerate(slow.dense(p, 10, input_side=input_side)):
        v, low = coded.parts(e, torch.from_numpy(x).float())
        np.testing.assert_allclose(v.numpy(), x @ own[e].T, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose((v + low).numpy(), x @ whole.T, rtol=1e-4, atol=1e-5)
        got = coded.apply(e, torch.from_numpy(x).float(), torch.full((2, 6), 2.0), None)
        np.testing.assert_allclose(
            got.numpy(), x @ (whole + own[e]).T + p["bias"][e], rtol=1e-4, atol=1e-5
        )


def test_without_basis_and_mean_no_part_is_shared() -> None:
    t = slow.tensors(slow.draw(4, experts=2, rows=6, columns=10, bits=3))
    assert vq4.mean_part(t, 10, torch.float64) is None
    assert vq4.shared_part(t, 10, torch.float64, input_side=True) is None


def test_every_bit_is_counted() -> None:
    p = slow.tensors(slow.draw(1, experts=3, rows=4, columns=10, bits=3, rank=2, bias=True, mean=4))
    # ten columns are stored as sixteen
    codes, signs, books = 3 * 4 * 4 * 8, 3 * 4 * 2 * 8, 3 * 256 * 4 * 8
    scales, basis = 2 * (3 * 4 * 16), 2 * 10 * 16
    coef = 3 * 4 * 2 * 8 + 3 * 4 * 16
    mean = 4 * 8 * 8 + 256 * 2 * 8 + 4 * 16
    assert bits_of(p) == codes + signs + books + scales + basis + coef + mean


def test_tensor_names_are_those_of_the_format() -> None:
    assert vq4.TENSORS == slow.NAMES
    assert vq4.SHARED == slow.NAMES[5:] and vq4.CODED == slow.NAMES[:4]
    assert vq4.VERSION == 1


# ---- the op


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("rank", "bias"), [(0, False), (0, True), (2, False), (3, True)])
def test_layer_output_against_the_slow_layer(
    bits: int, shared: bool, rank: int, bias: bool
) -> None:
    gate_up, down = slow.draw_layer(bits, bits=bits, shared=shared, rank=rank, bias=bias)
    routed = slow.draw_routing(11, tokens=4, top_k=2, experts=3, hidden=12)
    assert_layers_equal(*routed, gate_up, down)


def test_each_of_two_experts_of_a_layer_has_its_codebook() -> None:
    gate_up, down = slow.draw_layer(5, experts=2)
    assert len(gate_up["codebook"]) == 2
    routed = slow.draw_routing(11, tokens=4, top_k=1, experts=2, hidden=12)
    assert_layers_equal(*routed, gate_up, down)


@pytest.mark.parametrize(("bits", "mean"), [(2, 2), (2, 3), (3, 4), (4, 2)])
@pytest.mark.parametrize("rank", [0, 2])
def test_layer_output_with_a_mean_against_the_slow_layer(bits: int, mean: int, rank: int) -> None:
    gate_up, down = slow.draw_layer(bits, bits=bits, rank=rank, mean=mean)
    routed = slow.draw_routing(11, tokens=3, top_k=2, experts=3, hidden=12)
    assert_layers_equal(*routed, gate_up, down)
    got = run_op(*routed, gate_up, down)
    for p in (gate_up, down):
        p.update({name: None for name in p if name.startswith("mean_")})
    assert np.abs(run_op(*routed, gate_up, down) - got).max() > 0.1


MEAN_BITS = st.sampled_from([0, 2, 3, 4])


@given(
    salt=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([2, 3, 4]),
    shared=st.booleans(),
    bias=st.booleans(),
    ranks=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    means=st.tuples(MEAN_BITS, MEAN_BITS),
    experts=st.integers(1, 4),
    hidden=st.integers(1, 14),
    intermediate=st.integers(1, 10),
    tokens=st.integers(1, 4),
    data=st.data(),
)
def test_layer_of_any_shape(
    salt: int,
    bits: int,
    shared: bool,
    bias: bool,
    ranks: tuple[int, int],
    means: tuple[int, int],
    experts: int,
    hidden: int,
    intermediate: int,
    tokens: int,
    data: st.DataObject,
) -> None:
    top_k = data.draw(st.integers(1, experts))
    common = dict(experts=experts, bits=bits, shared=shared, bias=bias)
    up = dict(rows=2 * intermediate, columns=hidden, rank=ranks[0], mean=means[0])
    down = dict(rows=hidden, columns=intermediate, rank=ranks[1], mean=means[1], input_side=False)
    sides = slow.draw(salt, **up, **common), slow.draw(salt + 50, **down, **common)
    routed = slow.draw_routing(salt, tokens=tokens, top_k=top_k, experts=experts, hidden=hidden)
    assert_layers_equal(*routed, *sides)


@pytest.mark.parametrize(("rank", "mean"), [(2, 0), (0, 3), (2, 4)])
def test_a_norm_on_each_expert_comes_after_basis_and_mean(rank: int, mean: int) -> None:
    gate_up, down = slow.draw_layer(5, rank=rank, mean=mean)
    x, index, weight = slow.draw_routing(12, tokens=4, top_k=2, experts=3, hidden=12)
    gain = slow.uniform(13, 12, low=0.5, high=1.5)

    def norm(y: np.ndarray) -> np.ndarray:
        scaled = y * gain
        return np.asarray(scaled / np.sqrt((scaled**2).mean() + 1e-6))

    got = run_op(x, index, weight, gate_up, down, torch.from_numpy(gain))
    want = slow.layer(x, index, weight, gate_up, down, slow.silu_glu, norm)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_float16_and_bfloat16_scales_mean_the_same(bits: int) -> None:
    gate_up, down = slow.draw_layer(bits, bits=bits, mean=2)
    x, index, weight = slow.draw_routing(11, tokens=2, top_k=2, experts=3, hidden=12)
    for p in (gate_up, down):  # values that both types hold
        for name in ("scale", "bias", "basis", "coef_scale", "mean_scale"):
            p[name] = torch.from_numpy(p[name]).bfloat16().float().numpy()
    halves = [
        t if t is None or not t.is_floating_point() else t.bfloat16()
        for t in operands(gate_up, down)
    ]
    got = VQ_EXPERTS(*map(torch.from_numpy, (x, index, weight)), *halves, **slow.SILU_GLU)
    np.testing.assert_array_equal(got.numpy(), run_op(x, index, weight, gate_up, down))

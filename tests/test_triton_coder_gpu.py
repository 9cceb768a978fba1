"""Coding on a GPU, if there is one: the kernels against PyTorch, each run the same, no worse."""

from __future__ import annotations

import os

import pytest
import torch
from coders import BITS, codebooks, coder, costs, drawn, scales
from torch import Tensor

from moecc.passes._code.coded import Coded
from moecc.passes._code.coder import Coder
from moecc.passes._code.coding import encode
from moecc.passes._code.feedback import choose
from moecc.passes._code.metric import weighted_error
from moecc.passes._code.sums import sums_by_code
from moecc.passes._code.sweep import sweep

if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from moecc.passes._code import triton_coder

CUDA = torch.device("cuda")
SHAPES = {
    "tiles": dict(experts=3, rows=37, columns=136),
    "short": dict(experts=2, rows=5, columns=8),
    "wide": dict(experts=2, rows=100, columns=1000),
}


def on_gpu(c: Coder) -> Coder:
    output = None if c.output is None else c.output.to(CUDA)
    sizes = (c.target, c.moment, c.importance)
    target, moment, importance = (t.to(CUDA) for t in sizes)
    return Coder(target, moment, importance, c.bits, c.feedback, output)


def chosen(c: Coder, table: Tensor, scale: Tensor) -> tuple[Coded, Coded]:
    start = choose(c, table, scale)
    return start, sweep(c, start)


def given(bits: int, shape: str, *, coupled: bool) -> tuple[Coder, Tensor, Tensor]:
    told = SHAPES[shape]
    output = None
    if coupled:
        x = torch.randn(told["experts"], told["rows"], 3 * told["rows"])
        output = (x @ x.mT / x.shape[-1]).unsqueeze(1)
    c = coder(bits, output=output, **told)
    return on_gpu(c), codebooks(bits, books=told["experts"]).to(CUDA), scales(c).to(CUDA)


def same(a: Coded, b: Coded) -> bool:
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coupled", [False, True])
def test_kernels_choose_the_codes_of_pytorch(
    bits: int, shape: str, coupled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten times the same, in any tile; PyTorch's but for what rounding decides."""
    c, table, scale = given(bits, shape, coupled=coupled)
    assert triton_coder.serves(c.target)
    got = chosen(c, table, scale)
    for _ in range(10):
        assert all(map(same, got, chosen(c, table, scale)))
    monkeypatch.setattr(triton_coder, "NVIDIA", triton_coder.AMD)
    monkeypatch.setattr(triton_coder, "AMD", triton_coder.NVIDIA)
    other = chosen(c, table, scale)
    monkeypatch.setenv("MOECC_NATIVE", "0")
    assert not triton_coder.serves(c.target)
    for a, b, want in zip(got, other, chosen(c, table, scale), strict=True):
        assert (a.codes != b.codes).float().mean() < 0.005
        assert (a.codes != want.codes).float().mean() < 0.02
        assert (a.dense() - want.dense()).abs().mean() < 5e-3 * want.dense().abs().mean()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("coupled", [False, True])
def test_coding_on_a_gpu_is_the_same_each_time_and_as_good_as_on_the_cpu(
    bits: int, shared: bool, coupled: bool
) -> None:
    weight, moment = drawn(bits, rows=64, columns=136)
    output = costs(1.0) if coupled else None
    options = dict(bits=bits, shared=shared, seed=3, rounds=4)
    there = [t if t is None else t.to(CUDA) for t in (weight, moment, output)]
    first, again = (encode(*there, **options) for _ in range(2))
    assert same(first, again)
    lost = [
        float(weighted_error(dense - weight, moment, output).sum())
        for dense in (first.dense().cpu(), encode(weight, moment, output, **options).dense())
    ]
    assert lost[0] == pytest.approx(lost[1], rel=0.01)


@pytest.mark.parametrize("books", [1, 3])
def test_sums_by_code_are_the_same_each_time(books: int) -> None:
    g = torch.Generator().manual_seed(2)
    codes = torch.randint(256, (3, 512, 700), generator=g)  # two parts of each expert
    values = torch.randn(3, 512, 700, 4, generator=g)
    want = sums_by_code(codes, books)(values)
    found = [sums_by_code(codes.to(CUDA), books)(values.to(CUDA)) for _ in range(3)]
    assert all(torch.equal(f, found[0]) for f in found)
    torch.testing.assert_close(found[0].cpu(), want, rtol=1e-3, atol=1e-3)

"""The kernels of coding, in triton's interpreter: the codes that PyTorch chooses, for any tile.

    TRITON_INTERPRET=1 pytest -m interp tests/test_triton_coder.py

tests/test_triton_aot.py compiles them for cards, tests/test_triton_coder_gpu.py runs them on one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from coders import BITS, codebooks, coder, scales
from families import ALL
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.interp
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

pytest.importorskip("triton")
from moecc.passes._code import native, triton_coder  # noqa: E402
from moecc.passes._code.coded import Coded  # noqa: E402
from moecc.passes._code.feedback import choose  # noqa: E402
from moecc.passes._code.sweep import sweep  # noqa: E402
from moecc.passes._code.triton_coder import Tile  # noqa: E402

SMALL, LARGE = Tile(rows=4, step=64), Tile(rows=16, step=256)
Chosen = tuple[Coded, Coded]  # by error feedback, and after a sweep


@pytest.fixture(autouse=True)
def _without_compiled_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "compiled", lambda: None)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tile], None]:
    """kernels(tile): code with the kernels from now on."""

    def use(tile: Tile) -> None:
        monkeypatch.setattr(triton_coder, "NVIDIA", tile)
        monkeypatch.setattr(triton_coder, "serves", lambda _: True)

    return use


def chosen(
    bits: int, *, coupled: bool = False, books: int = 1, table: Tensor | None = None, **shape: int
) -> Chosen:
    output = None
    if coupled:
        experts, rows = shape["experts"], shape["rows"]
        x = torch.randn(experts, rows, 3 * rows, generator=torch.Generator().manual_seed(5))
        output = (x @ x.mT / (3 * rows)).unsqueeze(1)
    c = coder(bits, output=output, **shape)
    table = codebooks(bits, books=books) if table is None else table
    start = choose(c, table, scales(c))
    return start, sweep(c, start)


def same(a: Coded, b: Coded) -> bool:
    pairs = (a.codes, b.codes), (a.negative, b.negative)
    return all((x is None) == (y is None) for x, y in pairs) and all(
        torch.equal(x, y) for x, y in pairs if x is not None and y is not None
    )


CASES = {
    "tiles": (LARGE, dict(experts=2, rows=21, columns=16)),
    "one block of rows": (LARGE, dict(experts=2, rows=5, columns=8, coupled=True)),
    "blocks of rows": (LARGE, dict(experts=2, rows=19, columns=8, coupled=True, books=2)),
    "books": (SMALL, dict(experts=2, rows=3, columns=8, books=2)),
    "blocks of columns": (LARGE, dict(experts=1, rows=3, columns=136)),
}
if ALL:
    CASES["wide"] = LARGE, dict(experts=1, rows=5, columns=1000)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", CASES)
def test_kernels_choose_the_codes_of_pytorch(
    bits: int, case: str, kernels: Callable[[Tile], None]
) -> None:
    """Of rows that no tile divides; rounding decides between very few of them."""
    if case == "blocks of columns" and bits != 3 and not ALL:
        pytest.skip("in `make test-all`")
    tile, told = CASES[case]
    wanted = chosen(bits, **told)
    kernels(tile)
    for got, want in zip(chosen(bits, **told), wanted, strict=True):
        assert (got.codes != want.codes).float().mean() < 0.005
        difference = (got.dense() - want.dense()).abs().mean()
        assert difference < 1e-3 * want.dense().abs().mean()


@pytest.mark.parametrize("bits", [2, 3])
def test_a_code_is_the_same_in_any_tile(bits: int, kernels: Callable[[Tile], None]) -> None:
    shape = dict(experts=1, rows=7, columns=16)
    kernels(SMALL)
    small = chosen(bits, **shape)
    kernels(LARGE)
    assert all(map(same, small, chosen(bits, **shape)))


def test_of_equal_centroids_the_first_is_taken(kernels: Callable[[Tile], None]) -> None:
    """They lie 8 apart, in one step of the search and in others."""
    table = codebooks(2, books=1)[:, :8].repeat(1, 32, 1)
    kernels(SMALL)
    for found in chosen(2, experts=1, rows=3, columns=8, table=table):
        assert int(found.codes.max()) < 8


def test_numbers_that_are_none_give_some_code(kernels: Callable[[Tile], None]) -> None:
    c = coder(2, experts=1, rows=6, columns=8)
    c.target[:, 1] = torch.nan
    kernels(LARGE)
    found = choose(c, codebooks(2, books=1), scales(c))
    assert int(found.codes.min()) >= 0 and int(found.codes.max()) < 256
    c.target[:, 1] = 0
    wanted = choose(c, codebooks(2, books=1), scales(c))
    others = [0, 2, 3, 4, 5]
    assert torch.equal(found.codes[:, others], wanted.codes[:, others])


def test_a_block_of_columns_takes_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel, and a product for the columns behind; the last of three blocks has none."""
    c = coder(2, experts=3, rows=5, columns=264)
    table, scale = codebooks(2, books=1), scales(c)
    state, launched, counted = choose(c, table, scale), [], Counted()
    monkeypatch.setattr(triton_coder, "serves", lambda _: True)
    monkeypatch.setattr(triton_coder, "_run", lambda launch: launched.append(launch.name))
    with counted:
        choose(c, table, scale)
    assert launched == ["choose"] * 3 and counted.products == 2
    launched.clear()
    sweep(c, state)
    assert launched == ["sweep"] * 3


class Counted(TorchDispatchMode):
    """Counts batched products that are added to something."""

    products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.products += func is torch.ops.aten.baddbmm_.default
        return func(*args, **(kwargs or {}))

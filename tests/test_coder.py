"""The compiled loops of coding: the same codes as PyTorch's, for any rows, threads and CPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from coders import BITS, codebooks, coder, scales
from torch import Tensor

from moecc.errors import MoeccError
from moecc.native.build import COMPILERS, FLAGS, compiler
from moecc.passes._code import native
from moecc.passes._code.coded import Coded
from moecc.passes._code.feedback import choose
from moecc.passes._code.machinery import coding_by
from moecc.passes._code.sweep import sweep

pytestmark = pytest.mark.skipif(
    not os.environ.get("CXX") and not any(map(shutil.which, COMPILERS)), reason="no C++ compiler"
)


def both(bits: int, *, coupled: bool = False, **shape: int) -> tuple[Coded, Coded]:
    """Return a choice of codes, and the state after a sweep."""
    output = None
    if coupled:
        experts, rows = shape["experts"], shape["rows"]
        x = torch.randn(experts, rows, 3 * rows, generator=torch.Generator().manual_seed(5))
        output = (x @ x.mT / (3 * rows)).unsqueeze(1)
    c = coder(bits, output=output, **shape)
    start = choose(c, codebooks(bits, books=shape["experts"]), scales(c))
    return start, sweep(c, start)


def same(a: Coded, b: Coded) -> bool:
    signs = [x.negative for x in (a, b) if x.negative is not None]
    return torch.equal(a.codes, b.codes) and (not signs or torch.equal(*signs))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("coupled", [False, True])
def test_compiled_loops_choose_the_codes_of_pytorch_s(
    bits: int, coupled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2 x 37 rows and two blocks of columns; rounding decides between very few of them."""
    shape = {"experts": 2, "rows": 37, "columns": 136}
    found = both(bits, coupled=coupled, **shape)
    monkeypatch.setattr(native, "compiled", lambda: None)
    for a, b in zip(found, both(bits, coupled=coupled, **shape), strict=True):
        assert (a.codes != b.codes).float().mean() < 0.002
        assert (a.dense() - b.dense()).abs().mean() < 1e-3 * b.dense().abs().mean()


def test_codes_do_not_depend_on_threads_or_on_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"experts": 1, "rows": 41, "columns": 136}
    one = both(3, **shape)
    monkeypatch.setattr(native, "_LEAST_ROWS", 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert all(map(same, one, both(3, **shape)))


@pytest.mark.parametrize("bits", BITS)
def test_every_instruction_set_chooses_the_same_codes(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vector's width decides how a sum is grouped in no row: only fused products may differ."""
    shape = {"experts": 1, "rows": 9, "columns": 72}
    want = both(bits, **shape)
    source = native.CODER.folder
    made = tmp_path / "scalar.so"
    (tmp_path / "one.cc").write_text(
        '#include "coder_scalar.cc"\n'
        'extern "C" __attribute__((visibility("default"))) const MoeccCoder* moecc_coder() '
        "{ return &moecc::SCALAR_CODER; }\n"
    )
    line = [*compiler(), *FLAGS, "-Werror", f"-I{source}", "-shared", str(tmp_path / "one.cc")]
    subprocess.run([*line, "-o", str(made)], check=True)
    library = ctypes.CDLL(str(made))
    library.moecc_coder.restype = ctypes.POINTER(native._Coder)
    scalar = library.moecc_coder().contents
    assert scalar.name == b"scalar"
    monkeypatch.setattr(native, "compiled", lambda: scalar)
    for a, b in zip(want, both(bits, **shape), strict=True):
        assert (a.codes != b.codes).float().mean() < 0.005


def test_the_loops_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECC_NATIVE", "0")
    native.compiled.cache_clear()
    try:
        assert native.compiled() is None and not native.serves(torch.ones(1))
    finally:
        native.compiled.cache_clear()


def test_a_compiler_that_fails_is_said_with_the_way_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECC_CACHE", str(tmp_path))
    (tmp_path / "cxx").write_text('#!/bin/sh\n[ "$1" = --version ] || exit 1\n')
    (tmp_path / "cxx").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
    native.compiled.cache_clear()
    said = r"can't compile the coder: exit code 1; set CXX .*, or MOECC_NATIVE=0 to do without it"
    try:
        with pytest.raises(MoeccError, match=said):
            coding_by(torch.device("cpu"))
    finally:
        native.compiled.cache_clear()


def nan_rows(x: Tensor) -> Tensor:
    return x.index_fill(1, torch.tensor([1]), torch.nan)


def test_numbers_that_are_none_give_some_code_and_no_crash() -> None:
    c = coder(2, experts=1, rows=6, columns=16)
    c.target = nan_rows(c.target)
    found = choose(c, codebooks(2, books=1), scales(c))
    assert int(found.codes.min()) >= 0 and int(found.codes.max()) < 256

"""The inner loops of coding and tuning, compiled: `native/coder.h` and `native/lookup.h`.

Without a compiler PyTorch does the same. A block of columns of some rows of one expert is coded by
one call. Rows do not depend on each other, so threads share them and codes are the same for any
number of threads.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, c_char_p, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from moecc.errors import MoeccError, reason
from moecc.native.build import Library, found_compiler
from moecc.passes._code.codebooks import Tables

_LEAST_ROWS = 64  # of a thread


class _Search(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("group", "patterns", "image_stride")),
        *((name, c_void_p) for name in ("inner", "metric", "image", "base", "table")),
    )


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("rows", "columns")),
        *(("pull", c_void_p), ("pull_stride", c_int64)),
        *(("dense", c_void_p), ("dense_stride", c_int64)),
        *(("carry", c_void_p), ("carry_stride", c_int64)),
        *(("inverse", c_void_p), ("moved", c_void_p)),
        *(("codes", c_void_p), ("codes_stride", c_int64)),
        *(("negative", c_void_p), ("negative_stride", c_int64)),
    )


class Rows(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("rows", "columns", "group")),
        *(("codes", c_void_p), ("codes_stride", c_int64)),
        *(("signs", c_void_p), ("signs_stride", c_int64)),
        *((name, c_void_p) for name in ("book", "scale", "dense", "book_grad", "scale_grad")),
    )


_STEP = ctypes.CFUNCTYPE(None, POINTER(_Search), POINTER(_Block))
_LOOKUP = ctypes.CFUNCTYPE(None, POINTER(Rows))


class _Coder(ctypes.Structure):
    _fields_ = (
        *(("name", c_char_p), ("choose", _STEP), ("sweep", _STEP)),
        *(("decode", _LOOKUP), ("pull", _LOOKUP)),
    )


CODER = Library(
    "moecc_coder",
    "the coder",
    Path(__file__).with_name("native"),
    {
        "x86_64": {
            "coder_avx2.cc": ("-mavx2", "-mfma"),
            "coder_avx512.cc": ("-mavx512f", "-mfma"),
        },
        "aarch64": {"coder_neon.cc": ()},
    },
)


@cache
def compiled() -> _Coder | None:
    """Return the loops for this CPU, compiled once per machine.

    None if $MOECC_NATIVE is 0, or if there is no compiler. Raise MoeccError if one fails.
    """
    if os.environ.get("MOECC_NATIVE") == "0" or not found_compiler():
        return None
    try:
        library = ctypes.CDLL(str(CODER.path()))
    except (MoeccError, OSError) as error:
        raise MoeccError(f"{reason(error)}, or MOECC_NATIVE=0 to do without it") from error
    library.moecc_coder.restype = POINTER(_Coder)
    coder: _Coder = library.moecc_coder().contents
    return coder


def loops() -> _Coder:
    """Return the loops where `serves` says that they are there."""
    found = compiled()
    assert found is not None
    return found


def serves(x: Tensor) -> bool:
    """Return whether the compiled loops can work on `x`."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and compiled() is not None


def choose(
    tables: Tables, expert: int, block: slice, rest: Tensor, upper: Tensor, out: Out
) -> None:
    """Choose codes for the columns `block`, and carry each error over within them.

    rest: the weights that are left, [n, K]; changed. upper: U of the expert, [K, K].
    """
    _run("choose", tables, expert, block, pull=rest, carry=upper, out=out)


def sweep(
    tables: Tables,
    expert: int,
    block: slice,
    pull: Tensor,
    dense: Tensor,
    moment: Tensor,
    inverses: Tensor,
    out: Out,
) -> None:
    """Choose codes again for the columns `block`, each with all others fixed.

    pull: (W - Q) H, [n, K]; changed. dense: Q, [n, K]; changed. moment: H of the expert, [K, K].
    inverses: of H's blocks, [G, v, v].
    """
    _run("sweep", tables, expert, block, pull, moment, out, dense=dense, inverse=inverses)


@dataclass(frozen=True)
class Out:
    """Where one expert's codes go."""

    codes: Tensor  # int64 [n, G]
    negative: Tensor | None  # bool [n, K]
    moved: Tensor  # [n, b]: what later columns have to follow


def _run(
    name: str,
    tables: Tables,
    expert: int,
    block: slice,
    pull: Tensor,
    carry: Tensor,
    out: Out,
    dense: Tensor | None = None,
    inverse: Tensor | None = None,
) -> None:
    v = tables.table.shape[-1]
    first, columns = block.start // v, slice(block.start, block.stop)
    search = _Search(
        v,
        tables.base.shape[2],
        tables.image[0, 0].numel() if tables.image.shape[1] > 1 else 0,
        *(at(t[expert, first]) for t in (tables.inner, tables.metric)),
        at(tables.image[expert, first if tables.image.shape[1] > 1 else 0]),
        at(tables.base[expert, first]),
        at(tables.table[expert]),
    )
    step = getattr(compiled(), name)
    width = block.stop - block.start
    carried = carry[columns, columns]

    def part(rows: slice) -> None:
        block_of = _Block(
            rows.stop - rows.start,
            width,
            *strided(pull[rows, columns]),
            *strided(None if dense is None else dense[rows, columns]),
            *strided(carried),
            None if inverse is None else at(inverse[first]),
            at(out.moved[rows]),
            *strided(out.codes[rows, first:]),
            *strided(None if out.negative is None else out.negative[rows, columns]),
        )
        step(ctypes.byref(search), ctypes.byref(block_of))

    threaded(part, len(pull))


def threaded(part: Callable[[slice], None], rows: int, least: int = _LEAST_ROWS) -> None:
    """Call `part` for all rows, in as many threads as PyTorch has. least: rows of a thread."""
    count = max(1, min(torch.get_num_threads(), rows // least))
    step = -(-rows // count)
    parts = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
    if len(parts) == 1:
        part(parts[0])
        return
    list(_threads(count).map(part, parts))


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Threads that wait for work: to start one takes longer than many a part."""
    return ThreadPoolExecutor(count, "moecc")


def at(tensor: Tensor) -> int:
    return tensor.data_ptr()


def strided(tensor: Tensor | None) -> tuple[int | None, int]:
    """Where a matrix begins and the distance of its rows."""
    if tensor is None:
        return None, 0
    assert tensor.stride(-1) == 1
    return tensor.data_ptr(), tensor.stride(0)

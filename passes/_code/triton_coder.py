"""The inner loops of coding on a GPU: what `native` does on a CPU, for all experts at once.

A block of columns takes two launches: `triton_kernels.code_kernel`, and one product that carries
the block's changes over to all columns behind. Without triton PyTorch does the same.

Shapes: E experts, n rows, K columns, v weights per code, G = K/v groups.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from moecc.ir import vq4
from moecc.passes._code.codebooks import Tables
from moecc.passes._code.coded import Coded

Argument: TypeAlias = Tensor | int | None

_COLUMNS = 128  # of a block, at most


class Tile(NamedTuple):
    """The shape of a program, which is one warp. It decides on the time, and on no code."""

    rows: int  # of one expert
    step: int  # centroids that are compared at once


NVIDIA, AMD = Tile(8, 128), Tile(4, 256)  # they spill no register (tests/test_triton_aot.py)


class Launch(NamedTuple):
    """One kernel with its grid, its arguments by name and triton's options."""

    name: str
    kernel: Any  # what triton.jit returns; triton has no types for it
    grid: tuple[int, int]
    arguments: dict[str, Argument]
    options: dict[str, int]

    def __call__(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)


def wanted_on(device: torch.device) -> bool:
    """Return whether the kernels are those for a device; none are if $MOECC_NATIVE is 0."""
    return device.type == "cuda" and os.environ.get("MOECC_NATIVE") != "0"


def runs_on(device: torch.device) -> bool:
    """Return whether the kernels are those for a device, and triton is there."""
    return wanted_on(device) and importlib.util.find_spec("triton") is not None


def serves(x: Tensor) -> bool:
    """Return whether the kernels can work on `x`."""
    return x.dtype == torch.float32 and runs_on(x.device)


def choose(tables: Tables, block: slice, rest: Tensor, upper: Tensor, found: Coded) -> None:
    """Choose codes for the columns `block`, and carry each error over to all later ones.

    rest: the weights that are left, [E, n, K]; changed. upper: U, [E, K, K].
    """
    moved = torch.empty_like(rest[:, :, block])
    _run(planned(tables, block, rest, upper, found, moved))
    _carry_behind(block, rest, upper, moved)


def sweep(
    tables: Tables,
    block: slice,
    pull: Tensor,
    dense: Tensor,
    moment: Tensor,
    inverses: Tensor,
    found: Coded,
    moved: Tensor,
) -> None:
    """Choose codes again for the columns `block`, each with all others fixed.

    pull: (W - Q) H, [E, n, K]; changed. dense: Q, [E, n, K]. moment: H, [E, K, K]. inverses: of
    H's blocks, [E, G, v, v]. moved: by how much Q changes, [E, n, K]; written in `block`.
    """
    part = moved[:, :, block]
    _run(planned(tables, block, pull, moment, found, part, (dense, inverses)))
    _carry_behind(block, pull, moment, part)


def planned(
    tables: Tables,
    block: slice,
    pull: Tensor,
    carry: Tensor,
    found: Coded,
    moved: Tensor,
    swept: tuple[Tensor, Tensor] | None = None,
    tile: Tile | None = None,
) -> Launch:
    """Return the launch that codes `block`; the tensors may be on the meta device.

    moved: [E, n, b], of this block alone. swept: `dense` and `inverses` of a sweep.
    """
    from moecc.passes._code.triton_kernels import code_kernel

    experts, rows, _ = pull.shape
    tile = tile or (AMD if torch.version.hip else NVIDIA)
    v = tables.table.shape[-1]
    first, signs = block.start // v, found.negative
    dense, inverses = swept or (None, None)
    arguments: dict[str, Argument] = {f"{name}_ptr": t for name, t in vars(tables).items()}
    arguments |= {"inverse_ptr": inverses, "first": first, "groups": tables.metric.shape[1]}
    arguments |= {"rows": rows, "width": block.stop - block.start}
    for name, part in {
        "pull": pull[:, :, block],
        "dense": None if dense is None else dense[:, :, block],
        "carry": carry[:, block, block],
        "moved": moved,
        "codes": found.codes[:, :, first:],
        "negative": None if signs is None else signs.view(torch.uint8)[:, :, block],
    }.items():
        assert part is None or part.stride(2) == 1
        expert, row, _ = (0, 0, 1) if part is None else part.stride()
        arguments |= {f"{name}_ptr": part, f"{name}_expert": expert, f"{name}_row": row}
    arguments |= {"SWEEP": swept is not None, "SIGNED": signs is not None, "V": v}
    arguments |= {"ROWS": tile.rows, "STEP": tile.step, "COLUMNS": _COLUMNS}
    grid = -(-rows // tile.rows), experts
    name = "choose" if swept is None else "sweep"
    return Launch(name, code_kernel, grid, arguments, {"num_warps": 1})


def abstract(name: str, bits: int, tile: Tile, columns: int = 2048) -> Launch:
    """Return a launch without data, for compiling ahead of time."""

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(8, *size, dtype=dtype, device="meta")

    v, rows, signed = vq4.group_size(bits), 768, bits == 3
    weights, square, groups = empty(rows, columns), empty(columns, columns), columns // v
    blocks, table = empty(groups, v, v), empty(256, v)
    base = empty(groups, 2**v if signed else 1, 256)
    tables = Tables(blocks, blocks, empty(1 if signed else groups, v, 256), base, table)
    codes, signs = empty(rows, groups, dtype=torch.int64), empty(rows, columns, dtype=torch.bool)
    found = Coded(codes, signs if signed else None, table, empty(rows))
    swept = (weights, blocks) if name == "sweep" else None
    block = slice(_COLUMNS, 2 * _COLUMNS)
    return planned(tables, block, weights, square, found, empty(rows, _COLUMNS), swept, tile)


def _run(launch: Launch) -> None:
    with torch.cuda.device_of(launch.arguments["pull_ptr"]):  # triton launches on the current one
        launch()


def _carry_behind(block: slice, rest: Tensor, carry: Tensor, moved: Tensor) -> None:
    """Let the columns behind `block` follow what has moved in it, [E, n, b]."""
    if block.stop < rest.shape[-1]:
        behind = carry[:, block, block.stop :]
        rest[:, :, block.stop :].baddbmm_(moved, behind, alpha=-1)

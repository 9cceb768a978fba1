"""The products of a layer as launches: experts, shared means, and coefficients of a basis.

Shapes: S slots, E experts, R rows of x, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecc.backends.triton.call import INTERPRETED, Call
from moecc.backends.triton.grouped import grouped_kernel
from moecc.backends.triton.pack import COLUMNS, ROWS, Projection, tiles
from moecc.backends.triton.parts import NO_LOW_RANK, Arguments, Blocks, LowRank, Matrices, Rows
from moecc.backends.triton.tiles import choose_tile
from moecc.ir import vq4

assert ROWS == 64 and COLUMNS == 128  # the kernels assume it


def product(
    call: Call,
    name: str,
    m: Matrices,
    x: Rows,
    blocks: Blocks,
    columns: int,
    *,
    bias: Tensor | None = None,
    shared: Tensor | None = None,
    low: LowRank | None = None,
    gated: bool = False,
    fuse: bool = False,
    top_k: int = 1,
    slots: int | None = None,
    into: Rows | None = None,
    rounded: bool = False,
) -> Tensor:
    """Multiply x by m and return f32 [parts, slots, rows], of x's type if `rounded`.

    fuse: apply the gate and return [slots, units] if no columns are split. into: rows to fill.
    """
    slots = call.slots if slots is None else slots
    row_tiles = tiles(m.rows, gated=gated)
    groups, parts, each = _split(call, x, row_tiles, blocks)
    fused = fuse and parts == 1
    shape = (slots, m.rows // 2 if gated else m.rows) if fused else (parts, slots, m.rows)
    dtype = call.dtype if rounded else torch.float32
    out = into.values if into else x.values.new_empty(shape, dtype=dtype)
    common: Arguments = dict(
        x_ptr=x.values,
        bias_ptr=None if bias is None else bias.contiguous(),
        shared_ptr=shared,
        out_ptr=out,
        rows=m.rows,
        out_width=out.shape[-1],
        row_tiles=row_tiles,
        slots=slots,
        GATED=gated,
        FUSED=fused,
        TOP_K=top_k,
        SHARED=0 if shared is None else shared.shape[0],
        COPIES=1 if INTERPRETED else blocks.tile.copies,
    )
    common |= {**m.arguments(), **blocks.arguments(), **call.gating()}
    if blocks.tile.persistent and call.hopper:
        _persistent(call, name, groups, blocks, common)
    else:
        _grouped(call, name, m, x, blocks, (groups, parts), each, columns, low, common)
    return out


def _split(call: Call, x: Rows, row_tiles: int, blocks: Blocks) -> tuple[int, int, int]:
    """Return groups of row tiles, parts that share a group's columns, and the steps of a part."""
    groups, wanted = -(-row_tiles // blocks.tile.height), 1
    if blocks.tile.waves:
        programs = blocks.tile.waves * call.card.processors
        wanted = -(-programs // (groups * blocks.number))
    # 16 at most: the code that adds the parts up has a load for each
    each = -(-x.steps // max(1, min(wanted, x.steps, 16)))
    return groups, -(-x.steps // each), each


def _persistent(call: Call, name: str, groups: int, blocks: Blocks, common: Arguments) -> None:
    """Append the launch of sm_90's kernel for large tiles."""
    # imported here: Gluon differs between versions of triton, and other cards do without it
    from moecc.backends.triton.hopper import WARPS, persistent_kernel

    every = groups * blocks.number
    arguments = {**common, "groups": groups, "tiles": every, "STAGES": blocks.tile.stages}
    grid = (min(call.card.processors, every),)
    call.add(name, persistent_kernel, grid, arguments, warps=WARPS)


def _grouped(
    call: Call,
    name: str,
    m: Matrices,
    x: Rows,
    blocks: Blocks,
    split: tuple[int, int],
    each: int,
    columns: int,
    low: LowRank | None,
    common: Arguments,
) -> None:
    """Append the launch of `grouped_kernel`.

    split: groups of row tiles, parts of the columns. each: steps of a part.
    """
    (groups, parts), half, tile = split, x.scale is None, blocks.tile
    own: Arguments = dict(
        x_scale_ptr=x.scale,
        columns=columns,
        steps=x.steps,
        steps_per_part=each,
        UNROLL=x.unroll,
        TAIL=m.column_tiles % x.unroll != 0,
        HALF=half,
        UPCAST=INTERPRETED,
        NARROW=half and blocks.slots is not None,
    )
    call.add(
        name,
        grouped_kernel,
        (groups, blocks.number, parts),
        {**common, **own, **(low.arguments() if low else NO_LOW_RANK)},
        warps=tile.warps,
        stages=tile.stages,
        registers=tile.registers,
    )


def mean(
    call: Call, name: str, p: Projection, x: Rows, columns: int, *, gated: bool
) -> Tensor | None:
    """Multiply every row of x by the mean: f32 [parts, R, rows], or None without a mean."""
    m = Matrices.of(p, vq4.MEAN)
    if m is None:
        return None
    count, tile = x.values.shape[0], call.tile
    if x.scale is None and tile.persistent:  # the persistent kernel needs blocks sorted by expert
        tile = choose_tile(count, 1, call.card, call.dtype, wide=True)
    elif x.scale is not None and not call.forced:
        tile = choose_tile(count, 1, call.card)
    blocks = Blocks(tile, -(-count // tile.tokens))
    return product(call, name, m, x, blocks, columns, gated=gated, slots=count)


def coefficients(call: Call, p: Projection, h: Rows, blocks: Blocks, units: int) -> Tensor | None:
    """Return coef_e h of every slot, f32 [parts, S, r], or None without coefficients."""
    coef, scale = p.get("coef"), p.get("coef_scale")
    if coef is None or scale is None:
        return None
    m = Matrices(8, coef.contiguous(), None, None, scale.contiguous())
    blocks = blocks._replace(tile=blocks.tile._replace(height=1, warps=4))  # r rows are few
    return product(call, "down coef", m, h, blocks, units)

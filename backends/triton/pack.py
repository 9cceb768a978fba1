"""The order of codes and signs on a GPU: what `moecc.ir.vq4` stores, permuted and padded, and back.

A tile is 64 packed rows of 128 columns. Its words are in the order in which the threads of a
tensor-core instruction take the left operand (PTX ISA, mma.m16n8k32, the fragment of A): a warp has
sixteen rows, and its thread r * 4 + t holds, of its rows r and r + 8, columns 4t..4t+3 of every
sixteen. A codebook entry is four int8 in one register, so the looked-up register already is a
fragment of the product, and each thread's codes are 16 neighbouring bytes.

  words i32 [E, N/64, planes, K/128, 512]
      word ((w * 8 + r) * 4 + t) * 4 + i * 2 + h, byte b
      = code of row 16w + 8i + r, columns 4g..4g+3 with g = 4 (4h + b) + t
  signs i32 [E, N/64, K/128, 256]
      word ((w * 8 + r) * 4 + t) * 2 + i, byte b, bit c
      = sign of row 16w + 8i + r, column 4 (4c + t) + b

At 2 and 3 bit, planes is 1. At 4 bit a code is two weights: plane 0 has the even codes (columns 4g
and 4g+1), plane 1 the odd ones (4g+2 and 4g+3). With a gate, rows alternate by eights, gate rows
first: the thread that holds gate row r also holds its up row r + 8 and can apply the gate. Scales,
biases and codebooks stay as stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moecc.ir import vq4

ROWS, COLUMNS = 64, 128  # of a tile
_GROUPS = COLUMNS // 4


Projection = Mapping[str, Tensor | None]  # tensors of one projection, named as in vq4.TENSORS


def pack_projection(p: Projection, *, gated: bool) -> dict[str, Tensor | None]:
    """Return the tensors with codes and signs, also those of a mean, in the order of tiles."""
    packed = dict(p)
    for prefix in ("", vq4.MEAN):
        codes, signs, codebook = (p.get(prefix + name) for name in ("codes", "signs", "codebook"))
        if codes is not None and codebook is not None:
            packed[prefix + "codes"] = pack_codes(codes, codebook.shape[2], gated=gated)
            packed[prefix + "signs"] = None if signs is None else pack_signs(signs, gated=gated)
    return packed


def unpack_projection(p: Projection, columns: int, *, gated: bool) -> dict[str, Tensor | None]:
    """Invert `pack_projection` for a projection of `columns` columns."""
    stored, wide = dict(p), vq4.padded(columns)
    for prefix in ("", vq4.MEAN):
        codes, signs, codebook, scale = (p.get(prefix + name) for name in vq4.CODED)
        if codes is not None and codebook is not None and scale is not None:
            rows, group = scale.shape[1], codebook.shape[2]
            stored[prefix + "codes"] = unpack_codes(codes, group, rows, wide // group, gated=gated)
            stored[prefix + "signs"] = (
                None if signs is None else unpack_signs(signs, rows, wide // 8, gated=gated)
            )
    return stored


def packed_rows(rows: int, *, gated: bool, device: torch.device | None = None) -> Tensor:
    """Return the stored row of every packed row, i64 [multiple of 64]; `rows` means padding."""
    units = rows // 2 if gated else rows
    p = torch.arange(tiles(rows, gated=gated) * ROWS, device=device)
    if not gated:
        return p.clamp(max=rows)
    unit, up = p // 16 * 8 + p % 8, p // 8 % 2
    return torch.where(unit < units, unit + up * units, rows)


def _places(rows: int, *, gated: bool, device: torch.device) -> Tensor:
    """Return the packed row of every stored row, i64 [rows]."""
    return packed_rows(rows, gated=gated, device=device).argsort()[:rows]  # padding comes last


def tiles(rows: int, *, gated: bool) -> int:
    """Return the number of row tiles, each of 32 units with a gate and an up row, or of 64 rows."""
    return -(-(rows // 2) // (ROWS // 2)) if gated else -(-rows // ROWS)


def pack_codes(codes: Tensor, group: int, *, gated: bool) -> Tensor:
    """Pack codes u8 [E, N, Kp/v], v = `group`, to words i32 [E, N/64, 4/v, K/128, 512]."""
    experts, rows, width = codes.shape
    order = packed_rows(rows, gated=gated, device=codes.device)
    planes, across = 4 // group, -(-width * group // COLUMNS)
    words = torch.empty(
        (experts, len(order) // ROWS, planes, across, 4 * ROWS * _GROUPS // 16),
        dtype=torch.int32,
        device=codes.device,
    )
    # one expert at a time: the intermediate tensor is as large as its codes
    for expert, out in zip(codes, words, strict=True):
        wide = _padded(expert, order, across * COLUMNS // group)
        for plane in range(planes):
            out[:, plane] = _fragments(wide[:, plane::planes])
    return words


def unpack_codes(words: Tensor, group: int, rows: int, width: int, *, gated: bool) -> Tensor:
    """Invert `pack_codes`: return codes u8 [E, rows, width]."""
    experts, down, planes, across, _ = words.shape
    places = _places(rows, gated=gated, device=words.device)
    codes = torch.empty((experts, rows, width), dtype=torch.uint8, device=words.device)
    wide = torch.empty(
        (down * ROWS, across * COLUMNS // group), dtype=torch.uint8, device=words.device
    )
    for packed, out in zip(words, codes, strict=True):
        for plane in range(planes):
            wide[:, plane::planes] = _from_fragments(packed[:, plane])
        out.copy_(wide.index_select(0, places)[:, :width])
    return codes


def pack_signs(signs: Tensor, *, gated: bool) -> Tensor:
    """Pack signs u8 [E, N, Kp/8] to words i32 [E, N/64, K/128, 256]."""
    experts, rows, width = signs.shape
    order = packed_rows(rows, gated=gated, device=signs.device)
    across = -(-width * 8 // COLUMNS)
    shape = (experts, len(order) // ROWS, across, ROWS * COLUMNS // 32)
    words = torch.empty(shape, dtype=torch.int32, device=signs.device)
    for expert, out in zip(signs, words, strict=True):
        negative = vq4.unpack_signs(_padded(expert, order, across * COLUMNS // 8))
        # row tile, w, i, r, column tile, c, t, b
        parts = negative.view(-1, 4, 2, 8, across, 8, 4, 4)
        eights = parts.permute(0, 4, 1, 3, 6, 2, 7, 5).flatten()
        out.copy_(vq4.pack_signs(eights).view(torch.int32).view(out.shape))
    return words


def unpack_signs(words: Tensor, rows: int, width: int, *, gated: bool) -> Tensor:
    """Invert `pack_signs`: return signs u8 [E, rows, width]."""
    experts, down, across, _ = words.shape
    places = _places(rows, gated=gated, device=words.device)
    signs = torch.empty((experts, rows, width), dtype=torch.uint8, device=words.device)
    for packed, out in zip(words, signs, strict=True):
        eights = vq4.unpack_signs(packed.contiguous().view(torch.uint8).flatten())
        # row tile, column tile, w, r, t, i, b, c
        parts = eights.view(-1, across, 4, 8, 4, 2, 4, 8)
        wide = vq4.pack_signs(parts.permute(0, 2, 5, 3, 1, 7, 4, 6).reshape(down * ROWS, -1))
        out.copy_(wide.index_select(0, places)[:, :width])
    return signs


def _padded(expert: Tensor, order: Tensor, width: int) -> Tensor:
    """Reorder u8 [rows, any] to [packed rows, width], padded with zeros."""
    wide = expert.new_zeros((expert.shape[0] + 1, width))
    wide[:-1, : expert.shape[1]] = expert
    return wide.index_select(0, order)


def _fragments(codes: Tensor) -> Tensor:
    """Reorder u8 [row tiles * 64, column tiles * 32] to i32 [row tiles, column tiles, 512]."""
    across = codes.shape[1] // _GROUPS
    parts = codes.reshape(-1, 4, 2, 8, across, 2, 4, 4)  # row tile, w, i, r, column tile, h, b, t
    words = parts.permute(0, 4, 1, 3, 7, 2, 5, 6).contiguous().flatten().view(torch.int32)
    return words.view(-1, across, 512)


def _from_fragments(words: Tensor) -> Tensor:
    """Invert `_fragments`."""
    across = words.shape[1]
    # row tile, column tile, w, r, t, i, h, b
    parts = words.contiguous().view(torch.uint8).view(-1, across, 4, 8, 4, 2, 2, 4)
    return parts.permute(0, 2, 5, 3, 1, 6, 7, 4).reshape(-1, across * _GROUPS)

"""The order of codes in an ONNX file: the kernels' order, so that the file stays memory-mapped.

64 columns of 64 rows are one block. Kp and Np are columns K and rows N rounded up to 64, K' is K
rounded up to 8, v the weights per code, S = 64 / v:

  codes  u8 [E, N, K'/v] -> u8 [E, Kp/64, Np/64, S, 64]
         one byte a row, then the next group of v columns
  signs  u8 [E, N, K'/8] -> u8 [E, Kp/64, Np/64, 16, 32]
         four bits a row, one for each column of a group, then the next four columns; byte i has
         row i in its low bits and row i + 32 in its high bits

On the left is what an artifact stores (`moecc.ir.vq4`). Padding is zero: columns beyond K meet
inputs of zero, rows beyond N are cut off.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64


def blocks(n: int) -> int:
    """Return the number of blocks that hold n rows or columns."""
    return -(-n // BLOCK)


def blocked_codes(codes: Tensor, v: int) -> Tensor:
    """Reorder u8 [E, N, G] to [E, Kp/64, Np/64, 64/v, 64]."""
    return _blocked(codes, BLOCK // v)


def blocked_signs(signs: Tensor) -> Tensor:
    """Reorder u8 [E, N, K'/8] to [E, Kp/64, Np/64, 16, 32]."""
    fours = torch.stack((signs & 15, signs >> 4), -1).flatten(-2)  # [E, N, K'/4]
    blocked = _blocked(fours, BLOCK // 4)
    low, high = blocked.chunk(2, dim=-1)
    return low | (high << 4)


def _blocked(x: Tensor, columns: int) -> Tensor:
    """Reorder [E, N, G] to [E, G/columns, N/64, columns, 64], zero-padded to whole blocks."""
    experts, rows, groups = x.shape
    across = -(-groups // columns)
    padded = x.new_zeros(experts, blocks(rows) * BLOCK, across * columns)
    padded[:, :rows, :groups] = x
    parts = padded.view(experts, blocks(rows), BLOCK, across, columns)
    return parts.permute(0, 3, 1, 4, 2).contiguous()

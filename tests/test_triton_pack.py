"""The order of codes and signs on a GPU, against its definition read index by index."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import slow_vq4 as slow
import torch

from moecc.backends.triton import pack

SHAPES = [(2, 64, 128), (1, 6, 24), (2, 70, 136), (1, 130, 264)]  # experts, rows, padded columns


def stored_row(packed: int, rows: int, gated: bool) -> int | None:
    """With a gate, packed rows alternate by eights between gate and up rows. None for padding."""
    if not gated:
        return packed if packed < rows else None
    sixteen, inside = divmod(packed, 16)
    unit = 8 * sixteen + inside % 8
    return None if unit >= rows // 2 else unit + (rows // 2 if inside >= 8 else 0)


def slow_words(codes: np.ndarray, v: int, gated: bool) -> np.ndarray:
    """Pack u8 [E, N, C] to u8 [E, row tiles, planes, column tiles, 512, 4] by the docstring."""
    experts, rows, width = codes.shape
    down = -(-(rows // 2) // 32) if gated else -(-rows // 64)
    planes, across = 4 // v, -(-width * v // 128)
    out = np.zeros((experts, down, planes, across, 512, 4), dtype=np.uint8)
    inner = itertools.product(range(4), range(8), range(4), range(2), range(2), range(4))
    places = [(w, r, t, i, h, b) for w, r, t, i, h, b in inner]
    for e, tile, plane, column in itertools.product(
        range(experts), range(down), range(planes), range(across)
    ):
        for w, r, t, i, h, b in places:
            row = stored_row(64 * tile + 16 * w + 8 * i + r, rows, gated)
            code = (32 * column + 4 * (4 * h + b) + t) * planes + plane
            if row is not None and code < width:
                out[e, tile, plane, column, ((w * 8 + r) * 4 + t) * 4 + i * 2 + h, b] = codes[
                    e, row, code
                ]
    return out


def slow_signs(signs: np.ndarray, gated: bool) -> np.ndarray:
    """Pack u8 [E, N, Kp/8] to u8 [E, row tiles, column tiles, 256, 4]."""
    experts, rows, width = signs.shape
    down, across = (-(-(rows // 2) // 32) if gated else -(-rows // 64)), -(-width * 8 // 128)
    out = np.zeros((experts, down, across, 256, 4), dtype=np.uint8)
    places = list(itertools.product(range(4), range(8), range(4), range(2), range(4), range(8)))
    for e, tile, column in itertools.product(range(experts), range(down), range(across)):
        for w, r, t, i, b, c in places:
            row = stored_row(64 * tile + 16 * w + 8 * i + r, rows, gated)
            k = 128 * column + 4 * (4 * c + t) + b
            if row is not None and k < 8 * width:
                bit = (int(signs[e, row, k // 8]) >> (k % 8)) & 1
                out[e, tile, column, ((w * 8 + r) * 4 + t) * 2 + i, b] |= bit << c
    return out


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("v", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_packed_as_defined_and_unpacked(
    shape: tuple[int, int, int], v: int, gated: bool
) -> None:
    experts, rows, columns = shape
    codes = (slow.numbers(1, experts, rows, columns // v) % 256).astype(np.uint8)
    words = pack.pack_codes(torch.from_numpy(codes), v, gated=gated)
    assert words.dtype == torch.int32 and words.is_contiguous()
    assert np.array_equal(
        words.unsqueeze(-1).view(torch.uint8).numpy(), slow_words(codes, v, gated)
    )
    back = pack.unpack_codes(words, v, rows, columns // v, gated=gated)
    assert torch.equal(back, torch.from_numpy(codes))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_signs_are_packed_as_defined_and_unpacked(shape: tuple[int, int, int], gated: bool) -> None:
    experts, rows, columns = shape
    signs = (slow.numbers(2, experts, rows, columns // 8) % 256).astype(np.uint8)
    words = pack.pack_signs(torch.from_numpy(signs), gated=gated)
    assert np.array_equal(words.unsqueeze(-1).view(torch.uint8).numpy(), slow_signs(signs, gated))
    assert torch.equal(
        pack.unpack_signs(words, rows, columns // 8, gated=gated), torch.from_numpy(signs)
    )


def test_whole_tiles_take_no_more_bytes_than_stored_tensors() -> None:
    codes = torch.zeros(2, 128, 64, dtype=torch.uint8)
    signs = torch.zeros(2, 128, 32, dtype=torch.uint8)
    assert pack.pack_codes(codes, 4, gated=True).nbytes == codes.nbytes
    assert pack.pack_codes(codes, 2, gated=True).nbytes == codes.nbytes
    assert pack.pack_signs(signs, gated=True).nbytes == signs.nbytes

"""Weights that a checkpoint stores in 8 or 4 bits, read as bfloat16.

tensors of the checkpoint                      format
W F8_E4M3 [..., N, K] and W_scale_inv          FP8, one scale per block of rows and columns
                                               (DeepSeek-V3, Qwen3 FP8)
W I8 [..., N, K / 2] and W_scale_inv           the same for FP4 (E2M1); a byte holds two values, the
                                               first in its lower half
W_blocks U8 [E, N, K / 32, 16] and W_scales    MXFP4: FP4 with a power of two per 32 values (OCP
                                               Microscaling Formats 1.0); W is [E, K, N] (gpt-oss)

Scales are of any float type, or bytes b that stand for 2^(b - 127). bfloat16 holds every value of
MXFP4 exactly. The product of an FP8 value and its scale is rounded to bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moecc.checkpoint.reading import read_json
from moecc.errors import MoeccError, quoted

METHODS = ("fp8", "mxfp4")  # the values of quant_method that this module reads
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # codes 0 to 7; codes 8 to 15 are their negatives


class Entry(Protocol):
    """A tensor that can be read: a `moecc.checkpoint.files.TensorEntry`, or a `Decoded` one."""

    @property
    def name(self) -> str: ...
    @property
    def file(self) -> Path: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self, rows: Sequence[int] | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Decoded:
    """A tensor that a read decodes from two others: its codes and their scales."""

    name: str
    codes: Entry
    scale: Entry
    shape: tuple[int, ...]
    block: tuple[int, int] | None = None  # rows and columns that share a scale; None for MXFP4

    dtype = torch.bfloat16

    @property
    def file(self) -> Path:
        return self.codes.file

    def read(self, rows: Sequence[int] | None = None) -> Tensor:
        """Return the tensor, or the given rows of its first dimension, in bfloat16."""
        if rows is not None and len(self.shape) < 3:  # the rows of a matrix share scales
            return self.read()[list(rows)]
        codes = self.codes.read(rows)
        scale = _plain(self.scale.read(rows if self.scale.shape else None))
        if self.block is None:
            by_row = (fp4(codes) * scale[..., None]).flatten(-2)
            return by_row.transpose(-1, -2).contiguous().to(self.dtype)
        weight = codes.float() if codes.dtype in _FP8 else fp4(codes)
        if scale.dim() >= 2:
            for dim, size in zip((-2, -1), self.block, strict=True):
                scale = scale.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
        return weight.mul_(scale).to(self.dtype)


def decoded(entries: Mapping[str, Entry], block: tuple[int, int] | None) -> dict[str, Entry]:
    """Return the tensors of a checkpoint, those stored in few bits as `Decoded` ones.

    block: the block size that the configuration names. Raise MoeccError if scales don't fit their
    codes.
    """
    found: dict[str, Entry] = dict(entries)
    for name, entry in entries.items():
        scale = entries.get(f"{name}_scale_inv")
        if scale is not None and (entry.dtype in _FP8 or entry.dtype == torch.int8):
            found[name] = _in_blocks(entry, scale, block)
            del found[scale.name]
        whole, _, kind = name.rpartition("_")
        scales = entries.get(f"{whole}_scales")
        if kind == "blocks" and scales is not None and entry.dtype == scales.dtype == torch.uint8:
            found[whole] = _mxfp4(whole, entry, scales)
            del found[name], found[scales.name]
    return found


def block_size(folder: Path) -> tuple[int, int] | None:
    """Return weight_block_size from a checkpoint's config.json, or None if it has none."""
    config = read_json(folder / "config.json")
    for part in (config, config.get("text_config")):
        quantization = part.get("quantization_config") if isinstance(part, dict) else None
        size = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
        if (
            isinstance(size, list)
            and len(size) == 2
            and all(type(n) is int and n > 0 for n in size)
        ):
            return size[0], size[1]
    return None


def fp4(codes: Tensor) -> Tensor:
    """Decode two FP4 values per byte: uint8 or int8 [..., n] -> float32 [..., 2 n]."""
    values = torch.tensor([*_FP4, *(-x for x in _FP4)])
    codes = codes.view(torch.uint8)
    return torch.stack([values[(codes & 15).int()], values[(codes >> 4).int()]], -1).flatten(-2)


def _plain(scale: Tensor) -> Tensor:
    return scale.float().sub_(127).exp2_() if scale.dtype == torch.uint8 else scale.float()


def _in_blocks(codes: Entry, scale: Entry, block: tuple[int, int] | None) -> Decoded:
    pairs = 2 if codes.dtype == torch.int8 else 1
    if len(codes.shape) < 2:
        raise _no_scales(codes, scale)
    *lead, rows, columns = codes.shape
    columns *= pairs
    if math.prod(scale.shape) == 1 and not lead:
        return Decoded(codes.name, codes, scale, (rows, columns), (rows, columns))
    fits = (
        len(scale.shape) == len(codes.shape)
        and list(scale.shape[:-2]) == lead
        and min(scale.shape) > 0
    )
    grid = scale.shape[-2:] if fits else (1, 1)
    # The configuration's block size is FP8's; experts in FP4 beside it have blocks of their own.
    size = block if block and pairs == 1 else (-(-rows // grid[0]), -(-columns // grid[1]))
    if not fits or grid != (-(-rows // size[0]), -(-columns // size[1])):
        raise _no_scales(codes, scale, f" in blocks of {list(block) if block else 'one size'}")
    return Decoded(codes.name, codes, scale, (*lead, rows, columns), size)


def _mxfp4(name: str, codes: Entry, scale: Entry) -> Decoded:
    if len(codes.shape) != 4 or codes.shape[:3] != scale.shape:
        raise _no_scales(codes, scale)
    experts, rows, groups, size = codes.shape
    return Decoded(name, codes, scale, (experts, groups * size * 2, rows))


def _no_scales(codes: Entry, scale: Entry, how: str = "") -> MoeccError:
    return MoeccError(
        f"{quoted(scale.name)} in {scale.file} is {list(scale.shape)}, which are no scales of "
        f"{quoted(codes.name)} {list(codes.shape)}{how}; fetch both again"
    )

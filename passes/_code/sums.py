"""Sums over the groups of weights that have the same code, the same from run to run.

Shapes: E experts, n groups of an expert, C codebooks: E, or 1 that all experts share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from moecc.ir import vq4

Sums: TypeAlias = Callable[[Tensor], Tensor]
_TOGETHER = 1 << 18  # groups of an expert whose numbers are added up one after the other


def sums_by_code(codes: Tensor, books: int) -> Sums:
    """Return what adds up numbers of groups: [E, .., w] -> [C, 256, w], for codes [E, ..]."""
    flat = codes.flatten(1)
    return _in_turn(flat, books) if codes.device.type == "cpu" else _by_run(flat, books)


def _in_turn(codes: Tensor, books: int) -> Sums:
    """On a CPU: one group after the other, of codes [E, n]."""
    own = torch.arange(len(codes), device=codes.device).view(-1, 1) if books > 1 else 0
    index = (codes + vq4.CODEBOOK_SIZE * own).flatten()

    def sums(values: Tensor) -> Tensor:
        flat = values.reshape(-1, values.shape[-1])
        found = flat.new_zeros(books * vq4.CODEBOOK_SIZE, flat.shape[1])
        return found.index_add_(0, index, flat).view(books, vq4.CODEBOOK_SIZE, -1)

    return sums


def _by_run(codes: Tensor, books: int) -> Sums:
    """On a GPU, whose `index_add_` adds in any order: sort the groups, then add up each code's run.

    A run is one thread's work, so that experts with many groups are cut in parts first.
    """
    experts, groups = codes.shape
    parts = -(-groups // _TOGETHER)
    part = torch.arange(groups, device=codes.device) // _TOGETHER
    expert = torch.arange(experts, device=codes.device).view(-1, 1)
    keys, order = (codes + vq4.CODEBOOK_SIZE * (expert * parts + part)).flatten().sort(stable=True)
    runs = torch.arange(experts * parts * vq4.CODEBOOK_SIZE, device=codes.device)
    starts = torch.searchsorted(keys, runs)

    def sums(values: Tensor) -> Tensor:
        flat = values.reshape(-1, values.shape[-1])
        found = F.embedding_bag(order, flat, starts, mode="sum")
        found = found.view(experts, parts, vq4.CODEBOOK_SIZE, -1).sum(1)
        return found if books > 1 else found.sum(0, keepdim=True)

    return sums

"""`moments`: the memory that it needs, and the tokens that it sees."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from pipelines import TOKENS, Tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moecc.passes._code.moments import measure, routed_tokens
from moecc.pipeline.passes import Layer
from moecc.pipeline.stream import Stream, first_tokens

pytestmark = pytest.mark.usefixtures("traced_once")


class Peak(TorchDispatchMode):
    """Count the most bytes that new tensors hold at one time while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}  # storage -> tensors on it
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key, nbytes = storage.data_ptr(), storage.nbytes()
                self.count(key, nbytes, 1)
                weakref.finalize(t, self.count, key, nbytes, -1)
        return result

    def count(self, storage: int, nbytes: int, more: int) -> None:
        before = self.held.get(storage, 0)
        self.held[storage] = before + more
        self.now += nbytes * ((before + more > 0) - (before > 0))
        self.most = max(self.most, self.now)


def test_moments_are_held_in_memory_only_once(tiny: Tiny, batches: list[Tensor]) -> None:
    program = tiny("I")
    stream = Stream(program, batches)
    stream.advance()
    layer = Layer(1, program, program, stream, stream)
    (moe,) = layer.moe
    routed = routed_tokens(layer, moe)
    with Peak() as peak:
        found = measure(layer, moe, routed, torch.eye(16))
    weights = (layer.weight(moe, p) for p in ("gate_up", "down"))
    held = found.gate_up, found.down, found.output["gate_up"], *weights
    size = sum(t.nbytes for t in held if t is not None)
    assert size <= peak.most < 1.1 * size


def test_tokens_are_counted_in_whole_batches() -> None:
    for tokens, count in ((1, 1), (47, 1), (48, 2), (10**6, 8)):
        assert [id(b) for b in first_tokens(TOKENS, tokens)] == [id(b) for b in TOKENS[:count]]

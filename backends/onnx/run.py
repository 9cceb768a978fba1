"""An exported model in ONNX Runtime: prefill and decode with its cache.

A cache is never copied to Python. Where the op library runs all of a model's attention, its memory has room for more tokens,
which are written into it; otherwise every step makes a new one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from moecc.backends.onnx.rewrites.attention import ROOM
from moecc.errors import MoeccError, reason

_LEAST_ROOM = 256  # tokens
_KINDS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def version() -> str:
    return f"onnxruntime {onnxruntime.__version__}"


class Cache:
    """Keys and values of the first `length` tokens, [B, heads, room or length, width] by name of the graph's input."""

    def __init__(self, values: dict[str, Any], padding: np.ndarray, binding: Any, room: int):
        self.values = values
        self.padding = padding  # [B, 1]: so many of the first tokens of a row are none
        self.binding = binding  # of these to the graph's inputs and outputs
        self.length = 0
        self.count(room)

    def count(self, room: int) -> None:
        """Know attention_mask and position_ids, i64 [B, room], of so many tokens."""
        places = np.arange(room) - self.padding
        self.room, self.counted, self.places = (
            room,
            (places >= 0).astype(np.int64),
            np.maximum(places, 0),
        )

    def given(self, tokens: int) -> dict[str, np.ndarray]:
        """attention_mask [B, length + tokens] and position_ids [B, tokens] of new tokens."""
        total = self.length + tokens
        return {
            "attention_mask": np.ascontiguousarray(self.counted[:, :total]),
            "position_ids": np.ascontiguousarray(self.places[:, self.length : total]),
        }


class Session:
    """One exported file. library: moecc's op library, without which the functions in the file run. pinned: see `pin`."""

    def __init__(
        self, path: Path, *, library: Path | None = None, threads: int = 0, pinned: bool = False
    ):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        if pinned:
            pin(options, threads)
        options.log_severity_level = (
            3  # errors; it warns about what an inlined function leaves over
        )
        if library is not None:
            options.register_custom_ops_library(str(library))
            options.enable_mem_pattern = (
                False  # made anew for every number of tokens, which comes once
            )
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has no base class of its errors
            raise MoeccError(f"{path}: {version()} can't load it: {reason(error)}") from error
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.past = [n for n in self.inputs if n.startswith("past_key_values.")]
        logits = self.session.get_outputs()[0]
        self.vocabulary, self.logits_type = logits.shape[2], logits.type
        self.room = library is not None and ROOM in self.session.get_modelmeta().custom_metadata_map

    def start(self, batch: int, padding: Sequence[int] = ()) -> Cache:
        """A cache that holds nothing. padding: how many tokens in front of each row stand for none."""
        memory = {
            name: _shared(self._memory(name, batch, _LEAST_ROOM if self.room else 0))
            for name in self.past
        }
        first = np.array(padding or [0] * batch).reshape(batch, 1)
        cache = Cache(memory, first, self.session.io_binding(), _LEAST_ROOM)
        self._bind(cache)
        return cache

    def step(self, ids: np.ndarray, cache: Cache) -> np.ndarray:
        """Logits [B, S, vocabulary] of new tokens i64 [B, S], which join the cache."""
        batch, tokens = ids.shape
        if cache.length + tokens > cache.room:
            self._enlarge(cache, batch, max(cache.length + tokens, 2 * cache.room))
        for name, value in ({"input_ids": ids} | cache.given(tokens)).items():
            if name in self.inputs:
                cache.binding.bind_cpu_input(name, value)
        logits = np.empty((batch, tokens, self.vocabulary), _KINDS[self.logits_type])
        cache.binding.bind_ortvalue_output("logits", _shared(logits))
        self.session.run_with_iobinding(cache.binding)
        cache.length += tokens
        if not self.room:  # outputs come in the order in which they were bound first
            cache.values = dict(zip(self.past, cache.binding.get_outputs(), strict=False))
            self._bind(cache)
        return logits

    def logits(self, ids: Tensor, pieces: list[int]) -> Tensor:
        """float32 [B, S, vocabulary] of token ids [B, S], fed in pieces of so many tokens."""
        cache = self.start(len(ids))
        return torch.cat(
            [
                torch.from_numpy(self.step(p.numpy(), cache)).float()
                for p in ids.split(pieces, dim=1)
            ],
            1,
        )

    def _memory(self, name: str, batch: int, tokens: int) -> np.ndarray:
        _, heads, _, width = self.inputs[name].shape
        return np.zeros((batch, heads, tokens, width), _KINDS[self.inputs[name].type])

    def _enlarge(self, cache: Cache, batch: int, room: int) -> None:
        cache.count(room)
        if not self.room:
            return
        for name, before in cache.values.items():
            memory = self._memory(name, batch, room)
            memory[:, :, : cache.length] = before.numpy()[:, :, : cache.length]
            cache.values[name] = _shared(memory)
        self._bind(cache)

    def _bind(self, cache: Cache) -> None:
        for name, value in cache.values.items():
            cache.binding.bind_ortvalue_input(name, value)
            if self.room:
                cache.binding.bind_ortvalue_output(_present(name), value)
            else:
                cache.binding.bind_output(_present(name))


def pin(options: Any, threads: int) -> None:
    """Give each thread of a session and of this process a core of its own, for measuring.

    A scheduler may keep two threads that never sleep on one core for as long as they run."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    if 1 < threads <= len(cores):
        others = ";".join(str(core + 1) for core in cores[1:threads])  # counted from 1
        options.add_session_config_entry("session.intra_op_thread_affinities", others)


def _shared(memory: np.ndarray) -> Any:
    """An array as ONNX Runtime takes it, without a copy."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(memory)


def _present(past: str) -> str:
    return past.replace("past_key_values", "present", 1)

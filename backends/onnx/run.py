"""An exported model in ONNX Runtime: prefill and decode with its cache.

A cache is never copied to Python. If the op library runs all attention of a model, the cache's
memory has room for more tokens, and new ones are written into it; else every step makes a new one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from moecc.backends.onnx.rewrites.attention import ROOM
from moecc.errors import MoeccError, reason

_LEAST_ROOM = 256  # tokens
_KINDS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def version() -> str:
    """Return the name and version of the runtime."""
    return f"onnxruntime {onnxruntime.__version__}"


class Cache:
    """Keys and values of the first `length` tokens.

    values: [B, heads, room or length, width] by name of the graph's input. padding [B, 1]: the
    number of tokens at the start of each row that are none. binding: of the values to the graph's
    inputs and outputs.
    """

    def __init__(
        self,
        values: dict[str, onnxruntime.OrtValue],
        padding: np.ndarray,
        binding: onnxruntime.IOBinding,
        room: int,
    ):
        self.values, self.padding, self.binding = values, padding, binding
        self.length = 0
        self.count(room)

    def count(self, room: int) -> None:
        """Prepare attention_mask and position_ids, i64 [B, room], for so many tokens."""
        places = np.arange(room) - self.padding
        self.room = room
        self.counted = (places >= 0).astype(np.int64)
        self.places = np.maximum(places, 0)

    def given(self, tokens: int) -> dict[str, np.ndarray]:
        """Return attention_mask [B, length + tokens] and position_ids [B, tokens] of new tokens."""
        total = self.length + tokens
        return {
            "attention_mask": np.ascontiguousarray(self.counted[:, :total]),
            "position_ids": np.ascontiguousarray(self.places[:, self.length : total]),
        }


class Session:
    """One exported file.

    library: moecc's op library; without it the functions in the file run. pinned: see `pin`. Raise
    MoeccError if ONNX Runtime cannot load the file.
    """

    def __init__(
        self, path: Path, *, library: Path | None = None, threads: int = 0, pinned: bool = False
    ):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        if pinned:
            pin(options, threads)
        # Errors alone: a warning comes for everything that inlining a function leaves over.
        options.log_severity_level = 3
        if library is not None:
            options.register_custom_ops_library(str(library))
            # A pattern is made for every number of tokens, and each number comes once.
            options.enable_mem_pattern = False
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
        """Return an empty cache. padding: the tokens at the start of each row that do not count."""
        room = _LEAST_ROOM if self.room else 0
        memory = {name: _shared(self._memory(name, batch, room)) for name in self.past}
        first = np.array(padding or [0] * batch).reshape(batch, 1)
        cache = Cache(memory, first, self.session.io_binding(), _LEAST_ROOM)
        self._bind(cache)
        return cache

    def step(self, ids: np.ndarray, cache: Cache) -> np.ndarray:
        """Return the logits [B, S, vocabulary] of new tokens i64 [B, S], which join the cache."""
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
        """Return float32 logits [B, S, vocabulary] of token ids [B, S].

        pieces: the numbers of tokens to feed at once.
        """
        cache = self.start(len(ids))
        steps = [self.step(piece.numpy(), cache) for piece in ids.split(pieces, dim=1)]
        return torch.cat([torch.from_numpy(step).float() for step in steps], 1)

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


def pin(options: onnxruntime.SessionOptions, threads: int) -> None:
    """Give each thread of a session and of this process its own core, for measuring.

    Otherwise a scheduler may keep two threads that never sleep on one core as long as they run.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    if 1 < threads <= len(cores):
        others = ";".join(str(core + 1) for core in cores[1:threads])  # counted from 1
        options.add_session_config_entry("session.intra_op_thread_affinities", others)


def _shared(memory: np.ndarray) -> onnxruntime.OrtValue:
    """Return an array as ONNX Runtime takes it, without a copy."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(memory)


def _present(past: str) -> str:
    return past.replace("past_key_values", "present", 1)

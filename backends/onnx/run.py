"""An exported model in ONNX Runtime: prefill and decode with its cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from moecc.errors import MoeccError, reason


def version() -> str:
    return f"onnxruntime {onnxruntime.__version__}"


class Session:
    """One exported file. library: moecc's op library, without which the functions in the file run."""

    def __init__(self, path: Path, *, library: Path | None = None, threads: int = 0):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors; it warns about what an inlined function leaves over
        if library is not None:
            options.register_custom_ops_library(str(library))
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has no base class of its errors
            raise MoeccError(f"{path}: {version()} can't load it: {reason(error)}") from error
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.past = [n for n in self.inputs if n.startswith("past_key_values.")]

    def start(self, batch: int) -> dict[str, np.ndarray]:
        """A cache that holds nothing."""
        found = {}
        for name in self.past:
            _, heads, _, width = self.inputs[name].shape
            kind = np.float16 if "float16" in self.inputs[name].type else np.float32
            found[name] = np.zeros((batch, heads, 0, width), kind)
        return found

    def step(self, ids: np.ndarray, cache: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits [B, S, vocabulary] of new tokens i64 [B, S], and the cache behind them."""
        past = next(iter(cache.values())).shape[2]
        batch, tokens = ids.shape
        given = {
            "input_ids": ids, "attention_mask": np.ones((batch, past + tokens), np.int64),
            "position_ids": np.tile(np.arange(past, past + tokens, dtype=np.int64), (batch, 1)), **cache,
        }  # fmt: skip
        logits, *grown = self.session.run(self.outputs, {n: v for n, v in given.items() if n in self.inputs})
        names = [n.replace("present", "past_key_values", 1) for n in self.outputs[1:]]
        return logits, dict(zip(names, grown, strict=True))

    def logits(self, ids: Tensor, pieces: list[int]) -> Tensor:
        """float32 [B, S, vocabulary] of token ids [B, S], fed in pieces of so many tokens."""
        cache, found = self.start(len(ids)), []
        for part in ids.split(pieces, dim=1):
            made, cache = self.step(part.numpy(), cache)
            found.append(torch.from_numpy(made).float())
        return torch.cat(found, 1)

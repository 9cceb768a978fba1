"""The program of an ONNX file: prefill and decode in one graph, the cache as inputs and outputs.

  1. the artifact's skeleton (no weight is read) gets a cache that holds all keys and values of all
     layers, so that one mask per layer alone tells a sliding window from full attention
  2. torch.export traces it with batch, sequence and past open; `input_ids`, `attention_mask` and
     `position_ids` have onnxruntime-genai's names

Shapes: B batch, S new tokens, P past ones. input_ids, position_ids i64 [B, S]; attention_mask i64
[B, P + S]; past_key_values.L.key / .value [B, heads, P, width]; logits [B, S, vocabulary];
present.L.key / .value [B, heads, P + S, width].
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from moecc.errors import MoeccError
from moecc.frontend.config import text_config
from moecc.frontend.simplify import simplify
from moecc.frontend.skeleton import Skeleton
from moecc.frontend.traceable import logits_alone, traceable

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

# Layer types that keep only keys and values between tokens.
_KEPT = ("full_attention", "sliding_attention", "chunked_attention", "attention", "moe")
# Sizes of the trace. torch.export may take two equal ones for one size, and 1 for a constant.
_BATCH, _SEQUENCE, _PAST = 2, 3, 5

Pair = tuple[Tensor, Tensor]  # keys and values of one layer


@dataclass(frozen=True)
class CacheShape:
    """The sizes of one layer's keys and values, [B, heads, P, width]."""

    heads: int
    key_width: int
    value_width: int


@dataclass(frozen=True)
class Cached:
    """A traced program, and the names of its inputs and outputs."""

    program: ExportedProgram
    cache: list[CacheShape]

    @property
    def input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "position_ids", *self._names("past_key_values")]

    @property
    def output_names(self) -> list[str]:
        return ["logits", *self._names("present")]

    def _names(self, prefix: str) -> list[str]:
        return [f"{prefix}.{i}.{part}" for i in range(len(self.cache)) for part in ("key", "value")]


class _WithCache(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Pair]
    ) -> tuple[Tensor, list[Pair]]:
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache()
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        more = {"attention_mask": attention_mask, "position_ids": position_ids}
        logits, pairs = _run(self.model, input_ids, cache, **more), _pairs(cache)
        assert pairs is not None
        return logits, pairs


def _run(model: nn.Module, ids: Tensor, cache: Cache, **more: Tensor) -> Tensor:
    """Return the model's logits. It gets the cache, and of `more` what its forward takes."""
    takes = inspect.signature(model.forward).parameters
    given = {name: value for name, value in more.items() if name in takes}
    name = "cache" if "cache" in takes else "past_key_values"  # renamed in transformers 5.2x
    logits: Tensor = model(input_ids=ids, use_cache=True, **{name: cache}, **given)[0]
    return logits


def _pairs(cache: Cache) -> list[Pair] | None:
    """Return keys and values of each layer, None if a layer has none."""
    found = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None:
            return None
        found.append((keys, values))
    return found


def capture_cached(found: Skeleton) -> Cached:
    """Trace a skeleton, whose weights may be compressed.

    Raise MoeccError if its layers keep anything but keys and values between tokens.
    """
    _require_plain_cache(found)
    dynamic, batch = Dim.DYNAMIC, {0: Dim.DYNAMIC}
    with traceable(found), logits_alone(found.model):
        cache = _cache_shapes(found)
        with found.mode or nullcontext():
            example = _example(found, cache)
        row, grown = {**batch, 1: dynamic}, {**batch, 2: dynamic}
        program = torch.export.export(
            _WithCache(found.model).eval(),
            example,
            dynamic_shapes=(row, row, row, [(grown, grown)] * len(cache)),
            strict=False,
        )
    simplify(program)
    _unsqueeze_as_pairs(program)
    return Cached(program, cache)


def _example(found: Skeleton, cache: list[CacheShape]) -> tuple[Tensor, Tensor, Tensor, list[Pair]]:
    """Return inputs to trace with: ids, attention mask, positions, past."""
    ids = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.long)
    mask = torch.ones(_BATCH, _PAST + _SEQUENCE, dtype=torch.long)
    positions = torch.arange(_PAST, _PAST + _SEQUENCE).expand(_BATCH, -1).contiguous()
    dtype = next(p.dtype for p in found.model.parameters() if p.is_floating_point())

    def empty(heads: int, width: int) -> Tensor:
        return torch.zeros(_BATCH, heads, _PAST, width, dtype=dtype)

    past = [(empty(c.heads, c.key_width), empty(c.heads, c.value_width)) for c in cache]
    return ids, mask, positions, past


def _unsqueeze_as_pairs(program: ExportedProgram) -> None:
    """Unsqueeze complex values, the rotary embeddings of llama4 and deepseek_v2, as pairs.

    PyTorch's exporter has no translation of the complex form.
    """
    aten, graph = torch.ops.aten, program.graph
    for node in graph.find_nodes(op="call_function", target=aten.unsqueeze.default):
        value, dim = node.args
        if not value.meta["val"].is_complex():
            continue
        with graph.inserting_before(node):
            pairs = graph.call_function(aten.view_as_real.default, (value,))
            at = dim if dim >= 0 else dim - 1
            longer = graph.call_function(aten.unsqueeze.default, (pairs, at))
            again = graph.call_function(aten.view_as_complex.default, (longer,))
        pairs.meta["val"] = aten.view_as_real.default(value.meta["val"])
        longer.meta["val"] = aten.unsqueeze.default(pairs.meta["val"], longer.args[1])
        again.meta = dict(node.meta)
        node.replace_all_uses_with(again)
        graph.erase_node(node)
    program.graph_module.recompile()


def _require_plain_cache(found: Skeleton) -> None:
    """Raise MoeccError if a layer keeps a state of its own."""
    types = set(getattr(text_config(found.config), "layer_types", None) or ())
    if other := sorted(types - set(_KEPT)):
        raise MoeccError(
            f"{found.name}: {other[0]} layers keep a state of their own between tokens; "
            "moecc exports models whose layers keep keys and values alone"
        )


def _cache_shapes(found: Skeleton) -> list[CacheShape]:
    """Return the shapes that the layers put into an empty cache.

    Raise MoeccError if they are no keys and values.
    """
    from transformers.cache_utils import DynamicCache

    with found.mode or nullcontext():
        ids, cache = torch.zeros(1, _SEQUENCE, dtype=torch.long), DynamicCache()
        _run(found.model, ids, cache)
    shapes = _pairs(cache)
    if not shapes or any(keys.dim() != 4 for keys, _ in shapes):
        raise MoeccError(
            f"{found.name}: its layers don't keep keys and values [B, heads, P, width]; "
            "it can't be exported"
        )
    return [CacheShape(int(k.shape[1]), int(k.shape[3]), int(v.shape[3])) for k, v in shapes]

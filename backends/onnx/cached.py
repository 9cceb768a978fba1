"""The program of an ONNX file: prefill and decode in one graph, keys and values as inputs and outputs.

  1. the artifact's skeleton (no weight is read) with a cache that holds all keys and values of all layers, so that one mask per
     layer is all that tells a sliding window from full attention
  2. torch.export with batch, sequence and past open; `input_ids`, `attention_mask`, `position_ids` as onnxruntime-genai names them

Shapes: B batch, S new tokens, P past ones. input_ids, position_ids i64 [B, S]; attention_mask i64 [B, P + S];
past_key_values.L.key / .value [B, heads, P, width]; logits [B, S, vocabulary]; present.L.key / .value [B, heads, P + S, width].
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from moecc.errors import MoeccError
from moecc.frontend.capture import simplify, traceable
from moecc.frontend.config import text_config
from moecc.frontend.skeleton import Skeleton

_KEPT = (
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "attention",
    "moe",
)  # layer types with keys and values alone
_BATCH, _SEQUENCE, _PAST = 2, 3, 5  # of the trace; no two alike, none 1


@dataclass(frozen=True)
class CacheShape:
    """Keys and values of one layer: [B, heads, P, width]."""

    heads: int
    key_width: int
    value_width: int


@dataclass(frozen=True)
class Cached:
    """A traced program and what its inputs and outputs are called."""

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
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache()
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        out = _run(
            self.model, input_ids, cache, attention_mask=attention_mask, position_ids=position_ids
        )
        return out[0], _pairs(cache)


def _run(model: nn.Module, ids: Tensor, cache: Any, **more: Tensor) -> Any:
    """The model's output; it is given of `more` what its forward takes, and the cache by the name that it has there."""
    takes = inspect.signature(model.forward).parameters
    given = {name: value for name, value in more.items() if name in takes}
    name = "cache" if "cache" in takes else "past_key_values"  # renamed in transformers 5.2x
    return model(input_ids=ids, use_cache=True, **{name: cache}, **given)


def _pairs(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def capture_cached(found: Skeleton) -> Cached:
    """Trace a skeleton whose weights may be compressed. MoeccError where its layers keep more than keys and values."""
    _require_plain_cache(found)
    mode = found.mode or nullcontext()
    dynamic, batch = Dim.DYNAMIC, {0: Dim.DYNAMIC}
    with traceable(found):
        cache = _cache_shapes(found)
        with mode:
            ids = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.long)
            mask = torch.ones(_BATCH, _PAST + _SEQUENCE, dtype=torch.long)
            positions = torch.arange(_PAST, _PAST + _SEQUENCE).expand(_BATCH, -1).contiguous()
            dtype = next(p.dtype for p in found.model.parameters() if p.is_floating_point())
            past = [
                tuple(
                    torch.zeros(_BATCH, c.heads, _PAST, w, dtype=dtype)
                    for w in (c.key_width, c.value_width)
                )
                for c in cache
            ]
        row, grown = {**batch, 1: dynamic}, {**batch, 2: dynamic}
        program = torch.export.export(
            _WithCache(found.model).eval(), (ids, mask, positions, past),
            dynamic_shapes=(row, row, row, [(grown, grown)] * len(cache)), strict=False,
        )  # fmt: skip
    simplify(program)
    _unsqueeze_as_pairs(program)
    return Cached(program, cache)


def _unsqueeze_as_pairs(program: ExportedProgram) -> None:
    """Unsqueeze complex values (rotary embeddings of llama4, deepseek_v2) as pairs: PyTorch's exporter has no other way."""
    aten, graph = torch.ops.aten, program.graph
    for node in graph.find_nodes(op="call_function", target=aten.unsqueeze.default):
        value, dim = node.args
        if not value.meta["val"].is_complex():
            continue
        with graph.inserting_before(node):
            pairs = graph.call_function(aten.view_as_real.default, (value,))
            longer = graph.call_function(
                aten.unsqueeze.default, (pairs, dim if dim >= 0 else dim - 1)
            )
            again = graph.call_function(aten.view_as_complex.default, (longer,))
        pairs.meta["val"] = aten.view_as_real.default(value.meta["val"])
        longer.meta["val"] = aten.unsqueeze.default(pairs.meta["val"], longer.args[1])
        again.meta = dict(node.meta)
        node.replace_all_uses_with(again)
        graph.erase_node(node)
    program.graph_module.recompile()


def _require_plain_cache(found: Skeleton) -> None:
    types = set(getattr(text_config(found.config), "layer_types", None) or ())
    if other := sorted(types - set(_KEPT)):
        raise MoeccError(
            f"{found.name}: {other[0]} layers keep a state of their own between tokens; "
            "moecc exports models whose layers keep keys and values alone"
        )


def _cache_shapes(found: Skeleton) -> list[CacheShape]:
    """What the layers put into an empty cache."""
    from transformers.cache_utils import DynamicCache

    with found.mode or nullcontext():
        ids, cache = torch.zeros(1, _SEQUENCE, dtype=torch.long), DynamicCache()
        _run(found.model, ids, cache)
    shapes = _pairs(cache)
    if not shapes or any(k is None or k.dim() != 4 for k, _ in shapes):
        raise MoeccError(
            f"{found.name}: its layers don't keep keys and values [B, heads, P, width]; it can't be exported"
        )
    return [CacheShape(int(k.shape[1]), int(k.shape[3]), int(v.shape[3])) for k, v in shapes]

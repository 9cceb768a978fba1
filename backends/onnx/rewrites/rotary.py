"""Rotary embeddings of float16 as one RotaryEmbedding node.

transformers computes cos and sin in float32 and rounds them; onnxscript's own fusion knows only those that aren't rounded.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

_END = 2**63 - 1  # of a slice that goes to the end


class _Rotation(pattern.RewriteRuleClassBase):
    """x [B, H, S, d], angles [B, S, d / 2] -> x cos + (the halves of x changed, the first negated) sin."""

    def __init__(self) -> None:
        super().__init__("RoundedRotaryEmbedding", remove_nodes=False)

    def pattern(self, op: Any, x: Any, angles: Any, dtype: Any, half: Any, end: Any) -> Any:
        twice = op.Concat(angles, angles, axis=-1)
        cos, sin = (op.Unsqueeze(op.Cast(f(twice), to=dtype), [1]) for f in (op.Cos, op.Sin))
        low, high = op.Slice(x, [0], half, [3], [1]), op.Slice(x, half, end, [3], [1])
        return x * cos + op.Concat(op.Neg(high), low, axis=-1) * sin

    def check(self, op: Any, *_: Any, **found: Any) -> Any:
        x, half, end = (found[name] for name in ("x", "half", "end"))
        if x.shape is None or len(x.shape) != 4 or not isinstance(width := x.shape[3], int):
            return pattern.MatchResult().fail("the number of channels isn't known")
        sizes = [
            None if v.const_value is None else v.const_value.numpy().tolist() for v in (half, end)
        ]
        if sizes[0] != [width // 2] or sizes[1] not in ([width], [_END]):
            return pattern.MatchResult().fail("not the halves of all channels")
        return pattern.MatchResult()

    def rewrite(self, op: Any, x: ir.Value, angles: ir.Value, dtype: ir.Attr, **_: Any) -> Any:
        cos, sin = (op.Cast(f(angles), to=dtype.as_int()) for f in (op.Cos, op.Sin))
        return op.RotaryEmbedding(x, cos, sin, interleaved=0)


_RULES = pattern.RewriteRuleSet([_Rotation.rule()])  # type: ignore[no-untyped-call]


def fuse(model: ir.Model) -> None:
    """Put one node for every rotation; for opset 23 and later."""
    if model.opset_imports[""] >= 23:
        _RULES.apply_to_model(model)

"""Rotary embeddings of float16 as one RotaryEmbedding node.

transformers computes cos and sin in float32 and rounds them; onnxscript's own fusion knows only cos
and sin that are not rounded.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter.pattern import (
    MatchResult,
    OpsetPatternBuilder,
    RewriteRuleClassBase,
    RewriteRuleSet,
    Var,
)

from moecc.backends.onnx.graph import Opset

_END = 2**63 - 1  # of a slice that goes to the end


class _Rotation(RewriteRuleClassBase):
    """Match x cos + (the halves of x swapped, the new first one negated) sin.

    x [B, H, S, d]; angles [B, S, d / 2].
    """

    def __init__(self) -> None:
        super().__init__("RoundedRotaryEmbedding", remove_nodes=False)

    def pattern(
        self,
        op: OpsetPatternBuilder,
        x: Var,
        angles: Var,
        dtype: Var,
        half: Var,
        end: Var,
    ) -> object:
        twice = op.Concat(angles, angles, axis=-1)
        cos, sin = (op.Unsqueeze(op.Cast(f(twice), to=dtype), [1]) for f in (op.Cos, op.Sin))
        low, high = op.Slice(x, [0], half, [3], [1]), op.Slice(x, half, end, [3], [1])
        return x * cos + op.Concat(op.Neg(high), low, axis=-1) * sin

    def check(
        self, op: object, x: ir.Value, half: ir.Value, end: ir.Value, **_: object
    ) -> MatchResult:
        if x.shape is None or len(x.shape) != 4 or not isinstance(width := x.shape[3], int):
            return MatchResult().fail("the number of channels isn't known")
        if _number(half) != [width // 2] or _number(end) not in ([width], [_END]):
            return MatchResult().fail("not the halves of all channels")
        return MatchResult()

    def rewrite(
        self,
        op: Opset,
        x: ir.Value,
        angles: ir.Value,
        dtype: ir.Attr,
        **_: object,
    ) -> ir.Value:
        cos, sin = (op.Cast(f(angles), to=dtype.as_int()) for f in (op.Cos, op.Sin))
        return op.RotaryEmbedding(x, cos, sin, interleaved=0)


def _number(value: ir.Value) -> list[int] | None:
    """Return the elements of a constant, None if the graph computes the value."""
    if value.const_value is None:
        return None
    found: list[int] = value.const_value.numpy().tolist()
    return found


_RULES = RewriteRuleSet([_Rotation.rule()])  # type: ignore[no-untyped-call]


def fuse(model: ir.Model) -> None:
    """Put one node for every rotation, from opset 23 on."""
    if model.opset_imports[""] >= 23:
        _RULES.apply_to_model(model)

"""Register a dialect op with torch: schema, kernel, fake shape and a backward that recomputes.

The backward differentiates the eager reference again, so there is no hand-written derivative to
keep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

library = torch.library.Library("moecc", "FRAGMENT")
Operand: TypeAlias = Tensor | None
Attribute: TypeAlias = str | int | float


class _Context(Protocol):
    """The autograd context that torch hands to both functions of an op."""

    needs_input_grad: tuple[bool, ...]
    attributes: list[Attribute]

    @property
    def saved_tensors(self) -> tuple[Operand, ...]: ...
    def save_for_backward(self, *tensors: Operand) -> None: ...


def define(
    name: str,
    tensors: str,
    attributes: str,
    reference: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    kernel: Callable[..., Tensor] | None = None,
) -> None:
    """Register `moecc::name(tensors, *, attributes) -> Tensor`.

    tensors, attributes: schema text. reference: defines the op and its derivatives. fake: the
    result's shape. kernel: computes the op instead of `reference`; derivatives stay the
    reference's.
    """
    keys = tuple(part.split()[-1] for part in attributes.split(",")) if attributes else ()
    star = f", *, {attributes}" if attributes else ""
    plain = f", {attributes}" if attributes else ""
    library.define(f"{name}({tensors}{star}) -> Tensor")
    library.define(
        f"{name}_backward(Tensor grad, Tensor?[] operands, bool[] wanted{plain}) -> Tensor[]"
    )
    op = _Op(name, len(tensors.split(",")), keys, reference, kernel or reference)
    devices = ("CPU", "CUDA")
    torch.library.impl(f"moecc::{name}", devices, op.forward, lib=library)
    torch.library.impl(f"moecc::{name}_backward", devices, op.backward, lib=library)
    torch.library.register_fake(f"moecc::{name}", fake, lib=library)
    torch.library.register_fake(f"moecc::{name}_backward", op.backward_fake, lib=library)
    torch.library.register_autograd(
        f"moecc::{name}", op.autograd, setup_context=op.setup_context, lib=library
    )


@dataclass(frozen=True)
class _Op:
    """The functions that torch calls for one op."""

    name: str
    operands: int
    keys: tuple[str, ...]  # names of the attributes
    reference: Callable[..., Tensor]
    kernel: Callable[..., Tensor]

    def forward(self, *args: Operand, **kwargs: Attribute) -> Tensor:
        with torch.no_grad():
            return self.kernel(*args, **kwargs)

    def backward(
        self, grad: Tensor, args: list[Operand], wanted: list[bool], *attributes: Attribute
    ) -> list[Tensor]:
        """Return the gradients of the wanted operands, in order."""
        leaves = [
            None if t is None else t.detach().requires_grad_(w)
            for t, w in zip(args, wanted, strict=True)
        ]
        with torch.enable_grad():
            y = self.reference(*leaves, **dict(zip(self.keys, attributes, strict=True)))
        sources = [t for t, w in zip(leaves, wanted, strict=True) if w and t is not None]
        if not y.requires_grad:  # no token was routed anywhere
            return [torch.zeros_like(t) for t in sources]
        grads = torch.autograd.grad(y, sources, grad, allow_unused=True)
        return [
            torch.zeros_like(t) if g is None else g.contiguous()
            for g, t in zip(grads, sources, strict=True)
        ]

    def backward_fake(
        self, grad: Tensor, args: list[Operand], wanted: list[bool], *attributes: Attribute
    ) -> list[Tensor]:
        operands = zip(args, wanted, strict=True)
        return [t.new_empty(t.shape) for t, w in operands if w and t is not None]

    # torch passes these arguments by name; it leaves out the last if the schema has no keyword
    def setup_context(
        self,
        ctx: _Context,
        inputs: tuple[Operand, ...],
        output: Tensor,
        keyword_only_inputs: dict[str, Attribute] | None = None,
    ) -> None:
        ctx.save_for_backward(*inputs)
        ctx.attributes = [(keyword_only_inputs or {})[k] for k in self.keys]

    def autograd(self, ctx: _Context, grad: Tensor) -> tuple[Operand, ...]:
        wanted = [bool(w) for w in ctx.needs_input_grad[: self.operands]]
        op = getattr(torch.ops.moecc, f"{self.name}_backward")
        grads = iter(op(grad.contiguous(), list(ctx.saved_tensors), wanted, *ctx.attributes))
        return tuple(next(grads) if w else None for w in wanted)

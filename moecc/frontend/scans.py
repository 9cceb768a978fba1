"""Linear attention and state-space scans as one opaque node each, for the time of a trace.

The reference loops of transformers run over chunks or tokens in Python. A trace would unroll them
into thousands of nodes and fix the sequence length. `opaque_scans` swaps these module-level
functions for ops that know only the shape of the result; an op that runs calls the function. There
is no cache: a call that asks for the final state is refused.

  op                        function of the modelling file     result
  moecc::gated_delta_rule   torch_chunk_gated_delta_rule       like value [B, S, H, Dv]
  moecc::kimi_delta         chunk_kimi_delta_attention         like value
  moecc::mamba2_scan        mamba2_chunk_scan                  like hidden_states [B, S, H, P]
  moecc::selective_scan     mamba_selective_scan               like hidden_states

source: the modelling module that the function comes from. options: its other arguments as JSON.
Shapes: B batch, S sequence, H heads, Dv value width, P head width.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from moecc.errors import MoeccError
from moecc.ir import ops
from moecc.types import Json

Function: TypeAlias = Callable[..., object]


@dataclass(frozen=True)
class Scan:
    """A loop over the sequence that becomes the op `moecc::name`."""

    name: str
    function: str  # its name in the modelling file
    tensors: tuple[str, ...]  # its tensor arguments, in the op's order; ? marks an optional one
    like: str  # the tensor argument whose shape and dtype the result has
    state_flag: str  # the argument that asks for the final state
    returns_state: bool  # whether the function returns a pair even if no state is asked for

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(t.removesuffix("?") for t in self.tensors)


_DELTA = ("query", "key", "value", "g", "beta", "initial_state?")
SCANS = (
    Scan(
        name="gated_delta_rule",
        function="torch_chunk_gated_delta_rule",
        tensors=_DELTA,
        like="value",
        state_flag="output_final_state",
        returns_state=True,
    ),
    Scan(
        name="kimi_delta",
        function="chunk_kimi_delta_attention",
        tensors=_DELTA,
        like="value",
        state_flag="output_final_state",
        returns_state=True,
    ),
    Scan(
        name="mamba2_scan",
        function="mamba2_chunk_scan",
        tensors=("hidden_states", "dt", "A", "B", "C", "D?", "dt_bias?", "initial_states?"),
        like="hidden_states",
        state_flag="return_final_states",
        returns_state=False,
    ),
    Scan(
        name="selective_scan",
        function="mamba_selective_scan",
        tensors=("hidden_states", "dt", "A", "B", "C", "D?", "z?", "delta_bias?"),
        like="hidden_states",
        state_flag="return_last_state",
        returns_state=False,
    ),
)


def _define(scan: Scan) -> None:
    """Define the op of `scan`; its reference calls the function, and backward differentiates it."""

    def reference(*tensors: Tensor | None, source: str, options: str) -> Tensor:
        function = getattr(importlib.import_module(source), scan.function)
        function = getattr(function, "moecc_original", function)
        out = function(**dict(zip(scan.keys, tensors, strict=True)), **json.loads(options))
        y: Tensor = (out[0] if isinstance(out, tuple) else out).contiguous()
        return y

    def fake(*tensors: Tensor | None, source: str, options: str) -> Tensor:
        like = tensors[scan.keys.index(scan.like)]
        assert like is not None
        return like.new_empty(like.shape)

    schema = ", ".join(
        f"Tensor{'?' if t.endswith('?') else ''} {t.removesuffix('?')}" for t in scan.tensors
    )
    ops.define(scan.name, schema, "str source, str options", reference, fake)


for _scan in SCANS:
    _define(_scan)


def _split(scan: Scan, call: inspect.BoundArguments) -> tuple[list[Tensor | None], Json]:
    """Return the tensor operands of a call, and its other named arguments.

    Arguments that land in the function's **kwargs are left out, because it ignores them. Raise
    MoeccError for packed sequences.
    """
    given = dict(call.arguments)
    swallowed = given.pop("kwargs", {})
    tensors = [given.pop(key, swallowed.get(key)) for key in scan.keys]
    packed = next((key for key in swallowed if key.startswith("cu_seq")), None)
    if packed is not None and swallowed[packed] is not None:
        raise MoeccError(
            f"{scan.function} gets packed sequences ({packed}), which moecc::{scan.name} "
            "doesn't take"
        )
    return tensors, {key: value for key, value in given.items() if value is not None}


def _opaque(scan: Scan, original: Function, source: str) -> Function:
    """Return a function of the same signature as `original` that calls the op of `scan`."""
    signature = inspect.signature(original)
    op = getattr(torch.ops.moecc, scan.name)

    def call(*args: object, **kwargs: object) -> object:
        tensors, options = _split(scan, signature.bind_partial(*args, **kwargs))
        if options.pop(scan.state_flag, False):
            raise MoeccError(
                f"{source}: {scan.function} is asked for its final state; "
                "trace with use_cache=False"
            )
        try:
            text = json.dumps(options)
        except TypeError as error:
            raise MoeccError(
                f"{source}: {scan.function} gets arguments that moecc::{scan.name} doesn't take"
            ) from error
        y = op(*tensors, source=source, options=text)
        return (y, None) if scan.returns_state else y

    call.moecc_original = original  # type: ignore[attr-defined]
    return call


@contextmanager
def opaque_scans(model: nn.Module) -> Iterator[None]:
    """Swap the scans in the modelling files of `model` for their ops."""
    modules = {
        sys.modules[type(m).__module__]
        for m in model.modules()
        if type(m).__module__ in sys.modules
    }
    swapped = []
    for module in modules:
        for scan in SCANS:
            if (original := module.__dict__.get(scan.function)) is not None:
                setattr(module, scan.function, _opaque(scan, original, module.__name__))
                swapped.append((module, scan.function, original))
    try:
        yield
    finally:
        for module, name, original in swapped:
            setattr(module, name, original)

"""Linear attention and state-space scans as one opaque node each, for the time of a trace.

transformers' reference loops run over chunks or tokens in Python: traced, they unroll into thousands of nodes and fix
the sequence length. `opaque_scans` swaps the module-level functions for ops that know the shape only and call the same
function when they run. There is no cache: a call that asks for the final state is refused.

  op                        function of the modelling file     result
  moecc::gated_delta_rule   torch_chunk_gated_delta_rule       like value [B, S, H, Dv]
  moecc::kimi_delta         chunk_kimi_delta_attention         like value
  moecc::mamba2_scan        mamba2_chunk_scan                  like hidden_states [B, S, H, P]
  moecc::selective_scan     mamba_selective_scan               like hidden_states

`source` is the modelling module that the function comes from, `options` its other arguments as JSON.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moecc.errors import MoeccError
from moecc.ir import ops


@dataclass(frozen=True)
class Scan:
    """A loop over the sequence that becomes the op `moecc::name`."""

    name: str
    function: str  # its name in the modelling file
    tensors: tuple[
        str, ...
    ]  # the function's tensor arguments, in the op's order; a trailing ? marks an optional one
    like: str  # the tensor argument that the result has the shape and dtype of
    state_flag: str  # the argument that asks for the final state
    returns_state: bool  # whether the function returns a pair even when no state was asked for

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(t.removesuffix("?") for t in self.tensors)


_DELTA = ("query", "key", "value", "g", "beta", "initial_state?")
SCANS = (
    Scan("gated_delta_rule", "torch_chunk_gated_delta_rule", _DELTA, "value", "output_final_state", True),
    Scan("kimi_delta", "chunk_kimi_delta_attention", _DELTA, "value", "output_final_state", True),
    Scan(
        "mamba2_scan", "mamba2_chunk_scan", ("hidden_states", "dt", "A", "B", "C", "D?", "dt_bias?", "initial_states?"),
        "hidden_states", "return_final_states", False,
    ),
    Scan(
        "selective_scan", "mamba_selective_scan", ("hidden_states", "dt", "A", "B", "C", "D?", "z?", "delta_bias?"),
        "hidden_states", "return_last_state", False,
    ),
)  # fmt: skip


def _define(scan: Scan) -> None:
    """The op of `scan`: its reference calls transformers' function, its backward differentiates that again."""

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


def _split(
    scan: Scan, signature: inspect.Signature, args: Any, kwargs: Any
) -> tuple[list[Tensor | None], dict[str, Any]]:
    """A call's tensor operands, and its other named arguments. What the function swallows in **kwargs it ignores."""
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    swallowed = given.pop("kwargs", {})
    tensors = [given.pop(key, swallowed.get(key)) for key in scan.keys]
    if (key := next((k for k in swallowed if k.startswith("cu_seq")), None)) and swallowed[
        key
    ] is not None:
        raise MoeccError(
            f"{scan.function} gets packed sequences ({key}), which moecc::{scan.name} doesn't take"
        )
    return tensors, {key: value for key, value in given.items() if value is not None}


def _opaque(scan: Scan, original: Callable[..., Any], source: str) -> Callable[..., Any]:
    signature = inspect.signature(original)
    op = getattr(torch.ops.moecc, scan.name)

    def call(*args: Any, **kwargs: Any) -> Any:
        tensors, options = _split(scan, signature, args, kwargs)
        if options.pop(scan.state_flag, False):
            raise MoeccError(
                f"{source}: {scan.function} is asked for its final state; trace with use_cache=False"
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

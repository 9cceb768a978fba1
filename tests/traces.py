"""torch.export run once for all models of the same configuration."""

from __future__ import annotations

import copy

import pytest
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram

from moecc.frontend import capture
from moecc.frontend.skeleton import Skeleton
from moecc.ir.tensors import digest

_traces: dict[object, ExportedProgram] = {}


def trace_once(patch: pytest.MonkeyPatch) -> None:
    """Let moecc take a trace that this process has made before; they are copied."""
    real = capture._export

    def export(found: Skeleton, batch: int, sequence: int) -> ExportedProgram:
        model = found.model
        config = {k: v for k, v in found.config.to_dict().items() if k != "_name_or_path"}
        modules = tuple((name, type(module)) for name, module in model.named_modules())
        parameters = [(n, p.shape, p.dtype) for n, p in model.named_parameters()]
        buffers = [  # a trace holds their values
            (n, b.dtype, b.shape, "" if isinstance(b, FakeTensor) else digest(b))
            for n, b in model.named_buffers()
        ]
        key = modules, str((config, parameters, buffers)), found.mode is None, batch, sequence
        if key not in _traces:
            _traces[key] = real(found, batch, sequence)
        return copy.deepcopy(_traces[key])

    patch.setattr(capture, "_export", export)

"""From a model to a Program, which has the graph; no weight is in memory.

  program = trace("folder" | "owner/name" | transformers config | nn.Module)

1. `moecc.frontend.skeleton` builds the model with parameters that have no storage, or takes a
   module as it is.
2. `moecc.frontend.capture` exports it: one `moecc::experts` node per MoE layer, dynamic batch and
   sequence.
3. Here the placeholders get their weights: the checkpoint's by name, and buffers as captured. Nodes
   in front of an experts node that compute from weights alone (to transpose or to undo an
   interleaved layout) become one derived weight.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from moecc.checkpoint.module import ModuleStore
from moecc.checkpoint.shards import has_weights
from moecc.checkpoint.store import CheckpointStore
from moecc.frontend.capture import capture
from moecc.frontend.resize import Resizer
from moecc.frontend.skeleton import Skeleton, skeleton
from moecc.ir.fold import fold_weight_graphs
from moecc.ir.program import Program, Weight
from moecc.ir.tensors import Held, Store
from moecc.types import Config


def trace(source: str | Path | nn.Module | Config, *, dtype: torch.dtype | None = None) -> Program:
    """Return the Program of a model.

    source: a local folder, a hub id, a transformers configuration or an nn.Module. dtype: the one
    the program computes in; by default the configuration's.

    A folder's weights are read when a pass or a backend asks for them. A program from a
    configuration or a hub id has none; `moecc.checkpoint.source.checkpoint_folder` fetches a hub
    checkpoint. Raise MoeccError, in one line, if the model can't be traced.
    """
    found = skeleton(source, dtype)
    name, store = found.source or found.model_type, store_of(found)
    if isinstance(store, CheckpointStore):
        store.check()  # before the capture, which takes minutes for a large model
    program = program_of(capture(found), found, name, store)

    def build(config: Config) -> tuple[Program, nn.Module]:
        other = skeleton(config, dtype)
        return program_of(capture(other), other, name, store_of(other)), other.model

    program.resizer = Resizer(found, build)
    return program


def program_of(
    exported: ExportedProgram, found: Skeleton, name: str, store: Store | None
) -> Program:
    """Return the Program of a captured model; `name` becomes its source."""
    weights, tensors = _weights(exported)
    meta = exported.graph_module.meta
    if isinstance(store, CheckpointStore):
        # The checkpoint's buffers come before the constructor's.
        tensors = {k: v for k, v in tensors.items() if k not in store}
    program = Program(
        module=exported.graph_module,
        weights=weights,
        tensors=Held(tensors),
        store=store,
        exported_from=exported,
        config=found.config,
        source=name,
        dtype=_dtype(found.model),
        restriction=meta["restriction"],
        unreached=tuple(meta["unreached"]),
    )
    for node in program.graph.nodes:
        if node.op == "placeholder":
            node.meta["layer"], node.meta["path"] = 0, ""
    fold_weight_graphs(program)
    program.verify()
    return program


def _weights(exported: ExportedProgram) -> tuple[dict[str, Weight], dict[str, Tensor]]:
    """Return each placeholder's weight, and the captured tensors: real buffers and constants."""
    weights: dict[str, Weight] = {}
    tensors: dict[str, Tensor] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            continue
        assert spec.target is not None
        weights[spec.arg.name] = Weight(spec.target)
        if spec.kind != InputKind.PARAMETER:
            held = exported.constants.get(spec.target, exported.state_dict.get(spec.target))
            if isinstance(held, Tensor) and not isinstance(held, FakeTensor):
                tensors[spec.target] = held.detach()
    return weights, tensors


def store_of(found: Skeleton) -> Store | None:
    """Return the weights of a model to trace, None if it comes without."""
    if found.folder is None:
        return ModuleStore(found.model) if found.mode is None else None
    return CheckpointStore(found.folder, found.model) if has_weights(found.folder) else None


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

"""From a model to a Program: the graph exists, no weight is in memory.

  program = trace("folder" | "owner/name" | transformers config | nn.Module)

1. `moecc.frontend.skeleton` builds the model with parameters that have no storage (a module is taken as it is)
2. `moecc.frontend.capture` exports it: one `moecc::experts` node per MoE layer, dynamic batch and sequence
3. here the placeholders get their weights: the checkpoint's by name, buffers as captured, and whatever is computed from weights
   alone in front of an experts node (a transposed or interleaved layout) becomes one derived weight
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from moecc.checkpoint.module import ModuleStore
from moecc.checkpoint.store import CheckpointStore
from moecc.frontend.capture import capture
from moecc.frontend.resize import Resizer
from moecc.frontend.skeleton import Skeleton, skeleton
from moecc.ir.fold import fold_weight_graphs
from moecc.ir.program import Program, Weight
from moecc.ir.tensors import Held, Store
from moecc.types import Config


def trace(source: str | Path | nn.Module | Any, *, dtype: torch.dtype | None = None) -> Program:
    """The Program of a model: local folder, hub id (configuration only), transformers configuration or nn.Module.

    dtype: what the program computes in; by default the configuration's. A folder's weights are read when a pass or a backend
    asks for them; a program from a configuration or a hub id has none (`moecc.checkpoint.source.checkpoint_folder` fetches a hub checkpoint).
    MoeccError for anything that can't be traced, in one line.
    """
    found = skeleton(source, dtype)
    name = str(source) if isinstance(source, (str, Path)) else found.model_type
    program = program_of(capture(found), found, name)

    def build(config: Config) -> tuple[Program, nn.Module]:
        other = skeleton(config, dtype)
        return program_of(capture(other), other, name), other.model

    program.resizer = Resizer(found, build)
    return program


def program_of(exported: ExportedProgram, found: Skeleton, name: str) -> Program:
    """The Program of a captured model."""
    weights, tensors = _weights(exported)
    meta = exported.graph_module.meta
    store = _store(found)
    if isinstance(
        store, CheckpointStore
    ):  # a buffer that the checkpoint holds is the checkpoint's, not the constructor's
        tensors = {k: v for k, v in tensors.items() if k not in store}
    program = Program(
        exported.graph_module, weights, Held(tensors), store, exported, found.config, name, _dtype(found.model),
        meta["restriction"], tuple(meta["unreached"]),
    )  # fmt: skip
    for node in program.graph.nodes:
        if node.op == "placeholder":
            node.meta["layer"], node.meta["path"] = 0, ""
    fold_weight_graphs(program)
    program.verify()
    return program


def _weights(exported: ExportedProgram) -> tuple[dict[str, Weight], dict[str, Tensor]]:
    """Placeholder -> weight, and the tensors that the trace itself captured (buffers and lifted constants)."""
    weights: dict[str, Weight] = {}
    tensors: dict[str, Tensor] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            continue
        assert spec.target is not None
        weights[spec.arg.name] = Weight(spec.target)
        if spec.kind != InputKind.PARAMETER:
            held = exported.constants.get(spec.target, exported.state_dict.get(spec.target))
            if isinstance(held, Tensor):
                tensors[spec.target] = held.detach()
    return weights, tensors


def _store(found: Skeleton) -> Store | None:
    if found.folder is None:
        return ModuleStore(found.model) if found.mode is None else None
    has_weights = any(found.folder.glob("*.safetensors"))
    return CheckpointStore(found.folder, found.model) if has_weights else None


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

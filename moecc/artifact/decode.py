"""The float weights that an artifact stands for, under the names and in the layout of its family.

1. a coded projection is decoded to the canonical matrices [E, N, K] (`moecc.ir.vq4`), a quantized
   linear to [N, K]
2. the float model's trace knows each canonical operand as a graph over its parameters (a
   transposition, interleaved rows). The same graph, run on the numbers of elements, says which
   element of which parameter each canonical weight is
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from moecc.checkpoint.files import LazyTensor
from moecc.checkpoint.values import kept_dtype
from moecc.errors import MoeccError
from moecc.frontend.capture import capture
from moecc.frontend.config import as_if_plain, read_config
from moecc.frontend.skeleton import skeleton
from moecc.frontend.trace import program_of, trace
from moecc.ir import ops, vq4
from moecc.ir.moe import Projection, operand
from moecc.ir.program import Program


def float_tensors(folder: Path, dtype: torch.dtype | None = None) -> dict[str, LazyTensor]:
    """The tensors of the float checkpoint by name, each computed when it is read.

    dtype: of floating tensors but those that the family keeps in float32; by default decoded ones
    have the configuration's and others the one that they are stored in. Raise MoeccError if the
    family has no place for something that is stored: offsets, where it has no biases.
    """
    program = trace(folder)
    found = skeleton(as_if_plain(read_config(folder)[0]))
    plain = program_of(capture(found), found, str(folder), store=None)
    return _Decoder(program, plain, found.model, dtype).tensors()


class _Decoder:
    """Gives the float model `plain`, traced from `model`, the weights that `program` stands for."""

    def __init__(
        self, program: Program, plain: Program, model: nn.Module, asked: torch.dtype | None
    ):
        self.program, self.plain, self.model, self.asked = program, plain, model, asked
        self.dtype = asked or program.dtype
        self.declared = model.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.declared.items()}

    def tensors(self) -> dict[str, LazyTensor]:
        """Experts and linears decoded, everything else as it is stored."""
        store = self.program.store
        if store is None:
            raise MoeccError(f"{self.program.source} has no weights; give a complete artifact")
        found: dict[str, LazyTensor] = {}
        coded: set[str] = set()
        dense = {m.path: m for m in self.plain.moe_layers()}
        for moe in self.program.moe_layers():
            if moe.node.target is ops.VQ_EXPERTS:
                for ours, theirs in zip(moe.projections, dense[moe.path].projections, strict=True):
                    found |= self.projection(ours, theirs)
                    coded |= {f"{ours.path}.{part}" for part in vq4.TENSORS}
        for node in self.program.graph.nodes:
            if node.op == "call_function" and node.target is ops.Q_LINEAR:
                path, tensor = self.linear(node)
                found[f"{path}.weight"] = tensor
                coded |= {f"{path}.{part}" for part in ("weight", "scale", "zero")}
        for name in store.names():
            if name in coded or name in store.tied:
                continue
            kept = store.dtype(name)
            if self.asked is not None and name in self.declared:
                kept = kept_dtype(self.model, name, self.declared[name], self.asked)
            read = partial(_as, partial(store.read, name), kept)
            found[name] = LazyTensor(tuple(store.shape(name)), kept, read)
        return found

    def projection(self, ours: Projection, theirs: Projection) -> dict[str, LazyTensor]:
        """The parameters behind one projection and its bias, zeros if a pass removed that."""
        if ours.operand("bias") is not None and theirs.operand("bias") is None:
            raise MoeccError(
                f"{ours.path}: offsets are stored, and its family has no biases to hold them; "
                "compile it without offsets"
            )
        found = {}
        for part in ("", "bias"):
            for source in self.plain.parameters_of(theirs, part):
                read = partial(self.parameter, source, ours, theirs, part)
                found[source] = LazyTensor(self.shapes[source], self.dtype, read)
        return found

    def parameter(self, source: str, ours: Projection, theirs: Projection, part: str) -> Tensor:
        """The parameter `source`, one of those that the float model computes a part of the
        projection `theirs` from.
        """
        node = theirs.operand(part)
        assert node is not None
        canonical = self.bias(ours) if part else self.dense(ours)
        weight = self.plain.weights[node.name]
        if weight.recipe is None:
            return canonical.to(self.dtype).contiguous()
        numbers, start, first = [], 0, 0
        for name in weight.sources:
            size = torch.Size(self.shapes[name])
            numbers.append(torch.arange(start, start + size.numel()).view(size))
            first = start if name == source else first
            start += size.numel()
        # rows that the model never reads, such as those of experts that do nothing, stay zero
        flat = torch.zeros(start, dtype=self.dtype)
        flat[weight.recipe(*numbers).flatten()] = canonical.to(self.dtype).flatten()
        size = torch.Size(self.shapes[source])
        return flat[first : first + size.numel()].view(size).clone()

    def bias(self, projection: Projection) -> Tensor:
        """The bias [E, N] of a coded projection."""
        node = projection.operand("bias")
        return torch.zeros(projection.shape[:2]) if node is None else self.program.value(node)

    def dense(self, projection: Projection) -> Tensor:
        """The float32 matrices [E, N, K] of a coded projection."""
        nodes = {part: projection.operand(part) for part in vq4.TENSORS}
        tensors = {part: None if n is None else self.program.value(n) for part, n in nodes.items()}
        columns, side = projection.shape[2], projection.input_side
        return vq4.dense(tensors, columns, torch.float32, input_side=side)

    def linear(self, node: fx.Node) -> tuple[str, LazyTensor]:
        """The path and the matrix [N, K] of a quantized linear."""
        nodes = [operand(node, name) for name in ("weight", "scale", "zero")]
        names = [self.program.weights[n.name].name for n in nodes if n is not None]
        bits, rows = int(node.kwargs["bits"]), nodes[1].meta["val"].shape[0]  # type: ignore[arg-type, union-attr]
        columns = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]

        def read() -> Tensor:
            weight, scale, zero = map(self.program.read, names)
            return ops.dequantize_linear(weight, scale, zero, bits).to(self.dtype)

        return names[0].rpartition(".")[0], LazyTensor((rows, columns), self.dtype, read)


def _as(read: partial[Tensor], dtype: torch.dtype) -> Tensor:
    return read().to(dtype).contiguous()

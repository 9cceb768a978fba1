"""The account of every weight: what an artifact stores, and a row for each parameter that says what
became of it.

The audit has a row for every parameter of the model, a row for each tensor of the source that the
model does not use, and a row for the files' own headers. The bytes of its rows add up to the size
of the model*.safetensors files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, fx

from moecc.artifact.schema import Row
from moecc.checkpoint.files import LazyTensor
from moecc.checkpoint.roles import ROUTED, role_of
from moecc.checkpoint.schema import (
    Compression,
    DType,
    StoredExperts,
    StoredLinear,
    TensorSpec,
    TensorSpecs,
)
from moecc.errors import MoeccError
from moecc.ir import ops, vq4
from moecc.ir.moe import MoE, Projection, operand
from moecc.ir.program import Program
from moecc.ir.tensors import Store
from moecc.pipeline import storable
from moecc.pipeline.fate import KEPT, REWRITTEN, UNUSED, Fate
from moecc.pipeline.passes import Context
from moecc.types import Json

# facts that a row has a field of its own for
_FIELDS = ("fate", "error", "in_sample_error", "tokens", "starved", "fallback")


@dataclass
class Plan:
    """The tensors of an artifact, read when they are written, and what is said of them.

    compression: what config.json says; rows: the audit.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    compression: Compression = field(default_factory=Compression)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def put(self, name: str, tensor: LazyTensor) -> None:
        """Store one more tensor; MoeccError if its name is taken."""
        if name in self.tensors:
            raise MoeccError(
                f"{name}: two tensors of the artifact have this name; rename the one a pass adds"
            )
        self.tensors[name] = tensor


def plan(program: Program, original: Program, ctx: Context) -> Plan:
    """Everything that an artifact of `program` stores. original: the traced model, with the same
    store.

    What passes recorded of names that have no row goes to `ctx.notes`.
    """
    storable.require_nodes(program, original)
    storable.require_tensors(program, original)
    found = _Planner(program, original, ctx).run()
    projections = {p.path for m in program.moe_layers() for p in m.projections}
    for name in sorted(ctx.audit.keys() - projections - {r.name for r in found.rows}):
        ctx.notes.append(f"{name}: recorded, but no weight is called so: {ctx.audit[name]}")
    return found


class _Planner:
    """Plans one artifact.

    Experts first, then quantized linears, then every other tensor of the checkpoint.
    """

    def __init__(self, program: Program, original: Program, ctx: Context):
        assert program.store is not None
        self.program, self.original, self.ctx = program, original, ctx
        self.store: Store = program.store
        self.found = Plan()
        self.taken: set[str] = set()  # parameters that something compressed stands for
        # parameter -> why a pass left the projection that it is a part of in float
        self.fallbacks: dict[str, str] = {
            name: ctx.audit[projection.path]["fallback"]
            for moe in original.moe_layers()
            for projection in moe.projections
            if "fallback" in ctx.audit.get(projection.path, {})
            for name in original.parameters_of(projection, "", "bias")
        }

    def run(self) -> Plan:
        for moe in self.program.moe_layers():
            if moe.node.target is ops.VQ_EXPERTS:
                self.experts(moe)
            elif moe.node.target is not ops.EXPERTS:
                raise MoeccError(
                    f"{moe.path}: still {moe.node.target} after the last pass; code what is left"
                )
        for node in self.program.graph.nodes:
            if node.op == "call_function" and node.target is ops.Q_LINEAR:
                self.linear(node)
        self.rest()
        self.guard()
        for name in (*self.store.unexpected, *self.store.ignored):
            reason = "no parameter of the model takes it"
            self.add(Row(name, "not part of the model", (), UNUSED, 0, fallback=reason))
        return self.found

    def add(self, row: Row) -> None:
        self.found.rows.append(row)

    # ---- experts

    def experts(self, moe: MoE) -> None:
        before = next(m for m in self.original.moe_layers() if m.path == moe.path)
        specs: dict[str, TensorSpecs] = {}
        removed: list[str] = []
        for projection, dense in zip(moe.projections, before.projections, strict=True):
            stored = {
                part: node for part in vq4.TENSORS if (node := projection.operand(part)) is not None
            }
            specs[projection.name] = {part: _spec(node) for part, node in stored.items()}
            for part, node in stored.items():
                self.found.put(f"{projection.path}.{part}", self.held(node))
            sources = self.original.parameters_of(dense, "", "bias")
            self.coded_rows(projection, dense, sources, stored)
            removed += [s for s in sources if s not in removed]
        self.taken.update(removed)
        prefix = moe.path + "."
        self.found.compression.experts[moe.path] = StoredExperts(
            moe.attributes, [name.removeprefix(prefix) for name in removed], **specs
        )

    def coded_rows(
        self,
        projection: Projection,
        dense: Projection,
        sources: list[str],
        stored: dict[str, fx.Node],
    ) -> None:
        """Add the rows of a projection; the first of its parameters accounts for all of it."""
        facts = self.ctx.audit.get(projection.path, {})
        first, *others = sources
        parts = {part: _nbytes(node) for part, node in stored.items()}
        nbytes = sum(parts.values())
        coded = Fate("coded", bits=projection.bits(), format="vq4")
        row = self.row(first, _fate(facts, coded), nbytes, facts)
        row.bits = 8 * nbytes / dense.weights
        row.details = {"bytes": parts, "source_bits": self.source_bits(first)} | row.details
        self.place(row, projection)
        row.details |= _details(self.ctx.audit.get(first, {}))
        self.add(row)
        for name in others:
            part = self.row(name, Fate("part", of=first), 0, self.ctx.audit.get(name, {}))
            self.place(part, projection)
            part.in_sample_error = row.in_sample_error
            part.error, part.tokens, part.starved = row.error, row.tokens, row.starved
            self.add(part)

    def place(self, row: Row, projection: Projection) -> None:
        """Say which layer and projection a row is of."""
        row.role, row.experts, row.projection = ROUTED, projection.moe.path, projection.name
        row.layer = projection.moe.layer - 1

    # ---- linears

    def linear(self, node: fx.Node) -> None:
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        # held as <path>.codes, stored as the module's own `weight`
        path = self.program.weights[weight.name].name.rpartition(".")[0]
        stored = {
            part: found
            for part in ("weight", "scale", "zero")
            if (found := operand(node, part)) is not None
        }
        for part, found in stored.items():
            self.found.put(f"{path}.{part}", self.held(found))
        specs = {part: _spec(found) for part, found in stored.items()}
        if (bias := operand(node, "bias")) is not None:  # stored with the rest
            specs["bias"] = _spec(bias, self.left(self.program.weights[bias.name].name).dtype)
        bits, name = cast(Literal[4, 8], node.kwargs["bits"]), f"{path}.weight"
        self.found.compression.linears[path] = StoredLinear(bits, specs)
        nbytes, facts = sum(map(_nbytes, stored.values())), self.ctx.audit.get(name, {})
        columns, groups = self.store.shape(name)[1], specs["scale"][0][1]
        grouped = Fate("grouped", bits=bits, group=columns // groups)
        row = self.row(name, _fate(facts, grouped), nbytes, facts)
        row.bits = 8 * nbytes / math.prod(row.shape)
        row.details = {"source_bits": self.source_bits(name)} | row.details
        self.add(row)
        self.taken.add(name)

    def guard(self) -> None:
        """Put an empty tensor where programs that don't know moecc look for a dense one."""
        compression = self.found.compression
        for path, entry in list(compression.experts.items())[:1]:
            name = f"{path}.{entry.remove[0]}"
            self.found.put(name, LazyTensor((0,), torch.uint8, _nothing))
            compression.guard.append(name)

    # ---- everything else

    def rest(self) -> None:
        """Every other tensor of the checkpoint, as it was or as a pass left it."""
        dense = self.dense_experts()
        for name in self.store.names():
            owner = self.store.tied.get(name, name)
            if name in self.taken:
                continue
            if owner != name:
                shape = tuple(self.store.shape(name))
                self.add(Row(name, role_of(name), shape, Fate("tied", of=owner), 0))
                continue
            projection = dense.get(name)
            recorded = {} if projection is None else self.ctx.audit.get(projection.path, {})
            facts = {**recorded, **self.ctx.audit.get(name, {})}
            rewritten, tensor = name in self.program.tensors, self.left(name)
            self.found.put(name, tensor)
            fate = _fate(facts, REWRITTEN if rewritten else KEPT)
            row = self.row(name, fate, tensor.nbytes, facts)
            row.bits = 8 * tensor.nbytes / max(math.prod(row.shape), 1)
            if projection is not None:
                self.place(row, projection)
            if name in self.program.unreached:
                row.fallback = "no path of the trace reads it"
            if rewritten or facts:
                row.details = {"source_bits": self.source_bits(name)} | row.details
            self.add(row)

    def dense_experts(self) -> dict[str, Projection]:
        """The projection of the first parameter behind each one that is left dense."""
        dense = [m for m in self.program.moe_layers() if m.node.target is ops.EXPERTS]
        return {self.program.parameters_of(p, "")[0]: p for m in dense for p in m.projections}

    # ---- pieces

    def row(self, name: str, fate: Fate, nbytes: int, facts: Json) -> Row:
        """A row of a parameter with what passes recorded of it."""
        return Row(
            name,
            role_of(name),
            tuple(self.store.shape(name)),
            fate,
            nbytes,
            error=facts.get("error"),
            in_sample_error=facts.get("in_sample_error"),
            tokens=facts.get("tokens"),
            starved=facts.get("starved") or {},
            fallback=facts.get("fallback") or self.fallbacks.get(name, ""),
            details=_details(facts),
        )

    def source_bits(self, name: str) -> int:
        """Bits per weight that a parameter takes in the source."""
        return 8 * self.store.dtype(name).itemsize

    def held(self, node: fx.Node) -> LazyTensor:
        """Give the weight behind a placeholder; it may lie on disk until it is written."""
        val: Tensor = node.meta["val"]
        name = self.program.weights[node.name].name
        return LazyTensor(tuple(val.shape), val.dtype, partial(self.program.read, name))

    def left(self, name: str) -> LazyTensor:
        """Give a weight that nothing compressed stands for."""
        return self.rewritten(name) if name in self.program.tensors else self.kept(name)

    def kept(self, name: str) -> LazyTensor:
        """Give a weight of the source as it is."""
        shape = tuple(self.store.shape(name))
        return LazyTensor(shape, self.store.dtype(name), partial(self.store.read, name))

    def rewritten(self, name: str) -> LazyTensor:
        """Give a weight that a pass changed.

        It has the source's type if that holds it exactly, else the program's.
        """
        program = self.program
        dtype = program.stored_dtype(name) if name in program.rounded else program.dtype
        shape = tuple(self.store.shape(name))
        return LazyTensor(shape, dtype, lambda: program.tensors[name].to(dtype).contiguous())


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _fate(facts: Json, default: Fate) -> Fate:
    return Fate.of_json(facts["fate"]) if "fate" in facts else default


def _details(facts: Json) -> Json:
    """The facts that a row has no field of its own for."""
    return {k: v for k, v in facts.items() if k not in _FIELDS}


def _nbytes(node: fx.Node) -> int:
    val: Tensor = node.meta["val"]
    return int(val.numel() * val.element_size())


def _spec(node: fx.Node, dtype: torch.dtype | None = None) -> TensorSpec:
    val: Tensor = node.meta["val"]
    return tuple(val.shape), cast(DType, str(dtype or val.dtype).removeprefix("torch."))

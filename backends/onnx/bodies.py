"""What `moecc::VQExperts` and `moecc::Experts` mean in standard operators: the functions that the model file carries.

A runtime without moecc's op library runs these. There are two forms, chosen by the number of routes P = T k at run time:

  few routes    one by one, by lookup tables: every group of v inputs is multiplied with all 256 centroids, and codes pick from
                the products. Nothing is decoded. At 3 bit a table has every centroid with each of 16 patterns of signs
  many routes   a loop over the experts that were chosen: by tables where an expert has few tokens, else it is decoded and
                multiplied with them

One function serves all layers of a model. What some layers have and others lack is stored empty there: no rows, zeros stand in
for. The decoding depends on what is routed, so that no runtime folds it into dense weights.

Shapes as in `moecc.ir.ops`; codes and signs in the order of `layout`; scales, biases and bases float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import onnx_ir as ir
from onnx_ir import tensor_adapters
from onnx_ir.tape import Tape
from torch import Tensor

from moecc.ir import vq4

DOMAIN, VERSION = "moecc", 1
FEW_ROUTES = 16  # above, an expert that several tokens chose is worth reading once
FEW_TOKENS, FEW_WITH_SIGNS = 4, 2  # of one expert: decoding costs as much as so many lookups
ROUTED = ("x", "topk_index", "topk_weight")
DENSE = ("gate_up", "down", "gate_up_bias", "down_bias", "post_norm")
STRIPES = 8  # in which an expert is decoded: a runtime shares rows out among its threads
_FLOAT, _UINT8, _INT32, _INT64 = 1, 2, 6, 7  # as Cast names them


def coded_inputs() -> list[str]:
    """The inputs of VQExperts, in order."""
    return [*ROUTED, *(f"{p}_{t}" for p in ("gate_up", "down") for t in vq4.TENSORS), "post_norm"]


class Presence(NamedTuple):
    """Whether some, and whether all layers of the model have an operand."""

    some: bool
    all: bool


@dataclass(frozen=True)
class Structure:
    """What the layers of one model have in common: all that a function body depends on."""

    attributes: dict[str, Any]  # act, gate, alpha, limit, eps
    present: dict[str, Presence]  # operand -> which layers have it
    ragged: bool = (
        True  # whether some sizes are no multiples of 64: then inputs are padded and outputs cut
    )

    def has(self, name: str) -> bool:
        return name in self.present and self.present[name].some


class Ops:
    """Nodes of a graph under construction: `op.MatMul(a, b)`, `op.Gather(x, i, axis=0)`."""

    def __init__(self, numbers: Iterator[int] | None = None) -> None:
        self.tape, self.numbers = Tape(), numbers or itertools.count()

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        def make(*inputs: ir.Value | None, **attributes: Any) -> ir.Value:
            return self.several(op_type, 1, *inputs, **attributes)[0]

        return make

    def several(
        self, op_type: str, count: int, *inputs: ir.Value | None, **attributes: Any
    ) -> Sequence[ir.Value]:
        """The outputs of a node that has more than one."""
        outputs = [self.value() for _ in range(count)]
        return self.tape.op_multi_out(op_type, inputs, attributes, outputs=outputs)

    def value(self, dtype: ir.DataType | None = None, shape: ir.Shape | None = None) -> ir.Value:
        """One that nothing computes yet; its name is new in this graph, those within it and those around it."""
        type_ = None if dtype is None else ir.TensorType(dtype)
        return ir.Value(name=f"v{next(self.numbers)}", type=type_, shape=shape)

    def ints(self, *values: int) -> ir.Value:
        return self.Constant(value_ints=values)

    def number(self, value: int | float) -> ir.Value:
        return self.Constant(**{"value_int" if isinstance(value, int) else "value_float": value})

    def size(self, x: ir.Value, axis: int) -> ir.Value:
        """[1]: the size of one dimension."""
        return self.Shape(x, start=axis, end=axis + 1)

    def shaped(self, x: ir.Value, *sizes: int | ir.Value) -> ir.Value:
        """Reshape to sizes that are numbers or [1] values."""
        if all(isinstance(s, int) for s in sizes):
            return self.Reshape(x, self.ints(*sizes))  # type: ignore[arg-type]
        parts = [self.ints(s) if isinstance(s, int) else s for s in sizes]
        return self.Reshape(x, self.Concat(*parts, axis=0), allowzero=1)

    def transposed(self, x: ir.Value) -> ir.Value:
        return self.Transpose(x, perm=[1, 0])

    def graph(
        self,
        build: Callable[[Ops], Sequence[ir.Value]],
        inputs: Sequence[ir.Value] = (),
        name: str = "branch",
    ) -> ir.Graph:
        """A subgraph (of If, Loop): what `build` makes."""
        inner = Ops(self.numbers)
        outputs = build(inner)
        return ir.Graph(inputs, outputs, nodes=inner.tape.nodes, name=name)

    def each(self, count: ir.Value, build: Callable[[Ops, ir.Value], ir.Value]) -> ir.Value:
        """What `build(op, i)` makes for i below `count`, one after the other along a new first dimension."""
        i, going = (
            self.value(ir.DataType.INT64, ir.Shape([])),
            self.value(ir.DataType.BOOL, ir.Shape([])),
        )
        body = self.graph(lambda op: [op.Identity(going), build(op, i)], [i, going], "each")
        return self.Loop(count, None, body=body)

    def choose(
        self, condition: ir.Value, yes: Callable[[Ops], ir.Value], no: Callable[[Ops], ir.Value]
    ) -> ir.Value:
        return self.If(
            condition,
            then_branch=self.graph(lambda op: [yes(op)]),
            else_branch=self.graph(lambda op: [no(op)]),
        )


def put_instead(model: ir.Model, node: ir.Node, op: Ops, y: ir.Value) -> None:
    """Put the nodes of `op` where `node` was in a model's graph; `y` is what it made."""
    old, name = node.outputs[0], node.outputs[0].name
    for made in op.tape.nodes:
        for value in made.outputs:
            value.name = f"{node.name}.{value.name}"
        model.graph.insert_before(node, made)
    y.shape, y.type = old.shape, old.type
    old.replace_all_uses_with(y, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    y.name = name


def lazy(
    model: ir.Model, name: str, shape: Sequence[int], dtype: ir.DataType, make: Callable[[], Tensor]
) -> ir.Value:
    """A new initializer of a model's graph; `make()` is called when it is written."""
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    give(value, make)
    model.graph.register_initializer(value)
    return value


def give(value: ir.Value, make: Callable[[], Tensor]) -> None:
    """Let an initializer, whose shape and dtype are known, be what `make()` returns when it is written."""
    shape, dtype = value.shape, value.dtype
    assert shape is not None and dtype is not None
    value.const_value = ir.LazyTensor(
        lambda: tensor_adapters.TorchTensor(make(), name=value.name),
        dtype=dtype,
        shape=shape,
        name=value.name,
    )


def vq_experts_function(structure: Structure, opset: int) -> ir.Function:
    """The body of moecc::VQExperts for a model of this structure."""

    def body(op: Ops, inputs: dict[str, ir.Value]) -> ir.Value:
        layer = _Layer(structure, inputs)
        few = op.LessOrEqual(op.Size(inputs["topk_index"]), op.number(FEW_ROUTES))
        return op.choose(few, layer.few, layer.many)

    return _function("VQExperts", coded_inputs(), structure, opset, body)


def experts_function(structure: Structure, opset: int) -> ir.Function:
    """The body of moecc::Experts, the experts of a layer that was left dense."""
    return _function(
        "Experts",
        [*ROUTED, *DENSE],
        structure,
        opset,
        lambda op, inputs: _Layer(structure, inputs).many(op),
    )


def _function(
    name: str,
    names: list[str],
    structure: Structure,
    opset: int,
    body: Callable[[Ops, dict[str, ir.Value]], ir.Value],
) -> ir.Function:
    values = {n: ir.Value(name=n) for n in names}
    op = Ops()
    used = dict(values)
    for n in ("x", *DENSE):  # float16 or float32: computed in float32
        if n in used and (n == "x" or structure.has(n)):
            used[n] = op.Cast(values[n], to=_FLOAT)
    y = op.CastLike(body(op, used), values["x"])
    graph = ir.Graph(list(values.values()), [y], nodes=op.tape.nodes, opset_imports={"": opset})
    attributes = [ir.Attr(k, ir.AttributeType.UNDEFINED, None) for k in structure.attributes]
    return ir.Function(DOMAIN, name, graph=graph, attributes=attributes)


class _Layer:
    """One MoE layer inside a function: its inputs by name, float32 where they are not codes."""

    def __init__(self, structure: Structure, inputs: dict[str, ir.Value]):
        self.structure, self.inputs = structure, inputs
        self.x, self.index, self.weight = (inputs[n] for n in ROUTED)

    def get(self, name: str) -> ir.Value | None:
        return self.inputs[name] if self.structure.has(name) else None

    # ---- few routes

    def few(self, op: Ops) -> ir.Value:
        """[T, D] by lookup tables, all routes at once: rows [P, ...], route p of token p / k."""
        routes = op.shaped(self.index, -1)  # [P]
        k = op.size(self.index, 1)
        token = op.Div(op.Range(op.number(0), op.Size(self.index), op.number(1)), k)  # [P]
        rows = self._looked_up(op, "gate_up", op.Gather(self.x, token), routes)
        rows = self._plus_shared(op, "gate_up", rows, self.x, routes, token)
        hidden = gate(op, rows, self.structure.attributes)
        y = self._looked_up(op, "down", hidden, routes)
        weight = op.shaped(self.weight, -1, 1)
        if self.structure.has("post_norm"):
            y = self._plus_shared(op, "down", y, hidden, routes, None)
            y = self._post_norm(op, y)
            return self._per_token(op, op.Mul(y, weight))
        y = self._per_token(op, op.Mul(y, weight))
        return self._plus_shared_down(op, y, op.Mul(hidden, weight), routes)

    def _per_token(self, op: Ops, rows: ir.Value) -> ir.Value:
        """[P, n] -> [T, n], summed over a token's routes."""
        sizes = [
            op.size(self.index, 0),
            op.size(self.index, 1),
            op.size(rows, 1),
        ]  # -1 would not do for no tokens
        return op.ReduceSum(op.shaped(rows, *sizes), op.ints(1), keepdims=0)

    def _looked_up(self, op: Ops, part: str, x: ir.Value, which: ir.Value) -> ir.Value:
        """x [P, K] through matrix which[p] of a coded stack, with bias: [P, N]."""
        parts = self._parts(op, part, x)

        def route(op: Ops, p: ir.Value) -> ir.Value:
            expert = op.Gather(which, p)
            return self._pick(
                op,
                op.Gather(parts, p),
                self._entries(op, part, expert),
                self._picked(op, part, expert),
            )

        scale = self.inputs[f"{part}_scale"]
        y = self._cut(op, op.each(op.Squeeze(op.size(x, 0)), route), op.size(scale, 1))
        y = op.Mul(y, op.Gather(scale, which))
        bias = self.get(f"{part}_bias")
        return y if bias is None else op.Add(y, op.Gather(bias, which))

    # What picks the v weights of a group is a code, below M = 256; at 3 bit a code and its four signs, below M = 4096.

    def _parts(self, op: Ops, part: str, x: ir.Value) -> ir.Value:
        """x [P, K] by groups: [P, J, v]."""
        codes, v = self.inputs[f"{part}_codes"], op.size(self.inputs[f"{part}_codebook"], 2)
        groups = op.Mul(op.size(codes, 1), op.size(codes, 3))
        return op.shaped(self._padded(op, x, op.Mul(groups, v)), op.size(x, 0), groups, v)

    def _entries(self, op: Ops, part: str, which: ir.Value) -> ir.Value:
        """The weights that may be picked in one matrix: [v, M]."""
        codebook = self.inputs[f"{part}_codebook"]
        last = op.Sub(
            op.Squeeze(op.size(codebook, 0)), op.number(1)
        )  # an expert has its own, or there is one for all
        entries = op.transposed(op.Cast(op.Gather(codebook, op.Min(which, last)), to=_FLOAT))
        if not self.structure.has(f"{part}_signs"):
            return entries
        v = op.size(codebook, 2)
        every = [float(pattern >> i & 1) for i in range(4) for pattern in range(16)]
        bits = op.Slice(
            op.shaped(op.Constant(value_floats=every), 4, 16, 1), op.ints(0), v, op.ints(0)
        )
        plain = op.Sub(op.number(1.0), op.Add(bits, bits))
        signed = op.Sub(op.Mul(op.Unsqueeze(entries, op.ints(1)), plain), bits)  # p, or -1 - p
        return op.shaped(signed, v, 4096)

    def _picked(self, op: Ops, part: str, which: ir.Value) -> ir.Value:
        """Which of them a matrix has: i32 [J, Np], below M."""
        codes = op.Gather(self.inputs[f"{part}_codes"], which)  # [Kp / 64, Np / 64, S, 64]
        picked = op.Cast(self._by_group(op, codes), to=_INT32)
        if not self.structure.has(f"{part}_signs"):
            return picked
        signs = op.Cast(
            self._by_group(op, self._signs(op, f"{part}_signs", which, codes)), to=_INT32
        )
        return op.Add(picked, op.Mul(signs, op.Cast(op.number(256), to=_INT32)))

    def _by_group(self, op: Ops, blocks: ir.Value) -> ir.Value:
        """[Kp / 64, Np / 64, S, 64] -> [J, Np]."""
        groups, rows = (
            op.Mul(op.size(blocks, 0), op.size(blocks, 2)),
            op.Mul(op.size(blocks, 1), op.size(blocks, 3)),
        )
        return op.shaped(
            op.Transpose(blocks, perm=[0, 2, 1, 3]), groups, rows
        )  # not -1, for a mean may be empty

    def _signs(self, op: Ops, name: str, which: ir.Value, codes: ir.Value) -> ir.Value:
        """Four signs a code: u8 [Kp / 64, Np / 64, S, 64], below 16."""
        own = op.Gather(self.inputs[name], which)  # [Kp / 64, Np / 64, 16, 32]
        low = op.BitwiseAnd(own, op.Cast(op.number(15), to=_UINT8))
        high = op.BitShift(own, op.Cast(op.number(4), to=_UINT8), direction="RIGHT")
        signs = op.Concat(low, high, axis=-1)  # rows 0..31, then 32..63
        if self.structure.present[name].all:
            return signs
        # a layer without signs has none for any row, and maybe groups of two
        rows = op.Sub(op.size(codes, 1), op.size(signs, 1))
        groups = op.Sub(op.size(codes, 2), op.size(signs, 2))
        return op.Pad(signs, op.Concat(op.ints(0, 0, 0, 0, 0), rows, groups, op.ints(0), axis=0))

    def _pick(self, op: Ops, parts: ir.Value, entries: ir.Value, picked: ir.Value) -> ir.Value:
        """One input [J, v] through a matrix: [Np]. All that may be picked is multiplied with it first.

        The sum over groups is a product with ones: ReduceSum takes 15 times as long."""
        ones = op.Expand(op.number(1.0), op.Concat(op.ints(1), op.size(picked, 0), axis=0))
        products = op.GatherElements(op.MatMul(parts, entries), picked, axis=1)
        return op.Squeeze(op.MatMul(ones, products), op.ints(0))

    def _plus_shared(
        self, op: Ops, part: str, y: ir.Value, x: ir.Value, routes: ir.Value, token: ir.Value | None
    ) -> ir.Value:
        """y [P, N] plus what the experts share applied to each route: x [T, K], by `token`, or [P, K]."""

        def spread(rows: ir.Value) -> ir.Value:
            return rows if token is None else op.Gather(rows, token)

        basis, coef, coef_scale = (self.get(f"{part}_{n}") for n in ("basis", "coef", "coef_scale"))
        if basis is not None and coef is not None and coef_scale is not None:
            own, own_scale = (
                op.Cast(op.Gather(coef, routes), to=_FLOAT),
                op.Gather(coef_scale, routes),
            )
            if part == "gate_up":  # coef [P, N, r]
                low = op.Unsqueeze(spread(op.MatMul(x, op.transposed(basis))), op.ints(2))
                y = op.Add(y, op.Mul(op.Squeeze(op.MatMul(own, low), op.ints(2)), own_scale))
            else:  # coef [P, r, F]
                low = op.Mul(
                    op.Squeeze(op.MatMul(own, op.Unsqueeze(x, op.ints(2))), op.ints(2)), own_scale
                )
                y = op.Add(y, op.MatMul(low, basis))
        return self._plus_mean(op, part, y, lambda: spread(self._mean(op, part, x)))

    def _plus_shared_down(
        self, op: Ops, y: ir.Value, hidden: ir.Value, routes: ir.Value
    ) -> ir.Value:
        """y [T, D] plus what the experts share applied once a token; hidden [P, F] is weighted by the routes."""
        basis, coef, coef_scale = (self.get(f"down_{n}") for n in ("basis", "coef", "coef_scale"))
        if basis is not None and coef is not None and coef_scale is not None:
            own = op.Cast(op.Gather(coef, routes), to=_FLOAT)
            low = op.Squeeze(op.MatMul(own, op.Unsqueeze(hidden, op.ints(2))), op.ints(2))
            low = self._per_token(op, op.Mul(low, op.Gather(coef_scale, routes)))
            y = op.Add(y, op.MatMul(low, basis))
        return self._plus_mean(
            op, "down", y, lambda: self._mean(op, "down", self._per_token(op, hidden))
        )

    def _plus_mean(self, op: Ops, part: str, y: ir.Value, mean: Callable[[], ir.Value]) -> ir.Value:
        return (
            op.Add(y, self._whole(op, f"{part}_{vq4.MEAN}codes", mean(), y))
            if self._has_mean(part)
            else y
        )

    def _has_mean(self, part: str) -> bool:
        return self.structure.has(f"{part}_{vq4.MEAN}codes")

    def _whole(self, op: Ops, name: str, x: ir.Value, like: ir.Value) -> ir.Value:
        """x [n, N], which has no columns where a layer lacks the operand `name`: then zeros, as many as `like` has."""
        if self.structure.present[name].all:
            return x
        return op.Pad(
            x, op.Concat(op.ints(0, 0, 0), op.Sub(op.size(like, 1), op.size(x, 1)), axis=0)
        )

    # ---- many routes

    def many(self, op: Ops) -> ir.Value:
        """[T, D] expert by expert; those that no token chose are left out."""
        chosen = op.Unique(op.shaped(self.index, -1))
        shared_in = self._shared_in(op)
        parts = [op.Expand(op.number(0.0), op.Shape(self.x)), *self._sums(op)]
        i, going = (
            op.value(ir.DataType.INT64, ir.Shape([])),
            op.value(ir.DataType.BOOL, ir.Shape([])),
        )
        carried = [op.value(ir.DataType.FLOAT) for _ in parts]

        def body(op: Ops) -> list[ir.Value]:
            expert = op.Gather(chosen, i)
            return [op.Identity(going), *self._one(op, expert, shared_in, carried)]

        graph = op.graph(body, [i, going, *carried], "experts")
        done = op.several("Loop", len(parts), op.Size(chosen), None, *parts, body=graph)
        y, sums = done[0], dict(zip(self._sum_names(), done[1:], strict=True))
        if "low" in sums:
            basis = self.inputs["down_basis"]
            y = op.Add(y, op.MatMul(sums["low"], basis))
        if "hidden" in sums:
            y = self._plus_mean(op, "down", y, lambda: self._mean(op, "down", sums["hidden"]))
        return y

    def _sum_names(self) -> list[str]:
        """What is summed over a token's experts besides the output, because the shared part is applied once a token."""
        if self.structure.has("post_norm"):
            return []
        names = {"low": "down_basis", "hidden": f"down_{vq4.MEAN}codes"}
        return [n for n, operand in names.items() if self.structure.has(operand)]

    def _sums(self, op: Ops) -> list[ir.Value]:
        zero, tokens = op.number(0.0), op.size(self.x, 0)
        widths = {
            "low": lambda: op.size(self.inputs["down_basis"], 0),
            "hidden": lambda: self._intermediate(op),
        }
        return [op.Expand(zero, op.Concat(tokens, widths[n](), axis=0)) for n in self._sum_names()]

    def _intermediate(self, op: Ops) -> ir.Value:
        rows = op.size(self.inputs["gate_up_scale"], 1)
        return rows if self.structure.attributes["gate"] == "none" else op.Div(rows, op.ints(2))

    def _shared_in(self, op: Ops) -> dict[str, ir.Value]:
        """Of gate_up's shared part what is the same for all experts: basis x [T, r]."""
        basis = self.get("gate_up_basis")
        found = {} if basis is None else {"low": op.MatMul(self.x, op.transposed(basis))}
        if self._has_mean("gate_up"):
            found["mean"] = self._mean(op, "gate_up", self.x)
        return found

    def _one(
        self, op: Ops, expert: ir.Value, shared_in: dict[str, ir.Value], carried: list[ir.Value]
    ) -> list[ir.Value]:
        """The sums after one expert has added its part."""
        hit = op.Equal(self.index, expert)
        tokens = op.Squeeze(
            op.NonZero(op.ReduceMax(op.Cast(hit, to=_INT64), op.ints(1), keepdims=0)), op.ints(0)
        )
        weight = op.ReduceSum(op.Where(hit, self.weight, op.number(0.0)), op.ints(1), keepdims=1)
        weight = op.Gather(weight, tokens)  # [n, 1]
        rows = self._projected(op, "gate_up", op.Gather(self.x, tokens), expert)
        if "low" in shared_in:
            coef = op.Cast(op.Gather(self.inputs["gate_up_coef"], expert), to=_FLOAT)
            low = op.MatMul(op.Gather(shared_in["low"], tokens), op.transposed(coef))
            rows = op.Add(rows, op.Mul(low, op.Gather(self.inputs["gate_up_coef_scale"], expert)))
        if self._has_mean("gate_up"):
            rows = self._plus_mean(
                op, "gate_up", rows, lambda: op.Gather(shared_in["mean"], tokens)
            )
        hidden = gate(op, rows, self.structure.attributes)
        y = self._projected(op, "down", hidden, expert)
        low_out = self._low_out(op, hidden, expert)
        if self.structure.has("post_norm"):
            if low_out is not None:
                y = op.Add(y, op.MatMul(low_out, self.inputs["down_basis"]))
            y = self._plus_mean(op, "down", y, lambda: self._mean(op, "down", hidden))
            y = self._post_norm(op, y)
        parts = {"low": low_out, "hidden": hidden}
        added = [y, *(parts[n] for n in self._sum_names())]
        at = op.Unsqueeze(tokens, op.ints(1))
        return [
            op.ScatterND(total, at, op.Mul(part, weight), reduction="add")
            for total, part in zip(carried, added, strict=True)
        ]

    def _low_out(self, op: Ops, hidden: ir.Value, expert: ir.Value) -> ir.Value | None:
        coef, scale = self.get("down_coef"), self.get("down_coef_scale")
        if coef is None or scale is None:
            return None
        own = op.Cast(op.Gather(coef, expert), to=_FLOAT)
        return op.Mul(op.MatMul(hidden, op.transposed(own)), op.Gather(scale, expert))

    def _projected(self, op: Ops, part: str, x: ir.Value, expert: ir.Value) -> ir.Value:
        """x [n, K] through one expert, decoded whole, with bias: [n, N]."""
        if part in self.inputs:  # dense
            y = op.MatMul(x, op.transposed(op.Gather(self.inputs[part], expert)))
        else:
            y = op.Mul(
                self._times(op, part, x, expert), op.Gather(self.inputs[f"{part}_scale"], expert)
            )
        bias = self.get(f"{part}_bias")
        return y if bias is None else op.Add(y, op.Gather(bias, expert))

    def _times(self, op: Ops, part: str, x: ir.Value, which: ir.Value) -> ir.Value:
        """x [n, K] through one matrix of a coded stack, not scaled: [n, N]. J = Kp / v groups.

        Decoded, component c of all groups is a matrix of its own, [J, Np]; x is taken apart alike."""
        picked, entries, parts = (
            self._picked(op, part, which),
            self._entries(op, part, which),
            self._parts(op, part, x),
        )
        tokens, v, groups, rows = (
            op.size(x, 0),
            op.size(entries, 0),
            op.size(picked, 0),
            op.size(picked, 1),
        )

        def look_up(op: Ops) -> ir.Value:
            return op.each(
                op.Squeeze(tokens),
                lambda op, t: self._pick(op, op.Gather(parts, t), entries, picked),
            )

        def decode(op: Ops) -> ir.Value:
            index = op.shaped(picked, STRIPES, op.Div(op.Mul(groups, rows), op.ints(STRIPES)))
            columns = op.Transpose(parts, perm=[2, 0, 1])

            def component(op: Ops, i: ir.Value) -> ir.Value:
                entry = op.Expand(
                    op.Gather(entries, i), op.Concat(op.ints(STRIPES), op.size(entries, 1), axis=0)
                )
                weight = op.shaped(op.GatherElements(entry, index, axis=1), groups, rows)
                return op.MatMul(op.Gather(columns, i), weight)

            return op.ReduceSum(op.each(op.Squeeze(v), component), op.ints(0), keepdims=0)

        few = op.number(FEW_WITH_SIGNS if self.structure.has(f"{part}_signs") else FEW_TOKENS)
        y = op.choose(op.LessOrEqual(op.Squeeze(tokens), few), look_up, decode)
        return self._cut(op, y, op.size(self.inputs[f"{part}_scale"], 1))

    def _padded(self, op: Ops, x: ir.Value, columns: ir.Value) -> ir.Value:
        """x [n, K] with zero columns up to `columns` [1]."""
        if not self.structure.ragged:
            return x
        return op.Pad(x, op.Concat(op.ints(0, 0, 0), op.Sub(columns, op.size(x, 1)), axis=0))

    def _cut(self, op: Ops, y: ir.Value, rows: ir.Value) -> ir.Value:
        """The first `rows` [1] columns of y [n, Np]."""
        return op.Slice(y, op.ints(0), rows, op.ints(1)) if self.structure.ragged else y

    def _mean(self, op: Ops, part: str, x: ir.Value) -> ir.Value:
        """x [n, K] through the mean, decoded: [n, N]. Its number, 0, comes from run time: a constant would be folded."""
        size = op.Size(self.index)
        stack = f"{part}_{vq4.MEAN.rstrip('_')}"
        return op.Mul(self._times(op, stack, x, op.Sub(size, size)), self.inputs[f"{stack}_scale"])

    def _post_norm(self, op: Ops, y: ir.Value) -> ir.Value:
        scaled = op.Mul(y, self.inputs["post_norm"])
        mean = op.ReduceMean(op.Mul(scaled, scaled), op.ints(-1), keepdims=1)
        return op.Div(scaled, op.Sqrt(op.Add(mean, op.number(self.structure.attributes["eps"]))))


# ---- gates


def gate(op: Ops, rows: ir.Value, attributes: dict[str, Any]) -> ir.Value:
    """`moecc.ir.gates.apply_gate` in float32."""
    act, gate = ACTIVATIONS[attributes["act"]], attributes["gate"]
    if gate == "none":
        return act(op, rows)
    g, u = op.several("Split", 2, rows, axis=-1, num_outputs=2)
    return GATES[gate](op, g, u, act, attributes["alpha"], attributes["limit"])


def _gelu(op: Ops, x: ir.Value) -> ir.Value:
    half = op.Mul(op.number(0.5), op.Add(op.number(1.0), op.Erf(op.Mul(x, op.number(0.5**0.5)))))
    return op.Mul(x, half)


def _gelu_tanh(op: Ops, x: ir.Value) -> ir.Value:
    cube = op.Mul(op.number(0.044715), op.Mul(x, op.Mul(x, x)))
    inner = op.Mul(op.number((2 / 3.141592653589793) ** 0.5), op.Add(x, cube))
    return op.Mul(x, op.Mul(op.number(0.5), op.Add(op.number(1.0), op.Tanh(inner))))


def _relu2(op: Ops, x: ir.Value) -> ir.Value:
    positive = op.Relu(x)
    return op.Mul(positive, positive)


Activation = Callable[[Ops, ir.Value], ir.Value]
ACTIVATIONS: dict[str, Activation] = {
    "silu": lambda op, x: op.Mul(x, op.Sigmoid(x)),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": lambda op, x: op.Relu(x),
    "relu2": _relu2,
    "sigmoid": lambda op, x: op.Sigmoid(x),
    "tanh": lambda op, x: op.Tanh(x),
    "identity": lambda op, x: op.Identity(x),
}


def _clamped(op: Ops, g: ir.Value, u: ir.Value, limit: float) -> tuple[ir.Value, ir.Value]:
    high, low = op.number(limit), op.number(-limit)
    return op.Min(g, high), op.Max(op.Min(u, high), low)


def _clamp(
    op: Ops, g: ir.Value, u: ir.Value, act: Activation, alpha: float, limit: float
) -> ir.Value:
    g, u = _clamped(op, g, u, limit)
    return op.Mul(act(op, g), u)


def _clamp_after(
    op: Ops, g: ir.Value, u: ir.Value, act: Activation, alpha: float, limit: float
) -> ir.Value:
    g, u = _clamped(op, act(op, g), u, limit)
    return op.Mul(g, u)


def _oai(
    op: Ops, g: ir.Value, u: ir.Value, act: Activation, alpha: float, limit: float
) -> ir.Value:
    g, u = _clamped(op, g, u, limit)
    return op.Mul(op.Add(u, op.number(1.0)), op.Mul(g, op.Sigmoid(op.Mul(g, op.number(alpha)))))


def _softcap(
    op: Ops, g: ir.Value, u: ir.Value, act: Activation, alpha: float, limit: float
) -> ir.Value:
    def capped(x: ir.Value, cap: float) -> ir.Value:
        return op.Mul(op.Tanh(op.Div(x, op.number(cap))), op.number(cap))

    return op.Mul(op.Mul(capped(g, alpha), op.Sigmoid(g)), capped(u, limit))


def _glu(
    op: Ops, g: ir.Value, u: ir.Value, act: Activation, alpha: float, limit: float
) -> ir.Value:
    return op.Mul(act(op, g), u)


GATES: dict[str, Callable[[Ops, ir.Value, ir.Value, Activation, float, float], ir.Value]] = {
    "glu": _glu,
    "f32": _glu,
    "clamp": _clamp,
    "clamp_f32": _clamp,
    "clamp_after": _clamp_after,
    "oai": _oai,
    "softcap": _softcap,
}

"""Build and change ONNX graphs: nodes, subgraphs, weights that are read when a file is written."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeAlias

import onnx_ir as ir
from onnx_ir import tensor_adapters
from onnx_ir.tape import Tape
from torch import Tensor

DOMAIN, VERSION = "moecc", 1  # of moecc's operators
MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
# The types that Cast names, as numbers.
FLOAT, UINT8, INT32, INT64 = 1, 2, 6, 7

_PREFIX = "model."  # of parameters in the module that is traced

Attribute: TypeAlias = int | float | str | Sequence[int] | Sequence[float] | ir.Attr | ir.Graph


class Opset(Protocol):
    """The operators of onnxscript, called on values of a graph under construction."""

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]: ...


class Ops:
    """Nodes of a graph under construction: `op.MatMul(a, b)`, `op.Gather(x, i, axis=0)`."""

    def __init__(self, numbers: Iterator[int] | None = None) -> None:
        self.tape, self.numbers = Tape(), numbers or itertools.count()

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        def make(*inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
            return self.several(op_type, 1, *inputs, **attributes)[0]

        return make

    def several(
        self, op_type: str, count: int, *inputs: ir.Value | None, **attributes: Attribute
    ) -> Sequence[ir.Value]:
        """Add a node of ONNX with `count` outputs and return them."""
        return self.foreign("", op_type, inputs, attributes, count)

    def foreign(
        self,
        domain: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Attribute],
        count: int = 1,
    ) -> Sequence[ir.Value]:
        """Add a node of any domain with `count` outputs and return them."""
        outputs = [self.value() for _ in range(count)]
        return self.tape.op_multi_out(op_type, inputs, attributes, domain=domain, outputs=outputs)

    def value(self, dtype: ir.DataType | None = None, shape: ir.Shape | None = None) -> ir.Value:
        """Return a value that no node computes yet.

        Its name is new in this graph, in the graphs inside it and in those around it.
        """
        type_ = None if dtype is None else ir.TensorType(dtype)
        return ir.Value(name=f"v{next(self.numbers)}", type=type_, shape=shape)

    def ints(self, *values: int) -> ir.Value:
        return self.Constant(value_ints=values)

    def number(self, value: int | float) -> ir.Value:
        return self.Constant(**{"value_int" if isinstance(value, int) else "value_float": value})

    def size(self, x: ir.Value, axis: int) -> ir.Value:
        """Return the size of one dimension, shape [1]."""
        return self.Shape(x, start=axis, end=axis + 1)

    def shaped(self, x: ir.Value, *sizes: int | ir.Value) -> ir.Value:
        """Reshape to sizes that are numbers or [1] values."""
        numbers = [s for s in sizes if isinstance(s, int)]
        if len(numbers) == len(sizes):
            return self.Reshape(x, self.ints(*numbers))
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
        """Return the subgraph that `build` makes, for If or Loop."""
        inner = Ops(self.numbers)
        outputs = build(inner)
        return ir.Graph(inputs, outputs, nodes=inner.tape.nodes, name=name)

    def turn(self) -> tuple[ir.Value, ir.Value]:
        """Return the first two inputs of a Loop's body: which turn it is, and whether to go on."""
        return (
            self.value(ir.DataType.INT64, ir.Shape([])),
            self.value(ir.DataType.BOOL, ir.Shape([])),
        )

    def each(self, count: ir.Value, build: Callable[[Ops, ir.Value], ir.Value]) -> ir.Value:
        """Stack `build(op, i)` of every i below `count` along a new first dimension."""
        i, going = self.turn()
        body = self.graph(lambda op: [op.Identity(going), build(op, i)], [i, going], "each")
        return self.Loop(count, None, body=body)

    def choose(
        self, condition: ir.Value, yes: Callable[[Ops], ir.Value], no: Callable[[Ops], ir.Value]
    ) -> ir.Value:
        """Return what `yes` computes if the condition holds at run time, else what `no` does."""
        return self.If(
            condition,
            then_branch=self.graph(lambda op: [yes(op)]),
            else_branch=self.graph(lambda op: [no(op)]),
        )


def insert_before(model: ir.Model, node: ir.Node, op: Ops) -> None:
    """Put the nodes of `op` before `node` of a model's graph and name their values after it."""
    for made in op.tape.nodes:
        for value in made.outputs:
            value.name = f"{node.name}.{value.name}"
        model.graph.insert_before(node, made)


def put_instead(model: ir.Model, node: ir.Node, op: Ops, y: ir.Value) -> None:
    """Put the nodes of `op` in the place of `node`, whose result `y` replaces."""
    old, name = node.outputs[0], node.outputs[0].name
    insert_before(model, node, op)
    y.shape, y.type = old.shape, old.type
    old.replace_all_uses_with(y, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    y.name = name


def function(
    name: str,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    op: Ops,
    opset: int,
    attributes: Sequence[str],
) -> ir.Function:
    """Return the body, of the nodes of `op`, that a model file has for moecc's operator `name`."""
    graph = ir.Graph(inputs, outputs, nodes=op.tape.nodes, opset_imports={"": opset})
    named = [ir.Attr(a, ir.AttributeType.UNDEFINED, None) for a in attributes]
    return ir.Function(DOMAIN, name, graph=graph, attributes=named)


def lazy(
    model: ir.Model, name: str, shape: Sequence[int], dtype: ir.DataType, make: Callable[[], Tensor]
) -> ir.Value:
    """Add an initializer that `make()` computes when the file is written."""
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    give(value, make)
    model.graph.register_initializer(value)
    return value


def give(value: ir.Value, make: Callable[[], Tensor]) -> None:
    """Let `make()` compute an initializer of known shape and dtype when the file is written."""
    shape, dtype = value.shape, value.dtype
    assert shape is not None and dtype is not None
    value.const_value = ir.LazyTensor(
        lambda: tensor_adapters.TorchTensor(make(), name=value.name),
        dtype=dtype,
        shape=shape,
        name=value.name,
    )


def weight_name(value: ir.Value) -> str | None:
    """Return the model's name of the weight that an initializer stands for.

    None if the initializer has its value, so that it stands for no weight any more.
    """
    return own_name(value) if value.const_value is None else None


def own_name(value: ir.Value) -> str:
    """Return the name that a value has in the model, without the traced module's prefix."""
    return (value.name or "").removeprefix(_PREFIX)


def drop_initializer(model: ir.Model, value: ir.Value) -> None:
    """Remove an initializer if no node uses it any more."""
    if not value.uses():
        assert value.name is not None
        del model.graph.initializers[value.name]


def sizes(value: ir.Value) -> tuple[int, ...]:
    """Return the shape of a value whose sizes are all known."""
    assert value.shape is not None
    found = [size for size in value.shape if isinstance(size, int)]
    assert len(found) == len(value.shape), f"{value.name} has open sizes: {value.shape}"
    return tuple(found)


def producer(value: ir.Value | None) -> ir.Node | None:
    """Return the node that computes a value; None for inputs, initializers and absent values."""
    return None if value is None else value.producer()

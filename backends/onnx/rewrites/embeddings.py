"""`embeddings=int8`: embedding and output head in blocks of 8-bit integers.

Tied matrices share one tensor. Once the experts are small, a small model reads mostly its head for
each token. com.microsoft::GatherBlockQuantized looks tokens up; com.microsoft::MatMulNBits
multiplies, and rounds its activations to int8.

Shapes: V vocabulary, D hidden; packed u8 [V, D / block, block], 128 is zero; scales
[V, D / block, 1], for the head [V, D / block].
"""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
from onnx_ir import tensor_adapters
from torch import Tensor

from moecc.backends.onnx.graph import (
    MICROSOFT,
    Ops,
    drop_initializer,
    lazy,
    producer,
    put_instead,
    sizes,
    weight_name,
)
from moecc.backends.onnx.rewrites.qmoe import quantize
from moecc.checkpoint.store import CheckpointStore
from moecc.errors import MoeccError

_BLOCKS = (64, 32, 16)
# Operators that may follow the product with the head.
_AFTER_HEAD = ("Cast", "Mul", "Div", "Tanh", "Identity", "Reshape")


def lower(model: ir.Model, store: CheckpointStore) -> None:
    """Replace the lookup in the embedding and the product with the head.

    Raise MoeccError if the graph has no lookup, or if no block size divides D.
    """
    ids = next(v for v in model.graph.inputs if v.name == "input_ids")
    lookups = [n for n, _ in ids.uses() if n.op_type == "Gather"]
    found = next(((n, v) for n in lookups if (v := _stored(n.inputs[0])) is not None), None)
    if found is None:
        raise MoeccError(
            "the graph doesn't look its input up in an embedding; export with embeddings=float"
        )
    tables = _Tables(model, store)
    _lower_lookup(model, tables, ids, *found)
    if (product := _head(model)) is not None:
        _lower_head(model, tables, *product)
    tables.drop_unused()


def _lower_lookup(
    model: ir.Model, tables: _Tables, ids: ir.Value, node: ir.Node, weight: ir.Value
) -> None:
    packed, scales = tables.of(weight)
    op = Ops()
    block = sizes(packed)[2]
    layout = {"bits": 8, "block_size": block, "gather_axis": 0, "quantize_axis": 2}
    [rows] = op.foreign(MICROSOFT, "GatherBlockQuantized", [packed, ids, scales], {**layout})
    put_instead(model, node, op, op.Reshape(rows, op.ints(0, 0, -1)))


def _lower_head(model: ir.Model, tables: _Tables, node: ir.Node, weight: ir.Value) -> None:
    packed, _ = tables.of(weight)
    flat = tables.flat(weight)
    vocabulary, blocks, block = sizes(packed)
    op = Ops()
    layout = {"N": vocabulary, "K": blocks * block, "bits": 8, "block_size": block}
    inputs = [node.inputs[0], packed, flat]
    [y] = op.foreign(MICROSOFT, "MatMulNBits", inputs, {**layout, "accuracy_level": 4})
    put_instead(model, node, op, y)


def _stored(value: ir.Value | None) -> ir.Value | None:
    """Return a value if it is a stored weight."""
    return value if value is not None and weight_name(value) else None


def _head(model: ir.Model) -> tuple[ir.Node, ir.Value] | None:
    """Return the product that makes the logits and its stored matrix [V, D], if there is one."""
    node: ir.Node | None = model.graph.outputs[0].producer()
    while node is not None and node.op_type in _AFTER_HEAD:
        node = next((made for v in node.inputs if (made := producer(v)) is not None), None)
    if node is None or node.op_type != "MatMul":
        return None
    turned = producer(node.inputs[1])
    weight = None if turned is None else _stored(turned.inputs[0])
    if turned is None or turned.op_type != "Transpose" or weight is None:
        return None
    return node, weight


class _Tables:
    """Packed tensors by the parameter that they stand for; tied names share one."""

    def __init__(self, model: ir.Model, store: CheckpointStore):
        self.model, self.store = model, store
        self.made: dict[str, tuple[ir.Value, ir.Value]] = {}
        self.replaced: list[ir.Value] = []

    def of(self, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the packed tensor and the scales of a weight [V, D]."""
        name = self._name(weight)
        if weight not in self.replaced:
            self.replaced.append(weight)
        if name not in self.made:
            rows, columns = sizes(weight)
            block = next((b for b in _BLOCKS if columns % b == 0), None)
            if block is None:
                raise MoeccError(
                    f"{name}: blocks of 16 don't divide {columns}; export with embeddings=float"
                )
            shape, make = (rows, columns // block, block), partial(self._packed, name, block)
            packed = lazy(self.model, f"{name}.packed", shape, ir.DataType.UINT8, make)
            self.made[name] = packed, self._scales(weight, "scales", block, (*shape[:2], 1))
        return self.made[name]

    def flat(self, weight: ir.Value) -> ir.Value:
        """Return the scales once more, [V, D / block]."""
        packed, _ = self.of(weight)
        rows, blocks, block = sizes(packed)
        return self._scales(weight, "head_scales", block, (rows, blocks))

    def _name(self, weight: ir.Value) -> str:
        name = weight_name(weight)
        assert name is not None
        return self.store.tied.get(name, name)

    def _quantized(self, name: str, block: int) -> tuple[Tensor, Tensor]:
        return quantize(self.store.read(name).float(), 8, block)

    def _packed(self, name: str, block: int) -> Tensor:
        packed: Tensor = self._quantized(name, block)[0].unflatten(-1, (-1, block))
        return packed

    def _scales(self, weight: ir.Value, kind: str, block: int, shape: tuple[int, ...]) -> ir.Value:
        """Return the scales in the weight's type, in which the graph computes."""
        name, dtype = self._name(weight), weight.dtype
        assert dtype is not None
        number = tensor_adapters.to_torch_dtype(dtype)

        def make() -> Tensor:
            return self._quantized(name, block)[1].view(shape).to(number)

        return lazy(self.model, f"{name}.{kind}", shape, dtype, make)

    def drop_unused(self) -> None:
        """Remove the weights that packed tensors have replaced, and what transposed them."""
        for weight in self.replaced:
            for node in [n for n, _ in weight.uses() if n.op_type == "Transpose"]:
                if not node.outputs[0].uses():
                    self.model.graph.remove(node, safe=True)
            drop_initializer(self.model, weight)

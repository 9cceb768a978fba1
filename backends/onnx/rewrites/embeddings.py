"""`--embeddings int8`: the embedding and the output head in blocks of 8-bit integers, one tensor for both where they are tied.

Once experts are small, the head is most of what a token reads on a small model. com.microsoft::GatherBlockQuantized looks
tokens up, com.microsoft::MatMulNBits multiplies, its activations rounded to int8.

Shapes: V vocabulary, D hidden; packed u8 [V, D / block, block], 128 is zero; scales [V, D / block, 1], for the head [V, D / block].
"""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
from onnx_ir import tensor_adapters
from torch import Tensor

from moecc.backends.onnx import bodies
from moecc.backends.onnx.rewrites.qmoe import quantize
from moecc.backends.onnx.translate import weight_name
from moecc.checkpoint.store import CheckpointStore
from moecc.errors import MoeccError

DOMAIN = "com.microsoft"
_BLOCKS = (64, 32, 16)


def lower(model: ir.Model, store: CheckpointStore) -> None:
    """Replace the lookup in the embedding and the product with the head. MoeccError where the graph has no such nodes."""
    ids = next(v for v in model.graph.inputs if v.name == "input_ids")
    lookup = next(
        (n for n, _ in ids.uses() if n.op_type == "Gather" and weight_name(n.inputs[0])), None
    )  # type: ignore[arg-type]
    if lookup is None:
        raise MoeccError(
            "the graph doesn't look its input up in an embedding; export without --embeddings int8"
        )
    tables = _Tables(model, store)
    op = bodies.Ops()
    packed, scales = tables.of(lookup.inputs[0])  # type: ignore[arg-type]
    rows = op.tape.op(
        "GatherBlockQuantized", [packed, ids, scales],
        {"bits": 8, "block_size": int(packed.shape[2]), "gather_axis": 0, "quantize_axis": 2},  # type: ignore[index, arg-type]
        domain=DOMAIN, output=op.value(),
    )  # fmt: skip
    bodies.put_instead(model, lookup, op, op.Reshape(rows, op.ints(0, 0, -1)))
    if (product := _head(model)) is not None:
        node, weight = product
        packed, scales = tables.of(weight)
        flat = tables.flat(weight)
        vocabulary, blocks, block = (int(n) for n in packed.shape)  # type: ignore[arg-type, union-attr]
        op = bodies.Ops()
        sizes = {
            "N": vocabulary,
            "K": blocks * block,
            "bits": 8,
            "block_size": block,
            "accuracy_level": 4,
        }
        y = op.tape.op(
            "MatMulNBits", [node.inputs[0], packed, flat], sizes, domain=DOMAIN, output=op.value()
        )
        bodies.put_instead(model, node, op, y)
    tables.drop_unused()


def _head(model: ir.Model) -> tuple[ir.Node, ir.Value] | None:
    """The product with a whole stored matrix that makes the logits, and the matrix [V, D]."""
    node: ir.Node | None = model.graph.outputs[0].producer()
    while node is not None and node.op_type in (
        "Cast",
        "Mul",
        "Div",
        "Tanh",
        "Identity",
        "Reshape",
    ):
        node = next(
            (v.producer() for v in node.inputs if v is not None and v.producer() is not None), None
        )
    if node is None or node.op_type != "MatMul":
        return None
    turned = node.inputs[1].producer()  # type: ignore[union-attr]
    if turned is None or turned.op_type != "Transpose" or not weight_name(turned.inputs[0]):  # type: ignore[arg-type]
        return None
    return node, turned.inputs[0]  # type: ignore[return-value]


class _Tables:
    """Packed tensors by the parameter that they stand for; tied names share one."""

    def __init__(self, model: ir.Model, store: CheckpointStore):
        self.model, self.store = model, store
        self.made: dict[str, tuple[ir.Value, ir.Value]] = {}
        self.replaced: list[ir.Value] = []

    def of(self, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
        name = self._name(weight)
        if weight not in self.replaced:
            self.replaced.append(weight)
        if name not in self.made:
            rows, columns = (int(n) for n in weight.shape)  # type: ignore[arg-type, union-attr]
            block = next((b for b in _BLOCKS if columns % b == 0), None)
            if block is None:
                raise MoeccError(
                    f"{name}: blocks of 16 don't divide {columns}; export without --embeddings int8"
                )
            shape, make = (rows, columns // block, block), partial(self._packed, name, block)
            packed = bodies.lazy(self.model, f"{name}.packed", shape, ir.DataType.UINT8, make)
            self.made[name] = packed, self._scales(weight, "scales", block, (*shape[:2], 1))
        return self.made[name]

    def flat(self, weight: ir.Value) -> ir.Value:
        """The scales once more, [V, D / block]."""
        packed, _ = self.of(weight)
        rows, blocks, block = (int(n) for n in packed.shape)  # type: ignore[arg-type, union-attr]
        return self._scales(weight, "head_scales", block, (rows, blocks))

    def _name(self, weight: ir.Value) -> str:
        name = weight_name(weight)
        assert name is not None
        return self.store.tied.get(name, name)

    def _packed(self, name: str, block: int) -> Tensor:
        packed: Tensor = quantize(self.store.read(name).float(), 8, block)[0].unflatten(
            -1, (-1, block)
        )
        return packed

    def _scales(self, weight: ir.Value, kind: str, block: int, shape: tuple[int, ...]) -> ir.Value:
        """In the type of the weight, which the graph computes in."""
        name, dtype = self._name(weight), weight.dtype
        assert dtype is not None
        number = tensor_adapters.to_torch_dtype(dtype)

        def make() -> Tensor:
            return quantize(self.store.read(name).float(), 8, block)[1].view(shape).to(number)

        return bodies.lazy(self.model, f"{name}.{kind}", shape, dtype, make)

    def drop_unused(self) -> None:
        graph = self.model.graph
        for weight in self.replaced:
            for node in [
                n for n, _ in weight.uses() if n.op_type == "Transpose" and not n.outputs[0].uses()
            ]:
                graph.remove(node, safe=True)
            if not weight.uses():
                del graph.initializers[weight.name]  # type: ignore[arg-type]

"""The weights of an ONNX graph: read from the artifact when they are written, each in the form that its operator wants.

  1. compressed experts: codes and signs in the order of `layout`, everything that is not a whole number as float32
  2. MatMulNBits: packed rows by blocks, zero points packed as weights are
  3. a dense matrix that the graph transposes first is stored transposed, or every runtime would keep a second copy
  4. all others as the program computes with them

An operand that some layers' experts have and others lack is stored empty there (`bodies`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor

from moecc.backends.onnx import bodies
from moecc.backends.onnx.layout import BLOCK, blocked_codes, blocked_signs, blocks
from moecc.backends.onnx.translate import weight_name
from moecc.checkpoint.store import CheckpointStore
from moecc.errors import MoeccError
from moecc.ir import vq4
from moecc.ir.gates import rows_per_unit

Make = Callable[[Tensor], Tensor]


class Weights:
    """Gives the initializers of one graph their values, which are read from `store` when the file is written."""

    def __init__(self, model: ir.Model, store: CheckpointStore):
        self.model, self.store = model, store
        self.origins = {
            id(v): n for v in model.graph.initializers.values() if (n := weight_name(v)) is not None
        }

    def fill(self) -> None:
        """Everything; the functions that the graph's experts nodes need are added to the model."""
        coded, dense = self._nodes("moecc", "VQExperts"), self._nodes("moecc", "Experts")
        opset = self.model.opset_imports[""]
        for nodes, names, function in (
            (coded, bodies.coded_inputs(), bodies.vq_experts_function),
            (dense, [*bodies.ROUTED, *bodies.DENSE], bodies.experts_function),
        ):
            if nodes:
                made = function(structure_of(nodes, names), opset)
                self.model.functions[made.identifier()] = made
        for node in coded:
            self._fill_coded(node)
        if coded:
            self._fill_absent(coded)
        for node in self._nodes("com.microsoft", "MatMulNBits"):
            if id(node.inputs[1]) in self.origins:  # not the head of `embeddings`
                self._fill_linear(node)
        self._fill_transposed()
        for value in list(self.model.graph.initializers.values()):
            if value.const_value is None:
                self._give(
                    value, _numbers(value), partial(torch.Tensor.to, dtype=self._torch_dtype(value))
                )

    def _nodes(self, domain: str, op_type: str) -> list[ir.Node]:
        return [n for n in self.model.graph if (n.domain, n.op_type) == (domain, op_type)]

    # ---- compressed experts

    def _fill_coded(self, node: ir.Node) -> None:
        given = dict(zip(bodies.coded_inputs(), node.inputs, strict=False))
        for name, value in given.items():
            if value is None or name in bodies.ROUTED:
                continue
            part = name.partition("_")[0] if name.startswith("down") else "gate_up"
            kind = name.removeprefix(f"{part}_")
            if name == "post_norm" or kind in (
                "scale",
                "bias",
                "basis",
                "coef_scale",
                f"{vq4.MEAN}scale",
            ):
                self._give_or_cast(node, name, value)
            elif kind.endswith("codes"):
                book = given[f"{part}_{kind.removesuffix('codes')}codebook"]
                assert book is not None and book.shape is not None
                self._give_codes(value, int(book.shape[2]))  # type: ignore[arg-type]
            elif kind.endswith("signs"):
                experts, rows, eighths = _numbers(value)
                self._give(
                    value,
                    (experts, blocks(eighths * 8), blocks(rows), BLOCK // 4, BLOCK // 2),
                    blocked_signs,
                )
            else:
                self._give(value, _numbers(value), lambda t: t)

    def _give_codes(self, value: ir.Value, v: int) -> None:
        experts, rows, groups = _numbers(value)
        shape = (experts, blocks(groups * v), blocks(rows), BLOCK // v, BLOCK)
        self._give(value, shape, lambda t: blocked_codes(t, v))

    def _give_or_cast(self, node: ir.Node, name: str, value: ir.Value) -> None:
        """A float32 operand: a stored tensor that is written so, or a computed one (post_norm) that is cast."""
        if id(value) in self.origins:
            self._give(value, _numbers(value), lambda t: t.float(), ir.DataType.FLOAT)
            return
        index = bodies.coded_inputs().index(name)
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
        cast.outputs[0].name = f"{value.name}_float"
        self.model.graph.insert_before(node, cast)
        node.replace_input_with(index, cast.outputs[0])

    def _fill_absent(self, nodes: list[ir.Node]) -> None:
        names = bodies.coded_inputs()
        for index, name in enumerate(names):
            with_it = next(
                (n for n in nodes if index < len(n.inputs) and n.inputs[index] is not None), None
            )
            if with_it is None:
                continue
            for node in nodes:
                if index >= len(node.inputs):
                    node.resize_inputs(index + 1)
                if node.inputs[index] is None:
                    node.replace_input_with(index, self._empty(node, name, with_it.inputs[index]))  # type: ignore[arg-type]

    def _empty(self, node: ir.Node, name: str, like: ir.Value) -> ir.Value:
        """An operand that adds nothing, in the rank and dtype of `like`: no rows of a basis, a mean or signs; biases of zero."""
        given = dict(zip(bodies.coded_inputs(), node.inputs, strict=False))
        part = "down" if name.startswith("down") else "gate_up"
        scale, shape = given[f"{part}_scale"], list(_numbers(like))
        assert scale is not None
        kind, experts_rows = name.removeprefix(f"{part}_"), list(_numbers(scale))
        if kind.endswith(("codes", "signs")):
            shape[2] = 0
        elif kind == f"{vq4.MEAN}scale" or (part, kind) == ("down", "coef_scale"):
            shape[1] = 0
        elif kind == "basis":
            shape[0] = 0
        elif kind == "coef":
            shape[2 if part == "gate_up" else 1] = 0
        else:
            assert shape == experts_rows or kind == f"{vq4.MEAN}codebook"
        value = ir.Value(
            name=f"{scale.name}.no_{kind}", shape=ir.Shape(shape), type=ir.TensorType(like.dtype)
        )  # type: ignore[arg-type]
        value.const_value = ir.tensor(
            torch.zeros(shape, dtype=self._torch_dtype(like)).numpy(), name=value.name
        )
        self.model.graph.register_initializer(value)
        return value

    # ---- dense matrices

    def _fill_linear(self, node: ir.Node) -> None:
        """moecc::q_linear's tensors as MatMulNBits wants them: [N, K / block, bytes], zero points [N, bytes], scales as x."""
        bits, block = (node.attributes[k].as_int() for k in ("bits", "block_size"))
        weight, scale, zero = (v for v in node.inputs[1:4])
        assert weight is not None and scale is not None and zero is not None
        rows, groups = _numbers(scale)
        self._give(weight, (rows, groups, block * bits // 8), lambda t: t.view(rows, groups, -1))
        like: ir.Value = node.inputs[0]  # type: ignore[assignment]
        for value, shape in ((scale, (rows, groups)), *((v, (rows,)) for v in node.inputs[5:])):
            if value is not None:
                self._give(value, shape, lambda t: t.to(self._torch_dtype(like)), like.dtype)
        if bits == 4:
            self._give(zero, (rows, (groups + 1) // 2), pack_nibbles)
        else:
            self._give(zero, (rows, groups), lambda t: t)

    def _fill_transposed(self) -> None:
        graph = self.model.graph
        for value in list(graph.initializers.values()):
            users = [node for node, _ in value.uses()]
            if value.const_value is not None or len(_numbers(value)) != 2 or not users:
                continue
            if not all(
                n.op_type == "Transpose" and list(n.attributes["perm"].as_ints()) == [1, 0]
                for n in users
            ):
                continue
            rows, columns = _numbers(value)
            dtype = self._torch_dtype(value)
            self._give(value, (columns, rows), lambda t, dtype=dtype: t.to(dtype).T.contiguous())  # type: ignore[misc]
            for node in users:
                node.outputs[0].replace_all_uses_with(value)
                graph.remove(node, safe=True)

    # ---- values

    def _give(
        self, value: ir.Value, shape: Sequence[int], make: Make, dtype: ir.DataType | None = None
    ) -> None:
        """Read and make the tensor when it is written."""
        name, dtype = self.origins[id(value)], dtype or value.dtype
        assert dtype is not None
        value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype)

        def read() -> Tensor:
            tensor = make(self.store.read(name)).contiguous()
            if tuple(tensor.shape) != tuple(shape):
                raise MoeccError(
                    f"{name}: {list(tensor.shape)} where the graph has {list(shape)}; compile the model again"
                )
            return tensor

        bodies.give(value, read)

    def _torch_dtype(self, value: ir.Value) -> torch.dtype:
        return tensor_adapters.to_torch_dtype(value.dtype)  # type: ignore[arg-type]


def structure_of(nodes: Iterable[ir.Node], names: list[str]) -> bodies.Structure:
    """What a model's experts nodes have in common. MoeccError where their gates differ: one function can't serve them."""
    nodes = list(nodes)
    found = [{k: a.value for k, a in n.attributes.items()} for n in nodes]
    if any(f != found[0] for f in found):
        raise MoeccError(
            "the experts of this model's layers have different gates; that can't be exported"
        )
    present = {}
    for index, name in enumerate(names):
        having = [index < len(n.inputs) and n.inputs[index] is not None for n in nodes]
        present[name] = bodies.Presence(any(having), all(having))
    # gate_up's rows come in gates and units, and its units are down's columns
    units = {"gate_up_scale": BLOCK * rows_per_unit(found[0]["gate"]), "down_scale": BLOCK}
    scales = [
        (unit, n.inputs[names.index(name)])
        for name, unit in units.items()
        if name in names
        for n in nodes
    ]
    ragged = any(_numbers(scale)[1] % unit for unit, scale in scales if scale is not None)
    return bodies.Structure(found[0], present, ragged)


def pack_nibbles(x: Tensor) -> Tensor:
    """u8 [N, G] below 16 -> u8 [N, ceil(G / 2)], the even one in the low nibble."""
    if x.shape[1] % 2:
        x = torch.nn.functional.pad(x, (0, 1))
    return x[:, 0::2] | (x[:, 1::2] << 4)


def _numbers(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(s) for s in value.shape)  # type: ignore[arg-type]

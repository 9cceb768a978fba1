"""The weights of an ONNX graph, read from the artifact when the file is written.

Each is stored in the form that its operator wants:

  1. compressed experts: codes and signs in the order of `layout`, other fractions as float32
  2. MatMulNBits: packed rows by blocks, zero points packed as the weights are
  3. a dense matrix that the graph transposes first is stored transposed: else every runtime keeps
     a second copy
  4. all others as the program computes with them

An operand that some layers' experts have and others lack is stored empty in the latter (`bodies`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor

from moecc.backends.onnx import bodies
from moecc.backends.onnx.graph import DOMAIN, MICROSOFT, give, sizes, weight_name
from moecc.backends.onnx.layout import BLOCK, blocked_codes, blocked_signs, blocks
from moecc.checkpoint.store import CheckpointStore
from moecc.errors import MoeccError
from moecc.ir import vq4
from moecc.ir.gates import rows_per_unit

Make = Callable[[Tensor], Tensor]
_FLOATS = ("scale", "bias", "basis", "coef_scale", f"{vq4.MEAN}scale")  # operands in float32


class Weights:
    """Gives the initializers of one graph their values, read from `store` when they are written."""

    def __init__(self, model: ir.Model, store: CheckpointStore):
        self.model, self.store = model, store
        self.origins = {
            id(v): n for v in model.graph.initializers.values() if (n := weight_name(v)) is not None
        }

    def fill(self) -> None:
        """Give every initializer its value, and the model the functions of its experts nodes.

        Raise MoeccError if one function cannot serve all layers.
        """
        coded, dense = self._nodes(DOMAIN, "VQExperts"), self._nodes(DOMAIN, "Experts")
        opset = self.model.opset_imports[""]
        for nodes, names, function in (
            (coded, bodies.coded_inputs(), bodies.vq_experts_function),
            (dense, bodies.dense_inputs(), bodies.experts_function),
        ):
            if nodes:
                made = function(structure_of(nodes, names), opset)
                self.model.functions[made.identifier()] = made
        for node in coded:
            self._fill_coded(node)
        self._fill_absent(coded)
        for node in self._nodes(MICROSOFT, "MatMulNBits"):
            if id(node.inputs[1]) in self.origins:  # not the head of `embeddings`
                self._fill_linear(node)
        self._fill_transposed()
        for value in list(self.model.graph.initializers.values()):
            if value.const_value is None:
                make = partial(torch.Tensor.to, dtype=_torch_dtype(value))
                self._give(value, sizes(value), make)

    def _nodes(self, domain: str, op_type: str) -> list[ir.Node]:
        return [n for n in self.model.graph if (n.domain, n.op_type) == (domain, op_type)]

    # ---- compressed experts

    def _fill_coded(self, node: ir.Node) -> None:
        given = dict(zip(bodies.coded_inputs(), node.inputs, strict=False))
        for index, (name, value) in enumerate(given.items()):
            if value is None or name in bodies.ROUTED:
                continue
            part, kind = _part(name)
            if name == "post_norm" or kind in _FLOATS:
                self._give_or_cast(node, index, value)
            elif kind.endswith("codes"):
                book = given[f"{part}_{kind.removesuffix('codes')}codebook"]
                assert book is not None
                self._give_codes(value, sizes(book)[2])
            elif kind.endswith("signs"):
                self._give_signs(value)
            else:
                self._give(value, sizes(value), lambda t: t)

    def _give_codes(self, value: ir.Value, v: int) -> None:
        experts, rows, groups = sizes(value)
        shape = (experts, blocks(groups * v), blocks(rows), BLOCK // v, BLOCK)
        self._give(value, shape, lambda t: blocked_codes(t, v))

    def _give_signs(self, value: ir.Value) -> None:
        experts, rows, eighths = sizes(value)
        shape = (experts, blocks(eighths * 8), blocks(rows), BLOCK // 4, BLOCK // 2)
        self._give(value, shape, blocked_signs)

    def _give_or_cast(self, node: ir.Node, index: int, value: ir.Value) -> None:
        """Make an operand float32: a stored tensor when written, a computed one by a Cast.

        Of the computed ones there is post_norm.
        """
        if id(value) in self.origins:
            self._give(value, sizes(value), lambda t: t.float(), ir.DataType.FLOAT)
            return
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
        cast.outputs[0].name = f"{value.name}_float"
        self.model.graph.insert_before(node, cast)
        node.replace_input_with(index, cast.outputs[0])

    def _fill_absent(self, nodes: list[ir.Node]) -> None:
        """Give the nodes that lack an operand an empty one, if any node has it."""
        for index, name in enumerate(bodies.coded_inputs()):
            found = (n.inputs[index] for n in nodes if index < len(n.inputs))
            like = next((value for value in found if value is not None), None)
            if like is None:
                continue
            for node in nodes:
                if index >= len(node.inputs):
                    node.resize_inputs(index + 1)
                if node.inputs[index] is None:
                    node.replace_input_with(index, self._empty(node, name, like))

    def _empty(self, node: ir.Node, name: str, like: ir.Value) -> ir.Value:
        """Return an operand that adds nothing, in the rank and dtype of `like`.

        A basis, a mean or signs have no rows; biases are zero.
        """
        given = dict(zip(bodies.coded_inputs(), node.inputs, strict=False))
        part, kind = _part(name)
        scale, shape = given[f"{part}_scale"], list(sizes(like))
        assert scale is not None
        if kind.endswith(("codes", "signs")):
            shape[2] = 0
        elif kind == f"{vq4.MEAN}scale" or (part, kind) == ("down", "coef_scale"):
            shape[1] = 0
        elif kind == "basis":
            shape[0] = 0
        elif kind == "coef":
            shape[2 if part == "gate_up" else 1] = 0
        else:
            assert shape == list(sizes(scale)) or kind == f"{vq4.MEAN}codebook"
        name = f"{scale.name}.no_{kind}"
        zeros = ir.tensor(torch.zeros(shape, dtype=_torch_dtype(like)).numpy(), name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(zeros.dtype))
        value.const_value = zeros
        self.model.graph.register_initializer(value)
        return value

    # ---- dense matrices

    def _fill_linear(self, node: ir.Node) -> None:
        """Store moecc::q_linear's tensors as MatMulNBits wants them.

        [N, K / block, bytes]; zero points [N, bytes]; scales and bias in the type of x.
        """
        bits, block = (node.attributes[k].as_int() for k in ("bits", "block_size"))
        x, weight, scale, zero = node.inputs[:4]
        assert x is not None and weight is not None and scale is not None and zero is not None
        rows, groups = sizes(scale)
        self._give(weight, (rows, groups, block * bits // 8), lambda t: t.view(rows, groups, -1))
        dtype = _torch_dtype(x)
        for value, shape in ((scale, (rows, groups)), *((v, (rows,)) for v in node.inputs[5:])):
            if value is not None:
                self._give(value, shape, lambda t: t.to(dtype), x.dtype)
        if bits == 4:
            self._give(zero, (rows, (groups + 1) // 2), pack_nibbles)
        else:
            self._give(zero, (rows, groups), lambda t: t)

    def _fill_transposed(self) -> None:
        graph = self.model.graph
        for value in list(graph.initializers.values()):
            users = [node for node, _ in value.uses()]
            if value.const_value is not None or len(sizes(value)) != 2 or not users:
                continue
            if not all(map(_is_transpose, users)):
                continue
            rows, columns = sizes(value)
            self._give(value, (columns, rows), partial(_transposed, dtype=_torch_dtype(value)))
            for node in users:
                node.outputs[0].replace_all_uses_with(value)
                graph.remove(node, safe=True)

    # ---- values

    def _give(
        self, value: ir.Value, shape: Sequence[int], make: Make, dtype: ir.DataType | None = None
    ) -> None:
        """Let an initializer be what `make` returns for its tensor in the artifact."""
        name, dtype = self.origins[id(value)], dtype or value.dtype
        assert dtype is not None
        value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype)

        def read() -> Tensor:
            tensor = make(self.store.read(name)).contiguous()
            if tuple(tensor.shape) != tuple(shape):
                raise MoeccError(
                    f"{name}: {list(tensor.shape)} where the graph has {list(shape)}; "
                    "compile the model again"
                )
            return tensor

        give(value, read)


def structure_of(nodes: Iterable[ir.Node], names: list[str]) -> bodies.Structure:
    """Return what a model's experts nodes have in common.

    Raise MoeccError if their gates differ, for then one function cannot serve them.
    """
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
    # gate_up's rows come in gates and units, and its units are down's columns.
    units = {"gate_up_scale": BLOCK * rows_per_unit(found[0]["gate"]), "down_scale": BLOCK}
    scales = [
        (unit, n.inputs[names.index(name)])
        for name, unit in units.items()
        if name in names
        for n in nodes
    ]
    ragged = any(sizes(scale)[1] % unit for unit, scale in scales if scale is not None)
    return bodies.Structure(found[0], present, ragged)


def pack_nibbles(x: Tensor) -> Tensor:
    """Pack u8 [N, G] below 16 to u8 [N, ceil(G / 2)], the even column in the low nibble."""
    if x.shape[1] % 2:
        x = torch.nn.functional.pad(x, (0, 1))
    return x[:, 0::2] | (x[:, 1::2] << 4)


def _part(name: str) -> tuple[str, str]:
    """Split an operand's name into its projection and the rest."""
    part = "down" if name.startswith("down") else "gate_up"
    return part, name.removeprefix(f"{part}_")


def _is_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]


def _transposed(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).T.contiguous()


def _torch_dtype(value: ir.Value) -> torch.dtype:
    assert value.dtype is not None
    return tensor_adapters.to_torch_dtype(value.dtype)

"""The profile `qmoe`: experts as com.microsoft::QMoE, uniform int4 or int8 in blocks, for who wants ONNX Runtime's own kernels.

  1. each experts node's weights are decoded (what experts share added back) and rounded to the nearest of 2^bits levels, a scale
     for each block of `block` neighbouring weights of a row
  2. rows of gate and up alternate, the one order that the kernel knows
  3. routing stays in the graph: the chosen experts get equal scores, all others far smaller ones, and the weights come as a
     tensor of their own. The kernel drops routes of weight 1e-8 and below, so negative ones can't be run

It needs onnxruntime 1.31: earlier ones refuse the attribute accuracy_level, and are a hundred times slower. Activations are rounded
to int8. Weights are copied to private memory when the model loads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, fx

from moecc.backends.onnx import bodies
from moecc.backends.onnx.translate import weight_name
from moecc.checkpoint.store import CheckpointStore
from moecc.errors import MoeccError
from moecc.ir import ops, vq4
from moecc.ir.moe import MoE

DOMAIN, OLDEST = "com.microsoft", (1, 31)
_BLOCKS = (128, 64, 32, 16)
_FAR = -30.0  # score of an expert that wasn't chosen; 0 of one that was


def require() -> None:
    """MoeccError where the installed onnxruntime is too old for this profile."""
    there = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if there < OLDEST:
        raise MoeccError(
            f"onnx{{profile=qmoe}} needs onnxruntime 1.31 or newer, this is {onnxruntime.__version__}; upgrade it"
        )


def require_known(graph: fx.Graph) -> None:
    """MoeccError for experts of a traced graph that the kernel doesn't know; the translation that is spared takes minutes."""
    for node in graph.nodes:
        if node.target in ops.MOE_OPS:
            experts = MoE(node, "", 0, None)
            _activation(experts.attributes)
            if experts.operand("post_norm") is not None:
                raise MoeccError(
                    "QMoE knows no norm behind an expert; export with profile=portable"
                )
            _block(*experts.sizes[2:])


def lower(model: ir.Model, store: CheckpointStore, bits: int) -> None:
    """Replace the experts nodes of a translated graph, which are `require_known`. MoeccError for weights that are computed."""
    for node in [
        n
        for n in model.graph
        if n.domain == bodies.DOMAIN and n.op_type in ("VQExperts", "Experts")
    ]:
        _Experts(model, node, store).lower(bits)


class _Experts:
    """One experts node and the stored tensors behind it."""

    def __init__(self, model: ir.Model, node: ir.Node, store: CheckpointStore):
        self.model, self.node, self.store = model, node, store
        names = (
            bodies.coded_inputs()
            if node.op_type == "VQExperts"
            else [*bodies.ROUTED, *bodies.DENSE]
        )
        self.given = {n: v for n, v in zip(names, node.inputs, strict=False) if v is not None}
        self.attributes = {k: a.value for k, a in node.attributes.items()}
        self.activation = _activation(self.attributes)
        assert "post_norm" not in self.given, "the graph isn't require_known"
        self.origins = {n: weight_name(v) for n, v in self.given.items() if n not in bodies.ROUTED}
        if computed := [n for n, origin in self.origins.items() if origin is None]:
            raise MoeccError(
                f"{computed[0]} is stored in another order than QMoE wants; compile the model, then export it"
            )
        up, down = (self._shape(part) for part in ("gate_up", "down"))
        self.experts, self.hidden, self.units = up[0], down[1], up[1] // 2

    def _shape(self, part: str) -> tuple[int, ...]:
        """E and N."""
        value = self.given[f"{part}_scale" if self.node.op_type == "VQExperts" else part]
        return tuple(int(n) for n in value.shape[:2])  # type: ignore[index, arg-type]

    def lower(self, bits: int) -> None:
        block = _block(self.hidden, self.units)
        x, index, weight = (self.given[n] for n in bodies.ROUTED)
        op = bodies.Ops()
        rows = op.Cast(x, to=int(ir.DataType.FLOAT))
        far = op.Expand(op.number(_FAR), op.Concat(op.size(x, 0), op.ints(self.experts), axis=0))
        scores = op.ScatterElements(far, index, op.Mul(weight, op.number(0.0)), axis=1)
        weights = op.ScatterElements(
            op.Mul(far, op.number(0.0)), index, weight, axis=1, reduction="add"
        )
        operands = [*self._operands("gate_up", bits, block), *self._operands("down", bits, block)]
        y = op.tape.op(
            "QMoE", [rows, scores, *operands, *[None] * 6, weights],
            {
                "k": int(index.shape[1]), "expert_weight_bits": bits, "block_size": block, "accuracy_level": 4,  # type: ignore[index, arg-type]
                "normalize_routing_weights": 0, "swiglu_fusion": 1, **self.activation,
            },
            domain=DOMAIN, output=op.value(),
        )  # fmt: skip
        self._replace(op, op.CastLike(y, x))

    def _operands(self, part: str, bits: int, block: int) -> list[ir.Value | None]:
        """Packed weights, scales and biases of a projection; made when they are written."""
        rows, columns = (
            (2 * self.units, self.hidden) if part == "gate_up" else (self.hidden, self.units)
        )
        shapes = {
            "packed": (self.experts, rows, columns * bits // 8),
            "scales": (self.experts, rows, columns // block),
        }
        made = [
            self._value(f"{part}_{kind}", shape, ir.DataType.UINT8 if kind == "packed" else ir.DataType.FLOAT,
                        partial(self._quantized, part, bits, block, i))
            for i, (kind, shape) in enumerate(shapes.items())
        ]  # fmt: skip
        if f"{part}_bias" not in self.given:
            return [*made, None]
        bias = partial(self._ordered, part, self._read(f"{part}_bias"))
        return [*made, self._value(f"{part}_bias", (self.experts, rows), ir.DataType.FLOAT, bias)]

    def _value(
        self, kind: str, shape: tuple[int, ...], dtype: ir.DataType, make: Callable[[], Tensor]
    ) -> ir.Value:
        return bodies.lazy(self.model, f"{self.node.name}.{kind}", shape, dtype, make)

    def _read(self, name: str) -> Tensor:
        return self.store.read(self.origins[name])  # type: ignore[arg-type]

    def _quantized(self, part: str, bits: int, block: int, which: int) -> Any:
        return quantize(self._ordered(part, self.dense(part)), bits, block)[which]

    def _ordered(self, part: str, rows: Tensor) -> Tensor:
        """Gate and up alternating."""
        if part == "down":
            return rows.float()
        pairs: Tensor = rows.float().unflatten(1, (2, self.units)).transpose(1, 2)
        return pairs.flatten(1, 2).contiguous()

    def dense(self, part: str) -> Tensor:
        """The float32 weights [E, N, K] that the stored tensors stand for."""
        if part in self.origins:
            return self._read(part).float()
        t = {n: self._read(f"{part}_{n}") for n in vq4.TENSORS if f"{part}_{n}" in self.origins}
        columns = self.hidden if part == "gate_up" else self.units
        weight = vq4.decode(t["codes"], t.get("signs"), t["codebook"], columns, torch.float32)
        weight = weight * t["scale"].float().unsqueeze(-1)
        shared = vq4.shared_part(t, columns, torch.float32, input_side=part == "gate_up")
        return weight if shared is None else weight + shared

    def _replace(self, op: bodies.Ops, y: ir.Value) -> None:
        bodies.put_instead(self.model, self.node, op, y)
        for value in self.given.values():
            if weight_name(value) is not None and not value.uses():
                del self.model.graph.initializers[value.name]  # type: ignore[arg-type]


def _block(hidden: int, units: int) -> int:
    """Weights that share a scale."""
    found = next((b for b in _BLOCKS if hidden % b == 0 == units % b), None)
    if found is None:
        raise MoeccError(f"QMoE wants sizes that blocks of 16 divide, not {hidden} and {units}")
    return found


def _activation(attributes: dict[str, Any]) -> dict[str, Any]:
    """QMoE's attributes for a gate: swiglu is g sigmoid(alpha g) (u + beta), clamped at a limit."""
    act, gate = attributes["act"], attributes["gate"]
    if act == "silu" and gate in ("glu", "f32"):
        return {"activation_type": "swiglu", "activation_alpha": 1.0, "activation_beta": 0.0}
    if gate == "oai":
        limits = {
            "activation_alpha": attributes["alpha"],
            "activation_beta": 1.0,
            "swiglu_limit": attributes["limit"],
        }
        return {"activation_type": "swiglu", **limits}
    raise MoeccError(f"QMoE knows no gate {gate} of {act}; export with profile=portable")


def quantize(weight: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """[E, N, K] -> packed u8 [E, N, K bits/8], the even column in the low nibble, and scales [E, N, K/block]."""
    middle = 1 << (bits - 1)
    blocks = weight.unflatten(-1, (-1, block))
    scale = (blocks.abs().amax(-1) / (middle - 1)).clamp(min=1e-30)
    levels = (blocks / scale.unsqueeze(-1)).round().clamp(-middle, middle - 1) + middle
    levels = levels.flatten(-2).to(torch.uint8)
    return (levels if bits == 8 else levels[..., 0::2] | (levels[..., 1::2] << 4)), scale

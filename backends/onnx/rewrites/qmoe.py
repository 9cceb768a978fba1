"""The profile `qmoe`: experts as com.microsoft::QMoE, for users who want ONNX Runtime's kernels.

  1. each expert's weights are decoded (the shared part is added back) and rounded to the nearest of
     2^bits levels; each block of `block` neighbouring weights of a row has a scale
  2. rows of gate and up alternate, the only order that the kernel knows
  3. routing stays in the graph: the chosen experts get equal scores, all others far smaller ones,
     and the weights are a tensor of their own. The kernel drops routes of weight 1e-8 and below, so
     it cannot run negative ones

The profile needs onnxruntime 1.31: earlier ones refuse the attribute accuracy_level and are a
hundred times slower. Activations are rounded to int8. Weights are copied to private memory when the
model loads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, fx

from moecc.backends.onnx import bodies
from moecc.backends.onnx.graph import (
    DOMAIN,
    MICROSOFT,
    Attribute,
    Ops,
    drop_initializer,
    lazy,
    put_instead,
    sizes,
    weight_name,
)
from moecc.checkpoint.store import CheckpointStore
from moecc.errors import MoeccError
from moecc.ir import ops, vq4
from moecc.ir.moe import MoE
from moecc.types import Json

OLDEST = (1, 31)  # of onnxruntime
_BLOCKS = (128, 64, 32, 16)
_FAR = -30.0  # score of an expert that wasn't chosen; 0 of one that was


def require() -> None:
    """Raise MoeccError if the installed onnxruntime is too old for this profile."""
    there = onnxruntime.__version__
    if tuple(int(part) for part in there.split(".")[:2]) < OLDEST:
        raise MoeccError(
            f"onnx{{profile=qmoe}} needs onnxruntime 1.31 or newer, this is {there}; upgrade it"
        )


def require_known(graph: fx.Graph) -> None:
    """Raise MoeccError if the kernel cannot run the experts of a traced graph.

    It is asked before the translation, which takes minutes.
    """
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
    """Replace the experts nodes of a translated graph that passed `require_known`.

    Raise MoeccError if the graph computes a weight instead of storing it.
    """
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type in ("VQExperts", "Experts"):
            _Experts(model, node, store).lower(bits)


class _Experts:
    """One experts node and the stored tensors behind it.

    E experts, D hidden, F units; gate_up [E, 2F, D], down [E, D, F].
    """

    def __init__(self, model: ir.Model, node: ir.Node, store: CheckpointStore):
        self.model, self.node, self.store = model, node, store
        coded = node.op_type == "VQExperts"
        names = bodies.coded_inputs() if coded else bodies.dense_inputs()
        self.given = {n: v for n, v in zip(names, node.inputs, strict=False) if v is not None}
        self.activation = _activation({k: a.value for k, a in node.attributes.items()})
        assert "post_norm" not in self.given, "the graph did not pass require_known"
        self.origins: dict[str, str] = {}
        for name, value in self.given.items():
            if name in bodies.ROUTED:
                continue
            origin = weight_name(value) if value.is_initializer() else None
            if origin is None:  # the graph computes it
                raise MoeccError(
                    f"{name} is stored in another order than QMoE wants; "
                    "compile the model, then export it"
                )
            self.origins[name] = origin
        up, down = (sizes(self.given[f"{p}_scale" if coded else p]) for p in ("gate_up", "down"))
        self.experts, self.hidden, self.units = up[0], down[1], up[1] // 2
        top_k = self.given["topk_index"].shape
        assert top_k is not None and isinstance(top_k[1], int)
        self.top_k = top_k[1]

    def lower(self, bits: int) -> None:
        block = _block(self.hidden, self.units)
        x, index, weight = (self.given[n] for n in bodies.ROUTED)
        op = Ops()
        rows = op.Cast(x, to=int(ir.DataType.FLOAT))
        far = op.Expand(op.number(_FAR), op.Concat(op.size(x, 0), op.ints(self.experts), axis=0))
        scores = op.ScatterElements(far, index, op.Mul(weight, op.number(0.0)), axis=1)
        nothing = op.Mul(far, op.number(0.0))
        weights = op.ScatterElements(nothing, index, weight, axis=1, reduction="add")
        operands = [*self._operands("gate_up", bits, block), *self._operands("down", bits, block)]
        attributes: dict[str, Attribute] = {
            "k": self.top_k,
            "expert_weight_bits": bits,
            "block_size": block,
            "accuracy_level": 4,
            "normalize_routing_weights": 0,
            "swiglu_fusion": 1,
            **self.activation,
        }
        inputs = [rows, scores, *operands, *[None] * 6, weights]
        [y] = op.foreign(MICROSOFT, "QMoE", inputs, attributes)
        put_instead(self.model, self.node, op, op.CastLike(y, x))
        for name in self.origins:
            drop_initializer(self.model, self.given[name])

    def _operands(self, part: str, bits: int, block: int) -> list[ir.Value | None]:
        """Return packed weights, scales and biases of a projection, made when they are written."""
        up = part == "gate_up"
        rows, columns = (2 * self.units, self.hidden) if up else (self.hidden, self.units)
        packed, scales = (partial(self._quantized, part, bits, block, i) for i in range(2))
        made: list[ir.Value | None] = [
            self._value(f"{part}_packed", (rows, columns * bits // 8), ir.DataType.UINT8, packed),
            self._value(f"{part}_scales", (rows, columns // block), ir.DataType.FLOAT, scales),
        ]
        if f"{part}_bias" not in self.given:
            return [*made, None]
        bias = partial(self._ordered, part, self._read(f"{part}_bias"))
        return [*made, self._value(f"{part}_bias", (rows,), ir.DataType.FLOAT, bias)]

    def _value(
        self, kind: str, shape: tuple[int, ...], dtype: ir.DataType, make: Callable[[], Tensor]
    ) -> ir.Value:
        """Return an initializer of `shape` for each expert."""
        return lazy(self.model, f"{self.node.name}.{kind}", (self.experts, *shape), dtype, make)

    def _read(self, name: str) -> Tensor:
        return self.store.read(self.origins[name])

    def _quantized(self, part: str, bits: int, block: int, which: int) -> Tensor:
        return quantize(self._ordered(part, self.dense(part)), bits, block)[which]

    def _ordered(self, part: str, rows: Tensor) -> Tensor:
        """Return rows [E, N, ...] in float32, those of gate and up alternating."""
        if part == "down":
            return rows.float()
        pairs: Tensor = rows.float().unflatten(1, (2, self.units)).transpose(1, 2)
        return pairs.flatten(1, 2).contiguous()

    def dense(self, part: str) -> Tensor:
        """Return the float32 weights [E, N, K] that the stored tensors stand for."""
        if part in self.origins:
            return self._read(part).float()
        t = {n: self._read(f"{part}_{n}") for n in vq4.TENSORS if f"{part}_{n}" in self.origins}
        columns = self.hidden if part == "gate_up" else self.units
        weight = vq4.decode(t["codes"], t.get("signs"), t["codebook"], columns, torch.float32)
        weight = weight * t["scale"].float().unsqueeze(-1)
        shared = vq4.shared_part(t, columns, torch.float32, input_side=part == "gate_up")
        return weight if shared is None else weight + shared


def _block(hidden: int, units: int) -> int:
    """Return the number of weights that share a scale. Raise MoeccError if none divides both."""
    found = next((b for b in _BLOCKS if hidden % b == 0 == units % b), None)
    if found is None:
        raise MoeccError(f"QMoE wants sizes that blocks of 16 divide, not {hidden} and {units}")
    return found


def _activation(attributes: Json) -> Mapping[str, str | float]:
    """Return QMoE's attributes for a gate. Raise MoeccError if it has none.

    swiglu is g sigmoid(alpha g) (u + beta), clamped at a limit.
    """
    act, gate = attributes["act"], attributes["gate"]
    if act == "silu" and gate in ("glu", "f32"):
        return {"activation_type": "swiglu", "activation_alpha": 1.0, "activation_beta": 0.0}
    if gate == "oai":
        return {
            "activation_type": "swiglu",
            "activation_alpha": attributes["alpha"],
            "activation_beta": 1.0,
            "swiglu_limit": attributes["limit"],
        }
    raise MoeccError(f"QMoE knows no gate {gate} of {act}; export with profile=portable")


def quantize(weight: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Round weights [..., K] to unsigned levels, a scale for each block.

    Return packed u8 [..., K bits / 8], the even column in the low nibble, and scales
    [..., K / block].
    """
    middle = 1 << (bits - 1)
    blocks = weight.unflatten(-1, (-1, block))
    scale = (blocks.abs().amax(-1) / (middle - 1)).clamp(min=1e-30)
    levels = (blocks / scale.unsqueeze(-1)).round().clamp(-middle, middle - 1) + middle
    levels = levels.flatten(-2).to(torch.uint8)
    return (levels if bits == 8 else levels[..., 0::2] | (levels[..., 1::2] << 4)), scale

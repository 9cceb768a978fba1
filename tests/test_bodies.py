"""The function bodies of moecc's operators against the reference; the order of codes in a file."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from moecc.backends.onnx import OPSETS, bodies, layout
from moecc.backends.onnx.graph import Ops
from moecc.ir import gates, ops, vq4

ATTRIBUTES = {"act": "silu", "gate": "glu", "alpha": 1.7, "limit": 2.0, "eps": 1e-5}
E, D, F, K = 6, 80, 40, 2  # no multiples of 64


Operands = dict[str, Tensor]  # by name, one of `bodies.coded_inputs()`

# ---------------------------------------------------------------- stored tensors of a layer


def coded(experts: int, rows: int, columns: int, bits: int, *, shared: bool) -> dict[str, Tensor]:
    v, padded = vq4.group_size(bits), vq4.padded(columns)
    made = {
        "codes": torch.randint(0, 256, (experts, rows, padded // v), dtype=torch.uint8),
        "codebook": torch.randint(
            0 if bits == 3 else -127, 128, (1 if shared else experts, 256, v), dtype=torch.int8
        ),
        "scale": (torch.rand(experts, rows) + 0.5) / columns**0.5 / 60,
    }
    if bits == 3:
        made["signs"] = torch.randint(0, 256, (experts, rows, padded // 8), dtype=torch.uint8)
    return made


def projection(
    part: str,
    bits: int,
    *,
    gate: str = "glu",
    shared: bool = False,
    bias: bool = False,
    rank: int = 0,
    mean: int = 0,
) -> dict[str, Tensor]:
    """The stored tensors of gate_up or down with random numbers."""
    up = part == "gate_up"
    rows, columns = (F * gates.rows_per_unit(gate), D) if up else (D, F)
    made = coded(E, rows, columns, bits, shared=shared)
    if bias:
        made["bias"] = torch.randn(E, rows)
    if rank:
        made["basis"] = torch.randn(rank, D) / D**0.5
        made["coef"] = torch.randint(
            -127, 128, (E, rows, rank) if up else (E, rank, columns), dtype=torch.int8
        )
        made["coef_scale"] = torch.rand(E, rows if up else rank) / 100
    if mean:
        made |= {vq4.MEAN + k: t for k, t in coded(1, rows, columns, mean, shared=True).items()}
    return made


def blocked(stored: Operands) -> Operands:
    """The operands of a layer in the order of an ONNX file."""
    made = dict(stored)
    for name, tensor in stored.items():
        if name.endswith("codes"):
            v = stored[name.removesuffix("codes") + "codebook"].shape[2]
            made[name] = layout.blocked_codes(tensor, v)
        elif name.endswith("signs"):
            made[name] = layout.blocked_signs(tensor)
    return made


def operands(
    gate_up: dict[str, Tensor], down: dict[str, Tensor], post_norm: Tensor | None = None
) -> Operands:
    made = {
        f"{p}_{k}": t for p, part in (("gate_up", gate_up), ("down", down)) for k, t in part.items()
    }
    return made if post_norm is None else made | {"post_norm": post_norm}


def structure(layers: list[Operands], attributes: dict[str, Any]) -> bodies.Structure:
    names = {n for layer in layers for n in layer}
    return bodies.Structure(
        attributes, {n: bodies.Presence(True, all(n in x for x in layers)) for n in names}
    )


def session(stored: Operands, function: ir.Function, attributes: dict[str, Any], opset: int) -> Any:
    """ONNX Runtime on one VQExperts node, whose function is in the file."""
    inputs = [n if n in bodies.ROUTED or n in stored else "" for n in bodies.coded_inputs()]
    given = [
        ("x", TensorProto.FLOAT, ["T", D]),
        ("topk_index", TensorProto.INT64, ["T", K]),
        ("topk_weight", TensorProto.FLOAT, ["T", K]),
    ]
    graph = helper.make_graph(
        [helper.make_node("VQExperts", inputs, ["y"], domain="moecc", **attributes)],
        "one",
        [helper.make_tensor_value_info(*g) for g in given],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", D])],
        [numpy_helper.from_array(t.numpy(), n) for n, t in stored.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("moecc", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=OPSETS[opset].file_format)
    model.functions.append(ir.serde.serialize_function(function))
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def reference(
    x: Tensor, index: Tensor, weight: Tensor, stored: Operands, attributes: dict[str, Any]
) -> Tensor:
    # Slope and offset, the last two of a projection, are folded.
    up, down = (
        [*(stored.get(f"{p}_{t}") for t in vq4.TENSORS), None, None] for p in ("gate_up", "down")
    )
    return ops.vq_experts_reference(
        x, index, weight, *up, *down, stored.get("post_norm"), **attributes
    )


def assert_same(ort: Any, stored: Operands, attributes: dict[str, Any], tokens: int) -> None:
    x, weight = torch.randn(tokens, D), torch.randn(tokens, K)
    index = torch.randint(0, E - 1, (tokens, K))  # the last expert is chosen by nobody
    want = reference(x, index, weight, stored, attributes)
    given = {"x": x.numpy(), "topk_index": index.numpy(), "topk_weight": weight.numpy()}
    got = ort.run(None, given)[0]
    assert got.shape == tuple(want.shape)
    assert float(np.linalg.norm(got - want.numpy())) <= 1e-5 * float(want.norm()) + 1e-12


# ---------------------------------------------------------------- bodies

CASES = {
    "2 bit": (dict(bits=2), dict(bits=2), False, {}),
    "2 and 4 bit, biases, basis and mean": (
        dict(bits=2, bias=True, rank=3, mean=2),
        dict(bits=4, shared=True, bias=True, rank=5, mean=4),
        False,
        {"gate": "oai"},
    ),
    "norm behind each expert": (
        dict(bits=2, mean=3),
        dict(bits=2, rank=4, mean=2, bias=True),
        True,
        {"gate": "clamp", "act": "gelu"},
    ),
    "3 bit": (dict(bits=3, shared=True), dict(bits=3), False, {}),
    "3 bit, basis and mean": (
        dict(bits=3, rank=2, mean=4),
        dict(bits=3, rank=2, mean=3, bias=True),
        True,
        {"gate": "softcap"},
    ),
    "3 bit below": (
        dict(bits=4),
        dict(bits=3, mean=4),
        False,
        {"gate": "clamp_after", "act": "gelu_tanh"},
    ),
    "no gate": (
        dict(bits=2, gate="none", rank=2),
        dict(bits=2, mean=2),
        False,
        {"gate": "none", "act": "relu2"},
    ),
}


@pytest.mark.parametrize("opset", sorted(OPSETS))
@pytest.mark.parametrize("case", list(CASES))
def test_a_function_body_computes_what_the_reference_does(case: str, opset: int) -> None:
    gate_up, down, normed, more = CASES[case]
    up, low = projection("gate_up", **gate_up), projection("down", **down)  # type: ignore[arg-type]
    stored = operands(up, low, torch.rand(D) + 0.5 if normed else None)
    attributes = ATTRIBUTES | more
    function = bodies.vq_experts_function(structure([stored], attributes), opset)
    ort = session(blocked(stored), function, attributes, opset)
    for tokens in (1, 2, 5, 40, 0):  # an expert gets fewer than FEW_TOKENS, and more
        assert_same(ort, stored, attributes, tokens)


@pytest.mark.parametrize("act", sorted(gates.ACTIVATIONS))
@pytest.mark.parametrize("gate", ["none", *sorted(gates.GATES)])
def test_every_gate_computes_what_it_does_in_torch(gate: str, act: str) -> None:
    """A graph of the gate's operators alone."""
    attributes = ATTRIBUTES | {"act": act, "gate": gate}
    op, number = Ops(), ir.TensorType(ir.DataType.FLOAT)
    rows = ir.Value(name="rows", type=number, shape=ir.Shape([5, 8]))
    y = bodies.gate(op, rows, attributes)
    y.type, y.shape = number, ir.Shape([5, 8 // gates.rows_per_unit(gate)])
    graph = ir.Graph([rows], [y], nodes=op.tape.nodes, opset_imports={"": 21}, name="gate")
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=10))
    x = torch.randn(5, 8) * 2
    got = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"rows": x.numpy()})[0]
    want = gates.apply_gate(x, act, gate, attributes["alpha"], attributes["limit"])
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-5, atol=1e-6)


def test_codes_lie_in_blocks_of_rows() -> None:
    codes = torch.randint(0, 256, (2, 70, 20), dtype=torch.uint8)  # 80 columns: two blocks
    made = layout.blocked_codes(codes, 4)
    assert made.shape == (2, 2, 2, 16, 64)
    for e, n, g in ((0, 0, 0), (1, 69, 19), (0, 64, 16), (1, 63, 15)):
        assert made[e, g // 16, n // 64, g % 16, n % 64] == codes[e, n, g]
    assert int(made.int().sum()) == int(codes.int().sum())
    signs = torch.randint(0, 256, (2, 70, 10), dtype=torch.uint8)
    bits, packed = vq4.unpack_signs(signs), layout.blocked_signs(signs)
    assert packed.shape == (2, 2, 2, 16, 32)
    for e, n, k in ((0, 0, 0), (1, 69, 79), (0, 64, 64), (1, 63, 63), (1, 31, 5), (0, 37, 6)):
        byte = packed[e, k // 64, n // 64, k % 64 // 4, n % 32]
        assert bool(byte >> (n % 64 // 32 * 4 + k % 4) & 1) == bool(bits[e, n, k])

"""A traced program as an ONNX graph that has no weights yet, only their names.

1. PyTorch's exporter translates the ATen part; moecc's own ops become one node each (`_TABLE`)
2. onnxscript folds constants; weights, which have no values here, stay as they are
3. what says where the graph was made, and the exporter's names for sizes, goes

op                      node
moecc::vq_experts       moecc::VQExperts, inputs `bodies.coded_inputs()`
moecc::experts          moecc::Experts, the experts of a layer that was left dense
moecc::q_linear         com.microsoft::MatMulNBits
moecc::expert_linear    Gather and MatMul
a mask of tokens        moecc::CausalMask (`masks`)
attention with a cache  moecc::CachedAttention (`attention`)
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Container, Iterator
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from onnxscript import values
from onnxscript.rewriter import onnx_fusions

from moecc.backends.onnx import bodies
from moecc.backends.onnx.cached import Cached
from moecc.backends.onnx.rewrites import attention, masks, rotary
from moecc.errors import MoeccError, reason
from moecc.ir import ops

OPSETS = {21: 10, 23: 11}  # opset -> version of the file format that goes with it
# what the open sizes of an input or output are called, by the first part of its name
_SIZES = {
    "input_ids": ("batch", "sequence", ""), "attention_mask": ("batch", "total"), "past_key_values": ("batch", "", "past", ""),
    "present": ("batch", "", "total", ""),
}  # fmt: skip
_PREFIX = "model."  # of parameters in the module that is traced


def translate(cached: Cached, opset: int, stored: Container[str]) -> ir.Model:
    """The graph. Initializers that stand for weights, the `stored` names, have a shape and a dtype but no value yet.

    `weight_name` says which they are. A buffer may be one although the module that was traced has numbers for it.
    """
    try:
        with _quiet():
            made = torch.onnx.export(
                cached.program, (), dynamo=True, opset_version=opset, custom_translation_table=_TABLE,
                input_names=cached.input_names, output_names=cached.output_names, optimize=False, verbose=False,
            )  # fmt: skip
            assert made is not None
            model = made.model
            for value in model.graph.initializers.values():
                if _own_name(value) in stored:
                    value.const_value = None
            onnxscript.optimizer.optimize_ir(model)
            rotary.fuse(model)
            onnx_fusions.fuse(model)  # what opset 23 has one operator for
            _norm_in_the_type_of_scales(model)
            CommonSubexpressionEliminationPass()(model)
            masks.simplify(model)
            may_have_room = attention.fuse(model)
            _join_sums_and_norms(model)
            _reshape_once(model)
    except MoeccError:
        raise
    except Exception as error:
        raise MoeccError(
            f"the model can't be translated to ONNX opset {opset}: {reason(_first(error))}"
        ) from error
    model.ir_version = OPSETS[opset]
    model.opset_imports.update({bodies.DOMAIN: bodies.VERSION, "com.microsoft": 1})
    _name_sizes(model)
    _strip(model)
    if may_have_room:
        model.metadata_props[attention.ROOM] = "yes"
    return model


def weight_name(value: ir.Value) -> str | None:
    """The model's name of the parameter that an initializer without a value stands for."""
    return _own_name(value) if value.const_value is None else None


def _own_name(value: ir.Value) -> str:
    return (value.name or "").removeprefix(_PREFIX)


def _first(error: BaseException) -> BaseException:
    """What the exporter's error goes back to: it wraps one in the next."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter prints and logs about itself; of a failure its error remains."""
    loggers = [logging.getLogger(n) for n in ("onnxscript", "onnx_ir", "torch.onnx")]
    before = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, before, strict=True):
            log.setLevel(level)


# ---------------------------------------------------------------- moecc's ops

_Parameter = onnx.defs.OpSchema.FormalParameter
_Option = onnx.defs.OpSchema.FormalParameterOption
_STORED = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(uint8)", "tensor(int8)"]
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def _operator(
    domain: str, name: str, inputs: list[tuple[str, str]], required: int, attributes: dict[str, str]
) -> values.Op:
    """An operator that onnx has no schema of. inputs: (name, type), the type "T" that of the output."""
    parameters = [
        _Parameter(n, t, param_option=_Option.Single if i < required else _Option.Optional)
        for i, (n, t) in enumerate(inputs)
    ]
    kinds = onnx.defs.OpSchema.AttrType
    schema = onnx.defs.OpSchema(
        name, domain, 1, inputs=parameters, outputs=[_Parameter("y", "T")],
        attributes=[onnx.defs.OpSchema.Attribute(k, getattr(kinds, v)) for k, v in attributes.items()],
        type_constraints=[("T", _FLOATS, ""), *((f"W{i}", _STORED, "") for i in range(len(inputs)))],
    )  # fmt: skip
    return values.Op(values.Opset(domain, 1), name, schema)


def _operand_types(names: list[str]) -> list[tuple[str, str]]:
    known = {"x": "T", "topk_index": "tensor(int64)", "topk_weight": "tensor(float)"}
    return [(n, known.get(n, f"W{i}")) for i, n in enumerate(names)]


_ATTRIBUTES = {
    "act": "STRING",
    "gate": "STRING",
    "alpha": "FLOAT",
    "limit": "FLOAT",
    "eps": "FLOAT",
}
_VQ_EXPERTS = _operator(
    bodies.DOMAIN, "VQExperts", _operand_types(bodies.coded_inputs()), 3, _ATTRIBUTES
)
_EXPERTS = _operator(
    bodies.DOMAIN, "Experts", _operand_types([*bodies.ROUTED, *bodies.DENSE]), 5, _ATTRIBUTES
)
_MATMUL_NBITS = _operator(
    "com.microsoft", "MatMulNBits",
    [("A", "T"), ("B", "tensor(uint8)"), ("scales", "W2"), ("zero_points", "W3"), ("g_idx", "W4"), ("bias", "W5")], 3,
    {"K": "INT", "N": "INT", "bits": "INT", "block_size": "INT", "accuracy_level": "INT"},
)  # fmt: skip


def _float(x: Any) -> Any:
    op = onnxscript.opset18
    return x if x.dtype == ir.DataType.FLOAT else op.Cast(x, to=int(ir.DataType.FLOAT))


def _vq_experts(
    x: Any, topk_index: Any, topk_weight: Any, *operands: Any, **attributes: Any
) -> Any:
    names = [a.name for a in ops.VQ_EXPERTS._schema.arguments][3:]
    given = dict(zip(names, operands, strict=False))
    if any(
        given.get(f"{p}_{t}") is not None for p in ("gate_up", "down") for t in ("slope", "offset")
    ):
        raise MoeccError("an affine correction that isn't folded can't be exported")
    stored = [given.get(n) for n in bodies.coded_inputs()[3:]]
    return _VQ_EXPERTS(x, topk_index, _float(topk_weight), *stored, **attributes)


def _experts(x: Any, topk_index: Any, topk_weight: Any, *operands: Any, **attributes: Any) -> Any:
    return _EXPERTS(x, topk_index, _float(topk_weight), *operands, **attributes)


def _q_linear(x: Any, weight: Any, scale: Any, zero: Any, bias: Any = None, *, bits: int) -> Any:
    """Stored as MatMulNBits takes it by `weights`. Activations become int8: with others its 8-bit kernel decodes every time."""
    (rows, packed), groups = weight.shape, scale.shape[1]
    columns = packed * 8 // bits
    inputs = [x, weight, scale, zero] if bias is None else [x, weight, scale, zero, None, bias]
    return _MATMUL_NBITS(
        *inputs, K=columns, N=rows, bits=bits, block_size=columns // groups, accuracy_level=4
    )


def _expert_linear(x: Any, topk_index: Any, weight: Any) -> Any:
    """x [T, D] or [T, k, D]; weight [E, N, D] -> [T, k, N]."""
    op: Any = onnxscript.opset18
    one, three = (op.Constant(value_ints=[axis]) for axis in (1, 3))
    rows = op.Unsqueeze(x, one) if len(x.shape) == 2 else x
    own = op.Gather(weight, topk_index)  # [T, k, N, D]
    return op.Squeeze(op.MatMul(own, op.Unsqueeze(rows, three)), three)


_TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    ops.VQ_EXPERTS: _vq_experts,
    ops.EXPERTS: _experts,
    ops.Q_LINEAR: _q_linear,
    torch.ops.moecc.expert_linear.default: _expert_linear,
}


# ---------------------------------------------------------------- what is left of the exporter


def _norm_in_the_type_of_scales(model: ir.Model) -> None:
    """Cast what RMSNormalization is of to its scale's type: ONNX allows two types, ONNX Runtime's kernel has one."""
    for node in [n for n in model.graph if n.op_type == "RMSNormalization"]:
        x, scale = node.inputs[:2]
        assert x is not None and scale is not None
        if scale.dtype is not None and x.dtype != scale.dtype:
            op = bodies.Ops()
            cast = op.Cast(x, to=int(scale.dtype))
            cast.name, cast.shape, cast.type = f"{node.name}.x", x.shape, scale.type
            model.graph.insert_before(node, *op.tape.nodes)
            node.replace_input_with(0, cast)


def _join_sums_and_norms(model: ir.Model) -> None:
    """RMSNormalization of a sum that is needed itself too, as the operator that gives both."""
    for node in [n for n in model.graph if n.op_type == "RMSNormalization"]:
        total, norm = node.inputs[0], node.inputs[1]
        add = None if total is None else total.producer()
        last = node.attributes["axis"].as_int() == -1
        if add is None or add.op_type != "Add" or not last:
            continue
        assert total is not None
        if total.is_graph_output() or node.outputs[0].is_graph_output():
            continue
        # a scale that is computed may be so behind the sum; the operator has one type for all
        if norm is None or norm.producer() is not None or norm.dtype != total.dtype:
            continue
        left, right = (None if v is None else v.shape for v in add.inputs)
        if left is None or len(left) != 3 or left != right:
            continue
        op = bodies.Ops()
        inputs, outputs = [*add.inputs, norm], [op.value(), None, None, op.value()]
        joined = ir.Node(
            "com.microsoft", "SkipSimplifiedLayerNormalization", inputs, outputs=[v or ir.Value(name="") for v in outputs],
            attributes=[ir.AttrFloat32("epsilon", node.attributes["epsilon"].as_float())], name=f"{node.name}.joined",
        )  # fmt: skip
        model.graph.insert_after(add, joined)
        for old, new in ((node.outputs[0], outputs[0]), (total, outputs[3])):
            assert old is not None and new is not None
            new.name, new.shape, new.type = f"{old.name}.joined", old.shape, old.type
            old.replace_all_uses_with(new)
        model.graph.remove([node, add], safe=True)


def _reshape_once(model: ir.Model) -> None:
    """Leave a value alone that is to be reshaped to what it was reshaped to just before."""
    for node in [n for n in model.graph if n.op_type == "Reshape"]:
        before = node.inputs[0].producer()  # type: ignore[union-attr]
        if before is None or before.op_type != "Reshape":
            continue
        sizes = [n.inputs[1].const_value for n in (node, before)]  # type: ignore[union-attr]
        if any(s is None for s in sizes) or node.outputs[0].is_graph_output():
            continue
        ours, theirs = (s.numpy().tolist() for s in sizes)  # type: ignore[union-attr]
        if ours == theirs and 0 not in ours:
            node.outputs[0].replace_all_uses_with(before.outputs[0])
            model.graph.remove(node, safe=True)


def _name_sizes(model: ir.Model) -> None:
    """Call the open sizes batch, sequence, past and total instead of what the tracer called them."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        names = _SIZES.get(value.name.split(".")[0], _SIZES["input_ids"])  # type: ignore[union-attr]
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim):
                assert value.shape is not None
                value.shape[axis] = ir.SymbolicDim(names[axis])


def _strip(model: ir.Model) -> None:
    """Drop the exporter's notes (they name files of this machine) and sizes of what is in between (they name its symbols)."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    ends = {id(v) for v in (*model.graph.inputs, *model.graph.outputs)}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in ends and value.shape is not None:
                value.shape = ir.Shape(
                    [size if isinstance(size, int) else None for size in value.shape]
                )
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "moecc", None, None

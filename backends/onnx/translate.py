"""Translate a traced program into an ONNX graph that has the names of its weights, not the values.

1. PyTorch's exporter translates the ATen part; moecc's own ops become nodes (`operators`)
2. onnxscript folds constants; weights have no values here and stay as they are
3. `rewrites` put one node for a rotation, a mask, an attention, a norm with its sum
4. notes on where the graph was made, and the exporter's names for sizes, are removed
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Container, Iterator

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from onnxscript.rewriter import onnx_fusions

from moecc.backends.onnx import OPSETS, operators
from moecc.backends.onnx.cached import Cached
from moecc.backends.onnx.graph import DOMAIN, MICROSOFT, VERSION, own_name, producer
from moecc.backends.onnx.rewrites import attention, masks, norms, rotary
from moecc.errors import MoeccError, reason

# The names of an input's or output's open sizes, by the first part of its name.
_SIZES = {
    "input_ids": ("batch", "sequence", ""),
    "attention_mask": ("batch", "total"),
    "past_key_values": ("batch", "", "past", ""),
    "present": ("batch", "", "total", ""),
}


def translate(cached: Cached, opset: int, stored: Container[str]) -> ir.Model:
    """Return the graph of a traced program.

    An initializer of a name in `stored` stands for a weight: it has a shape and a dtype, and no
    value yet (`graph.weight_name`). That holds for a buffer too, though the traced module has
    numbers for it. Raise MoeccError if the exporter fails.
    """
    try:
        with _quiet():
            model = _exported(cached, opset)
            for value in model.graph.initializers.values():
                if own_name(value) in stored:
                    value.const_value = None
            onnxscript.optimizer.optimize_ir(model)
            rotary.fuse(model)
            onnx_fusions.fuse(model)  # into operators that opset 23 added
            norms.cast_to_scale(model)
            CommonSubexpressionEliminationPass()(model)
            masks.simplify(model)
            may_have_room = attention.fuse(model)
            norms.join_with_sums(model)
            _reshape_once(model)
    except MoeccError:
        raise
    except Exception as error:
        raise MoeccError(
            f"the model can't be translated to ONNX opset {opset}: {reason(_first(error))}"
        ) from error
    model.ir_version = OPSETS[opset].file_format
    model.opset_imports.update({DOMAIN: VERSION, MICROSOFT: 1})
    _name_sizes(model)
    _strip(model)
    if may_have_room:
        model.metadata_props[attention.ROOM] = "yes"
    return model


def _exported(cached: Cached, opset: int) -> ir.Model:
    """Return what PyTorch's exporter makes of a program."""
    made = torch.onnx.export(
        cached.program,
        (),
        dynamo=True,
        opset_version=opset,
        custom_translation_table=operators.TABLE,
        input_names=cached.input_names,
        output_names=cached.output_names,
        optimize=False,
        verbose=False,
    )
    assert made is not None
    return made.model


def _first(error: BaseException) -> BaseException:
    """Return the first cause of an error: the exporter wraps one error in the next."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's prints and logs about itself. Errors are raised as ever."""
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


# ---------------------------------------------------------------- after the exporter


def _reshape_once(model: ir.Model) -> None:
    """Drop a Reshape to the very sizes that the Reshape just before it has."""
    for node in [n for n in model.graph if n.op_type == "Reshape"]:
        before = producer(node.inputs[0])
        if before is None or before.op_type != "Reshape" or node.outputs[0].is_graph_output():
            continue
        ours, theirs = _target(node), _target(before)
        if ours is not None and ours == theirs and 0 not in ours:
            node.outputs[0].replace_all_uses_with(before.outputs[0])
            model.graph.remove(node, safe=True)


def _target(reshape: ir.Node) -> list[int] | None:
    """Return the sizes that a Reshape is given, None if they are computed."""
    sizes = reshape.inputs[1]
    if sizes is None or sizes.const_value is None:
        return None
    return [int(size) for size in sizes.const_value.numpy()]


def _name_sizes(model: ir.Model) -> None:
    """Name the open sizes batch, sequence, past and total in place of the tracer's symbols."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        names = _SIZES.get((value.name or "").split(".")[0], _SIZES["input_ids"])
        shape = value.shape if value.shape is not None else ir.Shape([])
        for axis, size in enumerate(shape):
            if isinstance(size, ir.SymbolicDim):
                shape[axis] = ir.SymbolicDim(names[axis])


def _strip(model: ir.Model) -> None:
    """Drop the exporter's notes, which name files of this machine.

    The shapes of inner values go too where they name the tracer's symbols.
    """
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    ends = {id(v) for v in (*model.graph.inputs, *model.graph.outputs)}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in ends and value.shape is not None:
                numbers = [size if isinstance(size, int) else None for size in value.shape]
                value.shape = ir.Shape(numbers)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "moecc", None, None

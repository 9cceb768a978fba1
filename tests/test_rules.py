"""The rules of the IR that `verify` holds, and the one line that names what breaks them."""

from __future__ import annotations

import pytest
import torch
from pipelines import Tiny, resolved
from torch import Tensor

from moecc.errors import MoeccError
from moecc.ir import vq4
from moecc.ir.program import Program
from moecc.pipeline.passes import Context
from moecc.pipeline.run import run_passes


def rejected(program: Program) -> str:
    """Return the message with which `verify` rejects a program."""
    with pytest.raises(MoeccError) as error:
        program.verify()
    return str(error.value)


SHAPES = [
    ("gate_up", (4, 16, 8), "gate_up is (4, 16, 8), expected (4, 16, 16)"),
    ("gate_up", (3, 16, 16), "down is (4, 16, 8), expected (3, 16, 8)"),
    ("down", (4, 16, 16), "down is (4, 16, 16), expected (4, 16, 8)"),
    ("down", (4, 8, 16), "down is (4, 8, 16), expected (4, 16, 8)"),
]


@pytest.mark.parametrize(("operand", "shape", "line"), SHAPES)
def test_operands_must_fit_each_other(
    tiny: Tiny, operand: str, shape: tuple[int, ...], line: str
) -> None:
    program = tiny("M")
    moe = program.moe_layers()[0]
    moe.set_operands({operand: program.add("wrong", torch.zeros(shape))})
    assert rejected(program) == f"node %experts (moecc.experts): {line}"


@pytest.mark.parametrize("name", vq4.TENSORS)
@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_every_tensor_of_the_format_is_checked(
    compressed: Program, projection: str, name: str
) -> None:
    program = compressed.copy()
    moe = program.moe_layers()[0]
    node = moe.operand(f"{projection}_{name}")
    assert node is not None
    held = program.value(node)
    longer = torch.zeros(*held.shape[:-1], held.shape[-1] + 1, dtype=held.dtype)
    moe.node.replace_input_with(node, program.add("wrong", longer))
    message = rejected(program)
    # the scale gives the number of rows, so a wrong one shows in the operands that do not fit it
    named = f"{projection}_" if name == "scale" else f"{projection}_{name} is "
    assert f"%{moe.node.name} (moecc.vq_experts): {named}" in message and "expected" in message


@pytest.mark.parametrize("name", vq4.TENSORS)
def test_every_tensor_of_the_format_has_its_type(compressed: Program, name: str) -> None:
    program = compressed.copy()
    moe = program.moe_layers()[0]
    node = moe.operand(f"down_{name}")
    assert node is not None
    held = program.value(node)
    moe.node.replace_input_with(node, program.add("wrong", held.float()))
    message = rejected(program)
    want = {torch.uint8: "u8", torch.int8: "i8"}.get(held.dtype, "f16 or bf16")
    assert f"%{moe.node.name} (moecc.vq_experts): down_{name} is f32[" in message
    assert message.endswith(f"expected {want}")


def test_held_weights_must_be_finite(compressed: Program) -> None:
    program = compressed.copy()
    name = next(w.name for w in program.weights.values() if w.name.endswith("down.scale"))
    scale = program.read(name).clone()
    scale[0, 0] = torch.nan
    program.add(name, scale)
    line = f"weight {name} holds 1 NaN and 0 infinite values of {scale.numel()}"
    assert rejected(program) == line


def test_a_graph_out_of_order_is_rejected_in_one_line(tiny: Tiny) -> None:
    program = tiny("MD")
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    first, last = calls[:: len(program.graph.nodes) // 2][:2]
    last.append(first)
    message = rejected(program)
    assert message.startswith("the graph isn't one: Argument ") and "\n" not in message


@pytest.mark.parametrize("name", [n for n in vq4.TENSORS if n.startswith(vq4.MEAN)])
def test_a_mean_is_one_matrix(
    tiny: Tiny, batches: list[Tensor], compressed: Program, name: str
) -> None:
    factored = tiny("M")
    run_passes(factored, resolved("klt{rank=0,mean=3}"), Context(), batches)
    for program, op in ((compressed.copy(), "vq_experts"), (factored, "klt_experts")):
        moe = program.moe_layers()[0]
        for projection in ("gate_up", "down"):
            node = moe.operand(f"{projection}_{name}")
            assert node is not None
            held = program.value(node)
            wrong = program.add("wrong", torch.cat([held, held]))
            moe.node.replace_input_with(node, wrong)
            message = rejected(program)
            where = f"node %{moe.node.name} (moecc.{op})"
            assert message.startswith(f"{where}: {projection}_{name} is (2, ")
            assert message.endswith(f"expected {tuple(held.shape)}")
            moe.node.replace_input_with(wrong, node)
        program.verify()


@pytest.mark.parametrize("name", ["coef", "basis", "mean_codebook", "mean_scale"])
def test_a_basis_or_mean_must_be_whole_or_absent(compressed: Program, name: str) -> None:
    program = compressed.copy()
    moe = program.moe_layers()[0]
    node = moe.operand(f"down_{name}")
    moe.node.args = tuple(None if a is node else a for a in moe.node.args)
    assert f" without down_{name}" in rejected(program)


def test_routing_must_fit_the_tokens(tiny: Tiny) -> None:
    program = tiny("M")
    node = program.moe_layers()[0].node
    node.update_arg(1, node.args[2].args[0])  # the pair that topk returns
    message = rejected(program)
    assert message.startswith("node %experts (moecc.experts) does not type-check")


@pytest.mark.parametrize("key", ["val", "layer"])
def test_a_node_without_meta_is_rejected(tiny: Tiny, key: str) -> None:
    program = tiny("MD")
    node = next(n for n in program.graph.nodes if n.name == "tanh")
    del node.meta[key]
    line = "node %tanh (aten.tanh) lacks meta 'val' or 'layer'; a pass must set both"
    assert rejected(program) == line


def test_a_node_may_not_read_from_a_later_stage(tiny: Tiny) -> None:
    program = tiny("MD")
    next(n for n in program.graph.nodes if n.name == "linear_1").meta["layer"] = 3
    assert rejected(program) == "node %tanh in stage 2 reads %linear_1 of stage 3"


@pytest.mark.parametrize("wrong", [torch.zeros(5), torch.zeros(4, dtype=torch.float16)])
def test_a_held_tensor_must_have_the_type_of_its_node(tiny: Tiny, wrong: Tensor) -> None:
    program = tiny("M")
    program.add("extra", torch.zeros(4))
    program.tensors["extra"] = wrong
    assert rejected(program).startswith("weight extra is ")
    assert rejected(program).endswith("but its node says f32[4]")

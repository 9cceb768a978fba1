"""Which linears of a layer every token goes through, and why the others are left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from moecc.ir.program import Program
from moecc.passes._tune import linears as module
from moecc.passes._tune.linears import linears, router_nodes

ATEN = torch.ops.aten
NAME = "layers.0.linear.weight"


@pytest.fixture
def program(tiny: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch) -> Program:
    """A dense layer of 16 outputs, which are enough here, and one of experts."""
    monkeypatch.setattr(module, "FEWEST_OUTPUTS", 16)
    return tiny("DM")


def found(program: Program) -> dict[str, str]:
    """Return why each linear of the layers is left alone."""
    stages = range(-1, program.layers + 1)
    return {name: why for i in stages for _, name, why in linears(program, i)}


def behind(node: fx.Node, target: fx.node.Target, *args: fx.node.Argument) -> fx.Node:
    """Add a reader of `node` right behind it."""
    with node.graph.inserting_after(node):
        reader = node.graph.call_function(target, (node, *args))
    reader.meta.update(node.meta)
    return reader


def test_linears_of_layers_are_taken_and_routers_are_not(program: Program) -> None:
    """The head is in no decoder layer."""
    assert found(program) == {NAME: "", "layers.1.gate.weight": "router"}
    for stage, want in ((0, []), (1, [NAME]), (2, ["layers.1.gate.weight"]), (3, [])):
        nodes = list(linears(program, stage))
        assert [name for _, name, _ in nodes] == want
        for node, name, _ in nodes:
            assert node.target is ATEN.linear.default
            assert program.weights[node.args[1].name].name == name  # type: ignore[union-attr]


def test_a_router_is_what_chooses_and_does_not_make_the_experts_input(program: Program) -> None:
    nodes = router_nodes(program)
    assert {"linear_1", "softmax", "topk"} <= {n.name for n in nodes}
    moe = program.moe_layers()[0]
    (x, index, weight), before = moe.node.args[:3], {n.name for n in nodes}
    assert x not in nodes and {index, weight} <= nodes and moe.logits in nodes
    # scores that scale the experts' input make it too, and only their linear stays a router's
    scaled = behind(weight, ATEN.mul.Tensor, x)  # type: ignore[arg-type]
    moe.node.update_arg(0, scaled)
    after = {n.name for n in router_nodes(program)}
    assert moe.logits is not None and moe.logits.name in after
    assert "softmax" in before - after and found(program)["layers.1.gate.weight"] == "router"


def test_every_layer_has_its_router(tiny: Callable[[str], Program]) -> None:
    program = tiny("MM")
    assert found(program) == {f"layers.{i}.gate.weight": "router" for i in range(2)}


def test_a_weight_that_is_no_parameter_is_not_taken(program: Program) -> None:
    (node,) = (n for n, name, _ in linears(program, 1) if name == NAME)
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    node.update_arg(1, behind(weight, ATEN.neg.default))
    assert NAME not in found(program) and len(found(program)) == 1


@pytest.mark.parametrize(
    ("outputs", "why"), [(16, ""), (17, "fewer than 17 outputs"), (15, "")], ids=str
)
def test_few_outputs_are_left_alone(
    outputs: int, why: str, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FEWEST_OUTPUTS", outputs)
    assert found(program)[NAME] == why


@pytest.mark.parametrize(
    ("through", "why"),
    [
        ([(ATEN.sigmoid.default,)], "gate"),
        (
            [(ATEN.view.default, [6, 16]), (ATEN.unsqueeze.default, 0), (ATEN.sigmoid.default,)],
            "gate",
        ),
        ([(ATEN.neg.default,), (ATEN.sigmoid.default,)], ""),
        ([(ATEN.view.default, [6, 16]), (ATEN.neg.default,)], ""),
    ],
    ids=["sigmoid", "views", "negated", "none"],
)
def test_a_linear_whose_result_goes_into_a_sigmoid_is_a_gate(
    through: list[tuple[fx.node.Target]], why: str, program: Program
) -> None:
    (node,) = (n for n, name, _ in linears(program, 1) if name == NAME)
    reader = node
    for target, *args in through:
        reader = behind(reader, target, *args)
    assert found(program)[NAME] == why


def test_a_weight_that_something_else_reads_is_left_alone(program: Program) -> None:
    (node,) = (n for n, name, _ in linears(program, 1) if name == NAME)
    behind(node, ATEN.matmul.default, node.args[1])
    assert found(program)[NAME] == "its weight is read more than once"


@pytest.mark.parametrize(
    "stack", [None, {}, {"a": ("", "x.Linear")}, {"a": ("", "linear.Linear2")}]
)
def test_a_linear_outside_an_nn_linear_is_left_alone(
    stack: dict[str, tuple[str, str]] | None, program: Program
) -> None:
    (node,) = (n for n, name, _ in linears(program, 1) if name == NAME)
    inner = ("", "torch.nn.modules.linear.Linear")
    node.meta["nn_module_stack"] = stack
    assert found(program)[NAME] == "not the forward of an nn.Linear"
    node.meta["nn_module_stack"] = {**(stack or {}), "last": inner}
    assert found(program)[NAME] == ""
    node.meta["nn_module_stack"] = {"first": inner, **(stack or {"b": ("", "Own")})}
    assert found(program)[NAME] == "not the forward of an nn.Linear"

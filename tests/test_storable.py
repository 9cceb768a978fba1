"""What an artifact can hold of a program, on graphs that fit on a page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from moecc.errors import MoeccError
from moecc.ir import ops
from moecc.ir.program import Program
from moecc.pipeline.storable import require_nodes, require_tensors

ATEN = torch.ops.aten
END = (
    "; a compiled model runs its family's code for all but coded experts and quantized linears, "
    "so say it in weights"
)
Change = Callable[[fx.Graph, fx.Node], object]


@pytest.fixture
def pair(tiny: Callable[[str], Program]) -> tuple[Program, Program]:
    """A program of two layers, and the same as it was traced."""
    traced = tiny("MD")
    return traced.copy(), traced


def find(program: Program, name: str) -> fx.Node:
    return next(n for n in program.graph.nodes if n.name == name)


def added(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_after(node):
        more = graph.call_function(ATEN.neg.default, (node,))
    more.meta.update(node.meta)


def retargeted(target: object) -> Change:
    def change(graph: fx.Graph, node: fx.Node) -> None:
        node.target = target  # type: ignore[assignment]

    return change


@pytest.mark.parametrize(
    ("name", "change", "begins", "holds"),
    [
        ("tanh", added, "a pass added %neg_default : f32[6, 16] = aten.neg(%tanh)", ""),
        ("tanh", retargeted(ATEN.neg.default), "a pass made %tanh : ", "= aten.neg(%linear"),
        ("tanh", retargeted(ops.Q_LINEAR), "a pass made %tanh : ", "= moecc.q_linear(%linear"),
        ("experts", retargeted(ops.Q_LINEAR), "a pass made %experts : ", "= moecc.q_linear("),
        ("experts", lambda g, n: n.update_kwarg("act", "gelu"), "a pass made %experts", "gelu"),
        ("softmax", lambda g, n: n.update_arg(1, 0), "a pass made %softmax", "to %softmax"),
    ],
)
def test_a_node_that_is_not_as_it_was_traced_is_refused(
    name: str, change: Change, begins: str, holds: str, pair: tuple[Program, Program]
) -> None:
    program, traced = pair
    require_nodes(program, traced)
    change(program.graph, find(program, name))
    with pytest.raises(MoeccError) as error:
        require_nodes(program, traced)
    said = str(error.value)
    assert said.startswith(begins) and holds in said and said.endswith(END)


def test_a_node_is_looked_for_in_its_own_stage(pair: tuple[Program, Program]) -> None:
    more, fewer = pair
    added(more.graph, find(more, "tanh"))
    for stage in (0, 1, 3):
        require_nodes(fewer, more, stage)
    for its_own in (2, None):
        with pytest.raises(MoeccError) as error:
            require_nodes(fewer, more, its_own)
        line = more.line(find(more, "neg_default"))
        assert str(error.value) == f"a pass removed {line}{END}"


@pytest.mark.parametrize("target", [ops.VQ_EXPERTS, ops.KLT_EXPERTS, ops.EXPERTS])
def test_experts_may_be_coded_on_the_same_tokens(
    target: Any, pair: tuple[Program, Program]
) -> None:
    """Operands and attributes of a coded node are its own, but for the tokens and the routing."""
    program, traced = pair
    node = find(program, "experts")
    node.target, node.args = target, node.args[: None if target is ops.EXPERTS else 4]
    if target is not ops.EXPERTS:
        node.update_kwarg("act", "gelu")
    require_nodes(program, traced)
    node.update_arg(2, node.args[0])  # another routing weight
    with pytest.raises(MoeccError, match="a pass made %experts"):
        require_nodes(program, traced)


def test_a_linear_may_be_quantized_on_the_same_tokens(pair: tuple[Program, Program]) -> None:
    program, traced = pair
    node = find(program, "tanh").args[0]
    assert isinstance(node, fx.Node)
    node.target, node.args = ops.Q_LINEAR, node.args[:1]
    require_nodes(program, traced)
    node.args = (find(program, "experts"),)
    with pytest.raises(MoeccError, match=f"a pass made %{node.name} "):
        require_nodes(program, traced)


def test_a_tensor_needs_a_place(pair: tuple[Program, Program]) -> None:
    program, traced = pair
    store: Any = program.store
    store.tied = {"head.weight": "embed.weight"}
    program.add("embed.weight", torch.ones(16, 16))
    require_tensors(program, traced)
    program.tensors["mine"] = torch.ones(2)
    with pytest.raises(MoeccError) as error:
        require_tensors(program, traced)
    end = "can't be stored: the model has no parameter of that name"
    assert str(error.value) == f"a pass gave mine a value that {end}"
    before = program.copy()
    program.tensors["head.weight"] = torch.ones(16, 16)
    with pytest.raises(MoeccError) as error:
        require_tensors(program, before)  # who held `mine` before
    assert str(error.value) == (
        "a pass gave head.weight a value that can't be stored: it is tied to embed.weight"
    )
    program.store = None
    require_tensors(program, traced)


def test_an_operand_of_a_quantized_linear_is_a_place(pair: tuple[Program, Program]) -> None:
    program, traced = pair
    node = find(program, "tanh").args[0]
    assert isinstance(node, fx.Node)
    scale = program.add("layers.1.linear.scale", torch.ones(16, 1))
    with pytest.raises(MoeccError, match=r"a pass gave layers\.1\.linear\.scale a value"):
        require_tensors(program, traced)
    program.replace(node, ops.Q_LINEAR, (*node.args[:2], scale), {"bits": 8})
    require_tensors(program, traced)


def test_a_parameter_keeps_its_shape(pair: tuple[Program, Program]) -> None:
    """Such as experts of which a pass takes one out; the configuration says how many there are."""
    program, traced = pair
    program.add("layers.0.down", torch.ones(3, 16, 8))
    with pytest.raises(MoeccError) as error:
        require_tensors(program, traced)
    assert str(error.value) == (
        "a pass gave layers.0.down the shape [3, 16, 8], but its configuration says [4, 16, 8]"
    )
    program.tensors.spill("layers.0.down", lambda: torch.ones(3, 16, 8))  # noticed when it is read
    require_tensors(program, traced)

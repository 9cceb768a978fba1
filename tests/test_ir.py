"""The IR: its text, rewriting, derived weights, and the router of a layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import make
from pipelines import Tiny
from torch import fx

from moecc.errors import MoeccError
from moecc.frontend.trace import trace
from moecc.ir import ops, vq4
from moecc.ir.moe import router_logits
from moecc.ir.tensors import digest

# ---- text


def test_a_small_graph_has_the_golden_text(tiny: Tiny, golden: Callable[[str, str], None]) -> None:
    golden("graph.txt", tiny("MD").text())


def test_text_tells_plain_derived_and_held_weights_apart(tiny: Tiny) -> None:
    program = tiny("M")
    value = torch.arange(4.0)
    program.add("extra", value)
    assert f'%w_extra : f32[4] = held "extra" #{digest(value)}' in program.text().splitlines()
    assert '%p_head_weight : f32[16, 16] = weight "head.weight"' in program.text()
    assert '= derived "model.layers.0.mlp.experts.gate_up"' in trace(make("gpt_oss")).text()


def test_a_held_tensor_that_changes_by_one_bit_changes_the_text(tiny: Tiny) -> None:
    program = tiny("M")
    value = torch.arange(4.0)
    program.add("extra", value)
    before = program.text()
    program.add("extra", torch.nextafter(value, value + 1))
    assert program.text() != before


# ---- rewriting


def test_add_puts_a_placeholder_before_the_inputs_or_gives_a_new_value(tiny: Tiny) -> None:
    program = tiny("M")
    node = program.add("extra", torch.zeros(4))
    order = [n.name for n in program.graph.nodes]
    assert order.index(node.name) < order.index(program.user_inputs[0].name)
    assert program.add("extra", torch.ones(2, 2)) is node
    assert tuple(node.meta["val"].shape) == (2, 2)
    assert torch.equal(program.read("extra"), torch.ones(2, 2))
    assert node not in program.user_inputs


def test_replace_keeps_name_place_and_meta(tiny: Tiny) -> None:
    program = tiny("M")
    moe = program.moe_layers()[0]
    name, meta, before = moe.node.name, dict(moe.node.meta), [n.name for n in program.graph.nodes]
    args = (*moe.node.args[:5], *[None] * (2 * len(vq4.SHARED)), *moe.node.args[5:])
    new = program.replace(moe.node, ops.KLT_EXPERTS, args, moe.attributes)
    assert (new.name, new.meta, [n.name for n in program.graph.nodes]) == (name, meta, before)
    assert [m.node.target for m in program.moe_layers()] == [ops.KLT_EXPERTS]
    assert router_logits(new) is not None
    program.verify()


def test_replace_drops_weights_without_a_reader(tiny: Tiny) -> None:
    program = tiny("M")
    moe = program.moe_layers()[0]
    mine = program.add("layers.0.mine", torch.zeros(4, 16, 16))
    args = (*moe.node.args[:3], mine, *moe.node.args[4:])
    program.replace(moe.node, ops.EXPERTS, args, moe.attributes)
    assert "p_layers_0_gate_up" not in program.weights and "p_layers_0_down" in program.weights
    other = program.add("other", torch.zeros(4, 16, 16))
    program.replace(moe.node, ops.EXPERTS, (*args[:3], other, *args[4:]), moe.attributes)
    assert "layers.0.mine" not in program.tensors
    assert not any(w.name == "layers.0.mine" for w in program.weights.values())


def test_a_copy_has_a_graph_of_its_own(tiny: Tiny) -> None:
    program = tiny("M")
    program.facts.add("moments")
    copy, text = program.copy(), program.text()
    assert copy.text() == text and copy.facts == {"moments"}
    copy.moe_layers()[0].node.update_kwarg("act", "relu")
    copy.add("extra", torch.zeros(3))
    copy.facts.add("vq")
    assert program.text() == text
    assert "extra" not in program.tensors
    assert program.facts == {"moments"}


def test_rewrite_rounds_to_the_type_of_the_checkpoint(tiny: Tiny) -> None:
    program = tiny("M")
    store = program.store
    name = next(iter(store.tensors))
    store.tensors = {n: t.bfloat16() for n, t in store.tensors.items()}
    value = torch.full_like(program.read(name), 1.0 + 2.0**-12)
    program.rewrite(name, value)
    assert torch.equal(program.read(name), torch.ones_like(value)) and name in program.rounded
    program.add(name, value)
    assert torch.equal(program.read(name), value) and name not in program.rounded


# ---- weights


def test_the_layout_of_gpt_oss_becomes_canonical() -> None:
    """It is transposed, with gate and up columns in turns; canonical are gate, then up rows."""
    model = make("gpt_oss")
    program = trace(model)
    state = model.state_dict()
    for moe in program.moe_layers():
        got = {p.name: program.value(p.operand()) for p in moe.projections}
        bias = {p.name: program.value(p.operand("bias")) for p in moe.projections}
        raw = {p.name: state[f"{p.path}_proj"] for p in moe.projections}
        turns = state[f"{moe.path}.gate_up_proj_bias"]
        parted = torch.cat([raw["gate_up"][..., 0::2], raw["gate_up"][..., 1::2]], -1).mT
        assert torch.equal(got["gate_up"], parted)
        assert torch.equal(bias["gate_up"], torch.cat([turns[..., 0::2], turns[..., 1::2]], -1))
        assert torch.equal(got["down"], raw["down"].mT)
        assert torch.equal(bias["down"], state[f"{moe.path}.down_proj_bias"])
        name = program.weights[moe.gate_up.operand().name].name
        assert torch.equal(program.read(name, experts=[2, 0]), got["gate_up"][[2, 0]])
        assert program.origins(name) == (f"{moe.path}.gate_up_proj",)


def test_reading_a_missing_weight_is_an_error(tiny: Tiny) -> None:
    program = tiny("M")
    message = "nothing: not in the checkpoint tiny; give a complete checkpoint"
    with pytest.raises(MoeccError, match=message):
        program.read("nothing")
    program.store = None
    with pytest.raises(MoeccError, match="no weights, the program was traced from a config"):
        program.read("head.weight")


# ---- the router


ROUTERS = {
    "qwen2_moe": "mlp.gate.weight",
    "gpt_oss": "mlp.router.weight",
    "deepseek_v3": "mlp.gate.weight",
    "mixtral": "mlp.gate.weight",
    "llama4_text": "feed_forward.router.weight",
}


@pytest.mark.parametrize(("family", "weight"), ROUTERS.items())
def test_the_router_is_the_linear_behind_the_chosen_indices(family: str, weight: str) -> None:
    program = trace(make(family))
    assert program.moe_layers()
    for moe in program.moe_layers():
        assert moe.logits is not None and moe.logits.meta["layer"] == moe.layer
        found = weights_behind(moe.logits)
        names = [program.weights[i.name].name for i in found if i.name in program.weights]
        assert f"model.layers.{moe.layer - 1}.{weight}" in names
        assert moe.top_k == (1 if family == "llama4_text" else 2)


def weights_behind(node: fx.Node) -> list[fx.Node]:
    """Return the placeholders of a linear's weight and bias, also behind casts."""
    found: list[fx.Node] = []
    stack = [i for i in node.all_input_nodes if i is not node.args[0]]
    while stack:
        i = stack.pop()
        found += [i] if i.op == "placeholder" else []
        stack += i.all_input_nodes
    return found


def test_a_layer_that_routes_by_token_id_has_no_router() -> None:
    """The first layers of deepseek_v4 look their experts up in a table."""
    assert [moe.logits for moe in trace(make("deepseek_v4")).moe_layers()] == [None, None]


def test_routing_that_is_an_input_has_no_router(tiny: Tiny) -> None:
    program = tiny("M")
    node = program.moe_layers()[0].node
    node.update_arg(1, program.add("fixed", torch.zeros(6, 2, dtype=torch.int64)))
    assert router_logits(node) is None

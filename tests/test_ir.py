"""The IR: its text, the rules that `verify` holds, rewriting, derived weights, and the ways out of it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import make
from torch import Tensor

from moecc.errors import MoeccError
from moecc.frontend.trace import trace
from moecc.ir import ops, vq4
from moecc.ir.graph import run_nodes
from moecc.ir.moe import router_logits
from moecc.ir.program import Program, stage_nodes
from moecc.ir.tensors import digest
from moecc.pipeline.order import resolve
from moecc.pipeline.parse import parse_passes
from moecc.pipeline.passes import Context
from moecc.pipeline.run import run_passes
from moecc.pipeline.stream import Stream, run_program

Tiny = Callable[[str], Program]
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def qwen() -> tuple[Any, Program]:
    model = make("qwen2_moe")
    return model, trace(model)


@pytest.fixture(scope="module")
def compressed(qwen: tuple[Any, Program]) -> Program:
    """qwen2_moe after every kind of rewrite: shared basis and mean, codes with signs, folded affine correction."""
    program = qwen[1].copy()
    passes = resolve(parse_passes("klt{rank=2,mean=3},vq{bits=3},affine{offset=on},fold")[0])[0]
    batches = [
        torch.randint(0, 64, (1, 16), generator=torch.Generator().manual_seed(i)) for i in range(4)
    ]
    run_passes(program, passes, Context(), batches)
    return program


def experts_of(program: Program) -> Any:
    return program.moe_layers()[0].node


# ---- text


def test_the_text_of_a_small_graph(tiny: Tiny, golden: Callable[[str, str], None]) -> None:
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


# ---- rules


def rejected(program: Program) -> str:
    with pytest.raises(MoeccError) as error:
        program.verify()
    return str(error.value)


@pytest.mark.parametrize(
    ("operand", "shape"),
    [
        ("gate_up", (4, 16, 8)),
        ("gate_up", (3, 16, 16)),
        ("down", (4, 16, 16)),
        ("down", (4, 8, 16)),
    ],
)
def test_operands_must_fit_each_other(tiny: Tiny, operand: str, shape: tuple[int, ...]) -> None:
    program = tiny("M")
    moe = program.moe_layers()[0]
    node = program.add("wrong", torch.zeros(shape))
    args = list(moe.node.args)
    args[3 if operand == "gate_up" else 4] = node
    moe.node.args = tuple(args)
    message = rejected(program)
    assert (
        "%experts (moecc.experts)" in message and str(shape) in message
    ) or "expected" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", vq4.TENSORS)
@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_every_tensor_of_the_format_is_checked(
    compressed: Program, projection: str, name: str
) -> None:
    program = compressed.copy()
    moe = program.moe_layers()[0]
    node = moe.operand(f"{projection}_{name}")
    assert node is not None
    held = program.read(program.weights[node.name].name)
    wrong = program.add(
        "wrong", torch.zeros(*held.shape[:-1], held.shape[-1] + 1, dtype=held.dtype)
    )
    moe.node.replace_input_with(node, wrong)
    message = rejected(program)
    # the scale is what the number of rows is read from: what does not fit it is named
    named = f"{projection}_" if name == "scale" else f"{projection}_{name} is "
    assert f"%{moe.node.name} (moecc.vq_experts): {named}" in message and "expected" in message


@pytest.mark.parametrize("name", vq4.TENSORS)
def test_every_tensor_of_the_format_has_its_type(compressed: Program, name: str) -> None:
    program = compressed.copy()
    moe = program.moe_layers()[0]
    node = moe.operand(f"down_{name}")
    assert node is not None
    held = program.read(program.weights[node.name].name)
    moe.node.replace_input_with(node, program.add("wrong", held.float()))
    message = rejected(program)
    want = {torch.uint8: "u8", torch.int8: "i8"}.get(held.dtype, "f16 or bf16")
    assert f"%{moe.node.name} (moecc.vq_experts): down_{name} is f32[" in message
    assert message.endswith(f"expected {want}")


def test_held_weights_are_finite(compressed: Program) -> None:
    program = compressed.copy()
    name = next(w.name for w in program.weights.values() if w.name.endswith("down.scale"))
    scale = program.read(name).clone()
    scale[0, 0] = torch.nan
    program.add(name, scale)
    assert (
        rejected(program) == f"weight {name} holds 1 NaN and 0 infinite values of {scale.numel()}"
    )


def test_a_graph_out_of_order_is_one_line(tiny: Tiny) -> None:
    program = tiny("MD")
    first, last = [n for n in program.graph.nodes if n.op == "call_function"][
        :: len(program.graph.nodes) // 2
    ][:2]
    last.append(first)
    message = rejected(program)
    assert message.startswith("the graph isn't one: Argument ") and "\n" not in message


def test_rewrite_rounds_to_what_the_checkpoint_stores(tiny: Tiny) -> None:
    program = tiny("M")
    store: Any = program.store
    name = next(iter(store.tensors))
    store.tensors = {n: t.bfloat16() for n, t in store.tensors.items()}
    value = torch.full_like(program.read(name), 1.0 + 2.0**-12)
    program.rewrite(name, value)
    assert torch.equal(program.read(name), torch.ones_like(value)) and name in program.rounded
    program.add(name, value)
    assert torch.equal(program.read(name), value) and name not in program.rounded


@pytest.mark.parametrize("name", [n for n in vq4.TENSORS if n.startswith(vq4.MEAN)])
def test_a_mean_is_one_matrix(
    tiny: Tiny, batches: list[Tensor], compressed: Program, name: str
) -> None:
    factored = tiny("M")
    run_passes(factored, resolve(parse_passes("klt{rank=0,mean=3}")[0])[0], Context(), batches)
    for program, op in ((compressed.copy(), "vq_experts"), (factored, "klt_experts")):
        moe = program.moe_layers()[0]
        for projection in ("gate_up", "down"):
            node = moe.operand(f"{projection}_{name}")
            assert node is not None
            held = program.read(program.weights[node.name].name)
            wrong = program.add("wrong", torch.cat([held, held]))
            moe.node.replace_input_with(node, wrong)
            message = rejected(program)
            assert message.startswith(
                f"node %{moe.node.name} (moecc.{op}): {projection}_{name} is (2, "
            )
            assert message.endswith(f"expected {tuple(held.shape)}")
            moe.node.replace_input_with(wrong, node)
        program.verify()


@pytest.mark.parametrize("name", ["coef", "basis", "mean_codebook", "mean_scale"])
def test_what_is_shared_is_there_whole_or_not_at_all(compressed: Program, name: str) -> None:
    program = compressed.copy()
    moe = program.moe_layers()[0]
    node = moe.operand(f"down_{name}")
    moe.node.args = tuple(None if a is node else a for a in moe.node.args)
    assert f" without down_{name}" in rejected(program)


def test_routing_must_fit_the_tokens(tiny: Tiny) -> None:
    program = tiny("M")
    node = experts_of(program)
    node.update_arg(1, node.args[2].args[0])  # the pair that topk returns
    message = rejected(program)
    assert message.startswith("node %experts (moecc.experts) does not type-check")


@pytest.mark.parametrize("key", ["val", "layer"])
def test_a_node_without_meta_is_rejected(tiny: Tiny, key: str) -> None:
    program = tiny("MD")
    node = next(n for n in program.graph.nodes if n.name == "tanh")
    del node.meta[key]
    assert (
        rejected(program)
        == "node %tanh (aten.tanh) lacks meta 'val' or 'layer'; a pass must set both"
    )


def test_a_node_may_not_read_from_a_later_stage(tiny: Tiny) -> None:
    program = tiny("MD")
    next(n for n in program.graph.nodes if n.name == "linear_1").meta["layer"] = 3
    assert rejected(program) == "node %tanh in stage 2 reads %linear_1 of stage 3"


@pytest.mark.parametrize("wrong", [torch.zeros(5), torch.zeros(4, dtype=torch.float16)])
def test_a_held_tensor_must_be_what_its_node_says(tiny: Tiny, wrong: Tensor) -> None:
    program = tiny("M")
    program.add("extra", torch.zeros(4))
    program.tensors["extra"] = wrong
    assert rejected(program).startswith("weight extra is ")
    assert rejected(program).endswith("but its node says f32[4]")


# ---- rewriting


def test_add_puts_a_placeholder_before_the_inputs_and_gives_a_known_name_its_new_value(
    tiny: Tiny,
) -> None:
    program = tiny("M")
    node = program.add("extra", torch.zeros(4))
    order = [n.name for n in program.graph.nodes]
    assert order.index(node.name) < order.index(program.user_inputs[0].name)
    assert program.add("extra", torch.ones(2, 2)) is node
    assert tuple(node.meta["val"].shape) == (2, 2)
    assert torch.equal(program.read("extra"), torch.ones(2, 2))
    assert node not in program.user_inputs


def test_replace_keeps_the_name_the_place_and_the_meta(tiny: Tiny) -> None:
    program = tiny("M")
    moe = program.moe_layers()[0]
    name, meta, before = moe.node.name, dict(moe.node.meta), [n.name for n in program.graph.nodes]
    args = (*moe.node.args[:5], *[None] * (2 * len(vq4.SHARED)), *moe.node.args[5:])
    new = program.replace(moe.node, ops.KLT_EXPERTS, args, moe.attributes)
    assert (new.name, new.meta, [n.name for n in program.graph.nodes]) == (name, meta, before)
    assert [m.node.target for m in program.moe_layers()] == [ops.KLT_EXPERTS]
    assert router_logits(new) is not None
    program.verify()


def test_replace_drops_weights_that_nothing_reads_any_more(tiny: Tiny) -> None:
    program = tiny("M")
    moe = program.moe_layers()[0]
    mine = program.add("layers.0.mine", torch.zeros(4, 16, 16))
    args = (*moe.node.args[:3], mine, *moe.node.args[4:])
    program.replace(moe.node, ops.EXPERTS, args, moe.attributes)
    assert "p_layers_0_gate_up" not in program.weights and "p_layers_0_down" in program.weights
    program.replace(
        moe.node,
        ops.EXPERTS,
        (*args[:3], program.add("other", torch.zeros(4, 16, 16)), *args[4:]),
        moe.attributes,
    )
    assert "layers.0.mine" not in program.tensors
    assert not any(w.name == "layers.0.mine" for w in program.weights.values())


def test_a_copy_has_a_graph_of_its_own(tiny: Tiny) -> None:
    program = tiny("M")
    program.facts.add("moments")
    copy, text = program.copy(), program.text()
    assert copy.text() == text and copy.facts == {"moments"}
    experts_of(copy).update_kwarg("act", "relu")
    copy.add("extra", torch.zeros(3))
    copy.facts.add("vq")
    assert program.text() == text
    assert "extra" not in program.tensors
    assert program.facts == {"moments"}


# ---- weights


def test_gpt_oss_s_layout_becomes_canonical() -> None:
    """Stored transposed with gate and up columns in turns; canonical is [E, gate rows then up rows, D]."""
    model = make("gpt_oss")
    program = trace(model)
    state = model.state_dict()
    for moe in program.moe_layers():
        value = {n: moe.operand(n) for n in ("gate_up", "down", "gate_up_bias", "down_bias")}
        got = {
            n: program.read(program.weights[v.name].name) for n, v in value.items() if v is not None
        }
        raw = {n: state[f"{moe.path}.{n}_proj"] for n in ("gate_up", "down")}
        bias = state[f"{moe.path}.gate_up_proj_bias"]
        assert torch.equal(
            got["gate_up"], torch.cat([raw["gate_up"][..., 0::2], raw["gate_up"][..., 1::2]], -1).mT
        )
        assert torch.equal(got["gate_up_bias"], torch.cat([bias[..., 0::2], bias[..., 1::2]], -1))
        assert torch.equal(got["down"], raw["down"].mT)
        assert torch.equal(got["down_bias"], state[f"{moe.path}.down_proj_bias"])
        name = program.weights[value["gate_up"].name].name  # type: ignore[union-attr]
        assert torch.equal(program.read(name, experts=[2, 0]), got["gate_up"][[2, 0]])
        assert program.origins(name) == (f"{moe.path}.gate_up_proj",)


def test_reading_says_what_is_missing(tiny: Tiny) -> None:
    program = tiny("M")
    with pytest.raises(
        MoeccError, match="nothing: not in the checkpoint tiny; give a complete checkpoint"
    ):
        program.read("nothing")
    program.store = None
    with pytest.raises(MoeccError, match="no weights, the program was traced from a config"):
        program.read("head.weight")


# ---- the router


@pytest.mark.parametrize(
    ("family", "weight"),
    [
        ("qwen2_moe", "mlp.gate.weight"),
        ("gpt_oss", "mlp.router.weight"),
        ("deepseek_v3", "mlp.gate.weight"),
        ("mixtral", "mlp.gate.weight"),
        ("llama4_text", "feed_forward.router.weight"),
    ],
)
def test_the_router_is_the_linear_behind_the_chosen_indices(family: str, weight: str) -> None:
    program = trace(make(family))
    assert program.moe_layers()
    for moe in program.moe_layers():
        assert moe.logits is not None and moe.logits.meta["layer"] == moe.layer
        names = [
            program.weights[i.name].name
            for i in weights_behind(moe.logits)
            if i.name in program.weights
        ]
        assert f"model.layers.{moe.layer - 1}.{weight}" in names
        assert moe.top_k == (1 if family == "llama4_text" else 2)


def weights_behind(node: Any) -> list[Any]:
    """The placeholders of a linear's weight and bias, through casts of them."""
    found, stack = [], [i for i in node.all_input_nodes if i is not node.args[0]]
    while stack:
        i = stack.pop()
        found += [i] if i.op == "placeholder" else []
        stack += i.all_input_nodes
    return found


def test_a_layer_that_routes_by_token_id_has_no_router() -> None:
    """deepseek_v4's first layers look their experts up in a table."""
    assert [moe.logits for moe in trace(make("deepseek_v4")).moe_layers()] == [None, None]


def test_routing_that_is_an_input_has_no_router(tiny: Tiny) -> None:
    program = tiny("M")
    node = experts_of(program)
    node.update_arg(1, program.add("fixed", torch.zeros(6, 2, dtype=torch.int64)))
    assert router_logits(node) is None


# ---- running


def test_a_program_runs_as_the_model_does(qwen: tuple[Any, Program]) -> None:
    model, program = qwen
    with torch.no_grad():
        want = model(IDS).logits
    torch.testing.assert_close(run_program(program, [IDS])[0], want, rtol=1e-5, atol=1e-5)


def test_a_stream_taps_without_moving_and_keeps_what_later_stages_read(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    program = tiny("MD")
    seen: dict[str, list[Tensor]] = {}
    run_program(
        program, batches, lambda node, value, batch: seen.setdefault(node.name, []).append(value)
    )
    stream = Stream(program, batches)
    stream.advance()
    for name in ("linear", "experts"):
        assert all(
            torch.equal(a, b) for a, b in zip(stream.tap(1, [name])[name], seen[name], strict=True)
        )
    assert stream.stage == 1
    stream.advance()
    assert set(stream.values[0]) == {"add"} <= stream.needed_after(1)
    with pytest.raises(AssertionError, match="stands before stage 2, not 1"):
        stream.tap(1, ["linear"])
    with pytest.raises(AssertionError, match="has not reached the end"):
        stream.output()


def test_a_node_that_fails_is_named(tiny: Tiny) -> None:
    program = tiny("M")
    values = {"ids": torch.full((1, 6), 99)}
    weights = {n: program.read(w.name) for n, w in program.weights.items()}
    with pytest.raises(MoeccError, match=r"node %embedding \(aten.embedding\) in stage 0 failed: "):
        list(run_nodes(stage_nodes(program, 0), values, weights))


@pytest.mark.parametrize("which", ["qwen", "compressed"])
def test_exported_programs_run_compile_and_survive_a_file(
    which: str, request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue(which)
    program: Program = found[1] if which == "qwen" else found
    want = run_program(program, [IDS])[0]
    exported = program.exported()
    module = exported.module()
    with torch.no_grad():
        torch.testing.assert_close(first(module(input_ids=IDS)), want, rtol=1e-5, atol=1e-5)
        compiled = torch.compile(module, backend="aot_eager")
        torch.testing.assert_close(first(compiled(input_ids=IDS)), want, rtol=1e-5, atol=1e-5)
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for ids in (IDS, IDS[:, :5].repeat(2, 1)):
            torch.testing.assert_close(
                first(loaded(input_ids=ids)), run_program(program, [ids])[0], rtol=1e-5, atol=1e-5
            )


def first(result: Any) -> Tensor:
    """Logits out of whatever the exported module returns."""
    value = (
        result
        if isinstance(result, Tensor)
        else result[0]
        if isinstance(result, (list, tuple))
        else result.logits
    )
    assert isinstance(value, Tensor)
    return value


def test_exporting_leaves_the_program_as_it_was(compressed: Program) -> None:
    before = compressed.text()
    compressed.exported()
    assert compressed.text() == before
    compressed.verify()

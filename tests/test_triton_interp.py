"""The Triton kernels on CPU tensors, in triton's interpreter (in `make test`).

    TRITON_INTERPRET=1 pytest -m interp

Integers must be equal; a layer must agree with moecc's reference within the rounding of 15-bit
activations. The interpreter sees neither races nor layouts nor shared memory;
tests/test_triton_aot.py sees the last two.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest
import slow_vq4 as slow
import torch
from families import ALL
from layers import FEATURES, ROUTINGS, Layer, assert_within, draw_layer, draw_routed
from torch import Tensor

from moecc.ir import gates, vq4

pytestmark = pytest.mark.interp
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from moecc.backends.triton import around, launch  # noqa: E402
from moecc.backends.triton.abstract import Shape, abstract_plan  # noqa: E402
from moecc.backends.triton.launch import plan  # noqa: E402
from moecc.backends.triton.parts import Plan  # noqa: E402
from moecc.backends.triton.tiles import Card, Tile, choose_tile, choose_unroll  # noqa: E402

SMALL = Tile(tokens=8, height=1, unroll=4, warps=4, stages=2, waves=4)
WHOLE = SMALL._replace(waves=0)  # columns are not split, so the product applies the gate
LARGE = Tile(tokens=32, height=2, unroll=2, warps=8, stages=2, waves=0)
HALF = Tile(tokens=16, height=1, unroll=1, warps=4, stages=2, waves=0, half=True)
TILES = {"split": SMALL, "whole": WHOLE, "large": LARGE}
EXACT = {"small": WHOLE, "large": LARGE, "middle": WHOLE._replace(tokens=16, unroll=1)}
BITS = (2, 3, 4)


def crossed(names: Iterable[str]) -> list[tuple[str, int]]:
    """Return each name with all bits in `make test-all`; in `make test` once, bits taking turns."""
    return [
        (name, b)
        for i, name in enumerate(names)
        for j, b in enumerate(BITS)
        if ALL or (i + j) % len(BITS) == 0
    ]


def run(layer: Layer, tile: Tile | None = None) -> Plan:
    made = plan(*layer.packed(), **layer.attributes, tile=tile)
    for each in made.launches:
        each()
    return made


def check(layer: Layer, tile: Tile | None = None) -> Plan:
    made = run(layer, tile)
    assert_within(made.out, layer.reference())
    return made


# ---------------------------------------------------------------- whole layers against the
# reference


@pytest.mark.parametrize(("feature", "bits"), crossed(FEATURES))
def test_a_layer_agrees_with_the_reference(feature: str, bits: int) -> None:
    check(draw_layer(bits, **FEATURES[feature]))


@pytest.mark.parametrize(("feature", "bits"), crossed(FEATURES))
def test_a_layer_in_16_bit_floats_agrees_with_the_reference(feature: str, bits: int) -> None:
    """For many tokens per weight: x and hidden units stay floats, without fixed point."""
    told = dict(dtype=torch.float16) | FEATURES[feature]
    made = check(draw_layer(bits, **told), HALF)
    assert made.named("down").arguments["x_ptr"].dtype == told["dtype"]
    assert "hidden" not in [launch.name for launch in made.launches]


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("unroll", [1, 2])
def test_partial_tiles_in_16_bit_floats(bits: int, unroll: int) -> None:
    tile = HALF._replace(unroll=unroll, height=2)
    check(
        draw_layer(
            bits,
            tokens=3,
            experts=2,
            hidden=1352,
            intermediate=70,
            rank=2,
            bias=True,
            dtype=torch.float16,
        ),
        tile,
    )


def test_half_the_work_on_a_half_empty_block_gives_the_same_result() -> None:
    layer = draw_layer(3, tokens=16, dtype=torch.bfloat16, experts=4)
    made = run(layer, HALF)
    prepare, wanted = made.named("prepare").arguments, made.out.clone()
    filled = (prepare["slots_ptr"].view(-1, 16) >= 0).sum(1)[prepare["block_expert_ptr"] >= 0]
    assert filled.min() <= 8 < filled.max()
    for name in ("gate_up", "down"):
        assert made.named(name).arguments["NARROW"]
        made.named(name).arguments["NARROW"] = False
    for each in made.launches:
        each()
    assert torch.equal(made.out, wanted)


@pytest.mark.parametrize(("tile", "bits"), crossed(TILES))
def test_partial_row_tiles_column_tiles_and_steps(tile: str, bits: int) -> None:
    """With the columns split among programs, and with the gate in the product."""
    layer = draw_layer(bits, tokens=3, experts=2, hidden=1352, intermediate=70, rank=2, bias=True)
    gate_up = check(layer, TILES[tile]).named("gate_up")
    assert gate_up.arguments["FUSED"] == (TILES[tile].waves == 0)
    assert (gate_up.grid[2] > 1) == (TILES[tile].waves > 0)
    assert gate_up.arguments["TAIL"]  # 11 column tiles: neither 3 steps of 4 nor 6 of 2 are full


GATES = [
    (gate, act)
    for gate in [*gates.GATES, "none"]
    for act in gates.ACTIVATIONS
    if act == "silu" or gate not in ("oai", "softcap")
]


@pytest.mark.parametrize(("gate", "act"), GATES)
def test_every_gate_agrees_with_the_reference(gate: str, act: str) -> None:
    """Both in the product and in the kernel that sums split columns."""
    made = check(
        draw_layer(2, tokens=2, experts=2, hidden=16, intermediate=8, act=act, gate=gate, bias=True)
    )
    assert made.named("gate_up").arguments["FUSED"]  # a single step cannot be split
    if ALL or act == "silu" or gate == "glu":  # all gates go through one function
        made = check(
            draw_layer(
                2, tokens=1, experts=2, hidden=520, intermediate=8, act=act, gate=gate, bias=True
            )
        )
        assert not made.named("gate_up").arguments["FUSED"]


@pytest.mark.parametrize(("routing", "bits"), crossed(ROUTINGS))
def test_every_kind_of_routing_agrees_with_the_reference(routing: str, bits: int) -> None:
    check(draw_routed(routing, bits))


def test_a_choice_outside_the_experts_counts_as_zero() -> None:
    layer = draw_layer(2, tokens=4, rank=2, mean=2, bias=True)
    layer.index[1, 0], layer.index[2, 1], layer.index[3] = -1, 4, 1 << 40
    made = run(layer)
    layer.weight[(layer.index < 0) | (layer.index >= 4)] = 0.0
    layer.index = torch.where((layer.index < 0) | (layer.index >= 4), 0, layer.index)
    torch.testing.assert_close(
        made.out, layer.reference(), rtol=0, atol=float(layer.reference().abs().max()) * 2e-4
    )
    assert bool((made.out[3] == 0).all())


def test_no_tokens_take_no_launches() -> None:
    layer = draw_layer(2)
    layer.x, layer.index, layer.weight = layer.x[:0], layer.index[:0], layer.weight[:0]
    made = run(layer)
    assert made.out.shape == (0, 40) and not made.launches


def test_operands_need_not_be_contiguous() -> None:
    layer = draw_layer(2)
    layer.x = torch.stack((layer.x, layer.x), -1)[..., 0]
    layer.index, layer.weight = layer.index.T.contiguous().T, layer.weight.T.contiguous().T
    assert not layer.x.is_contiguous() and not layer.index.is_contiguous()
    check(layer)


def spread(p: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Return the same tensors as views of every other number."""
    return {name: None if t is None else torch.stack((t, t), -1)[..., 0] for name, t in p.items()}


def test_stored_tensors_need_not_be_contiguous() -> None:
    layer = draw_layer(3, rank=3, bias=True, mean=3, norm=True)
    x, index, weight, gate_up, down, post_norm = layer.packed()
    gate_up, down = spread(gate_up), spread(down)
    assert not any(t.is_contiguous() for p in (gate_up, down) for t in p.values() if t is not None)
    out = launch.vq_experts(x, index, weight, gate_up, down, post_norm, **layer.attributes)
    assert_within(out, layer.reference())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_infinity_and_nan_stay_in_their_token() -> None:
    layer = draw_layer(2, tokens=3)
    layer.x[0, 0], layer.x[2, 5] = torch.inf, torch.nan
    out = run(layer).out
    assert bool(out[1].isfinite().all())
    assert not bool(out[0].isfinite().any()) and not bool(out[2].isfinite().any())


def test_zeros_give_zeros() -> None:
    layer = draw_layer(2, tokens=2)
    layer.x.zero_()
    assert bool((run(layer).out == 0).all())


# ---------------------------------------------------------------- exact integers


def fixed(made: Plan, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return a product's integers i64 [R, steps, STEP], scale f32 [R, steps], and its output."""
    args = made.named(name).arguments
    values, scale = args["x_ptr"].long(), args["x_scale_ptr"]
    return (
        (values[:, 0] * 256 + values[:, 1]).unflatten(1, (scale.shape[1], -1)),
        scale,
        args["out_ptr"],
    )


def whole_weights(p: dict[str, Tensor | None], columns: int, width: int) -> Tensor:
    """Return the integer weights i64 [E, N, width], zero past the columns."""
    codes, codebook = p["codes"], p["codebook"]
    assert codes is not None and codebook is not None
    weights = vq4.decode(codes, p["signs"], codebook, columns, torch.float64).long()
    return torch.nn.functional.pad(weights, (0, width - columns))


@pytest.mark.parametrize(("tile", "bits"), crossed(EXACT))
def test_integer_sums_are_exact(tile: str, bits: int) -> None:
    """With scales of one, each step's sum is rounded once to float32, and steps add up in order."""
    layer = draw_layer(
        bits, tokens=9, experts=3, hidden=1096, intermediate=72, act="identity", gate="none"
    )
    made = plan(*layer.packed(), **layer.attributes, tile=EXACT[tile])
    made.named("gate_up").arguments["scale_ptr"] = torch.ones(3, 72)
    made.named("prepare")()
    made.named("gate_up").arguments["x_scale_ptr"].fill_(1.0)
    made.named("gate_up")()
    q, _, out = fixed(made, "gate_up")
    assert int(q.abs().max()) == 32512 and q.shape[1] == {512: 3, 256: 5, 128: 9}[q.shape[2]]
    weights = whole_weights(layer.gate_up, 1096, q.shape[1] * q.shape[2]).unflatten(2, q.shape[1:])
    wanted = torch.zeros(18, 72)
    for slot, e in enumerate(layer.index.flatten().tolist()):
        for step in range(q.shape[1]):
            wanted[slot] += (weights[e, :, step] @ q[slot // 2, step]).float()
    assert torch.equal(out, wanted)


def test_the_largest_sum_does_not_overflow() -> None:
    """512 columns of -128 * 32512 stay within 2^31."""
    layer = draw_layer(
        2, tokens=1, top_k=1, experts=1, hidden=512, intermediate=8, gate="none", act="identity"
    )
    codebook = layer.gate_up["codebook"]
    assert codebook is not None
    codebook.fill_(-128)
    layer.x.fill_(3.0)
    made = plan(*layer.packed(), **layer.attributes, tile=WHOLE)
    made.named("gate_up").arguments["scale_ptr"] = torch.ones(1, 8)
    made.named("prepare")()
    made.named("gate_up")()
    assert torch.equal(
        made.named("gate_up").arguments["out_ptr"], torch.full((1, 8), -3.0 * 128 * 512)
    )


def test_fixed_point_is_within_half_a_unit() -> None:
    layer = draw_layer(2, tokens=3, hidden=600)
    made = run(layer)
    q, scale, _ = fixed(made, "gate_up")
    padded = torch.nn.functional.pad(layer.x, (0, q.shape[1] * q.shape[2] - 600)).unflatten(
        1, q.shape[1:]
    )
    error = (q.double() * scale.double().unsqueeze(2) - padded.double()).abs()
    assert bool((error <= scale.double().unsqueeze(2) * 0.501).all())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("unroll", [4, 1])
def test_an_outlier_costs_its_block_and_not_the_token(unroll: int) -> None:
    """The reason for a scale per block: one channel of 2048 is 3000 times the rest.

    Compared are the errors of the other channels, relative to their norm.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2048, generator=g)
    x[0, 100] = 3000.0
    layer = draw_layer(2, tokens=1, hidden=2048, intermediate=8)
    layer.x = x
    q, scale, _ = fixed(run(layer, WHOLE._replace(unroll=unroll)), "gate_up")
    blocks = x.double().unflatten(1, q.shape[1:])
    error = q.double() * scale.double().unsqueeze(2) - blocks
    error[blocks.abs() > 100] = 0
    one_scale = ((x.double() * (32512 / 3000)).round() * (3000 / 32512) - x.double())[x < 100]
    size = float(x[x < 100].double().norm())
    with_blocks, with_one = float(error.norm()) / size, float(one_scale.norm()) / size
    assert 0.02 < with_one < 0.03
    assert with_blocks < with_one * {4: 0.55, 1: 0.3}[unroll]


# ---------------------------------------------------------------- routing


def check_blocks(index: Tensor, experts: int, block: int) -> Plan:
    """Check that each expert's slots are in ascending order, in blocks of its own.

    Unused places hold -1.
    """
    layer = draw_layer(2, tokens=1, experts=experts, hidden=8, intermediate=8)
    layer.x, layer.index, layer.weight = torch.ones(len(index), 8), index, torch.ones(index.shape)
    made = plan(*layer.packed(), **layer.attributes, tile=SMALL._replace(tokens=block))
    arguments = made.named("prepare").arguments
    slots, owner = arguments["slots_ptr"].view(-1, block), arguments["block_expert_ptr"]
    slots.fill_(-9), owner.fill_(-9)
    for each in made.launches:
        if each.name in ("count", "prepare"):
            each()
    wanted: list[tuple[int, list[int]]] = []
    for e in range(experts):
        mine = [s for s, chosen in enumerate(index.flatten().tolist()) if chosen == e]
        wanted += [(e, mine[i : i + block]) for i in range(0, len(mine), block)]
    assert len(wanted) <= len(owner)
    assert owner.tolist() == [e for e, _ in wanted] + [-1] * (len(owner) - len(wanted))
    for row, (_, mine) in zip(slots.tolist(), wanted, strict=False):
        assert row == mine + [-1] * (block - len(mine))
    assert bool((slots[len(wanted) :] == -9).all())  # never read, so never written
    return made


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 2), (7, 2), (70, 20)])
@pytest.mark.parametrize("block", [8, 32])
def test_slots_are_sorted_into_blocks(
    tokens: int, top_k: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """70 tokens have more slots than one chunk. Within an expert, slots keep their order."""
    monkeypatch.setattr(around, "_CHUNK", 1024)
    index = torch.from_numpy(slow.numbers(7, tokens, top_k) % 6) - 1  # some name no expert
    made = check_blocks(index, 5, block)
    assert made.launches[0].name == "prepare"


MANY = {
    "some are no expert": lambda i: i % 11 - 1,
    "empty experts": lambda i: i % 3 * 3 + 1,
    "one takes all": lambda i: i * 0 + 4,
    "the last takes all": lambda i: i * 0 + 8,
    "none is an expert": lambda i: torch.where(i % 2 == 0, -1 - i, 9 + (i << 33)),
}


@pytest.mark.parametrize("choices", MANY)
@pytest.mark.parametrize("block", [8, 32])
def test_many_slots_are_counted_first(
    choices: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 slots are two segments of 128 and a partial one, scanned 32 slots at a time."""
    for name, value in dict(_UNCOUNTED=299, _CHUNK=128, _COUNTS=96).items():
        monkeypatch.setattr(around, name, value)
    index = MANY[choices](torch.from_numpy(slow.numbers(7, 15, 20)))
    made = check_blocks(index, 9, block)
    assert [each.name for each in made.launches[:2]] == ["count", "prepare"]
    assert made.launches[0].grid == (3,)
    counts = made.named("prepare").arguments["counts_ptr"].sum(0)
    assert counts.tolist() == [int((index == e).sum()) for e in range(32)][:9] + [0] * 23


@pytest.mark.parametrize("experts", [1, 4, 40])
def test_routing_programs_with_all_or_some_of_their_experts(
    experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32-bit choices in one segment of three steps.

    The segment stays whole even if it has more counts than a program should read.
    """
    for name, value in dict(_UNCOUNTED=0, _CHUNK=64, _COUNTS=32).items():
        monkeypatch.setattr(around, name, value)
    index = torch.from_numpy(slow.numbers(7, 15, 10)).to(torch.int32) % experts
    assert check_blocks(index, experts, 8).named("count").grid == (1,)


def test_counting_slots_first_changes_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = draw_layer(3, rank=2)
    alone = run(layer).out
    monkeypatch.setattr(around, "_UNCOUNTED", 0)
    assert torch.equal(check(layer).out, alone)


@pytest.mark.parametrize("experts", [1, 8, 128, 384, 1024, 5000])
def test_there_are_few_enough_counts_for_every_program_to_read(experts: int) -> None:
    for slots in (4097, 32768, 131072):
        layer = Shape(experts, 1, 64, 64)
        made = abstract_plan(layer, slots, 2)
        arguments = made.named("count").arguments
        counts, span = arguments["counts_ptr"], arguments["span"]
        assert counts.numel() <= max(4096, counts.shape[1])
        assert 0 <= len(counts) * span - slots < span


def test_tiles_follow_card_and_tokens_per_expert() -> None:
    h100 = Card("sm_90", 132)
    assert choose_tile(8, 128, h100).tokens == 8 and choose_tile(512, 128, h100).tokens == 8
    assert choose_tile(2048, 128, h100).tokens == 16
    assert (
        choose_tile(32768, 128, h100, torch.bfloat16).half
        and not choose_tile(32768, 128, h100).half
    )
    assert (
        choose_tile(8, 128, Card("gfx1100", 96)).unroll
        < choose_tile(8, 128, Card("gfx942", 304)).unroll
    )
    assert [choose_unroll(n, 4) for n in (1, 2, 3, 5, 6, 11, 16)] == [1, 2, 1, 1, 2, 4, 4]


# ---------------------------------------------------------------- limits of the interpreter


@triton.jit
def _sum_of_bfloat16(x_ptr, y_ptr, out_ptr):
    i = tl.arange(0, 16)
    tl.store(out_ptr + i, (tl.load(x_ptr + i) + tl.load(y_ptr + i)).to(tl.float32))


def test_bfloat16_is_still_wrong_in_the_interpreter() -> None:
    """The interpreter adds the bits, so kernels convert to float32 first.

    Once this test fails, they need not do so for the interpreter's sake.
    """
    x, y, out = (
        torch.full((16,), 1.0).bfloat16(),
        torch.full((16,), 2.0).bfloat16(),
        torch.empty(16),
    )
    _sum_of_bfloat16[(1,)](x, y, out)
    assert not torch.allclose(out, torch.full((16,), 3.0))


def test_the_function_computes_what_its_plan_computes() -> None:
    layer = draw_layer(3)
    assert torch.equal(launch.vq_experts(*layer.packed(), **layer.attributes), run(layer).out)


def test_more_tokens_than_a_plan_can_have_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, sizes = draw_layer(3, tokens=5, rank=2), []
    monkeypatch.setattr(launch, "_MOST_SLOTS", 4)
    monkeypatch.setattr(launch, "plan", lambda x, *a, **k: sizes.append(len(x)) or plan(x, *a, **k))
    assert_within(launch.vq_experts(*layer.packed(), **layer.attributes), layer.reference())
    assert sizes == [2, 2, 1]

"""The Triton kernels on a GPU, if there is one. `python benchmarks/gpu.py` measures their speed.

They show what the interpreter cannot: races (each layer runs ten times and gives the same bits),
CUDA graphs, torch.compile, and that a model is loaded, packed, saved and run on the card.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import FEATURES, ROUTINGS, Layer, assert_within, draw_layer, draw_routed
from made import ROWS, checkpoint, load
from test_triton_model import PROMPT, logits, projections
from transformers import AutoModelForCausalLM

from moecc import cli
from moecc.backends import triton as backend

if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from moecc.backends.triton.hopper import persistent_kernel
from moecc.backends.triton.launch import plan, vq_experts
from moecc.backends.triton.parts import Plan
from moecc.backends.triton.tiles import TILES, Tile, card_of, choose_tile


def check(layer: Layer, tile: Tile | None = None) -> Plan:
    """Compare a layer with the reference on the CPU, and ten runs with each other."""
    made = plan(*layer.to("cuda").packed(), **layer.attributes, tile=tile)
    results = []
    for _ in range(10):
        made.out.fill_(torch.nan)
        for each in made.launches:
            each()
        results.append(made.out.clone())
    assert all(torch.equal(r, results[0]) for r in results)
    assert_within(results[0], layer.reference())
    return made


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("feature", FEATURES)
def test_a_layer_agrees_with_the_reference(feature: str, bits: int) -> None:
    check(draw_layer(bits, **FEATURES[feature]))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_kind_of_routing_agrees_with_the_reference(routing: str, bits: int) -> None:
    check(draw_routed(routing, bits))


@pytest.mark.parametrize(
    "extras", [{}, dict(rank=2, bias=True, mean=3)], ids=["plain", "everything"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [3, 25, 90, 400, 1200])
def test_every_tile_of_this_card_agrees_with_the_reference(
    tokens: int, bits: int, dtype: torch.dtype, extras: dict[str, Any]
) -> None:
    """Each number of tokens leads to another tile, which rows, columns and steps do not fill."""
    check(
        draw_layer(
            bits, tokens=tokens, dtype=dtype, experts=3, hidden=1352, intermediate=200, **extras
        )
    )


PERSISTENT = {f"{tile.tokens} slots": tile for _, tile in TILES["sm_90"] if tile.persistent}


@pytest.mark.skipif(card_of(torch.device("cuda", 0)).name != "sm_90", reason="a kernel of sm_90's")
@pytest.mark.parametrize(
    "told",
    [
        {},
        dict(shared=True),
        dict(mean=3, bias=True),
        dict(gate="oai"),
        dict(gate="none", act="sigmoid", bias=True, mean=2),
        dict(top_k=1, hidden=64, intermediate=32),
        dict(experts=70, top_k=4, hidden=128, intermediate=136),
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("tile", PERSISTENT.values(), ids=list(PERSISTENT))
def test_the_persistent_kernel_agrees_with_the_reference(
    tile: Tile, bits: int, told: dict[str, Any]
) -> None:
    """Full blocks, blocks at most half full, and experts without any.

    Rows and columns are not multiples of a tile, and there are more tiles than programs.
    """
    for tokens in (3, 700):
        layer = draw_layer(
            bits,
            tokens=tokens,
            dtype=torch.bfloat16,
            **{**dict(experts=3, hidden=1352, intermediate=200), **told},
        )
        made = check(layer, tile)
        assert all(made.named(name).kernel is persistent_kernel for name in ("gate_up", "down"))


def test_tiles_are_chosen_for_this_card() -> None:
    card = card_of(torch.device("cuda", 0))
    assert (
        card.processors > 1
        and len({choose_tile(s, 8, card, torch.bfloat16) for s in (8, 128, 4096)}) == 3
    )


@pytest.mark.parametrize("bits", [2, 3])
def test_integer_sums_are_exact(bits: int) -> None:
    """Tensor cores give the sums that PyTorch gives in 64 bits on the CPU."""
    from moecc.ir import vq4

    layer = draw_layer(
        bits, tokens=9, experts=3, hidden=512, intermediate=72, act="identity", gate="none"
    )
    tile = choose_tile(18, 3, card_of(torch.device("cuda", 0)))
    tile = tile._replace(waves=0)  # one part, one sum
    made = plan(*layer.to("cuda").packed(), **layer.attributes, tile=tile)
    made.named("gate_up").arguments["scale_ptr"] = torch.ones(3, 72, device="cuda")
    made.named("prepare")()
    args = made.named("gate_up").arguments
    args["x_scale_ptr"].fill_(1.0)
    made.named("gate_up")()
    values = args["x_ptr"].long().cpu()
    q = values[:, 0] * 256 + values[:, 1]
    codes, codebook = layer.gate_up["codes"], layer.gate_up["codebook"]
    assert codes is not None and codebook is not None
    weights = vq4.decode(codes, layer.gate_up["signs"], codebook, 512, torch.float64).long()
    out = args["out_ptr"].cpu().view(18, 72)
    for slot, e in enumerate(layer.index.flatten().tolist()):
        steps = (
            weights[e].unflatten(1, (args["steps"], -1))
            * q[slot // 2, :512].unflatten(0, (args["steps"], -1))
        ).sum(2)
        wanted = torch.zeros(72)
        for step in steps.unbind(1):
            wanted += step.float()
        assert torch.equal(out[slot], wanted)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(4096, 128, 8), (4096, 128, 1), (1100, 60, 4), (16384, 1024, 8)],
)
def test_slots_are_sorted_into_blocks(tokens: int, experts: int, top_k: int) -> None:
    """Few slots and many; some choices name no expert, and nobody chooses every third expert."""
    layer = draw_layer(2, tokens=1, experts=experts, hidden=8, intermediate=8)
    layer.index = torch.randint(
        -1, experts + 1, (tokens, top_k), generator=torch.Generator().manual_seed(0)
    )
    layer.index[layer.index % 3 == 1] += 1
    layer.x, layer.weight = torch.ones(tokens, 8), torch.ones(tokens, top_k)
    made = plan(*layer.to("cuda").packed(), **layer.attributes)
    for each in made.launches[: [each.name for each in made.launches].index("prepare") + 1]:
        each()
    arguments = made.named("prepare").arguments
    block, owner = arguments["TOKENS"], arguments["block_expert_ptr"].cpu()
    wanted, owners = [], []
    for e in range(experts):
        mine = (layer.index.flatten() == e).nonzero().flatten()
        wanted.append(torch.nn.functional.pad(mine, (0, -len(mine) % block), value=-1))
        owners += [e] * (len(wanted[-1]) // block)
    assert owner.tolist() == owners + [-1] * (len(owner) - len(owners))
    assert torch.equal(
        arguments["slots_ptr"].cpu()[: len(owners) * block].long(), torch.cat(wanted)
    )


def test_a_cuda_graph_takes_new_tokens_and_choices() -> None:
    layer, other = (draw_layer(2, tokens=t, rank=2, mean=2, bias=True).to("cuda") for t in (6, 6))
    other.x, other.index = other.x.flip(0).contiguous() * 2, other.index.flip(0).contiguous()
    args = layer.packed()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        vq_experts(*args, **layer.attributes)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = vq_experts(*args, **layer.attributes)
    for each in (layer, other):
        wanted = vq_experts(each.x.clone(), each.index.clone(), *args[2:], **layer.attributes)
        layer.x.copy_(each.x)
        layer.index.copy_(each.index)
        graph.replay()
        assert torch.equal(out, wanted)


# ---------------------------------------------------------------- models


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    model = checkpoint(folder / "model", request.param)
    told = ["compile", str(model), "--passes", "kbvq{bits=3,rank=2}", "-o", str(folder / "out")]
    assert cli.main([*told, *ROWS]) == 0
    return folder / "out"


def on_card(artifact: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        artifact, dtype=torch.float32, device_map="cuda"
    ).eval()


def test_a_model_loaded_on_the_card_runs_by_the_kernels(artifact: Path, tmp_path: Path) -> None:
    reference, model = load(artifact), on_card(artifact)
    assert projections(model) and all(
        p.packed == backend.KERNELS.name and p.codes.dtype == torch.int32
        for p in projections(model)
    )
    wanted = logits(reference)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=float(wanted.abs().max()) * 1e-3)
    told = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(
        model.generate(PROMPT.cuda(), **told).cpu(), reference.generate(PROMPT, **told)
    )
    model.save_pretrained(tmp_path)
    again = load(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in reference.state_dict().items())


@torch.no_grad()
def test_a_model_is_compiled_into_one_graph(artifact: Path) -> None:
    """fullgraph with CUDA graphs and a static cache generates the same tokens as uncompiled."""
    model = on_card(artifact)
    told: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, disable_compile=True)
    wanted, plain = model.generate(PROMPT.cuda(), **told), logits(model)
    model.forward = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead")
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=float(plain.abs().max()) * 1e-3)
    torch.compiler.cudagraph_mark_step_begin()
    found = model.generate(PROMPT.cuda(), cache_implementation="static", **told)
    assert torch.equal(found, wanted)

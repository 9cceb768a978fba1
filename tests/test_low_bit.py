"""Checkpoints in FP8, FP4 and MXFP4: decoded as in transformers, compiled like any other."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made import checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from moecc.checkpoint.files import read_header
from moecc.checkpoint.low_bit import Decoded, Entry, block_size, decoded, fp4
from moecc.checkpoint.schema import METHOD
from moecc.checkpoint.store import CheckpointStore
from moecc.commands.compile import compile_model
from moecc.errors import MoeccError
from moecc.frontend.skeleton import skeleton

pytestmark = pytest.mark.usefixtures("traced_once")

BLOCK = (16, 24)  # some sizes are no multiples of it
FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
MXFP4: dict[str, Any] = {"quant_method": "mxfp4"}
Tensors = dict[str, Tensor]


def rewritten(
    folder: Path, method: dict[str, Any], change: Callable[[str, Tensor], Tensors | None]
) -> Tensors:
    """Rewrite a checkpoint: `change` gives what to store for a tensor, None to keep it.

    Return the tensors as they were.
    """
    file = folder / "model.safetensors"
    before = load_file(file)
    after: Tensors = {}
    for name, tensor in before.items():
        after |= change(name, tensor) or {name: tensor}
    save_file(after, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    return before


def in_fp8(name: str, tensor: Tensor) -> Tensors | None:
    """Store linears as FP8 with a scale per block."""
    if not name.endswith("_proj.weight"):
        return None
    grid = [-(-n // b) for n, b in zip(tensor.shape, BLOCK, strict=True)]
    scale = torch.rand(grid) + 0.5
    return {name: (tensor.float() * 40).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def in_mxfp4(name: str, tensor: Tensor) -> Tensors | None:
    """Store fused experts [E, K, N] as random bytes."""
    if not name.endswith("gate_up_proj"):
        return None
    experts, columns, rows = tensor.shape
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    scales = torch.randint(118, 124, blocks.shape[:3], dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def store_of(folder: Path) -> CheckpointStore:
    store = CheckpointStore(folder, skeleton(folder).model)
    store.check()
    return store


def test_fp8_is_read_block_by_block(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", "deepseek_v3")
    rewritten(folder, FP8, in_fp8)
    store, stored = store_of(folder), load_file(folder / "model.safetensors")
    names = [n for n in stored if f"{n}_scale_inv" in stored]
    assert names and not store.unexpected

    def wanted(name: str) -> Tensor:
        codes, scale = stored[name].float(), stored[f"{name}_scale_inv"]
        rows, columns = (torch.arange(n) // b for n, b in zip(codes.shape, BLOCK, strict=True))
        return (codes * scale[rows][:, columns]).bfloat16()

    linears = [n for n in names if ".experts." not in n]
    assert linears and any(".experts." in n for n in names)
    for name in linears:
        assert store.dtype(name) == torch.bfloat16 and torch.equal(store.read(name), wanted(name))
    fused = next(n for n in store.names() if n.endswith("experts.gate_up_proj"))
    layer = fused.removesuffix("gate_up_proj")
    every = [
        torch.cat([wanted(f"{layer}{e}.{p}_proj.weight") for p in ("gate", "up")])
        for e in range(store.shape(fused)[0])
    ]
    assert torch.equal(store.read(fused), torch.stack(every))
    assert torch.equal(store.read(fused, experts=[3, 1]), torch.stack([every[3], every[1]]))


def test_fp8_and_fp4_are_decoded_as_transformers_does(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors = {
        "a.weight": torch.randn(32, 64).to(torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.rand(2, 4),
        "e.up": torch.randn(3, 8, 16).to(torch.float8_e5m2),
        "e.up_scale_inv": torch.rand(3, 2, 1),
        "f.weight": torch.randint(-128, 128, (8, 32), dtype=torch.int8),  # FP4
        "f.weight_scale_inv": torch.rand(8, 2).add(1).to(torch.float8_e8m0fnu),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    found = decoded(dict(read_header(tmp_path / "x.safetensors")[0]), None)
    assert found.keys() == {"a.weight", "e.up", "f.weight"}
    for name, entry in found.items():
        want: Any = Fp8Dequantize(None)._dequantize_one(
            tensors[name], tensors[f"{name}_scale_inv"], torch.bfloat16
        )
        assert torch.equal(entry.read(), want) and entry.shape == tuple(want.shape)
    assert torch.equal(found["e.up"].read([2, 0]), found["e.up"].read()[[2, 0]])
    assert torch.equal(found["a.weight"].read([5]), found["a.weight"].read()[[5]])


def test_mxfp4_is_read_as_transformers_does(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = checkpoint(tmp_path / "model", "gpt_oss")
    rewritten(folder, MXFP4, in_mxfp4)
    store, stored = store_of(folder), load_file(folder / "model.safetensors")
    names = [n.removesuffix("_blocks") for n in stored if n.endswith("_blocks")]
    assert names and not store.unexpected
    for name in names:
        want = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert torch.equal(store.read(name), want)
        assert torch.equal(store.read(name, experts=[1]), want[[1]])


@pytest.mark.parametrize(
    ("family", "method", "change"), [("deepseek_v3", FP8, in_fp8), ("gpt_oss", MXFP4, in_mxfp4)]
)
def test_a_low_bit_checkpoint_compiles_like_its_bfloat16_twin(
    family: str, method: dict[str, Any], change: Any, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "model", family)
    before = rewritten(folder, method, change)
    store = store_of(folder)
    plain = checkpoint(tmp_path / "plain", family)
    tensors = {n: store.entries[n].read() if n in store.entries else t for n, t in before.items()}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    told: dict[str, Any] = dict(bits=2, calib=None, rows=4, length=16)
    for source, out in ((folder, "a"), (plain, "b")):
        said: list[str] = []
        compile_model(str(source), "kbvq", tmp_path / out, say=said.append, **told)
        assert any("are stored in 8 or 4 bits and read as bfloat16" in line for line in said) == (
            source == folder
        )
    a, b = (load_file(tmp_path / out / "model.safetensors") for out in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == METHOD


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def short(name: str, tensor: Tensor) -> Tensors | None:
        made = in_fp8(name, tensor) or {}
        return {n: t[:-1] if n.endswith("o_proj.weight_scale_inv") else t for n, t in made.items()}

    folder = checkpoint(tmp_path / "model", "deepseek_v3")
    rewritten(folder, FP8, short)
    with pytest.raises(
        MoeccError,
        match=r"^'.*o_proj.weight_scale_inv' in .* are no scales of '.*o_proj.weight' .*; fetch",
    ):
        store_of(folder)

    def torn(name: str, tensor: Tensor) -> Tensors | None:
        made = in_mxfp4(name, tensor) or {}
        return {n: t[:, :1].contiguous() if n.endswith("scales") else t for n, t in made.items()}

    folder = checkpoint(tmp_path / "other", "gpt_oss")
    rewritten(folder, MXFP4, torn)
    with pytest.raises(
        MoeccError, match=r"_scales' in .* are no scales of .*_blocks' .*; fetch both again$"
    ):
        store_of(folder)


# ---- value by value

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def read_back(
    tensors: Tensors, file: Path, block: tuple[int, int] | None = None
) -> dict[str, Entry]:
    """Write tensors to a file and return its entries, decoded."""
    save_file(tensors, file)
    return decoded(dict(read_header(file)[0]), block)


def test_every_fp4_code_has_its_value_and_the_lower_half_comes_first() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    want = [[FP4[byte % 16], FP4[byte // 16]] for byte in range(256)]
    assert fp4(codes.view(64, 4)).tolist() == torch.tensor(want).view(64, 8).tolist()
    assert fp4(codes.view(torch.int8)).tolist() == torch.tensor(want).flatten().tolist()


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7)])
@pytest.mark.parametrize("block", [(2, 3), (5, 7), (4, 1)])
def test_each_fp8_value_is_multiplied_by_the_scale_of_its_block(
    shape: tuple[int, ...], block: tuple[int, int], tmp_path: Path
) -> None:
    grid = [-(-n // b) for n, b in zip(shape[-2:], block, strict=True)]
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(*shape[:-2], *grid) + 0.5
    found = read_back({"w": weight, "w_scale_inv": scale}, tmp_path / "x.safetensors", block)
    assert found.keys() == {"w"}
    entry = found["w"]
    assert (entry.name, entry.shape, entry.dtype) == ("w", shape, torch.bfloat16)
    assert entry.file == tmp_path / "x.safetensors"
    want = torch.empty(shape, dtype=torch.bfloat16)
    for at in itertools.product(*map(range, shape)):
        *lead, n, k = at
        own = scale[(*lead, n // block[0], k // block[1])]
        want[at] = (weight[at].float() * own).bfloat16()
    assert torch.equal(entry.read(), want)
    assert torch.equal(entry.read([1]), want[[1]])


@pytest.mark.parametrize("kind", [torch.uint8, torch.float8_e8m0fnu, torch.float32])
def test_scales_of_one_byte_are_powers_of_two(kind: torch.dtype, tmp_path: Path) -> None:
    powers = torch.tensor([[-3, 0, 1], [2, 1, -1]])
    scale = (powers + 127).to(torch.uint8)
    if kind != torch.uint8:
        scale = torch.exp2(powers.float()).to(kind)
    codes = torch.randint(-128, 128, (6, 3), dtype=torch.int8)
    found = read_back({"w": codes, "w_scale_inv": scale}, tmp_path / "x.safetensors", (64, 64))
    want = [
        [
            FP4[(int(codes[n, k // 2]) % 256 >> 4 * (k % 2)) % 16]
            * 2.0 ** int(powers[n // 3, k // 2])
            for k in range(6)
        ]
        for n in range(6)
    ]
    # FP8's block size is not FP4's
    assert found["w"].shape == (6, 6) and found["w"].read().tolist() == want


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_of_a_matrix_is_that_of_all_its_values(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    weight, scale = torch.randn(3, 5).to(torch.float8_e5m2), torch.full(shape, 0.75)
    found = read_back({"w": weight, "w_scale_inv": scale}, tmp_path / "x.safetensors", (2, 2))
    want = (weight.float() * 0.75).bfloat16()
    assert torch.equal(found["w"].read(), want) and torch.equal(found["w"].read([2]), want[[2]])


def test_mxfp4_values_share_a_power_of_two_by_thirty_two(tmp_path: Path) -> None:
    blocks = torch.randint(0, 256, (2, 3, 2, 16), dtype=torch.uint8)
    scales = torch.randint(120, 130, (2, 3, 2), dtype=torch.uint8)
    tensors = {"w_blocks": blocks, "w_scales": scales, "v_blocks": blocks.clone()}
    found = read_back(tensors, tmp_path / "x.safetensors")
    assert found.keys() == {"w", "v_blocks"} and found["w"].shape == (2, 64, 3)
    assert found["w"].name == "w" and found["w"].dtype == torch.bfloat16
    got = found["w"].read()
    for e, n, k in itertools.product(range(2), range(3), range(64)):
        byte = int(blocks[e, n, k // 32, k % 32 // 2])
        code = byte // 16 if k % 2 else byte % 16
        assert float(got[e, k, n]) == FP4[code] * 2.0 ** (int(scales[e, n, k // 32]) - 127)
    assert torch.equal(found["w"].read([1]), got[[1]])


def test_tensors_that_only_have_such_names_stay_as_they_are(tmp_path: Path) -> None:
    tensors = {
        "plain": torch.randn(4, 4),
        "plain_scale_inv": torch.ones(1, 1),
        "float_blocks": torch.randn(1, 1, 1, 16),
        "float_scales": torch.ones(1, 1, 1, dtype=torch.uint8),
        "alone": torch.randn(4, 4).to(torch.float8_e4m3fn),
    }
    found = read_back(tensors, tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(not isinstance(entry, Decoded) for entry in found.values())


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((3, 3), (2, 2)),  # of a weight [4, 6]: two by three
        ((2, 2), (2, 2)),
        ((2, 2, 3), (2, 2)),
        ((6,), (2, 2)),
        ((0, 3), None),
        ((3, 6), None),  # no block size gives three of four rows
        ((5, 1), None),
    ],
)
def test_scales_of_another_grid_are_refused(
    shape: tuple[int, ...], block: tuple[int, int] | None, tmp_path: Path
) -> None:
    tensors = {"w": torch.randn(4, 6).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(shape)}
    with pytest.raises(MoeccError, match=re.escape(f"{list(shape)}, which are no scales of 'w'")):
        read_back(tensors, tmp_path / "x.safetensors", block)


@pytest.mark.parametrize("shape", [(), (24,)])
def test_scales_of_what_is_no_matrix_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {"w": torch.ones(shape).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(1)}
    with pytest.raises(MoeccError, match="no scales of 'w'"):
        read_back(tensors, tmp_path / "x.safetensors")


@pytest.mark.parametrize("shape", [(2, 3, 1), (2, 2, 2), (1, 3, 2)])
def test_mxfp4_scales_of_another_shape_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    blocks = torch.zeros(2, 3, 2, 16, dtype=torch.uint8)
    tensors = {"w_blocks": blocks, "w_scales": torch.zeros(shape, dtype=torch.uint8)}
    with pytest.raises(MoeccError, match="no scales of 'w_blocks'"):
        read_back(tensors, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"quantization_config": {"weight_block_size": [128, 64]}}, (128, 64)),
        ({"text_config": {"quantization_config": {"weight_block_size": [3, 1]}}}, (3, 1)),
        ({"quantization_config": {"weight_block_size": [128, 0]}}, None),
        ({"quantization_config": {"weight_block_size": [128]}}, None),
        ({"quantization_config": {"weight_block_size": [128, 64, 1]}}, None),
        ({"quantization_config": {"weight_block_size": [128, True]}}, None),
        ({"quantization_config": {"weight_block_size": "ab"}}, None),
        ({"quantization_config": None, "text_config": None}, None),
        ({}, None),
    ],
)
def test_the_block_size_is_that_of_the_configuration(
    config: dict[str, Any], size: tuple[int, int] | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert block_size(tmp_path) == size

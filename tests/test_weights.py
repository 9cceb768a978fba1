"""Weights by name: the bits that `from_pretrained` gives, and only the bytes that are asked for."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import EXPERT, FAMILIES, NORM, assert_same, edit, fails, saved, skeleton, tiny
from made import TINYMOE
from test_compression import TOLD
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moecc.checkpoint.files import TensorEntry, TensorFile, write_safetensors
from moecc.checkpoint.module import ModuleStore
from moecc.checkpoint.recipes import Recipe
from moecc.checkpoint.source import checkpoint_folder
from moecc.checkpoint.store import CheckpointStore
from moecc.checkpoint.values import kept_dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_read_gives_what_from_pretrained_loads(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny(family, dtype).save_pretrained(
        tmp_path, max_shard_size="20KB" if dtype == torch.float32 else "1GB"
    )
    store = CheckpointStore(tmp_path, skeleton(tmp_path, dtype))
    store.check()
    assert (store.missing, store.unexpected) == ([], [])
    assert (len(store.files) > 1) == (dtype == torch.float32)
    assert store.nbytes == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    want = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    assert store.names() == list(want)
    for name, tensor in want.items():
        assert_same(store.read(name, dtype=dtype), tensor, name)
        assert store.shape(name) == tuple(tensor.shape)
        if ".experts." in name and tensor.dim() > 1:
            assert_same(store.read(name, dtype=dtype, experts=[3, 1]), tensor[[3, 1]], name)


def test_a_read_keeps_the_dtype_on_disk_or_the_one_asked_for(tmp_path: Path) -> None:
    saved(tmp_path, "deepseek_v3")
    store = CheckpointStore(tmp_path, skeleton(tmp_path, torch.bfloat16))
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    up = "model.layers.1.mlp.experts.gate_up_proj"
    assert store.dtype(up) == store.read(up).dtype == torch.float32
    assert store.read(up, dtype=torch.bfloat16).dtype == torch.bfloat16
    want = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert want[bias].dtype == torch.float32
    for name, tensor in want.items():
        assert_same(store.read(name, dtype=torch.bfloat16), tensor, name)


def test_a_subset_of_experts_touches_only_their_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(saved(tmp_path), skeleton(tmp_path))
    touched, read = [], TensorEntry.read

    def spy(entry: TensorEntry, rows: Any = None) -> Tensor:
        touched.append(entry.name)
        return read(entry, rows)

    monkeypatch.setattr(TensorEntry, "read", spy)
    store.read("model.layers.0.mlp.experts.gate_up_proj", experts=[2])
    prefix = "model.layers.0.mlp.experts.2."
    assert sorted(touched) == [prefix + "gate_proj.weight", prefix + "up_proj.weight"]
    assert len(store.sources("model.layers.0.mlp.experts.gate_up_proj")) == 8


@pytest.mark.parametrize("one_by_one", [True, False])
def test_some_experts_are_rows_of_all_however_they_are_made(
    one_by_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare, name = skeleton(saved(tmp_path)), "model.layers.0.mlp.experts.gate_up_proj"
    bare.all_tied_weights_keys = {"alias": name}
    store = CheckpointStore(tmp_path, bare)
    whole = store.read(name)
    assert_same(store.read("alias"), whole, "alias")
    if not one_by_one:
        monkeypatch.setattr(Recipe, "per_expert", False)
    for asked in (name, "alias"):
        assert_same(store.read(asked, experts=[3, 0]), whole[[3, 0]], asked)
    norm = "model.norm.weight"
    assert_same(store.read(norm, experts=[5, 2]), store.read(norm)[[5, 2]], norm)


@pytest.mark.parametrize("kind", ["experts", "linears"])
def test_compressed_weights_that_a_config_lists_must_be_there(kind: str, tmp_path: Path) -> None:
    bare = skeleton(saved(tmp_path))
    store = CheckpointStore(tmp_path, bare)
    bare.config.quantization_config = {**TOLD, "experts": {}, "linears": {}, kind: TOLD[kind]}
    fails(store.check, "the weight files have no '")
    bare.config.quantization_config = {**TOLD, "experts": {}, "linears": {}}
    store.check()


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    store = CheckpointStore(saved(tmp_path, tie_word_embeddings=True), skeleton(tmp_path))
    assert store.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert store.sources("lm_head.weight") == ["model.embed_tokens.weight"]
    assert torch.equal(store.read("lm_head.weight"), store.read("model.embed_tokens.weight"))
    assert "lm_head.weight" in store.names()
    store.check()


def test_compressed_buffers_and_fused_names_are_read_as_stored(tmp_path: Path) -> None:
    saved(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    codes = torch.arange(24, dtype=torch.uint8).reshape(4, 6)
    scale = torch.rand(4, dtype=torch.float16)
    tensors = dict(model.state_dict()) | {
        "model.layers.0.mlp.experts.gate_up.codes": codes,
        "model.layers.0.mlp.experts.gate_up.scale": scale,
    }
    (tmp_path / "model.safetensors").unlink()
    write_safetensors(tmp_path / "model.safetensors", tensors)
    bare = skeleton(tmp_path, torch.bfloat16)
    ours = nn.Module()
    ours.register_buffer("codes", torch.empty(4, 6, dtype=torch.uint8, device="meta"))
    ours.register_buffer("scale", torch.empty(4, dtype=torch.float16, device="meta"))
    bare.model.layers[0].mlp.experts.add_module("gate_up", ours)
    store = CheckpointStore(tmp_path, bare)
    store.check()
    for name, stored in (("codes", codes), ("scale", scale)):
        read = store.read(f"model.layers.0.mlp.experts.gate_up.{name}", dtype=torch.bfloat16)
        assert_same(read, stored, name)
    up = "model.layers.1.mlp.experts.gate_up_proj"
    assert_same(store.read(up, experts=[1, -1]), tensors[up][[1, -1]], up)
    assert_same(store.read(up), tensors[up], up)


def test_a_multi_token_prediction_head_is_ignored_and_the_rest_is_unexpected(
    tmp_path: Path,
) -> None:
    saved(tmp_path, "deepseek_v3")
    extra = {
        "model.layers.61.embed_tokens.weight": torch.ones(2),
        "model.stray.weight": torch.ones(2),
    }
    edit(tmp_path, extra)
    store = CheckpointStore(tmp_path, skeleton(tmp_path))
    assert store.ignored == ["model.layers.61.embed_tokens.weight"]
    assert store.unexpected == ["model.stray.weight"]
    store.check()


def test_digest_follows_the_content(tmp_path: Path) -> None:
    first, copy = saved(tmp_path / "a", shard="20KB"), tmp_path / "b"
    shutil.copytree(first, copy)
    stores = [CheckpointStore(folder, skeleton(folder)) for folder in (first, copy)]
    assert stores[0].digest() == stores[1].digest()
    file = stores[1].files[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert stores[0].digest() != stores[1].digest()


def slow_digest(folder: Path, *, whole: bool) -> str:
    """Return the digest by its definition: config.json, then every file by name."""
    sha = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        sha.update(f"{file.name}\0{len(data)}\0".encode())
        start = 8 + int.from_bytes(data[:8], "little")
        sha.update(data if whole else data[:start])
        header = json.loads(data[8:start])
        spans = [v["data_offsets"] for name, v in header.items() if name != "__metadata__"]
        for a, b in sorted(spans) if not whole else []:
            tensor = data[start + a : start + b]
            middle = max(0, len(tensor) // 2 - 128)
            sha.update(tensor[middle : middle + 256])
    return sha.hexdigest()


def test_digest_reads_small_files_whole_and_the_middle_of_each_tensor_of_large_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, shard="20KB")
    store = CheckpointStore(folder, skeleton(folder))
    sizes = [file.stat().st_size for file in store.files]
    assert len(sizes) > 2
    assert store.digest() == slow_digest(folder, whole=True)
    monkeypatch.setattr("moecc.checkpoint.store.WHOLE", max(sizes))
    assert store.digest() == slow_digest(folder, whole=True)
    monkeypatch.setattr("moecc.checkpoint.store.WHOLE", min(sizes) - 1)
    assert store.digest() == slow_digest(folder, whole=False)


@pytest.mark.parametrize(
    ("one", "widest"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_a_fused_weight_has_the_widest_type_of_its_parts(
    one: torch.dtype, widest: torch.dtype, tmp_path: Path
) -> None:
    file = saved(tmp_path) / "model.safetensors"
    part = TensorFile(file)[EXPERT]
    edit(tmp_path, {EXPERT: part.to(one)})
    store = CheckpointStore(tmp_path, skeleton(tmp_path))
    up = EXPERT.replace("2.up_proj.weight", "gate_up_proj")
    assert store.dtype(up) == widest == store.read(up).dtype
    assert torch.equal(store.read(up)[2, 16:], part.to(one).to(widest))


def test_a_weight_without_a_tensor_is_missing(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, {NORM: None})
    store = CheckpointStore(tmp_path, skeleton(tmp_path))
    assert store.missing == [NORM] and NORM not in store and NORM not in store.names()
    for ask in (store.read, store.shape, store.dtype, store.sources):
        fails(lambda ask=ask: ask(NORM), NORM, "no tensor")


def test_tied_weights_that_are_both_stored_are_both_read(tmp_path: Path) -> None:
    saved(tmp_path, tie_word_embeddings=True)
    head = torch.randn(64, 32)
    edit(tmp_path, {"lm_head.weight": head})
    store = CheckpointStore(tmp_path, skeleton(tmp_path))
    assert store.tied == {} and torch.equal(store.read("lm_head.weight"), head)
    assert not torch.equal(store.read("model.embed_tokens.weight"), head)
    # the head alone is enough too
    edit(tmp_path, {"model.embed_tokens.weight": None})
    store = CheckpointStore(tmp_path, skeleton(tmp_path))
    assert store.tied == {"model.embed_tokens.weight": "lm_head.weight"}
    assert torch.equal(store.read("model.embed_tokens.weight"), head)


class Mixed(nn.Module):
    """A module whose tensors have types of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
        self.first = nn.Linear(2, 2, dtype=torch.float16)
        self.wide = nn.Linear(2, 2, bias=False, dtype=torch.float32)
        self.gate = nn.Linear(2, 2, dtype=torch.float16)
        self.gate.register_buffer("table", torch.zeros(2, dtype=torch.float16))

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {"gate*bias": torch.float32} if dtype == torch.bfloat16 else {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_which_tensors_keep_their_own_type(dtype: torch.dtype) -> None:
    module = Mixed()
    found = {n: kept_dtype(module, n, t, dtype) for n, t in module.state_dict().items()}
    assert found == {
        "codes": torch.uint8,
        "wide.weight": torch.float32,
        "gate.table": torch.float16,
        "first.weight": dtype,
        "first.bias": dtype,
        "gate.weight": dtype,
        "gate.bias": torch.float32 if dtype == torch.bfloat16 else dtype,
    }
    plain = nn.Linear(2, 2)
    assert kept_dtype(plain, "weight", plain.weight, dtype) == dtype


def test_digest_follows_the_configuration_that_is_there_at_first(tmp_path: Path) -> None:
    store = CheckpointStore(saved(tmp_path), skeleton(tmp_path))
    before, config = store.digest(), tmp_path / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 10000', '"rope_theta": 20000'))
    assert CheckpointStore(tmp_path, skeleton(tmp_path)).digest() != before
    config.unlink()
    assert store.digest() == before


def test_the_example_model_is_read_whole() -> None:
    folder = checkpoint_folder(str(TINYMOE))
    store = CheckpointStore(folder, skeleton(folder))
    store.check()
    want = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, tensor in want.items():
        assert_same(store.read(name, dtype=torch.float32), tensor, name)


# ---------------------------------------------------------------- modules in memory


def test_a_module_in_memory_is_read_like_a_checkpoint() -> None:
    model = tiny("deepseek_v3", torch.bfloat16, tie_word_embeddings=True)
    store = ModuleStore(model)
    store.check()
    assert store.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    state = model.state_dict()
    assert store.names() == list(state)
    assert store.nbytes == sum(t.nbytes for name, t in state.items() if name != "lm_head.weight")
    for name, tensor in state.items():
        assert_same(store.read(name), tensor, name)
    up = "model.layers.1.mlp.experts.gate_up_proj"
    assert_same(store.read(up, experts=[3, 0], dtype=torch.float32), state[up][[3, 0]].float(), up)
    assert store.sources("lm_head.weight") == ["model.embed_tokens.weight"]
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert store.read(bias, dtype=torch.bfloat16).dtype == torch.float32
    digest = store.digest()
    store.read(up).zero_()
    assert store.digest() == digest
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    assert store.digest() != digest
    fails(lambda: store.read(NORM), NORM, "1 NaN")
    fails(lambda: store.read("nothing"), "nothing")


def test_a_module_without_values_is_refused(tmp_path: Path) -> None:
    bare = skeleton(saved(tmp_path))
    fails(ModuleStore(bare).check, "no values")
    with torch.device("meta"):
        fails(ModuleStore(nn.Linear(2, 2)).check, "weight")

"""Weights by name: the bits `from_pretrained` gives, only the bytes asked for, one line for every bad checkpoint."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from moecc.checkpoint.files import (
    LazyTensor,
    TensorEntry,
    TensorFile,
    free_space,
    write_safetensors,
)
from moecc.checkpoint.module import ModuleStore
from moecc.checkpoint.source import checkpoint_folder
from moecc.checkpoint.store import CheckpointStore
from moecc.checkpoint.values import require_finite
from moecc.errors import MoeccError

COMMON: dict[str, Any] = dict(
    **dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
    ),
    **dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        pad_token_id=0,
    ),
    **dict(
        num_experts=4,
        num_local_experts=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
    ),
    **dict(
        shared_expert_intermediate_size=16,
        n_shared_experts=1,
        first_k_dense_replace=1,
        decoder_sparse_step=1,
    ),
    **dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8),
    **dict(mamba_d_state=4, mamba_d_conv=2, mamba_dt_rank=4, bos_token_id=1, eos_token_id=2),
)
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "deepseek_v3": {"num_key_value_heads": 4},
    "phimoe": {},
    "jamba": dict(
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=1, expert_layer_offset=0
    ),
    "gpt_oss": dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8),
    "olmoe": {},
    "minimax_m2": {},
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=0),
    "granitemoe": {},
}


def tiny(family: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    base = AutoConfig.for_model(family)
    options = {key: value for key, value in COMMON.items() if hasattr(base, key)}
    config = AutoConfig.for_model(family, **options | FAMILIES[family] | more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape) * 0.2)
    return model


@contextlib.contextmanager
def fake_parameters() -> Iterator[None]:
    """Parameters without storage, real buffers: what a trace without weights works on."""
    register, mode = nn.Module.register_parameter, FakeTensorMode(allow_non_fake_inputs=True)

    def faked(self: nn.Module, name: str, param: Any) -> None:
        if param is not None:
            with mode:
                param = nn.Parameter(
                    torch.empty(param.shape, dtype=param.dtype), requires_grad=False
                )
        register(self, name, param)

    nn.Module.register_parameter = faked  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def skeleton(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    config = AutoConfig.from_pretrained(folder, **changes)
    with fake_parameters():
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def saved(folder: Path, family: str = "qwen2_moe", *, shard: str = "1GB", **more: Any) -> Path:
    tiny(family, **more).save_pretrained(folder, max_shard_size=shard)
    return folder


def assert_same(got: Tensor, want: Tensor, name: str) -> None:
    assert got.dtype == want.dtype, name
    assert torch.equal(got, want), name


def fails(action: Any, *words: str) -> None:
    """`action` raises one line that has all of `words`."""
    with pytest.raises(MoeccError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# ------------------------------------------------------------------------------------------- the same bits, lazily


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_from_pretrained_loads(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
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


def test_float32_exceptions_and_the_dtype_on_disk(tmp_path: Path) -> None:
    saved(tmp_path, "deepseek_v3")
    store = CheckpointStore(tmp_path, skeleton(tmp_path, torch.bfloat16))
    bias, up = (
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.experts.gate_up_proj",
    )
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


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    store = CheckpointStore(saved(tmp_path, tie_word_embeddings=True), skeleton(tmp_path))
    assert store.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert store.sources("lm_head.weight") == ["model.embed_tokens.weight"]
    assert torch.equal(store.read("lm_head.weight"), store.read("model.embed_tokens.weight"))
    assert "lm_head.weight" in store.names()
    store.check()


def test_runtime_names_and_buffers_of_our_own_are_read_as_they_are(tmp_path: Path) -> None:
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
    assert_same(
        store.read("model.layers.0.mlp.experts.gate_up.codes", dtype=torch.bfloat16), codes, "codes"
    )
    assert_same(
        store.read("model.layers.0.mlp.experts.gate_up.scale", dtype=torch.bfloat16), scale, "scale"
    )
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


def test_digest_follows_the_configuration(tmp_path: Path) -> None:
    store = CheckpointStore(saved(tmp_path), skeleton(tmp_path))
    before, config = store.digest(), tmp_path / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 10000', '"rope_theta": 20000'))
    assert store.digest() != before


EXAMPLE = Path(__file__).parents[1] / "examples" / "tinymoe"


@pytest.mark.skipif(not (EXAMPLE / "config.json").exists(), reason="no example model")
def test_the_example_model() -> None:
    folder = checkpoint_folder(str(EXAMPLE))
    store = CheckpointStore(folder, skeleton(folder))
    store.check()
    want = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, tensor in want.items():
        assert_same(store.read(name, dtype=torch.float32), tensor, name)


# ---------------------------------------------------------------------------------------------------- bad checkpoints


def edit(folder: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Replace, add or (None) drop tensors of a single-file checkpoint."""
    tensors = {**safetensors.torch.load_file(folder / "model.safetensors"), **changes}
    write_safetensors(
        folder / "model.safetensors", {n: t for n, t in tensors.items() if t is not None}
    )


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
NORM = "model.norm.weight"


def test_truncated_and_corrupt_files(tmp_path: Path) -> None:
    file = saved(tmp_path) / "model.safetensors"
    bare, whole = skeleton(tmp_path), file.read_bytes()
    cut = {
        "in the data": whole[:-100],
        "in the header": whole[:200],
        "empty": b"",
        "longer": whole + b"\0",
        "not safetensors": b"\x80\x02}q\0" * 100,
        "header edited": whole.replace(b'"F32"', b'"F99"', 1),
    }
    for data in cut.values():
        file.write_bytes(data)
        fails(lambda: CheckpointStore(tmp_path, bare), str(file))


def header(file: Path, table: dict[str, Any], data: bytes) -> None:
    head = json.dumps(table).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + data)


@pytest.mark.parametrize(
    "offsets", [[0.0, 8.0], [0, 8.0], ["0", "8"], [None, 8], [0], [-8, 0]], ids=str
)
def test_offsets_that_are_no_bytes(offsets: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    header(file, {"a": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}, bytes(8))
    fails(lambda: TensorFile(file), str(file), "no valid safetensors header")


@pytest.mark.parametrize("shape", [[2.0], [-1, -2], ["2"], [True, 2]], ids=str)
def test_shapes_that_are_no_numbers(shape: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    header(file, {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}, bytes(8))
    fails(lambda: TensorFile(file), str(file), "no valid safetensors header")


@pytest.mark.parametrize(
    ("second", "third", "said"),
    [
        ([4, 12], [12, 16], "overlaps"),
        ([0, 8], [8, 16], "overlaps"),
        ([12, 20], [20, 24], "leaves a gap"),
    ],
)
def test_tensors_that_share_bytes_or_leave_some_out(
    second: list[int], third: list[int], said: str, tmp_path: Path
) -> None:
    file, entries = tmp_path / "x.safetensors", {"a": [0, 8], "b": second, "c": third}
    table = {
        n: {"dtype": "F32", "shape": [(e - s) // 4], "data_offsets": [s, e]}
        for n, (s, e) in entries.items()
    }
    header(file, table, bytes(third[1]))
    fails(lambda: TensorFile(file), "'b' in", str(file), said, "fetch it again")


def test_a_file_cut_while_in_use(tmp_path: Path) -> None:
    file = saved(tmp_path) / "model.safetensors"
    store = CheckpointStore(tmp_path, skeleton(tmp_path))
    file.write_bytes(file.read_bytes()[:2000])
    fails(lambda: [store.read(name) for name in store.names()], "ends inside", "model.safetensors")
    file.unlink()
    fails(lambda: store.read(NORM), NORM, "No such file")


def test_missing_shard_and_index_that_lies(tmp_path: Path) -> None:
    saved(tmp_path, shard="20KB")
    bare, index = skeleton(tmp_path), tmp_path / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    lying = {**where["weight_map"], "model.ghost.weight": where["weight_map"][NORM]}
    good = index.read_text()
    index.write_text(json.dumps({"weight_map": lying}))
    fails(lambda: CheckpointStore(tmp_path, bare), "model.ghost.weight", where["weight_map"][NORM])
    for bad in (
        "{",
        "[]",
        "{}",
        "3",
        '{"weight_map": 3}',
        '{"weight_map": {"x": 3}}',
        '{"weight_map": {"x": ["y"]}}',
    ):
        index.write_text(bad)
        fails(lambda: CheckpointStore(tmp_path, bare), "index")
    index.write_text(good)
    (tmp_path / where["weight_map"][NORM]).unlink()
    fails(lambda: CheckpointStore(tmp_path, bare), "lacks", where["weight_map"][NORM])


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, {NORM: None})
    store = CheckpointStore(tmp_path, skeleton(tmp_path))
    assert store.missing == [NORM]
    assert NORM not in store
    fails(store.check, NORM, "1 of")
    fails(lambda: store.read(NORM), NORM)
    edit(tmp_path, {NORM: torch.ones(32), EXPERT: None})
    fails(
        CheckpointStore(tmp_path, skeleton(tmp_path)).check,
        f"'{EXPERT}' is missing",
        "4 experts",
        "has 3",
    )


def test_an_expert_under_the_wrong_number_is_not_taken_for_another(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, {EXPERT: None, EXPERT.replace(".2.", ".7."): torch.ones(16, 32)})
    fails(CheckpointStore(tmp_path, skeleton(tmp_path)).check, f"'{EXPERT}' is missing")


def test_shapes_the_config_does_not_imply(tmp_path: Path) -> None:
    saved(tmp_path)

    def check(**changes: Any) -> Any:
        return CheckpointStore(tmp_path, skeleton(tmp_path, **changes)).check

    check()()
    fails(check(vocab_size=60), "[64, 32]", "[60, 32]", "config.json")
    fails(check(moe_intermediate_size=8), "down_proj", "[32, 16]", "[4, 32, 16]", "[4, 32, 8]")
    fails(check(num_experts=3), "takes 3 experts", "has 4", "config.json")
    fails(check(num_experts=5), "takes 5 experts", "experts.4.down_proj.weight' is missing")
    edit(tmp_path, {EXPERT: torch.ones(12, 32)})
    fails(check(), EXPERT, "[12, 32]", "[16, 32]")


def test_projections_that_do_not_merge(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(
        tmp_path,
        {f"model.layers.0.mlp.experts.{e}.up_proj.weight": torch.ones(16, 31) for e in range(4)},
    )
    fails(
        CheckpointStore(tmp_path, skeleton(tmp_path)).check,
        "model.layers.0.mlp.experts.gate_up_proj",
        "merge",
    )


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, {EXPERT: torch.ones(16, 32).to(torch.float8_e4m3fn)})
    fails(CheckpointStore(tmp_path, skeleton(tmp_path)).check, EXPERT, "float8_e4m3fn")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    saved(tmp_path)
    bad = torch.ones(16, 32)
    bad[3, 4:6] = value
    edit(tmp_path, {EXPERT: bad})
    store = CheckpointStore(tmp_path, skeleton(tmp_path))
    store.check()
    fused = "model.layers.1.mlp.experts.gate_up_proj"
    fails(
        lambda: store.read(fused),
        EXPERT,
        "model.safetensors",
        "2 NaN" if value != value else "2 infinite",
    )
    assert store.read(fused, experts=[0, 1]).isfinite().all()


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("at", [0, 517, 1000])
def test_one_bad_value_anywhere_is_seen(dtype: torch.dtype, at: int) -> None:
    tensor = torch.randn(1001).to(dtype)
    require_finite(tensor, "fine")
    tensor[at] = float("nan")
    fails(lambda: require_finite(tensor, "'x' in y"), "'x' in y", "1 NaN", "of 1001")


def test_sources_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(lambda: checkpoint_folder(str(tmp_path / "nowhere")), "no folder", "nowhere")
    fails(lambda: checkpoint_folder(str(tmp_path)), "config.json")
    (tmp_path / "config.json").write_text("{}")
    fails(lambda: checkpoint_folder(str(tmp_path / "config.json")), "is a file")
    assert checkpoint_folder(str(tmp_path)) == tmp_path
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    fails(
        lambda: checkpoint_folder(str(tmp_path)), "pytorch_model.bin", "never loads", "safetensors"
    )

    def offline(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network\nand a long explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    fails(lambda: checkpoint_folder("some/model"), "some/model", "no network")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    tiny("qwen2_moe").config.save_pretrained(tmp_path)
    fails(lambda: CheckpointStore(tmp_path, skeleton(tmp_path)), "model.safetensors")


def test_hub_ids_ask_for_safetensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(saved(tmp_path))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert checkpoint_folder("some/model", revision="v1") == tmp_path
    assert (asked["repo"], asked["revision"]) == ("some/model", "v1")
    assert not any(".bin" in pattern or pattern == "*" for pattern in asked["allow_patterns"])


# ---------------------------------------------------------------------------------------------- files and modules


def test_written_files_are_the_ones_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        **{
            "b": torch.randn(3, 5),
            "a": torch.randn(2, 2).bfloat16(),
            "codes": torch.arange(7, dtype=torch.uint8),
        },
        **{
            "scalar": torch.tensor(3),
            "empty": torch.empty(0, 4),
            "strided": torch.randn(4, 6).t(),
            "flag": torch.ones(2) > 0,
        },
    }
    write_safetensors(tmp_path / "x.safetensors", tensors, {"z": "1", "a": "2"})
    write_safetensors(
        tmp_path / "y.safetensors", dict(reversed(tensors.items())), {"a": "2", "z": "1"}
    )
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()
    theirs = safetensors.torch.load_file(tmp_path / "x.safetensors")
    ours = TensorFile(tmp_path / "x.safetensors")
    assert set(theirs) == set(ours) == set(tensors)
    assert ours.metadata == {"format": "pt", "a": "2", "z": "1"}
    for name, tensor in tensors.items():
        assert_same(theirs[name], tensor, name)
        assert_same(ours[name], tensor, name)
    assert_same(ours.entries["b"].read([2, 0]), tensors["b"][[2, 0]], "b")
    assert "c" not in ours
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", contiguous)
    safetensors.torch.save_file(contiguous, tmp_path / "z.safetensors", {"format": "pt"})
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "z.safetensors").read_bytes()


def test_tensors_that_are_read_when_written_are_in_memory_one_at_a_time(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(4).bfloat16(), "c": torch.randn(4, 6).t()}
    alive: list[weakref.ref[Tensor]] = []

    def reader(name: str) -> Tensor:
        assert not any(seen() is not None for seen in alive)
        tensor = tensors[name].clone()
        alive.append(weakref.ref(tensor))
        return tensor

    lazy = {n: LazyTensor(tuple(t.shape), t.dtype, partial(reader, n)) for n, t in tensors.items()}
    write_safetensors(tmp_path / "lazy.safetensors", lazy)
    write_safetensors(tmp_path / "plain.safetensors", tensors)
    assert len(alive) == 3
    assert (tmp_path / "lazy.safetensors").read_bytes() == (
        tmp_path / "plain.safetensors"
    ).read_bytes()
    lying = {"a": LazyTensor((3, 4), torch.float32, lambda: tensors["a"])}
    fails(lambda: write_safetensors(tmp_path / "x.safetensors", lying), "'a'", "[3, 5]", "[3, 4]")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    fails(lambda: write_safetensors(path, {"a": torch.zeros(3)}), str(path), "No space left")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    fails(
        lambda: write_safetensors(tmp_path / "no" / "x.safetensors", {"a": torch.ones(3)}),
        "No such file",
    )


def test_free_space(tmp_path: Path) -> None:
    free_space(tmp_path / "not" / "yet", 1)
    fails(lambda: free_space(tmp_path / "not" / "yet", 1 << 60), "GB", "free")


def test_a_module_in_memory() -> None:
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


def test_a_module_without_values(tmp_path: Path) -> None:
    bare = skeleton(saved(tmp_path))
    fails(ModuleStore(bare).check, "no values")
    with torch.device("meta"):
        fails(ModuleStore(nn.Linear(2, 2)).check, "weight")

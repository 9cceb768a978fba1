"""Bad checkpoints: each is refused with one line that names the file, the tensor and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import EXPERT, NORM, edit, fails, saved, skeleton, tiny

from moecc.checkpoint.source import checkpoint_folder
from moecc.checkpoint.store import CheckpointStore
from moecc.checkpoint.values import require_finite


def test_truncated_and_corrupt_files_are_named(tmp_path: Path) -> None:
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


def test_a_file_that_is_cut_while_in_use_is_named(tmp_path: Path) -> None:
    file = saved(tmp_path) / "model.safetensors"
    store = CheckpointStore(tmp_path, skeleton(tmp_path))
    file.write_bytes(file.read_bytes()[:2000])
    fails(lambda: [store.read(name) for name in store.names()], "ends inside", "model.safetensors")
    file.unlink()
    fails(lambda: store.read(NORM), NORM, "No such file")


def test_a_missing_shard_and_a_wrong_index_are_named(tmp_path: Path) -> None:
    saved(tmp_path, shard="20KB")
    bare, index = skeleton(tmp_path), tmp_path / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    lying = {**where["weight_map"], "model.ghost.weight": where["weight_map"][NORM]}
    good = index.read_text()
    index.write_text(json.dumps({"weight_map": lying}))
    fails(lambda: CheckpointStore(tmp_path, bare), "model.ghost.weight", where["weight_map"][NORM])
    wrong_map = ('{"weight_map": 3}', '{"weight_map": {"x": 3}}', '{"weight_map": {"x": ["y"]}}')
    for bad in ("{", "[]", "{}", "3", *wrong_map):
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
    store = CheckpointStore(tmp_path, skeleton(tmp_path))
    fails(store.check, f"'{EXPERT}' is missing", "4 experts", "has 3")


def test_an_expert_under_the_wrong_number_is_not_taken_for_another(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, {EXPERT: None, EXPERT.replace(".2.", ".7."): torch.ones(16, 32)})
    fails(CheckpointStore(tmp_path, skeleton(tmp_path)).check, f"'{EXPERT}' is missing")


def test_shapes_that_the_config_does_not_imply_are_refused(tmp_path: Path) -> None:
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


def test_projections_that_do_not_merge_are_refused(tmp_path: Path) -> None:
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
def test_values_that_are_not_finite_are_counted(value: float, tmp_path: Path) -> None:
    saved(tmp_path)
    bad = torch.ones(16, 32)
    bad[3, 4:6] = value
    edit(tmp_path, {EXPERT: bad})
    store = CheckpointStore(tmp_path, skeleton(tmp_path))
    store.check()
    fused = "model.layers.1.mlp.experts.gate_up_proj"
    counted = "2 NaN" if value != value else "2 infinite"
    fails(lambda: store.read(fused), EXPERT, "model.safetensors", counted)
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


def test_sources_that_cannot_be_used_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(lambda: checkpoint_folder(str(tmp_path / "nowhere")), "no folder", "nowhere")
    fails(lambda: checkpoint_folder(str(tmp_path)), "config.json")
    (tmp_path / "config.json").write_text("{}")
    fails(lambda: checkpoint_folder(str(tmp_path / "config.json")), "is a file")
    fails(lambda: checkpoint_folder(str(tmp_path)), "no *.safetensors weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    fails(
        lambda: checkpoint_folder(str(tmp_path)), "pytorch_model.bin", "never loads", "safetensors"
    )

    def offline(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network\nand a long explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    fails(lambda: checkpoint_folder("some/model"), "some/model", "no network")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    tiny("qwen2_moe").config.save_pretrained(tmp_path)
    fails(lambda: CheckpointStore(tmp_path, skeleton(tmp_path)), "model.safetensors")


def test_hub_ids_ask_for_safetensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    commit = tmp_path / "snapshots" / "0123abcd"

    def download(repo: str, **options: Any) -> str:
        asked.append({**options, "repo": repo})
        return str(saved(commit))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert checkpoint_folder("some/model") == commit
    assert [(a["repo"], a["revision"]) for a in asked] == [
        ("some/model", None),
        ("some/model", "0123abcd"),
    ]
    patterns = [pattern for a in asked for pattern in a["allow_patterns"]]
    assert not any(".bin" in pattern or pattern == "*" for pattern in patterns)

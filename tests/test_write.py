"""Writing an artifact: its files by name, size and content, from a plan made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import fails

from moecc.artifact import write
from moecc.artifact.audit import Plan
from moecc.artifact.schema import Row
from moecc.artifact.write import copy_small_files, float_config, write_artifact, write_kept
from moecc.checkpoint.files import LazyTensor, TensorFile
from moecc.checkpoint.schema import METHOD, REFUSALS, Compression, StoredLinear
from moecc.checkpoint.shards import INDEX
from moecc.pipeline.fate import KEPT
from moecc.types import Json

SIZES = {"a": 6, "b": 4, "c": 10, "d": 1, "e": 11, "f": 5}  # bytes


def tensor(size: int) -> LazyTensor:
    value = torch.arange(size, dtype=torch.uint8)
    return LazyTensor((size,), torch.uint8, lambda: value)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, int]]:
    """The folders and bytes that free space is asked for."""
    found: list[tuple[Path, int]] = []
    monkeypatch.setattr(write, "free_space", lambda *args: found.append(args))
    return found


@pytest.mark.parametrize(
    ("bound", "shards"),
    [
        (10, ["ab", "c", "d", "e", "f"]),
        (11, ["ab", "cd", "e", "f"]),
        (26, ["abcd", "ef"]),
        (37, ["abcdef"]),
        (36, ["abcde", "f"]),
    ],
)
def test_shards_are_filled_up_to_their_bound(
    bound: int,
    shards: list[str],
    asked: list[tuple[Path, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(write, "SHARD_BYTES", bound)
    tensors = {name: tensor(size) for name, size in SIZES.items()}
    shown: list[object] = []

    def progress(items: Any, label: str) -> Any:
        shown.append((len(items), label))
        return items

    files = write.write_weights(tmp_path, tensors, progress)
    count = len(shards)
    numbered = [f"model-0000{i}-of-0000{count}.safetensors" for i in range(1, count + 1)]
    assert files == (["model.safetensors"] if count == 1 else numbered)
    assert shown == [(count, "writing")] and asked == [(tmp_path, 37 + (1 << 20))]
    for file, keys in zip(files, shards, strict=True):
        found = TensorFile(tmp_path / file)
        assert found.keys() == set(keys) and found.metadata == {"format": "pt"}
        assert all(found[key].tolist() == list(range(SIZES[key])) for key in keys)
    if count == 1:
        assert not (tmp_path / INDEX).exists()
        return
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 37},
        "weight_map": {key: file for file, keys in zip(files, shards, strict=True) for key in keys},
    }


def test_a_hundredth_more_space_than_the_tensors_is_asked_for(
    asked: list[tuple[Path, int]], tmp_path: Path
) -> None:
    write.write_weights(tmp_path, {"a": tensor(5000)})
    assert asked == [(tmp_path, 5050 + (1 << 20))]


LINEAR = StoredLinear(
    8, {"weight": ((2, 3), "uint8"), "scale": ((2, 1), "float16"), "zero": ((2, 1), "uint8")}
)


def planned(nbytes: int, compression: Compression | None = None) -> Plan:
    rows = [Row("a", "head", (3,), KEPT, nbytes, 8.0)]
    return Plan({"a": tensor(3)}, rows, compression or Compression())


def artifact(folder: Path, found: Plan, config: Json, **edits: object) -> Json:
    """Write an artifact; return config.json."""
    program: Any = SimpleNamespace(config_edits=edits)
    write_artifact(folder, found, program, config, {"seed": 3})
    written: Json = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return written


def test_an_artifact_is_its_weights_its_config_and_an_audit_of_every_byte(tmp_path: Path) -> None:
    given = {"z": 1, "a": math.inf, "text": "é", "inner": {"k": 1}}
    found, program = planned(3), SimpleNamespace(config_edits={})
    rows = write_artifact(tmp_path, found, program, given, {"seed": 3})  # type: ignore[arg-type]
    size = (tmp_path / "model.safetensors").stat().st_size
    assert [(r.name, r.role, r.shape, str(r.fate), r.nbytes) for r in rows] == [
        ("a", "head", (3,), "as it was", 3),
        ("(safetensors headers)", "file format", (), "names, shapes and types", size - 3),
    ]
    assert (tmp_path / "config.json").read_text(encoding="utf-8") == (
        '{\n "a": Infinity,\n "inner": {\n  "k": 1\n },\n "text": "\\u00e9",\n "z": 1\n}\n'
    )
    assert json.loads((tmp_path / "moecc.json").read_text()) == {
        "seed": 3,
        "audit": [row.as_json() for row in rows],
        "summary": {
            "bytes": size,
            "bytes_by_role": {"head": 3, "file format": size - 3},
            "bits_per_weight": 8.0,
            "bits_per_weight_experts": None,
        },
    }
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json",
        "moecc.json",
        "model.safetensors",
    }


def test_what_moecc_json_says_are_numbers(tmp_path: Path) -> None:
    found = planned(3)
    found.rows[0].error = math.nan
    with pytest.raises(ValueError, match="JSON"):
        artifact(tmp_path, found, {})
    assert not (tmp_path / "moecc.json").exists()


def test_an_audit_that_misses_a_byte_is_refused() -> None:
    rows = planned(3).rows
    write._require_total(rows, 3)
    for on_disk in (2, 4):
        said = f"the audit accounts for 3 bytes but the files hold {on_disk}; this is a fault"
        fails(lambda n=on_disk: write._require_total(rows, n), said)


def test_a_config_says_what_is_stored(tmp_path: Path) -> None:
    given = {
        "model_type": "x",
        "return_dict": False,
        "quantization_config": {"quant_method": "fp8"},
        "text_config": {"quantization_config": {}, "experts": 8},
    }
    before = json.loads(json.dumps(given))
    config = artifact(tmp_path, planned(3), given, **{"text_config.experts": 4, "new.a.b": [1]})
    plain = {"model_type": "x", "text_config": {"experts": 4}, "new": {"a": {"b": [1]}}}
    assert config == plain and given == before
    coded = Compression(linears={"q": LINEAR})
    config = artifact(tmp_path, planned(3, coded), given)
    assert config == {
        "model_type": "x",
        "text_config": {"experts": 8},
        "quantization_config": json.loads(json.dumps(coded.as_config())),
        **REFUSALS,
    }
    # what moecc said of an artifact that is compiled again goes
    assert artifact(tmp_path, planned(3), config) == {
        "model_type": "x",
        "text_config": {"experts": 8},
    }
    experts: Any = SimpleNamespace(experts={"moe": 1}, linears={}, as_config=lambda: {"said": 1})
    assert artifact(tmp_path, planned(3, experts), {})["quantization_config"] == {"said": 1}


def test_a_float_config_says_nothing_of_compression() -> None:
    own = {"experts_implementation": "eager", "pruned_heads": {"0": [1]}}
    config: Json = {"torch_dtype": "bfloat16", "text_config": {**REFUSALS, "k": 1}, **own}
    float_config(config)
    assert config == {"torch_dtype": "bfloat16", "text_config": {"k": 1}, **own}
    float_config(config, "float16")
    assert config == {"dtype": "float16", "text_config": {"k": 1, "dtype": "float16"}, **own}
    for other in ({"a": 1, "quantization_config": {}}, {"a": 1, "text_config": None}):
        float_config(other)
        assert other.pop("text_config", None) is None and other == {"a": 1}
    assert REFUSALS["experts_implementation"] == METHOD


def test_small_files_are_copied_and_what_is_not_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_LARGEST_SMALL_FILE", 2000)
    source, folder = tmp_path / "model", tmp_path / "out"
    (source / "additional_chat_templates").mkdir(parents=True)
    folder.mkdir()
    template = "additional_chat_templates/a.jinja"
    template2 = "additional_chat_templates/b.jinja"
    wanted = {"tokenizer.json": b"\x00\r\n" + b"x" * 1997, template: b"a", template2: b"b"}
    others = ("config.json", "moecc.json", INDEX, "pytorch_model.bin.index.json")
    for name, content in [*wanted.items(), *((name, b"{}") for name in others)]:
        (source / name).write_bytes(content)
    (source / "vocab.json").write_bytes(b"x" * 2001)
    (source / "merges.json").symlink_to("gone")
    (source / "extra.json").mkdir()
    said: list[str] = []
    copy_small_files(source, folder, said.append)
    copied = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    assert {name: p.read_bytes() for name, p in copied.items()} == wanted
    left = [
        f"note: {source / n} is left out: it is no file, or a link to none"
        for n in ("extra.json", "merges.json")
    ]
    assert said == [*left, f"note: {source}/vocab.json is left out: it has more than 2.00 kB"]


def test_which_experts_a_pruned_artifact_kept_is_said_in_its_exports(tmp_path: Path) -> None:
    (tmp_path / "moecc.json").write_text('{"seed": 1}')
    (out := tmp_path / "out").mkdir()
    write_kept(tmp_path, out)
    assert not list(out.iterdir())
    (tmp_path / "moecc.json").write_text('{"seed": 1, "experts_kept": {"moe": [0, 2]}}')
    write_kept(tmp_path, out)
    assert json.loads((out / "moecc.json").read_text()) == {"experts_kept": {"moe": [0, 2]}}

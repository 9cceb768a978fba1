"""Which file has each tensor of a checkpoint: the index decides, what contradicts it is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from checkpoints import fails

from moecc.checkpoint.files import write_safetensors
from moecc.checkpoint.shards import (
    INDEX,
    SINGLE,
    checkpoint_entries,
    has_weights,
    read_index,
    weight_files,
)


def write(folder: Path, held: Mapping[str, str], index: Mapping[str, str] | None = None) -> Path:
    """Write files with one tensor per letter, of as many elements as its file has in front."""
    folder.mkdir(exist_ok=True)
    for count, (file, names) in enumerate(held.items(), 1):
        write_safetensors(folder / file, {name: torch.ones(count) for name in names})
    if index is not None:
        (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return folder


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    fails(lambda: weight_files(tmp_path), f"{tmp_path} has neither {SINGLE} nor {INDEX}")
    write(tmp_path, {SINGLE: "ab"})
    assert weight_files(tmp_path) == {tmp_path / SINGLE: set()}
    entries, notes = checkpoint_entries(tmp_path)
    assert entries.keys() == {"a", "b"} and notes == []


def test_an_index_tells_the_file_of_each_tensor(tmp_path: Path) -> None:
    where = {"c": "2", "a": "1", "b": "2"}
    write(tmp_path, {"1": "a", "2": "bc", "stray.safetensors": "d"}, where)
    assert read_index(tmp_path) == where
    assert list(weight_files(tmp_path).items()) == [
        (tmp_path / "1", {"a"}),
        (tmp_path / "2", {"b", "c"}),
    ]
    entries, notes = checkpoint_entries(tmp_path)
    assert {n: (e.file.name, e.shape) for n, e in entries.items()} == {
        "a": ("1", (1,)),
        "b": ("2", (2,)),
        "c": ("2", (2,)),
    }
    assert notes == []
    (tmp_path / "2").unlink()
    fails(lambda: weight_files(tmp_path), "lacks '2', one of the 2 files its index names")
    (tmp_path / SINGLE).write_bytes(b"")
    fails(lambda: weight_files(tmp_path), f"{SINGLE} and {INDEX}", "two sets of weights")


def test_an_index_may_name_the_single_file_among_others(tmp_path: Path) -> None:
    write(tmp_path, {SINGLE: "a", "2": "b"}, {"a": SINGLE, "b": "2"})
    assert weight_files(tmp_path) == {tmp_path / SINGLE: {"a"}, tmp_path / "2": {"b"}}


@pytest.mark.parametrize(
    "text",
    ['{"weight_map": 3}', '{"weight_map": {"x": 3, "y": "1"}}', '{"weight_map": ["1"]}', "{}"],
)
def test_an_index_without_file_names_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    fails(lambda: read_index(tmp_path), f"{tmp_path / INDEX} isn't a valid index")
    (tmp_path / INDEX).write_text('{"weight_map": {}}')
    assert read_index(tmp_path) == {}


def test_a_tensor_that_its_file_lacks_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"1": "a", "2": "b"}, {"a": "1", "b": "2", "c": "2"})
    fails(lambda: checkpoint_entries(tmp_path), f"{tmp_path / '2'} has no 'c', which {INDEX}")


def test_copies_that_the_index_does_not_name_are_counted_and_left_out(tmp_path: Path) -> None:
    where = {"a": "3", "b": "2", "c": "2", "d": "3", "e": "1"}
    write(tmp_path, {"1": "abe", "2": "bcx", "3": "acd", "unnamed.safetensors": "y"}, where)
    entries, notes = checkpoint_entries(tmp_path)
    assert {n: e.file.name for n, e in entries.items()} == {
        **where,
        "x": "2",  # a tensor that the index doesn't know is read where it is
    }
    says = f"is left out, because {INDEX} names another file for it, and so are 2 more"
    assert notes == [f"'a' in 1 {says}"]


def test_two_copies_that_the_index_does_not_know_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"1": "ax", "2": "bx"}, {"a": "1", "b": "2"})
    said = f"'x' is in 1 and in 2 of {tmp_path}, and {INDEX} names neither"
    fails(lambda: checkpoint_entries(tmp_path), said)


def test_weights_are_there_if_a_file_or_an_indexed_one_is(tmp_path: Path) -> None:
    assert not has_weights(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "one.bin", "b": "two.bin"}}')
    assert not has_weights(tmp_path)
    (tmp_path / "two.bin").write_bytes(b"")
    assert has_weights(tmp_path)
    (tmp_path / INDEX).unlink()
    assert not has_weights(tmp_path)
    (tmp_path / "any.safetensors").write_bytes(b"")
    assert has_weights(tmp_path)

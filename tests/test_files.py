"""safetensors files: corrupt headers are refused, files are written whole or not at all."""

from __future__ import annotations

import errno
import json
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoints import assert_same, fails
from refusals import Usage
from torch import Tensor

from moecc.checkpoint.files import (
    LazyTensor,
    TensorFile,
    free_space,
    make_room,
    size,
    write_safetensors,
)
from moecc.errors import MoeccError


def write_file(file: Path, table: dict[str, Any], data: bytes) -> None:
    head = json.dumps(table).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + data)


@pytest.mark.parametrize(
    "offsets", [[0.0, 8.0], [0, 8.0], ["0", "8"], [None, 8], [0], [-8, 0]], ids=str
)
def test_offsets_that_are_no_byte_counts_are_refused(offsets: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write_file(file, {"a": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}, bytes(8))
    fails(lambda: TensorFile(file), str(file), "no valid safetensors header")


@pytest.mark.parametrize("shape", [[2.0], [-1, -2], ["2"], [True, 2]], ids=str)
def test_shapes_that_are_no_sizes_are_refused(shape: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write_file(file, {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}, bytes(8))
    fails(lambda: TensorFile(file), str(file), "no valid safetensors header")


@pytest.mark.parametrize(
    ("shape", "end"), [([2], 4), ([2], 12), ([], 8), ([0], 4), ([2, 0], 8), ([1] * 65, 4)], ids=str
)
def test_a_shape_of_another_size_than_its_bytes_is_refused(
    shape: list[int], end: int, tmp_path: Path
) -> None:
    file = tmp_path / "x.safetensors"
    write_file(file, {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}, bytes(end))
    fails(lambda: TensorFile(file), str(file), "no valid safetensors header")


@pytest.mark.parametrize(
    ("second", "third", "said"),
    [
        ([4, 12], [12, 16], "overlaps"),
        ([0, 8], [8, 16], "overlaps"),
        ([12, 20], [20, 24], "leaves a gap"),
    ],
)
def test_tensors_that_overlap_or_leave_gaps_are_refused(
    second: list[int], third: list[int], said: str, tmp_path: Path
) -> None:
    file, entries = tmp_path / "x.safetensors", {"a": [0, 8], "b": second, "c": third}
    table = {
        n: {"dtype": "F32", "shape": [(e - s) // 4], "data_offsets": [s, e]}
        for n, (s, e) in entries.items()
    }
    write_file(file, table, bytes(third[1]))
    fails(lambda: TensorFile(file), "'b' in", str(file), said, "fetch it again")


def test_written_files_equal_those_of_safetensors(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(2, 2).bfloat16(),
        "codes": torch.arange(7, dtype=torch.uint8),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "strided": torch.randn(4, 6).t(),
        "flag": torch.ones(2) > 0,
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


def test_lazy_tensors_are_in_memory_one_at_a_time(tmp_path: Path) -> None:
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
    written = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("lazy", "plain")]
    assert written[0] == written[1]
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


def test_a_disk_without_enough_free_space_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_space(tmp_path / "not" / "yet", 1)
    fails(lambda: free_space(tmp_path / "not" / "yet", 1 << 60), "GB", "free")
    asked: list[Path] = []

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(4000, 2500, 1500)

    monkeypatch.setattr("shutil.disk_usage", usage)
    free_space(tmp_path / "not" / "yet", 1500)
    with pytest.raises(MoeccError, match=r"yet needs 1\.50 kB and its disk has 1\.50 kB") as error:
        free_space(tmp_path / "not" / "yet", 1501)
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == errno.ENOSPC
    assert asked == [tmp_path, tmp_path]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1e6 - 6, "999.99 kB"),
        (1e6, "1.00 MB"),
        (2_345_678, "2.35 MB"),
        (999_990_000, "999.99 MB"),
        (1e9, "1.00 GB"),
        (1_234_560_000_000, "1234.56 GB"),
    ],
)
def test_bytes_are_told_in_powers_of_1000(count: float, text: str) -> None:
    assert size(count) == text


def test_the_advice_after_a_failed_write_follows_its_cause() -> None:
    assert make_room(OSError(errno.EFBIG, "x")) == "raise the limit on file sizes (ulimit -f)"
    assert make_room(OSError(errno.ENOSPC, "x")) == "free some space or write elsewhere"


def test_a_header_has_the_names_as_they_are_and_is_padded_to_8_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for name in ("é", "a", "ab", "abc", "abcdefgh"):
        write_safetensors(path, {name: torch.ones(2), "z": torch.ones(3, dtype=torch.uint8)})
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        head = data[8 : 8 + length]
        assert length % 8 == 0 and head.rstrip(b" ").endswith(b"}")
        assert len(head) - len(head.rstrip(b" ")) < 8 and len(data) == 8 + length + 11
        assert f'"{name}":'.encode() in head
        table = json.loads(head)
        assert table["__metadata__"] == {"format": "pt"}
        assert table[name]["data_offsets"] == [0, 8] and table["z"]["data_offsets"] == [8, 11]


def test_rows_are_read_by_number_from_either_end(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).view(4, 2, 3)
    write_safetensors(tmp_path / "x.safetensors", {"a": tensor, "b": torch.ones(2)})
    entry = TensorFile(tmp_path / "x.safetensors").entries["a"]
    for rows in ([0], [3, 1], [-1, 0, -4], [2, 2], []):
        assert_same(entry.read(rows), tensor[rows], str(rows))
    for rows in ([4], [-5]):
        with pytest.raises(IndexError):
            entry.read(rows)


def test_a_shape_of_as_many_axes_as_torch_has_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    many = {"dtype": "U8", "shape": [1] * 64, "data_offsets": [0, 1]}
    write_file(file, {"a": many, "__metadata__": None}, b"7")
    assert TensorFile(file)["a"].flatten().tolist() == [55]
    write_file(file, {"a": many, "__metadata__": {"x": 3}}, b"7")
    fails(lambda: TensorFile(file), "no valid safetensors header")
    none = {"dtype": "U8", "shape": [(1 << 63) - 1, 0], "data_offsets": [0, 0]}
    write_file(file, {"a": none}, b"")
    assert TensorFile(file).entries["a"].shape == ((1 << 63) - 1, 0)


def test_a_header_longer_than_its_file_or_the_bound_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.safetensors"
    head = b"{}" + b" " * 6
    file.write_bytes(len(head).to_bytes(8, "little") + head)
    assert len(TensorFile(file)) == 0 and TensorFile(file).metadata == {}
    monkeypatch.setattr("moecc.checkpoint.files.JSON_LIMIT", 8)
    assert list(TensorFile(file)) == []
    monkeypatch.setattr("moecc.checkpoint.files.JSON_LIMIT", 7)
    fails(lambda: TensorFile(file), str(file), "no valid safetensors header")
    monkeypatch.setattr("moecc.checkpoint.files.JSON_LIMIT", 100)
    for length in (9, 1 << 62):
        file.write_bytes(length.to_bytes(8, "little") + head)
        fails(lambda: TensorFile(file), str(file), "no valid safetensors header")
    fails(lambda: TensorFile(tmp_path / "none"), "can't read", "none: No such file or directory")

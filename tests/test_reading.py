"""Files of a model's folder: which are opened, how much is read, and which JSON is taken."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from checkpoints import fails

from moecc.checkpoint.reading import inside, opened, parse_json, read_json, read_json_if_there


def test_a_file_inside_is_given_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.json", "sub/b.json", "./a.json"):
        (tmp_path / name).write_text("{}")
        assert inside(tmp_path, name) == tmp_path / name
    for name in ("../a.json", "sub/../a.json", str(tmp_path / "a.json")):
        fails(lambda name=name: inside(tmp_path, name), str(tmp_path), "leads out of the folder")


def test_what_cannot_be_found_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    fails(lambda: inside(tmp_path, "none"), "can't read 'none'", "No such file", "fetch it again")
    fails(lambda: inside(tmp_path, "a\0b"), "can't read 'a\\x00b'", "null byte: fetch it again")
    fails(lambda: inside(tmp_path, "loop"), "can't read 'loop'", "oop")
    fails(lambda: inside(tmp_path, "."), "isn't a regular file")


def test_a_link_may_lead_into_the_cache_around_a_snapshot_and_nowhere_else(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / "1").write_text("{}")
    for parent, inner in (("snapshots", True), ("elsewhere", False)):
        folder = tmp_path / parent / "abc"
        folder.mkdir(parents=True)
        (folder / "own.json").write_text("{}")
        (folder / "linked.json").symlink_to(blobs / "1")
        assert inside(folder, "own.json") == folder / "own.json"
        if inner:
            assert inside(folder, "linked.json") == folder / "linked.json"
        else:
            fails(lambda f=folder: inside(f, "linked.json"), "'linked.json'", "outside this folder")


def test_blobs_may_lie_on_another_disk_in_the_user_s_own_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "1").write_text("{}")
    folder = tmp_path / "hub" / "models--a--b" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder.parents[1] / "blobs").symlink_to(tmp_path / "disk")
    (folder / "a.json").symlink_to("../../blobs/1")
    fails(lambda: inside(folder, "a.json"), "'a.json'", "outside this folder and its hub cache")
    (tmp_path / "cache").symlink_to("hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert inside(folder, "a.json") == folder / "a.json"


def test_only_regular_files_are_opened_for_reading(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x00\r\n\xff")
    with opened(tmp_path / "a") as file:
        assert file.read() == b"\x00\r\n\xff"
        assert not os.get_blocking(file.fileno())  # a pipe would wait for its other end
    fails(lambda: opened(Path(os.devnull)), "isn't a regular file")
    with pytest.raises(FileNotFoundError):
        opened(tmp_path / "b")


def test_a_json_file_of_just_the_bound_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, content = tmp_path / "a.json", b'{"a": [1, "x"]}'
    file.write_bytes(content)
    monkeypatch.setattr("moecc.checkpoint.reading.JSON_LIMIT", len(content))
    assert read_json(file) == {"a": [1, "x"]}
    file.write_bytes(content + b"\n")
    fails(lambda: read_json(file), f"{file} has more than 0 MiB; fetch it again")
    monkeypatch.setattr("moecc.checkpoint.reading.JSON_LIMIT", 3 << 20)
    file.write_bytes(b" " * (3 << 20) + content)
    fails(lambda: read_json(file, "try again"), f"{file} has more than 3 MiB; try again")


def test_an_endless_file_is_read_up_to_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless(io.BytesIO):
        def read(self, size: int | None = None) -> bytes:
            assert size is not None and size <= 1001
            return b" " * size

    (tmp_path / "a.json").write_text("{}")  # the system says 2 bytes
    monkeypatch.setattr("moecc.checkpoint.reading.JSON_LIMIT", 1000)
    monkeypatch.setattr("moecc.checkpoint.reading.opened", lambda file: Endless())
    fails(lambda: read_json(tmp_path / "a.json"), "has more than 0 MiB")


def test_a_damaged_json_file_is_told_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert read_json_if_there(file) == {}
    fails(lambda: read_json(file), "can't read 'a.json'", "No such file")
    file.write_text('{"a": 1}')
    assert read_json_if_there(file) == {"a": 1}
    file.write_text("{")
    for read in (read_json, read_json_if_there):
        fails(lambda read=read: read(file), f"{file} isn't valid JSON", "); fetch it again")
        fails(lambda read=read: read(file, "make it new"), "); make it new")
    file.unlink()
    file.symlink_to("gone")
    fails(lambda: read_json_if_there(file), "No such file")


@pytest.mark.parametrize(
    ("start", "end"), [('{"a":', "}"), ('{"a":[', "]}"), ('{"b":1,"a":[0,', "]}")]
)
def test_json_may_be_nested_64_deep(start: str, end: str) -> None:
    per = start.count("{") + start.count("[")
    for value, inner in (("1", 0), ("{}", 1), ("[]", 1)):
        times = (64 - inner) // per
        text = start * times + value + end * times
        depth = times * per + inner
        while depth < 64:  # an odd one out
            text, depth = f'{{"c":{text}}}', depth + 1
        assert parse_json(text.encode())
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(f'{{"c":{text}}}'.encode())


def test_characters_of_json_come_whole() -> None:
    assert parse_json(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}
    assert parse_json('{"a": "é\\u00e9"}'.encode()) == {"a": "éé"}
    for half in (b"\\ud800", b"\\uDBFF", b"\\udc00x", b"\\udfff"):
        with pytest.raises(UnicodeEncodeError):
            parse_json(b'{"a": ["' + half + b'"]}')
    for other in (b"[]", b"3", b"null"):
        with pytest.raises(ValueError, match="no object"):
            parse_json(other)

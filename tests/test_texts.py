"""Text files: several as one, rows of texts and of chats, and the line of a row that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made import TINYMOE, Command
from test_rows import Letters, refused

from moecc.commands import texts
from moecc.commands.rows import token_rows


class Chats(Letters):
    """A tokenizer whose chat template writes `role: content`, and refuses a system's words."""

    chat_template = "{{ messages }}"

    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool) -> str:
        assert not tokenize
        if any(m["role"] == "system" for m in messages):
            raise ValueError("no system here")
        return "".join(f"{m['role']}: {m['content']}." for m in messages)


def lines(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    """Write rows as JSON, and text as it is, a line each."""
    file = folder / name
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return file


def stream(tokenizer: Letters, *files: Path) -> str:
    """Return the characters of all rows of one token and more; `|` ends a document."""
    count = sum(f.stat().st_size for f in files)
    rows = token_rows(tokenizer, files, count=count, length=2, say=lambda line: None)
    return "".join(chr(i) if i else "|" for i in rows.flatten().tolist())


def test_several_files_are_read_as_one(tmp_path: Path) -> None:
    a, b = tmp_path / "a.txt", lines(tmp_path, {"text": "efgh"})
    a.write_text("abc")
    assert stream(Letters(), a, b) == "abc|efgh"
    assert stream(Letters(), b, a) == "efgh|abc"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.NDJSON", "rows.json"])
def test_rows_of_texts_and_chats_are_documents(tmp_path: Path, name: str) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [{"text": "éé\nb", "id": 1}, {"text": ""}, {"messages": chat}]
    file = lines(tmp_path, *([rows] if name.endswith(".json") else [*rows, "", "  "]), name=name)
    assert stream(Chats(), file) == "éé\nb|user: hi.assistant: ho."


CHAT = {"messages": [{"role": "user", "content": "hi"}]}
BAD = {
    "no JSON": ("{'text': 1}", "no JSON (Expecting property name"),
    "deep": ("[" * 100_000, "no JSON (maximum recursion depth"),
    "a list": ([1], "neither a text nor a chat"),
    "other names": ({"prompt": "a", "completion": "b"}, "neither a text nor a chat"),
    "no string": ({"text": 5}, "its text is int, not a string"),
    "half a character": ({"text": "a\ud800"}, "half a character"),
    "no messages": ({"messages": []}, "its messages are no list of objects"),
    "words": ({"messages": ["hi"]}, "its messages are no list of objects"),
    "a chat that is refused": (
        {"messages": [{"role": "system", "content": "hi"}]},
        "chat template can't write it: no system here",
    ),
}


@pytest.mark.parametrize(("row", "why"), BAD.values(), ids=BAD.keys())
def test_a_row_that_cannot_be_used_is_refused_with_its_line(
    tmp_path: Path, row: object, why: str
) -> None:
    file = lines(tmp_path, {"text": "fine"}, "", row)
    assert refused(Chats(), file).startswith(f"{file}, line 3: ")
    assert why in refused(Chats(), file)


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    file = lines(tmp_path, CHAT)
    assert refused(Letters(), file) == (
        f"{file}, line 1: a chat, but the tokenizer has no chat template; "
        'give rows of {"text": "..."}'
    )


@pytest.mark.parametrize("row", [{"text": "abc"}, {"messages": []}])
def test_rows_in_a_file_of_text_are_refused(row: dict[str, Any], tmp_path: Path) -> None:
    file = lines(tmp_path, row, row, name="rows.txt")
    assert "rows of JSON; give it a name that ends in .jsonl" in refused(Letters(), file)


@pytest.mark.parametrize("text", ['{"a": 1}', '{"text": ', '["text"]', "[" * 10_000])
def test_json_that_is_no_row_is_text(text: str, tmp_path: Path) -> None:
    assert stream(Letters(), lines(tmp_path, text + text, name="code.txt")).startswith(text)


def test_json_that_is_no_list_of_rows_is_refused(tmp_path: Path) -> None:
    assert "holds no list of rows" in refused(Letters(), lines(tmp_path, {"a": 1}, name="a.json"))
    file = lines(tmp_path, [{"text": "a"}, {}], name="b.json")
    assert f"{file}, row 2: neither" in refused(Letters(), file)
    assert "is empty" in refused(Letters(), lines(tmp_path, {"text": " "}))
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "\xff"}')
    assert "line 1: no JSON ('utf-8' codec" in refused(Letters(), tmp_path / "c.jsonl")


def test_all_parts_of_a_huge_file_of_rows_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_WHOLE", 4000)
    file = lines(tmp_path, *({"text": "abcd"[i // 250] * 80} for i in range(1000)))
    tokenizer = Letters()
    rows = token_rows(tokenizer, file, count=4, length=20, say=lambda line: None)
    assert tokenizer.characters < 3000
    assert [chr(row[-1]) for row in rows.tolist()] == [*"abcd"]


@pytest.mark.parametrize("command", ["compile", "eval"])
def test_an_option_for_text_may_be_repeated(
    moecc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    option = "--calib" if command == "compile" else "--text"
    given = (option, TINYMOE / "calib.txt", option, "none.txt")
    more = ("--passes", "vq", "-o", "out") if command == "compile" else ("--reference", TINYMOE)
    got = moecc(command, TINYMOE, *more, *given)
    assert got.code == 2 and "no text file none.txt" in got.err
    got = moecc(command, TINYMOE, *more, *given[2:], *given[:2])
    assert got.code == 2 and "no text file none.txt" in got.err

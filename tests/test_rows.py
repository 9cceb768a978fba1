"""Token rows: which rows of a text are taken, and one line for each text that is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from made import TINYMOE

from moecc.commands import rows, texts
from moecc.commands.generate import generate
from moecc.commands.rows import default_text, rows_digest, token_rows, tokenizer_of
from moecc.errors import MoeccError
from moecc.ir.restriction import Restriction
from moecc.types import Tokenizer


class Letters:
    """A tokenizer with one token per character; with `begins`, a text begins with token 1."""

    def __init__(self, begins: bool = False, end: int | None = 0):
        self.bos_token_id, self.eos_token_id, self.begins = 1, end, begins
        self.characters = 0

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        self.characters += len(text)
        first = [1] if self.begins and add_special_tokens else []
        return {"input_ids": first + [ord(c) % 1000 for c in text]}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_of(TINYMOE)


def written(folder: Path, content: str | bytes) -> Path:
    """Write a text file; return its path."""
    file = folder / "text.txt"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def refused(tokenizer: Tokenizer, file: Path, **options: int) -> str:
    """Return the one line with which token_rows refuses a file."""
    with pytest.raises(MoeccError) as error:
        token_rows(tokenizer, file, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- rows of a file


def test_rows_are_evenly_spaced(tmp_path: Path) -> None:
    file = written(tmp_path, "".join(chr(0x100 + i) * 4 for i in range(10)) + "xyz")
    got = token_rows(Letters(), file, count=4, length=4)
    assert got.dtype == torch.int64 and got.shape == (4, 4)
    assert got[:, 0].tolist() == [0x100 + i * 10 // 4 for i in range(4)]
    assert (got == got[:, :1]).all()


def test_a_short_text_gives_all_its_rows_and_a_remark(tmp_path: Path) -> None:
    said: list[str] = []
    got = token_rows(Letters(), written(tmp_path, "abcdefghij"), count=9, length=3, say=said.append)
    assert got.tolist() == [[ord(c) for c in part] for part in ("abc", "def", "ghi")]
    assert len(said) == 1 and "3 rows of 3 tokens, not 9" in said[0]


def test_every_row_begins_with_the_token_that_begins_a_text(tmp_path: Path) -> None:
    got = token_rows(Letters(begins=True), written(tmp_path, "abcdef"), count=2, length=4)
    assert got.tolist() == [[1, *map(ord, "abc")], [1, *map(ord, "def")]]


@pytest.mark.parametrize("end", [0, None])
def test_nul_separates_documents(tmp_path: Path, end: int | None) -> None:
    file = written(tmp_path, "ab\0\0cd" + "e" * 2000)
    got = token_rows(Letters(end=end), file, count=1, length=5)
    assert got.tolist() == [[*map(ord, "ab"), *([0] if end == 0 else []), *map(ord, "cde")][:5]]


def test_only_slices_of_a_huge_file_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_WHOLE", 4000)
    for line in ("0123456789\n", "日本語テキスト"):
        file, tokenizer = written(tmp_path, line * 5000), Letters()
        got = token_rows(tokenizer, file, count=4, length=20)
        assert got.shape == (4, 20) and tokenizer.characters < 3000
        assert torch.equal(got, token_rows(tokenizer, file, count=4, length=20))


def test_rows_of_the_example_text(tokenizer: Tokenizer) -> None:
    got = token_rows(tokenizer, TINYMOE / "valid.txt", count=5, length=100)
    again = token_rows(tokenizer, TINYMOE / "valid.txt", count=5, length=100)
    assert got.shape == (5, 100) and int(got.max()) < 4096
    assert rows_digest(got) == rows_digest(again) != rows_digest(got[:4])


# ---- the text that comes with Python


def test_calibration_and_evaluation_share_no_document() -> None:
    ours, theirs = ({name for name, _ in default_text(p)} for p in ("calibration", "evaluation"))
    assert not ours & theirs
    assert min(len(ours), len(theirs)) > 50
    assert any(name.startswith("topic ") for name in ours | theirs)


def test_default_rows_are_the_same_every_time_and_read_little(tokenizer: Tokenizer) -> None:
    got = token_rows(tokenizer, count=4, length=64)
    assert torch.equal(got, token_rows(tokenizer, count=4, length=64))
    assert not torch.equal(got, token_rows(tokenizer, count=4, length=64, purpose="evaluation"))
    letters = Letters()
    token_rows(letters, count=2, length=100)
    assert letters.characters < 20_000


def test_whole_documents_follow_where_excerpts_do_not_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    documents = {"a": "a" * 20_000, "b": "b" * 20_000}
    monkeypatch.setattr(rows, "default_text", lambda purpose: iter(documents.items()))
    got = token_rows(Letters(end=None), count=3, length=10_000, say=lambda line: None)
    assert got.shape == (3, 10_000)
    assert set(got[2].tolist()) == {ord("a"), ord("b")}


# ---- texts and tokenizers that are refused


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    letters = Letters()
    assert "no text file" in refused(letters, tmp_path / "none.txt")
    assert "is a folder" in refused(letters, tmp_path)
    assert "is empty" in refused(letters, written(tmp_path, ""))
    assert "is empty" in refused(letters, written(tmp_path, " \n\n\t"))
    assert "no UTF-8 text" in refused(letters, written(tmp_path, "grün".encode("utf-16")))
    assert "is binary" in refused(letters, written(tmp_path, b"abc\0" * 1000))
    assert "no UTF-8 text" in refused(letters, TINYMOE / "model.safetensors")
    short = written(tmp_path, "abcde")
    assert "give a longer text or --length 5" in refused(letters, short, length=6)
    assert "at least 1 row" in refused(letters, short, count=0)
    assert "at least 1 row" in refused(letters, short, length=1)


def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path: Path) -> None:
    for prepare in (lambda: None, lambda: shutil.copy(TINYMOE / "config.json", tmp_path)):
        prepare()
        with pytest.raises(MoeccError, match="has no tokenizer"):
            tokenizer_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"})[:-3])
    with pytest.raises(MoeccError, match="its tokenizer can't be used"):
        tokenizer_of(tmp_path)


def test_a_tokenizer_that_fails_in_use_is_refused(tmp_path: Path) -> None:
    shutil.copytree(TINYMOE, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["model_max_length"] = "many"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(MoeccError, match=f"^{tmp_path}: its tokenizer can't be used .*again$"):
        token_rows(tokenizer_of(tmp_path), count=1, length=8)
    with pytest.raises(MoeccError, match=f"^{tmp_path}: its tokenizer can't be used .*again$"):
        generate(str(tmp_path), "def", new_tokens=1)


def test_a_tokenizer_that_is_code_runs_only_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(cache, str(tmp_path / "modules"))
    folder = Path(shutil.copytree(TINYMOE, tmp_path / "model"))
    (folder / "mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass Mine(PreTrainedTokenizerFast): ..."
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "mine"}))
    message = "its tokenizer is Python code; read it, then --trust-remote-code"
    with pytest.raises(MoeccError, match=message):
        tokenizer_of(folder)
    assert type(tokenizer_of(folder, trust_remote_code=True)).__name__ == "Mine"


@pytest.mark.parametrize(
    ("restriction", "text", "allowed"),
    [
        (Restriction(), "", [1, 2, 3, 4, 5, 63, 64]),
        (Restriction(excluded=(2,)), "sequence other than 2", [1, 3, 4, 5, 63, 64]),
        (Restriction(excluded=(1, 4)), "sequence other than 1, 4", [2, 3, 5, 63, 64]),
        (Restriction(high=63), "sequence <= 63", [1, 2, 3, 4, 5, 63]),
        (Restriction(3, 63), "3 <= sequence <= 63", [3, 4, 5, 63]),
    ],
)
def test_a_restriction_allows_its_lengths_only(
    restriction: Restriction, text: str, allowed: list[int]
) -> None:
    assert [n for n in (1, 2, 3, 4, 5, 63, 64) if restriction.holds(n)] == allowed
    assert str(restriction) == text and bool(restriction) == bool(text)
    told = restriction.as_json()
    assert restriction == (Restriction() if told is None else Restriction.of_json(told))

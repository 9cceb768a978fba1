"""What every Python process runs where moecc is installed: it fails nobody, whatever is wrong."""

from __future__ import annotations

import importlib.util
import io
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
from made import ROOT

from moecc import hook

WANTED = "transformers.quantizers.auto"


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The finder of a moecc that is broken."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setitem(sys.modules, "moecc.hook", None)
    spec = importlib.util.spec_from_file_location("_moecc_startup", ROOT / "moecc" / "startup.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield sys.meta_path[0]


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


CLOSED = io.StringIO()
CLOSED.close()


@pytest.mark.parametrize("stderr", [None, CLOSED, Broken()], ids=["none", "closed", "broken"])
def test_a_broken_moecc_fails_nobody_even_without_stderr(
    stderr: object,
    waiting: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    assert waiting.find_spec(WANTED) is None
    assert waiting not in sys.meta_path
    assert capsys.readouterr().out == ""  # print(file=None) writes there


def test_a_broken_moecc_is_said(waiting: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert waiting.find_spec("json") is None and waiting in sys.meta_path
    assert waiting.find_spec(WANTED) is None
    assert capsys.readouterr().err.startswith("moecc: artifacts can't be opened: import of moecc.h")


def test_many_threads_may_look_for_it_at_once(
    waiting: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(waiting.find_spec, [WANTED] * 64)) == [None] * 64
    assert "list" not in capsys.readouterr().err


def test_a_module_that_fails_to_register_fails_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Loader:
        def exec_module(self, module: ModuleType) -> None:
            module.loaded = True  # type: ignore[attr-defined]

    monkeypatch.setitem(hook._WANTED, "json", "moecc.nothing")
    loader, module = Loader(), ModuleType("json")
    hook._register_after(loader, hook._Waiting("json"))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "moecc"):
        loader.exec_module(module)
    assert module.loaded
    assert "can't register with json (No module named 'moecc.nothing')" in caplog.text

"""Child processes read nothing from the current folder, which may have been downloaded."""

from __future__ import annotations

import ast
import os
import shutil
import sys
from pathlib import Path

import pytest
from made import ROOT

from moecc.backends.onnx import speed
from moecc.errors import MoeccError
from moecc.native.build import COMPILERS, compiler, run


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; its modules leave a file `ran` there."""
    for name in ("statistics", "json", "numpy", "own"):
        code = f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(7)\n"
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_module_that_is_run_leaves_the_current_folder_out() -> None:
    """`python -m` puts it first on the path, unless -P stands before."""
    found = []
    for folder in ("moecc", "passes", "backends", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                words = [ast.unparse(e) for e in node.elts] if isinstance(node, ast.List) else []
                found += [words[words.index("'-m'") - 1]] if "'-m'" in words else []
    assert len(found) >= 4 and set(found) == {"'-P'"}


def test_bench_imports_nothing_from_the_current_folder(hostile: Path) -> None:
    (hostile / "model.onnx").write_bytes(b"no model")
    with pytest.raises(MoeccError, match="can't load it"):
        speed._apart(hostile / "model.onnx", None, 1, 4, 2)
    assert not (hostile / "ran").exists()


def test_a_compiler_imports_nothing_from_the_current_folder(hostile: Path) -> None:
    """CXX may be a Python program: `python -m ziglang c++`."""
    with pytest.raises(MoeccError, match="No module named own"):
        run([sys.executable, "-m", "own"])
    assert not (hostile / "ran").exists()


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
def test_a_compiler_includes_nothing_from_the_current_folder(
    hostile: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty entry in CPATH stands for the folder that the compiler runs in."""
    source = tmp_path_factory.mktemp("elsewhere") / "source.cc"
    source.write_text("#include <vector>\n")
    (hostile / "vector").write_text("#error hostile\n")
    monkeypatch.setenv("CPATH", os.pathsep)
    run([*compiler(), "-fsyntax-only", str(source)])

"""benchmarks/gpu.py in triton's interpreter: all of it but the times, and that it times nothing that is wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.interp
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The benchmark's module, told to write to tmp_path."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--out", str(tmp_path)])
    import gpu

    return gpu


def test_it_writes_what_it_says(gpu: Any, tmp_path: Path) -> None:
    assert gpu.main() == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {(row["bits"], row["tokens"]) for row in found["checks"]} == {(b, t) for b in (2, 3, 4) for t in (1, 9)}
    assert {row["what"] for row in found["layers"]} == {
        "moecc 2 bit", "moecc 3 bit", "transformers grouped_mm", "transformers batched_mm",
    }  # fmt: skip
    assert all(row["us"] > 0 and row["roofline"] > 0 for row in found["layers"])
    assert [(row["batch"], row["compiled"]) for row in found["model"]] == [(1, False), (2, False)]
    table = (tmp_path / "gpu.md").read_text()
    assert "| moecc 3 bit |" in table and "## tiny, random weights, tokens per second" in table
    assert (tmp_path / "gpu.svg").exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_nothing_is_timed_if_the_kernels_are_wrong(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    right = gpu._gpu.vq_experts
    monkeypatch.setattr(gpu._gpu, "vq_experts", lambda *a, **k: right(*a, **k) * 1.1)
    monkeypatch.setattr(gpu, "time_layers", lambda *a: pytest.fail("timed"))
    assert gpu.main() == 1
    assert "the kernels are wrong on this card; nothing was timed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

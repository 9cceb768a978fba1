"""benchmarks/gpu.py and gpu_tiles.py in triton's interpreter; only the times mean nothing there."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made import ROOT

pytestmark = pytest.mark.interp
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The benchmark's module, with arguments that make it write to tmp_path."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--out", str(tmp_path)])
    import gpu

    return gpu


def test_the_benchmark_writes_its_numbers_table_and_plot(gpu: Any, tmp_path: Path) -> None:
    assert gpu.main() == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {(row["bits"], row["tokens"]) for row in found["checks"]} == {
        (b, t) for b in (2, 3, 4) for t in (1, 9)
    }
    assert {row["what"] for row in found["layers"]} == {
        "moecc 2 bit",
        "moecc 3 bit",
        "transformers grouped_mm",
        "transformers batched_mm",
        "torch grouped_mm, products alone",
    }
    assert all(row["us"] > 0 and row["roofline"] > 0 for row in found["layers"])
    kinds = {
        16: ["CUDA graph, transformers grouped_mm", "CUDA graph, transformers batched_mm"],
        2: ["generate", "CUDA graph"],
    }
    wanted = [(bits, kind, batch) for bits in (16, 2) for kind in kinds[bits] for batch in (1, 2)]
    assert [(row["bits"], row["kind"], row["batch"]) for row in found["model"]] == wanted
    assert all(row["tokens_per_second"] > 0 for row in found["model"])
    table = (tmp_path / "gpu.md").read_text()
    assert "| moecc 3 bit |" in table and "## tiny, random weights, tokens per second" in table
    assert (tmp_path / "gpu.svg").exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_rows_of_an_earlier_run_are_kept_if_the_card_is_the_same(gpu: Any, tmp_path: Path) -> None:
    from _gpu_report import kept

    of = dict(device="H100", torch="2.11", triton="3.6")
    new: dict[str, Any] = dict(of, bandwidth=2, layers=[], model=[])
    told = {("a", 1), ("b", 4)}, {"moecc 2 bit"}
    assert kept(new, tmp_path, "layers", *told) == new
    rows = [
        dict(shape=s, tokens=t, what=w)
        for s in "ab"
        for t in (1, 4, 9)
        for w in ("torch", "moecc 2 bit", "moecc 3 bit")
    ]
    (tmp_path / "gpu.json").write_text(
        json.dumps(dict(of, bandwidth=1, layers=rows, model=[2], model_shape="tiny"))
    )
    assert kept(new, tmp_path, "model", *told) == dict(new, layers=rows, kept=["the layers"])
    found = kept(new, tmp_path, "layers", *told)
    old = [
        r for r in rows if (r["shape"], r["tokens"]) not in told[0] or r["what"] == "moecc 3 bit"
    ]
    assert found == dict(new, layers=old, model=[2], model_shape="tiny", kept=found["kept"])
    assert (
        found["kept"][:2] == ["the model", "layers of 9 tokens"]
        and "moecc 3 bit of a, 1 tokens" in found["kept"]
    )
    other = dict(new, device="H200")
    assert kept(other, tmp_path, "layers", *told) == other


def test_nothing_is_timed_if_the_kernels_are_wrong(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    right = gpu._gpu.vq_experts
    monkeypatch.setattr(gpu, "CHECKED", gpu.CHECKED[-1:])
    monkeypatch.setattr(gpu._gpu, "vq_experts", lambda *a, **k: right(*a, **k) * 1.1)
    monkeypatch.setattr(gpu, "time_layers", lambda *a: pytest.fail("timed"))
    assert gpu.main() == 1
    assert "the kernels are wrong on this card; nothing was timed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_only_tiles_with_right_results_are_timed(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import gpu_tiles

    wrong = gpu_tiles.Case.wrong
    monkeypatch.setattr(
        gpu_tiles.Case, "wrong", lambda case, tile, y: wrong(case, tile, 2 * y if tile.half else y)
    )
    assert gpu_tiles.main() == 0
    lines = (tmp_path / "gpu_tiles.md").read_text().splitlines()
    fast, slow = (
        [line for line in lines if ("half" in line) is half and line.endswith(" |")]
        for half in (False, True)
    )
    assert slow and all(line.startswith(("| error 5.0e-01 ", "| error 5.1e-01 ")) for line in slow)
    assert sum(line.split()[1].replace(".", "").isdigit() for line in fast) > 3


def test_the_benchmark_of_coding_finds_codes_that_change_or_are_worse(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    told = ["--tiny", "--only", "checks", "speed", "--bits", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu_coding.py", *told])
    import gpu_coding

    assert gpu_coding.main() == 0
    lines = (tmp_path / "gpu_coding.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("| 3 | ")] == [
        f"| 3 | {coupled} | 1.00000 | 0.000 % | True |  |" for coupled in ("no", "yes")
    ]
    assert sum(line.startswith("| tiny | 3 | ") for line in lines) == 2
    real, runs = gpu_coding.coded, iter(range(99))
    monkeypatch.setattr(
        gpu_coding, "coded", lambda *a: replace(c := real(*a), scale=c.scale * (1 + next(runs)))
    )
    assert gpu_coding.main() == 1

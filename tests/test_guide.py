"""The author's guide, passes/README.md, and its example, examples/my_pass.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import make
from made import ROOT
from pipelines import MY_PASS, compiled

from moecc.ir.program import Program
from moecc.pipeline.parse import find_pass
from moecc.pipeline.passes import Context

pytestmark = pytest.mark.usefixtures("traced_once")


def test_a_pass_of_the_users_own_removes_biases(traced: Program) -> None:
    """Run examples/my_pass.py by its path."""
    kept = compiled(traced, f"affine{{offset=on}},{MY_PASS}{{below=0}}")
    gone = compiled(traced, f"affine{{offset=on}},{MY_PASS}{{below=100}}")
    assert list(gone.differed)[-1] == "drop_bias"
    assert gone.differed["drop_bias"] and not kept.differed["drop_bias"]
    assert "gate_up.bias" in kept.program.text() and "gate_up.bias" not in gone.program.text()
    assert gone.reports[-1].bits < kept.reports[-1].bits
    assert 0 < gone.ctx.audit["model.layers.0.mlp.experts.gate_up"]["bias_share"] < 100


def test_the_example_measures_biases_of_rows_of_zeros_too() -> None:
    """A row of zeros is all bias, or has none: shares of 0.6, 0.8, 1 and 0."""
    bias = torch.tensor([[-3.0, 4.0], [1e-20, 0.0]])
    weight = torch.tensor([[[3.0, 4.0], [0.0, 5.0]], [[0.0, 0.0], [0.0, 0.0]]])
    layer = SimpleNamespace(weight=lambda p, part: bias, original=lambda p: weight)
    ctx = Context()
    p: Any = find_pass(MY_PASS)(below=0.0)  # type: ignore[call-arg]
    assert not p.drop(layer, SimpleNamespace(path="experts.down"), ctx)
    assert ctx.audit["experts.down"]["bias_share"] == pytest.approx(0.5**0.5)


def test_the_python_code_of_the_guide_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (ROOT / "passes" / "README.md").read_text()
    code = guide[guide.index("## In Python") :].split("```python\n")[1].split("```")[0]
    make("qwen2_moe").save_pretrained(tmp_path)
    # the same code on a smaller model
    smaller = {'"examples/tinymoe"': repr(str(tmp_path)), "4096, (2, 64)": "64, (2, 8)"}
    for theirs, ours in smaller.items():
        assert theirs in code
        code = code.replace(theirs, ours)
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(code, names)
    told = capsys.readouterr().out
    assert "= moecc.vq_experts(" in told and "\n./examples/my_pass.py: " in told
    got = names["module"](input_ids=names["batches"][0])[0]
    torch.testing.assert_close(got, names["logits"][0])


def test_the_guide_shows_the_example_word_for_word() -> None:
    guide, example = (ROOT / "passes" / "README.md").read_text(), Path(MY_PASS).read_text()
    assert f"```python\n{example[example.index('@dataclass') :]}```" in guide

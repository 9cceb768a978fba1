"""benchmarks/fuzz.py, shortly: changed inputs end in a sentence or in success; so do those kept.

`fuzz/` has a case for each kind of fault that the whole command found.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made import ROOT

torch.set_num_threads(1)
CASES = sorted((Path(__file__).parent / "fuzz").glob("*.json"))
SLOW = ("exported", "ops")  # test_native and test_attention run the ops under sanitizers


@pytest.fixture(scope="module")
def fuzz() -> Iterator[Any]:
    """The command's module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import fuzz

        yield fuzz


@pytest.fixture(scope="module")
def fuzzer(fuzz: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        stage = fuzz.Stage(folder, patch, ["mixtral"], ["mixtral", "deepseek_v3", "gpt_oss"])
        yield fuzz.Fuzzer(stage, seed=0, keep=folder / "kept")


def test_changed_inputs_end_in_a_sentence_or_in_success(fuzz: Any, fuzzer: Any) -> None:
    targets = [target for target in fuzz.TARGETS if target not in SLOW]
    fuzz.fuzz(fuzzer, targets, inputs=100, minutes=60)
    assert not fuzzer.faults
    rows = fuzzer.rows.values()
    assert sum(row.inputs for row in rows) == 100
    assert min(sum(row.refused for row in rows), sum(row.succeeded for row in rows)) > 20


@pytest.mark.parametrize("case", CASES, ids=[case.stem for case in CASES])
def test_a_kept_input_ends_as_it_should(case: Path, fuzz: Any, fuzzer: Any) -> None:
    assert fuzz.replay(fuzzer, [case]) == 0

"""The text of small graphs before and after a pass, and of layers that a pass leaves alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pipelines import Tiny, compiled
from torch import Tensor

from moecc.ir.program import Program
from moecc.ir.tensors import digest

pytestmark = pytest.mark.usefixtures("traced_once")


def layer_text(program: Program, text: str, batches: list[Tensor], names: tuple[str, str]) -> str:
    """Return the graph's text before and after a pass.

    names: the pass before it, or "before" if it is the first to change the text, and the pass.
    """
    run = compiled(program, text, batches=batches)
    parts = [run.texts["before"] if n == "before" else run.texts[f"layer001-{n}"] for n in names]
    return f"// before\n{parts[0]}// after {text}\n{parts[1]}"


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("klt", "moments,klt{rank=2,mean=2}", ("before", "klt")),
        ("vq", "moments,klt{rank=2,mean=2},vq{bits=3,codebook=layer}", ("klt", "vq")),
        ("fold", "moments,vq{codebook=layer},affine{offset=on},fold", ("affine", "fold")),
    ],
)
def test_a_pass_changes_the_golden_text_as_expected(
    name: str,
    text: str,
    names: tuple[str, str],
    tiny: Tiny,
    batches: list[Tensor],
    golden: Callable[[str, str], None],
) -> None:
    golden(f"{name}.txt", layer_text(tiny("M"), text, batches, names))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("klt", "moments,klt{rank=2}"),
        ("vq", "moments,vq"),
        ("fold", "moments,vq,affine,fold"),
        ("vsraq", "vsraq{steps=2}"),
    ],
)
def test_a_layer_that_does_not_match_keeps_its_text(
    name: str, text: str, tiny: Tiny, batches: list[Tensor]
) -> None:
    run = compiled(tiny("MD"), text, batches=batches)
    before = run.texts[f"layer001-{list(run.differed)[-1]}"]
    assert run.texts[f"layer002-{name}"] == before


def test_digests_tell_tensors_apart() -> None:
    assert digest(torch.zeros(3)) != digest(torch.ones(3)) and len(digest(torch.zeros(3))) == 8

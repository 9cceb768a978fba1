"""Derived and held weights: the values of some experts are rows of the whole, read without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_program
from families import ALL, FAMILIES, make
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from moecc.checkpoint.files import TensorFile, write_safetensors
from moecc.frontend.experts import deinterleave
from moecc.frontend.trace import trace
from moecc.ir.derived import derive, derive_experts, of_some
from moecc.ir.program import Program
from moecc.ir.tensors import Held, Reader, Weight
from moecc.pipeline import record

pytestmark = pytest.mark.usefixtures("traced_once")
E, N, K = 4, 6, 8

# ---- the layouts of families

# Of these families, the parts of experts that are computed from what the checkpoint has, and
# whether some can be without the others. dbrx lays the rows of all experts under each other, and
# longcat_flash has rows for experts that return their input.
DERIVED: dict[str, dict[str, bool]] = {
    "gpt_oss": {"gate_up": True, "down": True, "gate_up_bias": True},
    "llama4_text": {"gate_up": True, "down": True},
    "dbrx": {"gate_up": False, "down": False},
    "longcat_flash": {"gate_up": False},
}
NAMES = sorted(FAMILIES) if ALL else ["gpt_oss", "llama4_text", "dbrx"]


def reads(program: Program, monkeypatch: pytest.MonkeyPatch) -> list[list[int] | None]:
    """Record which experts the program reads of every stored tensor from now on; None: all."""
    found: list[list[int] | None] = []
    store: Any = program.store
    reading = store.read

    def read(name: str, *, experts: Sequence[int] | None = None, **options: Any) -> Tensor:
        found.append(None if experts is None else list(experts))
        value: Tensor = reading(name, experts=experts, **options)
        return value

    monkeypatch.setattr(store, "read", read)
    return found


@pytest.mark.family
@pytest.mark.parametrize("family", NAMES)
def test_some_experts_of_every_layout_are_rows_of_the_whole(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = trace(make(family))
    found: dict[str, bool] = {}
    for moe in program.moe_layers():
        for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
            node = moe.operand(name)
            weight = None if node is None else program.weights[node.name]
            if node is None or weight is None or weight.recipe is None:
                continue
            whole = program.value(node)
            alone = found[name] = of_some(weight.recipe, 2) is not None
            for some in ([2, 0], [1], [3, 3, 0], [0, 1, 2, 3]):
                seen = reads(program, monkeypatch)
                assert torch.equal(program.value(node, some), whole[some])
                assert seen == [some if alone else None] * len(weight.sources)
                monkeypatch.undo()
    assert found == DERIVED.get(family, dict.fromkeys(found, True))


# ---- recipes made by hand

A = torch.randn(E, N, K, generator=torch.Generator().manual_seed(0))
SQUARE = torch.randn(E, E, K, generator=torch.Generator().manual_seed(1))
ROWS = A.flatten(0, 1)
aten = torch.ops.aten
KEPT_APART: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "transposed": (lambda a: a.transpose(1, 2), [A]),
    "transposed from the end": (lambda a: a.transpose(-1, -2), [A]),
    "viewed": (lambda a: a.view(E, 2, 3, K), [A]),
    "viewed with a size left out": (lambda a: a.view(E, -1), [A]),
    "gate and up in turns": (deinterleave, [A]),
    "two joined": (lambda a, b: aten.cat([a, b], 1), [A, A + 1]),
    "joined along the last": (lambda a, b: aten.cat([a, b], -1), [A, A + 1]),
    "every second row": (lambda a: aten.slice(a, 1, 0, N, 2), [A]),
    "steps on steps": (lambda a: aten.cat([a.transpose(1, 2), a.transpose(1, 2)], 2), [A]),
}
MIXED: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "experts under each other": (lambda a: a.view(E, N, K), [ROWS]),
    "experts side by side": (lambda a: a.flatten(0, 1), [A]),
    "transposed with experts": (lambda a: a.transpose(0, 1), [SQUARE]),
    "transposed with experts from the end": (lambda a: a.transpose(-3, 1), [SQUARE]),
    "experts joined": (lambda a, b: aten.cat([a, b]), [A, A]),
    "experts joined, from the end": (lambda a, b: aten.cat([a, b], -3), [A, A]),
    "halves exchanged": (lambda a: aten.cat([a[2:], a[:2]]), [A]),
    "halves exchanged, from the end": (
        lambda a: aten.cat([aten.slice(a, -3, 2), aten.slice(a, -3, 0, 2)], -3),
        [A],
    ),
    "experts backwards": (lambda a: a.flip(0), [A]),
    "a mean of experts": (lambda a: a - a.mean(0, keepdim=True), [A]),
    "sums": (lambda a: a.cumsum(0), [A]),
    "one scale for all": (lambda a, s: a * s, [A, torch.ones(())]),
    "parts of a tuple": (lambda a: a.split(3, 1)[1].contiguous(), [A]),
    "all of one expert": (lambda a: a[1:2].expand(E, N, K), [A]),
}


def recipe(function: Callable[..., Tensor], sources: Sequence[Tensor]) -> fx.GraphModule:
    """Return the graph of a function, each node with its fake value."""
    made: fx.GraphModule = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*sources)
    return made


@pytest.mark.parametrize("name", [*KEPT_APART, *MIXED])
@pytest.mark.parametrize("some", [[2, 0], [1], [3, 2, 1, 0], [1, 1, 1, 1, 1]])
def test_experts_that_are_kept_apart_are_read_alone_and_others_with_all(
    name: str, some: list[int]
) -> None:
    function, sources = {**KEPT_APART, **MIXED}[name]
    weight = Weight("w", recipe(function, sources), tuple(map(str, range(len(sources)))))
    want, read = function(*sources)[some], []

    def reading(source: str, experts: Sequence[int] | None) -> Tensor:
        read.append(experts)
        value = sources[int(source)]
        return value if experts is None else value[list(experts)]

    got = derive_experts(weight, reading, some)
    assert torch.equal(got, want) and got.is_contiguous()
    assert read == [some if name in KEPT_APART else None] * len(sources)
    assert torch.equal(derive(weight, reading), function(*sources))


# ---- held tensors


def test_rows_of_held_tensors_are_read_alone_where_they_can_be(tmp_path: Path) -> None:
    seen: list[object] = []
    held = Held({"there": A})

    def whole() -> Tensor:
        seen.append("all")
        return A

    def some(experts: Sequence[int]) -> Tensor:
        seen.append(list(experts))
        return A[list(experts)]

    held.spill("spilled", whole, some)
    held.spill("as a whole", whole)
    for name, read in (("there", []), ("spilled", [[3, 1]]), ("as a whole", ["all"])):
        assert torch.equal(held.reader(name).rows([3, 1]), A[[3, 1]])
        assert seen == read
        seen.clear()
        assert torch.equal(held.reader(name).whole(), held[name]) and torch.equal(held[name], A)
        seen.clear()
    copy = Held(held)
    assert all(copy.same(held, name) for name in held)
    held.spill("there", whole, some)
    assert not copy.same(held, "there") and torch.equal(copy.reader("there").rows([2]), A[[2]])
    assert seen == []


def test_a_finished_layer_s_rows_are_read_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, file = tiny_program("M"), tmp_path / "x.safetensors"
    write_safetensors(file, {"layers.0.down": A})
    program.add("layers.0.down", A)
    record.spill(program, ["layers.0.down"], TensorFile(file))
    monkeypatch.setattr(TensorFile, "__getitem__", lambda *args: pytest.fail("all is read"))
    assert torch.equal(program.read("layers.0.down", experts=[3, 0]), A[[3, 0]])


def test_a_weight_may_be_computed_whenever_it_is_read() -> None:
    """As klt's remainder: it takes the place of a weight, and its rows are computed alone."""
    program = tiny_program("M")
    moe, before = program.moe_layers()[0], program.copy()
    node = moe.operand("down")
    assert node is not None
    seen: list[list[int]] = []

    def twice(experts: Sequence[int]) -> Tensor:
        seen.append(list(experts))
        return 2 * before.value(node, experts)

    new = program.add_reader("layers.0.twice", node, Reader(lambda: twice(range(4)), twice))
    moe.set_operands({"down": new})
    program.verify()
    want = 2 * before.read("layers.0.down")
    assert new.meta["val"].shape == want.shape and new.meta["val"].dtype == want.dtype
    assert torch.equal(program.value(new, [2, 0]), want[[2, 0]]) and seen == [[2, 0]]
    assert torch.equal(program.read("layers.0.twice"), want)
    assert program.tensors.in_memory("layers.0.twice") is None
    assert program.add("layers.0.twice", want) is new and program.value(new) is want

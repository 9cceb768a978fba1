"""moecc::CachedAttention: function and op library against a plain definition in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_masks
import torch
from test_native import TYPES, Batch, Outcome, isas, sanitized  # noqa: F401 (a fixture)
from torch import Tensor

from moecc.backends.onnx import build

onnx = pytest.importorskip("onnx")

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and operands. room: tokens for which the cache has memory beyond those it holds."""

    batch: int = 2
    tokens: int = 3
    past: int = 5
    heads: int = 4
    groups: int = 2
    width: int = 24
    value_width: int = 20
    angles: int = 12  # 0: not rotated
    normed: bool = False
    interleaved: bool = False
    half: bool = False
    # rows: a mask for each row; one: for all; heads: for each head; nothing: some queries see no
    # key
    mask: str = "rows"
    room: int = 0

    @property
    def name(self) -> str:
        return "CachedAttention" + "Norm" * self.normed + "Rope" * (self.angles > 0)

    def made(self) -> Tensors:
        b, s, p, h, g, d, e = (
            self.batch,
            self.tokens,
            self.past,
            self.heads,
            self.groups,
            self.width,
            self.value_width,
        )
        planes = {"rows": (b, 1), "one": (1, 1), "heads": (b, h), "nothing": (b, 1)}[self.mask]
        mask = torch.ones(s, p + s).tril(p).bool() & (torch.rand(*planes, s, p + s) > 0.3)
        mask |= torch.eye(s, p + s, dtype=torch.bool).roll(p, 1)  # each sees itself
        if self.mask == "nothing":
            mask[0, 0, 0] = False
        tensors = {
            "rows": torch.randn(b, s, (h + g) * d + g * e),
            "past_key": torch.randn(b, g, p + self.room, d),
            "past_value": torch.randn(b, g, p + self.room, e),
            "mask": mask,
        }
        if self.normed:
            tensors |= {"q_norm": torch.rand(d) + 0.5, "k_norm": torch.rand(d) + 0.5}
        if self.angles:
            angle = torch.rand(b, s, self.angles) * 6
            tensors |= {"cos": angle.cos(), "sin": angle.sin()}
        return {
            n: t.half() if self.half and t.is_floating_point() else t for n, t in tensors.items()
        }

    def attributes(self) -> dict[str, Any]:
        h, g, d, e = self.heads, self.groups, self.width, self.value_width
        return {
            "parts": [h * d, g * d, g * e],
            "queries": [0, 0, h, d],
            "keys": [0, 0, g, d],
            "values": [0, 0, g, e],
            "scale": 0.3,
            "eps": 1e-3,
            "interleaved": int(self.interleaved),
        }

    def expected(self, given: Tensors) -> Tensor:
        """Output, keys and values with the room behind them, one after the other in one row."""
        t = {n: x.double() if x.is_floating_point() else x for n, x in given.items()}
        parts = t["rows"].split(self.attributes()["parts"], -1)
        widths = (self.width, self.width, self.value_width)
        q, k, v = (
            x.unflatten(-1, (-1, n)).transpose(1, 2) for x, n in zip(parts, widths, strict=True)
        )
        q, k = (
            self._turned(self._normed(x, t.get(f"{n}_norm")), t) for n, x in (("q", q), ("k", k))
        )
        total = self.past + self.tokens
        keys = torch.cat(
            [t["past_key"][:, :, : self.past], k.half().double() if self.half else k], 2
        )
        values = torch.cat([t["past_value"][:, :, : self.past], v], 2)
        present = [
            torch.cat([new, t[n][:, :, total:]], 2)
            for n, new in (("past_key", keys), ("past_value", values))
        ]
        repeat = self.heads // self.groups
        scores = q @ keys.repeat_interleave(repeat, 1).mT * self.attributes()["scale"]
        shares = scores.masked_fill(~t["mask"], -torch.inf).softmax(-1).nan_to_num()
        y = (shares @ values.repeat_interleave(repeat, 1)).transpose(1, 2)
        return torch.cat([x.flatten() for x in (y, *present)])

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return (
            x
            if weight is None
            else x * (x.pow(2).mean(-1, keepdim=True) + self.attributes()["eps"]).rsqrt() * weight
        )

    def _turned(self, x: Tensor, t: Tensors) -> Tensor:
        if not self.angles:
            return x
        cos, sin = t["cos"][:, None], t["sin"][:, None]
        turned, rest = x[..., : 2 * self.angles], x[..., 2 * self.angles :]
        if self.interleaved:
            u, v = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack([u * cos - v * sin, v * cos + u * sin], -1).flatten(-2)
        else:
            u, v = turned.chunk(2, -1)
            turned = torch.cat([u * cos - v * sin, v * cos + u * sin], -1)
        return torch.cat([turned, rest], -1)


CASES: dict[str, Case] = {
    **{
        f"plain{', normed' * n}{', turned' * bool(a)}{', half' * f}": Case(
            normed=n, angles=a, half=f
        )
        for n, a, f in itertools.product((False, True), (0, 12), (False, True))
    },
    "pairs": Case(interleaved=True),
    "first": Case(past=0),
    "decode": Case(
        tokens=1, past=150, heads=12, groups=3, width=64, value_width=64, angles=32, batch=1
    ),
    "prefill": Case(tokens=70, past=9, heads=8, groups=2, width=32, value_width=32, angles=16),
    "narrow": Case(width=6, value_width=3, angles=3, heads=2, groups=1),
    "one mask": Case(mask="one"),
    "masks of heads": Case(mask="heads", heads=6, groups=3),
    "room": Case(room=4),
    "room for one": Case(room=1, tokens=1, half=True),
    "few angles": Case(angles=5),
    "blind": Case(mask="nothing"),
}
# The operators want angles for all channels, and have no result for a query that sees nothing.
LIBRARY_ONLY = {"few angles", "blind"}


def write(folder: Path, name: str, case: Case, given: Tensors, *, functions: bool = False) -> None:
    h, kind = onnx.helper, TYPES[torch.float16 if case.half else torch.float32]
    total = case.past + max(case.tokens, case.room)
    nodes = [
        h.make_node(
            case.name, list(given), ["y", "key", "value"], domain="moecc", **case.attributes()
        )
    ]
    # An output of another size is cut, and then of another shape than expected.
    for n, size in (("y", case.tokens), ("key", total), ("value", total)):
        axis = 1 if n == "y" else 2
        nodes += [h.make_node("Slice", [n, "zero", f"{n}_size", f"{n}_axis"], [f"{n}_cut"])]
        nodes += [h.make_node("Reshape", [f"{n}_cut", "flat"], [f"{n}_flat"])]
        given_sizes = {f"{n}_size": [size], f"{n}_axis": [axis]}
        nodes += [h.make_node("Constant", [], [c], value_ints=v) for c, v in given_sizes.items()]
    nodes = [
        h.make_node("Constant", [], [n], value_ints=[v]) for n, v in (("zero", 0), ("flat", -1))
    ] + sorted(nodes, key=lambda n: n.op_type != "Constant")
    nodes += [h.make_node("Concat", ["y_flat", "key_flat", "value_flat"], ["all"], axis=0)]
    types = {n: 9 if t.dtype == torch.bool else kind for n, t in given.items()}
    graph = h.make_graph(
        nodes,
        "g",
        [h.make_tensor_value_info(n, types[n], [None] * t.dim()) for n, t in given.items()],
        [h.make_tensor_value_info("all", kind, [None])],
    )
    model = h.make_model(
        graph, opset_imports=[h.make_opsetid("", 23), h.make_opsetid("moecc", 1)], ir_version=11
    )
    if functions:
        import onnx_ir as ir

        from moecc.backends.onnx.rewrites import attention

        model.functions.append(ir.serde.serialize_function(attention.function(case.name)))
        onnx.checker.check_model(model)
    onnx.save(model, folder / f"{name}.onnx")
    np.savez(folder / f"{name}.npz", **{f"run/{n}": t.numpy() for n, t in given.items()})


def check(outcome: Outcome, name: str, case: Case, given: Tensors, what: str) -> None:
    assert outcome.errors[name] == [], what
    found, wanted = torch.from_numpy(outcome.outputs[name]["run"]).double(), case.expected(given)
    assert found.shape == wanted.shape
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert error <= (2e-3 if case.half else 1e-5), f"{name}, {what}: {error:.1e}"


def test_the_library_computes_attention(tmp_path: Path, isas: list[str]) -> None:  # noqa: F811
    batch, made = Batch(tmp_path), {name: case.made() for name, case in CASES.items()}
    for name, case in CASES.items():
        write(tmp_path, name, case, made[name])
    for isa, threads in [(isa, 1) for isa in isas] + [(isas[-1], 2)]:
        outcome = batch.run(build.library(), threads=threads, MOECC_ISA=isa)
        for name, case in CASES.items():
            check(outcome, name, case, made[name], f"{isa}, {threads} threads")


@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if not c.room and n not in LIBRARY_ONLY]
)
def test_the_function_computes_attention(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    given = case.made()
    write(tmp_path, "one", case, given, functions=True)
    check(Batch(tmp_path).run(None), "one", case, given, "standard operators")


def test_sanitizers_find_nothing(tmp_path: Path, isas: list[str]) -> None:  # noqa: F811
    """Attention and masks; each input has memory that ends where the input does."""
    library, environment = sanitized()
    batch, made = Batch(tmp_path), {name: case.made() for name, case in CASES.items()}
    for name, case in CASES.items():
        write(tmp_path, name, case, made[name])
    write_wrong(tmp_path)
    masks = [f"mask{i}" for i in range(len(test_masks.CASES))]
    for name, (tokens, padding, total, window) in zip(masks, test_masks.CASES, strict=True):
        onnx.save(test_masks.of_one_node(window), tmp_path / f"{name}.onnx")
        given = test_masks.feed(tokens, padding, total)
        np.savez(tmp_path / f"{name}.npz", **{f"run/{n}": a for n, a in given.items()})
    for isa in isas:
        outcome = batch.run(library, threads=2, MOECC_ISA=isa, **environment)
        assert all(outcome.errors[name] for name in WRONG) and not any(
            outcome.errors[name] for name in masks
        )
        for name, case in CASES.items():
            check(outcome, name, case, made[name], f"sanitized {isa}")


WRONG = {
    "rows": ({"rows": lambda t: t[0]}, "rows has shape [3, 184], expected [B, S, row width]"),
    "row_width": (
        {"rows": lambda t: t[..., :-2]},
        "which leaves no whole heads of queries beside past_key [2, 2, 5, 24]",
    ),
    "odd_heads": (
        {"rows": lambda t: t[..., :-24]},
        "which leaves no whole heads of queries beside",
    ),
    "past_key": (
        {"past_key": lambda t: t[:1]},
        "past_key has shape [1, 2, 5, 24], expected [2, 2, 5, 24]",
    ),
    "past_value": (
        {"past_value": lambda t: t[:, :, :4]},
        "past_value has shape [2, 2, 4, 20], expected [2, 2, 5, 20]",
    ),
    "no_heads": ({"past_key": lambda t: t[:, :0]}, "has no heads or channels"),
    "mask": (
        {"mask": lambda t: t[..., 0]},
        "mask has shape [2, 1, 3], expected [B or 1, H or 1, S, P + S]",
    ),
    "mask_heads": (
        {"mask": lambda t: t.repeat(1, 3, 1, 1)},
        "mask has shape [2, 3, 3, 8], expected [2, 4, 3, 8]",
    ),
    "no_room": (
        {"mask": lambda t: t.repeat(1, 1, 1, 2)},
        "past_key has room for 5 tokens, mask [2, 1, 3, 16] is of 13 past",
    ),
    "little_room": (
        {"mask": lambda t: t[..., 1:]},
        "past_key has room for 5 tokens, mask [2, 1, 3, 7] is of 4 past and 3 new",
    ),
    "short_mask": ({"mask": lambda t: t[..., :2]}, "mask [2, 1, 3, 2] is of -1 past"),
    "norm": ({"q_norm": lambda t: t[:5]}, "q_norm has shape [5], expected [24]"),
    "angles": (
        {"cos": lambda t: t.repeat(1, 1, 2)},
        "cos has shape [2, 3, 24], more angles than pairs of channels",
    ),
    "sines": ({"sin": lambda t: t[:1]}, "sin has shape [1, 3, 12], expected [2, 3, 12]"),
}


def write_wrong(folder: Path) -> None:
    case = Case(normed=True)
    for name, (changes, _) in WRONG.items():
        given = case.made()
        write(folder, name, case, given | {n: f(given[n]).contiguous() for n, f in changes.items()})


def test_an_operand_of_a_wrong_shape_is_named(tmp_path: Path) -> None:
    write_wrong(tmp_path)
    outcome = Batch(tmp_path).run(build.library(), threads=2)
    for name, (_, text) in WRONG.items():
        (said,) = outcome.errors[name]
        assert "moecc::CachedAttentionNormRope: " in said and text in said, f"{name}: {said}"

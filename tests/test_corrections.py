"""What `affine` and `fold` store, token by token from the tensors in front of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import slow_vq4 as slow
import torch
from pipelines import Tiny, derive, resolved
from torch import Tensor

from moecc.ir.moe import Projection
from moecc.ir.program import Program
from moecc.passes import affine
from moecc.passes._code.metric import damped
from moecc.passes._code.regression import Regression, shift, sums_of
from moecc.pipeline.parse import parse_passes
from moecc.pipeline.passes import Context, Layer, LayerPass, Pass
from moecc.pipeline.run import run_passes

Pairs = list[tuple[Tensor, Tensor, Tensor, Tensor | None]]  # coded v, wanted t, weights, costs


@dataclass
class Found:
    """One layer behind `affine`: its routing, and both projections by name."""

    x: Tensor
    index: Tensor
    weight: Tensor
    original: dict[str, Tensor]
    held: dict[str, dict[str, Tensor | None]]  # stored, with slope and offset
    costs: dict[str, Tensor | None]

    def parts(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the coded and the shared part of a projection's weights, [E, N, K] each."""
        stored, side = slow.arrays(self.held[name]), name == "gate_up"
        columns = self.original[name].shape[-1]
        whole = slow.dense(stored, columns, input_side=side)
        alone = dict.fromkeys([n for n in slow.NAMES if n not in slow.CODED])
        coded = slow.dense({**stored, **alone}, columns, input_side=side)
        return torch.from_numpy(coded), torch.from_numpy(whole - coded)

    def entering(self, most: int) -> list[tuple[Tensor, Tensor]]:
        """Return each expert's tokens, at most so many evenly spaced ones, and their weights."""
        found = []
        for e in range(len(self.original["down"])):
            rows = [t for t in range(len(self.x)) if e in self.index[t].tolist()]
            rows = rows[:: max(1, math.ceil(len(rows) / most))]
            own = [float(self.weight[t][self.index[t] == e]) ** 2 for t in rows]
            found.append((self.x[rows].double(), torch.tensor(own).double()))
        return found

    def pairs(self, most: int) -> dict[str, Pairs]:
        """Return what each expert's corrections are fitted to, by projection."""
        found: dict[str, Pairs] = {"gate_up": [], "down": []}
        for e, (x, w) in enumerate(self.entering(most)):
            behind = intended = x
            for name, pairs in found.items():
                coded, low = (part[e] for part in self.parts(name))
                v, cost = behind @ coded.T, self.costs[name]
                t = intended @ self.original[name][e].double().T
                shared = behind @ low.T
                if cost is not None:
                    (cost,) = damped(cost[e].double(), 0.2)
                pairs.append((v, t - shared, w, cost))
                slope, offset = (self.held[name][n] for n in ("slope", "offset"))
                y = v * (1 if slope is None else slope[e]) + shared
                for more in (offset, self.held[name]["bias"]):
                    y = y + (0 if more is None else more[e])
                behind, intended = (
                    torch.from_numpy(np.stack([slow.silu_glu(row) for row in rows.numpy()]))
                    if name == "gate_up"
                    else rows
                    for rows in (y, t)
                )
        return found


def looking(found: list[Found]) -> Pass:
    """Return a pass that notes each layer of experts that it comes to."""

    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        for moe in layer.moe:
            names = [n.name for n in moe.node.args[:3]]
            values = layer.tap(names)
            x, index, weight = (torch.cat(values[n]) for n in names)

            def held(p: Projection) -> dict[str, Tensor | None]:
                more = {n: layer.weight(p, n) for n in ("slope", "offset")}
                return {**layer.stored(p), **more}

            moments = layer.data["moments", moe.path]
            original = {p.name: layer.original(p) for p in moe.projections}
            by_name = {p.name: held(p) for p in moe.projections}
            costs = {p.name: moments.output_of(p.name) for p in moe.projections}
            found.append(Found(x, index, weight, original, by_name, costs))  # type: ignore[arg-type]
        return False

    return derive(LayerPass, "look", run_layer=run_layer)


def corrected(
    program: Program, batches: list[Tensor], texts: list[str], cost: float = 0.0
) -> tuple[list[Found], Any]:
    """Run passes, with a look after each text; return what was seen, and the audit.

    cost: the size of made-up costs of output errors; 0: none.
    """
    found: list[Found] = []

    def run(self: Pass, program: Program, ctx: Context) -> bool:
        a = torch.randn(16, 16, generator=torch.Generator().manual_seed(5))
        ctx.data["sensitivity"] = {m.path: cost * a @ a.T for m in program.moe_layers() if cost}
        return False

    passes = [derive(Pass, "costs", run=run), *resolved(texts[0]), looking(found)]
    for text in texts[1:]:
        passes += [*parse_passes(text)[0], looking(found)]
    ctx = Context()
    run_passes(program, passes, ctx, batches)
    return found, ctx.audit


def decided(pairs: Pairs, offset: str, price: float) -> tuple[bool, bool]:
    """Return whether slopes help on every second token, and whether offsets are taken."""
    error = [0.0, 0.0, 0.0]
    for v, t, w, cost in pairs:
        fit, rest = (sums_of(v[i::2], t[i::2], w[i::2], cost) for i in (0, 1))
        error[0] += rest.error(1.0, 0.0)
        error[1] += rest.error(fit.line(offset=False)[0], 0.0)
        error[2] += rest.error(*fit.line())
    worth = math.log(min(error[0], error[1]) / error[2], 4) > price
    return error[1] < error[0], offset == "on" or (offset == "auto" and worth)


@pytest.mark.parametrize(
    ("texts", "cost", "most", "kinds"),
    [
        (["vq{feedback=false},affine{offset=on}"], 0.0, 2048, ["slope+offset"] * 2),
        (["vq{feedback=false},affine{offset=on}"], 3.0, 20, ["slope+offset"] * 2),
        (["klt{rank=2,mean=3},vq{rounds=1,codebook=layer},affine"], 0.0, 20, ["none", "slope"]),
        (["vq{bits=4,rounds=1},affine{offset=off}"], 3.0, 2048, ["slope", "slope"]),
        # a bias is there already, so an offset costs nothing
        (["vq{feedback=false},affine{offset=on},fold", "affine"], 0.0, 7, ["none", "slope+offset"]),
    ],
)
def test_corrections_are_fitted_to_what_really_arrives(
    tiny: Tiny,
    batches: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    texts: list[str],
    cost: float,
    most: int,
    kinds: list[str],
) -> None:
    """gate_up's to the model's own inputs; down's to hidden units behind the corrected gate_up."""
    monkeypatch.setattr(affine, "_MOST_TOKENS", most)
    seen, audit = corrected(tiny("M"), batches, texts, cost)
    found, offset = seen[-1], texts[-1].partition("offset=")[2].partition("}")[0] or "auto"
    told = [audit[f"layers.0.{name}"]["affine"] for name in found.held]
    for (name, pairs), columns in zip(found.pairs(most).items(), (16, 8), strict=True):
        held, row = found.held[name], audit[f"layers.0.{name}"]
        price = 0 if held["bias"] is not None else 16 / columns
        helps, shifts = decided(pairs, offset, price)
        sums: list[Regression] = [sums_of(*pair) for pair in pairs]
        lines = [s.line(offset=shifts) for s in sums]
        if not (helps or shifts):
            lines = [(torch.ones(()), torch.zeros(()))] * len(sums)
        for i, part in enumerate(("slope", "offset")):
            got = held[part]
            assert (got is not None) == (shifts or (helps and not i)), (name, part)
            if got is not None:
                want = torch.stack([line[i] for line in lines])
                torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)
        moved = shift([s.plain for s in sums], list(lines))
        assert row["output_shift"].keys() == moved.keys()
        for kind, both in moved.items():
            assert row["output_shift"][kind] == pytest.approx(both, rel=2e-3, abs=1e-6)
    assert told == kinds


def test_fold_multiplies_slopes_into_scales_and_adds_offsets_to_biases(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    """The second time there is a bias already."""
    texts = ["vq{feedback=false},affine{offset=on}", "fold", "affine{offset=on}", "fold"]
    program = tiny("M")
    first, folded, second, last = corrected(program, batches, texts)[0]
    for before, after in ((first, folded), (second, last)):
        for name, held in before.held.items():
            stored = after.held[name]
            assert stored["slope"] is None and stored["offset"] is None
            scale, slope, bias, offset = (held[n] for n in ("scale", "slope", "bias", "offset"))
            assert scale is not None and slope is not None and offset is not None
            assert (bias is None) == (before is first)
            own = 0 if bias is None else bias.float()
            for part, want in (("scale", scale.float() * slope), ("bias", offset + own)):
                got = stored[part]
                assert got is not None and torch.equal(got, want.half()), (name, part)
            for part in set(held) - {"scale", "bias", "slope", "offset"}:
                a, b = held[part], stored[part]
                assert a is b is None or torch.equal(a, b)  # type: ignore[arg-type]
    assert not [name for name in program.tensors if name.endswith(("slope", "offset"))]


def test_an_offset_alone_becomes_the_bias(tiny: Tiny, batches: list[Tensor]) -> None:
    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        for p in (p for moe in layer.moe for p in moe.projections):
            rows = layer.stored(p)["scale"]
            assert rows is not None
            p.set_operands({"offset": layer.program.add(f"{p.path}.offset", rows.float() + 1)})
        return bool(layer.moe)

    found: list[Found] = []
    passes = [*resolved("vq{rounds=1}"), derive(LayerPass, "shift", run_layer=run_layer)]
    run_passes(tiny("M"), [*passes, *parse_passes("fold")[0], looking(found)], Context(), batches)
    for held in found[0].held.values():
        bias, scale = held["bias"], held["scale"]
        assert held["offset"] is None and bias is not None and scale is not None
        assert torch.equal(bias, (scale.float() + 1).half())


@pytest.mark.parametrize("planned", [True, False])
def test_behind_a_plan_there_is_no_offset_whatever_it_is_worth(
    tiny: Tiny, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch, planned: bool
) -> None:
    monkeypatch.setattr(affine, "gain", lambda *args: 1.0)

    def run(self: Pass, program: Program, ctx: Context) -> bool:
        ctx.data |= {"budget": {}} if planned else {}
        return False

    ctx, text = Context(), "vq{feedback=false},affine"
    run_passes(tiny("M"), [derive(Pass, "plan", run=run), *resolved(text)], ctx, batches)
    kinds = [ctx.audit[f"layers.0.{name}"]["affine"] for name in ("gate_up", "down")]
    assert kinds == (["none", "slope"] if planned else ["slope+offset"] * 2)


def test_tokens_are_routed_again_if_no_pass_has_kept_them(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        for moe in layer.moe:
            del layer.data["routed", moe.path]
        return False

    found: list[Found] = []
    forget = derive(LayerPass, "forget", run_layer=run_layer)
    coding, correcting = (resolved("vq{feedback=false}"), parse_passes("affine{offset=on}")[0])
    for between in ([], [forget]):
        passes = [*coding, *between, *correcting, looking(found)]
        run_passes(tiny("M"), passes, Context(), batches)
    for name, held in found[0].held.items():
        for part in ("slope", "offset"):
            a, b = held[part], found[1].held[name][part]
            assert a is not None and b is not None and torch.equal(a, b)

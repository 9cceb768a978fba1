"""`absorb`: what its new basis rows hold of an update, decoded index by index."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import slow_vq4 as slow
import torch
from coders import drawn
from pipelines import Tiny, compiled, derive, resolved
from safetensors.torch import save_file
from torch import Tensor

from moecc.ir.moe import Projection
from moecc.ir.program import Program
from moecc.passes._tune.update import Update
from moecc.passes.absorb import AbsorbLora, _columns_joined, _moments, _rows_joined, _sum
from moecc.pipeline.passes import Context, Layer, LayerPass, Pass
from moecc.pipeline.run import run_passes


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("before", ["vq{rounds=1}", "klt{rank=2,mean=2},vq{rounds=1}"])
@pytest.mark.parametrize("rank", [3, 64])
@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_new_rows_of_a_basis_hold_the_best_part_of_an_update(
    tiny: Tiny, batches: list[Tensor], before: str, rank: int, size: float
) -> None:
    """The rest, |U - stored|^2 / |U|^2 under the moments, is what is told."""
    seen: list[str] = []

    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        for moe in layer.moe:
            for p in moe.projections:
                check(layer, p.name)
                seen.append(p.name)
        return False

    def check(layer: Layer, name: str) -> None:
        (moe,) = layer.moe
        p = next(p for p in moe.projections if p.name == name)
        original = layer.original(p)
        assert original is not None
        experts, rows, columns = original.shape
        update = size * (normal(experts, rows, columns) + 2 * normal(rows, columns, seed=1))
        _, moment = drawn(3, experts=experts, rows=rows, columns=columns)
        decode = partial(slow.dense, columns=columns, input_side=p.input_side)
        old = decode(slow.arrays(layer.stored(p)))
        told = AbsorbLora(rank=rank).grow(layer, p, update, moment)
        (moe,) = layer.moe
        p = next(p for p in moe.projections if p.name == name)
        stored = layer.stored(p)
        moved = decode(slow.arrays(stored)) - old
        u, h = update.double().numpy(), moment.double().numpy()
        lost, whole = (
            sum(float(np.trace(x[e] @ h[e] @ x[e].T)) for e in range(experts))
            for x in (u - moved, u)
        )
        assert told == pytest.approx(lost / whole, rel=1e-2, abs=1e-7)
        basis = stored["basis"]
        assert basis is not None and basis.dtype == torch.float16
        hidden = columns if p.input_side else rows
        assert len(basis) == min(rank, hidden) + (2 if "klt" in before else 0)
        # the part that `rank` rows can hold at best
        if p.input_side:
            c = h.mean(0)
            root = np.linalg.cholesky(c + 1e-3 * np.diag(c).mean() * np.eye(columns))
            v = np.linalg.svd(np.concatenate(list(u @ root)))[2][:rank].T
            best = u @ root @ v @ v.T @ np.linalg.inv(root)
        else:
            roots = [np.linalg.cholesky(m + 1e-3 * np.diag(m).mean() * np.eye(columns)) for m in h]
            parts = [w @ r for w, r in zip(u, roots, strict=True)]
            left = np.linalg.svd(np.concatenate(parts, axis=1))[0][:, :rank]
            best = left @ left.T @ u
        least = sum(float(np.trace((u - best)[e] @ h[e] @ (u - best)[e].T)) for e in range(experts))
        assert lost / whole <= 1.05 * least / whole + (0.05 if "klt" in before else 1e-3)

    look = derive(LayerPass, "look", run_layer=run_layer)
    run_passes(tiny("M"), [*resolved(f"{before},affine,fold"), look], Context(), batches)
    assert seen == ["gate_up", "down"]


def test_joined_rows_of_coefficients_stand_for_both_parts() -> None:
    """Each way holds both up to half a step of its scale; a larger scale suits the new part."""
    old = (
        normal(2, 8),
        (40 * normal(3, 5, 2, seed=1)).round().clamp(-127, 127),
        0.01 + torch.rand(3, 5),
    )
    new = (
        normal(3, 8, seed=2),
        (40 * normal(3, 5, 3, seed=3)).round().clamp(-127, 127),
        1 + torch.rand(3, 5),
    )
    want = [b * s.unsqueeze(-1) for _, b, s in (old, new)]
    ways = list(_rows_joined(old, new))
    assert len(ways) == 5
    fits = 127 * old[2] / want[1].abs().amax(-1)
    for (basis, coef, scale), share in zip(ways, (0.0, 0.25, 0.5, 0.75, 1.0), strict=True):
        fit = float(torch.quantile(fits, share))
        torch.testing.assert_close(basis, torch.cat([old[0], new[0] / fit]))
        assert torch.equal(coef, coef.round()) and float(coef.abs().max()) <= 127
        step = scale.unsqueeze(-1)
        exact = torch.cat([want[0], fit * want[1]], -1)
        assert bool(((coef * step - exact).abs() <= 0.51 * step).all())
        least = torch.maximum(old[2], fit * want[1].abs().amax(-1) / 127)
        torch.testing.assert_close(scale, least, rtol=5e-3, atol=1e-6)
    # the rows whose own scale is kept: of the quantiles, none to all
    assert [int((w[2] < 1.01 * old[2]).sum()) for w in ways][::4] == [15, 1]


def test_coefficients_of_nothing_are_joined_in_one_way() -> None:
    old = normal(2, 8), torch.ones(3, 5, 2), torch.full((3, 5), 0.5)
    new = normal(3, 8, seed=2), torch.zeros(3, 5, 3), torch.ones(3, 5)
    ((basis, coef, scale),) = _rows_joined(old, new)
    assert torch.equal(basis, torch.cat([old[0], new[0]]))
    assert torch.equal(coef, torch.cat([old[1], new[1]], -1)) and torch.equal(scale, old[2])


def test_joined_columns_of_coefficients_keep_their_scales() -> None:
    old = normal(2, 8), normal(3, 2, 5, seed=1), normal(3, 2, seed=2)
    new = normal(4, 8, seed=3), normal(3, 4, 5, seed=4), normal(3, 4, seed=5)
    ((basis, coef, scale),) = _columns_joined(old, new)
    for got, a, b, dim in zip((basis, coef, scale), old, new, (0, 1, 1), strict=True):
        assert torch.equal(got, torch.cat([a, b], dim))


@pytest.mark.parametrize("biased", [False, True])
def test_moments_of_absorb_are_means_over_the_tokens_of_the_float_model(
    tiny: Tiny, batches: list[Tensor], biased: bool
) -> None:
    """An expert without tokens gets the mean of the others."""
    found: list[int] = []

    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        for moe in layer.moe:
            names = [n.name for n in moe.node.args[:2]]
            x, index = (torch.cat(layer.tap(names)[n]) for n in names)
            gate_up, down = (layer.original(p) for p in moe.projections)
            assert gate_up is not None and down is not None
            bias = normal(len(gate_up), 16) if biased else None

            def original(p: Projection, part: str = "", bias: Tensor | None = bias) -> Any:
                return bias if part else layer.original(p)

            seen = SimpleNamespace(tap=layer.tap, original=original)
            got = _moments(seen, moe)  # type: ignore[arg-type]
            whole = sum(torch.outer(row, row) for row in x.double()) / len(x)
            for e in range(len(gate_up)):
                torch.testing.assert_close(got["gate_up"][e].double(), whole, rtol=1e-4, atol=1e-6)
            want, used = torch.zeros(got["down"].shape).double(), []
            for e, w in enumerate(gate_up.double().numpy()):
                rows = [t for t in range(len(x)) if e in index[t].tolist()]
                for t in rows:
                    h_rows = w @ x[t].double().numpy()
                    if bias is not None:
                        h_rows = h_rows + bias[e].double().numpy()
                    h = torch.from_numpy(slow.silu_glu(h_rows))
                    want[e] += torch.outer(h, h) / len(rows)
                used += [e] * bool(rows)
            found.append(len(gate_up) - len(used))
            others = want[used].mean(0)
            for e in range(len(gate_up)):
                torch.testing.assert_close(
                    got["down"][e].double(), want[e] if e in used else others, rtol=1e-4, atol=1e-6
                )
        return False

    look = derive(LayerPass, "look", run_layer=run_layer)
    passes = [*resolved("vq{rounds=1,codebook=layer},affine,fold"), look]
    run_passes(tiny("M"), passes, Context(), batches)
    run_passes(tiny("I"), passes, Context(), batches[:1])
    assert found[0] == 0 and found[1] > 0


def test_an_adapted_weight_is_the_sum_before_rounding(tiny: Tiny) -> None:
    program: Program = tiny("D")
    a, b = normal(2, 16), normal(16, 2, seed=1)
    name = "layers.0.linear.weight"
    want = program.read(name) + 0.5 * b @ a
    torch.testing.assert_close(_sum(program, name, Update(a, b, 0.5)), want)


@pytest.mark.parametrize("side", ["gate_up", "down", "both"])
def test_an_adapter_of_experts_grows_their_bases_and_one_of_a_matrix_is_added(
    tiny: Tiny, batches: list[Tensor], tmp_path: Path, side: str
) -> None:
    """PEFT names the experts' tensors by nesting: down, the last one, is the outermost."""
    shapes = {"gate_up": (16, 16), "down": (16, 8)}
    tensors, updates = {}, {}
    for name, (rows, columns) in shapes.items():
        a, b = 0.1 * normal(2 * 4, columns), normal(rows, 2 * 4, seed=1)
        nested = ".base_layer" if (name, side) == ("gate_up", "both") else ""
        if side in (name, "both"):
            path = f"base_model.model.layers.0{nested}"
            tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
            updates[name] = Update(a, b, 1.5, 4).delta()
    a, b = normal(2, 16, seed=2), normal(16, 2, seed=3)
    path = "base_model.model.layers.1.linear"
    tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = dict(peft_type="LORA", r=2, lora_alpha=3, bias="none", target_parameters=list(updates))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    text, program = "vq{rounds=1},affine,fold", tiny("MD")
    plain = compiled(program, text, batches=batches).program
    run = compiled(program, f"{text},absorb{{path={tmp_path},rank=16}}", batches=batches)
    assert [r.changed for r in run.reports if r.text.startswith("absorb")] == [True]
    for p, q in zip(*(x.moe_layers()[0].projections for x in (plain, run.program)), strict=True):
        before, after = (
            slow.dense(
                slow.arrays(
                    {n: None if (o := y.operand(n)) is None else x.value(o) for n in slow.NAMES}
                ),
                shapes[p.name][1],
                input_side=p.input_side,
            )
            for x, y in ((plain, p), (run.program, q))
        )
        row = run.ctx.audit[p.path]
        if p.name not in updates:
            assert np.array_equal(before, after) and "lora" not in row
            continue
        update = updates[p.name].double().numpy()
        assert np.linalg.norm(after - before - update) < 0.02 * np.linalg.norm(update)
        assert row["lora"] == "rank 16 of the basis" and 0 < row["lora_lost"] < 1e-3
    name = "layers.1.linear.weight"
    torch.testing.assert_close(run.program.read(name), program.read(name) + 1.5 * b @ a)
    assert run.ctx.audit[name]["lora"] == "rank 2, scaling 1.5"

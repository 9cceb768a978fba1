"""The errors that passes record and print, computed again from what is stored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import slow_vq4 as slow
import torch
from pipelines import Tiny, compiled, derive, resolved
from torch import Tensor

from moecc.ir.ops import Q_LINEAR
from moecc.ir.program import Program
from moecc.passes._code.rate import gain
from moecc.passes._code.regression import Sums, shift
from moecc.passes._tune.low_rank import attach, attached, merge
from moecc.passes.dense import quantize
from moecc.pipeline.passes import Context, Layer, LayerPass, Pass
from moecc.pipeline.run import run_passes

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.mark.parametrize(
    "text", ["vq{bits=3,rounds=1,codebook=layer}", "klt{rank=2,mean=3},vq{rounds=1,codebook=layer}"]
)
def test_the_error_of_coded_experts_is_that_of_their_outputs_on_calibration_text(
    tiny: Tiny, batches: list[Tensor], text: str
) -> None:
    """|D x|^2 over |W x|^2 of each expert, summed over the moments of its inputs x."""
    seen: dict[str, tuple[Any, ...]] = {}

    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        for moe in layer.moe:
            for p in moe.projections:
                stored = slow.arrays(layer.stored(p))
                moment = layer.data["moments", moe.path].of(p.name)
                seen[p.path] = p.input_side, layer.original(p), moment, stored
        return False

    program, ctx = tiny("I"), Context()
    passes = [*resolved(text), derive(LayerPass, "look", run_layer=run_layer)]
    report = run_passes(program, passes, ctx, batches)[-2]
    assert len(seen) == 2
    for path, (input_side, weight, moment, stored) in seen.items():
        values = torch.from_numpy(slow.dense(stored, weight.shape[-1], input_side=input_side))
        d, w, h = (values - weight.double()), weight.double(), moment.double()
        lost, whole = (
            [sum(float(row @ h[e] @ row) for row in x[e]) for e in range(64)] for x in (d, w)
        )
        want = [a / b for a, b in zip(lost, whole, strict=True)]
        # the error is measured before scales are rounded to 16 bits
        assert ctx.audit[path]["expert_in_sample_error"] == pytest.approx(want, rel=0.02, abs=1e-6)
        assert ctx.audit[path]["in_sample_error"] == pytest.approx(sum(want) / 64, rel=0.01)
    errors = [ctx.audit[path]["in_sample_error"] for path in seen]
    assert report.in_sample_error == pytest.approx(sum(errors) / 2, rel=1e-9)
    assert 0.001 < report.in_sample_error < 0.5


@pytest.mark.parametrize("bits", [4, 8])
def test_the_error_of_a_grouped_linear_is_that_of_its_stored_numbers(
    traced: Program, bits: int
) -> None:
    run = compiled(traced, f"dense{{group=16,bits={bits}}}", batches=[])
    nodes = [n for n in run.program.graph.nodes if n.target == Q_LINEAR]
    name = "model.layers.0.self_attn.q_proj"
    codes, scale, zero = (run.program.read(f"{name}.{k}") for k in ("codes", "scale", "zero"))
    weight = traced.read(f"{name}.weight")
    error = 0.0
    for n, k in torch.cartesian_prod(*map(torch.arange, weight.shape)).tolist():
        byte = int(codes[n, k * bits // 8])
        q = byte if bits == 8 else (byte >> 4 if k % 2 else byte & 15)
        step = float(scale[n, k // 16])
        moved = (q - int(zero[n, k // 16])) * step - float(weight[n, k])
        assert abs(moved) < step * 0.51 + 1e-6
        error += moved**2
    want = error / float(weight.double().square().sum())
    assert run.ctx.audit[f"{name}.weight"]["error"] == pytest.approx(want, rel=1e-4)
    assert nodes and want > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_one_sign_and_of_zeros_are_held(bits: int) -> None:
    """A group's range always holds zero, so that zero stays exactly zero."""
    top = 2**bits - 1
    weight = torch.tensor([[1.0, 2.0, 3.0, float(top), -1.0, -2.0, 0.0, -float(top), *[0.0] * 4]])
    packed, scale, zero = quantize(weight, bits, 4)
    assert scale[0, :2].tolist() == [1.0, 1.0] and zero.tolist() == [[0, top, 0]]
    whole = [1, 2, 3, top, top - 1, top - 2, top, 0, 0, 0, 0, 0]
    want = (
        whole if bits == 8 else [a + 16 * b for a, b in zip(whole[::2], whole[1::2], strict=True)]
    )
    assert packed.tolist() == [want]


def test_the_rounding_of_a_merged_adapter_is_that_to_the_checkpoint_s_type(tiny: Tiny) -> None:
    program = tiny("D")
    store: Any = program.store
    store.tensors = {name: t.bfloat16() for name, t in store.tensors.items()}
    placeholder, name = next(
        (k, w.name) for k, w in program.weights.items() if w.name.endswith("linear.weight")
    )
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 16, generator=g), torch.randn(16, 2, generator=g)
    whole = store.tensors[name].float() + b @ a
    attach(program, placeholder, a, b)
    torch.testing.assert_close(program.read(f"{name}.adapted"), whole)
    (adapter,) = attached(program)
    told = merge(program, adapter)
    kept = whole.bfloat16().float()
    assert torch.equal(program.read(name), kept)
    want = float((kept - whole).double().square().sum() / whole.double().square().sum())
    assert told == pytest.approx(want, rel=1e-4) and told > 0
    assert not attached(program) and list(program.tensors) == [name]


def test_a_bit_per_weight_is_worth_a_quarter_of_the_error() -> None:
    assert gain(4.0, 1.0, 0.25) == 0.75  # one bit is saved, and a quarter of it is spent
    assert gain(1.0, 16.0, 0.5) == -2.5
    assert gain(1.0, 1.0, 0.0) == 0
    assert gain(1.0, 0.0, 0.5) == math.inf and gain(0.0, 0.0, 0.5) == -0.5
    assert gain(0.0, 1.0, 0.5) == -0.5


def test_shifts_of_mean_and_variance_against_tokens_one_by_one() -> None:
    g = torch.Generator().manual_seed(0)
    sums, lines, want = [], [], {"mean": [0.0, 0.0], "variance": [0.0, 0.0]}
    wanted = 0.0
    for tokens in (5, 9):
        v, t = 0.1 * (torch.randn(2, tokens, 3, generator=g) + 0.5)
        weight = torch.rand(tokens, generator=g)
        slope, offset = torch.rand(3, generator=g) + 0.5, torch.randn(3, generator=g)
        sums.append(Sums.of(v, t, weight))
        lines.append((slope, offset))
        w = (weight / weight.sum()).double()[:, None]
        total = float(weight.sum())

        def spread(x: Tensor, w: Tensor = w) -> float:
            mean = (w * x).sum(0)
            return float((w * (x - mean).square()).sum())

        wanted += total * spread(t.double())
        for i, y in enumerate((v.double(), (slope * v + offset).double())):
            want["mean"][i] += total * float((w * (y - t)).sum(0).square().sum())
            want["variance"][i] += total * spread(y)
    found = shift(sums, lines)
    for name, both in want.items():
        assert found[name] == pytest.approx([x / wanted for x in both], rel=1e-4)

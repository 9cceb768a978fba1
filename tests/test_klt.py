"""`klt`: one basis and one mean for all experts of a layer, and the training of the mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines import TOKENS, Tiny, compiled
from torch import Tensor

from moecc.errors import MoeccError
from moecc.ir import vq4
from moecc.ir.graph import run_nodes
from moecc.ir.ops import KLT_EXPERTS
from moecc.ir.program import Program, output_node
from moecc.passes._code.basis import Shared
from moecc.passes._code.sharing import Case
from moecc.passes._tune.tuned import Tuned
from moecc.passes.klt import SharedBasis
from moecc.pipeline.bits import basis_bits
from moecc.pipeline.stream import StageWeights, run_program

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.mark.parametrize("rank", ["40", "1024"])
def test_a_rank_beyond_the_dimensions_is_an_error(traced: Program, rank: str) -> None:
    message = rf"klt\{{rank={rank}\}} failed in layer 0 .*more than .* dimensions"
    with pytest.raises(MoeccError, match=message):
        compiled(traced, f"klt{{rank={rank}}}")


@pytest.mark.parametrize("options", ["rank=4", "rank=0,mean=2", "rank=4,mean=3"])
def test_klt_changes_the_program_by_rounding_only(traced: Program, options: str) -> None:
    run = compiled(traced, f"klt{{{options}}}")
    assert [m.node.target for m in run.program.moe_layers()] == [KLT_EXPERTS] * 2
    want = torch.cat(run_program(traced, TOKENS))
    torch.testing.assert_close(run.output(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(("mean", "bits"), [("off", 0), (2, 2), (3, 3), (4, 4)])
def test_basis_and_mean_are_present_as_the_options_say(
    tiny: Tiny, batches: list[Tensor], rank: int, mean: int | str, bits: int
) -> None:
    run = compiled(tiny("M"), f"klt{{rank={rank},mean={mean}}},vq{{rounds=1}}", batches=batches)
    (moe,) = run.program.moe_layers()
    for projection in moe.projections:
        there = {n for n in vq4.SHARED if projection.operand(n) is not None}
        want = {"basis", "coef", "coef_scale"} if rank else set()
        want |= {"mean_codes", "mean_codebook", "mean_scale"} if bits else set()
        assert there == want | ({"mean_signs"} if bits == 3 else set())
        assert not bits or projection.bits(vq4.MEAN) == bits
        row = run.ctx.audit[projection.path]
        assert (row["rank"], row["mean"]) == (rank, f"{bits} bit" if bits else "none")


def test_experts_of_one_parent_get_a_mean_if_it_is_worth_its_bits(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    """Their remainders are coded with a smaller error then."""
    alike, off, independent, few = (
        compiled(tiny(kind), f"{klt},vq{{rounds=1,codebook=layer}}", batches=batches).ctx.audit
        for kind, klt in (("S", "klt"), ("S", "klt{mean=off}"), ("I", "klt"), ("F", "klt"))
    )
    for path in ("layers.0.gate_up", "layers.0.down"):
        assert alike[path]["mean"] in ("2 bit", "3 bit", "4 bit")
        assert [audit[path]["mean"] for audit in (off, independent, few)] == ["none"] * 3
        assert alike[path]["in_sample_error"] < off[path]["in_sample_error"] / 5


@pytest.mark.parametrize("mean", ["off", 3])
def test_what_experts_share_is_of_all_of_them_though_it_is_chosen_by_a_sample(
    tiny: Tiny, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch, mean: int | str
) -> None:
    """What is left of each is computed when it is read, of some alone if they are asked for."""
    runs = []
    for numbers in (1 << 26, 1):
        monkeypatch.setattr("moecc.passes._code.sharing._IN_SAMPLE", numbers)
        runs.append(compiled(tiny("I"), f"klt{{rank=2,mean={mean}}}", batches=batches).program)
    whole, some = runs
    before, moe = tiny("I"), whole.moe_layers()[0]
    for p in moe.projections:
        for part in ("", *vq4.SHARED):
            node = p.operand(part)
            if node is not None:
                a, b = (q.read(q.weights[node.name].name).float() for q in runs)
                # sums of a sample of all are added up in another order
                torch.testing.assert_close(b, a, rtol=0, atol=1e-3 if mean == "off" else 0.02)
        name = f"{p.path}.remainder"
        left = some.read(name)
        assert some.tensors.in_memory(name) is None
        assert torch.equal(some.read(name, experts=[40, 3]), left[[40, 3]])
        taken = before.read(p.path) - left
        low = vq4.shared_part(
            {n: some.tensors.get(f"{p.path}.{n}") for n in vq4.SHARED},
            p.shape[2],
            torch.float32,
            input_side=p.input_side,
        )
        assert low is not None
        torch.testing.assert_close(taken, low.expand_as(taken), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("earned", [True, False])
@pytest.mark.parametrize(("rank", "sampled"), [("auto", True), ("2", True), ("auto", False)])
def test_a_basis_chosen_on_a_sample_must_earn_its_bits_as_that_of_all_experts(
    tiny: Tiny,
    batches: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    earned: bool,
    rank: str,
    sampled: bool,
) -> None:
    """One that is asked for need not, nor one that was chosen on all experts."""
    asked: list[float] = []

    def earns(self: Case, plain: Shared, basis: Shared, bits: float) -> bool:
        assert {n for n in plain.tensors if not n.startswith(vq4.MEAN)} == set()
        assert len(basis.tensors["coef"]) == 64  # type: ignore[arg-type]
        asked.append(bits * sum(p.weights for p in self.projection.moe.projections))
        return earned

    name, number = ("_IN_SAMPLE", 1) if sampled else ("_MOST_SAMPLE", 64)
    monkeypatch.setattr(f"moecc.passes._code.sharing.{name}", number)
    monkeypatch.setattr(Case, "earns", earns)
    monkeypatch.setattr(SharedBasis, "choose", lambda self, cases: dict.fromkeys(cases, (2, 3)))
    run = compiled(tiny("I"), f"klt{{rank={rank}}}", batches=batches)
    projections = run.program.moe_layers()[0].projections
    bits = [basis_bits(3, *p.shape, input_side=p.input_side) for p in projections]
    assert asked == (pytest.approx(bits) if rank == "auto" and sampled else [])
    for p in projections:
        kept = earned or rank != "auto" or not sampled
        assert (p.operand("basis") is not None) == kept and p.operand("mean_codes") is not None
        row = run.ctx.audit[p.path]
        assert (row["rank"], row["mean"]) == (3 if kept else 0, "2 bit")


def test_mean_codebook_and_scale_are_trained_and_stored_in_the_types_of_the_format(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    text = "klt{rank=2,mean=3},vq{rounds=1},affine,fold"
    program = compiled(tiny("M"), text, batches=batches).program
    (moe,) = program.moe_layers()
    tuned = Tuned(program, [moe])
    wanted = {"codebook", "scale", "basis", "coef", "mean_codebook", "mean_scale"}
    assert set(tuned.kinds.values()) >= wanted
    mean = {k: kind for k, kind in tuned.kinds.items() if kind.startswith(vq4.MEAN)}
    assert [tuned.bits[k] for k in tuned.kinds] == [3 if k in mean else 2 for k in tuned.kinds]

    before, weights = tuned.stored(), StageWeights(program)
    with torch.enable_grad():
        shared = StageWeights.sharing(weights, tuned.rounded())
        values: dict[str, Any] = {program.user_inputs[0].name: batches[0]}
        nodes = [n for n in program.graph.nodes if n.op == "call_function"]
        for _ in run_nodes(nodes, values, shared):
            pass
        values[output_node(program).name].square().mean().backward()
    optimizer = torch.optim.Adam(tuned.groups(10.0))
    assert all(p.grad is not None and bool(p.grad.any()) for p in tuned.parameters.values())
    optimizer.step()
    after = tuned.stored()
    for k, kind in mean.items():
        assert not torch.equal(after[k], before[k])
        assert after[k].dtype == (torch.int8 if kind == "mean_codebook" else torch.float16)
        # codebooks of three bits are symmetric: the signs are stored apart
        assert kind != "mean_codebook" or int(after[k].min()) >= 0
    assert tuned.store() and all(torch.equal(program.read(tuned.names[k]), after[k]) for k in mean)
    program.verify()

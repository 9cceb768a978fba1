"""Every family: transformers' loop over experts, the op and the program give the same numbers.

A sample by default; MOECC_ALL_FAMILIES=1 runs all of tests/families.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import transformers
from families import ALL, FAMILIES, SAMPLE, Family, make
from packaging.version import Version
from torch import fx
from torch.export import ExportedProgram

from moecc.errors import MoeccError
from moecc.frontend import experts
from moecc.frontend.capture import capture
from moecc.frontend.families import methods_replaced
from moecc.frontend.skeleton import Skeleton, skeleton
from moecc.ir import ops
from moecc.ir.gates import rows_per_unit

torch.set_num_threads(1)
NAMES = sorted(FAMILIES) if ALL else SAMPLE
pytestmark = pytest.mark.family
TRACED = (2, 12)
LATEST = Version("5.23.0")  # the release of transformers that the table was made with
DEFAULT_GATE = dict(act="silu", gate="glu", alpha=1.0, limit=0.0)


class Case(NamedTuple):
    """One family: the model with its weights, its skeleton and its program."""

    name: str
    model: Any
    found: Skeleton
    program: ExportedProgram

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    @property
    def nodes(self) -> list[fx.Node]:
        return [n for n in self.program.graph.nodes if n.target is ops.EXPERTS]


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    """Trace once for all tests of the family."""
    try:
        model = make(request.param)
        found = skeleton(model)
    except MoeccError as error:  # the family joined the experts interface in a later release
        if Version(transformers.__version__) >= LATEST or "doesn't know" not in str(error):
            raise
        pytest.skip(str(error))
    return Case(request.param, model, found, capture(found, batch=TRACED[0], sequence=TRACED[1]))


def shapes(family: Family) -> list[tuple[int, int]]:
    """Return the traced shape, another, and one with a sequence longer than any chunk of a scan."""
    return [TRACED, (3, 21), (1, min(150, family.longest or 150))]


def tokens(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(sum(shape)))


def first(output: Any) -> torch.Tensor:
    """Return logits, or the last hidden state of a model without a head."""
    value = output.get("logits", None) if hasattr(output, "get") else None
    return value if value is not None else output[0]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.isfinite(b).all()
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp_min(1.0)


@torch.no_grad()
def test_the_op_equals_the_loop_over_experts(case: Case) -> None:
    model = case.model
    expected = first(model(input_ids=tokens((3, 21))))
    experts.register()
    dispatch = model._can_set_experts_implementation()
    with methods_replaced(model):
        if dispatch:
            model.set_experts_implementation("moecc")
        got = first(model(input_ids=tokens((3, 21))))
        if dispatch:
            model.set_experts_implementation("eager")
    close(got, expected)


@torch.no_grad()
def test_the_program_equals_the_model_at_every_shape(case: Case) -> None:
    run = case.program.module()
    for shape in shapes(case.family):
        close(first(run(input_ids=tokens(shape))), first(case.model(input_ids=tokens(shape))))


def test_one_node_per_moe_layer(case: Case) -> None:
    paths, meta = {n.meta["path"] for n in case.nodes}, case.program.graph_module.meta
    assert len(case.nodes) == len(paths) == case.family.layers
    assert paths <= set(case.found.experts)
    assert len(meta["unreached"]) == case.family.unreached
    longest = case.family.longest
    assert longest is None or meta["restriction"].high == longest
    assert longest is not None or meta["restriction"].high is None


def test_gate_attributes_and_layout_are_recognised(case: Case) -> None:
    for node in case.nodes:
        found = {key: node.kwargs[key] for key in DEFAULT_GATE}
        assert found == {**DEFAULT_GATE, **case.family.gate}
        layout = experts.layout_of(case.found.experts[node.meta["path"]])
        assert layout.interleaved == case.family.interleaved
        assert layout.transposed == case.family.transposed


def test_operands_are_canonical(case: Case) -> None:
    for node in case.nodes:
        x, _, _, gate_up, down = (a.meta["val"] for a in node.args[:5])
        count, rows, width = gate_up.shape
        assert x.shape[-1] == width
        assert tuple(down.shape) == (count, width, rows // rows_per_unit(node.kwargs["gate"]))


def test_stages_never_fall_along_an_edge(case: Case) -> None:
    layers = case.program.graph_module.meta["layers"]
    for node in case.program.graph.nodes:
        assert 0 <= node.meta["layer"] <= layers + 1
        assert all(source.meta["layer"] <= node.meta["layer"] for source in node.all_input_nodes)
    stages = [n.meta["layer"] for n in case.nodes]
    assert len(set(stages)) == len(stages) and all(1 <= stage <= layers for stage in stages)


def test_gradients_of_the_program_are_the_models(case: Case) -> None:
    """Through experts and opaque scans alike, whose backward differentiates their reference."""
    ids = tokens((1, 9))
    name, weight = next(
        (n, p) for n, p in case.model.named_parameters() if p.dim() == 2 and p.shape[0] == 64
    )
    weight.requires_grad_(True)
    out = first(case.model(input_ids=ids))
    # A norm hides plain sums from gradients.
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad((out * probe).mean(), weight)[0]
    run = case.program.module()
    weight = run.get_parameter(name).requires_grad_(True)
    got = torch.autograd.grad((first(run(input_ids=ids)) * probe).mean(), weight)[0]
    assert expected.abs().max() > 0
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()

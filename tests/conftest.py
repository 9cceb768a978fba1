"""The start of every test: one thread, reproducible examples, no network; small graphs to read.

Golden files of graph text lie in tests/golden. `pytest --regenerate` writes them again; look at
them before you commit them.
"""

from __future__ import annotations

import os

# Set before transformers is imported. A test that needs a hub model must undo this itself.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from families import make
from hypothesis import HealthCheck, settings
from made import QUICK, Command, Compile, Run, checkpoint, with_rows
from refusals import Refused, refusal
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from traces import trace_once

from moecc.frontend.stages import paths
from moecc.frontend.trace import trace
from moecc.ir.program import Program, Weight
from moecc.ir.tensors import Held
from moecc.pipeline.order import resolve
from moecc.pipeline.parse import parse_passes
from moecc.pipeline.passes import Context
from moecc.pipeline.run import run_passes

torch.set_num_threads(1)
settings.register_profile(
    "moecc",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("moecc")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate", action="store_true", help="write the golden files of graph text again"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that compile kernels if this process interprets them."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if item.get_closest_marker("aot") and interpreted:
            item.add_marker(pytest.mark.skip(reason="under TRITON_INTERPRET=1 nothing is compiled"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Make tests that draw without a generator of their own draw the same in any order."""
    torch.manual_seed(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """golden(name, text): assert that tests/golden/name holds `text` without tensor digests."""

    def check(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        text = re.sub(r"#[0-9a-f]{8}", "#", text)
        if request.config.getoption("--regenerate"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert text == path.read_text()

    return check


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    """Run torch.export once for all models of the same configuration (`traces.trace_once`).

    It takes two thirds of a small compilation. This fixture is for tests of later steps;
    test_trace, test_families and test_ir test the trace itself.
    """
    with pytest.MonkeyPatch.context() as patch:
        trace_once(patch)
        yield


# ---------------------------------------------------------------- models of transformers


@pytest.fixture
def moecc(capsys: pytest.CaptureFixture[str]) -> Command:
    """moecc(*args): run a command."""
    return lambda *args: Run(capsys, *args)


@pytest.fixture
def compile(capsys: pytest.CaptureFixture[str]) -> Compile:
    """compile(model, out, passes, *options): run `moecc compile --json` on 8 rows of 32 tokens."""

    def run(model: Path, out: Path, passes: str = QUICK, *options: str | int | Path) -> Run:
        args = model, "--passes", passes, "-o", out, "--json", *with_rows(options)
        return Run(capsys, "compile", *args)

    return run


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny mixtral."""
    return checkpoint(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def model(mixtral: Path, tmp_path: Path) -> Path:
    """A copy of `mixtral` that a test may damage."""
    return Path(shutil.copytree(mixtral, tmp_path / "model"))


@pytest.fixture
def refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """refused(model, *options): the error line of a compilation that must leave no trace."""
    monkeypatch.chdir(tmp_path)
    return partial(refusal, capsys, tmp_path)


@pytest.fixture(scope="module")
def traced() -> Program:
    """qwen2_moe with two MoE layers of random weights; tests take copies."""
    return trace(make("qwen2_moe"))


@pytest.fixture(scope="module")
def compressed(traced: Program) -> Program:
    """`traced` with codes, signs, a shared basis and mean, and a folded correction; take copies."""
    program = traced.copy()
    passes = resolve(parse_passes("klt{rank=2,mean=3},vq{bits=3},affine{offset=on},fold")[0])[0]
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    rows = [torch.randint(0, 64, (1, 16), generator=g) for g in generators]
    run_passes(program, passes, Context(), rows)
    return program


# ---------------------------------------------------------------- tiny programs

VOCABULARY, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 16, 16, 8, 4, 2, 6


class TinyMoE(nn.Module):
    """The experts of one layer behind a softmax router; they share `likeness` of their energy."""

    experts, likeness = EXPERTS, 0.0

    def __init__(self, seed: int):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.gate = nn.Linear(HIDDEN, self.experts, bias=False)
        shapes = (self.experts, 2 * INTERMEDIATE, HIDDEN), (self.experts, HIDDEN, INTERMEDIATE)
        self.gate_up, self.down = (
            nn.Parameter(torch.randn(shape, generator=g) * 0.3) for shape in shapes
        )
        self.gate.weight.data = torch.randn(self.experts, HIDDEN, generator=g)
        for p in (self.gate_up, self.down) if self.likeness else ():
            parent = torch.randn(p.shape[1:], generator=g) * 0.3
            p.data = self.likeness**0.5 * parent + (1 - self.likeness) ** 0.5 * p.data

    def forward(self, x: Tensor) -> Tensor:
        score, index = self.gate(x).softmax(-1).topk(TOP_K, -1)
        args = (index, score, self.gate_up, self.down, None, None, None)
        result: Tensor = torch.ops.moecc.experts(
            x, *args, act="silu", gate="glu", alpha=0.0, limit=0.0, eps=1e-6
        )
        return result


class Many(TinyMoE):
    """Enough experts that a shared mean costs next to nothing."""

    experts = 64


class Siblings(Many):
    likeness = 0.99


class FewSiblings(TinyMoE):
    """Experts whose shared mean costs more bits than it saves."""

    likeness = 0.99


class TinyDense(nn.Module):
    """A layer without experts."""

    def __init__(self, seed: int):
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN, bias=False)
        g = torch.Generator().manual_seed(seed)
        self.linear.weight.data = torch.randn(HIDDEN, HIDDEN, generator=g) * 0.3

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class TinyModel(nn.Module):
    """Embedding, layers on a residual stream, head. It takes one row of six tokens."""

    def __init__(self, kinds: Sequence[type[nn.Module]]):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.layers = nn.ModuleList([kind(i) for i, kind in enumerate(kinds)])
        for i, p in enumerate((self.embed.weight, self.head.weight)):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(50 + i))

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed(ids[0])
        for layer in self.layers:
            x = x + layer(x)
        result: Tensor = self.head(x)
        return result


class DictStore:
    """The weights of a dict, read as from a checkpoint."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    tied: dict[str, str] = {}
    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    ignored: Sequence[str] = ()

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(
        self, name: str, *, dtype: torch.dtype | None = None, experts: Sequence[int] | None = None
    ) -> Tensor:
        value = self.tensors[name] if experts is None else self.tensors[name][list(experts)]
        return value if dtype is None or not value.is_floating_point() else value.to(dtype)


def tiny_program(kinds: str = "M") -> Program:
    """Return a Program of one layer per letter, whose text fits on a page.

    M: experts. I: many experts. S: many experts that are nearly the same. F: few of these.
    D: dense.
    """
    layers = {"M": TinyMoE, "I": Many, "S": Siblings, "F": FewSiblings, "D": TinyDense}
    model = TinyModel([layers[k] for k in kinds]).eval()
    exported = torch.export.export(model, (torch.zeros(1, TOKENS, dtype=torch.int64),))
    weights = {
        s.arg.name: Weight(str(s.target))
        for s in exported.graph_signature.input_specs
        if s.kind == InputKind.PARAMETER
    }
    store = DictStore({name: p.detach() for name, p in model.named_parameters()})
    for node in exported.graph.nodes:
        path = node.meta["path"] = next(reversed(paths(node)), "")
        inside = re.match(r"layers\.(\d+)", path)
        stage = int(inside[1]) + 1 if inside else len(kinds) + 1 if path == "head" else 0
        node.meta["layer"] = max([stage, *(i.meta["layer"] for i in node.all_input_nodes)])
    program = Program(exported.graph_module, weights, Held({}), store, exported, source="tiny")
    program.verify()
    return program


def tiny_batches(count: int = 8) -> list[Tensor]:
    g = torch.Generator().manual_seed(9)
    return [torch.randint(0, VOCABULARY, (1, TOKENS), generator=g) for _ in range(count)]


@pytest.fixture
def tiny() -> Callable[[str], Program]:
    """tiny("MD"): a program of a layer of experts and a dense one."""
    return tiny_program


@pytest.fixture
def batches() -> list[Tensor]:
    """Return calibration rows for `tiny` programs."""
    return tiny_batches()

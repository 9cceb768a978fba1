"""The op library's experts against the eager reference, for every instruction set of this CPU.

Sessions run in ONNX Runtime in processes of their own, which import only it and numpy: MOECC_ISA is
read there, a library with sanitizers needs its runtime loaded first, and another ONNX Runtime has
another Python. A folder says what a process runs: `name.onnx`, and `name.npz` with the inputs of
several runs.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moecc.backends.onnx import build, layout
from moecc.ir import gates, vq4
from moecc.ir.ops import VQ_EXPERTS
from moecc.native.build import COMPILERS, compiler

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
if not any(map(shutil.which, COMPILERS)) and not os.environ.get("CXX"):
    pytest.skip("no C++ compiler", allow_module_level=True)

TOLERANCE = 3e-5  # norm-wise, of y
HALF_TOLERANCE = 3e-4  # a few values are rounded the other way, by one unit of 2^-11
TOKENS = (0, 1, 2, 3, 5, 33, 130)
Tensors = dict[str, Any]  # Tensor or None, by NAMES
Projection = dict[str, Tensor | None]  # by vq4.TENSORS, as stored

# argv: library, folder, intra-op threads. Prints {"name": [errors]} and writes name.out.npz with
# the output of every run.
RUN = """
import json, sys
from pathlib import Path
import numpy as np
import onnxruntime as ort
library, folder, threads = sys.argv[1:4]
errors = {}
for path in sorted(Path(folder).glob("*.onnx")):
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(threads)
    options.log_severity_level = 4
    out, errors[path.stem] = {}, []
    runs = np.load(path.with_suffix(".npz"))
    try:
        if library:
            options.register_custom_ops_library(library)
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds = {}
        for name in sorted(runs.files):
            run, _, operand = name.partition("/")
            feeds.setdefault(run, {})[operand] = runs[name]
        for run, feed in feeds.items():
            out[run] = session.run(None, feed)[0]
    except Exception as error:
        errors[path.stem].append(str(error))
    np.savez(path.with_suffix(".out"), **out)
print(json.dumps(errors))
"""


# ---- layers


@dataclass(frozen=True, kw_only=True)
class Case:
    """One node: the sizes and operands of a layer. bits and means: of gate_up and of down."""

    hidden: int = 72
    intermediate: int = 40
    experts: int = 5
    top_k: int = 2
    bits: tuple[int, int] = (2, 2)
    shared: bool = False  # one codebook for all experts
    bias: bool = False
    rank: int = 0
    means: tuple[int, int] = (0, 0)  # 0: none
    post_norm: bool = False
    act: str = "silu"
    gate: str = "glu"
    alpha: float = 1.7
    limit: float = 0.8
    half: bool = False
    loud: float = 1.0  # factor of x
    fed: bool = False  # weights are graph inputs, not initializers
    empty: bool = False  # absent operands are given, with no elements
    tokens: Sequence[int] = TOKENS
    route: Callable[[int, int, int], Tensor] | None = None  # tokens, k, experts -> index

    def projection(
        self, rows: int, columns: int, bits: int, mean: int, *, input_side: bool
    ) -> Projection:
        p: Projection = dict.fromkeys(vq4.TENSORS)
        p |= coded(self.experts, rows, columns, bits, 1 if self.shared else self.experts)
        if mean:
            p |= {f"mean_{name}": t for name, t in coded(1, rows, columns, mean, 1).items()}
        if self.bias:
            p["bias"] = torch.randn(self.experts, rows) * 0.3
        if self.rank:
            shape = (
                (self.experts, rows, self.rank)
                if input_side
                else (self.experts, self.rank, columns)
            )
            p["basis"] = torch.randn(self.rank, columns if input_side else rows) * 0.2
            p["coef"] = torch.randint(-127, 128, shape, dtype=torch.int8)
            p["coef_scale"] = torch.rand(shape[:2]) * 0.004
        return p

    def layer(self) -> tuple[Projection, Projection, Tensor | None]:
        n = gates.rows_per_unit(self.gate) * self.intermediate
        up = self.projection(n, self.hidden, self.bits[0], self.means[0], input_side=True)
        down = self.projection(
            self.hidden, self.intermediate, self.bits[1], self.means[1], input_side=False
        )
        return up, down, torch.rand(self.hidden) + 0.5 if self.post_norm else None

    def routed(self, tokens: int) -> list[Tensor]:
        x = torch.randn(tokens, self.hidden) * self.loud
        index = torch.randint(
            0, self.experts, (tokens, self.top_k)
        )  # an expert may come twice in a token
        if self.route is not None:
            index = self.route(tokens, self.top_k, self.experts)
        weight = torch.randn(tokens, self.top_k)
        weight[tokens // 2 :, 0] = 0
        return [x.half() if self.half else x, index, weight]

    def attributes(self) -> dict[str, Any]:
        return {
            "act": self.act,
            "gate": self.gate,
            "alpha": self.alpha,
            "limit": self.limit,
            "eps": 1e-6,
        }


def coded(matrices: int, rows: int, columns: int, bits: int, books: int) -> Projection:
    v, wide = vq4.group_size(bits), vq4.padded(columns)
    least = 0 if bits == 3 else -127
    signs = torch.randint(0, 256, (matrices, rows, wide // 8), dtype=torch.uint8)
    return {
        "codes": torch.randint(0, 256, (matrices, rows, wide // v), dtype=torch.uint8),
        "signs": signs if bits == 3 else None,
        "codebook": torch.randint(least, 128, (books, 256, v), dtype=torch.int8),
        "scale": (torch.rand(matrices, rows) + 0.5) * 0.2 / columns**0.5 / 73,
    }


def operands(up: Projection, down: Projection, post_norm: Tensor | None) -> list[Tensor | None]:
    """The node's inputs from 3 on, in the order of the file."""
    found: list[Tensor | None] = []
    for p in (up, down):
        for name in vq4.TENSORS:
            t = p[name]
            if t is not None and name.endswith("codes"):
                book = p[name.replace("codes", "codebook")]
                assert book is not None
                t = layout.blocked_codes(t, book.shape[2])
            elif t is not None and name.endswith("signs"):
                t = layout.blocked_signs(t)
            found.append(t)
    return [*found, post_norm]


NAMES = [
    "x",
    "topk_index",
    "topk_weight",
    *(f"{p}_{t}" for p in ("gate_up", "down") for t in vq4.TENSORS),
    "post_norm",
]
TYPES = {torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int64: 7, torch.float16: 10}


def node_model(
    inputs: dict[str, Tensor | None],
    attributes: dict[str, Any],
    *,
    fed: bool = False,
    half: bool = False,
) -> Any:
    """A model of one node, with open shapes.

    inputs: the operands in NAMES from 3 on; initializers, or inputs of the graph if `fed`.
    """
    h = onnx.helper
    x = TYPES[torch.float16 if half else torch.float32]
    graph_inputs = [h.make_tensor_value_info("x", x, [None, None])]
    graph_inputs += [h.make_tensor_value_info("topk_index", 7, [None, None])]
    graph_inputs += [h.make_tensor_value_info("topk_weight", 1, [None, None])]
    given = {name: t for name, t in inputs.items() if t is not None}
    if fed:
        graph_inputs += [
            h.make_tensor_value_info(name, TYPES[t.dtype], [None] * t.dim())
            for name, t in given.items()
        ]
    initializers = [
        onnx.numpy_helper.from_array(t.numpy(), name) for name, t in given.items() if not fed
    ]
    names = [name if name in given or i < 3 else "" for i, name in enumerate(NAMES)]
    while not names[-1]:
        names.pop()
    node = h.make_node("VQExperts", names, ["y"], domain="moecc", **attributes)
    graph = h.make_graph(
        [node], "g", graph_inputs, [h.make_tensor_value_info("y", x, [None, None])], initializers
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21), h.make_opsetid("moecc", 1)])
    model.ir_version = 10
    return model


def write(
    folder: Path, name: str, case: Case, change: Callable[[Tensors], None] | None = None
) -> dict[str, Tensor]:
    """Write a case into a folder and return the reference's output by run.

    change: alters the node's inputs to wrong ones; then there is no reference.
    """
    torch.manual_seed(sum(name.removesuffix("_empty").encode()))
    up, down, norm = case.layer()
    tensors = dict(zip(NAMES[3:], operands(up, down, norm), strict=True))
    runs, expected = {}, {}
    stored = [*up.values(), None, None, *down.values(), None, None, norm]
    for tokens in case.tokens:
        feed = dict(zip(NAMES, case.routed(tokens), strict=False))
        if change is None:
            expected[str(tokens)] = VQ_EXPERTS(*feed.values(), *stored, **case.attributes())
        else:
            both = feed | tensors
            change(both)
            feed, tensors = ({n: both[n] for n in part} for part in (feed, tensors))
        if case.empty:
            tensors |= {
                n: torch.zeros(0, dtype=NODE_DTYPES[n]) for n, t in tensors.items() if t is None
            }
        fed = tensors if case.fed else {}
        runs |= {f"{tokens}/{n}": t.numpy() for n, t in (feed | fed).items() if t is not None}
    onnx.save(
        node_model(tensors, case.attributes(), fed=case.fed, half=case.half),
        folder / f"{name}.onnx",
    )
    np.savez(folder / f"{name}.npz", **runs)
    return expected


_OF_TENSOR = {
    "codes": torch.uint8,
    "signs": torch.uint8,
    "codebook": torch.int8,
    "coef": torch.int8,
}
NODE_DTYPES = {name: _OF_TENSOR.get(name.split("_")[-1], torch.float32) for name in NAMES[3:]}


def crowd(tokens: int, k: int, experts: int) -> Tensor:
    """One expert takes all, k times per token."""
    return torch.full((tokens, k), experts - 2)


def spread(tokens: int, k: int, experts: int) -> Tensor:
    """Every other expert gets nothing."""
    return torch.randint(0, (experts + 1) // 2, (tokens, k)) * 2


CASES: dict[str, Case] = {
    **{f"bits{a}{b}": Case(bits=(a, b)) for a in (2, 3, 4) for b in (2, 3, 4)},
    "whole_blocks": Case(hidden=128, intermediate=64, experts=3),
    "wide": Case(hidden=600, intermediate=330, experts=3, bits=(2, 4), tokens=(1, 4, 9)),
    "tall": Case(hidden=600, intermediate=330, experts=3, bits=(2, 2), tokens=(1, 2, 3, 9)),
    "tall_everything": Case(
        hidden=530,
        intermediate=270,
        experts=3,
        means=(2, 2),
        rank=5,
        bias=True,
        tokens=(1, 2),
        post_norm=True,
    ),
    "wide_signs": Case(hidden=600, intermediate=330, experts=3, bits=(3, 3), tokens=(1, 4, 9)),
    "small": Case(hidden=3, intermediate=1, experts=1, top_k=1),
    "shared": Case(shared=True, bits=(2, 4)),
    "bias": Case(bias=True, bits=(3, 2)),
    "basis": Case(rank=3, bits=(2, 3)),
    "basis_bias_norm": Case(rank=21, bias=True, post_norm=True),
    "means": Case(means=(3, 4)),
    "mean_up": Case(means=(4, 0), bits=(3, 4)),
    "mean_down": Case(means=(0, 2)),
    "everything": Case(means=(4, 3), rank=18, bias=True, shared=True, bits=(4, 3)),
    "everything_norm": Case(means=(2, 3), rank=18, bias=True, post_norm=True, bits=(3, 4)),
    "half": Case(half=True, means=(2, 2), rank=2),
    "half_norm": Case(half=True, bits=(4, 3), post_norm=True),
    "fed": Case(fed=True, bias=True, means=(3, 2)),
    "empty": Case(empty=True, bits=(4, 2)),
    "crowd": Case(route=crowd, bits=(2, 3)),
    "spread": Case(route=spread, experts=9, top_k=3),
    "many_experts": Case(experts=40, top_k=6, bits=(2, 4), tokens=(1, 7)),
    "chunks": Case(hidden=24, intermediate=9, top_k=40, rank=2, means=(2, 3), tokens=(130, 205)),
    **{f"act_{act}": Case(act=act, tokens=(1, 5)) for act in gates.ACTIVATIONS},
    **{f"plain_{act}": Case(act=act, gate="none", tokens=(1, 5)) for act in gates.ACTIVATIONS},
    **{f"gate_{gate}": Case(gate=gate, tokens=(1, 5)) for gate in gates.GATES},
    **{
        f"loud_{act}": Case(act=act, gate="none", loud=1e3, tokens=(1, 5))
        for act in gates.ACTIVATIONS
    },
    **{f"loud_{gate}": Case(gate=gate, loud=5, tokens=(1, 5)) for gate in gates.GATES},
}


# ---- runs


@dataclass
class Batch:
    """The cases in a folder, and the reference's outputs."""

    folder: Path
    expected: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def run(
        self,
        library: Path | None,
        *,
        threads: int = 1,
        python: str = sys.executable,
        before: str = "",
        **environment: str,
    ) -> Outcome:
        """Run all cases in a new process. before: Python to run after importing ONNX Runtime."""
        command = [
            python,
            "-c",
            RUN.replace("errors = {}", before + "errors = {}"),
            str(library or ""),
            str(self.folder),
            str(threads),
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | environment,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        errors = json.loads(done.stdout.splitlines()[-1])
        outputs = {n: dict(np.load(self.folder / f"{n}.out.npz")) for n in errors}
        return Outcome(errors, outputs)


@dataclass
class Outcome:
    errors: dict[str, list[str]]
    outputs: dict[str, dict[str, Any]]

    def check(self, name: str, expected: dict[str, Tensor], what: str) -> None:
        assert self.errors[name] == [], what
        assert self.outputs[name].keys() == expected.keys()
        for run, y in expected.items():
            ours = torch.from_numpy(self.outputs[name][run])
            assert ours.shape == y.shape and ours.dtype == y.dtype
            allowed = HALF_TOLERANCE if y.dtype == torch.float16 else TOLERANCE
            error = (ours.double() - y.double()).norm() / y.double().norm().clamp(min=1e-30)
            assert error <= allowed, f"{what}, {name}, {run} tokens: {error:.2e}"


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    made = Batch(tmp_path_factory.mktemp("cases"))
    made.expected = {name: write(made.folder, name, case) for name, case in CASES.items()}
    return made


@pytest.fixture(scope="module")
def isas(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The values of MOECC_ISA for this CPU, which the error about a wrong value lists."""
    one = Batch(tmp_path_factory.mktemp("one"))
    write(one.folder, "one", Case(tokens=(1,)))
    said = one.run(build.library(), MOECC_ISA="abacus").errors["one"][0]
    assert "moecc::VQExperts: MOECC_ISA is 'abacus', this CPU has scalar" in said
    return said.split("this CPU has ")[1].strip().split(", ")


@pytest.fixture(scope="module")
def outcomes(batch: Batch, isas: list[str]) -> dict[str, Outcome]:
    return {
        f"{isa}, {threads} threads": batch.run(build.library(), threads=threads, MOECC_ISA=isa)
        for isa, threads in [(isa, 1) for isa in isas] + [(isas[-1], 2)]
    }


@pytest.mark.parametrize("name", CASES)
def test_the_library_computes_what_the_reference_does(
    name: str, batch: Batch, outcomes: dict[str, Outcome]
) -> None:
    for what, outcome in outcomes.items():
        outcome.check(name, batch.expected[name], what)


def test_nan_and_infinity_stay_in_their_token(tmp_path: Path, isas: list[str]) -> None:
    # Enough rows, and few enough tokens an expert, for lookups.
    tall = {"hidden": 600, "intermediate": 330, "experts": 12}
    cases = {
        "few": Case(tokens=(3,), **tall),
        "many": Case(tokens=(33,)),
        "signs": Case(tokens=(3,), bits=(3, 3)),
    }

    def spoil(tensors: Tensors) -> None:
        tensors["x"][0, 5], tensors["x"][1, 70] = math.nan, math.inf

    batch = Batch(tmp_path)
    clean = Batch(tmp_path / "clean")
    clean.folder.mkdir()
    for name, case in cases.items():
        write(batch.folder, name, case, spoil)
        clean.expected[name] = write(clean.folder, name, case)
    for isa in isas:
        outcome = batch.run(build.library(), MOECC_ISA=isa)
        for name, expected in clean.expected.items():
            (y,) = outcome.outputs[name].values()
            (right,) = expected.values()
            assert not np.isfinite(y[:2]).any()
            np.testing.assert_allclose(
                y[2:], right[2:].numpy(), atol=1e-4 * float(right.norm(dim=1).max())
            )


def test_tiny_and_huge_inputs_keep_their_precision(tmp_path: Path, isas: list[str]) -> None:
    cases = {
        f"{kind}{exponent}": (
            Case(tokens=(2, 9), act="identity", gate="none", bits=bits, **sizes),
            exponent,
        )
        for kind, bits, sizes in (
            ("lookup", (2, 2), {"hidden": 530, "intermediate": 530}),
            ("pairs", (2, 4), {}),
            ("signs", (3, 3), {}),
        )
        for exponent in (-20, 20)
    }
    batch = Batch(tmp_path)
    for name, (case, exponent) in cases.items():

        def scaled(tensors: Tensors, factor: float = 10.0**exponent) -> None:
            tensors["x"] *= factor

        expected = write(batch.folder, name, case)
        write(batch.folder, name, case, scaled)
        batch.expected[name] = {run: y * 10.0**exponent for run, y in expected.items()}
    for isa in isas:
        outcome = batch.run(build.library(), MOECC_ISA=isa)
        for name, expected in batch.expected.items():
            outcome.check(name, expected, isa)


# ---- errors


def put(name: str, value: Any) -> Callable[[Tensors], None]:
    """A change that replaces one tensor, or makes it anew from what it is."""

    def change(tensors: Tensors) -> None:
        tensors[name] = value(tensors[name]) if callable(value) else value

    return change


FULL = Case(tokens=(2,), bits=(3, 2), means=(3, 2), rank=3, bias=True, post_norm=True)
WRONG: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "index_high": (put("topk_index", lambda t: t * 0 + 5), "topk_index 5 is outside 0..4"),
    "index_low": (put("topk_index", lambda t: t * 0 - 1), "topk_index -1 is outside 0..4"),
    "index_tokens": (
        put("topk_index", lambda t: t[:1]),
        "topk_index has shape [1, 2], expected [2, k]",
    ),
    "index_none": (
        put("topk_index", lambda t: t[:, :0]),
        "topk_index has shape [2, 0], expected [2, k]",
    ),
    "weight": (
        put("topk_weight", lambda t: t[:, :1]),
        "topk_weight has shape [2, 1], expected [2, 2]",
    ),
    "x": (
        put("x", lambda t: t[:, :64]),
        "gate_up_codes has shape [5, 2, 2, 16, 64], expected [5, 1, 2, 16, 64]",
    ),
    "codes_rank": (
        put("gate_up_codes", lambda t: t[0]),
        "gate_up_codes has shape [2, 2, 16, 64], expected five dimensions",
    ),
    "codes_rows": (
        put("gate_up_codes", lambda t: t[:, :, :1]),
        "gate_up_codes has shape [5, 2, 1, 16, 64], expected [5, 2, 2, 16, 64]",
    ),
    "down_codes": (
        put("down_codes", lambda t: t[:4]),
        "down_codes has shape [4, 1, 2, 16, 64], expected [5, 1, 2, 16, 64]",
    ),
    "no_codes": (put("down_codes", lambda t: t[:0]), "down_codes is missing"),
    "codebook": (
        put("down_codebook", lambda t: t[:2]),
        "down_codebook has shape [2, 256, 4], expected [1 or 5, 256, 2 or 4]",
    ),
    "codebook_v": (
        put("down_codebook", lambda t: t[..., :3]),
        "down_codebook has shape [5, 256, 3], expected [1 or 5, 256,",
    ),
    "codebook_pairs": (
        put("gate_up_codebook", lambda t: t[..., :2]),
        "[5, 2, 2, 16, 64], expected [5, 2, 2, 32",
    ),
    "signs": (
        put("gate_up_signs", lambda t: t[..., :4]),
        "gate_up_signs has shape [5, 2, 2, 16, 4], expected [5, 2, 2, 16, 32]",
    ),
    "scale_rank": (
        put("gate_up_scale", lambda t: t[0]),
        "gate_up_scale has shape [80], expected [E, N]",
    ),
    "scale_rows": (
        put("down_scale", lambda t: t[:, :5]),
        "down_scale has shape [5, 5], expected [5, 72]",
    ),
    "bias": (put("gate_up_bias", lambda t: t[0]), "gate_up_bias has shape [80], expected [5, 80]"),
    "no_coef": (
        put("down_coef", None),
        "down_basis, down_coef and down_coef_scale must be given together",
    ),
    "basis": (
        put("down_basis", lambda t: t[:, :8]),
        "down_basis has shape [3, 8], expected [3, 72]",
    ),
    "coef": (
        put("gate_up_coef", lambda t: t.mT.contiguous()),
        "gate_up_coef has shape [5, 3, 80], expected [5, 80, 3]",
    ),
    "coef_scale": (
        put("down_coef_scale", lambda t: t[:, :2]),
        "down_coef_scale has shape [5, 2], expected [5, 3]",
    ),
    "mean_scale": (put("down_mean_scale", None), "down_mean_scale is missing"),
    "mean_rows": (
        put("gate_up_mean_scale", lambda t: t[:, :2]),
        "gate_up_mean_scale has shape [1, 2], expected [1, 80]",
    ),
    "post_norm": (put("post_norm", lambda t: t[:3]), "post_norm has shape [3], expected [72]"),
}


def test_operands_of_absent_codes_or_of_an_absent_basis_are_ignored(tmp_path: Path) -> None:
    """An exporter may leave the other operands in the file."""
    batch = Batch(tmp_path)
    without = {"codes": "down_mean_codes", "basis": "gate_up_basis"}
    for name, tensor in without.items():
        write(tmp_path, name, FULL, put(tensor, None))
        write(tmp_path, f"{name}_empty", replace(FULL, empty=True), put(tensor, None))
    outcome = batch.run(build.library())
    for name in without:
        assert outcome.errors[name] == outcome.errors[f"{name}_empty"] == []
        np.testing.assert_array_equal(
            outcome.outputs[name]["2"], outcome.outputs[f"{name}_empty"]["2"]
        )


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    batch = Batch(tmp_path_factory.mktemp("wrong"))
    for name, (change, _) in WRONG.items():
        write(batch.folder, name, FULL, change)
    write(batch.folder, "odd", Case(tokens=(1,)), put("gate_up_scale", lambda t: t[:, :79]))
    pairs = Case(tokens=(1,), bits=(4, 4))
    write(
        batch.folder,
        "pairs",
        pairs,
        put("down_signs", torch.zeros(5, 1, 2, 16, 32, dtype=torch.uint8)),
    )
    for name, attributes in ATTRIBUTES.items():
        write(batch.folder, name, Case(tokens=(1,)))
        model = onnx.load(batch.folder / f"{name}.onnx")
        node = model.graph.node[0]
        kept = [a for a in node.attribute if a.name not in attributes]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.attribute.extend(
            onnx.helper.make_attribute(n, v) for n, v in attributes.items() if v is not None
        )
        onnx.save(model, batch.folder / f"{name}.onnx")
    return batch.run(build.library(), threads=2)


ATTRIBUTES: dict[str, dict[str, Any]] = {
    "act": {"act": "swish"},
    "gate": {"gate": "geglu"},
    "odd_act": {"act": "x\n\x1b[2J" + "é" * 40},
    "no_act": {"act": None},
    "no_eps": {"eps": None},
}


@pytest.mark.parametrize("name", WRONG)
def test_an_operand_of_a_wrong_shape_is_named(name: str, wrong: Outcome) -> None:
    (said,) = wrong.errors[name]
    assert "moecc::VQExperts: " in said and WRONG[name][1] in said


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("odd", "gate_up_scale has 79 rows, a gate needs an even number"),
        ("pairs", "down_signs is given with a codebook of pairs; only groups of four have signs"),
        ("act", "act 'swish' is unknown; known are " + ", ".join(gates.ACTIVATIONS)),
        ("gate", "gate 'geglu' is unknown; known are none, " + ", ".join(gates.GATES)),
        ("odd_act", r"act 'x\x0a\x1b[2J" + r"\xc3\xa9" * 27 + "...' is unknown; known are "),
        ("no_act", "attribute act is missing or no string"),
        ("no_eps", "attribute eps is missing or no float"),
    ],
)
def test_an_odd_operand_or_an_unknown_attribute_is_named(
    name: str, text: str, wrong: Outcome
) -> None:
    (said,) = wrong.errors[name]
    assert f"moecc::VQExperts: {text}" in said


def test_too_little_memory_is_an_error(tmp_path: Path) -> None:
    """The results of a token's many experts need 16 GB; the process may have 6."""
    batch = Batch(tmp_path)
    write(batch.folder, "memory", Case(tokens=(1,), top_k=1))
    runs = dict(np.load(batch.folder / "memory.npz"))
    many = 1 << 25
    runs |= {
        "1/topk_index": np.zeros((1, many), np.int64),
        "1/topk_weight": np.zeros((1, many), np.float32),
    }
    np.savez(batch.folder / "memory.npz", **runs)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
    (said,) = batch.run(build.library(), before=limit).errors["memory"]
    assert "moecc::VQExperts: out of memory" in said


# ---- the library itself


def sanitized() -> tuple[Path, dict[str, str]]:
    """The library with address and undefined-behaviour sanitizers, and its environment."""
    runtime = [
        subprocess.run(
            [*compiler(), f"-print-file-name={name}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(map(os.path.isabs, runtime)):
        pytest.skip("the compiler has no sanitizers that can be loaded first")
    environment = {
        "LD_PRELOAD": " ".join(map(str.strip, runtime)),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    return build.library(sanitize=True), environment


def test_address_and_undefined_behaviour_sanitizers_find_nothing(
    tmp_path: Path, isas: list[str]
) -> None:
    """Weights are inputs here, so that each tensor has memory that ends where the tensor does."""
    library, environment = sanitized()
    batch = Batch(tmp_path)
    for name, case in CASES.items():
        if not name.startswith(("act_", "plain_", "loud_", "chunks")) or case.act == "gelu":
            batch.expected[name] = write(tmp_path, name, replace(case, fed=True, tokens=(2, 33)))
    for name, (change, _) in WRONG.items():
        write(tmp_path, f"wrong_{name}", replace(FULL, fed=True), change)
    for isa in isas:
        outcome = batch.run(library, threads=2, MOECC_ISA=isa, **environment)
        for name, expected in batch.expected.items():
            outcome.check(name, expected, f"sanitized {isa}")
        assert all(outcome.errors[f"wrong_{name}"] for name in WRONG)


@pytest.mark.skipif(
    "MOECC_OTHER_ORT" not in os.environ,
    reason="MOECC_OTHER_ORT names no Python with another ONNX Runtime",
)
def test_another_onnx_runtime_loads_the_same_library(batch: Batch) -> None:
    outcome = batch.run(build.library(), threads=2, python=os.environ["MOECC_OTHER_ORT"])
    for name, expected in batch.expected.items():
        outcome.check(name, expected, "another ONNX Runtime")


def test_sessions_and_threads_share_nothing(tmp_path: Path) -> None:
    import onnxruntime

    case = Case(means=(2, 3), rank=4, bits=(2, 4), tokens=(5, 33))
    expected = write(tmp_path, "one", case)
    runs = np.load(tmp_path / "one.npz")
    sessions = []
    for _ in range(2):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        options.register_custom_ops_library(str(build.library()))
        sessions.append(onnxruntime.InferenceSession(str(tmp_path / "one.onnx"), options))

    def run(i: int) -> float:
        tokens = (5, 33)[i % 2]
        feed = {n: runs[f"{tokens}/{n}"] for n in NAMES[:3]}
        y = sessions[i // 2 % 2].run(None, feed)[0]
        right = expected[str(tokens)].numpy()
        return float(np.linalg.norm(y - right) / np.linalg.norm(right))

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(run, range(64))) < TOLERANCE

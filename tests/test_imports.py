"""Who may import whom, read from the sources: a rule for rooms, one for passes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

from moecc.pipeline.parse import FACTS
from moecc.pipeline.parse import PASSES as PASS_NAMES
from moecc.pipeline.passes import Pass
from moecc.target import TARGETS

# A room sees the rooms to its left; those between two < do not see each other.
RULE = "errors types < hook options < registry < target < ir < checkpoint < frontend pipeline < artifact < backends commands < cli"  # noqa: E501
# What a pass sees besides the shared files of its own folder.
PASSES_SEE = (
    "moecc.errors",
    "moecc.types",
    "moecc.options",
    "moecc.ir",
    "moecc.pipeline",
    "moecc.checkpoint.memory",
)
# Only the module that is that target may need these.
HEAVY = {"triton", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "ray", "matplotlib"}

ROOT = Path(__file__).parents[1]
FLOOR = {room: floor for floor, rooms in enumerate(RULE.split(" < ")) for room in rooms.split()}


def modules() -> dict[str, Path]:
    """Every source file by its dotted name."""
    found = {}
    for top, package in (
        ("moecc", "moecc"),
        ("passes", "moecc.passes"),
        ("backends", "moecc.backends"),
    ):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT / top).with_suffix("").parts
            if top != "moecc" or parts[0] not in ("passes", "backends"):  # the two links
                found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return found


MODULES = modules()
PASSES = {name: path for name, path in MODULES.items() if name.startswith("moecc.passes.")}


def room(name: str) -> str:
    """The room that a module of moecc lies in; its own name for one beside the rooms."""
    return [*name.split("."), ""][1]


def imports(path: Path) -> set[str]:
    """The moecc modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import in line {node.lineno}"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else str(node.module))
    return {name for name in found if name.split(".")[0] == "moecc"}


@pytest.mark.parametrize(
    "name", sorted(MODULES.keys() - PASSES.keys() - {"moecc", "moecc.__main__", "moecc.passes"})
)
def test_a_room_imports_only_rooms_below_it(name: str) -> None:
    mine = room(name)
    for other in imports(MODULES[name]) - {"moecc"}:
        theirs = room(other)
        assert theirs == mine or FLOOR[theirs] < FLOOR[mine], (
            f"{name} imports {other}, against {RULE!r}"
        )


def test_every_room_has_a_floor() -> None:
    assert {room(n) for n in MODULES} - {"", "__main__", "passes"} == FLOOR.keys()


def test_no_modules_import_each_other() -> None:
    graph = nx.DiGraph(
        [
            (name, other)
            for name, path in MODULES.items()
            for other in imports(path)
            if other != name
        ]
    )
    graph.remove_nodes_from(n for n in list(graph) if MODULES.get(n, Path()).name == "__init__.py")
    assert list(nx.simple_cycles(graph)) == []


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_imports_no_other_pass_and_no_target(name: str) -> None:
    shared = ("moecc.passes._code", "moecc.passes._tune")
    allowed = (*PASSES_SEE, *shared)
    if is_composite(PASSES[name]):  # it may import the passes that it stands for
        allowed = (*allowed, "moecc.passes")
    for other in imports(PASSES[name]):
        assert other.startswith(allowed), f"{name} imports {other}"


def is_composite(path: Path) -> bool:
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    return any(
        isinstance(base, ast.Name) and base.id == "Composite" for c in classes for base in c.bases
    )


def test_only_kbvq_is_a_name_for_several_passes() -> None:
    assert [name for name, path in PASSES.items() if is_composite(path)] == ["moecc.passes.kbvq"]


@pytest.mark.parametrize("name", sorted(n for n in MODULES if not n.startswith("moecc.backends.")))
def test_what_a_target_needs_is_imported_by_that_target_alone(name: str) -> None:
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            )
            assert not {n.split(".")[0] for n in names} & HEAVY


def words() -> tuple[set[str], set[str]]:
    """The names and facts of passes and targets, and their options, but for words of English."""
    names, options = {*PASS_NAMES.names(), *TARGETS.names()}, set()
    for cls in (*map(PASS_NAMES.find, PASS_NAMES.names()), *map(TARGETS.find, TARGETS.names())):
        for kind in FACTS if issubclass(cls, Pass) else ():
            names |= getattr(cls, kind)
        options |= {f.name for f in cls.options()}
    return names - NOT_ONLY_NAMES, options - NOT_ONLY_OPTIONS


NOT_ONLY_NAMES = {"basis", "dense", "merge", "reference"}
NOT_ONLY_OPTIONS = {
    *("batches", "bits", "boundary", "codebook", "dtype", "embeddings", "experts", "group", "head"),
    *("hidden", "kl", "mean", "order", "path", "tokens", "value"),
}


@pytest.mark.parametrize(
    "name", sorted(n for n in MODULES if room(n) not in ("passes", "backends"))
)
def test_the_core_names_no_pass_and_no_target(name: str) -> None:
    """Neither by name nor by fact nor by option; both are found when they are asked for."""
    names, options = words()
    tree = ast.parse(MODULES[name].read_text())
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    prose = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, owners) and prosaic(n)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            found = set(re.findall(r"\w+", node.value)) & names
            assert not found, f"{name}, line {node.lineno} names {found}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in options, f"{name}, line {node.lineno} knows {node.attr}"


def prosaic(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> bool:
    """Whether a docstring comes first."""
    return bool(node.body) and isinstance(node.body[0], ast.Expr)


def loaded(code: str) -> set[str]:
    code += "; import sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "tests"
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("code", ["import moecc", "import moecc.cli; moecc.cli.main(['--help'])"])
def test_importing_moecc_brings_in_nothing_heavy(code: str) -> None:
    """Neither does reading arguments."""
    assert not loaded(code) & {"torch", "transformers", "numpy", "networkx", *HEAVY}


def test_targets_bring_in_nothing_heavy_and_ask_for_no_device() -> None:
    """torch and transformers may bring something in themselves."""
    no_device = "import torch; torch.cuda.is_available = torch.cuda.device_count = lambda: 1 / 0; "
    before = loaded("import torch, transformers")
    after = loaded(
        no_device + "from moecc.pipeline.parse import PASSES; from moecc.target import TARGETS; "
        "[PASSES.find(n) for n in PASSES.names()]; [TARGETS.find(n)() for n in TARGETS.names()]"
    )
    assert not (after - before) & HEAVY

"""What the sources say: who may import whom, by rooms and for passes; how text is encoded."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest
from made import ROOT

from moecc import _OFFERED, hook
from moecc.pipeline.parse import FACTS
from moecc.pipeline.parse import PASSES as PASS_NAMES
from moecc.pipeline.passes import Pass
from moecc.target import TARGETS

# A room sees the rooms to its left; those between two < do not see each other. Nothing outside
# backends sees them, and no target sees another.
RULE = (
    "errors types < hook options native < registry startup < target < ir < checkpoint"
    " < frontend pipeline < artifact < backends commands < cli"
)
# What a pass sees.
PASSES_SEE = (
    *("moecc.errors", "moecc.types", "moecc.options", "moecc.native", "moecc.ir"),
    *(f"moecc.checkpoint.{part}" for part in ("memory", "files", "reading")),
    *(
        f"moecc.pipeline.{part}"
        for part in (
            "passes",
            "estimate",
            "batches",
            "stream",
            "bits",
            "fate",
            "work",
            "workers",
            "device",
        )
    ),
    *("moecc.passes._code", "moecc.passes._tune"),
)
# Only the module that is that target may need these.
HEAVY = {"triton", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "ray", "matplotlib"}
# Modules outside targets that need one, and are imported once it is asked for.
OTHERS = {
    "moecc.passes._code.triton_kernels": {"triton"},
    "moecc.pipeline.workers.cluster": {"ray"},
}

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
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import in line {node.lineno}"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                offered = _OFFERED.get(alias.name, "moecc") if node.module == "moecc" else ""
                found.add(full if full in MODULES else offered.split(":")[0] or str(node.module))
    return {name for name in found if name.split(".")[0] == "moecc"}


def allowed(name: str, other: str, *, several: bool = False) -> bool:
    """Whether the module `name` may import `other`. several: it is a name for several passes."""
    mine, theirs = room(name), room(other)
    if mine == "passes":
        seen = (*PASSES_SEE, "moecc.passes") if several else PASSES_SEE
        return any(f"{other}.".startswith(f"{part}.") for part in seen)
    if theirs == "passes":
        return False
    if theirs == "backends":
        return mine == "backends" and name.split(".")[2:3] == other.split(".")[2:3]
    return theirs in ("", mine) or FLOOR[theirs] < FLOOR[mine]


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"moecc", "moecc.__main__"}))
def test_a_module_imports_only_what_it_may(name: str) -> None:
    several = name in PASSES and is_composite(PASSES[name])
    for other in imports(MODULES[name]):
        assert allowed(name, other, several=several), f"{name} imports {other}"


BAD_IMPORTS = {
    "import moecc.backends.onnx.run": ("moecc.cli", "moecc.commands.export"),
    "from moecc.backends import dense": ("moecc.cli.calls", "moecc.backends.onnx.exporter"),
    "from moecc.backends.triton.pack import pack": ("moecc.cli", "moecc.backends.dense"),
    "from moecc.passes.vq import VQ": ("moecc.cli", "moecc.backends.dense", "moecc.passes.klt"),
    "from moecc import compile": ("moecc.passes.vq", "moecc.backends.dense", "moecc.pipeline.run"),
    "from moecc import load_program": ("moecc.passes.vq", "moecc.ir.program"),
    "from moecc.pipeline.run import run_passes": ("moecc.passes.vq", "moecc.ir.moe"),
    "from moecc.pipeline import order": ("moecc.passes._code.rate", "moecc.passes.kbvq"),
    "import moecc.errors_of_another": ("moecc.passes.vq",),
}


@pytest.mark.parametrize(
    ("line", "name"), [(line, name) for line, names in BAD_IMPORTS.items() for name in names]
)
def test_an_import_against_the_rule_is_found(line: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(f"def later():\n    {line}\n")
    (other,) = imports(file)
    assert not allowed(name, other, several=name == "moecc.passes.kbvq")


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


def is_composite(path: Path) -> bool:
    classes = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    ]
    return any(
        isinstance(base, ast.Name) and base.id == "Composite" for c in classes for base in c.bases
    )


def test_only_kbvq_is_a_name_for_several_passes() -> None:
    assert [name for name, path in PASSES.items() if is_composite(path)] == ["moecc.passes.kbvq"]


@pytest.mark.parametrize("name", sorted(n for n in MODULES if not n.startswith("moecc.backends.")))
def test_what_a_target_needs_is_imported_by_that_target_alone(name: str) -> None:
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            )
            assert not {n.split(".")[0] for n in names} & HEAVY - OTHERS.get(name, set())


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_text_file_is_read_and_written_as_utf_8(name: str) -> None:
    """Never as the locale says."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and opens_text(node):
            said = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert said.get("encoding") == "'utf-8'", f"{name}, line {node.lineno}"


def opens_text(node: ast.Call) -> bool:
    """Whether a call opens a file, or reads or writes the whole of it, as text."""
    called = ast.unparse(node.func).split(".")[-1]
    if called != "open" or ast.unparse(node.func) == "os.open":
        return called in ("read_text", "write_text")
    return not any("b" in str(a.value) for a in node.args if isinstance(a, ast.Constant))


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


def known(source: str) -> list[tuple[int, str]]:
    """Return each line of `source` that names a pass, a target, a fact or an option, and what."""
    names, options = words()
    tree = ast.parse(source)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    prose = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, owners) and prosaic(n)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            found += [(node.lineno, w) for w in re.findall(r"\w+", node.value) if w in names]
            if re.match(r"moecc\.(passes|backends)\..*[^.]$", node.value):
                found.append((node.lineno, node.value))
        if isinstance(node, ast.Attribute) and node.attr in options:
            found.append((node.lineno, node.attr))
    return found


@pytest.mark.parametrize(
    "name", sorted(n for n in MODULES if room(n) not in ("passes", "backends"))
)
def test_the_core_names_no_pass_and_no_target(name: str) -> None:
    """Neither by name nor by fact nor by option; both are found when they are asked for."""
    assert known(MODULES[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = 'kbvq{bits=3}'", ["kbvq"]),
        ("x = f'{y} of onnx'", ["onnx"]),
        ("import_module('moecc.backends.dense')", ["moecc.backends.dense"]),
        ("import_module('moecc.passes.merge')", ["moecc.passes.merge"]),
        ("x = 'moecc.backends.reference:Reference'", ["moecc.backends.reference:Reference"]),
        ("x = target.opset", ["opset"]),
        ("def f():\n    'As kbvq does.'\n    return f'moecc.passes.{name}'", []),
    ],
)
def test_a_name_in_the_core_is_found(source: str, found: list[str]) -> None:
    assert [what for _, what in known(source)] == found


def prosaic(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> bool:
    """Whether a docstring comes first."""
    return bool(node.body) and isinstance(node.body[0], ast.Expr)


def loaded(code: str, before: str = "pass") -> set[str]:
    """Return the packages that `code` brings into a process that has run `before`."""
    names = "{name.split('.')[0] for name in sys.modules}"
    code = f"import sys; {before}; before = {names}; {code}; print(*{names} - before)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "tests"
    )
    return set(done.stdout.split())


def test_a_module_that_is_waited_for_is_imported_though_registering_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "waited_for.py").write_text("VALUE = 5")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hook, "_WANTED", {"waited_for": "moecc.nothing"})
    before = list(sys.meta_path)
    hook.register_when_needed()
    assert importlib.import_module("waited_for").VALUE == 5
    assert re.search(r"register with waited_for \(No module .*; artifacts can", caplog.text)
    assert sys.meta_path == before


@pytest.mark.parametrize("code", ["import moecc", "import moecc.cli; moecc.cli.main(['--help'])"])
def test_importing_moecc_brings_in_nothing_heavy(code: str) -> None:
    """Neither does reading arguments."""
    assert not loaded(code) & {"torch", "transformers", "numpy", "networkx", *HEAVY}


def test_targets_bring_in_nothing_heavy_and_ask_for_no_device() -> None:
    """torch and transformers may bring something in themselves."""
    no_device = "torch.cuda.is_available = torch.cuda.device_count = lambda: 1 / 0"
    found = loaded(
        "from moecc.pipeline.parse import PASSES; from moecc.target import TARGETS; "
        "[PASSES.find(n) for n in PASSES.names()]; [TARGETS.find(n)() for n in TARGETS.names()]",
        before=f"import torch, transformers; {no_device}",
    )
    assert "moecc" in found and not found & HEAVY

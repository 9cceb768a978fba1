"""Who may import whom, read from the sources: the core below the pipeline, passes and backends apart from each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
CORE = {p.stem: p for p in sorted((ROOT / "moecc").glob("*.py")) if p.stem != "__init__"}
PASSES = {p.stem: p for p in sorted((ROOT / "passes").rglob("*.py")) if p.stem != "__init__"}
BACKENDS = {str(p.relative_to(ROOT / "backends")): p for p in sorted((ROOT / "backends").rglob("*.py"))}

# What the lowest modules may import of moecc: everything else stands on them.
FLOOR: dict[str, set[str]] = {
    "errors": set(),
    "gates": set(),
    "memory": set(),
    "vq4": set(),
    "ops": {"errors", "gates", "vq4"},
    "ir": {"errors", "gates", "ops", "vq4"},
    "stream": {"errors", "ir", "memory"},
    "base": {"errors", "ir", "stream"},
    "pipeline": {"base", "errors", "ir", "ops", "stream"},
}
# What runs a pipeline or stands above one; nothing else in the core imports these.
ABOVE = {"pipeline", "compiler", "survey", "evaluate", "diff", "cli", "bench", "bisect", "report", "generate"}
FOR_PASSES = {"base", "errors", "gates", "ir", "memory", "ops", "stream", "vq4"}
NOT_FOR_BACKENDS = ABOVE
# Only the module that is that target may need these.
HEAVY = {"triton", "onnx", "onnxruntime", "ray", "matplotlib"}


def imports(path: Path) -> set[str]:
    """Every absolute module name that a file imports, in functions too; `from moecc import ops` counts as moecc.ops."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import in line {node.lineno}"
            module = str(node.module)
            if module in ("moecc", "moecc.passes", "moecc.backends"):
                found |= {f"{module}.{alias.name}" for alias in node.names}
            else:
                found.add(module)
    return found


def core_imports(path: Path) -> set[str]:
    """Names of the core's modules that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("moecc.") and name.split(".")[1] in CORE}


@pytest.mark.parametrize("name", FLOOR)
def test_the_floor_stands_on_what_it_may(name: str) -> None:
    assert core_imports(CORE[name]) <= FLOOR[name]


@pytest.mark.parametrize("name", sorted(CORE.keys() - ABOVE))
def test_nothing_below_the_pipeline_imports_it(name: str) -> None:
    assert not core_imports(CORE[name]) & ABOVE


@pytest.mark.parametrize("name", sorted(CORE.keys() - {"cli"}))
def test_nothing_imports_the_command_line(name: str) -> None:
    assert "cli" not in core_imports(CORE[name])


def test_the_core_has_no_circles() -> None:
    graph = nx.DiGraph([(name, other) for name, path in CORE.items() for other in module_level(path) if other in CORE])
    assert list(nx.simple_cycles(graph)) == []


def module_level(path: Path) -> set[str]:
    """Core modules imported when the file is, not from inside a function."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "moecc":
            parts = str(node.module).split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("name", CORE)
def test_the_core_names_no_pass_and_no_backend(name: str) -> None:
    """Both are found by name when they are asked for; the packages themselves may be listed."""
    for module in imports(CORE[name]):
        assert module.split(".")[:2] not in (["moecc", "passes"], ["moecc", "backends"]) or module.count(".") == 1, (
            module
        )
    for node in ast.walk(ast.parse(CORE[name].read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not node.value.startswith(("moecc.passes.", "moecc.backends.")) or node.value.endswith("."), (
                node.value
            )


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_imports_no_other_pass_and_no_backend(name: str) -> None:
    found = imports(PASSES[name])
    shared = {f"moecc.passes.{p}" for p in PASSES if p.startswith("_")}
    allowed = {f"moecc.{m}" for m in FOR_PASSES} | shared
    if is_composite(PASSES[name]):  # it may import the passes that it stands for
        allowed |= {f"moecc.passes.{p}" for p in PASSES}
    assert {m for m in found if m.split(".")[0] == "moecc"} <= allowed


def is_composite(path: Path) -> bool:
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    return any(isinstance(base, ast.Name) and base.id == "Composite" for c in classes for base in c.bases)


def test_only_kbvq_is_a_name_for_several_passes() -> None:
    assert [name for name, path in PASSES.items() if is_composite(path)] == ["kbvq"]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_imports_no_pass_and_nothing_above_the_pipeline(name: str) -> None:
    assert not any(m.startswith("moecc.passes") for m in imports(BACKENDS[name]))
    assert not core_imports(BACKENDS[name]) & NOT_FOR_BACKENDS


@pytest.mark.parametrize("path", [*CORE.values(), *PASSES.values()], ids=lambda p: p.stem)
def test_targets_are_imported_by_their_own_module_alone(path: Path) -> None:
    """ray may be imported inside a function, where a cluster was asked for."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            assert not {n.split(".")[0] for n in names} & HEAVY


def loaded(code: str) -> set[str]:
    code += "; import sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "tests")
    return set(done.stdout.split())


def test_importing_moecc_and_its_backends_brings_in_no_target_and_asks_for_no_device() -> None:
    """torch and transformers may bring one in themselves."""
    no_device = "import torch; torch.cuda.is_available = torch.cuda.device_count = lambda: 1 / 0; "
    before = loaded("import torch, transformers")
    after = loaded(
        no_device + "import moecc, moecc.experts, moecc.pipeline, moecc.backends.triton; moecc.pipeline.names()"
    )
    assert not (after - before) & HEAVY

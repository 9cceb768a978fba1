"""Installing: no file is two modules, a wheel from the sdist is whole, transformers knows moecc."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from made import EVERYTHING, ROOT, ROWS, checkpoint, load

from moecc import cli


def folders() -> dict[str, str]:
    """Return package name -> folder, for every folder of the sources with an __init__.py."""
    tops = {"moecc": "moecc", "passes": "moecc.passes", "backends": "moecc.backends"}
    found = {}
    for top, package in tops.items():
        for init in sorted((ROOT / top).rglob("__init__.py")):
            inner = init.parent.relative_to(ROOT / top)
            if inner.parts[:1] not in (("passes",), ("backends",)):  # the two links inside moecc
                found[".".join([package, *inner.parts])] = str(Path(top) / inner)
    return found


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_the_two_folders_are_links_that_every_checkout_has(name: str) -> None:
    link = ROOT / "moecc" / name
    assert link.is_symlink() and link.readlink() == Path("..") / name


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_a_folder_is_not_imported_under_its_own_name(name: str) -> None:
    command = [sys.executable, "-c", f"import {name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    message = f"ImportError: import moecc.{name}, not {name}: one file must not become two modules"
    assert message in done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build an sdist of the sources and a wheel from it, with the installed hatchling, offline."""
    place = tmp_path_factory.mktemp("build")
    source = place / "source"
    source.mkdir()
    for name in ("moecc", "passes", "backends"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / file).is_file():
            shutil.copy(ROOT / file, source / file)
    run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", "../dist"], source)
    sdist = next((place / "dist").glob("moecc-*.tar.gz"))
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    run([sys.executable, "-m", "pip", "wheel", *offline, "-w", "wheels", str(sdist)], place)
    return sdist, next((place / "wheels").glob("moecc-*.whl"))


def run(command: list[str], where: Path) -> None:
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]


def wanted() -> set[str]:
    """Return every source file by the path it is installed under."""
    return {
        "/".join([*package.split("."), path.name])
        for package, folder in folders().items()
        for path in (ROOT / folder).glob("*.py")
    } - {"moecc/startup.py"} | {"_moecc_startup.py"}


def test_a_wheel_through_the_sdist_holds_every_module_once(built: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(built[1]).namelist()
    modules = [n for n in names if n.endswith(".py")]
    assert len(modules) == len(set(modules)) and set(modules) == wanted()
    assert not any(n.startswith(("passes/", "backends/")) for n in names)


def test_the_sdist_holds_the_sources(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    packages = {"passes/__init__.py", "backends/__init__.py"}
    assert {"passes/vq.py", "moecc/ir/ops.py", "pyproject.toml", *packages} <= names


def test_passes_of_the_wheel_are_found_without_the_checkout(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    zipfile.ZipFile(built[1]).extractall(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import moecc
from moecc.pipeline.parse import find_pass, pass_names
print(moecc.__file__, *pass_names(), find_pass("kbvq").__module__)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    where, *names, module = done.stdout.split()
    assert Path(where).is_relative_to(tmp_path)
    assert {"klt", "vq", "kbvq"} <= set(names) and module == "moecc.passes.kbvq"


# ---------------------------------------------------------------- transformers alone

# argv: folders. Prints a line of JSON for each: the last logits of a prompt, or the error.
SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    for options in {}, {"experts_implementation": "eager"}:
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[5, 9, 12, 20]])).logits[0, -1]
            print(json.dumps(logits.tolist()))
        except Exception as error:
            print(json.dumps(f"{type(error).__name__}: {error}"))
"""


@pytest.fixture(scope="module")
def pythons(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two environments that see the packages of this one but its moecc: with the wheel, without."""
    place, found = tmp_path_factory.mktemp("environments"), {}
    for name in ("with", "without"):
        venv.create(place / name, with_pip=False)
        found[name] = place / name / "bin" / "python"
        site = next((place / name / "lib").glob("python3*/site-packages"))
        # only its own site-packages runs .pth files, so an editable moecc is not seen
        (site / "packages.pth").write_text("\n".join(site_packages()) + "\n")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", str(built[1])]
    run([sys.executable, "-m", "pip", "--python", str(found["with"]), "install", *options], place)
    return found


def site_packages() -> list[str]:
    return [path for path in sys.path if path.endswith("site-packages")]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One artifact twice: its weights in one file, and in shards."""
    folder = tmp_path_factory.mktemp("artifact")
    made, out, shards = checkpoint(folder / "model", "qwen2_moe"), folder / "out", folder / "shards"
    assert cli.main(["compile", str(made), "--passes", EVERYTHING, "-o", str(out), *ROWS]) == 0
    load(out).save_pretrained(shards, max_shard_size="40KB")
    assert (shards / "model.safetensors.index.json").exists()
    return [out, shards]


def script(
    python: Path, code: str, *args: str | Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run code in another environment, which sees nothing of this one but its packages."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MOECC_STARTUP")}
    return subprocess.run(
        [str(python), "-c", code, *map(str, args)],
        cwd=python.parent,  # the current folder is on the path, too
        env=kept | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def opened(done: subprocess.CompletedProcess[str]) -> list[list[float] | str]:
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_where_moecc_is_installed_transformers_opens_artifacts_without_an_import(
    pythons: dict[str, Path], artifacts: list[Path]
) -> None:
    ids = torch.tensor([[5, 9, 12, 20]])
    with torch.no_grad():
        want = load(artifacts[0])(input_ids=ids).logits[0, -1]
    done = script(pythons["with"], SCRIPT, *artifacts)
    found = opened(done)
    assert len(found) == 4 and all(torch.equal(torch.tensor(f), want) for f in found)
    assert "UNEXPECTED" not in done.stderr and "MISSING" not in done.stderr


@pytest.mark.parametrize("name", ["without", "with"])
def test_without_moecc_transformers_stops_and_says_what_to_install(
    pythons: dict[str, Path], artifacts: list[Path], name: str
) -> None:
    done = script(pythons[name], SCRIPT, *artifacts, MOECC_STARTUP="0")
    plain, eager, *shards = opened(done)
    assert [plain, eager] == shards and "pip install moecc" in str(plain)
    # the guard tensor fits no model; transformers' warning says what to install
    assert str(eager).startswith("RuntimeError") and done.stderr.count("MISMATCH:") == 2
    assert done.stderr.count("got moecc (pip install moecc)") == 4


def test_every_python_that_has_moecc_still_starts_quickly(pythons: dict[str, Path]) -> None:
    code = "import sys; print(*sorted(m for m in sys.modules if 'moecc' in m))"
    done = script(pythons["with"], code)
    assert done.stdout.split() == ["_moecc_startup"] and not done.stderr


def test_a_broken_moecc_does_not_break_transformers(pythons: dict[str, Path]) -> None:
    site = next(pythons["with"].parents[1].glob("lib/python3*/site-packages"))
    away = site / "moecc.away"
    (site / "moecc").rename(away)
    try:
        code = "import transformers.quantizers.auto as a; print(len(a.AUTO_QUANTIZER_MAPPING) > 5)"
        done = script(pythons["with"], code)
    finally:
        away.rename(site / "moecc")
    assert done.stdout.strip() == "True"
    assert "moecc: artifacts can't be opened: No module named 'moecc'" in done.stderr


def test_bench_finds_moecc_where_it_is_not_installed(pythons: dict[str, Path]) -> None:
    """A process of its own gets it from the checkout, which is the current folder."""
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from moecc.backends.onnx import speed
speed._apart(Path("nothing.onnx"), None, 1, 1, 1)
"""
    done = script(pythons["without"], code)
    assert "can't load it: [ONNXRuntimeError] : 3 : NO_SUCHFILE" in done.stderr, done.stderr


def test_uninstalling_takes_the_startup_file_away(built: tuple[Path, Path]) -> None:
    archive = zipfile.ZipFile(built[1])
    record = next(n for n in archive.namelist() if n.endswith("RECORD"))
    lines = archive.read(record).decode().splitlines()
    assert {"moecc.pth", "_moecc_startup.py"} <= {line.split(",")[0] for line in lines}

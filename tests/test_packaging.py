"""Installing: every package is listed, no file is two modules, a wheel from the sdist is whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from made import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


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


def test_every_package_is_listed() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders())
    for package, folder in SETUPTOOLS["package-dir"].items():
        assert folders()[package] == folder


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
    """Build an sdist of the sources and a wheel from it, with the installed setuptools, offline."""
    place = tmp_path_factory.mktemp("build")
    source = place / "source"
    source.mkdir()
    for name in ("moecc", "passes", "backends"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / file).is_file():
            shutil.copy(ROOT / file, source / file)
    code = "import setuptools.build_meta as b; b.build_sdist('../dist')"
    run([sys.executable, "-c", code], source)
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
    }


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

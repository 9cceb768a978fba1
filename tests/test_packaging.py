"""What is installed: every package is listed, no file is two modules, and a wheel made through the sdist is whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def folders() -> dict[str, str]:
    """Package name -> folder, for every folder of the sources with an __init__.py."""
    found = {}
    for top, package in (
        ("moecc", "moecc"),
        ("passes", "moecc.passes"),
        ("backends", "moecc.backends"),
    ):
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
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert (
        f"ImportError: import moecc.{name}, not {name}: one file must not become two modules"
        in done.stderr
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist of the sources and a wheel made from it, built with the setuptools that is installed, without a network."""
    place = tmp_path_factory.mktemp("build")
    source = place / "source"
    source.mkdir()
    for name in ("moecc", "passes", "backends"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / file).is_file():
            shutil.copy(ROOT / file, source / file)
    code = "import setuptools.build_meta as b; b.build_sdist('../dist')"
    run([sys.executable, "-c", code], source)
    sdist = next((place / "dist").glob("moecc-*.tar.gz"))
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        "wheels",
    ]
    run([*wheel, str(sdist)], place)
    return sdist, next((place / "wheels").glob("moecc-*.whl"))


def run(command: list[str], where: Path) -> None:
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]


def wanted() -> set[str]:
    """Every source file as it is installed."""
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
    assert {
        "passes/vq.py",
        "passes/__init__.py",
        "backends/__init__.py",
        "moecc/ir/ops.py",
        "pyproject.toml",
    } <= names


def test_the_wheel_s_passes_are_found_without_the_checkout(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    zipfile.ZipFile(built[1]).extractall(tmp_path)
    code = "import moecc.pipeline.parse as p, moecc; print(moecc.__file__, *p.pass_names(), p.find_pass('kbvq').__module__)"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    where, *names, module = done.stdout.split()
    assert (
        Path(where).is_relative_to(tmp_path)
        and {"klt", "vq", "kbvq"} <= set(names)
        and module == "moecc.passes.kbvq"
    )

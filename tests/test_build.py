"""The op library's build and its cache, and its kernels against plain loops."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from test_native import isas  # noqa: F401 (a fixture)

from moecc.backends.onnx.build import KERNELS, OPS, library
from moecc.errors import MoeccError
from moecc.native import build

if not any(map(shutil.which, build.COMPILERS)) and not os.environ.get("CXX"):
    pytest.skip("no C++ compiler", allow_module_level=True)

CHECK = Path(__file__).with_name("kernels_check.cc")


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of a fake compiler, which writes empty files. The cache is the test's own."""
    monkeypatch.setenv("MOECC_CACHE", str(tmp_path))
    made: list[list[str]] = []

    def fake(command: list[str], what: str = "") -> str:
        if command[-2] == "-o":
            made.append(command)
            Path(command[-1]).write_bytes(b"")
        return "a version"

    monkeypatch.setattr(build, "run", fake)
    return made


def test_the_library_is_built_once_and_found_again(tmp_path: Path, calls: list[list[str]]) -> None:
    first = library()
    assert first.parent == tmp_path / "ops" and len(calls) > 3
    count = len(calls)
    (first.parent / "building-killed").mkdir()
    (first.parent / "building-killed" / "reader.o").write_bytes(b"")
    assert library() == first and len(calls) == count
    assert library(sanitize=True) != first
    names = {first.name, library(sanitize=True).name}
    assert {p.name for p in first.parent.iterdir()} == {*names, ".lock"}


def test_two_who_need_one_library_compile_it_once(
    calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock is of an open file, so it keeps threads apart as it does processes."""
    begun, real = [], build.Library._compile

    def slowly(*args: Any) -> Path:
        begun.append(args)
        time.sleep(0.1)
        return real(*args)

    monkeypatch.setattr(build.Library, "_compile", slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: library(), range(2))
    assert first == second and len(begun) == 1


def test_a_kernel_file_gets_the_flags_of_its_instruction_set(calls: list[list[str]]) -> None:
    for machine, own, other in (
        ("AMD64", "avx2", "neon"),
        ("arm64", "neon", "avx2"),
        ("riscv64", "scalar", "neon"),
    ):
        calls.clear()
        OPS.compiled(("c++",), machine)
        lines = [" ".join(c) for c in calls]
        for expected in (f"kernel_{own}.cc", "kernel_scalar.cc"):
            assert any(expected in line for line in lines)
        assert not any(f"kernel_{other}.cc" in line for line in lines)
        *compiled, _link = lines
        assert all(("-mavx" in line) == ("kernel_avx" in line) for line in compiled)


def test_without_a_compiler_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECC_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        MoeccError, match=r"needs a C\+\+17 compiler: install g\+\+ or clang\+\+, or set CXX"
    ):
        library()
    monkeypatch.setenv("CXX", "g++ 'x")
    with pytest.raises(MoeccError, match=r"CXX is no command \(No closing quotation\)"):
        library()
    monkeypatch.setenv("CXX", "nosuchcompiler -O2")
    with pytest.raises(MoeccError, match="CXX is 'nosuchcompiler', which is not installed"):
        library()


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("echo 'x.cc:1: error: no such thing' >&2; exit 1", "x.cc:1: error: no such thing"),
        ("exit 4", "exit code 4"),
        ("kill -9 $$", "a signal ended it"),
    ],
)
def test_a_compiler_that_fails_is_quoted(
    end: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECC_CACHE", str(tmp_path / "cache"))
    script = tmp_path / "cxx"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] || {{ {end}; }}\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(MoeccError, match=f"can't compile the op library: {said}; set CXX"):
        library()
    assert [p.name for p in (tmp_path / "cache" / "ops").iterdir()] == [".lock"]


def test_an_unwritable_cache_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOECC_CACHE", str(tmp_path / "file"))
    with pytest.raises(MoeccError, match=r"can't write the op library to .*; set MOECC_CACHE"):
        library()


@pytest.mark.parametrize("what", ["cache", "cache/ops", "cache/ops/library"])
def test_a_library_that_others_could_replace_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[list[str]], what: str
) -> None:
    monkeypatch.setenv("MOECC_CACHE", str(tmp_path / "cache"))
    made = OPS.path()
    count, part = len(calls), made if what.endswith("library") else tmp_path / what
    for mode in (0o775, 0o757):
        part.chmod(mode)
        with pytest.raises(MoeccError, match=rf"others may write to {part}; chmod go-w"):
            library()
        part.chmod(0o755)
    assert library() == made and len(calls) == count


def test_a_library_that_belongs_to_another_user_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[list[str]]
) -> None:
    library()
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:
        os.chown(tmp_path / "ops", 4711, -1)
    with pytest.raises(MoeccError, match="belongs to another user; set MOECC_CACHE"):
        library()


def test_nobody_else_may_write_to_a_new_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[list[str]]
) -> None:
    monkeypatch.setenv("MOECC_CACHE", str(tmp_path / "a" / "b"))
    before = os.umask(0)
    try:
        made = OPS.path()
    finally:
        os.umask(before)
    for part in (made, *made.parents[:3]):
        assert not part.stat().st_mode & 0o022, part


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_kernels_compute_what_plain_loops_do(
    machine: str,
    tmp_path: Path,
    isas: list[str],  # noqa: F811
) -> None:
    """The other architecture needs an emulator and a compiler."""
    here = platform.machine() == machine
    compiler = " ".join(build.compiler()) if here else shutil.which(f"{machine}-linux-gnu-g++")
    emulator = [] if here else [shutil.which(f"qemu-{machine}") or ""]
    names = {"x86_64": "AVX2", "aarch64": "NEON"}
    if not compiler or emulator == [""] or (here and names[machine].lower() not in isas):
        pytest.skip(f"no compiler for {machine}, or nothing that it could run on")
    flags, objects = KERNELS[machine], []
    define = (f"-DOTHER={names[machine]}_KERNELS", f"-I{OPS.folder}")
    for source in (*(OPS.folder / name for name in ("kernel_scalar.cc", *flags)), CHECK):
        made = str(tmp_path / f"{source.stem}.o")
        own = (*build.FLAGS, "-Werror", *flags.get(source.name, ()), *define)
        subprocess.run([*compiler.split(), *own, "-c", str(source), "-o", made], check=True)
        objects.append(made)
    program = str(tmp_path / "check")
    subprocess.run([*compiler.split(), "-static", *objects, "-o", program], check=True)
    done = subprocess.run([*emulator, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and float(done.stdout) < 1e-6, done.stdout + done.stderr


def test_the_sources_compile_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECC_CACHE", str(tmp_path))
    # The test above compiles the kernels with optimisation.
    OPS.compiled(build.compiler(), platform.machine(), ("-Werror", "-O1"))

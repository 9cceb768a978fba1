"""The native op library: compiled from `native/` by the system's compiler when it is first asked for, then found in a cache.

Every kernel file is compiled with the flags of its own instruction set; which one runs is chosen by what the CPU has (see
native/isa.cc), so a library may be copied to another machine of the same architecture.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from moecc.errors import MoeccError

NATIVE = Path(__file__).with_name("native")
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
    # no fast-math: NaN and infinity stay what they are; only what hinders vectorising and changes no number is dropped
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
)  # fmt: skip
SANITIZE = (
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)
_AVX512 = ("f", "bw", "vl", "vbmi", "vnni")
# Kernel files that an architecture has besides kernel_scalar.cc, and their flags.
KERNELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "kernel_avx2.cc": ("-mavx2", "-mfma", "-mf16c"),
        "kernel_avx512.cc": ("-mfma", "-mf16c", *(f"-mavx512{part}" for part in _AVX512)),
    },
    "aarch64": {"kernel_neon.cc": ()},
}
COMPILERS = ("c++", "g++", "clang++")
_NAMES = {"amd64": "x86_64", "arm64": "aarch64"}


def library(*, sanitize: bool = False) -> Path:
    """The shared library to give to `SessionOptions.register_custom_ops_library`, compiled unless it is in the cache.

    The cache is $MOECC_CACHE/ops, else ~/.cache/moecc/ops; a name is a digest of sources, flags and compiler. sanitize: with
    address and undefined-behaviour checks, for tests. MoeccError where there is no compiler or it fails."""
    return compiled(compiler(), platform.machine(), SANITIZE if sanitize else ())


def compiled(cxx: tuple[str, ...], machine: str, flags: tuple[str, ...] = ()) -> Path:
    """`library` by a compiler and for an architecture of the caller's choice."""
    machine = _NAMES.get(machine.lower(), machine.lower())
    own = KERNELS.get(machine, {})
    every = {name for files in KERNELS.values() for name in files}
    sources = [
        path for path in sorted(NATIVE.glob("*.cc")) if path.name in own or path.name not in every
    ]
    digest = hashlib.sha256(repr((_version(cxx), machine, FLAGS, flags, own)).encode())
    for path in sorted((*NATIVE.glob("*.h"), *NATIVE.glob("*.cc"))):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    folder = Path(os.environ.get("MOECC_CACHE") or "~/.cache/moecc").expanduser() / "ops"
    result = folder / f"moecc_ops-{digest.hexdigest()[:16]}.so"
    if result.is_file():
        return result
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = _compile(cxx, sources, own, flags, Path(place))
            made.replace(result)  # at once: a process that looks for it finds all of it or none
    except OSError as error:
        raise MoeccError(
            f"can't write the op library to {folder}: {error.strerror}; set MOECC_CACHE"
        ) from error
    return result


def _compile(
    cxx: tuple[str, ...],
    sources: list[Path],
    own: dict[str, tuple[str, ...]],
    flags: tuple[str, ...],
    place: Path,
) -> Path:
    objects = [str(place / f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = (
            [*cxx, *FLAGS, *flags, *own.get(source.name, ()), "-c", str(source), "-o", made]
            for source, made in zip(sources, objects, strict=True)
        )
        list(pool.map(run, commands))
    result = place / "ops.so"
    run([*cxx, "-shared", *flags, *objects, "-o", str(result)])
    return result


def run(command: list[str]) -> str:
    """What a compiler prints; MoeccError with its first complaint where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise MoeccError(
            f"can't run the compiler {command[0]}: {error.strerror}; set CXX to another one"
        ) from error
    if done.returncode:
        said = (
            [line for line in done.stderr.splitlines() if "error" in line]
            or done.stderr.splitlines()
            or ["nothing"]
        )
        raise MoeccError(
            f"{command[0]} can't compile the op library: {said[0].strip()}; set CXX to another C++17 compiler"
        )
    return done.stdout


def compiler() -> tuple[str, ...]:
    """$CXX, else the first of the usual names that is installed."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        if not shutil.which(chosen[0]):
            raise MoeccError(f"CXX is '{chosen[0]}', which is not installed")
        return tuple(chosen)
    for name in COMPILERS:
        if shutil.which(name):
            return (name,)
    raise MoeccError("the op library needs a C++17 compiler: install g++ or clang++, or set CXX")


@cache
def _version(cxx: tuple[str, ...]) -> str:
    return run([*cxx, "--version"])

"""The native op library: compiled from `native/` by the system's compiler, then kept in a cache.

Every kernel file is compiled with the flags of its own instruction set. The CPU decides which one
runs (native/isa.cc), so a library may be copied to another machine of the same architecture.
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

from filelock import FileLock

from moecc.backends.onnx.owned import make_own, require_own
from moecc.errors import MoeccError

NATIVE = Path(__file__).with_name("native")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    # No fast-math, so NaN and infinity stay what they are. These drop only guarantees that hinder
    # vectorising and change no number.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
SANITIZE = (
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)
_AVX512 = ("f", "bw", "vl", "vbmi", "vnni")
# The kernel files of an architecture besides kernel_scalar.cc, and their flags.
KERNELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "kernel_avx2.cc": ("-mavx2", "-mfma", "-mf16c"),
        "kernel_avx512.cc": ("-mfma", "-mf16c", *(f"-mavx512{part}" for part in _AVX512)),
    },
    "aarch64": {"kernel_neon.cc": ()},
}
_BUILDING = "building-"
COMPILERS = ("c++", "g++", "clang++")
_NAMES = {"amd64": "x86_64", "arm64": "aarch64"}


def library(*, sanitize: bool = False) -> Path:
    """Return the shared library for `SessionOptions.register_custom_ops_library`.

    It is compiled unless the cache has it: $MOECC_CACHE/ops, else ~/.cache/moecc/ops. Its name has
    a digest of sources, flags and compiler. sanitize: with address and undefined-behaviour checks,
    for tests. Raise MoeccError if there is no compiler, if it fails, or if someone else may write
    to the cache: a library is code that runs.
    """
    return compiled(compiler(), platform.machine(), SANITIZE if sanitize else ())


def compiled(cxx: tuple[str, ...], machine: str, flags: tuple[str, ...] = ()) -> Path:
    """Return the `library` of a given compiler and architecture."""
    machine = _NAMES.get(machine.lower(), machine.lower())
    own = KERNELS.get(machine, {})
    foreign = {name for files in KERNELS.values() for name in files} - own.keys()
    sources = [path for path in sorted(NATIVE.glob("*.cc")) if path.name not in foreign]
    digest = hashlib.sha256(repr((_version(cxx), machine, FLAGS, flags, own)).encode())
    for path in sorted((*NATIVE.glob("*.h"), *NATIVE.glob("*.cc"))):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    place = os.path.expanduser(os.environ.get("MOECC_CACHE") or "~/.cache/moecc")
    folder = Path(os.path.realpath(place)) / "ops"
    result = folder / f"moecc_ops-{digest.hexdigest()[:16]}.so"
    try:
        make_own(folder)
        require_own(folder)
        with FileLock(folder / ".lock"):  # a second process waits for the first's file
            for left in folder.glob(f"{_BUILDING}*"):  # by a process that was killed
                shutil.rmtree(left)
            if not result.is_file():
                with tempfile.TemporaryDirectory(dir=folder, prefix=_BUILDING) as place:
                    made = _compile(cxx, sources, own, flags, Path(place))
                    made.chmod(0o755)
                    made.replace(result)  # at once: a killed process leaves none
        require_own(result)
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
    """Compile the sources, each with its own flags, and link them in the folder `place`."""
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
    """Return what a compiler prints. Raise MoeccError with its first complaint if it fails.

    It runs in the folder of the sources. In the current one, which may have been downloaded, files
    could pass for its headers (an empty entry in CPATH) or its modules (CXX="python -m ...").
    """
    try:
        done = subprocess.run(
            command,
            cwd=NATIVE,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise MoeccError(
            f"can't run the compiler {command[0]}: {error.strerror}; set CXX to another one"
        ) from error
    if done.returncode:
        lines = done.stderr.splitlines()
        ended = f"exit code {done.returncode}" if done.returncode > 0 else "a signal ended it"
        said = [line for line in lines if "error" in line] or lines or [ended]
        raise MoeccError(
            f"{command[0]} can't compile the op library: {said[0].strip()}; "
            "set CXX to another C++17 compiler"
        )
    return done.stdout


def compiler() -> tuple[str, ...]:
    """Return the command $CXX, else the first of the usual names that is installed.

    Raise MoeccError if there is none.
    """
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise MoeccError(f"CXX is no command ({error}); set it to a C++17 compiler") from error
    if chosen:
        if not (found := shutil.which(chosen[0])):
            raise MoeccError(f"CXX is '{chosen[0]}', which is not installed")
        return (os.path.abspath(found), *chosen[1:])  # for `run`, which is in another folder
    for name in COMPILERS:
        if found := shutil.which(name):
            return (os.path.abspath(found),)
    raise MoeccError("the op library needs a C++17 compiler: install g++ or clang++, or set CXX")


@cache
def _version(cxx: tuple[str, ...]) -> str:
    return run([*cxx, "--version"])

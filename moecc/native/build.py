"""Libraries of C++ sources: compiled by the system's compiler, then kept in a cache.

Every kernel file is compiled with the flags of its own instruction set. The CPU decides which one
runs, so a library may be copied to another machine of the same architecture.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from filelock import FileLock

from moecc.errors import MoeccError
from moecc.native.owned import make_own, require_own

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
_BUILDING = "building-"
COMPILERS = ("c++", "g++", "clang++")
_NAMES = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Library:
    """A shared library. folder: of its sources, *.cc and *.h.

    kernels: of each architecture, the files for it alone and their flags. what: it is, in messages.
    """

    name: str
    what: str
    folder: Path
    kernels: Mapping[str, Mapping[str, tuple[str, ...]]]

    def path(self, *, sanitize: bool = False) -> Path:
        """Return the library's file for this machine.

        It is compiled unless the cache has it: $MOECC_CACHE/ops, else ~/.cache/moecc/ops. Its name
        has a digest of sources, flags and compiler. sanitize: with address and undefined-behaviour
        checks, for tests. Raise MoeccError if there is no compiler, if it fails, or if someone else
        may write to the cache: a library is code that runs.
        """
        cxx = compiler(self.what)
        return self.compiled(cxx, platform.machine(), SANITIZE if sanitize else ())

    def compiled(self, cxx: tuple[str, ...], machine: str, flags: tuple[str, ...] = ()) -> Path:
        """Return the file that a given compiler makes for an architecture."""
        machine = _NAMES.get(machine.lower(), machine.lower())
        own = self.kernels.get(machine, {})
        foreign = {name for files in self.kernels.values() for name in files} - own.keys()
        sources = [path for path in sorted(self.folder.glob("*.cc")) if path.name not in foreign]
        digest = hashlib.sha256(repr((_version(cxx), machine, FLAGS, flags, own)).encode())
        for path in sorted((*self.folder.glob("*.h"), *self.folder.glob("*.cc"))):
            digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
        place = os.path.expanduser(os.environ.get("MOECC_CACHE") or "~/.cache/moecc")
        folder = Path(os.path.realpath(place)) / "ops"
        result = folder / f"{self.name}-{digest.hexdigest()[:16]}.so"
        try:
            make_own(folder)
            require_own(folder)
            with FileLock(folder / ".lock"):  # a second process waits for the first's file
                for left in folder.glob(f"{_BUILDING}*"):  # by a process that was killed
                    shutil.rmtree(left)
                if not result.is_file():
                    with tempfile.TemporaryDirectory(dir=folder, prefix=_BUILDING) as place:
                        made = self._compile(cxx, sources, own, flags, Path(place))
                        made.chmod(0o755)
                        made.replace(result)  # at once: a killed process leaves none
            require_own(result)
        except OSError as error:
            raise MoeccError(
                f"can't write {self.what} to {folder}: {error.strerror}; set MOECC_CACHE"
            ) from error
        return result

    def _compile(
        self,
        cxx: tuple[str, ...],
        sources: list[Path],
        own: Mapping[str, tuple[str, ...]],
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
            list(pool.map(partial(run, what=self.what), commands))
        result = place / "library.so"
        run([*cxx, "-shared", *flags, *objects, "-o", str(result)], what=self.what)
        return result


def run(command: list[str], what: str = "a library") -> str:
    """Return what a compiler prints. Raise MoeccError with its first complaint if it fails.

    It runs in the folder of this file. In the current one, which may have been downloaded, files
    could pass for its headers (an empty entry in CPATH) or its modules (CXX="python -m ...").
    """
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent,
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
            f"{command[0]} can't compile {what}: {said[0].strip()}; "
            "set CXX to another C++17 compiler"
        )
    return done.stdout


def found_compiler() -> bool:
    """Return whether $CXX is set or one of the usual compilers is installed."""
    return bool(os.environ.get("CXX")) or any(map(shutil.which, COMPILERS))


def compiler(what: str = "a library") -> tuple[str, ...]:
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
    raise MoeccError(f"{what} needs a C++17 compiler: install g++ or clang++, or set CXX")


@cache
def _version(cxx: tuple[str, ...]) -> str:
    return run([*cxx, "--version"])

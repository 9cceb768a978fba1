"""What an artifact can be lowered to, and what runs a compressed module where it lies.

A `Target` is a frozen dataclass with options, as a pass is: `onnx{profile=native,opset=21}`. It is
found by name in `moecc.backends`, by entry point, or by the path of a Python file.
`backends/README.md` says how to write one.

A target may also bring `Kernels` for a type of device. They want codes in an order of their own, in
which a module keeps them while it is on such a device; what a module saves is always as
`moecc.ir.vq4` says. Packed codes run through one op, moecc::vq_experts_packed, which the target
triton defines on the order of its tiles. So only that target brings kernels today; a second one
needs an op of its own first. They are looked for when tensors come to a device that is not the CPU.
MOECC_KERNELS=reference makes the reference run on every device; without it, a card that the kernels
do not support is an error.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecc.errors import MoeccError, naming
from moecc.options import Options, items
from moecc.registry import Registry
from moecc.types import Say

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "MOECC_KERNELS"
_CHOICES = ("auto", "reference")


@dataclass(frozen=True)
class Emitted:
    """What a target wrote.

    out: the folder; None if the artifact itself is what runs. facts: values that JSON holds.
    summary: one line for users.
    """

    out: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""


@dataclass(frozen=True)
class Sizes:
    """The number of weights that an artifact stands for, and the bytes that it takes."""

    weights: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Target(Options, ABC):
    """One form in which an artifact runs. Its fields are its options (`moecc.options.option`)."""

    def require(self) -> None:
        """Raise MoeccError, before any work, if a package that `emit` needs is not installed."""
        return None

    def check(self, source: Path) -> None:
        """Raise MoeccError, before any pass runs, if what comes of the model can't be written."""
        return None

    def least_bytes(self, source: Path, artifact: Sizes) -> int:
        """Return the bytes that `emit` needs on the disk at least, for checks before any work.

        source: the folder of the model that the artifact was or will be made from, or its own.
        """
        return 0

    @abstractmethod
    def emit(self, artifact: Path, out: Path, say: Say) -> Emitted:
        """Write the artifact in the folder `artifact` as the new folder `out`.

        Write all of it or nothing. say: takes remarks. Raise MoeccError if it can't be written.
        """

    def build(self, say: Say) -> list[Path]:
        """Compile this target's native libraries ahead of their first use; return their paths."""
        return []

    def exported(self, folder: Path) -> bool:
        """Return whether `folder` holds what this target wrote."""
        return False

    def bench(
        self, folder: Path, *, threads: Sequence[int], prompt: int, new_tokens: int, say: Say
    ) -> Any:
        """Measure what `emit` wrote on this machine; return rows that JSON holds.

        Raise MoeccError if there is no benchmark.
        """
        raise MoeccError(f"{self.name} has no benchmark")

    def table(self, rows: Any) -> str:
        """Return the rows of `bench` as text; raise MoeccError if there is no benchmark."""
        raise MoeccError(f"{self.name} has no benchmark")

    def kernels(self) -> Kernels | None:
        """Return this target's kernels for a type of device, None if it has none."""
        return None


class Kernels(ABC):
    """Code that runs compressed experts on one type of device.

    It prepares the operands of moecc::vq_experts_packed; see the module's docstring.
    """

    device: str  # the type, as torch calls it: "cuda"
    name: str  # of the target

    @abstractmethod
    def require_device(self) -> None:
        """Raise MoeccError, in one line, if a package or a card that they need is missing."""

    @abstractmethod
    def pack(
        self, tensors: Mapping[str, Tensor | None], *, gated: bool
    ) -> dict[str, Tensor | None]:
        """Return the tensors of `vq4.TENSORS` with codes and signs in the kernels' order.

        gated: the rows are gate rows, then as many up rows.
        """

    @abstractmethod
    def unpack(
        self, tensors: Mapping[str, Tensor | None], columns: int, *, gated: bool
    ) -> dict[str, Tensor | None]:
        """Return packed tensors in the stored order again.

        columns: K of the stored codes. gated: as for `pack`.
        """


TARGETS: Registry[Target] = Registry(Target, "moecc.backends", "target", "targets")  # type: ignore[type-abstract]


def parse_target(text: str) -> Target:
    """Return the target that `text` names, such as `onnx{profile=native}`.

    Raise MoeccError if there is none, an option is wrong, or a package that it needs is missing.
    """
    found = items(text, "target")
    if len(found) != 1:
        raise MoeccError(
            f"{text!r} names {len(found)} targets; give one of {', '.join(TARGETS.names())}"
        )
    name, options = found[0]
    target = TARGETS.find(name).build_from(options)
    with naming(target):
        target.require()
    return target


def emit(target: Target, artifact: Path, out: Path, say: Say) -> Emitted:
    """Let `target` write the artifact, and return what it wrote.

    Raise its own MoeccError, or one that names the target if it fails otherwise.
    """
    with naming(target):
        found = target.emit(artifact, out, say)
    if not isinstance(found, Emitted):
        raise MoeccError(f"{target} returned {found!r}; its emit returns an Emitted")
    return found


def kernels_for(device: str) -> Kernels | None:
    """Return the kernels for tensors on a type of device; None if the reference runs there.

    Raise MoeccError if a target has kernels for it but the machine lacks what they need.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in _CHOICES:
        raise MoeccError(f"{VARIABLE} is {choice!r}; it takes {' or '.join(_CHOICES)}")
    if device in ("cpu", "meta") or choice == "reference":
        return None
    found = next((k for k in _all_kernels() if k.device == device), None)
    if found is not None:
        found.require_device()
    return found


def kernels_called(name: str) -> Kernels:
    """Return the kernels of the target `name`, in whose order a module's codes are."""
    return next(k for k in _all_kernels() if k.name == name)


@cache
def _all_kernels() -> tuple[Kernels, ...]:
    """Return the kernels of all targets.

    Every projection asks at every move, and a search reads the metadata of all installed packages.
    """
    found: list[Kernels] = []
    for name, cls in TARGETS.classes().items():
        with naming(name):
            kernels = cls().kernels()
        found += [] if kernels is None else [kernels]
    return tuple(found)

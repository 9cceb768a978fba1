"""Which code runs a compressed module where it lies: the op's reference, or a backend that has kernels for the device.

A backend with kernels has a `DEVICE` ("cuda"), says what one lacks (`require_device`), and wants codes in an order of its own, in
which a module keeps them while it is on such a device. What a module saves is always as `moecc.vq4` says. Backends are looked for
when tensors come to a device that isn't the CPU, and not before.

MOECC_KERNELS=reference makes the reference run on every device. Without it a card that the kernels don't support is an error.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from types import ModuleType

from moecc.errors import MoeccError

VARIABLE = "MOECC_KERNELS"
_CHOICES = ("auto", "reference")


def backends() -> list[str]:
    """The names of all backends there are."""
    import moecc.backends

    return sorted(m.name for m in pkgutil.iter_modules(moecc.backends.__path__) if not m.name.startswith("_"))


def kernels_for(device: str) -> ModuleType | None:
    """The backend with kernels for tensors on a type of device; None where the reference runs.

    MoeccError in one line where there is a backend, but not what it needs."""
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in _CHOICES:
        raise MoeccError(f"{VARIABLE} is {choice!r}; it takes {' or '.join(_CHOICES)}")
    if device in ("cpu", "meta") or choice == "reference":
        return None
    for name in backends():
        found = importlib.import_module(f"moecc.backends.{name}")
        if getattr(found, "DEVICE", None) == device:
            found.require_device()
            return found
    return None

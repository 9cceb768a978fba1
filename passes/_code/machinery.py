"""Which loops code on this machine: their last bits differ."""

from __future__ import annotations

import os
import shutil

import torch

from moecc.errors import MoeccError
from moecc.passes._code import native, triton_coder

_SLOW = "or MOECC_NATIVE=0 to do without it, which takes many times as long"


def coding_by(device: torch.device) -> str:
    """Return which loops code on a device, for `Pass.machinery`.

    Raise MoeccError if it is a GPU without what its loops take, unless $MOECC_NATIVE is 0.
    """
    if device.type == "cpu":
        compiled = native.compiled()
        return "coding by torch" if compiled is None else f"coding by {compiled.name.decode()}"
    if triton_coder.runs_on(device):
        _require_compiler()
        from moecc.passes._code import triton_kernels

        return f"coding by triton {triton_kernels.VERSION}"
    if triton_coder.wanted_on(device):
        raise MoeccError(f"coding on {device} takes triton: pip install 'moecc[triton]', {_SLOW}")
    return "coding by torch"


def _require_compiler() -> None:
    """Raise MoeccError if triton, which compiles what starts a kernel, will find no C compiler."""
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang")))):
        raise MoeccError(f"triton needs a C compiler: install gcc or clang, or set CC, {_SLOW}")

"""The native op library: `native/`, compiled by the system's compiler (`moecc.native.build`)."""

from __future__ import annotations

from pathlib import Path

from moecc.native.build import Library

_AVX512 = ("f", "bw", "vl", "vbmi", "vnni")
# The kernel files of an architecture besides kernel_scalar.cc, and their flags.
KERNELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "kernel_avx2.cc": ("-mavx2", "-mfma", "-mf16c"),
        "kernel_avx512.cc": ("-mfma", "-mf16c", *(f"-mavx512{part}" for part in _AVX512)),
    },
    "aarch64": {"kernel_neon.cc": ()},
}
OPS = Library("moecc_ops", "the op library", Path(__file__).with_name("native"), KERNELS)


def library(*, sanitize: bool = False) -> Path:
    """Return the shared library for `SessionOptions.register_custom_ops_library`.

    `Library.path` says where it is kept and what is raised. native/isa.cc chooses the kernels.
    """
    return OPS.path(sanitize=sanitize)

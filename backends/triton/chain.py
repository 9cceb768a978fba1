"""Overlap the launches of a layer's kernels on sm_90, which saves a microsecond per launch.

Programmatic dependent launch (CUDA C++ Programming Guide) launches a kernel while its predecessor
is still finishing. Every kernel begins with `after_last`, which waits for the predecessor to end; a
kernel reads and writes nothing before that. It calls `let_next_start` after most of its own work: a
product whose programs arrive while another product runs is spread unevenly over the card. The first
kernel of a layer is launched as usual, after all earlier work.
"""

import triton
import triton.language as tl


@triton.jit
def after_last(HOPPER: tl.constexpr):
    """Wait until the previous kernel has ended."""
    if HOPPER:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def let_next_start(HOPPER: tl.constexpr):
    """Allow the next kernel to be launched."""
    if HOPPER:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0",
            "=r",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

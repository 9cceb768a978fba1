"""A layer's kernels in a row: on sm_90 each is launched while the one before still ends (programmatic dependent launch, CUDA C++
Programming Guide), which takes a microsecond less between each two of them.

A kernel begins with `after_last`, which waits until the one before has ended; before it reads and writes nothing. It calls
`let_next_start` when that was waited for and most of its own work is done: a product whose programs come while another still runs
is spread unevenly over the card. The first kernel of a row is launched as usual, after all that was launched before.
"""

import triton
import triton.language as tl


@triton.jit
def after_last(HOPPER: tl.constexpr):
    if HOPPER:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )  # fmt: skip


@triton.jit
def let_next_start(HOPPER: tl.constexpr):
    if HOPPER:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )  # fmt: skip

"""What a bit is worth: at high rate a coding error falls by 4 for each bit per weight (Shannon's 6 dB a bit).

An ingredient that costs b bits per weight and turns an error e into e' is worth its bits where log2(e / e') / 2 > b.
"""

from __future__ import annotations

import math


def gain(before: float, after: float, bits: float) -> float:
    """Bits per weight that an ingredient saves beyond the `bits` it costs; negative where it does not earn them."""
    if before <= 0 or after <= 0:
        return -bits if before <= after else math.inf
    return math.log2(before / after) / 2 - bits

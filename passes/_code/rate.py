"""The worth of a bit: at high rate, each bit per weight divides a coding error by 4.

This is Shannon's 6 dB a bit. So an ingredient that costs b bits per weight and turns an error e
into e' is worth its bits if log2(e / e') / 2 > b.
"""

from __future__ import annotations

import math


def gain(before: float, after: float, bits: float) -> float:
    """Bits per weight that an ingredient saves beyond the `bits` that it costs.

    before, after: the error without and with it. Negative if it does not earn its bits.
    """
    if before <= 0 or after <= 0:
        return -bits if before <= after else math.inf
    return math.log2(before / after) / 2 - bits

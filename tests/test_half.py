"""Rounding to 16 bits: float16 or bfloat16, whichever loses less."""

from __future__ import annotations

import pytest
import torch

from moecc.passes._code.half import compact


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.0, 0.1, 3.0], torch.float16),
        ([0.01, 0.02, 1e-7], torch.float16),  # the tiny value hardly counts beside the others
        ([0.01, 0.0], torch.float16),
        ([1.0, 0.5], torch.float16),  # both hold these exactly
        ([1e5, 1.0], torch.bfloat16),  # above float16's range
        ([1e-8, 2e-8], torch.bfloat16),  # below it
    ],
)
def test_compact_chooses_the_type_that_loses_less(values: list[float], dtype: torch.dtype) -> None:
    got = compact(torch.tensor(values))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), torch.tensor(values), rtol=5e-3, atol=1e-7)

"""The dtype that a tensor is loaded in, and which values no checkpoint may hold."""

from __future__ import annotations

import math

import pytest
import torch
from checkpoints import fails
from torch import nn

from moecc.checkpoint.values import kept_dtype, planned_dtype, require_finite, require_squares

LARGEST = 1e15


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_matrix_whose_squares_add_up_beyond_float32_is_refused(
    sign: int, dtype: torch.dtype
) -> None:
    most = torch.tensor(LARGEST, dtype=dtype)
    if most > LARGEST:  # rounded up
        most = torch.nextafter(most, torch.zeros_like(most))
    beyond = torch.nextafter(most, torch.full_like(most, math.inf))
    for shape in ((3, 4), (1, 1), (2, 1, 3)):
        weight = torch.ones(shape, dtype=dtype)
        weight.view(-1)[-1] = sign * most
        require_squares(weight, "fine")
        weight.view(-1)[-1] = sign * beyond
        said = f"'w' in f holds {float(beyond):.3g}, and float32"
        fails(lambda weight=weight: require_squares(weight, "'w' in f"), said)


def test_single_rows_codes_and_empty_weights_may_hold_anything() -> None:
    huge = torch.full((4,), 1e30)
    require_squares(huge, "bias")
    require_squares(torch.full((2, 2), 1 << 60), "codes")
    require_squares(torch.empty(0, 4), "empty")
    fails(lambda: require_squares(huge[None], "'w' in f"), "'w' in f holds 1e+30")


def test_the_number_of_values_that_are_no_numbers_is_told() -> None:
    weight = torch.ones(2, 3)
    require_finite(weight, "fine")
    require_finite(torch.ones(2, dtype=torch.int64), "codes")
    weight[0, 1] = math.nan
    fails(lambda: require_finite(weight, "'w' in f"), "'w' in f holds 1 NaN", "of 6")


class Planned(nn.Linear):
    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {"router.*.bias": torch.float32, "bias": dtype, "scale": torch.float64}


def test_the_first_exception_that_fits_a_name_decides_its_dtype() -> None:
    module = Planned(2, 2)
    found = {
        name: planned_dtype(module, name, torch.bfloat16)
        for name in ("a.router.gate.bias", "a.bias.b", "a.scale", "a.weight")
    }
    assert list(found.values()) == [torch.float32, torch.bfloat16, torch.float64, None]
    assert planned_dtype(nn.Linear(2, 2), "bias", torch.bfloat16) is None


def test_a_tensor_that_is_no_parameter_keeps_its_dtype() -> None:
    module, half = nn.Linear(2, 2), torch.ones(2, dtype=torch.float16)
    assert kept_dtype(module, "weight", module.weight, torch.bfloat16) == torch.bfloat16
    assert kept_dtype(module, "made_by_a_hook", torch.ones(2), torch.bfloat16) == torch.float32
    assert kept_dtype(nn.Module(), "x", half, torch.bfloat16) == torch.float16

"""The experts that tuning differentiates, against the op's definition and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from coders import BITS, loops
from layers import FEATURES, ROUTINGS, Layer, draw_layer, draw_routed
from op_calls import CALLS
from torch import Tensor

from moecc.ir import ops, vq4
from moecc.passes._tune.experts import coded_experts
from moecc.passes._tune.lookup import CodedMatrix

__all__ = ["loops"]  # a fixture

Experts = Callable[..., Tensor]


def gradients(run: Experts, args: list[Any], attributes: dict[str, Any]) -> list[Tensor]:
    """Return the output and its gradients in every operand that holds no codes or choices."""
    exact = [t is None or t.dtype in (torch.uint8, torch.int64) for t in args]
    kind = args[0].dtype
    given = [
        t if same else t.to(kind).clone().requires_grad_()
        for t, same in zip(args, exact, strict=True)
    ]
    y = run(*given, **attributes)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(kind)
    sources = [t for t, same in zip(given, exact, strict=True) if not same]
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), sources)]


def operands(layer: Layer, dtype: torch.dtype) -> list[Any]:
    """Return a layer's arguments of the op; floats in `dtype`."""
    found: list[Any] = [layer.x, layer.index, layer.weight]
    for p in (layer.gate_up, layer.down):
        found += [*(p[name] for name in vq4.TENSORS), None, None]
    found.append(layer.post_norm)
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in found]


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("vq")])
def test_values_and_gradients_are_those_of_the_reference(name: str) -> None:
    _, args, attributes = CALLS[name]
    wanted = gradients(ops.vq_experts_reference, args, attributes)
    for got, want in zip(gradients(coded_experts, args, attributes), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", FEATURES)
def test_float32_gives_the_same_within_its_rounding(bits: int, name: str, loops: None) -> None:
    layer = draw_layer(bits, hidden=44, tokens=9, **FEATURES[name])
    close(layer)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_any_routing_gives_the_same(routing: str, loops: None) -> None:
    close(draw_routed(routing, 2))


def close(layer: Layer) -> None:
    attributes = dict(layer.attributes)
    wanted = gradients(ops.vq_experts_reference, operands(layer, torch.float64), attributes)
    for got, want in zip(
        gradients(coded_experts, operands(layer, torch.float32), attributes), wanted, strict=True
    ):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("bits", BITS)
def test_many_rows_are_pulled_back_in_parts_for_any_number_of_threads(
    bits: int, loops: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """600 rows of 44 columns, the last codes half padding at two or three bits."""
    layer = draw_layer(bits, experts=1, hidden=44, intermediate=300)
    p = layer.gate_up
    codes, signs, book, scale = (None if p[n] is None else p[n][0] for n in vq4.CODED)
    assert codes is not None and book is not None and scale is not None
    drawn = torch.Generator().manual_seed(1)
    grad = torch.randn(600, 42, generator=drawn)
    found = []
    for count in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        matrix = CodedMatrix(codes, signs, book.float(), scale.float())
        found.append([*matrix.pull(grad), matrix.decode(torch.empty(600, 42))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    matrix = CodedMatrix(codes, signs, book.double(), scale.double())
    wanted = [*matrix.pull(grad.double()), matrix.decode(torch.empty(600, 42).double())]
    for got, want in zip(found[0], wanted, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()

"""A layer's experts as a list of kernel launches: `plan` makes it, `vq_experts` runs it.

  1. prepare        sort slots by expert; x to fixed point; z = basis x. With many slots, `count`
     first
  2. mean           gate_up's mean, once per token: the same product as 3 with one expert
  3. gate_up        grouped; it applies the gate unless the columns are split among programs
  4. hidden         sum what was split and apply the gate; hidden units to fixed point
  5. mean, coef     down's mean on sum_j w_j h_j, once per token (per slot before a norm);
     coefficients
                    of the basis per slot
  6. down           grouped
  7. combine        sum over a token's choices with routing weights, plus shared terms; or norm,
     then sum

In bfloat16 (`Tile.half`) 1 reorders x, 3 leaves hidden units as floats, and 4 is either nothing or
the sums for 5.

Fixed point has one scale per token and STEP columns (128 to 512: what one step of the product
covers). With one scale per token, an outlier channel would cost all other channels their precision;
so it costs only those of its block (measured in tests/test_triton_interp.py). The product applies
the scale once per step, which is a twentieth of its instructions.

A plan depends on shapes and never on values, so `plan` also accepts tensors on the meta device
(`moecc.backends.triton.abstract`).
Shapes: T tokens, k choices each, S = T k slots, E experts, D hidden, F intermediate, r rank.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from typing import Unpack

import torch
import triton
from torch import Tensor

from moecc.backends.triton import around, matmul
from moecc.backends.triton.call import Call
from moecc.backends.triton.pack import Projection
from moecc.backends.triton.parts import Attributes, Blocks, LowRank, Matrices, Plan, Rows
from moecc.backends.triton.tiles import Card, Tile, card_of, choose_tile
from moecc.errors import MoeccError
from moecc.ir.gates import rows_per_unit

_MOST_SLOTS = 1 << 17
_SHARED_SIZE, _MAX_DYNAMIC_SHARED_SIZE = 1, 8  # CUfunction_attribute


def _allow_shared_memory(
    module: object, function: int, name: str, group: object, digest: str
) -> None:
    """Permit a newly loaded kernel to use more than 48 KB of shared memory; triton calls this.

    CUDA has to be asked for more (driver API, cuFuncSetAttribute). Triton asks when its own part is
    larger, but it does not count the table in which products look codes up.
    """
    if name not in ("grouped_kernel", "persistent_kernel") or torch.version.hip:
        return
    active = triton.runtime.driver.active
    most = active.utils.get_device_properties(active.get_current_device())["max_shared_mem"]
    cuda, handle, static = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(function), ctypes.c_int()
    failed = cuda.cuFuncGetAttribute(ctypes.byref(static), _SHARED_SIZE, handle)
    failed = failed or cuda.cuFuncSetAttribute(
        handle, _MAX_DYNAMIC_SHARED_SIZE, most - static.value
    )
    if failed:
        raise MoeccError(
            f"CUDA error {failed}: the driver grants moecc's kernel {name} no more than 48 KB of "
            "shared memory"
        )


triton.knobs.runtime.kernel_load_end_hook.add(_allow_shared_memory)


def vq_experts(
    x: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    gate_up: Projection,
    down: Projection,
    post_norm: Tensor | None,
    **attributes: Unpack[Attributes],
) -> Tensor:
    """Run moecc::vq_experts on packed codes.

    x is [T, D] of any float type, topk_index and topk_weight [T, k]; the result is [T, D]. A choice
    outside 0..E-1 counts as zero. Runs on CUDA and ROCm, and on the CPU if triton was imported
    under TRITON_INTERPRET=1.
    """
    most = most_tokens(topk_index.shape[1])
    if len(x) > most:
        pieces = zip(*(t.split(most) for t in (x, topk_index, topk_weight)), strict=True)
        return torch.cat(
            [vq_experts(s, i, w, gate_up, down, post_norm, **attributes) for s, i, w in pieces]
        )
    made = plan(x, topk_index, topk_weight, gate_up, down, post_norm, **attributes)
    # triton launches on the current device, which need not be x's
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        for launch in made.launches:
            launch()
    return made.out


def most_tokens(choices: int) -> int:
    """Return how many tokens one plan can have.

    A grid has at most 65535 blocks, of 8 slots or more, and the float32 tensors between products
    have a row for every slot.
    """
    return max(1, _MOST_SLOTS // max(1, choices))


def plan(
    x: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    gate_up: Projection,
    down: Projection,
    post_norm: Tensor | None,
    *,
    tile: Tile | None = None,
    card: Card | None = None,
    **attributes: Unpack[Attributes],
) -> Plan:
    """Return the launches of one call of `vq_experts`.

    tile overrides the table of tiles; card overrides the device that x is on.
    """
    card = card or card_of(x.device)
    made = Plan(torch.empty_like(x, memory_format=torch.contiguous_format))
    up, below = Matrices.of(gate_up), Matrices.of(down)
    assert up is not None and below is not None
    slots, experts = topk_index.numel(), up.scale.shape[0]
    if not slots:
        made.out.zero_()
        return made
    based = gate_up.get("basis") is not None or down.get("basis") is not None
    wide = 4 in (up.bits, below.bits) or based
    chosen = tile or choose_tile(slots, experts, card, x.dtype, wide=wide)
    _check(chosen, x.dtype, wide)
    call = Call(
        launches=made.launches,
        index=topk_index.contiguous(),
        weight=topk_weight.contiguous(),
        experts=experts,
        tile=chosen,
        forced=tile is not None,
        card=card,
        dtype=x.dtype,
        limits={"alpha": attributes["alpha"], "limit": attributes["limit"]},
        act=attributes["act"],
        gate=attributes["gate"],
    )
    layer = (gate_up, up), (down, below), post_norm, attributes["eps"]
    _add_layer(call, x.contiguous(), *layer, made.out)
    return made


def _check(tile: Tile, dtype: torch.dtype, wide: bool) -> None:
    """Assert that the kernels can run this tile. wide: as in `choose_tile`."""
    assert not (tile.half and tile.waves)  # nothing adds up split 16-bit hidden units
    if tile.persistent:  # the limits of `moecc.backends.triton.hopper`
        assert not wide and dtype == torch.bfloat16 and tile.half and tile.unroll == 1, tile
        assert tile.height % 2 == 0 and tile.stages > 2 and tile.copies > 1, tile


def _add_layer(
    call: Call,
    x: Tensor,
    gate_up: tuple[Projection, Matrices],
    down: tuple[Projection, Matrices],
    post_norm: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    """Append the launches of one layer, in the order of the module's docstring."""
    (first, up), (second, below) = gate_up, down
    rows, blocks, z = around.prepare(call, x, first.get("basis"), up.column_tiles)
    shared = matmul.mean(call, "gate_up mean", first, rows, x.shape[1], gated=call.gated)
    # without a norm, down's mean applies to sum_j w_j h_j, once per token
    summed = second.get("mean_codes") is not None and post_norm is None
    h, averaged = _gate_up(
        call,
        up,
        rows,
        blocks,
        x.shape[1],
        bias=first.get("bias"),
        shared=shared,
        low=_low_rank(first, z),
        column_tiles=below.column_tiles,
        summed=summed,
    )
    units = up.rows // rows_per_unit(call.gate)
    mean = matmul.mean(call, "down mean", second, averaged, units, gated=False)
    c = matmul.coefficients(call, second, h, blocks, units)
    bias, half = second.get("bias"), call.tile.half
    y = matmul.product(call, "down", below, h, blocks, units, bias=bias, rounded=half)
    around.combine(call, y, mean, c, second.get("basis"), post_norm, eps, out)


def _gate_up(
    call: Call,
    m: Matrices,
    x: Rows,
    blocks: Blocks,
    columns: int,
    *,
    bias: Tensor | None,
    shared: Tensor | None,
    low: LowRank | None,
    column_tiles: int,
    summed: bool,
) -> tuple[Rows, Rows]:
    """Return the hidden units of the S slots, and the rows that down's mean multiplies.

    These are T sums over a token's choices if `summed`, else the hidden units themselves.
    column_tiles: of down.
    """
    units = m.rows // rows_per_unit(call.gate)
    into = None
    if x.scale is None:
        into = call.rows(x.values, call.slots, column_tiles, filled=units)
    out = matmul.product(
        call,
        "gate_up",
        m,
        x,
        blocks,
        columns,
        bias=bias,
        shared=shared,
        low=low,
        gated=call.gated,
        fuse=True,
        top_k=call.choices,
        into=into,
    )
    if into:
        return into, around.sums(call, into) if summed else into
    return around.hidden(call, out, units, column_tiles, summed=summed)


def _low_rank(p: Projection, z: Tensor | None) -> LowRank | None:
    coef, scale = p.get("coef"), p.get("coef_scale")
    if z is None or coef is None or scale is None:
        return None
    return LowRank(z, coef.contiguous(), scale.contiguous())

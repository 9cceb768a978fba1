"""A layer's experts as a list of kernel launches: `plan` allocates and decides, `vq_experts` runs what it decided.

  1. prepare        slots sorted by expert; x as fixed point; z = basis x; before it count, where the slots are many
  2. mean           once per token, where gate_up has one: the same product as 3 with one expert
  3. gate_up        grouped; the gate is applied here unless the columns are split among programs
  4. hidden         sums what was split, applies the gate then; hidden units as fixed point
  5. mean, coef     where down has them: on sum_j w_j h_j once per token (per slot before a norm); per slot
  6. down           grouped
  7. combine        routing weights, sum over a token's choices, what is shared; or the norm and then these

In bfloat16 (`Tile.half`) 1. puts x in order and 3. leaves hidden units as floats, so that 4. is nothing, or the sums of 5.

Fixed point has one scale per token and STEP columns (128 to 512: what one step of the product covers). With one scale per
token an outlier channel would cost all others their precision, with these it costs its block's (measured in
tests/test_triton_interp.py), and the scale is applied once per step, a twentieth of the instructions.

A plan depends on shapes and never on values, so it can be made of tensors on the meta device (`moecc.backends.triton.aot`).
Shapes: T tokens, k choices each, S = T k slots, E experts, D hidden, F intermediate, r rank.
"""

from __future__ import annotations

import ctypes
import math
import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from moecc.backends.triton.around import (
    GROUP,
    combine_kernel,
    count_kernel,
    hidden_kernel,
    norm_kernel,
    prepare_kernel,
    sums_kernel,
)
from moecc.backends.triton.grouped import grouped_kernel
from moecc.backends.triton.pack import COLUMNS, ROWS, Projection, tiles
from moecc.backends.triton.tiles import Card, Tile, card_of, choose_tile, choose_unroll
from moecc.errors import MoeccError
from moecc.ir import vq4
from moecc.ir.gates import rows_per_unit

_MOST_SLOTS = 1 << 17
_UNCOUNTED = 4096  # slots that each of prepare's routing programs walks through, twice; more are counted before
_CHUNK = 2048  # slots of one step of a walk, and of a segment at least
_COUNTS = 4096  # that each of those programs reads; more where that is one segment
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # which takes no inline assembly


def _allow_shared_memory(module: Any, function: int, name: str, group: Any, digest: str) -> None:
    """What triton calls for a kernel that it has loaded: more than 48 KB of shared memory must be asked for (CUDA driver API,
    cuFuncSetAttribute). Triton does where its own part is more, and doesn't count the table that products look codes up in."""
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
            f"CUDA error {failed}: no more than 48 KB of shared memory can be had for a kernel of moecc's"
        )


_SHARED_SIZE, _MAX_DYNAMIC_SHARED_SIZE = 1, 8  # CUfunction_attribute
triton.knobs.runtime.kernel_load_end_hook.add(_allow_shared_memory)


class Launch(NamedTuple):
    """One kernel, its grid and everything that it is called with."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    def __call__(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)


@dataclass
class Plan:
    """The launches of one call in order, and the result [T, D] that the last of them writes."""

    out: Tensor
    launches: list[Launch] = field(default_factory=list)

    def named(self, name: str) -> Launch:
        return next(launch for launch in self.launches if launch.name == name)


class Rows(NamedTuple):
    """What a product multiplies: high and low bytes i8 [R, 2, steps * STEP] with scale f32 [R, steps], or bfloat16
    [R, steps * STEP] in the order of `grouped.paired`."""

    values: Tensor
    scale: Tensor | None
    unroll: int

    @property
    def steps(self) -> int:
        return self.values.shape[-1] // (COLUMNS * self.unroll)


class Matrices(NamedTuple):
    """Coded matrices [E, N, K] of one kind: an experts' projection, a mean (E = 1), or int8 coefficients (bits 8)."""

    bits: int
    words: Tensor
    signs: Tensor | None
    table: Tensor | None
    scale: Tensor

    @classmethod
    def of(cls, p: Projection, prefix: str = "") -> Matrices | None:
        words, signs, codebook, scale = (p.get(prefix + name) for name in vq4.CODED)
        if words is None or codebook is None or scale is None:
            return None
        bits = 3 if signs is not None else 4 if codebook.shape[2] == 2 else 2
        table = codebook.contiguous().view(torch.int16 if bits == 4 else torch.int32).squeeze(-1)
        signs = None if signs is None else signs.contiguous()
        return cls(bits, words.contiguous(), signs, table, scale.contiguous())


class Blocks(NamedTuple):
    """Slots sorted by expert into blocks of tile.tokens: i32 [number * tokens], i32 [number]. None: rows as they are."""

    tile: Tile
    number: int
    slots: Tensor | None = None
    experts: Tensor | None = None


def vq_experts(
    x: Tensor, topk_index: Tensor, topk_weight: Tensor, gate_up: Projection, down: Projection, post_norm: Tensor | None,
    *, act: str, gate: str, alpha: float, limit: float, eps: float,
) -> Tensor:  # fmt: skip
    """moecc::vq_experts on packed codes: x [T, D] of any float type, topk_index and topk_weight [T, k] -> [T, D].

    On CUDA and ROCm, and on the CPU where triton was imported under TRITON_INTERPRET=1. A choice outside 0..E-1 counts as zero.
    """
    told: dict[str, Any] = dict(act=act, gate=gate, alpha=alpha, limit=limit, eps=eps)
    most = most_tokens(topk_index.shape[1])
    if len(x) > most:
        pieces = zip(*(t.split(most) for t in (x, topk_index, topk_weight)), strict=True)
        return torch.cat(
            [vq_experts(s, i, w, gate_up, down, post_norm, **told) for s, i, w in pieces]
        )
    made = plan(x, topk_index, topk_weight, gate_up, down, post_norm, **told)
    with (
        torch.cuda.device(x.device) if x.is_cuda else nullcontext()
    ):  # triton launches on the current one
        for launch in made.launches:
            launch()
    return made.out


def most_tokens(choices: int) -> int:
    """Of one plan: a grid has 65535 blocks, of 8 slots or more, and what is between the products is float32 for every slot."""
    return max(1, _MOST_SLOTS // max(1, choices))


def plan(
    x: Tensor, topk_index: Tensor, topk_weight: Tensor, gate_up: Projection, down: Projection, post_norm: Tensor | None,
    *, act: str, gate: str, alpha: float, limit: float, eps: float, tile: Tile | None = None, card: Card | None = None,
) -> Plan:  # fmt: skip
    """The launches of one call. tile: instead of what the table has; card: instead of the device that x is on."""
    card = card or card_of(x.device)
    (tokens, hidden), choices = x.shape, topk_index.shape[1]
    made = Plan(torch.empty_like(x, memory_format=torch.contiguous_format))
    up, below = Matrices.of(gate_up), Matrices.of(down)
    assert up is not None and below is not None
    experts, slots = up.scale.shape[0], tokens * choices
    if not slots:
        made.out.zero_()
        return made
    wide = (
        4 in (up.bits, below.bits)
        or gate_up.get("basis") is not None
        or down.get("basis") is not None
    )
    chosen = tile or choose_tile(slots, experts, card, x.dtype, wide=wide)
    assert not (chosen.half and chosen.waves)  # its hidden units aren't added up
    if chosen.persistent:  # what `moecc.backends.triton.hopper` is written for
        assert not wide and x.dtype == torch.bfloat16 and chosen.half and chosen.unroll == 1, chosen
        assert chosen.height % 2 == 0 and chosen.stages > 2 and chosen.copies > 1, chosen
    build = _Builder(
        made.launches, experts, choices, slots, chosen, tile is not None, card, x.dtype,
        dict(alpha=alpha, limit=limit), dict(ACT=act, GATE=gate),
    )  # fmt: skip
    index, weight = topk_index.contiguous(), topk_weight.contiguous()
    rows = up.scale.shape[1]
    units = rows // rows_per_unit(gate)

    columns, blocks, z = build.prepare(
        x.contiguous(), index, gate_up.get("basis"), up.words.shape[3]
    )
    shared = build.mean("gate_up mean", gate_up, columns, rows, hidden, gated=gate != "none")
    coef, scale = gate_up.get("coef"), gate_up.get("coef_scale")
    low = (
        None
        if z is None or coef is None or scale is None
        else (z, coef.contiguous(), scale.contiguous())
    )
    summed = (
        down.get("mean_codes") is not None and post_norm is None
    )  # the mean then meets sum_j w_j h_j
    h, averaged = build.gate_up(
        up, gate_up.get("bias"), columns, blocks, rows, hidden, shared, low, index, weight, units, below.words.shape[3], summed,
    )  # fmt: skip
    mean = build.mean("down mean", down, averaged, hidden, units, gated=False)
    c = build.coefficients(down, h, blocks, units)
    y = build.product(
        "down", below, h, blocks, hidden, units, bias=down.get("bias"), rounded=chosen.half
    )
    build.combine(y, index, weight, mean, c, down.get("basis"), post_norm, eps, made.out)
    return made


def _power(n: int, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length())


@dataclass
class _Builder:
    """Appends launches; each method is one of the steps above and returns what it leaves in memory."""

    launches: list[Launch]
    experts: int
    choices: int
    slots: int
    tile: Tile
    forced: bool
    card: Card
    dtype: torch.dtype
    limits: dict[str, float]
    gate: dict[str, str]

    def add(
        self, name: str, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], warps: int, stages: int = 2,
        registers: int = 0,
    ) -> None:  # fmt: skip
        options = {"num_warps": warps, "num_stages": stages} | (
            {"maxnreg": registers} if registers else {}
        )
        if self.hopper and self.launches:
            options["launch_pdl"] = True  # `moecc.backends.triton.chain`
        self.launches.append(
            Launch(name, kernel, grid, {**arguments, "HOPPER": self.hopper}, options)
        )

    @property
    def hopper(self) -> bool:
        return self.card.name == "sm_90" and not INTERPRETED

    def rows(self, like: Tensor, count: int, column_tiles: int, filled: int | None = None) -> Rows:
        """Room for `count` rows. filled: columns that a kernel writes, where those past them aren't its own to write."""
        unroll = choose_unroll(column_tiles, self.tile.unroll)
        steps = -(-column_tiles // unroll)
        width = steps * unroll * COLUMNS
        if self.tile.half:
            new = like.new_empty if filled in (None, width) else like.new_zeros
            return Rows(new((count, width), dtype=self.dtype), None, unroll)
        values = like.new_empty((count, 2, width), dtype=torch.int8)
        return Rows(values, like.new_empty((count, steps), dtype=torch.float32), unroll)

    def count(self, index: Tensor) -> tuple[Tensor | None, int]:
        """How many slots of each segment go to each expert, i32 [segments, bins], and the slots of a segment. None: few slots."""
        if self.slots <= _UNCOUNTED:
            return None, 0
        bins = _power(self.experts, 32)
        span = _CHUNK * -(-self.slots // (_CHUNK * max(1, _COUNTS // bins)))
        counts = index.new_empty((-(-self.slots // span), bins), dtype=torch.int32)
        self.add("count", count_kernel, (counts.shape[0],), dict(
            index_ptr=index, counts_ptr=counts, slots=self.slots, span=span, EXPERTS=self.experts, BINS=bins, CHUNK=_CHUNK,
        ), warps=8)  # fmt: skip
        return counts, span

    def prepare(
        self, x: Tensor, index: Tensor, basis: Tensor | None, column_tiles: int
    ) -> tuple[Rows, Blocks, Tensor | None]:
        tokens, columns = x.shape
        made = self.rows(x, tokens, column_tiles)
        # at most one block per slot, and one that isn't full per expert that is chosen
        full = (
            self.slots + min(self.experts, self.slots) * (self.tile.tokens - 1)
        ) // self.tile.tokens
        count = min(self.slots, full)
        slots, owners = (
            x.new_empty(n, dtype=torch.int32) for n in (count * self.tile.tokens, count)
        )
        blocks = Blocks(self.tile, count, slots, owners)
        rank = 0 if basis is None else basis.shape[0]
        # every program that multiplies by z adds up its parts, so that they are few where there are many tokens
        z_span = 32 * -(-columns // (32 * max(1, min(made.steps, 1024 // tokens))))
        z_parts = -(-columns // z_span)
        z = (
            None
            if basis is None
            else x.new_empty((z_parts, tokens, _power(rank, 32)), dtype=torch.float32)
        )
        width = made.values.shape[-1]
        step = (
            COLUMNS * made.unroll if made.scale is not None else math.gcd(width, 1024)
        )  # columns of a program
        counts, span = self.count(index)
        segments, bins = counts.shape if counts is not None else (0, _power(self.experts + 1))
        # a scan of more slots takes registers that x's programs would be short of
        chunk = _CHUNK // 4 if segments else min(_power(self.slots, 128), _CHUNK)
        routes = segments * -(-self.experts // GROUP.value) if segments else self.experts
        programs = (
            routes + tokens * (width // step) + (0 if z is None else -(-tokens // 16) * z_parts)
        )
        self.add("prepare", prepare_kernel, (programs,), dict(
            x_ptr=x, index_ptr=index, counts_ptr=counts, basis_ptr=None if basis is None else basis.contiguous(), z_ptr=z,
            out_ptr=made.values, out_scale_ptr=made.scale, slots_ptr=slots, block_expert_ptr=owners, tokens=tokens,
            columns=columns, steps=width // step, slots=self.slots, blocks=count, segments=segments, span=span, z_parts=z_parts,
            z_span=z_span, rank=rank, EXPERTS=self.experts, BINS=bins, SEGMENTS=_power(segments, 2), TOKENS=self.tile.tokens,
            CHUNK=chunk, STEP=step, RANK=_power(rank, 32),
        ), warps=4)  # fmt: skip
        return made, blocks, z

    def parts(self, x: Rows, groups: int, blocks: Blocks) -> tuple[int, int]:
        """Programs that share the columns of one tile, and the steps of each."""
        wanted = (
            -(-blocks.tile.waves * self.card.processors // (groups * blocks.number))
            if blocks.tile.waves
            else 1
        )
        each = -(
            -x.steps // max(1, min(wanted, x.steps, 16))
        )  # what adds parts up has a load for each in its code
        return -(-x.steps // each), each

    def product(
        self, name: str, m: Matrices, x: Rows, blocks: Blocks, rows: int, columns: int, *, bias: Tensor | None = None,
        shared: Tensor | None = None, low: tuple[Tensor, Tensor, Tensor] | None = None, gated: bool = False, fuse: bool = False,
        top_k: int = 1, slots: int | None = None, into: Rows | None = None, rounded: bool = False,
    ) -> Tensor:  # fmt: skip
        """m x -> f32 [parts, slots, rows], of x's type if `rounded`; fuse: [slots, units] if the columns needn't be split, or what
        is to be filled."""
        row_tiles, slots = tiles(rows, gated=gated), self.slots if slots is None else slots
        groups = -(-row_tiles // blocks.tile.height)
        parts, each = self.parts(x, groups, blocks)
        fused = fuse and parts == 1
        shape = (slots, rows // 2 if gated else rows) if fused else (parts, slots, rows)
        out = (
            into.values
            if into
            else x.values.new_empty(shape, dtype=self.dtype if rounded else torch.float32)
        )
        z, coef, coef_scale = low or (None, None, None)
        column_tiles = m.words.shape[3] if m.bits != 8 else 0
        common: dict[str, Any] = dict(
            x_ptr=x.values, words_ptr=m.words, signs_ptr=m.signs, table_ptr=m.table, scale_ptr=m.scale,
            bias_ptr=None if bias is None else bias.contiguous(), shared_ptr=shared, out_ptr=out, slots_ptr=blocks.slots,
            block_expert_ptr=blocks.experts, rows=rows, out_width=out.shape[-1], row_tiles=row_tiles, column_tiles=column_tiles,
            table_stride=0 if m.table is None or m.table.shape[0] == 1 else vq4.CODEBOOK_SIZE, slots=slots, **self.limits,
            BITS=m.bits, GATED=gated, FUSED=fused, **self.gate, TOP_K=top_k, TOKENS=blocks.tile.tokens,
            HEIGHT=blocks.tile.height, SHARED=0 if shared is None else shared.shape[0],
            COPIES=1 if INTERPRETED else blocks.tile.copies,
        )  # fmt: skip
        if blocks.tile.persistent and self.hopper:
            # here, because Gluon changes from one version of triton to the next, and other cards don't need it
            from moecc.backends.triton.hopper import WARPS, persistent_kernel

            every = groups * blocks.number
            self.add(name, persistent_kernel, (min(self.card.processors, every),), dict(
                **common, groups=groups, tiles=every, STAGES=blocks.tile.stages,
            ), warps=WARPS)  # fmt: skip
            return out
        self.add(name, grouped_kernel, (groups, blocks.number, parts), dict(
            **common, x_scale_ptr=x.scale, z_ptr=z, coef_ptr=coef, coef_scale_ptr=coef_scale, columns=columns, steps=x.steps,
            steps_per_part=each, z_parts=0 if z is None else z.shape[0], z_tokens=0 if z is None else z.shape[1],
            rank=0 if coef is None else coef.shape[2], UNROLL=x.unroll, TAIL=column_tiles % x.unroll != 0,
            RANK=32 if z is None else z.shape[2], HALF=x.scale is None, UPCAST=INTERPRETED,
            NARROW=x.scale is None and blocks.slots is not None,
        ), warps=blocks.tile.warps, stages=blocks.tile.stages, registers=blocks.tile.registers)  # fmt: skip
        return out

    def mean(
        self, name: str, p: Projection, x: Rows, rows: int, columns: int, *, gated: bool
    ) -> Tensor | None:
        """What all experts share as it is, of every row of x: f32 [parts, R, rows], or None without one."""
        m = Matrices.of(p, vq4.MEAN)
        if m is None:
            return None
        count = x.values.shape[0]
        if x.scale is None:
            tile = (
                choose_tile(count, 1, self.card, self.dtype, wide=True)
                if self.tile.persistent
                else self.tile
            )
        else:
            tile = self.tile if self.forced else choose_tile(count, 1, self.card)
        blocks = Blocks(tile, -(-count // tile.tokens))
        return self.product(name, m, x, blocks, rows, columns, gated=gated, slots=count)

    def gate_up(
        self, m: Matrices, bias: Tensor | None, x: Rows, blocks: Blocks, rows: int, columns: int, shared: Tensor | None,
        low: Any, index: Tensor, weight: Tensor, units: int, column_tiles: int, summed: bool,
    ) -> tuple[Rows, Rows]:  # fmt: skip
        """Hidden units of the S slots, and what a shared mean multiplies: T sums over a token's choices if `summed`, else those."""
        gated = self.gate["GATE"] != "none"
        into = (
            self.rows(x.values, self.slots, column_tiles, filled=units) if x.scale is None else None
        )
        out = self.product(
            "gate_up", m, x, blocks, rows, columns, bias=bias, shared=shared, low=low, gated=gated, fuse=True,
            top_k=self.choices, into=into,
        )  # fmt: skip
        if into:
            return into, self.sums(into, index, weight) if summed else into
        return self.hidden(
            out, index, weight, units, column_tiles, fused=out.dim() == 2, summed=summed
        )

    def sums(self, h: Rows, index: Tensor, weight: Tensor) -> Rows:
        tokens, width = index.shape[0], h.values.shape[1]
        out = h.values.new_empty((tokens, width))
        self.add("sums", sums_kernel, (tokens, -(-width // 1024)), dict(
            h_ptr=h.values, index_ptr=index, weight_ptr=weight, out_ptr=out, width=width, EXPERTS=self.experts,
            TOP_K=self.choices, BLOCK=1024,
        ), warps=4)  # fmt: skip
        return Rows(out, None, h.unroll)

    def hidden(
        self,
        first: Tensor,
        index: Tensor,
        weight: Tensor,
        units: int,
        column_tiles: int,
        *,
        fused: bool,
        summed: bool,
    ) -> tuple[Rows, Rows]:
        """As fixed point. first: rows of every slot f32 [parts, S, rows], or `fused` hidden units [S, units]."""
        tokens = index.shape[0] if summed else 0
        made = self.rows(first, self.slots + tokens, column_tiles)
        assert made.scale is not None
        self.add("hidden", hidden_kernel, (self.slots + tokens, made.steps), dict(
            rows_ptr=first, index_ptr=index, weight_ptr=weight, out_ptr=made.values, out_scale_ptr=made.scale,
            rows=units * rows_per_unit(self.gate["GATE"]), units=units, slots=self.slots, steps=made.steps, **self.limits,
            **self.gate, FUSED=fused, PARTS=1 if fused else first.shape[0], EXPERTS=self.experts, TOP_K=self.choices,
            STEP=COLUMNS * made.unroll,
        ), warps=4)  # fmt: skip
        each, sums = (
            Rows(made.values[s], made.scale[s], made.unroll)
            for s in (slice(self.slots), slice(self.slots, None))
        )
        return each, sums if summed else each

    def coefficients(self, p: Projection, h: Rows, blocks: Blocks, units: int) -> Tensor | None:
        """coef_e h of every slot, f32 [parts, S, r]."""
        coef, scale = p.get("coef"), p.get("coef_scale")
        if coef is None or scale is None:
            return None
        m = Matrices(8, coef.contiguous(), None, None, scale.contiguous())
        blocks = blocks._replace(tile=blocks.tile._replace(height=1, warps=4))  # the rows are few
        return self.product("down coef", m, h, blocks, coef.shape[1], units)

    def combine(
        self, y: Tensor, index: Tensor, weight: Tensor, shared: Tensor | None, c: Tensor | None, basis: Tensor | None,
        post_norm: Tensor | None, eps: float, out: Tensor,
    ) -> None:  # fmt: skip
        tokens, columns = out.shape
        rank = 0 if c is None else c.shape[2]
        common: dict[str, Any] = dict(
            rows_ptr=y, index_ptr=index, weight_ptr=weight, shared_ptr=shared, c_ptr=c,
            basis_ptr=None if c is None or basis is None else basis.contiguous(), out_ptr=out, columns=columns, slots=self.slots,
            c_parts=0 if c is None else c.shape[0], rank=rank, EXPERTS=self.experts, TOP_K=self.choices, PARTS=y.shape[0],
            SHARED=0 if shared is None else shared.shape[0],
        )  # fmt: skip
        if post_norm is not None:
            norm = dict(norm_ptr=post_norm.contiguous(), eps=eps, BLOCK=_power(columns))
            limit = 128 if self.card.name.startswith("sm_") else 0
            warps = min(max(_power(columns) // 512, 4), 16)
            self.add("norm", norm_kernel, (tokens,), {**common, **norm}, warps, registers=limit)
        else:
            block = 256 if y.dtype == torch.float32 or c is not None else 1024
            shapes = dict(CHOICES=_power(self.choices), BLOCK=block, RANK=_power(rank, 16))
            self.add(
                "combine",
                combine_kernel,
                (tokens, -(-columns // block)),
                {**common, **shapes},
                warps=4,
            )


assert ROWS == 64 and COLUMNS == 128  # what the kernels are written for

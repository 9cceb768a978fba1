"""One MoE layer by moecc's kernels and by other implementations, for gpu.py to check and time.

Shapes: T tokens, k experts per token, E experts, D hidden, F intermediate.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from moecc.backends.triton import pack
from moecc.backends.triton.abstract import SHAPES as SHAPES
from moecc.backends.triton.abstract import Shape
from moecc.backends.triton.launch import vq_experts
from moecc.backends.triton.parts import Attributes, Plan
from moecc.ir import ops, vq4

PRODUCTS = "torch grouped_mm, products alone"
SILU: Attributes = {"act": "silu", "gate": "glu", "alpha": 0.0, "limit": 0.0, "eps": 0.0}
Call: TypeAlias = Callable[[], Tensor]
TINY = {"tiny": Shape(4, 2, 40, 24)}


class Routed(NamedTuple):
    """Tokens and their uniform choices: x bf16 [T, D], index i64 [T, k], weight bf16 [T, k]."""

    x: Tensor
    index: Tensor
    weight: Tensor

    @property
    def active(self) -> int:
        """The number of experts that any token chose."""
        return int(self.index.unique().numel())


def routed(shape: Shape, tokens: int, device: str) -> Routed:
    """Draw tokens and choices; the same for the same number of tokens."""
    g = torch.Generator().manual_seed(tokens)
    index = torch.rand(tokens, shape.experts, generator=g).topk(shape.top_k, dim=1).indices
    weight = torch.rand(tokens, shape.top_k, generator=g).softmax(1)
    x = torch.randn(tokens, shape.hidden, generator=g)
    return Routed(x.to(device, torch.bfloat16), index.to(device), weight.to(device, torch.bfloat16))


# ---------------------------------------------------------------- kernels compiled beforehand


def compile_in_parallel() -> None:
    """Run this script in one process per core, each with --kernels PART OF."""
    jobs = os.cpu_count() or 1
    parts = [[sys.executable, *sys.argv, "--kernels", str(i), str(jobs)] for i in range(jobs)]
    for running in [subprocess.Popen(command) for command in parts]:
        running.wait()


def compile_kernels(plans: Iterable[Plan], part: int, of: int) -> None:
    """Compile this process's share of the kernels of abstract plans into triton's cache.

    The share is every `of`-th kernel, from number `part` on.
    """
    seen: set[str] = set()
    for plan in plans:
        for each in plan.launches:
            values = [v if isinstance(v, int | str) else 0 for v in each.arguments.values()]
            key = str((each.name, each.options, values))
            if key not in seen and len(seen) % of == part:
                try:
                    each.kernel.warmup(**each.arguments, grid=each.grid, **each.options)
                except Exception as error:  # it fails again, and visibly, where the kernel is run
                    print(f"{each.name}: {type(error).__name__}", file=sys.stderr)
            seen.add(key)


# ---------------------------------------------------------------- moecc


def projection(
    experts: int,
    rows: int,
    columns: int,
    bits: int,
    device: str,
    *,
    rank: int = 0,
    mean: int = 0,
    input_side: bool = True,
) -> dict[str, Tensor | None]:
    """Draw the stored tensors (`moecc.ir.vq4`) of one projection at random, on the device."""
    v, wide = vq4.group_size(bits), vq4.padded(columns)

    def whole(low: int, high: int, dtype: torch.dtype, *size: int) -> Tensor:
        return torch.randint(low, high, size, dtype=dtype, device=device)

    p: dict[str, Tensor | None] = dict.fromkeys(vq4.TENSORS)
    p["codes"] = whole(0, 256, torch.uint8, experts, rows, wide // v)
    p["codebook"] = whole(0 if bits == 3 else -127, 128, torch.int8, experts, 256, v)
    scale = (torch.rand(experts, rows, device=device) + 0.5).to(torch.bfloat16)
    p["scale"] = scale / (70 * columns**0.5)
    if bits == 3:
        p["signs"] = whole(0, 256, torch.uint8, experts, rows, wide // 8)
    if rank:
        shape = (experts, rows, rank) if input_side else (experts, rank, columns)
        basis = torch.randn(rank, columns if input_side else rows, device=device)
        p["basis"] = basis.to(torch.bfloat16) / 50
        p["coef"] = whole(-127, 128, torch.int8, *shape)
        p["coef_scale"] = torch.rand(*shape[:2], device=device).to(torch.bfloat16) / 500
    if mean:
        one = projection(1, rows, columns, mean, device)
        p.update({vq4.MEAN + name: one[name] for name in vq4.CODED})
    return p


class Layer(NamedTuple):
    """The experts of one layer as stored, and the bytes read of an expert that a token chooses."""

    gate_up: dict[str, Tensor | None]
    down: dict[str, Tensor | None]
    expert_bytes: int

    def packed(self) -> tuple[pack.Projection, pack.Projection]:
        """Return gate_up and down in the order of the kernels."""
        up = pack.pack_projection(self.gate_up, gated=True)
        return up, pack.pack_projection(self.down, gated=False)

    def call(self, r: Routed) -> Call:
        """Return a call of the kernels, which gives bf16 [T, D]."""
        up, down = self.packed()
        return lambda: vq_experts(*r, up, down, None, **SILU)

    def reference(self, r: Routed) -> Tensor:
        """Return what the reference gives in float32, [T, D]."""
        stored = [
            t for p in (self.gate_up, self.down) for t in (*(p[n] for n in vq4.TENSORS), None, None)
        ]
        return ops.vq_experts_reference(r.x.float(), r.index, r.weight, *stored, None, **SILU)


def layer(shape: Shape, bits: int, device: str, *, rank: int = 0, mean: int = 0) -> Layer:
    """Draw a layer. mean: bits of a shared mean, 0 for none."""
    torch.manual_seed(bits)
    e, _, d, f = shape
    up = projection(e, 2 * f, d, bits, device, rank=rank, mean=mean)
    down = projection(e, d, f, bits, device, rank=rank, mean=mean, input_side=False)
    own = sum(
        t.nbytes
        for p in (up, down)
        for n, t in p.items()
        if t is not None and t.shape[0] == e and n != "basis"
    )
    return Layer(up, down, own // e)


# ---------------------------------------------------------------- others, on bfloat16 weights


def dense_weights(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Draw gate_up bf16 [E, 2F, D] and down bf16 [E, D, F]."""
    e, _, d, f = shape
    sizes = ((e, 2 * f, d), (e, d, f))
    up, down = (
        torch.randn(s, device=device, dtype=torch.bfloat16).mul_(s[2] ** -0.5) for s in sizes
    )
    return up, down


def others(shape: Shape, weights: tuple[Tensor, Tensor], r: Routed) -> dict[str, Call]:
    """Return the implementations of transformers, and of vLLM and gpt-oss if they are installed.

    One of transformers' is torch's grouped_mm.
    """
    from transformers import Qwen3MoeConfig
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    up, down = weights
    config = Qwen3MoeConfig(
        num_experts=shape.experts,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        hidden_act="silu",
    )
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj, module.down_proj = (
        torch.nn.Parameter(w, requires_grad=False) for w in (up, down)
    )
    found: dict[str, Call] = {}
    for name in ("grouped_mm", "batched_mm"):
        gathered = r.index.numel() * shape.weights * 2
        if name != "batched_mm" or gathered < 16 << 30:  # it copies the weights of every choice
            found[f"transformers {name}"] = partial(ALL_EXPERTS_FUNCTIONS[name], module, *r)
    found[PRODUCTS] = _products(up, down, r)
    if importlib.util.find_spec("vllm"):
        from vllm.model_executor.layers.fused_moe import fused_experts

        routing = r.weight.float(), r.index.int()
        found["vLLM fused_experts"] = partial(fused_experts, r.x, up, down, *routing)
    if _installed("triton_kernels", "triton_kernels.matmul_ogs"):
        found["gpt-oss triton_kernels"] = _gpt_oss(up, down, r)
    return found


def _installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(name) for name in modules)


def _products(up: Tensor, down: Tensor, r: Routed) -> Call:
    """The two products alone, on tokens that are sorted beforehand, without gate and sum."""
    choices = r.index.flatten()
    order = choices.argsort()
    ends = torch.bincount(choices, minlength=len(up)).cumsum(0).to(torch.int32)
    x = r.x[order // r.index.shape[1]]
    h = torch.randn(len(order), down.shape[2], device=r.x.device).to(r.x.dtype)

    def run() -> Tensor:
        torch.nn.functional.grouped_mm(x, up.transpose(1, 2), offs=ends)
        return torch.nn.functional.grouped_mm(h, down.transpose(1, 2), offs=ends)

    return run


def _gpt_oss(up: Tensor, down: Tensor, r: Routed) -> Call:
    """gpt-oss' two products, on tokens that are sorted beforehand.

    The gate is (u + 1) g sigmoid(g), of gate and up rows that alternate.
    """
    from triton_kernels.matmul_ogs import FnSpecs, FusedActivation, matmul_ogs
    from triton_kernels.routing import routing
    from triton_kernels.swiglu import swiglu_fn

    logits = torch.full((len(r.x), len(up)), -torch.inf, device=r.x.device).scatter(
        1, r.index, r.weight.float().log()
    )
    data, gather, scatter = routing(logits, r.index.shape[1])
    gate = FusedActivation(FnSpecs("swiglu", swiglu_fn, ("alpha", "limit")), (1.0, 7.0), 2)

    def run() -> Tensor:
        h = matmul_ogs(
            r.x, up.transpose(1, 2), None, data, gather_indx=gather, fused_activation=gate
        )
        return matmul_ogs(
            h, down.transpose(1, 2), None, data, scatter_indx=scatter, gammas=data.gate_scal
        )

    return run

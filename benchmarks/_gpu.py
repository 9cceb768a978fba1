"""What gpu.py times: one MoE layer by moecc's kernels and by others, and a whole model of random numbers.

Shapes: T tokens, k experts per token, E experts, D hidden, F intermediate.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moecc.backends import triton as backend
from moecc.backends.triton import pack
from moecc.backends.triton.aot import SHAPES as SHAPES
from moecc.backends.triton.aot import Shape
from moecc.backends.triton.launch import Plan, vq_experts
from moecc.ir import ops, vq4

PRODUCTS = "torch grouped_mm, products alone"
SILU: dict[str, Any] = dict(act="silu", gate="glu", alpha=0.0, limit=0.0, eps=0.0)
Call = Callable[[], Tensor]


TINY = {"tiny": Shape(4, 2, 40, 24)}


class Routed(NamedTuple):
    """Tokens and what they chose, uniformly: x bf16 [T, D], index i64 [T, k], weight bf16 [T, k]."""

    x: Tensor
    index: Tensor
    weight: Tensor

    @property
    def active(self) -> int:
        """Experts that are chosen at all."""
        return int(self.index.unique().numel())


def routed(shape: Shape, tokens: int, device: str) -> Routed:
    g = torch.Generator().manual_seed(tokens)
    index = torch.rand(tokens, shape.experts, generator=g).topk(shape.top_k, dim=1).indices
    weight = torch.rand(tokens, shape.top_k, generator=g).softmax(1)
    x = torch.randn(tokens, shape.hidden, generator=g)
    return Routed(x.to(device, torch.bfloat16), index.to(device), weight.to(device, torch.bfloat16))


# ---------------------------------------------------------------- kernels compiled beforehand


def compile_in_parallel() -> None:
    """Run this script by as many processes as there are cores, each with --kernels PART OF."""
    jobs = os.cpu_count() or 1
    parts = [[sys.executable, *sys.argv, "--kernels", str(i), str(jobs)] for i in range(jobs)]
    for running in [subprocess.Popen(command) for command in parts]:
        running.wait()


def compile_kernels(plans: Iterable[Plan], part: int, of: int) -> None:
    """This process' share of the kernels of plans on the meta device, into triton's cache."""
    seen: set[str] = set()
    for plan in plans:
        for each in plan.launches:
            key = str(
                (
                    each.name,
                    each.options,
                    [v if isinstance(v, int | str) else 0 for v in each.arguments.values()],
                )
            )
            if key not in seen and len(seen) % of == part:
                try:
                    each.kernel.warmup(**each.arguments, grid=each.grid, **each.options)
                except Exception as error:  # where it is run, too
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
    """The stored tensors (`moecc.ir.vq4`) of one projection, of random numbers that are drawn on the device."""
    v, wide = vq4.group_size(bits), vq4.padded(columns)

    def whole(low: int, high: int, dtype: torch.dtype, *size: int) -> Tensor:
        return torch.randint(low, high, size, dtype=dtype, device=device)

    p: dict[str, Tensor | None] = dict.fromkeys(vq4.TENSORS)
    p["codes"] = whole(0, 256, torch.uint8, experts, rows, wide // v)
    p["codebook"] = whole(0 if bits == 3 else -127, 128, torch.int8, experts, 256, v)
    p["scale"] = (torch.rand(experts, rows, device=device) + 0.5).to(torch.bfloat16) / (
        70 * columns**0.5
    )
    if bits == 3:
        p["signs"] = whole(0, 256, torch.uint8, experts, rows, wide // 8)
    if rank:
        shape = (experts, rows, rank) if input_side else (experts, rank, columns)
        p["basis"] = (
            torch.randn(rank, columns if input_side else rows, device=device).to(torch.bfloat16)
            / 50
        )
        p["coef"] = whole(-127, 128, torch.int8, *shape)
        p["coef_scale"] = torch.rand(*shape[:2], device=device).to(torch.bfloat16) / 500
    if mean:
        one = projection(1, rows, columns, mean, device)
        p.update({vq4.MEAN + name: one[name] for name in vq4.CODED})
    return p


class Layer(NamedTuple):
    """One layer's experts, as stored; what is read of each expert at a token's behest, in bytes."""

    gate_up: dict[str, Tensor | None]
    down: dict[str, Tensor | None]
    expert_bytes: int

    def packed(self) -> tuple[pack.Projection, pack.Projection]:
        return pack.pack_projection(self.gate_up, gated=True), pack.pack_projection(
            self.down, gated=False
        )

    def call(self, r: Routed) -> Call:
        up, down = self.packed()
        return lambda: vq_experts(*r, up, down, None, **SILU)

    def reference(self, r: Routed) -> Tensor:
        stored = [
            t for p in (self.gate_up, self.down) for t in (*(p[n] for n in vq4.TENSORS), None, None)
        ]
        return ops.vq_experts_reference(r.x.float(), r.index, r.weight, *stored, None, **SILU)


def layer(shape: Shape, bits: int, device: str, *, rank: int = 0, mean: int = 0) -> Layer:
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
    """gate_up bf16 [E, 2F, D], down bf16 [E, D, F]."""
    e, _, d, f = shape
    sizes = ((e, 2 * f, d), (e, d, f))
    up, down = (
        torch.randn(s, device=device, dtype=torch.bfloat16).mul_(s[2] ** -0.5) for s in sizes
    )
    return up, down


def others(shape: Shape, weights: tuple[Tensor, Tensor], r: Routed) -> dict[str, Call]:
    """transformers' implementations (one is torch's grouped_mm), and vLLM's and gpt-oss' where they are installed."""
    from transformers import Qwen3MoeConfig
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    up, down = weights
    with torch.device("meta"):
        module = Qwen3MoeExperts(Qwen3MoeConfig(
            num_experts=shape.experts, hidden_size=shape.hidden, moe_intermediate_size=shape.intermediate, hidden_act="silu",
        ))  # fmt: skip
    module.gate_up_proj, module.down_proj = (
        torch.nn.Parameter(w, requires_grad=False) for w in (up, down)
    )
    found: dict[str, Call] = {}
    functions: Any = ALL_EXPERTS_FUNCTIONS
    for name in ("grouped_mm", "batched_mm"):
        gathered = r.index.numel() * shape.weights * 2
        if name != "batched_mm" or gathered < 16 << 30:  # it copies the weights of every choice
            found[f"transformers {name}"] = _bind(functions[name], module, *r)
    found[PRODUCTS] = _products(up, down, r)
    if importlib.util.find_spec("vllm"):
        from vllm.model_executor.layers.fused_moe import fused_experts

        found["vLLM fused_experts"] = _bind(
            fused_experts, r.x, up, down, r.weight.float(), r.index.int()
        )
    if importlib.util.find_spec("triton_kernels") and importlib.util.find_spec(
        "triton_kernels.matmul_ogs"
    ):
        found["gpt-oss triton_kernels"] = _gpt_oss(up, down, r)
    return found


def _products(up: Tensor, down: Tensor, r: Routed) -> Call:
    choices = r.index.flatten()
    order = choices.argsort()
    ends = torch.bincount(choices, minlength=len(up)).cumsum(0).to(torch.int32)
    x, h = (
        r.x[order // r.index.shape[1]],
        torch.randn(len(order), down.shape[2], device=r.x.device).to(r.x.dtype),
    )

    def run() -> Tensor:
        torch.nn.functional.grouped_mm(x, up.transpose(1, 2), offs=ends)
        return torch.nn.functional.grouped_mm(h, down.transpose(1, 2), offs=ends)

    return run


def _gpt_oss(up: Tensor, down: Tensor, r: Routed) -> Call:
    """Its two products, on tokens whose order was made before; its gate is (u + 1) g sigmoid(g) of rows that alternate."""
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


def _bind(function: Callable[..., Tensor], *args: Any) -> Call:
    return lambda: function(*args)


# ---------------------------------------------------------------- a whole model


def model(shape: Shape, bits: int, device: str, *, layers: int, vocabulary: int) -> Any:
    """A Qwen3-MoE of random numbers, its experts compressed and never dense; bits 16: bfloat16."""
    from torch import nn
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from moecc.frontend import experts

    e, k, d, f = shape
    head = 128 if d >= 1024 else 8
    config = Qwen3MoeConfig(
        vocab_size=vocabulary, hidden_size=d, intermediate_size=3 * d, moe_intermediate_size=f, num_hidden_layers=layers,
        num_experts=e, num_experts_per_tok=k, num_attention_heads=max(d // 64, 4), num_key_value_heads=4, head_dim=head,
        norm_topk_prob=True, max_position_embeddings=4096, eos_token_id=None, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    experts.register()
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if bits != 16:
        for module in experts.experts_modules(made).values():
            stored = _specs(e, 2 * f, d, bits), _specs(e, d, f, bits)
            experts.compress_module(module, *stored, SILU, ["gate_up_proj", "down_proj"])
        made.set_experts_implementation(experts.IMPLEMENTATION)
    rotary = [m for m in made.modules() if hasattr(m, "inv_freq")]
    made.to_empty(device=device)
    for m in rotary:
        fresh = type(m)(config)
        m.inv_freq = fresh.inv_freq.to(device)
        m.original_inv_freq = m.inv_freq
    for m in made.modules():
        if isinstance(m, experts.CompressedProjection):
            rows, columns = (2 * f, d) if m.gated else (d, f)
            _fill(m, projection(e, rows, columns, bits, device))
    for parameter in made.parameters():
        if parameter.dim() == 1:  # of a norm
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02)
    return made.eval()


def _fill(module: Any, stored: dict[str, Tensor | None]) -> None:
    """Give a projection its tensors, and their order."""
    module.unpack()
    for name, tensor in stored.items():
        setattr(module, name, tensor)
    module.settle()
    if module.codes.device.type == "cpu":  # in the interpreter
        module.pack(backend)


def _specs(experts: int, rows: int, columns: int, bits: int) -> dict[str, tuple[list[int], str]]:
    p = projection(experts, rows, columns, bits, "meta")
    return {
        n: (list(t.shape), str(t.dtype).removeprefix("torch."))
        for n, t in p.items()
        if t is not None
    }

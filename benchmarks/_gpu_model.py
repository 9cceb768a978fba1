"""A whole model of random numbers, and the speed of its greedy decoding."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from _clock import Clock
from _gpu import SILU, Shape, projection
from torch import Tensor, nn

from moecc.backends import triton as backend
from moecc.frontend import compressed, experts
from moecc.types import Config, FamilyModule, Json

# ---------------------------------------------------------------- decoding


def time_model(
    shape: Shape,
    bits: int,
    clock: Clock,
    *,
    layers: int,
    vocabulary: int,
    new_tokens: int,
    batches: tuple[int, ...],
    compiled: bool,
) -> Iterator[Json]:
    """Yield rows of tokens per second of greedy decoding, without prefill.

    bits: 16 for the uncompressed model, by transformers. compiled: with torch.compile, too.
    """
    if bits == 16:
        kinds = [f"CUDA graph, transformers {name}" for name in ("grouped_mm", "batched_mm")]
    else:
        kinds = ["generate", "CUDA graph"] + ["CUDA graph, torch.compile"] * compiled
    model = random_model(shape, bits, clock.device, layers=layers, vocabulary=vocabulary)
    for kind in kinds:
        if bits == 16:
            model.set_experts_implementation(kind.split()[-1])
        if kind.endswith("torch.compile"):
            model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)
        for batch in batches:
            torch.manual_seed(batch)
            prompt = torch.randint(2, vocabulary, (batch, 16), device=clock.device)
            row: Json = dict(bits=bits, batch=batch, kind=kind)
            try:
                with torch.no_grad():
                    decode = _generate if kind == "generate" else _steps
                    seconds = decode(model, prompt, new_tokens, clock)
                row["tokens_per_second"] = batch * new_tokens / seconds
            except RuntimeError as error:  # a step that cannot be captured
                row["error"] = str(error).splitlines()[0].split(". ")[0][:100]
            speed = row.get("tokens_per_second", row.get("error"))
            print(f"model, {bits} bit, batch {batch}, {kind}: {speed}", flush=True)
            yield row


def _generate(model: FamilyModule, prompt: Tensor, new_tokens: int, clock: Clock) -> float:
    """Return the seconds of `new_tokens` further tokens."""
    mask = torch.ones_like(prompt)

    def run(count: int) -> None:
        model.generate(
            prompt,
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            disable_compile=True,
            attention_mask=mask,
        )

    if clock.device == "cuda":  # warm up
        run(new_tokens + 1)
    seconds = []
    for count in (1, new_tokens + 1):
        clock.wait()
        start = time.perf_counter()
        run(count)
        clock.wait()
        seconds.append(time.perf_counter() - start)
    return max(seconds[1] - seconds[0], 1e-9)


def _steps(model: FamilyModule, prompt: Tensor, new_tokens: int, clock: Clock) -> float:
    """Return the seconds of `new_tokens` steps, each a replay of one graph."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + new_tokens + 8)
    prefill = type(model).forward(model, input_ids=prompt, past_key_values=cache)
    ids = prefill.logits[:, -1:].argmax(-1)
    run = clock.captured(
        lambda: ids.copy_(model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1))
    )
    clock.wait()
    start = time.perf_counter()
    for _ in range(new_tokens):
        run()
    clock.wait()
    return time.perf_counter() - start


# ---------------------------------------------------------------- the model


def random_model(
    shape: Shape, bits: int, device: str, *, layers: int, vocabulary: int
) -> FamilyModule:
    """Return a Qwen3-MoE of random numbers, whose experts are compressed and never dense.

    bits: 16 for bfloat16 experts.
    """
    from transformers import AutoModelForCausalLM

    config = _config(shape, layers, vocabulary)
    experts.register()
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    e, _, d, f = shape
    if bits != 16:
        for module in experts.experts_modules(made).values():
            stored = _specs(e, 2 * f, d, bits), _specs(e, d, f, bits)
            compressed.compress_module(module, *stored, SILU, ["gate_up_proj", "down_proj"])
        made.set_experts_implementation(experts.IMPLEMENTATION)
    rotary = [m for m in made.modules() if hasattr(m, "inv_freq")]
    made.to_empty(device=device)
    for m in rotary:  # their buffers are computed, not loaded
        fresh = type(m)(config)
        m.inv_freq = fresh.inv_freq.to(device)
        m.original_inv_freq = m.inv_freq
    for m in made.modules():
        if isinstance(m, compressed.CompressedProjection):
            rows, columns = (2 * f, d) if m.gated else (d, f)
            _fill(m, projection(e, rows, columns, bits, device))
    for parameter in made.parameters():
        if parameter.dim() == 1:  # of a norm
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02)
    return made.eval()


def _config(shape: Shape, layers: int, vocabulary: int) -> Config:
    from transformers import Qwen3MoeConfig

    d = shape.hidden
    return Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=d,
        intermediate_size=3 * d,
        moe_intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        num_attention_heads=max(d // 64, 4),
        num_key_value_heads=4,
        head_dim=128 if d >= 1024 else 8,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=1,
    )


def _fill(module: compressed.CompressedProjection, stored: dict[str, Tensor | None]) -> None:
    """Give a projection its tensors, in the order that its device needs."""
    module.unpack()
    for name, tensor in stored.items():
        setattr(module, name, tensor)
    module.settle()
    if module.codes.device.type == "cpu":  # in the interpreter
        module.pack(backend.KERNELS)


def _specs(experts: int, rows: int, columns: int, bits: int) -> dict[str, tuple[list[int], str]]:
    """Return the shape and type of every stored tensor of a projection."""
    p = projection(experts, rows, columns, bits, "meta")
    return {
        n: (list(t.shape), str(t.dtype).removeprefix("torch."))
        for n, t in p.items()
        if t is not None
    }

"""Run llama.cpp on a checkpoint: write GGUF, quantize by llama.cpp, time and evaluate.

    python _llama.py CHECKPOINT --ftype Q2_K --ids IDS.npy --threads 1 --out FOLDER

It runs in an environment of its own. CHECKPOINT is a float32 qwen2_moe or qwen3_moe model. It
prints one JSON object: file bytes, load seconds, prefill and decode tokens per second. It leaves
log-probabilities [rows, length, vocabulary] of the ids in FOLDER/FTYPE.logprobs.npy. The GGUF file
has no vocabulary: token ids go in, logits come out.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import llama_cpp
import numpy as np
from safetensors.numpy import load_file

# name -> (bytes, type); type None for float32
Quantized: TypeAlias = dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType | None]]

_ATTENTION = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
}
_OTHERS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
_EXPERTS = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def tensors(checkpoint: Path, layers: int, experts: int) -> dict[str, np.ndarray]:
    """Return the checkpoint's tensors by llama.cpp's names, with experts stacked."""
    held: dict[str, np.ndarray] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        held |= {n: t.astype(np.float32) for n, t in load_file(file).items()}
    made = {
        "token_embd.weight": held["model.embed_tokens.weight"],
        "output_norm.weight": held["model.norm.weight"],
    }
    made["output.weight"] = held.get("lm_head.weight", held["model.embed_tokens.weight"])
    for i in range(layers):
        old, new = f"model.layers.{i}", f"blk.{i}"
        for a, b in _OTHERS.items():
            if f"{old}.{a}.weight" in held:
                made[f"{new}.{b}.weight"] = held[f"{old}.{a}.weight"]
        for a, b in _ATTENTION.items():
            for kind in ("weight", "bias"):
                if f"{old}.self_attn.{a}.{kind}" in held:
                    made[f"{new}.{b}.{kind}"] = held[f"{old}.self_attn.{a}.{kind}"]
        for a, b in _EXPERTS.items():
            own = [f"{old}.mlp.experts.{e}.{a}.weight" for e in range(experts)]
            made[f"{new}.{b}_exps.weight"] = np.stack([held[n] for n in own])
            if f"{old}.mlp.shared_expert.{a}.weight" in held:
                made[f"{new}.{b}_shexp.weight"] = held[f"{old}.mlp.shared_expert.{a}.weight"]
    return {
        n: t.reshape(-1) if n.endswith("ffn_gate_inp_shexp.weight") else t for n, t in made.items()
    }


def random_blocks(
    rng: np.random.Generator, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType
) -> np.ndarray:
    """Return the bytes of a random quantized tensor: any integers, small scales."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = int(np.prod(shape)) // elements
    made = rng.integers(0, 256, (blocks, size), np.uint8)
    size_of_integers = 16 if kind == gguf.GGMLQuantizationType.Q2_K else 5
    scale = np.frombuffer(np.float16(shape[-1] ** -0.5 / size_of_integers).tobytes(), np.uint8)
    # offsets of the float16 scales in a block
    at = {
        gguf.GGMLQuantizationType.Q2_K: (80, 82),
        gguf.GGMLQuantizationType.Q4_0: (0,),
        gguf.GGMLQuantizationType.Q8_0: (0,),
    }
    for start in at[kind]:
        made[:, start : start + 2] = scale
    return made.reshape(*shape[:-1], -1)


def random_tensors(c: dict[str, Any], ftype: str) -> Quantized:
    """Draw the tensors of a qwen3_moe of configuration c, by llama.cpp's names.

    Experts are of `ftype`, attention is Q4_0, embedding and head are Q8_0.
    """
    kinds = gguf.GGMLQuantizationType
    rng = np.random.default_rng(0)
    d, f, e = c["hidden_size"], c["moe_intermediate_size"], c["num_experts"]
    q, kv = (c[n] * c["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))
    made: Quantized = {}

    def coded(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> None:
        made[f"{name}.weight"] = random_blocks(rng, shape, kind), kind

    coded("token_embd", (c["vocab_size"], d), kinds.Q8_0)
    coded("output", (c["vocab_size"], d), kinds.Q8_0)
    made["output_norm.weight"] = np.ones(d, np.float32), None
    for i in range(c["num_hidden_layers"]):
        for name, width in (
            ("attn_norm", d),
            ("ffn_norm", d),
            ("attn_q_norm", c["head_dim"]),
            ("attn_k_norm", c["head_dim"]),
        ):
            made[f"blk.{i}.{name}.weight"] = np.ones(width, np.float32), None
        made[f"blk.{i}.ffn_gate_inp.weight"] = (
            rng.standard_normal((e, d), np.float32) * d**-0.5,
            None,
        )
        for name, rows, columns in (
            ("attn_q", q, d),
            ("attn_k", kv, d),
            ("attn_v", kv, d),
            ("attn_output", d, q),
        ):
            coded(f"blk.{i}.{name}", (rows, columns), kinds.Q4_0)
        for name, rows, columns in (
            ("ffn_gate_exps", f, d),
            ("ffn_up_exps", f, d),
            ("ffn_down_exps", d, f),
        ):
            coded(f"blk.{i}.{name}", (e, rows, columns), kinds[ftype])
    return made


def write(checkpoint: Path, path: Path, random_as: str = "") -> None:
    """Write the model as a float32 GGUF file.

    random_as: write random weights of that kind instead of the checkpoint's.
    """
    c: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    arch = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}[c["model_type"]]
    w = gguf.GGUFWriter(str(path), arch)
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_block_count(c["num_hidden_layers"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"])
    head = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    w.add_key_length(head)
    w.add_value_length(head)
    w.add_rope_freq_base((c.get("rope_parameters") or c)["rope_theta"])
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_expert_count(c["num_experts"])
    w.add_expert_used_count(c["num_experts_per_tok"])
    w.add_expert_feed_forward_length(c["moe_intermediate_size"])
    if c.get("shared_expert_intermediate_size"):
        w.add_expert_shared_feed_forward_length(c["shared_expert_intermediate_size"])
    w.add_vocab_size(c["vocab_size"])
    w.add_tokenizer_model("none")
    if random_as:
        for name, (tensor, kind) in random_tensors(c, random_as).items():
            w.add_tensor(name, tensor, raw_dtype=kind)
    else:
        for name, tensor in tensors(checkpoint, c["num_hidden_layers"], c["num_experts"]).items():
            w.add_tensor(name, tensor)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def quantize(source: Path, target: Path, ftype: str) -> None:
    """Quantize a GGUF file by llama.cpp."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}")
    settings.nthread = 1
    if llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(settings)
    ):
        raise SystemExit(f"llama.cpp can't quantize to {ftype}")


def expert_bits(path: Path) -> float:
    """Return the bits per weight of the routed experts in a file."""
    found = [t for t in gguf.GGUFReader(str(path)).tensors if "_exps" in t.name]
    return 8 * sum(t.n_bytes for t in found) / sum(int(t.n_elements) for t in found)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--ftype", default="Q2_K", help="of llama.cpp's; F32 leaves the model as it is"
    )
    parser.add_argument(
        "--random",
        action="store_true",
        help="random weights; of the checkpoint only config.json is read",
    )
    parser.add_argument("--ids", type=Path, help="evaluate these rows of token ids")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def gguf_file(args: argparse.Namespace) -> Path:
    """Return the model's GGUF file, written and quantized unless it is there."""
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{args.ftype}.gguf"
    if args.random and not file.exists():
        write(args.checkpoint, file, args.ftype)
    if not file.exists():
        whole = args.out / "F32.gguf"
        if not whole.exists():
            write(args.checkpoint, whole)
        if args.ftype != "F32":
            quantize(whole, file, args.ftype)
    return file


def speed(model: llama_cpp.Llama, prompt: int, new_tokens: int) -> tuple[list[float], list[float]]:
    """Return the seconds of five prefills of `prompt` tokens, and of each of `new_tokens` steps."""
    rng, vocabulary = np.random.default_rng(0), model.n_vocab()
    given = rng.integers(0, vocabulary, prompt).tolist()
    prefill, decode = [], []
    for _ in range(5):
        model.reset()
        start = time.perf_counter()
        model.eval(given)
        prefill.append(time.perf_counter() - start)
    for token in rng.integers(0, vocabulary, new_tokens).tolist():
        start = time.perf_counter()
        model.eval([token])
        decode.append(time.perf_counter() - start)
    return prefill, decode


def log_probabilities(model: llama_cpp.Llama, ids: np.ndarray) -> np.ndarray:
    """Return float32 [rows, length, vocabulary]."""
    rows = []
    for row in ids.tolist():
        model.reset()
        model.eval(row)
        logits = model.scores[: len(row)].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        rows.append((logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32))
    return np.stack(rows)


def main() -> None:
    args = options()
    file = gguf_file(args)
    start = time.perf_counter()
    ids = np.load(args.ids) if args.ids else np.zeros((0, 0), np.int64)
    context = max(args.prompt + args.new_tokens, ids.shape[1] if ids.size else 0)
    model = llama_cpp.Llama(
        str(file),
        n_ctx=context,
        n_batch=context,
        n_ubatch=context,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        logits_all=True,
        verbose=False,
        seed=0,
    )
    load = time.perf_counter() - start
    prefill, decode = speed(model, args.prompt, args.new_tokens)
    if ids.size:
        np.save(args.out / f"{args.ftype}.logprobs.npy", log_probabilities(model, ids))
    found = {
        "ftype": args.ftype,
        "bytes": file.stat().st_size,
        "bits_per_weight_experts": expert_bits(file),
        "load_seconds": load,
        "prefill_tokens_per_second": args.prompt / statistics.median(prefill),
        "decode_tokens_per_second": 1 / statistics.median(decode),
        "threads": args.threads,
        "versions": {"llama-cpp-python": llama_cpp.__version__},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Whole models in ONNX Runtime beside llama.cpp, on one machine, in one run.

    python benchmarks/llamacpp.py
        all three below
    python benchmarks/llamacpp.py --only example
        the example model, speed and quality
    python benchmarks/llamacpp.py --only random
        random weights, 1 GB, speed
    python benchmarks/llamacpp.py --only large
        16 layers of Qwen3-30B-A3B, 2.8 GB, moecc alone: load time and memory

The example is compiled, exported with `--to onnx{embeddings=int8}` and measured by `moecc bench`;
llama.cpp quantizes the same checkpoint itself. Quality is KL(reference || model) and perplexity
over rows of held-out text, from the logits of each runtime. Tables go to
benchmarks/results/llamacpp.md and .json. llama.cpp is compiled from the source of its Python
package, in an environment of its own; that takes a quarter of an hour the first time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnxruntime
import torch
from _command import moecc_command
from safetensors.torch import load_file, save_file

import moecc
from moecc.commands.rows import token_rows, tokenizer_of
from moecc.errors import MoeccError
from moecc.ir import vq4
from moecc.types import Config, Json

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tinymoe"
WORKER = Path(__file__).with_name("_llama.py")
ROWS, LENGTH = 16, 256  # of evaluation text

# experts of 3.6 G weights in all
RANDOM = dict(
    vocab_size=32768,
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_hidden_layers=12,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=64,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)


def llama(python: Path, *arguments: str | Path | int) -> Json:
    """Run `_llama.py` and return its JSON; MoeccError if it fails."""
    done = subprocess.run(
        [str(python), str(WORKER), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise MoeccError(f"llama.cpp failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def speed_rows(label: str, exported: Path, threads: list[int]) -> list[Json]:
    """Measure an exported model by `moecc bench`."""
    rows = moecc_command("bench", exported, "--threads", *map(str, threads))[0]["rows"]
    size = sum((exported / f).stat().st_size for f in ("model.onnx", "model.onnx.data"))
    return [{"label": f"{label}, {r['ops']}", "bytes": size, **r} for r in rows]


# ---------------------------------------------------------------- the example


def example(work: Path, python: Path, threads: list[int]) -> list[Json]:
    """Measure the example model, by moecc at several sizes and by llama.cpp."""
    ids = token_rows(tokenizer_of(EXAMPLE), EXAMPLE / "valid.txt", count=ROWS, length=LENGTH)
    np.save(work / "ids.npy", ids.numpy())
    reference = _reference(ids)
    rows: list[Json] = []
    for bits, dense in (("2", 8), ("2", 4), ("2.7", 8)):
        rows += _example_by_moecc(work, bits, dense, reference, ids, threads)
    whole = work / "float32"
    whole.mkdir()
    weights = load_file(EXAMPLE / "model.safetensors")
    save_file({n: t.float() for n, t in weights.items()}, whole / "model.safetensors")
    (whole / "config.json").write_text((EXAMPLE / "config.json").read_text())
    for ftype in ("F32", "Q2_K", "Q3_K_S", "Q4_0"):
        for n in threads:
            given = ("--ids", work / "ids.npy", "--threads", n, "--out", work / "llama")
            found = llama(python, whole, "--ftype", ftype, *given)
            logs = torch.from_numpy(np.load(work / "llama" / f"{ftype}.logprobs.npy"))
            rows.append({"label": f"llama.cpp {ftype}", **found, **_quality(reference, logs, ids)})
    return rows


def _example_by_moecc(
    work: Path,
    bits: str,
    dense: int,
    reference: torch.Tensor,
    ids: torch.Tensor,
    threads: list[int],
) -> list[Json]:
    """Compile, export and measure the example. dense: bits of dense matrices."""
    from moecc.backends.onnx.run import Session

    art, passes = work / f"bits{bits}_{dense}", f"vsraq,kbvq,dense{{bits={dense}}}"
    given = ("--bits", bits, "--calib", EXAMPLE / "calib.txt", "-o", art)
    compiled, *_ = moecc_command("compile", EXAMPLE, "--passes", passes, *given)
    moecc_command("export", art, "--to", "onnx{embeddings=int8}")
    session = Session(art / "onnx" / "model.onnx")
    logs = torch.cat([session.logits(row[None], [LENGTH]) for row in ids]).log_softmax(-1)
    quality = _quality(reference, logs, ids)
    own = {"bits_per_weight_experts": compiled["bits_per_weight_experts"], **quality}
    label = f"moecc {bits} bit, dense {dense} bit"
    return [{**r, **own} for r in speed_rows(label, art / "onnx", threads)]


@torch.no_grad()
def _reference(ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()
    return torch.cat([model(input_ids=row[None]).logits for row in ids]).log_softmax(-1)


def _quality(reference: torch.Tensor, found: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    kl = (reference.exp() * (reference - found)).sum(-1).mean()
    likelihood = found[:, :-1].gather(-1, ids[:, 1:, None].long()).mean()
    return {"kl": float(kl), "perplexity": float((-likelihood).exp())}


# ---------------------------------------------------------------- a model of 1 GB


Tensors: TypeAlias = dict[str, torch.Tensor]


class Draw:
    """Random tensors, one after another from one generator."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> torch.Tensor:
        """Draw bfloat16 weights [..., K] of variance 1 / K."""
        return (torch.randn(*shape, generator=self.generator) * shape[-1] ** -0.5).bfloat16()

    def bytes(self, *shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8)

    def linear(self, n: int, k: int, group: int = 64) -> Tensors:
        """Draw a dense matrix [n, k] at 4 bit."""
        return {
            "weight": self.bytes(n, k // 2),
            "scale": torch.full((n, k // group), 1 / (5 * k**0.5), dtype=torch.float16),
            "zero": torch.full((n, k // group), 8, dtype=torch.uint8),
        }

    def projection(self, e: int, n: int, k: int) -> Tensors:
        """Draw a projection of experts [e, n, k] at 2 bit."""
        return {
            "codes": self.bytes(e, n, k // vq4.group_size(2)),
            "codebook": torch.randint(
                -127, 128, (e, 256, 4), generator=self.generator, dtype=torch.int8
            ),
            "scale": torch.full((e, n), 1 / (73 * k**0.5), dtype=torch.float16),
        }


def random_artifact(folder: Path, **changes: int) -> Path:
    """Write an artifact of random codes, experts at 2 bit, dense matrices at 4.

    changes: to RANDOM.
    """
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(**{**RANDOM, **changes}, architectures=["Qwen3MoeForCausalLM"])
    draw = Draw()
    tensors: Tensors = {
        "model.embed_tokens.weight": draw.normal(config.vocab_size, config.hidden_size),
        "lm_head.weight": draw.normal(config.vocab_size, config.hidden_size),
        "model.norm.weight": torch.ones(config.hidden_size, dtype=torch.bfloat16),
    }
    experts: Json = {}
    linears: Json = {}
    for i in range(config.num_hidden_layers):
        _add_layer(f"model.layers.{i}", config, draw, tensors, linears, experts)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = config.to_dict() | {
        "num_experts": config.num_experts,
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "moecc",
            "version": vq4.VERSION,
            "experts": experts,
            "linears": linears,
        },
    }
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def _add_layer(
    layer: str, config: Config, draw: Draw, tensors: Tensors, linears: Json, experts: Json
) -> None:
    """Draw one layer's tensors, and describe what is compressed in linears and experts."""
    d, f, e = config.hidden_size, config.moe_intermediate_size, config.num_experts
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    norms = {"input_layernorm": d, "post_attention_layernorm": d}
    norms |= {f"self_attn.{n}_norm": config.head_dim for n in ("q", "k")}
    for norm, width in norms.items():
        tensors[f"{layer}.{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
    tensors[f"{layer}.mlp.gate.weight"] = draw.normal(e, d)
    sizes = (("q_proj", q, d), ("k_proj", kv, d), ("v_proj", kv, d), ("o_proj", d, q))
    for name, n, k in sizes:
        own = draw.linear(n, k)
        tensors |= {f"{layer}.self_attn.{name}.{t}": v for t, v in own.items()}
        linears[f"{layer}.self_attn.{name}"] = {"bits": 4, "tensors": _spec(own)}
    entry: Json = {
        "attributes": {"act": "silu", "alpha": 1.0, "eps": 0.0, "gate": "glu", "limit": 0.0},
        "remove": ["gate_up_proj", "down_proj"],
    }
    for part, n, k in (("gate_up", 2 * f, d), ("down", d, f)):
        own = draw.projection(e, n, k)
        tensors |= {f"{layer}.mlp.experts.{part}.{t}": v for t, v in own.items()}
        entry[part] = _spec(own)
    experts[f"{layer}.mlp.experts"] = entry


def _spec(own: Tensors) -> Json:
    return {n: [list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in own.items()}


def random(work: Path, python: Path, threads: list[int]) -> list[Json]:
    """Measure a model of random weights, by moecc and by llama.cpp."""
    art = random_artifact(work / "random")
    moecc_command("export", art, "--to", "onnx{embeddings=int8}")
    rows = speed_rows("moecc 2 bit, dense 4 bit", art / "onnx", threads)
    for ftype in ("Q2_K",):
        for n in threads:
            given = ("--random", "--threads", n, "--out", work / "llama-random")
            found = llama(python, art, "--ftype", ftype, *given)
            rows.append({"label": f"llama.cpp {ftype}, attention Q4_0", **found})
    return rows


def large(work: Path, python: Path, threads: list[int]) -> list[Json]:
    """Measure a larger model of random weights, by moecc."""
    art = random_artifact(work / "large", num_experts=128, num_hidden_layers=16)
    moecc_command("export", art, "--to", "onnx{embeddings=int8}")
    return speed_rows("moecc 2 bit, dense 4 bit", art / "onnx", threads)


# ---------------------------------------------------------------- the page


def table(rows: list[Json]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| model | threads | file MB | bits/weight of experts | prefill tok/s | decode tok/s "
        "| load s | private MB | KL | perplexity |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        known = [
            f"{r[k]:{form}}" if k in r else "" for k, form in (("kl", ".4f"), ("perplexity", ".3f"))
        ]
        bits = f"{r['bits_per_weight_experts']:.3f}" if "bits_per_weight_experts" in r else ""
        private = f"{r['private_bytes'] / 1e6:.0f}" if "private_bytes" in r else ""
        figures = [
            str(r["threads"]),
            f"{r['bytes'] / 1e6:.1f}",
            bits,
            f"{r['prefill_tokens_per_second']:.0f}",
            f"{r['decode_tokens_per_second']:.1f}",
            f"{r['load_seconds']:.2f}",
            private,
            *known,
        ]
        lines.append(f"| {r['label']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> int:
    import peers

    groups = {"example": example, "random": random, "large": large}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=list(groups), default=list(groups))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "llamacpp")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    python = peers.environment(peers.HOME / "llama-cpp", "llama-cpp")
    head = (
        "# Whole models beside llama.cpp\n\n"
        f"moecc {moecc.__version__}, onnxruntime {onnxruntime.__version__}, "
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; batch 1, prefill "
        "of 128 tokens, 64 decoded one by one, medians. KL and perplexity over "
        f"{ROWS} x {LENGTH} tokens of held-out text. llama.cpp's Q2_K and Q3_K_S are made without "
        "an importance matrix. Made by `python benchmarks/llamacpp.py`.\n"
    )
    found: Json = {}
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = groups[name](Path(folder), python, args.threads)
        pages = [f"\n## {n}\n\n{table(rows)}\n" for n, rows in found.items()]
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(head + "".join(pages))
    print(args.out.with_suffix(".md").read_text())
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except MoeccError as error:
        print(f"llamacpp: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None

"""Run a peer tool on the routed experts of one checkpoint.

`peers.py` runs this script inside the peer's own environment.

  1. AutoRound or GPTQModel quantizes and packs the routed experts on the caller's token ids. It is
     told to leave every other linear layer alone. It runs in a process of its own, since it patches
     transformers.
  2. Codes, zero points and scales are read back from the packed file, and every expert matrix is
     decoded in float32: the evaluation sees what the peer stores, not what it held in memory.
  3. The decoded matrices replace the float ones in the original model, which is saved as a plain
     float32 checkpoint.

The report counts what was really quantized: a routed-expert matrix counts if the peer stored codes
for it and its decoded weights differ from the original ones. A matrix without codes counts 16 bits
per weight.

Shapes: E experts, F intermediate, D hidden, N output rows and K input columns of one expert matrix.
"""

import argparse
import concurrent.futures
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

SPLIT = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
    "up_proj": ("up_proj",),
}


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack int32 `words` [R, C] along the rows, low bits first, to codes [R * 32 / bits, C].

    A code of 3 bits may lie across two words, so the words are read as one string of bits.
    """
    shifts = torch.arange(32, dtype=torch.int32).view(1, 32, 1)
    stream = ((words.unsqueeze(1) >> shifts) & 1).reshape(-1, bits, words.shape[1])
    weights = (1 << torch.arange(bits, dtype=torch.int32)).view(1, bits, 1)
    return (stream * weights).sum(1, dtype=torch.int32)


def decode(stored: dict[str, torch.Tensor], bits: int, group_size: int) -> torch.Tensor:
    """Decode packed tensors to the float32 matrix [N, K]: scale * (code - zero point).

    They are qweight [K * bits / 32, N], qzeros [G, N * bits / 32] and scales [G, N], with
    G = ceil(K / group_size). By the convention of the GPTQ format, the file holds zero points less
    one. An optional g_idx [K] names each column's group.
    """
    codes_KN = unpack_words(stored["qweight"], bits)
    zeros_GN = unpack_words(stored["qzeros"].T.contiguous(), bits).T + 1
    group_K = (
        stored["g_idx"].long()
        if "g_idx" in stored
        else torch.arange(codes_KN.shape[0]) // group_size
    )
    return (stored["scales"].float()[group_K] * (codes_KN - zeros_GN[group_K])).T.contiguous()


def other_layers(model_folder: str) -> list[str]:
    """Return the names, within a decoder layer, of all linear layers outside the routed experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
    linear = {
        n
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and ".experts." not in n
    }
    return sorted(
        {re.sub(r"^.*\blayers\.\d+\.", "", name) for name in linear if ".layers." in name}
    )


def autoround(
    options: argparse.Namespace, folder: Path, ignored: list[str], ids: torch.Tensor
) -> None:
    """Leave AutoRound's packed checkpoint under `folder`."""
    # without it, 0.16.1 fails if checkpoint names differ from module names, as in Mixtral
    os.environ["AR_DISABLE_META_LOAD"] = "1"
    from auto_round import AutoRound

    compressor = AutoRound(
        options.model,
        bits=options.bits,
        group_size=options.group_size,
        sym=not options.asym,
        iters=options.iters,
        seed=options.seed,
        dataset=list(ids.split(1)),
        nsamples=len(ids),
        seqlen=ids.shape[1],
        ignore_layers=",".join(ignored),
        device_map=options.device,
    )
    compressor.quantize_and_save(str(folder), format="auto_round")


def gptqmodel(
    options: argparse.Namespace, folder: Path, ignored: list[str], ids: torch.Tensor
) -> None:
    """Leave GPTQModel's packed checkpoint under `folder`."""
    # 7.6.0 asks its pool for two workers, whatever the pool has
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig

    skip = {rf"-:.*\.{re.escape(name)}$": {} for name in ignored}
    config = QuantizeConfig(bits=options.bits, group_size=options.group_size, dynamic=skip)
    model = GPTQModel.load(options.model, config, device=options.device)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    model.quantize(rows, batch_size=1)
    model.save(str(folder))


TOOLS = {"auto-round": autoround, "gptqmodel": gptqmodel}


def quantize(options: argparse.Namespace, folder: Path, ignored: list[str]) -> dict[str, object]:
    """Run the peer, leave its packed checkpoint under `folder`, and return what it took."""
    if options.threads:
        torch.set_num_threads(options.threads)
    start, cpu_start = time.perf_counter(), time.process_time()
    TOOLS[options.tool](options, folder, ignored, torch.from_numpy(np.load(options.ids)))
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu_start, 2),
        "threads": torch.get_num_threads(),
        # ru_maxrss counts bytes on macOS, kilobytes elsewhere
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    }


def packed_matrices(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return the stored tensors of every packed matrix, by its module name.

    A routed expert's matrix is named "layer/expert/part", because the peer may use the checkpoint's
    names or the model's in between.
    """
    packed: dict[str, dict[str, torch.Tensor]] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        for name, tensor in load_file(file).items():
            module, _, kind = name.rpartition(".")
            if kind in ("qweight", "qzeros", "scales", "g_idx"):
                key = re.sub(r"^.*\blayers\.(\d+)\..*\bexperts\.(\d+)\.(\w+)$", r"\1/\2/\3", module)
                packed.setdefault(key, {})[kind] = tensor
    return packed


def expert_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the fused routed-expert weights [E, N, K] of the model, by parameter name."""
    found = {}
    for path, module in model.named_modules():
        if not re.search(r"(^|\.)experts$", path):
            continue
        matrices = {n: p for n, p in module.named_parameters(recurse=False) if p.ndim == 3}
        plain = not getattr(module, "is_transposed", False) and getattr(
            module, "is_concatenated", True
        )
        if not matrices or not plain or matrices.keys() - SPLIT.keys():
            kind = type(module).__name__
            raise SystemExit(
                f"error: {path} ({kind}): this layout of experts is not supported here"
            )
        found |= {f"{path}.{name}": weight for name, weight in matrices.items()}
    if not found:
        raise SystemExit(f"error: {type(model).__name__} has no routed experts")
    return found


def replace_experts(
    model: torch.nn.Module, packed: dict[str, dict[str, torch.Tensor]], bits: int, group_size: int
) -> dict[str, object]:
    """Write the decoded matrices into the model's experts; return the counts of what was stored."""
    count: Counter[str] = Counter()
    squares = errors = 0.0
    for name, weight_ENK in expert_parameters(model).items():
        layer, kind = re.search(r"\blayers\.(\d+)\..*\.(\w+)$", name).groups()
        for e, original_NK in enumerate(weight_ENK.detach()):
            rows = original_NK.shape[0] // len(SPLIT[kind])
            for part, target in zip(SPLIT[kind], original_NK.split(rows), strict=True):
                count["matrices"] += 1
                count["weights"] += target.numel()
                stored = packed.pop(f"{layer}/{e}/{part}", None)
                if stored is None:
                    count["bits"] += 16 * target.numel()
                    continue
                count["bits"] += sum(8 * t.numel() * t.element_size() for t in stored.values())
                decoded = decode(stored, bits, group_size)
                count["changed"] += not torch.equal(decoded, target)
                squares += target.square().sum().item()
                errors += (decoded - target).square().sum().item()
                target.copy_(decoded)
    if packed:
        raise SystemExit(
            f"error: the peer packed {len(packed)} matrices outside the routed experts: "
            f"{min(packed)}, ..."
        )
    return {
        "expert_matrices": count["matrices"],
        "expert_matrices_quantized": count["changed"],
        "experts_quantized": count["changed"] == count["matrices"],
        "expert_weights": count["weights"],
        "expert_bytes_stored": count["bits"] // 8,
        "bits_per_weight": count["bits"] / count["weights"],
        "relative_weight_error": errors / squares if squares else 0.0,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="quantize a checkpoint's routed experts with a peer tool"
    )
    parser.add_argument("--tool", choices=list(TOOLS), required=True)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--ids", required=True, help=".npy file of int64 token ids [rows, length]")
    parser.add_argument(
        "--out", required=True, type=Path, help="folder to fill: checkpoint/ and report.json"
    )
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--iters", type=int, required=True, help="0: round to nearest")
    parser.add_argument(
        "--asym", action="store_true", help="tuned zero points (AutoRound's default has fixed ones)"
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=0, help="0: leave torch's own choice")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


@torch.no_grad()
def save_decoded(options: argparse.Namespace, packed_folder: Path) -> dict[str, object]:
    """Save the original model with decoded experts as float32; return counts of what was stored."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    stored = replace_experts(
        model, packed_matrices(packed_folder), options.bits, options.group_size
    )
    model.save_pretrained(options.out / "checkpoint")
    if (Path(options.model) / "tokenizer_config.json").exists():
        AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out / "checkpoint")
    return stored


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    packed_folder = options.out / "packed"
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as process:
        cost = process.submit(
            quantize, options, packed_folder, other_layers(options.model)
        ).result()
    versions = {p: importlib.metadata.version(p) for p in (options.tool, "torch", "transformers")}
    report = {
        **cost,
        "device": options.device,
        "versions": versions | {"python": platform.python_version()},
        **save_decoded(options, packed_folder),
    }
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

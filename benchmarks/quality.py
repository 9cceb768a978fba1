"""What is lost at which size: moecc's pipelines beside other tools, on one checkpoint, in one run.

    python benchmarks/quality.py                      the example model; tables to benchmarks/results/quality.md and .json,
                                                      and KL and flips of all methods against bits per weight to quality.svg
    python benchmarks/quality.py --only 2bit ablation --model CHECKPOINT --calib FILE --text FILE
    python benchmarks/quality.py --join A.json B.json     one page of groups that were measured in several runs

Everything is quantized on the same calibration rows and evaluated on the same rows of a text that no method saw, by `moecc eval`
(KL(reference || quantized), perplexity, share of the chosen experts that stays the same). Bits per weight are counted over the
routed experts on disk, everything included. Only routed experts are quantized. Peers run in virtual environments of their own.
Seconds are wall-clock of the whole command on this machine, peak memory the largest process's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

import moecc
from moecc.commands.rows import token_rows, tokenizer_of
from moecc.errors import MoeccError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
EXAMPLE = ROOT / "examples" / "tinymoe"

TUNING = "vsraq{value=0,order=0,boundary=0,head=0}"  # on reconstruction alone

Method = tuple[str, str, float]  # label, peer method or pipeline, bits
AUTOROUND_2BIT: Method = ("AutoRound W2 g128, 200 iterations", "peer:autoround-w2g128", 2)
GPTQMODEL_2BIT: list[Method] = [
    ("GPTQModel W2 g128", "peer:gptqmodel-w2g128", 2),
    ("GPTQModel W2 g32", "peer:gptqmodel-w2g32", 2),
]
OURS_2BIT: list[Method] = [
    ("moecc kbvq", "kbvq", 2),
    ("moecc sensitivity,kbvq", "sensitivity,kbvq", 2),
    ("moecc kbvq + tuning, routers nowhere", f"sensitivity{{routing=0}},kbvq,{TUNING}", 2),
    ("moecc kbvq,vsraq", "kbvq,vsraq", 2),
    ("moecc kbvq,vsraq, 2.4 bits in all", "kbvq,vsraq", 2.4),
]
PEERS_3BIT: list[Method] = [
    ("AutoRound W3 g128, 200 iterations", "peer:autoround-w3g128", 3),
    ("GPTQModel W3 g128", "peer:gptqmodel-w3g128", 3),
]

METHODS: dict[str, list[Method]] = {
    "2bit": [
        AUTOROUND_2BIT,
        ("AutoRound W2 g128, rounding only", "peer:autoround-w2g128-rtn", 2),
        *GPTQMODEL_2BIT,
        *OURS_2BIT,
    ],
    "3bit": [
        *PEERS_3BIT,
        ("moecc kbvq", "kbvq", 3),
        ("moecc sensitivity,kbvq", "sensitivity,kbvq", 3),
        ("moecc kbvq,vsraq", "kbvq,vsraq", 3),
    ],
    "models": [  # the short table, for further models
        AUTOROUND_2BIT,
        *GPTQMODEL_2BIT,
        *OURS_2BIT,
        *PEERS_3BIT,
        ("moecc kbvq,vsraq, 3 bit", "kbvq,vsraq", 3),
    ],
    "speed": [  # with --fresh, so that the peer's seconds are of the same run
        AUTOROUND_2BIT,
        ("moecc kbvq", "kbvq", 2),
        ("moecc kbvq,vsraq", "kbvq,vsraq", 2),
    ],
    "rilq": [
        ("moecc kbvq", "kbvq", 2),
        ("moecc kbvq,rilq,merge, rank 4", "kbvq,rilq{rank=4},merge", 2),
        ("moecc kbvq,rilq,merge, rank 16", "kbvq,rilq,merge", 2),
        ("moecc kbvq,rilq,merge, rank 64", "kbvq,rilq{rank=64},merge", 2),
        ("moecc kbvq,vsraq", "kbvq,vsraq", 2),
        ("moecc kbvq,vsraq,rilq,merge", "kbvq,vsraq,rilq,merge", 2),
    ],
    "ablation": [
        ("k-means only", "moments,vq{feedback=false}", 2),
        ("+ error feedback and refits", "moments,vq", 2),
        ("+ affine", "moments,vq,affine,fold", 2),
        ("+ klt's basis", "kbvq{mean=off}", 2),
        ("+ klt's mean (= kbvq)", "kbvq", 2),
        ("+ sensitivity of the model's output", "sensitivity{routing=0},kbvq", 2),
        ("+ sensitivity of the routers", "sensitivity,kbvq", 2),
        (
            "kbvq + tuning on reconstruction alone, all errors alike",
            f"sensitivity{{kl=0,routing=0}},kbvq,{TUNING}",
            2,
        ),
        (
            "the same, + sensitivity of the model's output",
            f"sensitivity{{routing=0}},kbvq,{TUNING}",
            2,
        ),
        ("the same, + sensitivity of the routers", f"sensitivity,kbvq,{TUNING}", 2),
        (
            "the same, + value, order and boundary (= kbvq,vsraq without head)",
            "kbvq,vsraq{head=0}",
            2,
        ),
        ("+ head (= kbvq,vsraq)", "kbvq,vsraq", 2),
        ("kbvq,vsraq without mean", "kbvq{mean=off},vsraq", 2),
        ("kbvq,vsraq without basis", "kbvq{rank=0},vsraq", 2),
        ("kbvq,vsraq, a mean everywhere, 2 bit", "kbvq{rank=0,mean=2},vsraq", 2),
        ("kbvq,vsraq, rank 4", "kbvq{rank=4},vsraq", 2),
        ("kbvq,vsraq with one codebook per layer", "kbvq{codebook=layer},vsraq", 2),
        ("kbvq,vsraq, 2.4 bits in all", "kbvq,vsraq", 2.4),
        ("kbvq,vsraq, 2.7 bits in all", "kbvq,vsraq", 2.7),
    ],
}


def moecc_command(*args: str | Path) -> tuple[dict[str, Any], float, int]:
    """Run the command line; its JSON, seconds and peak memory in bytes."""
    command = [sys.executable, "-m", "moecc.cli", *map(str, args), "--json"]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True)
        errors = process.stderr.read() if process.stderr else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        result = out.read()
    if process.returncode:
        raise MoeccError(
            f"moecc {args[0]} failed: {errors.strip().splitlines()[-1] if errors.strip() else status}"
        )
    found: dict[str, Any] = json.loads(result)
    return found, time.perf_counter() - start, usage.ru_maxrss * 1024


def measure(
    label: str, method: str, bits: float, args: argparse.Namespace, work: Path, ids: Path
) -> dict[str, Any]:
    """One row of a table."""
    row: dict[str, Any] = {"label": label, "method": method, "bits": bits}
    if method.startswith("peer:"):
        import peers

        places = {"cache_dir": work / "peers"} if args.fresh else {}
        report = peers.quantize(args.model, np.load(ids), method.removeprefix("peer:"), **places)
        folder = Path(report["checkpoint"])
        row.update(
            {
                k: report[k]
                for k in (
                    "bits_per_weight",
                    "seconds",
                    "peak_memory_bytes",
                    "experts_quantized",
                    "versions",
                )
            }
        )
        row["bits_per_weight_experts"] = row.pop("bits_per_weight")
        if report["expert_matrices_quantized"] < report["expert_matrices"]:
            row["remark"] = (
                f" ({report['expert_matrices_quantized']} of {report['expert_matrices']} expert matrices quantized)"
            )
    else:
        folder = work / f"{len(list(work.iterdir()))}"
        found, seconds, memory = moecc_command(
            "compile", args.model, "--passes", method, "--bits", str(bits), "--calib", args.calib, "--rows", str(args.rows),
            "--length", str(args.length), "-o", folder,
        )  # fmt: skip
        row.update(seconds=seconds, peak_memory_bytes=memory, passes=found["passes"])
        row["bits_per_weight_experts"] = found["bits_per_weight_experts"]
    evaluation, _, _ = moecc_command(
        "eval",
        folder,
        "--reference",
        args.model,
        "--text",
        args.text,
        "--rows",
        str(args.eval_rows),
        "--length",
        str(args.length),
    )
    left_out = (
        "bits_per_weight_experts",
        "bits_per_weight",
        "model",
        "reference",
    )  # bits are the files'; folders are this machine's
    row.update({k: v for k, v in evaluation.items() if k not in left_out})
    return row


def attempt(
    label: str, method: str, bits: float, args: argparse.Namespace, work: Path, ids: Path
) -> dict[str, Any]:
    """The row of `measure`; of a peer that fails on this model, a row that says so."""
    try:
        return measure(label, method, bits, args, work, ids)
    except MoeccError as error:
        if not method.startswith("peer:"):
            raise
        return {
            "label": label,
            "method": method,
            "bits": bits,
            "failed": str(error).split(" (all of its output")[0],
        }


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as a Markdown table; flips are 1 - agreement."""
    lines = [
        "| method | bits/weight | perplexity | KL | agreement | flips | whole set equal | seconds | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "failed" in r:
            lines.append(f"| {r['label']}: could not ({r['failed']}) |" + " |" * 8)
            continue
        figures = [
            f"{r['bits_per_weight_experts']:.3f}", f"{r['perplexity']:.4f}", f"{r['kl']:.5f}", f"{r['agreement']:.4f}",
            f"{1 - r['agreement']:.4f}", f"{r['exact_agreement']:.4f}", f"{r['seconds']:.0f}",
            f"{r['peak_memory_bytes'] / 2**30:.2f}",
        ]  # fmt: skip
        lines.append(f"| {r['label']}{r.get('remark', '')} | {' | '.join(figures)} |")
    return "\n".join(lines)


def plot(groups: dict[str, list[dict[str, Any]]], model: str, out: Path) -> None:
    """KL and flips against bits per weight, a point for every method of the tables with peers."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib isn't installed; pip install '.[bench]'", file=sys.stderr)
        return
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moecc"  # the same points, the same bytes
    from matplotlib import pyplot

    parts = [r for name, group in groups.items() if name.startswith("ablation") for r in group]
    tables = [
        r
        for name, group in groups.items()
        if not name.startswith("ablation")
        for r in group
        if "failed" not in r
    ]
    kinds = [
        ("peers", [r for r in tables if r["method"].startswith("peer:")], "s", "#b0492f"),
        ("moecc", [r for r in tables if not r["method"].startswith("peer:")], "o", "#2f6db0"),
        ("moecc, parts left out", parts, ".", "#9db8d6"),
    ]
    figure, both = pyplot.subplots(1, 2, figsize=(13, 5))
    for axes, title, value in (
        (both[0], "KL(reference || compressed), nats per token", lambda r: r["kl"]),
        (both[1], "experts chosen otherwise", lambda r: 1 - r["agreement"]),
    ):
        for label, rows, marker, color in reversed(kinds):
            bits, heights = [r["bits_per_weight_experts"] for r in rows], [value(r) for r in rows]
            axes.plot(bits, heights, marker, color=color, label=label)
            for i, r in enumerate(rows if marker != "." else ()):
                place = (6, -8) if i % 2 else (6, 3)
                name = r["label"].removeprefix("moecc ")
                axes.annotate(
                    name, (bits[i], heights[i]), place, textcoords="offset points", fontsize=6
                )
        axes.margins(x=0.2)
        axes.set_yscale("log")
        axes.set_xlabel("bits per weight of the routed experts, everything counted")
        axes.set_ylabel(title)
        axes.legend()
    figure.suptitle(f"{model}: what is lost at which size")
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def document(groups: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> str:
    """The whole page."""
    measured = [r for rows in groups.values() for r in rows if "failed" not in r]
    reference = measured[0]["reference_perplexity"] if measured else float("nan")
    head = [
        "# Quality at equal bits", "",
        f"Model `{args.model.name}`, calibration {args.rows} x {args.length} tokens, evaluation {args.eval_rows} x {args.length} "
        f"tokens of another text; reference perplexity {reference:.4f}. Routed experts only; KL in nats per token. "
        f"moecc {moecc.__version__}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores. "
        "Made by `python benchmarks/quality.py`; seconds of peers are those "
        f"of {'this run' if args.fresh else 'the run that their kept results come from'}."
        + (f" {args.remark}" if args.remark else ""),
    ]  # fmt: skip
    for name, rows in groups.items():
        head += ["", f"## {name}", "", table(rows)]
    return "\n".join(head) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=EXAMPLE)
    parser.add_argument("--calib", type=Path, default=EXAMPLE / "calib.txt")
    parser.add_argument("--text", type=Path, default=EXAMPLE / "valid.txt")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--eval-rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--only",
        nargs="*",
        choices=list(METHODS),
        default=[g for g in METHODS if g not in ("models", "speed")],
    )
    parser.add_argument(
        "--join",
        nargs="+",
        type=Path,
        metavar="JSON",
        help="measure nothing, join the groups of these results",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="run peers anew though their results are kept"
    )
    parser.add_argument("--remark", default="", help="a sentence for the head of the page")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quality")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[dict[str, Any]]] = {}
    if args.join:
        for file in args.join:
            groups |= json.loads(file.read_text())
        return finish(groups, args)
    seen: dict[tuple[str, float], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        ids = work / "ids.npy"
        np.save(
            ids,
            token_rows(
                tokenizer_of(args.model), args.calib, count=args.rows, length=args.length
            ).numpy(),
        )
        for group in args.only:
            groups[group] = []
            for label, method, bits in METHODS[group]:
                if (method, bits) not in seen:
                    seen[method, bits] = attempt(label, method, bits, args, work, ids)
                row = {**seen[method, bits], "label": label}
                groups[group].append(row)
                print(table([row]).splitlines()[-1], file=sys.stderr, flush=True)
                args.out.with_suffix(".json").write_text(json.dumps(groups, indent=1) + "\n")
                args.out.with_suffix(".md").write_text(document(groups, args))
    return finish(groups, args)


def finish(groups: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> int:
    """Write the page, the numbers and the plot."""
    args.out.with_suffix(".json").write_text(json.dumps(groups, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(document(groups, args))
    plot(groups, args.model.name, args.out.with_suffix(".svg"))
    print(args.out.with_suffix(".md").read_text())
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except MoeccError as error:
        print(f"quality: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None

"""Quality against size: moecc's pipelines beside other tools, on one checkpoint, in one run.

    python benchmarks/quality.py
        the example model: tables to benchmarks/results/quality.md and .json, and KL and flips of
        all methods against bits per weight to quality.svg
    python benchmarks/quality.py --only 2bit ablation --model CHECKPOINT --calib FILE --text FILE
    python benchmarks/quality.py --join A.json B.json
        one page of groups that were measured in several runs

Every method is calibrated on the same rows and evaluated on the same rows of a text that none of
them saw, by `moecc eval`: KL(reference || quantized), perplexity, and the share of chosen experts
that stays the same. Only routed experts are quantized; bits per weight count everything that is
stored for them on disk. Peers run in virtual environments of their own. Seconds are wall-clock time
of the whole command on this machine, peak memory is that of its largest process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from _command import moecc_command
from _quality import Groups, Row, document, plot, table

from moecc.commands.rows import token_rows, tokenizer_of
from moecc.errors import MoeccError

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tinymoe"

TUNING = "vsraq{value=0,order=0,boundary=0,head=0}"  # for reconstruction alone

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


def measure(
    label: str, method: str, bits: float, args: argparse.Namespace, work: Path, ids: Path
) -> Row:
    """Return one row of a table. Raise MoeccError if the peer or moecc fails."""
    row: Row = {"label": label, "method": method, "bits": bits}
    if method.startswith("peer:"):
        folder = _peer(method.removeprefix("peer:"), args, work, ids, row)
    else:
        folder = _ours(method, bits, args, work, row)
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
    # bits are counted from files, not by eval; folders are those of this machine
    left_out = ("bits_per_weight_experts", "bits_per_weight", "model", "reference")
    row.update({k: v for k, v in evaluation.items() if k not in left_out})
    return row


def _peer(method: str, args: argparse.Namespace, work: Path, ids: Path, row: Row) -> Path:
    """Quantize by a peer, complete `row`, and return the checkpoint to evaluate."""
    import peers

    places = {"cache_dir": work / "peers"} if args.fresh else {}
    report = peers.quantize(args.model, np.load(ids), method, **places)
    for key in ("seconds", "peak_memory_bytes", "experts_quantized", "versions"):
        row[key] = report[key]
    row["bits_per_weight_experts"] = report["bits_per_weight"]
    done, total = report["expert_matrices_quantized"], report["expert_matrices"]
    if done < total:
        row["remark"] = f" ({done} of {total} expert matrices quantized)"
    return Path(report["checkpoint"])


def _ours(passes: str, bits: float, args: argparse.Namespace, work: Path, row: Row) -> Path:
    """Compile by moecc, complete `row`, and return the artifact."""
    folder = work / f"{len(list(work.iterdir()))}"
    found, seconds, memory = moecc_command(
        "compile",
        args.model,
        "--passes",
        passes,
        "--bits",
        str(bits),
        "--calib",
        args.calib,
        "--rows",
        str(args.rows),
        "--length",
        str(args.length),
        "-o",
        folder,
    )
    row.update(seconds=seconds, peak_memory_bytes=memory, passes=found["passes"])
    row["bits_per_weight_experts"] = found["bits_per_weight_experts"]
    return folder


def attempt(
    label: str, method: str, bits: float, args: argparse.Namespace, work: Path, ids: Path
) -> Row:
    """Return the row of `measure`, or a row that says how a peer failed on this model."""
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


def options() -> argparse.Namespace:
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
        "--fresh", action="store_true", help="run peers again even if their results are kept"
    )
    parser.add_argument("--remark", default="", help="a sentence for the head of the page")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quality")
    return parser.parse_args()


def write(groups: Groups, args: argparse.Namespace) -> None:
    """Write the numbers and the page."""
    args.out.with_suffix(".json").write_text(json.dumps(groups, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(document(groups, args))


def measure_groups(args: argparse.Namespace, work: Path) -> Groups:
    """Measure the groups of `args.only`; every method once, and written at once."""
    ids = work / "ids.npy"
    rows = token_rows(tokenizer_of(args.model), args.calib, count=args.rows, length=args.length)
    np.save(ids, rows.numpy())
    groups: Groups = {}
    seen: dict[tuple[str, float], Row] = {}
    for group in args.only:
        groups[group] = []
        for label, method, bits in METHODS[group]:
            if (method, bits) not in seen:
                seen[method, bits] = attempt(label, method, bits, args, work, ids)
            row = {**seen[method, bits], "label": label}
            groups[group].append(row)
            print(table([row]).splitlines()[-1], file=sys.stderr, flush=True)
            write(groups, args)
    return groups


def main() -> int:
    args = options()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    groups: Groups = {}
    if args.join:
        for file in args.join:
            groups |= json.loads(file.read_text())
    else:
        with tempfile.TemporaryDirectory() as folder:
            groups = measure_groups(args, Path(folder))
    write(groups, args)
    plot(groups, args.model.name, args.out.with_suffix(".svg"))
    print(args.out.with_suffix(".md").read_text())
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except MoeccError as error:
        print(f"quality: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None

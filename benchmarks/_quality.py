"""What quality.py writes: its tables, its plot and its page."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import moecc
from moecc.types import Json

Row: TypeAlias = Json
Groups: TypeAlias = dict[str, list[Row]]  # name of a table -> its rows


def table(rows: Iterable[Row]) -> str:
    """Return the rows as a Markdown table; flips are 1 - agreement."""
    lines = [
        "| method | bits/weight | perplexity | KL | agreement | flips | whole set equal | seconds "
        "| peak GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "failed" in r:
            lines.append(f"| {r['label']}: could not ({r['failed']}) |" + " |" * 8)
            continue
        figures = [
            f"{r['bits_per_weight_experts']:.3f}",
            f"{r['perplexity']:.4f}",
            f"{r['kl']:.5f}",
            f"{r['agreement']:.4f}",
            f"{1 - r['agreement']:.4f}",
            f"{r['exact_agreement']:.4f}",
            f"{r['seconds']:.0f}",
            f"{r['peak_memory_bytes'] / 2**30:.2f}",
        ]
        lines.append(f"| {r['label']}{r.get('remark', '')} | {' | '.join(figures)} |")
    return "\n".join(lines)


# marker and colour of each kind of point
STYLES = {
    "peers": ("s", "#b0492f"),
    "moecc": ("o", "#2f6db0"),
    "moecc, parts left out": (".", "#9db8d6"),
}


def plot(groups: Groups, model: str, out: Path) -> None:
    """Plot KL and flips against bits per weight, a point per method of the tables with peers."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib isn't installed; pip install '.[bench]'", file=sys.stderr)
        return
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moecc"  # the same points, the same bytes
    from matplotlib import pyplot

    kinds = _kinds(groups)
    figure, both = pyplot.subplots(1, 2, figsize=(13, 5))
    for axes, title, value in (
        (both[0], "KL(reference || compressed), nats per token", lambda r: r["kl"]),
        (both[1], "experts chosen otherwise", lambda r: 1 - r["agreement"]),
    ):
        for label, rows in reversed(kinds.items()):
            marker, color = STYLES[label]
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


def _kinds(groups: Groups) -> Groups:
    """Sort all rows by the kind of their points, in the order of STYLES."""
    parts = [r for name, group in groups.items() if name.startswith("ablation") for r in group]
    tables = [
        r
        for name, group in groups.items()
        if not name.startswith("ablation")
        for r in group
        if "failed" not in r
    ]
    peers = [r for r in tables if r["method"].startswith("peer:")]
    ours = [r for r in tables if not r["method"].startswith("peer:")]
    return dict(zip(STYLES, (peers, ours, parts), strict=True))


def document(groups: Groups, args: argparse.Namespace) -> str:
    """Return the whole page. args: the options of quality.py."""
    measured = [r for rows in groups.values() for r in rows if "failed" not in r]
    reference = measured[0]["reference_perplexity"] if measured else float("nan")
    kept = "this run" if args.fresh else "the run that their kept results come from"
    head = [
        "# Quality at equal bits",
        "",
        f"Model `{args.model.name}`, calibration {args.rows} x {args.length} tokens, evaluation "
        f"{args.eval_rows} x {args.length} tokens of another text; reference perplexity "
        f"{reference:.4f}. Routed experts only; KL in nats per token. "
        f"moecc {moecc.__version__}, {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores. "
        f"Made by `python benchmarks/quality.py`; seconds of peers are those of {kept}."
        + (f" {args.remark}" if args.remark else ""),
    ]
    for name, rows in groups.items():
        head += ["", f"## {name}", "", table(rows)]
    return "\n".join(head) + "\n"

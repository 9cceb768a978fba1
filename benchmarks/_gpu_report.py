"""What gpu.py writes: its page, its plot, and the rows of an earlier run that it keeps."""

from __future__ import annotations

import json
from pathlib import Path

import _gpu

from moecc.types import Json

# ---------------------------------------------------------------- the page


def report(found: Json) -> str:
    """Return the page as Markdown."""
    lines = _head(found)
    for shape in dict.fromkeys(row["shape"] for row in found["layers"]):
        lines += _layer_table(shape, [row for row in found["layers"] if row["shape"] == shape])
    if found["model"]:
        lines += _model_table(found["model_shape"], found["model"])
    return "\n".join(lines).rstrip() + "\n"


def _head(found: Json) -> list[str]:
    worst = max(row["error"] for row in found["checks"])
    kept = f"Of an earlier run: {' and '.join(found['kept'])}." if found.get("kept") else ""
    return [
        "# Triton kernels on a GPU",
        "",
        f"`python benchmarks/gpu.py`, {found['device']}, torch {found['torch']}, "
        f"triton {found['triton']}. Memory bandwidth, measured: "
        f"{found['bandwidth'] / 1e12:.2f} TB/s. {len(found['checks'])} layers against the "
        f"reference: largest error {worst:.1e} of the largest output, the same bits each time.",
        "",
        "One MoE layer's routed experts, microseconds, medians, CUDA graph, cold L2; in brackets "
        "the share of the memory roofline. *times* is the best bfloat16 implementation's time over "
        "moecc's, and that of its two products alone.",
        *(["", kept] if kept else []),
        "",
    ]


def _layer_table(shape: str, rows: list[Json]) -> list[str]:
    """Return the table of one shape: a line per implementation, a column per number of tokens."""
    rows = sorted(rows, key=lambda row: row["tokens"])
    tokens, whats = (list(dict.fromkeys(row[key] for row in rows)) for key in ("tokens", "what"))
    head = "| | " + " | ".join(f"{t} tokens" for t in tokens) + " |"
    lines = [f"## {shape}", "", head, "|---|" + "---|" * len(tokens)]
    cells = {(row["what"], row["tokens"]): row for row in rows}
    for what in whats:
        shown = (
            _cell(cells.get((what, t)), _best(rows, t), cells.get((_gpu.PRODUCTS, t)))
            for t in tokens
        )
        lines.append(f"| {what} | " + " | ".join(shown) + " |")
    return [*lines, ""]


def _model_table(shape: str, rows: list[Json]) -> list[str]:
    lines = [
        f"## {shape}, random weights, tokens per second",
        "",
        "| bits | batch | | tokens/s |",
        "|---|---|---|---|",
    ]
    for r in rows:
        speed = f"{r['tokens_per_second']:.1f}" if "tokens_per_second" in r else r["error"]
        lines.append(f"| {r['bits']} | {r['batch']} | {r['kind']} | {speed} |")
    return lines


def _best(rows: list[Json], tokens: int) -> float | None:
    """Return the time of the best bfloat16 implementation."""
    others = ("transformers", "vLLM", "gpt-oss")
    mine = (r for r in rows if r["tokens"] == tokens and "us" in r)
    return min((r["us"] for r in mine if r["what"].startswith(others)), default=None)


def _cell(row: Json | None, best: float | None, products: Json | None) -> str:
    if row is None or "us" not in row:
        return "" if row is None else row["error"].split(":")[0]
    text = f"{row['us']:.1f} ({row['roofline']:.0%})" + ("" if row["graph"] else " no graph")
    if not row["what"].startswith("moecc") or not best or products is None:
        return text
    return f"{text}, **{best / row['us']:.2f}**, {products['us'] / row['us']:.2f} times"


def plot(found: Json, path: Path) -> None:
    """Plot the speed relative to the best bfloat16 implementation, by tokens."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    layers = found["layers"]
    ours = (r for r in layers if r["what"].startswith("moecc"))
    for shape, what in dict.fromkeys((r["shape"], r["what"]) for r in ours):
        mine = sorted((r for r in layers if r["shape"] == shape), key=lambda r: r["tokens"])
        points = [
            (r["tokens"], _best(mine, r["tokens"]), r["us"]) for r in mine if r["what"] == what
        ]
        shown = [(t, best / us) for t, best, us in points if best]
        x, y = [t for t, _ in shown], [y for _, y in shown]
        axes.plot(x, y, marker="o", label=f"{shape}, {what}")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(
        xscale="log",
        xlabel="tokens",
        ylabel="times as fast as the best bfloat16",
        title=found["device"],
    )
    axes.legend(fontsize=7)
    figure.savefig(path, bbox_inches="tight")


def write(found: Json, out: Path) -> None:
    """Write the numbers and the page into the folder `out`."""
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "gpu.md").write_text(report(found))


# ---------------------------------------------------------------- rows of an earlier run


def kept(found: Json, out: Path, only: str, sizes: set[tuple[str, int]], ours: set[str]) -> Json:
    """Add the rows of an earlier run in `out` that this run does not measure.

    The earlier run must be of the same card and the same versions. only: the part that this run
    measures, "model" or "layers". sizes: (shape, tokens) of the measured layers. ours: moecc's
    measured rows.
    """
    try:
        earlier = json.loads((out / "gpu.json").read_text())
    except FileNotFoundError:
        return found
    if any(earlier[key] != found[key] for key in ("device", "torch", "triton")):
        return found
    if only == "model":
        return found | dict(layers=earlier["layers"], kept=["the layers"])

    def measured(row: Json) -> bool:
        again = (row["shape"], row["tokens"]) in sizes
        return again and (row["what"] in ours or not row["what"].startswith("moecc"))

    rest = [row for row in earlier["layers"] if not measured(row)]
    again, names = {t for _, t in sizes}, ["the model"] * bool(earlier["model"])
    whole = sorted({row["tokens"] for row in rest} - again)
    if whole:
        names.append(f"layers of {', '.join(map(str, whole))} tokens")
    names += dict.fromkeys(
        f"{row['what']} of {row['shape']}, {row['tokens']} tokens"
        for row in rest
        if row["tokens"] in again
    )
    return found | dict(
        layers=rest, model=earlier["model"], model_shape=earlier.get("model_shape"), kept=names
    )

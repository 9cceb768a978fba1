"""report.html: what became of a model, on one page that needs nothing but itself.

It says nothing that moecc.json does not hold.

The size before is worked out, not measured: every parameter by its shape at 16 bits, or at `details["source_bits"]`
where the row has it; a tensor stored as it was at its own size; a tied tensor once; the source's headers and what the
model does not use, not at all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from moecc.artifact.schema import Row, summary
from moecc.checkpoint.files import size
from moecc.checkpoint.roles import ROLES, ROUTED
from moecc.types import Json

SOURCE_BITS = 16
_ROLES = tuple(sorted(ROLES, key=lambda role: role != ROUTED))
_NOTHING = '<p class="dim">Nothing recorded.</p>'
_HEAT = (
    "Calibration tokens of each expert beside the layer's mean: a step darker is twice as many; "
    "palest: under 1/4."
)


def write_report(folder: Path, facts: Mapping[str, Any], rows: Sequence[Row]) -> Path:
    """Write report.html into `folder`; equal facts and rows give equal bytes."""
    target, partial = folder / "report.html", folder / "report.html.partial"
    # A path of the source may hold bytes that are no text; they must not cost the user a finished compilation.
    partial.write_bytes(page(facts, rows).encode("utf-8", "backslashreplace"))
    os.replace(partial, target)
    return target


def page(facts: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The page as text."""
    layers, title = layers_of(rows), escape(str(facts.get("source", "model")))
    sections = [
        ("", _headline(rows)),
        ("Notes", _notes(facts, rows)),
        ("Pipeline", _pipeline(facts)),
        ("Bytes by role", _roles(rows)),
        ("Coding error", _errors(layers)),
        ("Tokens per expert", _heat(layers)),
        ("Per projection", _projections(layers)),
        ("Losses", _losses(layers)),
        ("Audit", _audit(rows)),
    ]
    body = "\n".join(
        f"<section>{f'<h2>{name}</h2>' if name else ''}\n{text}\n</section>"
        for name, text in sections
    )
    top = f'<h1>{title} <span class="dim">compiled by moecc</span></h1>'
    return f"{_HEAD}<title>{title}, compiled by moecc</title></head>\n<body>{top}\n{body}\n</body></html>\n"


# ---- what the rows say


def bytes_before(rows: Sequence[Row]) -> list[int]:
    """Bytes of every row's parameter in the source, by the rule at the top of this file."""
    lead = {r.name: r for r in rows}
    return [_before(r, lead.get(r.fate.of, r)) for r in rows]


def _before(row: Row, lead: Row) -> int:
    if row.fate.kind == "kept":
        return row.nbytes
    if row.fate.kind in ("tied", "unused", "header"):
        return 0
    bits = row.details.get("source_bits") or lead.details.get("source_bits") or SOURCE_BITS
    return math.prod(row.shape) * int(bits) // 8


def layers_of(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of coded projections by layer: its number, with the experts' path if that is not enough."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.projection and "bytes" in row.details:
            found.setdefault(row.experts, []).append(row)
    numbers = [of[0].layer for of in found.values()]
    alone = len(set(numbers)) == len(numbers)
    order = sorted(found, key=lambda path: (found[path][0].layer or 0, path))
    return {str(found[path][0].layer) if alone else path: found[path] for path in order}


def starved_of(row: Row) -> set[int]:
    """Experts that saw too few tokens, and those that no token reached."""
    return {*map(int, row.starved), *(e for e, count in enumerate(row.tokens or ()) if count == 0)}


def fallback_of(row: Row) -> str:
    """Why something of the row's parameter fell back, in a sentence; empty if nothing did."""
    if row.starved:
        experts = sorted(map(int, row.starved))
        return f"experts {experts} saw too few tokens; calibrated on tokens sent to them"
    return row.fallback


# ---- sections


def _headline(rows: Sequence[Row]) -> str:
    found, before = summary(rows), sum(bytes_before(rows))
    after = found["bytes"]
    tiles = [
        ("size before", size(before)),
        ("size after", size(after)),
        ("ratio", f"{before / after:.2f}×" if after else "–"),
        ("bits/weight, routed experts", _number(found["bits_per_weight_experts"], 3)),
        ("bits/weight, everything", _number(found["bits_per_weight"], 3)),
    ]
    cells = "".join(
        f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in tiles
    )
    said = any(r.details.get("source_bits") for r in rows)
    return (
        f'<div class="tiles">{cells}</div><p class="dim">Size before ({before:,} bytes) is worked out from shapes, at '
        f"{SOURCE_BITS} bits per weight{' unless the source is known to differ' if said else ''}; unchanged tensors "
        f"count at their own size, tied ones once. Size after ({after:,} bytes) is all of model*.safetensors, headers "
        "included.</p>"
    )


def _notes(facts: Mapping[str, Any], rows: Sequence[Row]) -> str:
    notes = [escape(str(n)) for n in facts.get("notes") or ()]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if reason := fallback_of(row):
            reasons.setdefault(reason, []).append(row.name)
    for reason, names in reasons.items():
        listed = ", ".join(f"<code>{escape(n)}</code>" for n in names)
        many = f"<details><summary>{len(names):,} tensors</summary>{listed}</details>"
        notes.append(f"{escape(reason)}: {listed if len(names) <= 4 else many}")
    if not notes:
        return '<p class="dim">No expert was starved and nothing fell back.</p>'
    return f'<ul class="notes">{"".join(f"<li>{n}</li>" for n in notes)}</ul>'


def _pipeline(facts: Mapping[str, Any]) -> str:
    passes = [
        [
            escape(p["pass"]),
            _number(p.get("bits"), 3),
            _number(p.get("error"), 4),
            str(p.get("nodes", "")),
        ]
        for p in facts.get("passes") or ()
    ]
    about = (
        "source",
        "source_digest",
        "calibration_digest",
        "seed",
        "backend",
    )  # the format is among the versions
    known = [(k, facts[k]) for k in about if k in facts]
    known += sorted((facts.get("versions") or {}).items())
    listed = "".join(
        f"<dt>{escape(str(k))}</dt><dd>{escape(str(v)) or 'none'}</dd>" for k, v in known
    )
    table = _table(["pass", "bits/weight", "error", "nodes"], passes) if passes else ""
    return (
        f'<pre class="copy">{escape(str(facts.get("pipeline", "")))}</pre>{table}<dl>{listed}</dl>'
    )


def _roles(rows: Sequence[Row]) -> str:
    sizes: dict[str, list[int]] = {}
    for row, before in zip(rows, bytes_before(rows), strict=True):
        held = sizes.setdefault(row.role, [0, 0])
        held[0], held[1] = held[0] + before, held[1] + row.nbytes
    order = [r for r in _ROLES if r in sizes] + sorted(r for r in sizes if r not in _ROLES)
    color = {r: f"c{_ROLES.index(r) if r in _ROLES else len(_ROLES) - 1}" for r in order}
    totals, bars = [sum(s[i] for s in sizes.values()) for i in (0, 1)], ""
    for i, name in enumerate(("before", "after")):
        parts, x = [], 0.0
        for role in order:
            width = 1000 * sizes[role][i] / max(*totals, 1)
            parts.append(_rect(x, 0, width, 10, color[role], f"{role}: {size(sizes[role][i])}"))
            x += width
        bars += _line(name, _svg(1000, 10, parts), size(totals[i]), "stack")
    lines = [
        [f'<i class="key {color[r]}"></i>{escape(r)}', f"{sizes[r][0]:,}", f"{sizes[r][1]:,}"]
        for r in order
    ]
    return bars + _table(["role", "bytes before", "bytes after"], lines)


def _errors(layers: Mapping[str, list[Row]]) -> str:
    known = [r.error for rows in layers.values() for r in rows if _finite(r.error)]
    if not known:
        return _NOTHING
    worst, lines = max(*(float(e or 0) for e in known), 1e-12), ""
    names = list(dict.fromkeys(r.projection for rows in layers.values() for r in rows))
    for label, rows in layers.items():
        parts = []
        for i, r in enumerate(rows):
            width = 100 * min(r.error, worst) / worst if r.error and _finite(r.error) else 0
            color, title = names.index(r.projection), f"{r.projection}: {_number(r.error, 4)}"
            parts.append(_rect(0, 5 * i, width, 4.4, f"c{color}", title))
        said = " · ".join(_number(r.error, 4) for r in rows)
        lines += _line(f"layer {label}", _svg(100, 5 * len(rows), parts), said, "pair")
    keys = " ".join(f'<i class="key c{i}"></i>{name}' for i, name in enumerate(names))
    note = "Relative output error as coded, mean over experts, before correction and tuning:"
    return f'<p class="dim">{note} {keys}</p>{lines}'


def _finite(error: float | None) -> bool:
    return error is not None and math.isfinite(error)


def _heat(layers: Mapping[str, list[Row]]) -> str:
    lines = ""
    for label, rows in layers.items():
        row = next((r for r in rows if r.tokens), None)
        if row is not None and row.tokens:
            starved = sorted(starved_of(row))
            many = f"{len(starved)} experts"
            which = ", ".join(map(str, starved)) if len(starved) <= 12 else many
            named = f" · <b>starved: {which}</b>" if starved else ""
            strip = _svg(len(row.tokens), 11, _strip(row.tokens, starved))
            lines += _line(f"layer {label}", strip, _spread(row.tokens) + named, "heat")
    key = '<i class="key bad"></i>Starved experts. Numbers: minimum / median / maximum.'
    return f'<p class="dim">{_HEAT} {key}</p>{lines}' if lines else _NOTHING


def _strip(tokens: Sequence[int], starved: Sequence[int]) -> Iterable[str]:
    mean = sum(tokens) / len(tokens)
    for e, count in enumerate(tokens):
        level = min(max(math.floor(math.log2(count / mean)) + 4, 1), 7) if count else 0
        title = f"expert {e}: {count:,} tokens{', starved' if e in starved else ''}"
        yield _rect(e, 0, 0.92, 8, f"h{level}", title)
        if e in starved:  # a mark below, so that it does not rest on color alone
            yield _rect(e, 8.6, 0.92, 2.4, "bad", title)


def _projections(layers: Mapping[str, list[Row]]) -> str:
    """A column for every plain value that a pass recorded of a projection."""
    all_rows = [r for rows in layers.values() for r in rows]
    plain = (k for r in all_rows for k, v in r.details.items() if isinstance(v, int | float | str))
    shown = sorted({k for k in plain if k != "source_bits"})  # moecc.json sorts too
    lines = []
    for label, rows in layers.items():
        for r in rows:
            chosen = [_value(r.details.get(k)) for k in shown]
            parts = sorted(r.details["bytes"].items())
            stored = ", ".join(f"{escape(str(k))} {size(v)}" for k, v in parts)
            figures = [escape(str(r.fate)), _number(r.bits, 3), _number(r.error, 4)]
            lines.append([label, r.projection, *figures, *chosen, stored])
    head = ["layer", "projection", "became", "bits/weight", "error"]
    names = [escape(k.replace("_", " ")) for k in shown]
    return _table([*head, *names, "stored"], lines) if lines else _NOTHING


def _losses(layers: Mapping[str, list[Row]]) -> str:
    """A table for every fact with a before and an after: the terms of a loss, as a pass measured them."""
    tables: dict[str, list[tuple[str, Json]]] = {}
    for label, rows in layers.items():
        for key, told in {k: v for r in rows for k, v in r.details.items()}.items():
            if isinstance(told, dict) and {"before", "after"} <= told.keys():
                tables.setdefault(key, []).append((label, told))
    shown = ""
    for key, found in sorted(tables.items()):
        if all(told == found[0][1] for _, told in found):  # of the whole model, not of a layer
            found = [("all", found[0][1])]
        terms = sorted({k for _, told in found for k in told["before"]})
        lines = [
            [label, *(_change(told["before"].get(t), told["after"].get(t)) for t in terms)]
            for label, told in found
        ]
        shown += f"<h3>{escape(key)}</h3>" + _table(["layer", *map(escape, terms)], lines)
    note = "Terms on held-out calibration rows, before → after."
    return f'<p class="dim">{note}</p>{shown}' if shown else _NOTHING


def _audit(rows: Sequence[Row]) -> str:
    lines = []
    for r in rows:
        shape, bits = "×".join(map(str, r.shape)) or "–", _number(r.bits, 3) if r.bits else "–"
        tokens = f"{min(r.tokens):,} / {median(r.tokens):,.0f}" if r.tokens else "–"
        texts = [f"<code>{escape(r.name)}</code>", escape(r.role), shape, escape(str(r.fate))]
        lines.append(
            [*texts, f"{r.nbytes:,}", bits, _number(r.error, 4), tokens, escape(fallback_of(r))]
        )
    total = [
        "total",
        "",
        "",
        f"{len(rows):,} rows",
        f"{sum(r.nbytes for r in rows):,}",
        "",
        "",
        "",
        "",
    ]
    head = [
        "name",
        "role",
        "shape",
        "became",
        "bytes",
        "bits/weight",
        "error",
        "tokens min / median",
        "fallback",
    ]
    return _table(head, lines, total)


# ---- pieces; cells and labels are HTML already


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], total: Sequence[str] = ()) -> str:
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    foot = (
        f"<tfoot><tr>{''.join(f'<td>{cell}</td>' for cell in total)}</tr></tfoot>" if total else ""
    )
    names = "".join(f"<th>{name}</th>" for name in head)
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>\n{body}\n</tbody>{foot}</table></div>'


def _line(label: str, drawing: str, value: str, kind: str) -> str:
    return f'<div class="line {kind}"><span>{escape(label)}</span>{drawing}<span>{value}</span></div>\n'


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    # Stretched to whatever width there is; text stays outside, where it keeps its size on a phone.
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" preserveAspectRatio="none">{"".join(parts)}</svg>'
    )


def _rect(x: float, y: float, width: float, height: float, kind: str, title: str) -> str:
    at = f'x="{x:.6g}" y="{y:g}" width="{width:.6g}" height="{height:g}"'
    return f'<rect {at} class="{kind}"><title>{escape(title)}</title></rect>'


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _value(value: Any) -> str:
    """A recorded value as it is shown."""
    return (
        "–" if value is None else f"{value:.4g}" if isinstance(value, float) else escape(str(value))
    )


def _spread(counts: Sequence[int]) -> str:
    return f"{min(counts):,} / {median(counts):,.0f} / {max(counts):,}"


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "–"
    worse = "worse" if after > before else ""
    return f'<span class="{worse}">{before:.4g} → {after:.4g}</span>'


_SERIES = [f"c{i}" for i in range(len(_ROLES))]
_COLORS = "".join(
    f"rect.{k} {{ fill: var(--{k}) }} i.{k} {{ background: var(--{k}) }}\n"
    for k in (*_SERIES, "bad")
)
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #16191d; --dim: #5c636b; --rule: #dfe2e6; --card: #f5f6f8;
  --bad: #c62f2f; --c0: #2a78d6; --c1: #eb6834; --c2: #1baf7a; --c3: #eda100; --c4: #e87ba4; --c5: #008300;
  --c6: #4a3aa7; --c7: #8a9099 }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --ink: #e8eaed; --dim: #a0a7b0; --rule: #33383e;
  --card: #202327; --bad: #f06a6a; --c0: #3987e5; --c1: #d95926; --c2: #199e70; --c3: #c98500; --c4: #d55181;
  --c5: #35a035; --c6: #9085e9 } }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif }
h1 { font-size: 1.4rem; margin: .5rem 0; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.dim, dt, .tile span { color: var(--dim) } .worse { color: var(--bad) }
code, pre { font: 13px ui-monospace, monospace; overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .5rem }
.tile { background: var(--card); border-radius: 6px; padding: .6rem .8rem }
.tile b { display: block; font-size: 1.35rem } .tile span { font-size: .85rem }
.notes { margin: 0; padding: .6rem .8rem .6rem 1.8rem; border-left: 4px solid var(--bad); background: var(--card);
  max-height: 20rem; overflow: auto; overflow-wrap: anywhere }
.copy { background: var(--card); padding: .7rem; border-radius: 6px; white-space: pre-wrap; user-select: all;
  -webkit-user-select: all }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem } dd { margin: 0; overflow-wrap: anywhere }
.wide { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--rule); vertical-align: top;
  white-space: nowrap } th { color: var(--dim); font-weight: 500 }
tfoot td { font-weight: 700; border-top: 2px solid var(--ink) }
.line { display: grid; grid-template-columns: 5rem 1fr 13rem; gap: .1rem .7rem; align-items: center; margin: .25rem 0;
  font-size: 13px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
svg { width: 100%; display: block } .stack svg { height: 26px } .pair svg { height: 16px } .heat svg { height: 20px }
.stack rect { stroke: var(--page); stroke-width: 1.5px; vector-effect: non-scaling-stroke }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .35em 0 .3em }
rect { fill: var(--c0) } .h0 { fill: var(--rule); fill-opacity: .35 } .h1 { fill-opacity: .1 } .h2 { fill-opacity: .2 }
.h3 { fill-opacity: .35 } .h4 { fill-opacity: .5 } .h5 { fill-opacity: .65 } .h6 { fill-opacity: .82 }
@media (max-width: 40rem) { .line { grid-template-columns: 4.2rem 1fr } .line span:last-child { grid-column: 2 } }
"""
_HEAD = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{_STYLE}{_COLORS}</style>"""

"""report.html: the fate of a model's weights, on one page that loads nothing from elsewhere.

Everything on it comes from moecc.json.

The size before is computed, not measured. Every parameter counts by its shape at 16 bits, or at
`details["source_bits"]` if the row has it. A tensor stored as it was counts at its own size, a tied
tensor once. The source's headers and tensors that the model does not use do not count.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median

from moecc.artifact.schema import Row, summary
from moecc.checkpoint.files import size
from moecc.checkpoint.roles import ROLES, ROUTED
from moecc.commands import report_html as html
from moecc.types import Json

SOURCE_BITS = 16
_ROLES = tuple(sorted(ROLES, key=lambda role: role != ROUTED))
_NOTHING = '<p class="dim">Nothing recorded.</p>'
_HEAT = (
    "Calibration tokens of each expert beside the layer's mean: a step darker is twice as many; "
    "palest: under 1/4."
)
_AUDIT = (
    *("name", "role", "shape", "became", "bytes"),
    *("bits/weight", "error", "in-sample error", "tokens min / median", "fallback"),
)


def write_report(folder: Path, facts: Json, rows: Sequence[Row]) -> Path:
    """Write report.html into `folder`; equal facts and rows give equal bytes."""
    target, partial = folder / "report.html", folder / "report.html.partial"
    # Bytes in the source's path that are no text must not cost the user a finished compilation.
    partial.write_bytes(page(facts, rows).encode("utf-8", "backslashreplace"))
    os.replace(partial, target)
    return target


def page(facts: Json, rows: Sequence[Row]) -> str:
    """Return the text of the page."""
    layers, title = layers_of(rows), escape(str(facts.get("source", "model")))
    sections = [
        ("", _headline(rows)),
        ("Notes", _notes(facts, rows)),
        ("Pipeline", _pipeline(facts)),
        ("Bytes by role", _roles(rows)),
        ("In-sample coding error", _errors(layers)),
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
    return html.document(f"{title}, compiled by moecc", f"{top}\n{body}")


# ---- facts of the rows


def bytes_before(rows: Sequence[Row]) -> list[int]:
    """Return the bytes of each row's parameter in the source, by the rule at this file's top."""
    lead = {r.name: r for r in rows}
    return [_before(r, lead.get(r.fate.of, r)) for r in rows]


def _before(row: Row, lead: Row) -> int:
    """Return the bytes of one row; `lead` is the row that it is stored in, by default itself."""
    if row.fate.kind == "kept":
        return row.nbytes
    if row.fate.kind in ("tied", "unused", "header"):
        return 0
    bits = row.details.get("source_bits") or lead.details.get("source_bits") or SOURCE_BITS
    return math.prod(row.shape) * int(bits) // 8


def layers_of(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows of coded projections by layer, in the order of the layers' numbers.

    A layer is called by its number, or by its experts' path if two layers have one number.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.projection and "bytes" in row.details:
            found.setdefault(row.experts, []).append(row)
    numbers = [of[0].layer for of in found.values()]
    alone = len(set(numbers)) == len(numbers)
    order = sorted(found, key=lambda path: (found[path][0].layer or 0, path))
    return {str(found[path][0].layer) if alone else path: found[path] for path in order}


def starved_of(row: Row) -> set[int]:
    """Return the experts that saw too few tokens, and those that no token reached."""
    return {*map(int, row.starved), *(e for e, count in enumerate(row.tokens or ()) if count == 0)}


def fallback_of(row: Row) -> str:
    """Return a sentence on why a part of the row's parameter fell back, "" if none did."""
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
    unless = " unless the source is known to differ" if said else ""
    note = (
        f"Size before ({before:,} bytes) is worked out from shapes, at {SOURCE_BITS} bits per "
        f"weight{unless}; unchanged tensors count at their own size, tied ones once. Size after "
        f"({after:,} bytes) is all of model*.safetensors, headers included."
    )
    return f'<div class="tiles">{cells}</div><p class="dim">{note}</p>'


def _notes(facts: Json, rows: Sequence[Row]) -> str:
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


def _pipeline(facts: Json) -> str:
    passes = []
    for p in facts.get("passes") or ():
        figures = [_number(p.get("bits"), 3), _number(p.get("in_sample_error"), 4)]
        passes.append([escape(p["pass"]), *figures, str(p.get("nodes", ""))])
    # the format is among the versions
    about = ("source", "source_digest", "calibration_digest", "seed", "backend")
    known = [(k, facts[k]) for k in about if k in facts]
    known += sorted((facts.get("versions") or {}).items())
    listed = "".join(
        f"<dt>{escape(str(k))}</dt><dd>{escape(str(v)) or 'none'}</dd>" for k, v in known
    )
    table = (
        html.table(["pass", "bits/weight", "in-sample error", "nodes"], passes) if passes else ""
    )
    text = escape(str(facts.get("pipeline", "")))
    return f'<pre class="copy">{text}</pre>{table}<dl>{listed}</dl>'


def _roles(rows: Sequence[Row]) -> str:
    sizes: dict[str, list[int]] = {}
    for row, before in zip(rows, bytes_before(rows), strict=True):
        held = sizes.setdefault(row.role, [0, 0])
        held[0], held[1] = held[0] + before, held[1] + row.nbytes
    order = [r for r in _ROLES if r in sizes] + sorted(r for r in sizes if r not in _ROLES)
    color = {r: html.SERIES[_ROLES.index(r) if r in _ROLES else -1] for r in order}
    totals = [sum(s[i] for s in sizes.values()) for i in (0, 1)]
    bars = ""
    for i, name in enumerate(("before", "after")):
        parts, x = [], 0.0
        for role in order:
            width = 1000 * sizes[role][i] / max(*totals, 1)
            title = f"{role}: {size(sizes[role][i])}"
            parts.append(html.rect(x, 0, width, 10, color[role], title))
            x += width
        bars += html.line(name, html.svg(1000, 10, parts), size(totals[i]), "stack")
    lines = [
        [html.key(color[r]) + escape(r), f"{sizes[r][0]:,}", f"{sizes[r][1]:,}"] for r in order
    ]
    return bars + html.table(["role", "bytes before", "bytes after"], lines)


def _errors(layers: Mapping[str, list[Row]]) -> str:
    errors = (r.in_sample_error for rows in layers.values() for r in rows)
    known = [e for e in errors if _finite(e)]
    if not known:
        return _NOTHING
    worst, lines = max(*(float(e or 0) for e in known), 1e-12), ""
    names = list(dict.fromkeys(r.projection for rows in layers.values() for r in rows))
    for label, rows in layers.items():
        parts = []
        for i, r in enumerate(rows):
            error, color = r.in_sample_error, names.index(r.projection)
            width = 100 * min(error, worst) / worst if error and _finite(error) else 0
            title = f"{r.projection}: {_number(error, 4)}"
            parts.append(html.rect(0, 5 * i, width, 4.4, html.SERIES[color], title))
        said = " · ".join(_number(r.in_sample_error, 4) for r in rows)
        drawing = html.svg(100, 5 * len(rows), parts)
        lines += html.line(f"layer {label}", drawing, said, "pair")
    keys = " ".join(html.key(html.SERIES[i]) + name for i, name in enumerate(names))
    note = (
        "Relative output error as coded, mean over experts, before correction and tuning, on the "
        "calibration tokens that the codes were fitted to. It falls with fewer tokens: "
        "<code>moecc eval</code> measures quality."
    )
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
            strip = html.svg(len(row.tokens), 11, _strip(row.tokens, starved))
            lines += html.line(f"layer {label}", strip, _spread(row.tokens) + named, "heat")
    key = html.key("bad") + "Starved experts. Numbers: minimum / median / maximum."
    return f'<p class="dim">{_HEAT} {key}</p>{lines}' if lines else _NOTHING


def _strip(tokens: Sequence[int], starved: Sequence[int]) -> Iterable[str]:
    mean = sum(tokens) / len(tokens)
    for e, count in enumerate(tokens):
        level = min(max(math.floor(math.log2(count / mean)) + 4, 1), 7) if count else 0
        title = f"expert {e}: {count:,} tokens{', starved' if e in starved else ''}"
        yield html.rect(e, 0, 0.92, 8, f"h{level}", title)
        if e in starved:  # a mark below too, for readers who cannot tell the colors apart
            yield html.rect(e, 8.6, 0.92, 2.4, "bad", title)


def _projections(layers: Mapping[str, list[Row]]) -> str:
    """Return a table with a column for every plain value that a pass recorded of a projection."""
    all_rows = [r for rows in layers.values() for r in rows]
    plain = (k for r in all_rows for k, v in r.details.items() if isinstance(v, int | float | str))
    shown = sorted({k for k in plain if k != "source_bits"})  # moecc.json sorts too
    lines = []
    for label, rows in layers.items():
        for r in rows:
            chosen = [_value(r.details.get(k)) for k in shown]
            parts = sorted(r.details["bytes"].items())
            stored = ", ".join(f"{escape(str(k))} {size(v)}" for k, v in parts)
            figures = [escape(str(r.fate)), _number(r.bits, 3), _number(r.in_sample_error, 4)]
            lines.append([label, r.projection, *figures, *chosen, stored])
    head = ["layer", "projection", "became", "bits/weight", "in-sample error"]
    names = [escape(k.replace("_", " ")) for k in shown]
    return html.table([*head, *names, "stored"], lines) if lines else _NOTHING


def _losses(layers: Mapping[str, list[Row]]) -> str:
    """Return a table for every recorded fact with a before and an after: terms of a pass's loss."""
    tables: dict[str, list[tuple[str, Json]]] = {}
    for label, rows in layers.items():
        for key, told in {k: v for r in rows for k, v in r.details.items()}.items():
            if isinstance(told, dict) and {"before", "after"} <= told.keys():
                tables.setdefault(key, []).append((label, told))
    shown = ""
    for key, found in sorted(tables.items()):
        # a loss of the whole model is recorded in every layer
        if all(told == found[0][1] for _, told in found):
            found = [("all", found[0][1])]
        terms = sorted({k for _, told in found for k in told["before"]})
        lines = [
            [label, *(_change(told["before"].get(t), told["after"].get(t)) for t in terms)]
            for label, told in found
        ]
        shown += f"<h3>{escape(key)}</h3>" + html.table(["layer", *map(escape, terms)], lines)
    note = "Terms on held-out calibration rows, before → after."
    return f'<p class="dim">{note}</p>{shown}' if shown else _NOTHING


def _audit(rows: Sequence[Row]) -> str:
    lines = []
    for r in rows:
        shape, bits = "×".join(map(str, r.shape)) or "–", _number(r.bits, 3) if r.bits else "–"
        tokens = f"{min(r.tokens):,} / {median(r.tokens):,.0f}" if r.tokens else "–"
        texts = [f"<code>{escape(r.name)}</code>", escape(r.role), shape, escape(str(r.fate))]
        errors = [_number(r.error, 4), _number(r.in_sample_error, 4)]
        figures = [f"{r.nbytes:,}", bits, *errors, tokens]
        lines.append([*texts, *figures, escape(fallback_of(r))])
    total = ["total", "", "", f"{len(rows):,} rows", f"{sum(r.nbytes for r in rows):,}"]
    return html.table(_AUDIT, lines, [*total, *[""] * (len(_AUDIT) - len(total))])


# ---- figures


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _value(value: object) -> str:
    """Return the text of a recorded value."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def _spread(counts: Sequence[int]) -> str:
    return f"{min(counts):,} / {median(counts):,.0f} / {max(counts):,}"


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "–"
    worse = "worse" if after > before else ""
    return f'<span class="{worse}">{before:.4g} → {after:.4g}</span>'

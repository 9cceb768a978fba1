"""The pieces of report.html: its style, tables, and bars drawn as SVG.

Cells, drawings and values are HTML already; labels and titles are text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# classes of the series' colors
SERIES = tuple(f"c{i}" for i in range(8))


def document(title: str, body: str) -> str:
    """Return a page that loads nothing from elsewhere. title, body: HTML."""
    head = f"{_HEAD}<title>{title}</title></head>"
    return f"{head}\n<body>{body}\n</body></html>\n"


def table(head: Sequence[str], lines: Iterable[Sequence[str]], total: Sequence[str] = ()) -> str:
    """Return a table; `total` is its last line."""
    names = "".join(f"<th>{name}</th>" for name in head)
    body = "\n".join(f"<tr>{_cells(line)}</tr>" for line in lines)
    foot = f"<tfoot><tr>{_cells(total)}</tr></tfoot>" if total else ""
    return (
        f'<div class="wide"><table><thead><tr>{names}</tr></thead>'
        f"<tbody>\n{body}\n</tbody>{foot}</table></div>"
    )


def _cells(line: Iterable[str]) -> str:
    return "".join(f"<td>{cell}</td>" for cell in line)


def line(label: str, drawing: str, value: str, kind: str) -> str:
    """Return a drawing between its label and its value; `kind` is a class of the style."""
    parts = f"<span>{escape(label)}</span>{drawing}<span>{value}</span>"
    return f'<div class="line {kind}">{parts}</div>\n'


def svg(width: float, height: float, parts: Iterable[str]) -> str:
    """Return a drawing of this size, stretched to the width there is.

    Text stays outside of it, where it keeps its size on a phone.
    """
    box = f'viewBox="0 0 {width:g} {height:g}" preserveAspectRatio="none"'
    return f"<svg {box}>{''.join(parts)}</svg>"


def rect(x: float, y: float, width: float, height: float, kind: str, title: str) -> str:
    """Return a rectangle of a drawing; `title` is shown while a pointer is on it."""
    at = f'x="{x:.6g}" y="{y:g}" width="{width:.6g}" height="{height:g}"'
    return f'<rect {at} class="{kind}"><title>{escape(title)}</title></rect>'


def key(kind: str) -> str:
    """Return a small square in the color of a class."""
    return f'<i class="key {kind}"></i>'


_COLORS = "".join(
    f"rect.{k} {{ fill: var(--{k}) }} i.{k} {{ background: var(--{k}) }}\n"
    for k in (*SERIES, "bad")
)
# A backslash joins a line with the next: where this text is wrapped does not change a page's bytes.
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #16191d; --dim: #5c636b; \
--rule: #dfe2e6; --card: #f5f6f8;
  --bad: #c62f2f; --c0: #2a78d6; --c1: #eb6834; --c2: #1baf7a; --c3: #eda100; --c4: #e87ba4; \
--c5: #008300;
  --c6: #4a3aa7; --c7: #8a9099 }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --ink: #e8eaed; --dim: #a0a7b0; \
--rule: #33383e;
  --card: #202327; --bad: #f06a6a; --c0: #3987e5; --c1: #d95926; --c2: #199e70; --c3: #c98500; \
--c4: #d55181;
  --c5: #35a035; --c6: #9085e9 } }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--page); \
color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif }
h1 { font-size: 1.4rem; margin: .5rem 0; overflow-wrap: anywhere } \
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.dim, dt, .tile span { color: var(--dim) } .worse { color: var(--bad) }
code, pre { font: 13px ui-monospace, monospace; overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); \
gap: .5rem }
.tile { background: var(--card); border-radius: 6px; padding: .6rem .8rem }
.tile b { display: block; font-size: 1.35rem } .tile span { font-size: .85rem }
.notes { margin: 0; padding: .6rem .8rem .6rem 1.8rem; border-left: 4px solid var(--bad); \
background: var(--card);
  max-height: 20rem; overflow: auto; overflow-wrap: anywhere }
.copy { background: var(--card); padding: .7rem; border-radius: 6px; white-space: pre-wrap; \
user-select: all;
  -webkit-user-select: all }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem } \
dd { margin: 0; overflow-wrap: anywhere }
.wide { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; \
border-bottom: 1px solid var(--rule); vertical-align: top;
  white-space: nowrap } th { color: var(--dim); font-weight: 500 }
tfoot td { font-weight: 700; border-top: 2px solid var(--ink) }
.line { display: grid; grid-template-columns: 5rem 1fr 13rem; gap: .1rem .7rem; \
align-items: center; margin: .25rem 0;
  font-size: 13px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
svg { width: 100%; display: block } .stack svg { height: 26px } .pair svg { height: 16px } \
.heat svg { height: 20px }
.stack rect { stroke: var(--page); stroke-width: 1.5px; vector-effect: non-scaling-stroke }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; \
margin: 0 .35em 0 .3em }
rect { fill: var(--c0) } .h0 { fill: var(--rule); fill-opacity: .35 } .h1 { fill-opacity: .1 } \
.h2 { fill-opacity: .2 }
.h3 { fill-opacity: .35 } .h4 { fill-opacity: .5 } .h5 { fill-opacity: .65 } \
.h6 { fill-opacity: .82 }
@media (max-width: 40rem) { .line { grid-template-columns: 4.2rem 1fr } \
.line span:last-child { grid-column: 2 } }
"""
_HEAD = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">\
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; style-src 'unsafe-inline'">
<style>{_STYLE}{_COLORS}</style>"""

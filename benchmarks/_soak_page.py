"""What soak.py says: its page of counts, and a case that failed."""

from __future__ import annotations

import platform
from collections.abc import Iterator

from _soak import KILLED, Played


def failure(played: Played, seed: int) -> str:
    """Return what is wrong with a case, and the command that repeats it."""
    case = played.case
    lines = [f"case {case.key}, {case.scenario.name}: " + "; then ".join(map(str, case.faults))]
    lines += [f"  {line}" for line in played.wrong]
    for ended in played.ends:
        lines += [f"  exit {ended.code}", *(f"    {line}" for line in ended.errors.splitlines())]
    workers = f" --workers {case.scenario.workers}" if case.scenario.workers > 1 else ""
    lines.append(
        f"  python benchmarks/soak.py --seed {seed}{workers} --only {case.key}   repeats it"
    )
    return "\n".join(lines)


def table(head: str, rows: list[list[object]]) -> list[str]:
    """Return a table as Markdown. head: its titles, between bars."""
    rule = "|" + "---|" * (head.count("|") - 1)
    return [head, rule, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]


def kill_rows(done: list[Played]) -> Iterator[list[object]]:
    """Return a row of counts for each scenario, and their sums."""
    cases = [played for played in done if played.case.key.isdecimal()]
    names = list(dict.fromkeys(played.case.scenario.name for played in cases))
    sums = [0] * 8
    for name in names:
        own = [played for played in cases if played.case.scenario.name == name]
        met = [fault.kind for played in own for fault in played.met]
        ends = [ended for played in own for ended in played.ends]
        row = [
            *(met.count(kind) for kind in KILLED),
            sum(len(played.met) for played in own if played.case.apart),
            sum(ended.goes_on for ended in ends),
            sum(ended.taken_up for ended in ends),
            len(own),
            sum(not played.wrong for played in own),
        ]
        sums = [a + b for a, b in zip(sums, row, strict=True)]
        yield [f"`{name}`", *row]
    yield ["all", *sums]


def drill_rows(done: list[Played]) -> Iterator[list[object]]:
    """Return a row for each drill and scenario."""
    cases = [played for played in done if not played.case.key.isdecimal()]
    kinds = [(p.case.key.rpartition(".")[0], p.case.scenario.name) for p in cases]
    for drilled, name in dict.fromkeys(kinds):
        own = [p for p, kind in zip(cases, kinds, strict=True) if kind == (drilled, name)]
        first = sorted({ended.code for p in own for ended in p.ends[:1]})
        yield [
            drilled,
            f"`{name}`",
            len(own),
            sum(bool(p.met) for p in own),
            ", ".join(map(str, first)),
            sum(not p.wrong for p in own),
        ]


def document(done: list[Played], seed: int, mounts: bool) -> str:
    """Return the page as Markdown."""
    import torch

    from moecc import __version__

    disk = "" if mounts else " No disk may be mounted here: drills that need one are left out."
    lines = [
        "# Killed, refused, run again",
        "",
        f"moecc {__version__}, torch {torch.__version__}, Python {platform.python_version()}, seed "
        f"{seed}. Made by `python benchmarks/soak.py`; what is compared is said there.{disk}",
        "",
        *table(
            "| command | kills at a moment | before a write | within a file | of own processes "
            "| runs that went on | stages taken up | results | identical |",
            list(kill_rows(done)),
        ),
        "",
        *table(
            "| drill | command | cases | fault met | exit codes | same bytes afterwards |",
            list(drill_rows(done)),
        ),
    ]
    return "\n".join(lines) + "\n"

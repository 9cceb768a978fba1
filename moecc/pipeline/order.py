"""Order passes: providers first, missing providers inserted, ties as typed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import networkx as nx

from moecc.errors import MoeccError
from moecc.pipeline.parse import pass_classes
from moecc.pipeline.passes import Composite, LayerPass, Pass


def resolve(passes: Sequence[Pass], facts: Iterable[str] = ()) -> tuple[list[Pass], list[str]]:
    """Return the passes in running order, and remarks on the inserted ones.

    facts: those that hold already. Raise MoeccError if a pass appears twice, if not
    exactly one pass provides a missing fact, or if passes need each other in a cycle.
    """
    passes = _once_if_renewed(passes)
    _require_once(passes)
    flat = [q for p in passes for q in _expanded(p)]
    remarks: list[str] = []
    while (lack := _first_lack(flat, set(facts))) is not None:
        user, fact = lack
        provider = _provider(user, fact)
        flat.insert(flat.index(user), provider)
        remarks.append(f"{user.name} requires {fact!r}; inserted {provider.name!r} before it")
    return _renewed(_sort(flat), remarks), remarks


def _once_if_renewed(passes: Sequence[Pass]) -> list[Pass]:
    """Drop repeated measuring passes from a pasted pipeline; `_renewed` inserts them again."""
    texts = [str(p) for p in passes]
    return [p for i, p in enumerate(passes) if not (p.within_layer and texts[i] in texts[:i])]


def _renewed(passes: list[Pass], remarks: list[str]) -> list[Pass]:
    """Insert layer-scoped providers again in each later round that needs them."""
    result: list[Pass] = []
    for group in groups(passes):
        there: set[str] = set()
        for p in group:
            for before in [q for q in result if q.within_layer & p.requires - there]:
                fact = min(before.within_layer & p.requires)
                if not isinstance(p, LayerPass) or p.own_round:
                    own, whole = "begins a round of its own", "works on the whole model"
                    but = f"but {p.name} {own if isinstance(p, LayerPass) else whole}"
                    scope = "which holds within one layer and one round"
                    raise MoeccError(f"{p.name} requires {fact!r}, {scope}, {but}")
                again = f"{before.name!r} runs again before it, in its round"
                remarks.append(f"{p.name} requires {fact!r}; {again}")
                result.append(before)
                there |= before.provides
            result.append(p)
            there |= p.provides
    return result


def _expanded(p: Pass) -> list[Pass]:
    return p.expand() if isinstance(p, Composite) else [p]


def _require_once(passes: Sequence[Pass]) -> None:
    """Refuse a pass that appears twice and provides facts: it would run on its own result."""
    for i, p in enumerate(passes):
        for before in passes[:i]:
            if p.name == before.name and p.provides:
                raise MoeccError(f"{p.name} is there twice; leave one out")
            names = {q.name for q in _expanded(before) if q.provides}
            if shared := next((q.name for q in _expanded(p) if q.name in names), None):
                holder = before.name if isinstance(before, Composite) else p.name
                raise MoeccError(f"{shared} is there twice ({holder} contains it); leave one out")


def require_whole(passes: Sequence[Pass]) -> None:
    """Raise MoeccError if the passes leave a program that no artifact can hold.

    Such as a basis without coded experts.
    """
    for i, p in enumerate(passes):
        lack = sorted(p.leads_to.difference(*(q.provides for q in passes[i + 1 :])))
        if lack:
            makers = [n for n, c in pass_classes().items() if lack[0] in c.provides]
            advice = f"add one of {makers} to the pipeline"
            raise MoeccError(f"{p.name} leaves what can't be stored before {lack[0]!r}; {advice}")


def _first_lack(passes: list[Pass], facts: set[str]) -> tuple[Pass, str] | None:
    given = facts.union(*(p.provides for p in passes))
    return next(((p, f) for p in passes for f in sorted(p.requires - given)), None)


def _provider(user: Pass, fact: str) -> Pass:
    """Return the one pass that provides `fact`, with its default options."""
    found = pass_classes()
    makers = [n for n, c in found.items() if fact in c.provides and not issubclass(c, Composite)]
    if len(makers) != 1:
        given = f"provided by {makers or 'no known pass'}"
        raise MoeccError(f"{user.name} requires {fact!r}; {given}; name one of them")
    return found[makers[0]]()


def _sort(passes: list[Pass]) -> list[Pass]:
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(passes)))
    for i, a in enumerate(passes):
        for j, b in enumerate(passes):
            if i != j and (a.provides & (b.requires | b.after) or b.spoils & a.requires):
                graph.add_edge(i, j)
    for i, a in enumerate(passes):  # the float model is made before any pass compresses it
        for j, b in enumerate(passes):
            if a.makes_reference and not b.makes_reference and not nx.has_path(graph, j, i):
                graph.add_edge(i, j)
    try:
        return [passes[i] for i in nx.lexicographical_topological_sort(graph, key=int)]
    except nx.NetworkXUnfeasible:
        cycle = " -> ".join(passes[i].name for i, _ in nx.find_cycle(graph))
        raise MoeccError(f"these passes need each other: {cycle}; leave one out") from None


def groups(passes: Sequence[Pass]) -> list[list[Pass]]:
    """Group consecutive layer passes of one round; any other pass is a group of its own."""
    groups: list[list[Pass]] = []
    for p in passes:
        joins = isinstance(p, LayerPass) and not p.own_round
        if joins and groups and isinstance(groups[-1][0], LayerPass):
            groups[-1].append(p)
        else:
            groups.append([p])
    return groups

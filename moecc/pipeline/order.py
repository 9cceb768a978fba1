"""The order in which passes run: providers first, what is missing put in, ties as typed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import networkx as nx

from moecc.errors import MoeccError
from moecc.pipeline.parse import find_pass, pass_names
from moecc.pipeline.passes import Composite, LayerPass, Pass

# ---- 2. order


def resolve(passes: Sequence[Pass], facts: Iterable[str] = ()) -> tuple[list[Pass], list[str]]:
    """The order in which the passes run, and remarks on what was inserted. `facts` hold already."""
    passes = _once_if_renewed(passes)
    _require_once(passes)
    flat = [q for p in passes for q in _expanded(p)]
    remarks: list[str] = []
    while (lack := _first_lack(flat, set(facts))) is not None:
        user, fact = lack
        provider = _provider(user, fact)
        flat.insert(flat.index(user), provider)
        remarks.append(f"{user.name} requires {fact!r}; inserted {provider.name!r} before it")
    return _renewed(_sort(flat, set(facts)), remarks), remarks


def _once_if_renewed(passes: Sequence[Pass]) -> list[Pass]:
    """Without what a resolved pipeline, typed again, has in a later round once more; it is put there anew."""
    texts = [str(p) for p in passes]
    return [p for i, p in enumerate(passes) if not (p.within_layer and texts[i] in texts[:i])]


def _renewed(passes: list[Pass], remarks: list[str]) -> list[Pass]:
    """The passes with providers of facts that hold within a layer once more in every round through the layers that needs them."""
    result: list[Pass] = []
    for group in groups(passes):
        there: set[str] = set()
        for p in group:
            for before in [q for q in result if q.within_layer & p.requires - there]:
                fact = min(before.within_layer & p.requires)
                if not isinstance(p, LayerPass) or p.own_round:
                    what = (
                        "begins a round of its own"
                        if isinstance(p, LayerPass)
                        else "works on the whole model"
                    )
                    raise MoeccError(
                        f"{p.name} requires {fact!r}, which holds within one layer and one round, but {p.name} {what}"
                    )
                remarks.append(
                    f"{p.name} requires {fact!r}; {before.name!r} runs again before it, in its round"
                )
                result.append(before)
                there |= before.provides
            result.append(p)
            there |= p.provides
    return result


def _expanded(p: Pass) -> list[Pass]:
    return p.expand() if isinstance(p, Composite) else [p]


def _require_once(passes: Sequence[Pass]) -> None:
    """MoeccError where what gives facts stands there twice: it would run on what it has made itself."""
    for i, p in enumerate(passes):
        for before in passes[:i]:
            if p.name == before.name and p.provides:
                raise MoeccError(f"{p.name} is there twice; leave one out")
            names = {q.name for q in _expanded(before) if q.provides}
            if shared := next((q.name for q in _expanded(p) if q.name in names), None):
                holder = before.name if isinstance(before, Composite) else p.name
                raise MoeccError(f"{shared} is there twice ({holder} contains it); leave one out")


def require_whole(passes: Sequence[Pass]) -> None:
    """MoeccError where the passes leave a program that no artifact can hold, such as a basis without coded experts."""
    for i, p in enumerate(passes):
        lack = sorted(p.leads_to.difference(*(q.provides for q in passes[i + 1 :])))
        if lack:
            makers = [n for n in pass_names() if lack[0] in find_pass(n).provides]
            raise MoeccError(
                f"{p.name} leaves what can't be stored before {lack[0]!r}; add one of {makers} to the pipeline"
            )


def _first_lack(passes: list[Pass], facts: set[str]) -> tuple[Pass, str] | None:
    given = facts.union(*(p.provides for p in passes))
    return next(((p, f) for p in passes for f in sorted(p.requires - given)), None)


def _provider(user: Pass, fact: str) -> Pass:
    """The one pass that provides `fact` and can be made with its defaults."""
    makers = [
        n
        for n in pass_names()
        if fact in find_pass(n).provides and not issubclass(find_pass(n), Composite)
    ]
    if len(makers) != 1:
        raise MoeccError(
            f"{user.name} requires {fact!r}; provided by {makers or 'no known pass'}; name one of them"
        )
    return find_pass(makers[0])()


def _sort(passes: list[Pass], facts: set[str]) -> list[Pass]:
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(passes)))
    for i, a in enumerate(passes):
        for j, b in enumerate(passes):
            if i != j and (a.provides & (b.requires | b.after) or b.spoils & a.requires):
                graph.add_edge(i, j)
    for i, a in enumerate(passes):  # the float model is made before anything is done to it
        for j, b in enumerate(passes):
            if a.makes_reference and not b.makes_reference and not nx.has_path(graph, j, i):
                graph.add_edge(i, j)
    try:
        return [passes[i] for i in nx.lexicographical_topological_sort(graph, key=int)]
    except nx.NetworkXUnfeasible:
        cycle = " -> ".join(passes[i].name for i, _ in nx.find_cycle(graph))
        raise MoeccError(f"these passes need each other: {cycle}; leave one out") from None


def groups(passes: Sequence[Pass]) -> list[list[Pass]]:
    groups: list[list[Pass]] = []
    for p in passes:
        if (
            groups
            and isinstance(p, LayerPass)
            and isinstance(groups[-1][0], LayerPass)
            and not p.own_round
        ):
            groups[-1].append(p)
        else:
            groups.append([p])
    return groups

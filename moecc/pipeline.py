"""From `--passes vsraq,kbvq{bits=2}` to a run: read, find, order, run, verify, report.

1. parse   text -> passes; a pass is a file of `moecc.passes`, an entry point of group `moecc.passes`, or a path to a file
2. resolve composites are expanded, a missing provider is put in front of who needs it (and said), the order comes from the facts:
           providers before users, ties as typed
3. run     consecutive layer passes go through the model together, layer by layer; after each pass the graph is verified
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from moecc.base import Composite, Context, Layer, LayerPass, MoeccError, Pass, accepted, accepts
from moecc.errors import reason
from moecc.ir import MoE, Program
from moecc.stream import Stream

_ITEM = re.compile(r"\s*([^,{}]*[^\s,{}])\s*(?:\{([^{}]*)\})?\s*(?:,|$)")
_FACTS = ("requires", "after", "provides", "spoils", "leads_to", "within_layer")


# ---- 1. from text to passes


def names() -> list[str]:
    """Every pass that can be named without a path."""
    import moecc.passes

    local = [m.name for m in pkgutil.iter_modules(moecc.passes.__path__) if not m.name.startswith("_")]
    return sorted({*local, *(ep.name for ep in entry_points(group="moecc.passes"))})


def find(name: str) -> type[Pass]:
    """The pass called `name`: a path to a Python file, an installed entry point, or `moecc/passes/<name>.py`."""
    found = _found(name)
    _require_sound(found, Path(name).name)
    return found


def _found(name: str) -> type[Pass]:
    if name.endswith(".py"):
        loaded = _pass_in(_load_file(Path(name)), Path(name).name)
        loaded.file = name
        return loaded
    for ep in entry_points(group="moecc.passes", name=name):
        found: type[Pass] = ep.load()
        return found
    if name not in names():
        if "/" in name or Path(name).is_file():
            raise MoeccError(f"{name} is no pass: the path of a pass file ends in .py, e.g. ./my_pass.py")
        near = difflib.get_close_matches(name, names(), n=1)
        raise MoeccError(
            f"no pass {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names())}")
        )
    return _pass_in(importlib.import_module(f"moecc.passes.{name}"), name)


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise MoeccError(f"no pass file {path}; give the path of a Python file that defines a pass")
    key = f"moecc_pass_{path.stem}"
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # nothing is left beside the file, and no old code is run
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise MoeccError(f"pass file {path} can't be imported: {type(e).__name__}: {e}") from e
    finally:
        sys.dont_write_bytecode = before
    return module


def _pass_in(module: Any, where: str) -> type[Pass]:
    own = [
        v
        for v in vars(module).values()
        if isinstance(v, type) and issubclass(v, Pass) and v.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise MoeccError(f"{where} defines {len(own)} passes; a pass file defines one")
    return own[0]


def _require_sound(cls: type[Pass], where: str) -> None:
    """MoeccError where the class does not say what a pass must."""
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise MoeccError(f"{where}: {cls.__name__}.name is {name!r}; give a word of letters, digits, '_', '-' and '.'")
    for kind in _FACTS:
        facts = getattr(cls, kind)
        if not isinstance(facts, set | frozenset) or not all(isinstance(f, str) for f in facts):
            raise MoeccError(f"{where}: {cls.__name__}.{kind} is {facts!r}; give a frozenset of facts")
    if cls.__abstractmethods__:
        raise MoeccError(f"{where}: {cls.__name__} lacks {' and '.join(sorted(cls.__abstractmethods__))}")
    if bare := next((f.name for f in fields(cls) if f.default is MISSING), None):
        raise MoeccError(f"{where}: the option {bare!r} has no default; write option(DEFAULT, help=...)")


def parse(text: str, *, bits: float | None = None) -> tuple[list[Pass], list[str]]:
    """The passes that `text` names, and remarks. `bits` is the default of every option called `bits` that takes it."""
    found: list[Pass] = []
    remarks: list[str] = []
    at = 0
    if bits is not None and bits == int(bits):
        bits = int(bits)
    if not text.strip():
        raise MoeccError("no passes given; try --passes kbvq, or `moecc passes` for what there is")
    while at < len(text):
        m = _ITEM.match(text, at)
        if not m or (re.search(r"\s", m[1]) and not m[1].endswith(".py")):
            raise MoeccError(
                f"can't read the pipeline at column {at + 1}: {text[at:]!r}; expected name or name{{key=value,...}}"
            )
        found.append(_build(find(m[1]), m[2] or "", bits, remarks))
        at = m.end()
    if bits is not None and not any(getattr(p, "bits", None) == bits for p in found):
        raise MoeccError(f"no pass of {text!r} takes --bits {bits}" + (f": {'; '.join(remarks)}" if remarks else ""))
    return found, remarks


def _build(cls: type[Pass], options: str, bits: float | None, remarks: list[str]) -> Pass:
    known = {f.name: f for f in fields(cls)}
    given: dict[str, Any] = {}
    for item in filter(None, (o.strip() for o in options.split(","))):
        key, equals, value = item.partition("=")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {sorted(known)}"
            raise MoeccError(f"{cls.name} has no option {key!r}{hint}")
        if key in given:
            raise MoeccError(f"{cls.name}: option {key!r} is there twice; leave one out")
        if not equals:
            raise MoeccError(f"{cls.name}: option {key!r} lacks a value; write {key}=VALUE")
        given[key] = read_option(cls.name, known[key], value)
    if bits is not None and "bits" in known and "bits" not in given:
        if accepts(known["bits"], bits):
            given["bits"] = bits
        else:
            remarks.append(
                f"{cls.name} keeps bits={known['bits'].default} (it takes {accepted(known['bits'])}, not {bits})"
            )
    return cls(**given)


def read_option(owner: str, f: Field[Any], text: str) -> Any:
    """The value that `text` means for option `f`, by the type of its default and its choices."""
    choices = f.metadata.get("choices", ())
    for choice in choices:
        if text == str(choice):
            return choice
    default = None if f.default is MISSING else f.default
    kinds: list[Callable[[str], Any]] = []
    if isinstance(default, float):
        kinds = [float]
    elif "float" in str(f.type):  # int | float
        kinds = [int, float]
    elif isinstance(default, bool):
        if text in ("true", "false"):
            return text == "true"
    elif isinstance(default, int) or (isinstance(default, str) and f.metadata.get("low") is not None):
        kinds = [int]
    elif isinstance(default, str) and not choices:
        return text
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    what = "true | false" if isinstance(default, bool) else accepted(f)
    raise MoeccError(f"{owner}: {f.name}={text!r} is out of range; it takes {what}")


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
    for group in _groups(passes):
        there: set[str] = set()
        for p in group:
            for before in [q for q in result if q.within_layer & p.requires - there]:
                fact = min(before.within_layer & p.requires)
                if not isinstance(p, LayerPass) or p.own_round:
                    what = "begins a round of its own" if isinstance(p, LayerPass) else "works on the whole model"
                    raise MoeccError(
                        f"{p.name} requires {fact!r}, which holds within one layer and one round, but {p.name} {what}"
                    )
                remarks.append(f"{p.name} requires {fact!r}; {before.name!r} runs again before it, in its round")
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
            makers = [n for n in names() if lack[0] in find(n).provides]
            raise MoeccError(
                f"{p.name} leaves what can't be stored before {lack[0]!r}; add one of {makers} to the pipeline"
            )


def _first_lack(passes: list[Pass], facts: set[str]) -> tuple[Pass, str] | None:
    given = facts.union(*(p.provides for p in passes))
    return next(((p, f) for p in passes for f in sorted(p.requires - given)), None)


def _provider(user: Pass, fact: str) -> Pass:
    """The one pass that provides `fact` and can be made with its defaults."""
    makers = [n for n in names() if fact in find(n).provides and not issubclass(find(n), Composite)]
    if len(makers) != 1:
        raise MoeccError(f"{user.name} requires {fact!r}; provided by {makers or 'no known pass'}; name one of them")
    return find(makers[0])()


def _sort(passes: list[Pass], facts: set[str]) -> list[Pass]:
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(passes)))
    for i, a in enumerate(passes):
        for j, b in enumerate(passes):
            if i != j and (a.provides & (b.requires | b.after) or b.spoils & a.requires):
                graph.add_edge(i, j)
    try:
        return [passes[i] for i in nx.lexicographical_topological_sort(graph, key=int)]
    except nx.NetworkXUnfeasible:
        cycle = " -> ".join(passes[i].name for i, _ in nx.find_cycle(graph))
        raise MoeccError(f"these passes need each other: {cycle}; leave one out") from None


# ---- 3. run


@dataclass
class PassReport:
    """What one pass did, over all layers."""

    text: str
    key: str = ""  # its place in the ledger: two passes may have the same text
    changed: bool = False
    seconds: float = 0.0
    nodes: int = 0
    bits: float = 0.0  # bits per weight over the routed experts, as they stood after this pass
    error: float | None = None  # mean relative output error of the projections coded so far

    def line(self) -> str:
        error = "" if self.error is None else f", error {self.error:.4f}"
        state = "" if self.changed else ", nothing changed"
        return f"{self.text}: {self.nodes} nodes, {self.bits:.3f} bits/weight{error}{state}, {self.seconds:.1f} s"


@dataclass
class Hooks:
    """What the caller wants to see or keep of a run; each may be left out."""

    after_pass: Callable[[PassReport, Program], None] = lambda report, program: None
    after_layer: Callable[[int, Program, Context], None] = lambda stage, program, ctx: None
    restore_layer: Callable[[int, Program, Context], bool] = lambda stage, program, ctx: False
    dump: Callable[[str, Program, int | None], None] = lambda name, program, stage: None  # stage None: the whole


def run(
    program: Program, passes: Sequence[Pass], ctx: Context, batches: Sequence[Tensor] = (), hooks: Hooks | None = None
) -> list[PassReport]:
    """Run resolved passes over `program` in place; what each did. `batches`: calibration token ids, i64 [1 or more, S] each."""
    hooks, result = hooks or Hooks(), []
    reference = program.copy()  # the float model for all passes, whatever ran before
    ctx.reference, ctx.batches = reference, batches
    if not batches and (needy := next((p for p in passes if p.needs_data), None)) is not None:
        raise MoeccError(f"{needy.name} needs calibration text; give --calib FILE")
    for p in passes:
        p.check(program)
    done: list[Pass] = []
    for group in _groups(passes):
        try:
            if isinstance(group[0], LayerPass):
                layer_passes = [p for p in group if isinstance(p, LayerPass)]
                reports = _run_layers(program, reference, layer_passes, ctx, batches, hooks, done)
            else:
                reports = [_run_model(program, group[0], ctx, done)]
        finally:
            program.module.recompile()
        for p, report in zip(group, reports, strict=True):
            program.facts = (program.facts - p.spoils) | p.provides
            _finish(report, ctx)
            hooks.after_pass(report, program)
            done.append(p)
            if p.makes_reference:
                ctx.reference = reference = program.copy()
        hooks.dump(f"{len(done):02d}-after-{Path(str(group[-1]).split('{')[0]).stem}", program, None)
        result += reports
    return result


def _groups(passes: Sequence[Pass]) -> list[list[Pass]]:
    groups: list[list[Pass]] = []
    for p in passes:
        if groups and isinstance(p, LayerPass) and isinstance(groups[-1][0], LayerPass) and not p.own_round:
            groups[-1].append(p)
        else:
            groups.append([p])
    return groups


def _report(p: Pass, position: int) -> PassReport:
    return PassReport(str(p), f"{position} {p}")


def _run_model(program: Program, p: Pass, ctx: Context, done: list[Pass]) -> PassReport:
    report = _report(p, len(done))
    start = time.perf_counter()
    with _named(p, done, None):
        report.changed = _whether_changed(p.run(program, ctx))
        program.verify()
        ctx.ledger[report.key] = {str(s): _entry(program, s, report.changed, ctx) for s in range(program.layers)}
    report.seconds = time.perf_counter() - start
    return report


def _whether_changed(returned: Any) -> bool:
    if not isinstance(returned, bool):
        raise MoeccError(f"it returned {returned!r}; return True or False, whether it changed the program")
    return returned


def _run_layers(
    program: Program, reference: Program, passes: list[LayerPass], ctx: Context, batches: Sequence[Tensor], hooks: Hooks,
    done: list[Pass],
) -> list[PassReport]:  # fmt: skip
    reports = [_report(p, len(done) + i) for i, p in enumerate(passes)]
    stream, target = Stream(program, batches), Stream(reference, batches)
    last_experts = max((m.layer for m in program.moe_layers()), default=0)
    for stage in ctx.progress(range(program.layers), "layers"):
        head = last_experts < stage == program.layers - 1  # nobody needs the logits of all calibration text at once
        if not head:
            target.advance()
        if 0 < stage and not hooks.restore_layer(stage, program, ctx):
            layer = Layer(stage, program, reference, stream, target)
            for i, (p, report) in enumerate(zip(passes, reports, strict=True)):
                start = time.perf_counter()
                with _named(p, [*done, *passes[:i]], stage):
                    changed = _whether_changed(p.run_layer(layer, ctx))
                    program.verify()
                    ctx.ledger.setdefault(report.key, {})[str(stage)] = _entry(program, stage, changed, ctx)
                report.seconds += time.perf_counter() - start
                before = sum(q.name == p.name for q in [*done, *passes[:i]])
                hooks.dump(f"layer{stage:03d}-{p.name}{f'-{before + 1}' if before else ''}", program, stage)
            program.module.recompile()
            hooks.after_layer(stage, program, ctx)
        if not head:
            try:
                stream.advance()
            except MoeccError as e:  # the float model went through it
                ran = ", ".join(p.name for p in [*done, *passes])
                raise MoeccError(f"layer {stage - 1} no longer runs behind {ran}: {e}") from e
    return reports


class _named:
    """Adds pass, layer and what ran before to whatever goes wrong inside."""

    def __init__(self, p: Pass, done: Sequence[Pass], stage: int | None):
        self.p, self.done, self.stage = p, done, stage

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, KeyboardInterrupt):
            return
        where = "" if self.stage is None else f" in layer {self.stage - 1}"
        after = f" (after {', '.join(p.name for p in self.done)})" if self.done else ""
        why = str(error) if isinstance(error, MoeccError) else f"{type(error).__name__}: {reason(error)}"
        raise MoeccError(f"{self.p} failed{where}{after}: {why}") from error


def _entry(program: Program, stage: int, changed: bool, ctx: Context) -> dict[str, Any]:
    """The ledger's line of one pass in one layer; kept in the journal, so that a resumed run reports the same."""
    found = [m for m in program.moe_layers() if m.layer == stage]
    paths = [f"{m.path}.{p}" for m in found for p in ("gate_up", "down")]
    return {
        "changed": changed, "nodes": sum(n.op == "call_function" for n in program.graph.nodes),
        "stored": sum(_stored(program, m) for m in found), "weights": sum(expert_weights(m) for m in found),
        "errors": [ctx.audit[p]["error"] for p in paths if "error" in ctx.audit.get(p, {})],
    }  # fmt: skip


def _finish(report: PassReport, ctx: Context) -> None:
    """The report's figures from the ledger."""
    entries = list(ctx.ledger.get(report.key, {}).values())
    report.changed = any(e["changed"] for e in entries)
    report.nodes = entries[-1]["nodes"] if entries else 0
    weights = sum(e["weights"] for e in entries)
    report.bits = sum(e["stored"] for e in entries) / weights if weights else 0.0
    errors = [error for e in entries for error in e["errors"]]
    report.error = sum(errors) / len(errors) if errors else None


def experts_bits(program: Program) -> float:
    """Bits per weight of the routed experts as they would be stored now, everything counted."""
    found = program.moe_layers()
    weights = sum(expert_weights(m) for m in found)
    return sum(_stored(program, m) for m in found) / weights if weights else 0.0


def _stored(program: Program, moe: MoE) -> int:
    """Bits stored for one layer's routed experts."""
    operands = [n for n in moe.node.args[3:] if isinstance(n, torch.fx.Node)]
    return sum(n.meta["val"].numel() * _stored_bits(program, n) for n in operands)


def _stored_bits(program: Program, node: torch.fx.Node) -> int:
    name = program.weights[node.name].name
    origin = program.origins(name)[0]
    if (
        program.store is not None and origin in program.store
    ):  # as the checkpoint has it, whatever the program computes in
        rewritten = origin in program.tensors and origin not in program.rounded
        return 8 * (program.dtype if rewritten else program.stored_dtype(origin)).itemsize
    bits = 8 * int(node.meta["val"].element_size())
    return min(bits, 16) if name in program.tensors else bits  # what is still dense would be stored in 16 bits


def expert_weights(moe: MoE) -> int:
    """Weights that a layer's routed experts had before anything was done to them: E N D + E D F."""
    experts, rows, hidden, intermediate = moe.sizes
    return experts * (rows * hidden + hidden * intermediate)

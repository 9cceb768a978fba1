"""Mean outer products of gradients with respect to layers' outputs, layer by layer.

This is step 1 of `sensitivity`: S = E[g g^T] [D, D] over tokens, for the outputs of the experts and
for the values between layers.
  1. Run forward without a graph, all batches through one stage, then through the next, and through
     one expert after the other. Hold the values before each stage, and what its experts give.
  2. Run backward from the last stage to the first. Between experts, run each stage again, batch by
     batch, now with a graph; pull the gradients through its experts one by one. Add up the S of the
     stage, and keep them.
So each weight is read once forward and once backward, and no more than one expert's are in memory.
What is held beyond `IN_MEMORY`, and all S of the stages that are passed, are kept on disk if there
is a journal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, fx

from moecc.checkpoint.files import DTYPE_NAMES
from moecc.checkpoint.memory import release
from moecc.errors import MoeccError
from moecc.ir.graph import run_nodes, written
from moecc.ir.moe import MoE
from moecc.ir.program import Program
from moecc.ir.tensors import CPU
from moecc.passes._tune.block import output_logits
from moecc.passes._tune.routing import boundary_nearness, selection_scores, standardized
from moecc.passes._tune.whole import Values, Whole
from moecc.pipeline.batches import pull_experts, run_batches, split
from moecc.pipeline.passes import Context, Kept
from moecc.pipeline.stream import StageWeights, require_numbers
from moecc.types import Value

SHARPNESS = 4.0  # 1 / (standard deviations from the top-k boundary at which a score counts 1/e)
IN_MEMORY = 1 << 30  # bytes of values that are held in memory
AT_ONCE = 1 << 22  # logits that are worked on together

_MOST = 1e30  # that squares may add up to: products of them must fit into float32 too
Grads: TypeAlias = dict[str, Tensor]  # of values, by name


class Measured(Mapping[str, Tensor]):
    """S [D, D] by path of an MoE layer and by name of a value between layers, and their traces.

    works: what was kept of each stage.
    """

    def __init__(self, works: Sequence[Kept] = ()):
        self._tensors = {n: w.tensors for w in works for n in w.facts["same"]}
        self._same = {n: same for w in works for n, same in w.facts["same"].items()}
        self._traces = {n: t for w in works for n, t in w.facts["traces"].items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name][self._same[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._same)

    def __len__(self) -> int:
        return len(self._same)

    def trace(self, name: str) -> float:
        """Return the trace of S; S isn't read."""
        return float(self._traces[self._same[name]])


@dataclass
class Sums:
    """The S of one stage."""

    found: dict[str, Tensor] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)  # name -> the one that has the same S
    added: dict[str, Sequence[Tensor]] = field(default_factory=dict)

    def add(self, name: str, gradients: Sequence[Tensor]) -> None:
        """Add the S of a name, from its gradients in all batches.

        If nothing but a sum is behind the experts, theirs is that of the value that leaves the
        layer. Then it is one S.
        """
        found = [g.flatten(0, -2).float() for g in gradients]
        for other, its in self.added.items():
            if all(map(torch.equal, its, found)):
                self.same[name] = other
                return
        self.same[name], self.added[name] = name, found
        width = found[0].shape[-1]
        total = self.found[name] = found[0].new_zeros(width, width)
        for g in found:
            total.addmm_(g.T, g)
        total.div_(sum(map(len, found)))

    def kept(self) -> Kept:
        """Return all of it, with traces."""
        traces = {name: float(total.trace()) for name, total in self.found.items()}
        tensors = {name: total.to(CPU) for name, total in self.found.items()}
        return Kept(tensors, {"same": self.same, "traces": traces})


class Held:
    """The values of all batches that the backward needs, by the stage that needs them.

    They stay where they are up to `IN_MEMORY` bytes; those of later stages are kept on disk. A
    value that passes stages by is held once.
    """

    def __init__(self, ctx: Context, key: str, device: torch.device):
        self.ctx, self.key, self.device = ctx, key, device
        self.bytes = 0
        self._since: dict[str, int] = {}  # value -> the stage that it is held with
        self._of: dict[int, dict[str, int]] = {}  # the same of the values that a stage needs
        self._there: dict[int, list[Values]] = {}  # those held with a stage
        self._kept: dict[int, Mapping[str, Tensor]] = {}  # those on disk, by `_entry`

    def add(self, stage: int, values: Sequence[Values], written: Collection[str] = ()) -> None:
        """Hold the values that a stage needs; `written`: those that change in it."""
        new = sorted(values[0].keys() - self._since)
        self._since |= dict.fromkeys(new, stage)
        self._of[stage] = {name: self._since[name] for name in values[0]}
        there = self._there[stage] = [{name: v[name] for name in new} for v in values]
        for name in written:
            self._since.pop(name, None)
        large = {
            _entry(batch, name): value
            for batch, its in enumerate(there)
            for name, value in its.items()
            if isinstance(value, Tensor) and value.dtype in DTYPE_NAMES
        }
        self.bytes += sum(value.nbytes for value in large.values())
        if self.bytes > IN_MEMORY:
            on_disk = Kept({entry: value.to(CPU) for entry, value in large.items()})
            self._kept[stage] = self.ctx.keep(self._name(stage), on_disk).tensors
            for batch, its in enumerate(there):
                for name in [n for n in its if _entry(batch, n) in large]:
                    del its[name]

    def take(self, stage: int) -> list[Values]:
        """Return what a stage needs, from the last stage to the first; it is no longer held."""
        found = [Values() for _ in self._there[stage]]
        for name, since in self._of.pop(stage).items():
            on_disk = self._kept.get(since, {})
            for batch, values in enumerate(found):
                entry, there = _entry(batch, name), self._there[since][batch]
                values[name] = there[name] if name in there else on_disk[entry].to(self.device)
        del self._there[stage]
        if self._kept.pop(stage, None) is not None:
            self.ctx.forget(self._name(stage))
        return found

    def in_memory(self) -> int:
        """Return the bytes of what is held in memory."""
        tensors = [
            value
            for stage in self._there.values()
            for values in stage
            for value in values.values()
            if isinstance(value, Tensor)
        ]
        return sum(t.nbytes for t in tensors)

    def _name(self, stage: int) -> str:
        return f"{self.key} values {stage}"


def _entry(batch: int, name: str) -> str:
    return f"{batch} {name}"


class Gradients:
    """Measures S of a float model."""

    def __init__(self, program: Program, ctx: Context):
        self.ctx = ctx
        found = program.moe_layers()
        self.experts = {m.node.name: m.path for m in found}
        self.first = min((m.layer for m in found), default=0)
        self.routers = _routers(found, ctx)
        self.layers = {
            n.name: n.meta["layer"] for n in program.graph.nodes if n.op == "call_function"
        }
        self.program = program
        self.whole = Whole(program, set(self.experts), watch=self.routers)
        self.has_head = output_logits(program) is not None
        if not self.has_head:
            ctx.notes.append(
                "the model gives no logits of its vocabulary; "
                "sensitivity is that of its last hidden state"
            )

    def once(self, kind: str, batches: Sequence[Tensor]) -> Measured:
        """What `measure` returns, unless an interrupted run has kept all of it."""
        whole = self.ctx.kept(f"sensitivity {kind}")
        if whole is not None:
            works = [self.ctx.kept(_key(kind, stage)) for stage in whole.facts]
            there = [work for work in works if work is not None]
            if len(there) == len(works):
                return Measured(there)
        return self.measure(kind, batches)

    def measure(self, kind: str, batches: Sequence[Tensor]) -> Measured:
        """S of one kind, kl or routing, on token ids of equally large batches.

        Raise MoeccError if the model's numbers leave the range of float32.
        """
        self.kind = kind
        highest = max((self.layers[r] for r in self.routers), default=0)
        self.top = highest if kind == "routing" else self.program.layers - 1
        works: dict[int, Kept] = {}
        if self.top >= self.first:
            held = self._forward(batches)
            # gradients of the values that are alive after the stage, of each batch
            after: list[Grads] = [{} for _ in batches]
            stages = range(self.top, self.first - 1, -1)
            for stage in self.ctx.progress(stages, f"sensitivity {kind}, backward"):
                sums = Sums()
                for name in after[0]:
                    if self.layers[name] == stage:  # else it passes by, and this is only a part
                        sums.add(name, [grads[name] for grads in after])
                self._pull(stage, held.take(stage), after, sums)
                work = sums.kept()
                self._require_range(work)
                if sums.found:
                    works[stage] = self.ctx.keep(_key(kind, stage), work)
        self.ctx.keep(f"sensitivity {kind}", Kept(facts=list(works)))
        return Measured(list(works.values()))

    @torch.no_grad()
    def _forward(self, batches: Sequence[Tensor]) -> Held:
        """Run forward up to the last loss; return what is held for the backward."""
        device = self.program.device
        values: list[Values] = [{self.whole.input: ids.to(device)} for ids in batches]
        held = Held(self.ctx, f"sensitivity {self.kind}", device)
        stages = range(self.top + 1)
        for stage in self.ctx.progress(stages, f"sensitivity {self.kind}, forward"):
            if stage < self.top:
                values = self._run(stage, values, held)
            else:
                held.add(stage, values)
            release()
        return held

    def _run(self, stage: int, values: list[Values], held: Held) -> list[Values]:
        """Return the values behind a stage; hold those before it and what its experts give."""
        nodes, alive = self.whole.stages[stage], self.whole.alive[stage]
        into = {i.name for n in nodes for i in written(n)}
        here = [_copied(into, there) for there in values]
        needed = [dict(there) for there in values]

        def visit(node: fx.Node, value: Value, batch: int) -> None:
            if node.name in self.experts:
                assert isinstance(value, Tensor)
                needed[batch][node.name] = value.clone() if node.name in into else value

        weights = StageWeights(self.program)
        run_batches(self.program, nodes, here, weights, alive, visit, self.ctx.workers)
        if stage >= self.first:
            held.add(stage, needed, into)
        return [{k: v for k, v in there.items() if k in alive} for there in here]

    def _require_range(self, work: Kept) -> None:
        for name, size in work.facts["traces"].items():
            if not size < _MOST:
                layer = self.layers.get(name)
                where = name if layer is None else f"the output of layer {layer - 1}"
                raise MoeccError(
                    f"{where}: squared gradients of {self.kind} there reach {size:.0e}, "
                    "more than float32 can add up; check the weights of the layers behind it"
                )

    def _pull(self, stage: int, values: list[Values], after: list[Grads], sums: Sums) -> None:
        """Make gradients `after` a stage, and those of losses inside it, those of its inputs.

        values: what was held for the stage. Adds the gradients of its experts' outputs to the sums.
        """
        weights = StageWeights(self.program)
        parts = split(self.whole.stages[stage])
        while parts and not after[0] and not any(n.name in self.sources for n in parts[-1]):
            parts.pop()  # no loss is behind
        before = self._inside(parts, values, weights)
        for part in reversed(parts):
            entering = before.pop()
            if part[0].name in self.experts:
                self._pull_experts(part[0], entering, weights, after, sums)
                continue
            for batch, (there, grads) in enumerate(zip(entering, after, strict=True)):
                self._pull_batch(part, batch, there, weights, grads)
        release()

    @property
    def sources(self) -> set[str]:
        """The nodes from whose values losses are taken."""
        return {self.whole.output} if self.kind == "kl" else set(self.routers)

    @torch.no_grad()
    def _inside(
        self, parts: Sequence[Sequence[fx.Node]], values: list[Values], weights: StageWeights
    ) -> list[list[Values]]:
        """Return the values before each part of a stage."""
        before = [values]
        for i, part in enumerate(parts[:-1]):
            behind = [n for p in parts[i + 1 :] for n in p]
            needed = {n.name for m in behind for n in m.all_input_nodes}
            needed |= self.experts.keys() & {n.name for n in behind}  # what they give is held
            here = [_copied(_changed(part), there) for there in before[-1]]
            if part[0].name not in here[0]:
                run_batches(
                    self.program,
                    part,
                    here,
                    weights,
                    needed,
                    lambda node, value, batch: None,
                    self.ctx.workers,
                )
            before.append([{k: v for k, v in there.items() if k in needed} for there in here])
        return before

    def _pull_experts(
        self,
        node: fx.Node,
        values: list[Values],
        weights: StageWeights,
        after: list[Grads],
        sums: Sums,
    ) -> None:
        found = [g for grads in after if (g := grads.pop(node.name, None)) is not None]
        if len(found) < len(after):  # no loss is behind
            return
        sums.add(self.experts[node.name], found)
        inputs = [n.name for n in (node.args[0], node.args[2]) if isinstance(n, fx.Node)]
        if not self.whole.moving.intersection(inputs):
            return
        pulled = pull_experts(self.program, node, values, weights, found, self.ctx.workers)
        for grads, of_inputs in zip(after, pulled, strict=True):
            for name, grad in zip(inputs, of_inputs, strict=True):
                if name in self.whole.moving:
                    _add(grads, name, grad)

    def _pull_batch(
        self,
        part: Sequence[fx.Node],
        batch: int,
        values: Values,
        weights: StageWeights,
        after: Grads,
    ) -> None:
        """Pull gradients `after` a part without experts, and those of its losses, to its inputs."""
        leaves = self.whole.leaves(values)
        inputs = {k: v for k, v in leaves.items() if isinstance(v, Tensor) and v.requires_grad}
        made = {n.name for n in part} | _changed(part)
        ends = [(k, after.pop(k)) for k in sorted(made & after.keys())]
        if not inputs or not (ends or self.sources.intersection(made)):
            return
        found = _copied(_changed(part), leaves)
        keep = self.sources.union(k for k, _ in ends)
        with torch.enable_grad():
            for _ in run_nodes(part, found, weights, keep):
                pass
            pairs = [(found[k], g) for k, g in ends] + list(self._losses(part, batch, found))
        pairs = [(value, g) for value, g in pairs if value.requires_grad]
        if not pairs:
            return
        results, starts = zip(*pairs, strict=True)
        grads = torch.autograd.grad(results, list(inputs.values()), starts, allow_unused=True)
        for name, grad in zip(inputs, grads, strict=True):
            if grad is not None:
                _add(after, name, grad)

    def _losses(
        self, part: Sequence[fx.Node], batch: int, values: Values
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield values of one batch that losses are taken from, or losses, and their gradients."""
        for name in [n.name for n in part if n.name in self.sources]:
            value = values[name]
            assert isinstance(value, Tensor)
            found = value.flatten(0, -2).float()
            if self.kind == "routing":
                draw = self._draw(batch, name)
                loss = self._decisions(found, self.routers[name], draw)
                yield loss, torch.ones_like(loss)
            else:
                require_numbers(found, "what the head gives")
                yield found, self._output(found.detach(), self._draw(batch, "output"))

    def _draw(self, batch: int, name: str) -> torch.Generator:
        """Random numbers that are a batch's own."""
        seed = self.ctx.seed_for("sensitivity", self.kind, batch, name)
        return torch.Generator().manual_seed(seed)

    def _output(self, output: Tensor, draw: torch.Generator) -> Tensor:
        """The gradient of kl's loss, summed over tokens.

        output: [T, vocabulary], or [T, D] without a head.
        """
        if not self.has_head:
            return _normal(output, draw)
        grad = torch.empty_like(output)
        few = max(1, AT_ONCE // output.shape[1])
        for logits, part in zip(output.split(few), grad.split(few), strict=True):
            chances = logits.softmax(-1)
            labels = torch.multinomial(chances.to(CPU), 1, generator=draw).to(output.device)
            part.copy_(chances.scatter_add_(-1, labels, chances.new_full(labels.shape, -1.0)))
        return grad

    def _decisions(self, scores: Tensor, top_k: int, draw: torch.Generator) -> Tensor:
        """One router's part of routing's loss, summed over tokens: scores [T, E]."""
        s, t = standardized(scores, scores.detach())
        nearness = boundary_nearness(t, top_k, SHARPNESS)
        return (_normal(s, draw) * nearness.sqrt() * s).sum()


def _key(kind: str, stage: int) -> str:
    return f"sensitivity {kind} {stage}"


def _changed(nodes: Sequence[fx.Node]) -> set[str]:
    """The values that come from elsewhere and that an in-place op writes into."""
    return {i.name for n in nodes for i in written(n)} - {n.name for n in nodes}


def _copied(names: set[str], values: Values) -> Values:
    """The same values, with copies of those called `names`."""
    return {k: v.clone() if k in names else v for k, v in values.items()}


def _add(grads: Grads, name: str, grad: Tensor) -> None:
    grads[name] = grads[name] + grad if name in grads else grad


def _normal(like: Tensor, draw: torch.Generator) -> Tensor:
    """Standard normal numbers, the same on any device."""
    return torch.randn(like.shape, generator=draw).to(like.device)


def _routers(found: list[MoE], ctx: Context) -> dict[str, int]:
    """Top-k by name of the scores that it looks at, for routers that have something to decide."""
    routers: dict[str, int] = {}
    for moe in found:
        if moe.logits is None:
            why = "the trace shows no scores of its router; sensitivity leaves it out"
            ctx.notes.append(f"{moe.path}: {why}")
            continue
        scores = selection_scores(moe)
        if moe.top_k < scores.meta["val"].shape[-1]:  # else it takes all experts
            routers[scores.name] = moe.top_k
    return routers

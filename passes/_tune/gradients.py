"""Mean outer products of gradients with respect to layers' outputs, layer by layer.

This is step 1 of `sensitivity`: S = E[g g^T] [D, D] over tokens, for the outputs of the experts and
for the values between layers. As many batches as memory has room for go through together, so that
weights are read once forward and once backward for all of them; which go together changes no bit. A
layer's S are kept, on disk if there is a journal, as soon as the backward has passed the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moecc.errors import MoeccError
from moecc.ir.moe import MoE
from moecc.ir.program import Program
from moecc.ir.tensors import CPU
from moecc.passes._tune.block import output_logits
from moecc.passes._tune.pieces import Experts, Piece, Stage
from moecc.passes._tune.routing import boundary_nearness, selection_scores, standardized
from moecc.passes._tune.whole import Values, Whole
from moecc.pipeline.device import memory_left
from moecc.pipeline.passes import Context, Kept
from moecc.pipeline.stream import require_numbers

SHARPNESS = 4.0  # 1 / (standard deviations from the top-k boundary at which a score counts 1/e)

_MOST = 1e30  # that squares may add up to: products of them must fit into float32 too
_WITHIN = 8  # what a layer holds beside its inputs, in units of what it leaves behind
Grads = dict[str, Tensor]  # of values, by name


@dataclass(frozen=True)
class Measured(Mapping[str, Tensor]):
    """S [D, D] by path of an MoE layer and by name of a value between layers, and their traces."""

    works: Mapping[str, Kept]

    def __getitem__(self, name: str) -> Tensor:
        return self.works[name].tensors["S"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.works)

    def __len__(self) -> int:
        return len(self.works)

    def trace(self, name: str) -> float:
        """The trace of S; S isn't read."""
        return float(self.works[name].facts)


class _Sums:
    """Sums of outer products by name: some in memory, those of passed layers kept."""

    def __init__(self, ctx: Context, kind: str):
        self.ctx, self.kind = ctx, kind
        self.now: dict[str, Tensor] = {}
        self.added: dict[str, list[Tensor]] = {}
        self.tokens: dict[str, int] = {}
        self.works: dict[str, Kept] = {}
        self.source: dict[str, str] = {}  # the name under which the work of another is kept

    def add(self, name: str, gradients: list[Tensor]) -> None:
        """Add the gradients of some batches.

        If nothing but a sum is behind the experts, theirs is that of the value that leaves the
        layer. Then one S is kept for both.
        """
        found = [g.flatten(0, -2).float() for g in gradients]
        same = next((n for n, other in self.added.items() if _all_equal(found, other)), name)
        self.added[name] = found
        self.tokens[name] = self.tokens.get(name, 0) + sum(map(len, found))
        if self.source.setdefault(name, same) == same != name:
            return
        before = self.works.get(self.source[name])
        self.source[name] = name
        for g in found:
            outer = g.T @ g
            if name in self.now:
                outer = self.now[name].add_(outer)
            elif before is not None:
                outer = before.tensors["S"].to(outer.device) + outer
            self.now[name] = outer

    def keep(self, *, mean: bool) -> None:
        """Keep what was added since. mean: whether that was all, so that it is divided."""
        for name, total in self.now.items():
            total = total.div_(self.tokens[name]) if mean else total
            work = Kept({"S": total.to(CPU)}, float(total.trace()))
            self.works[name] = self.ctx.keep(_key(self.kind, name), work)
        self.now, self.added = {}, {}

    def measured(self) -> Measured:
        return Measured({name: self.works[source] for name, source in self.source.items()})


def _all_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(some, others, strict=True))


def _key(kind: str, name: str = "") -> str:
    return f"sensitivity {kind} {name}".rstrip()


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
        self.whole = Whole(program, set(self.experts), watch=self.routers)
        self.has_head = output_logits(program) is not None
        if not self.has_head:
            ctx.notes.append(
                "the model gives no logits of its vocabulary; "
                "sensitivity is that of its last hidden state"
            )

    def once(self, kind: str, batches: list[Tensor]) -> Measured:
        """What `measure` returns, unless an interrupted run has kept all of it."""
        whole = self.ctx.kept(_key(kind))
        if whole is not None:
            sources: dict[str, str] = whole.facts
            works = {name: self.ctx.kept(_key(kind, name)) for name in {*sources.values()}}
            there = {name: work for name, work in works.items() if work is not None}
            if len(there) == len(works):
                return Measured({name: there[source] for name, source in sources.items()})
        return self.measure(kind, batches)

    def measure(self, kind: str, batches: list[Tensor]) -> Measured:
        """S of one kind, kl or routing, on token ids of equally large batches.

        Raise MoeccError if the model's numbers leave the range of float32.
        """
        self.kind, self.sums = kind, _Sums(self.ctx, kind)
        last = self.whole.program.layers - 1
        highest = max((self.layers[r] for r in self.routers), default=0)
        self.top = highest if kind == "routing" else last
        if self.top >= self.first:
            step, inside = self._together(batches)
            starts = self.ctx.progress(range(0, len(batches), step), f"sensitivity {kind}")
            for i in starts:
                last = i + step >= len(batches)
                self._backward(i, batches[i : i + step], inside=inside, last=last)
        self.ctx.keep(_key(kind), Kept(facts=self.sums.source))
        return self.sums.measured()

    def _together(self, batches: list[Tensor]) -> tuple[int, bool]:
        """Batches at a time, and whether the values inside the layers are held as well.

        As many as memory holds activations of between all layers. If it holds all that is inside,
        too, no layer runs forward twice.
        """
        before: list[list[Values]] = [[{self.whole.input: batches[0]}]]
        held = []
        for stage in range(min(2, self.whole.program.layers - 1)):
            there = {t.data_ptr() for (values,) in before for t in _tensors(values)}
            found = self._forward(stage, before[-1])
            # what the first decoder layer leaves behind and what it holds, the others do too
            held = [_bytes(some, there) for some in (found[1:], found[-1:])]
            before = found
        inside, between = held
        room, layers = memory_left(self.whole.program.device) // 4, self.top + _WITHIN
        if len(batches) * inside * layers <= room:
            return len(batches), True
        return max(1, room // max(1, between * layers)), False

    def _forward(self, stage: int, values: list[Values]) -> list[list[Values]]:
        """The values before each piece of a stage, and those behind it."""
        here, found = Stage(self.whole, stage), [values]
        for piece in here.pieces:
            found.append(here.forward(piece, found[-1]))
        return found

    def _backward(self, start: int, batches: list[Tensor], *, inside: bool, last: bool) -> None:
        """Add the gradients of batches start, start + 1, ...; `last`: there are no more.

        inside: whether to hold what is inside the layers from forward to backward.
        """
        kept: list[list[list[Values]]] = []  # before each piece of a stage that was held
        values: list[Values] = [{self.whole.input: ids} for ids in batches]
        for stage in range(self.top):
            *before, values = self._forward(stage, values)
            kept.append(before if inside else before[:1])
        kept.append([values])
        # gradients of the values that are alive after the stage, of each batch
        after: list[Grads] = [{} for _ in batches]
        for stage in range(self.top, self.first - 1, -1):
            for name in after[0]:
                if self.layers[name] == stage:  # else it passes by, and this is only a part
                    self.sums.add(name, [grads[name] for grads in after])
            self._pull(stage, start, kept.pop(), after)
            self._require_range()
            self.sums.keep(mean=last)

    def _require_range(self) -> None:
        for name, total in self.sums.now.items():
            size = float(total.trace())
            if not size < _MOST:
                layer = self.layers.get(name)
                where = name if layer is None else f"the output of layer {layer - 1}"
                raise MoeccError(
                    f"{where}: squared gradients of {self.kind} there reach {size:.0e}, "
                    "more than float32 can add up; check the weights of the layers behind it"
                )

    def _pull(self, stage: int, start: int, before: list[list[Values]], after: list[Grads]) -> None:
        """Make gradients `after` a stage, and those of losses inside it, those of its inputs.

        before: the values before its first pieces. Adds the gradients of its experts' outputs to
        the sums.
        """
        here = Stage(self.whole, stage)
        for piece in here.pieces[len(before) - 1 : -1]:
            before.append(here.forward(piece, before[-1]))
        for piece in reversed(here.pieces):
            entering = before.pop()
            if piece.experts is not None:
                self._pull_experts(Experts(here, piece.experts), entering, after)
                continue
            for i, (leaving, grads) in enumerate(zip(entering, after, strict=True)):
                self._pull_piece(here, piece, start + i, leaving, grads)

    def _pull_experts(self, experts: Experts, values: list[Values], after: list[Grads]) -> None:
        of_result = [grads.pop(experts.name, None) for grads in after]
        found = [g for g in of_result if g is not None]
        if len(found) < len(after):  # no loss is behind
            return
        self.sums.add(self.experts[experts.name], found)
        if not self.whole.moving.intersection(experts.inputs):
            return
        for grads, pulled in zip(after, experts.pull(values, found), strict=True):
            for name, g in zip(experts.inputs, pulled, strict=True):
                if name in self.whole.moving:
                    _add(grads, name, g)

    def _pull_piece(
        self, here: Stage, piece: Piece, batch: int, values: Values, after: Grads
    ) -> None:
        leaves = self.whole.leaves(values)
        inputs = {k: v for k, v in leaves.items() if isinstance(v, Tensor) and v.requires_grad}
        if not inputs:
            return
        with torch.enable_grad():
            found = here.run(piece, leaves)
            losses = [x for x in self._losses(piece, batch, found) if x.requires_grad]
        made = {k: after.pop(k) for k in piece.made & after.keys()}
        reached = {k: g for k, g in made.items() if found[k].requires_grad}
        if not (reached or losses):
            return
        ends = [*(found[k] for k in reached), *losses]
        starts = [*reached.values(), *map(torch.ones_like, losses)]
        grads = torch.autograd.grad(ends, list(inputs.values()), starts, allow_unused=True)
        for name, g in zip(inputs, grads, strict=True):
            if g is not None:
                _add(after, name, g)

    def _losses(self, piece: Piece, batch: int, values: Values) -> Iterator[Tensor]:
        """The losses of the kind on what a piece makes, for values of one batch."""
        for node in piece.nodes:
            if self.kind == "routing" and node.name in self.routers:
                scores, draw = (
                    values[node.name].flatten(0, -2).float(),
                    self._draw(batch, node.name),
                )
                yield self._decisions(scores, self.routers[node.name], draw)
            elif self.kind == "kl" and node.name == self.whole.output:
                output = values[node.name].flatten(0, -2).float()
                require_numbers(output, "what the head gives")
                yield self._output(output, self._draw(batch, "output"))

    def _draw(self, batch: int, name: str) -> torch.Generator:
        """Random numbers that do not depend on which batches go through together."""
        seed = self.ctx.seed_for("sensitivity", self.kind, batch, name)
        return torch.Generator().manual_seed(seed)

    def _output(self, output: Tensor, draw: torch.Generator) -> Tensor:
        """kl's loss, summed over tokens: output [T, vocabulary], or [T, D] without a head."""
        if not self.has_head:
            return (output * _normal(output, draw)).sum()
        chances = output.detach().softmax(-1).cpu()
        labels = torch.multinomial(chances, 1, generator=draw).squeeze(-1).to(output.device)
        return F.cross_entropy(output, labels, reduction="sum")

    def _decisions(self, scores: Tensor, top_k: int, draw: torch.Generator) -> Tensor:
        """One router's part of routing's loss, summed over tokens: scores [T, E]."""
        s, t = standardized(scores, scores.detach())
        nearness = boundary_nearness(t, top_k, SHARPNESS)
        return (_normal(s, draw) * nearness.sqrt() * s).sum()


def _add(grads: Grads, name: str, grad: Tensor) -> None:
    grads[name] = grads[name] + grad if name in grads else grad


def _tensors(values: Values) -> Iterable[Tensor]:
    return (v for v in values.values() if isinstance(v, Tensor))


def _bytes(states: list[list[Values]], there: set[int]) -> int:
    """Bytes of one batch's values, without those that are `there`; each counts once."""
    found = {t.data_ptr(): t.nbytes for (values,) in states for t in _tensors(values)}
    return sum(n for place, n in found.items() if place not in there)


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

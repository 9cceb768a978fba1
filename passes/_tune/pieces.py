"""A stage of the float model in pieces, through which several batches go together.

An experts node is a piece of its own. All batches go through one of its experts, then through the
next, forward as well as backward. So each expert's weights are read once for all of them, and no
more than one expert's are in memory. Batches do not touch each other: a batch gives the same
numbers whatever goes along with it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from moecc.ir import ops
from moecc.ir.graph import run_nodes, written
from moecc.ir.reference import add_slots, by_expert, repeats
from moecc.passes._tune.whole import Values, Whole


@dataclass(frozen=True)
class Piece:
    """Nodes of one stage in order: an experts node alone, or what lies between two of them."""

    nodes: list[fx.Node]
    needed: set[str]  # the values that something behind it reads

    @property
    def experts(self) -> fx.Node | None:
        return self.nodes[0] if self.nodes[0].target in ops.MOE_OPS else None

    @property
    def made(self) -> set[str]:
        """The values that it makes or changes."""
        return {n.name for n in self.nodes} | self.changed

    @property
    def changed(self) -> set[str]:
        """The values that come from elsewhere and that an in-place op writes into."""
        own = set(self.nodes)
        return {i.name for n in self.nodes for i in written(n) if i not in own}


class Stage:
    """One stage of a program whose experts are dense."""

    def __init__(self, whole: Whole, stage: int):
        self.whole, self.weights = whole, whole.weights()
        parts = list(_split(whole.stages[stage]))
        wanted = whole.alive[stage].union(whole.watched[stage])
        reads = [{i.name for n in part for i in n.all_input_nodes} for part in parts]
        self.pieces = [
            Piece(part, wanted.union(*reads[i + 1 :]) - whole.program.weights.keys())
            for i, part in enumerate(parts)
        ]

    @torch.no_grad()
    def forward(self, piece: Piece, before: Sequence[Values]) -> list[Values]:
        """Take the values of each batch before a piece through it; return those needed behind."""
        if piece.experts is None:
            after = [self.run(piece, values, keep=piece.needed) for values in before]
        else:
            found = Experts(self, piece.experts).outputs(before)
            name = piece.experts.name
            after = [{**v, name: y} for v, y in zip(before, found, strict=True)]
        return [{k: v for k, v in values.items() if k in piece.needed} for values in after]

    def run(self, piece: Piece, values: Values, keep: set[str] | None = None) -> Values:
        """Run a piece without experts; `values` stays as it is."""
        here = {k: v.clone() if k in piece.changed else v for k, v in values.items()}
        for _ in run_nodes(piece.nodes, here, self.weights, keep):
            pass
        return here


def _split(nodes: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """The parts of a stage. A part of a tuple stays with what makes the tuple."""
    parts: list[list[fx.Node]] = []
    place: dict[fx.Node, list[fx.Node]] = {}
    alone = True
    for node in nodes:
        experts = node.target in ops.MOE_OPS
        if experts or alone:
            parts.append([])
        alone = experts
        source = node.args[0] if node.target is operator.getitem else None
        at = place.get(source, parts[-1]) if isinstance(source, fx.Node) else parts[-1]
        at.append(node)
        place[node] = at
    return (part for part in parts if part)


class Experts:
    """The experts of one node, one at a time."""

    def __init__(self, stage: Stage, node: fx.Node):
        assert node.target is ops.EXPERTS, "the float model's experts are dense"
        self.stage, self.node, self.name = stage, node, node.name
        self.program, self.weights = stage.whole.program, stage.weights
        nodes = [n if isinstance(n, fx.Node) else None for n in node.args]
        x, index, weight, first = (n for n in nodes[:4] if n is not None)
        self.arguments, self.operands = (x, index, weight), nodes[3:]
        self.inputs = x.name, weight.name  # those with a gradient
        self.count = int(first.meta["val"].shape[0])
        self.reference = ops.REFERENCE[ops.EXPERTS]

    def outputs(self, batches: Sequence[Values]) -> list[Tensor]:
        """The result for each batch, from its values before the node."""
        calls = [self._call(values) for values in batches]
        found = [torch.zeros_like(call.x) for call in calls]

        def run(number: int, own: list[Tensor | None], slots: Tensor) -> None:
            _, x, weight = calls[number].of(slots)
            first = torch.zeros_like(slots).unsqueeze(-1)
            y = self.reference(x, first, weight, *own, **self.node.kwargs)
            calls[number].add(found[number], slots, y)

        self._each(calls, run)
        return found

    def pull(
        self, batches: Sequence[Values], grads: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """The gradients of the experts' input and routing weights, from that of the result."""
        calls = [self._call(values) for values in batches]
        found = [(torch.zeros_like(call.x), torch.zeros_like(call.weight)) for call in calls]

        def run(number: int, own: list[Tensor | None], slots: Tensor) -> None:
            rows, x, weight = calls[number].of(slots)
            first, grad = torch.zeros_like(slots).unsqueeze(-1), grads[number][rows]
            with torch.enable_grad():
                inputs = (x.requires_grad_(), weight.requires_grad_())
                y = self.reference(inputs[0], first, inputs[1], *own, **self.node.kwargs)
            dx, dweight = torch.autograd.grad(y, inputs, grad)
            calls[number].add(found[number][0], slots, dx)
            found[number][1].view(-1)[slots] = dweight.squeeze(-1)

        self._each(calls, run)
        return found

    def _each(
        self, calls: Sequence[_Call], run: Callable[[int, list[Tensor | None], Tensor], None]
    ) -> None:
        """Call run(batch, operands, slots) for every expert and batch that have slots."""
        slots = [call.slots(self.count) for call in calls]
        for e in range(self.count):
            own = self._operands(e) if any(len(s[e]) for s in slots) else []
            for number, each in enumerate(slots):
                if len(each[e]):
                    run(number, own, each[e])

    def _call(self, values: Values) -> _Call:
        def value(node: fx.Node) -> Tensor:
            found = values[node.name] if node.name in values else self.weights[node.name]
            assert isinstance(found, Tensor)
            return found

        return _Call(*map(value, self.arguments))

    def _operands(self, expert: int) -> list[Tensor | None]:
        """The operands of one expert, as if there were no other; a norm is of all experts."""
        found: list[Tensor | None] = []
        for node in self.operands:
            if node is None:
                found.append(None)
            elif node.meta["val"].dim() == 1:
                found.append(self.weights[node.name])
            elif self.stage.whole.kept is not None:
                found.append(self.weights[node.name][expert : expert + 1])
            else:
                name = self.program.weights[node.name].name
                found.append(self.program.read(name, experts=[expert]))
        return found


@dataclass(frozen=True)
class _Call:
    """One batch's inputs of an experts node."""

    x: Tensor  # [T, D]
    index: Tensor  # [T, k]
    weight: Tensor  # [T, k]

    def slots(self, experts: int) -> tuple[Tensor, ...]:
        """The places of each expert among the T k choices."""
        order, counts = by_expert(self.index, experts)
        parts: tuple[Tensor, ...] = order.split(counts)
        return parts

    @cached_property
    def twice(self) -> bool:
        return repeats(self.index)

    def add(self, total: Tensor, slots: Tensor, y: Tensor) -> None:
        """Add rows of an expert's slots to those of their tokens."""
        add_slots(total, slots, y, self.index.shape[1], twice=self.twice)

    def of(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of these slots, their inputs and their weights [n, 1]."""
        rows = slots // self.index.shape[1]
        return rows, self.x[rows], self.weight.reshape(-1)[slots].unsqueeze(-1)

"""Run the nodes of a stage on many batches: an experts node takes all batches, expert by expert.

So each expert's weights are read once for all tokens, and no more than a few experts' are in memory
at a time. Gradients go back through an experts node in the same way. Experts may be run by workers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, fx

from moecc.checkpoint.memory import release
from moecc.ir import ops
from moecc.ir.graph import failed, run_nodes
from moecc.ir.moe import MoE, operand_names
from moecc.ir.program import Program
from moecc.ir.reference import add_slots, by_expert, repeats
from moecc.pipeline.workers.base import Workers
from moecc.types import Json, Value

R = TypeVar("R")

Visit: TypeAlias = Callable[[fx.Node, Value, int], None]
_LARGE = ("gate_up", "down", "codes", "signs", "coef")  # ends of operands read expert by expert
_TOKENS = 2048  # that go through an expert at once
TOGETHER = 2 * _TOKENS  # of them that are a unit of work
_AT_ONCE = 1 << 20  # weights of experts that are run together
_LARGE_BYTES = 1 << 24  # of a value of all batches that is laid side by side
_SHARED = ("basis", "post_norm")  # and of those that all experts share as they are


def run_batches(
    program: Program,
    nodes: Sequence[fx.Node],
    values: Sequence[dict[str, Value]],
    weights: Mapping[str, Tensor],
    keep: set[str],
    visit: Visit,
    workers: Workers | None = None,
) -> None:
    """Evaluate `nodes` in order for each batch, and call `visit(node, value, batch)` per result.

    values: by node name for each batch; read and extended. A value is dropped after its last use
    unless its name is in `keep`. workers: those that run experts; None: this process. Raise
    MoeccError, with node and stage, if a node fails.
    """
    pieces = list(split(nodes)) if values else []
    for i, piece in enumerate(pieces):
        needed = keep.union(n.name for p in pieces[i + 1 :] for m in p for n in m.all_input_nodes)
        if piece[0].target in ops.MOE_OPS:
            _run_experts(program, piece[0], values, weights, visit, workers)
            for there in values:
                for name in [n.name for n in piece[0].all_input_nodes if n.name not in needed]:
                    there.pop(name, None)
            continue
        large = _SideBySide(len(values))
        for batch, there in enumerate(values):
            for node, value in run_nodes(piece, there, weights, needed):
                visit(node, value, batch)
            large.move(batch, there, needed)
        release()


class _SideBySide:
    """Lays the batches of each large value side by side in one tensor, of which all are views.

    A heap can't give back the room of temporaries between many values that stay; and an experts
    node then needs no copy of its inputs.
    """

    def __init__(self, batches: int):
        self.batches = batches
        self.rows: dict[str, Tensor] = {}  # of each value: [batches, numbers of one]

    def move(self, batch: int, values: dict[str, Value], names: set[str]) -> None:
        """Move the large ones among the values of a batch called `names`."""
        sharing: dict[int, list[str]] = {}  # names of values on the same storage
        for name in sorted(names & values.keys()):
            value = values[name]
            if isinstance(value, Tensor):
                sharing.setdefault(value.untyped_storage().data_ptr(), []).append(name)
        for group in sharing.values():
            first, *others = tensors = [v for n in group if isinstance(v := values[n], Tensor)]
            # views of a part would no longer see what is written into the whole
            if first.nbytes * self.batches < _LARGE_BYTES or not all(map(_whole, tensors)):
                continue
            if any(t.dtype != first.dtype for t in others):
                continue
            key = group[0]
            rows = self.rows.get(key)
            if rows is None:
                rows = self.rows[key] = first.new_empty(self.batches, first.numel())
            if rows.shape[1] == first.numel() and rows.dtype == first.dtype:  # no shorter batch
                moved = rows[batch].copy_(first.flatten())
                values.update({n: moved.view(t.shape) for n, t in zip(group, tensors, strict=True)})


def _whole(value: Tensor) -> bool:
    """Return whether a tensor is all of its storage, in order."""
    return value.is_contiguous() and value.nbytes == value.untyped_storage().nbytes()


def _together(parts: Sequence[Tensor]) -> Tensor:
    """Return the batches of a value as one tensor, without a copy if they lie side by side."""
    base, at = parts[0]._base, parts[0].data_ptr()
    for part in parts:
        if base is None or part._base is not base or part.data_ptr() != at:
            return torch.cat(list(parts))
        at += part.nbytes
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    return parts[0].as_strided(shape, parts[0].stride())


def split(nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Return the experts nodes one by one, and what lies between them.

    A part of a tuple stays with what makes the tuple.
    """
    pieces: list[list[fx.Node]] = []
    place: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, fx.Node) and source in place:
            piece = place[source]
        else:
            if not pieces or ops.MOE_OPS & {node.target, pieces[-1][0].target}:
                pieces.append([])
            piece = pieces[-1]
        piece.append(node)
        place[node] = piece
    return pieces


def _run_experts(
    program: Program,
    node: fx.Node,
    values: Sequence[dict[str, Value]],
    weights: Mapping[str, Tensor],
    visit: Visit,
    workers: Workers | None,
) -> None:
    """Add a node's result to the values of each batch."""
    try:
        found = _Experts.reached(program, node, values, weights, workers).outputs()
    except (RuntimeError, IndexError, TypeError) as error:
        raise failed(node, error) from error
    for batch, (there, y) in enumerate(zip(values, found, strict=True)):
        there[node.name] = y
        visit(node, y, batch)


def pull_experts(
    program: Program,
    node: fx.Node,
    values: Sequence[Mapping[str, Value]],
    weights: Mapping[str, Tensor],
    grads: Sequence[Tensor],
    workers: Workers | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Return the gradients of an experts node's input and routing weights, for each batch.

    values: those of each batch before the node. grads: of its results. workers: those that run
    experts; None: this process. Raise MoeccError, with node and stage, if the node fails.
    """
    try:
        return _Experts.reached(program, node, values, weights, workers).pulled(grads)
    except (RuntimeError, IndexError, TypeError) as error:
        raise failed(node, error) from error


def _tensor(values: Mapping[str, Value], weights: Mapping[str, Tensor], node: object) -> Tensor:
    assert isinstance(node, fx.Node)
    found = values[node.name] if node.name in values else weights[node.name]
    assert isinstance(found, Tensor)
    return found


@dataclass(frozen=True)
class Share:
    """Some experts of a node: for each, rows of tokens and its operands.

    The rows are its inputs [n, D] and weights [n, 1], and the gradients of its results [n, D] where
    they are to be pulled.
    """

    reference: Callable[..., Tensor]
    attributes: Json
    experts: Sequence[tuple[Sequence[Tensor], Sequence[Tensor | None]]]

    def result(self, x: Tensor, weight: Tensor, operands: Sequence[Tensor | None]) -> Tensor:
        """Return what one expert adds to some tokens."""
        first = torch.zeros_like(weight, dtype=torch.long)
        return self.reference(x, first, weight, *operands, **self.attributes)


def answers(share: Share) -> list[Tensor]:
    """What each expert adds to its tokens, [n, D]."""
    found = []
    for rows, operands in share.experts:
        parts = [share.result(x, weight, operands) for x, weight in _few(rows)]
        found.append(torch.cat(parts))
    return found


def gradients(share: Share) -> list[tuple[Tensor, Tensor]]:
    """The gradients of each expert's inputs [n, D] and of its weights [n, 1]."""
    found = []
    for rows, operands in share.experts:
        parts = []
        for x, weight, grad in _few(rows):
            inputs = x.detach().requires_grad_(), weight.detach().requires_grad_()
            with torch.enable_grad():
                y = share.result(*inputs, operands)
            parts.append(torch.autograd.grad(y, inputs, grad))
        of_x, of_weight = zip(*parts, strict=True)
        found.append((torch.cat(of_x), torch.cat(of_weight)))
    return found


def _few(rows: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of each, as many as go through an expert at once."""
    return zip(*(t.split(_TOKENS) for t in rows), strict=True)


@dataclass(frozen=True)
class _Experts:
    """An experts node, and what reaches it from all batches: x [T, D]; index, weight [T, k]."""

    program: Program
    node: fx.Node
    weights: Mapping[str, Tensor]
    workers: Workers | None
    tokens: list[int]  # of each batch
    x: Tensor
    index: Tensor
    weight: Tensor

    @classmethod
    def reached(
        cls,
        program: Program,
        node: fx.Node,
        values: Sequence[Mapping[str, Value]],
        weights: Mapping[str, Tensor],
        workers: Workers | None,
    ) -> _Experts:
        """Return what the values of each batch give to the node."""
        each = [[_tensor(there, weights, n) for there in values] for n in node.args[:3]]
        tokens = [len(x) for x in each[0]]
        return cls(program, node, weights, workers, tokens, *map(_together, each))

    def outputs(self) -> tuple[Tensor, ...]:
        """Return the result for each batch, [T, D]."""
        return self._added(self._each(answers))

    def pulled(self, grads: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return the gradients of x and of weight for each batch, from those of the results."""
        of_weight = torch.zeros_like(self.weight)

        def of_x() -> Iterator[tuple[Tensor, Tensor]]:
            for slots, (rows, its) in self._each(gradients, _together(grads)):
                of_weight.view(-1, 1)[slots] = its
                yield slots, rows

        return list(zip(self._added(of_x()), of_weight.split(self.tokens), strict=True))

    def _added(self, parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        """Add rows of experts' slots to those of their tokens; return the sums of each batch."""
        dtype = torch.promote_types(self.x.dtype, torch.float32)
        total, twice = self.x.new_zeros(self.x.shape, dtype=dtype), repeats(self.index)
        for slots, y in parts:
            add_slots(total, slots, y.to(dtype), self.index.shape[1], twice=twice)
        found: tuple[Tensor, ...] = total.to(self.x.dtype).split(self.tokens)
        return found

    def _each(
        self, function: Callable[[Share], list[R]], *grad: Tensor
    ) -> Iterator[tuple[Tensor, R]]:
        """Yield slots of one expert each, all there are, and what `function` gives for them.

        grad: that of the result, [T, D], if the function takes it.
        """
        moe = MoE(self.node, self.node.meta["path"], self.node.meta["layer"], None)
        experts, k, weight = moe.sizes[0], self.index.shape[1], self.weight.reshape(-1, 1)
        order, counts = by_expert(self.index, experts)
        parts = [
            (e, part)
            for e, slots in enumerate(order.split(counts))
            for part in slots.split(TOGETHER)
            if len(part)
        ]
        held: dict[int, list[Tensor | None]] = {}  # the operands of the latest expert

        def own(e: int) -> list[Tensor | None]:
            if e not in held:
                held.clear()
                held[e] = _operands(self.program, self.node, self.weights, e)
            return held[e]

        def share(some: Sequence[tuple[int, Tensor]]) -> Share:
            each = []
            for e, slots in some:
                rows = slots // k
                tokens = (self.x[rows], weight[slots], *(g[rows] for g in grad))
                each.append((tokens, own(e)))
            return Share(ops.REFERENCE[self.node.target], dict(self.node.kwargs), each)

        few = max(1, _AT_ONCE * experts // moe.weights)
        shares = (share(parts[i : i + few]) for i in range(0, len(parts), few))
        found: Iterable[list[R]]
        if self.workers is None:
            found = map(function, shares)
        else:
            found = self.workers.run(function, shares)
        for (_, slots), result in zip(parts, chain.from_iterable(found), strict=True):
            yield slots, result


def _operands(
    program: Program, node: fx.Node, weights: Mapping[str, Tensor], expert: int
) -> list[Tensor | None]:
    """Return the operands of one expert, those of its projections and norm."""
    found: list[Tensor | None] = []
    for name, operand in zip(operand_names(node)[3:], node.args[3:], strict=False):
        if not isinstance(operand, fx.Node):
            found.append(None)
        elif name.endswith(_LARGE) and "_mean_" not in name:
            found.append(program.value(operand, [expert]))
        else:
            value = weights[operand.name]
            alike = name.endswith(_SHARED) or len(value) == 1
            found.append(value if alike else value[expert : expert + 1])
    return found

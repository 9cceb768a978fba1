"""Run the nodes of a stage on many batches: an experts node takes all batches, expert by expert.

So each expert's weights are read once for all tokens, and no more than a few experts' are in memory
at a time. Experts may be run by workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeAlias

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
    pieces = list(_pieces(nodes)) if values else []
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


def _pieces(nodes: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """Yield the experts nodes one by one, and what lies between them."""
    between: list[fx.Node] = []
    for node in nodes:
        if node.target not in ops.MOE_OPS:
            between.append(node)
            continue
        if between:
            yield between
        yield [node]
        between = []
    if between:
        yield between


def _run_experts(
    program: Program,
    node: fx.Node,
    values: Sequence[dict[str, Value]],
    weights: Mapping[str, Tensor],
    visit: Visit,
    workers: Workers | None,
) -> None:
    """Add a node's result to the values of each batch."""
    x, index, weight = ([_tensor(there, weights, n) for there in values] for n in node.args[:3])
    try:
        read = partial(_operands, program, node, weights)
        found = outputs(node, _together(x), _together(index), _together(weight), read, workers)
    except (RuntimeError, IndexError, TypeError) as error:
        raise failed(node, error) from error
    for batch, (there, y) in enumerate(zip(values, found.split([len(t) for t in x]), strict=True)):
        there[node.name] = y
        visit(node, y, batch)


def _tensor(values: Mapping[str, Value], weights: Mapping[str, Tensor], node: object) -> Tensor:
    assert isinstance(node, fx.Node)
    found = values[node.name] if node.name in values else weights[node.name]
    assert isinstance(found, Tensor)
    return found


@dataclass(frozen=True)
class Share:
    """Some experts of a node, and for each the inputs [n, D] and weights [n, 1] of tokens."""

    reference: Callable[..., Tensor]
    attributes: Json
    experts: Sequence[tuple[Tensor, Tensor, Sequence[Tensor | None]]]


def answers(share: Share) -> list[Tensor]:
    """What each expert adds to its tokens, [n, D]."""
    found = []
    for inputs, weights, operands in share.experts:
        parts = []
        for x, weight in zip(inputs.split(_TOKENS), weights.split(_TOKENS), strict=True):
            first = torch.zeros_like(weight, dtype=torch.long)
            parts.append(share.reference(x, first, weight, *operands, **share.attributes))
        found.append(torch.cat(parts))
    return found


def outputs(
    node: fx.Node,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    operands: Callable[[int], list[Tensor | None]],
    workers: Workers | None = None,
) -> Tensor:
    """Return the result [T, D] of an experts node for inputs [T, D], experts and weights [T, k].

    operands: those of one expert, as if the node had no other. workers: those that run experts.
    """
    reference, attributes = ops.REFERENCE[node.target], dict(node.kwargs)
    moe = MoE(node, node.meta["path"], node.meta["layer"], None)
    experts, k = moe.sizes[0], index.shape[1]
    order, counts = by_expert(index, experts)
    weight = weight.reshape(-1, 1)
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
            held[e] = operands(e)
        return held[e]

    def share(some: Sequence[tuple[int, Tensor]]) -> Share:
        each = [(x[slots // k], weight[slots], own(e)) for e, slots in some]
        return Share(reference, attributes, each)

    few = max(1, _AT_ONCE * experts // moe.weights)
    shares = (share(parts[i : i + few]) for i in range(0, len(parts), few))
    found: Iterable[list[Tensor]]
    found = map(answers, shares) if workers is None else workers.run(answers, shares)
    total = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    twice = repeats(index)
    for (_, slots), y in zip(parts, chain.from_iterable(found), strict=True):
        add_slots(total, slots, y.to(total.dtype), k, twice=twice)
    return total.to(x.dtype)


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

"""The plan of a compilation, before it starts: workers or GPU, memory, scratch disk and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from moecc.checkpoint.cores import usable_cores
from moecc.checkpoint.files import size
from moecc.checkpoint.memory import free_memory
from moecc.errors import MoeccError
from moecc.ir.program import Program, output_node
from moecc.ir.tensors import CPU
from moecc.pipeline.batches import TOGETHER
from moecc.pipeline.device import for_a_unit, kind_of, whole_memory
from moecc.pipeline.pace import duration
from moecc.pipeline.passes import Pass
from moecc.pipeline.work import Experts, Machine, Scope, costs, each

BATCH = 2  # calibration rows that go through a layer together
PROCESS = 700 << 20  # bytes of a process that has imported torch and traced a model
WORKER = 400 << 20  # of one that codes
CUDA = 2 << 30  # that its libraries take in a process
# Float32 copies of all tokens' hidden states at a time, and more for tokens that an expert sees:
# measured with 8 of 256, 4 of 60, 4 of 8 and 8 of 16 experts
_ACTIVATIONS, _OF_AN_EXPERT = 6, 10
_OF_A_PART = 6  # those of the tokens that go through an expert together
_MOST_BITS = 4  # of a code
_COPIES = 8  # float32 copies of a matrix and of its metric while it is coded
_PAIRS = 24  # and of a block of costs of output errors, for whose sums `affine` takes float64
# Weights that a core codes in the time in which a worker starts. Less is not worth one.
_OF_A_WORKER = 2_000_000
_WORTH_TIMING = 50_000_000  # weights; for less, the time isn't worth measuring the machine


def scope_of(program: Program, passes: Sequence[Pass], tokens: int, row: int) -> Scope:
    """Return what `passes` go through, from shapes alone. row: tokens of a calibration batch."""
    found, stages = [], dict[int, int]()
    weighted = any(p.weighs_errors for p in passes)
    operands = set()
    for moe in program.moe_layers():
        found.append(Experts(*moe.sizes, moe.top_k))
        operands |= {i.name for i in moe.node.all_input_nodes}
    for node in program.graph.nodes:
        if node.name in program.weights and node.name not in operands:
            stage = min((u.meta["layer"] for u in node.users), default=0)
            stages[stage] = stages.get(stage, 0) + node.meta["val"].numel()
    ends = (0, program.layers - 1)  # embedding and head
    dense = sum(count for stage, count in stages.items() if stage not in ends)
    largest, bits = max(stages.values(), default=0), _widest(passes)
    outputs = output_node(program).meta["val"].shape[-1]
    return Scope(tuple(found), tokens, dense, largest, weighted, bits, row, outputs)


def _widest(passes: Sequence[Pass]) -> int:
    """Return the bits of the widest code that may be stored."""
    return max((bits for p in passes for bits in p.widths()), default=_MOST_BITS)


@dataclass(frozen=True)
class Plan:
    """What a run takes. Bytes, of this process and of each worker beside it."""

    scope: Scope
    workers: int  # 1: none beside this process
    own: int
    worker: int
    scratch: int
    device: torch.device = CPU
    there: int = 0  # bytes of a GPU's memory
    spare: int = 0  # bytes that may be taken beyond, where tensors are

    @property
    def memory(self) -> int:
        """Of all processes."""
        return self.own + (self.workers * self.worker if self.workers > 1 else 0)

    def left(self, most: int) -> int:
        """Return what of `most` bytes is left while processes are there and have no work."""
        return most - PROCESS - (self.workers * WORKER if self.workers > 1 else 0)

    def lines(self, passes: Sequence[Pass], threads: int) -> list[str]:
        """Return the plan in words; time is measured on this machine, which takes a moment.

        A GPU's time isn't known.
        """
        if self.device.type != "cpu":
            return [
                f"plan: {self.device} ({kind_of(self.device)}) computes, in a time that isn't "
                f"known; about {size(self.there)} of its memory, {size(self.memory)} of this "
                f"machine's, {size(self.scratch)} of disk in OUT.partial"
            ]
        alone = self.workers == 1
        who = "in this process" if alone else f"by {self.workers} workers"
        found = [
            f"plan: experts are coded {who}; about {size(self.memory)} of memory, "
            f"{size(self.scratch)} of disk in OUT.partial"
        ]
        if self.scope.weights < _WORTH_TIMING:
            return found
        times = self.times(Machine.measured(), passes, threads)
        total = duration(sum(t for t in times.values() if t is not None))
        parts = ", ".join(f"{name} {duration(t)}" for name, t in times.items() if t and t >= 1)
        unknown = [name for name, t in times.items() if t is None]
        without = f"; without {', '.join(unknown)}, not known" if unknown else ""
        return [*found, f"plan: about {total} on this machine ({parts}){without}"]

    def times(
        self, machine: Machine, passes: Sequence[Pass], threads: int
    ) -> dict[str, float | None]:
        """Return the seconds of each pass, None if not known, and of the way through the layers.

        threads: of this process.
        """
        # the compressed model goes through all layers, its experts by workers
        scope = self.scope
        forward = scope.dense / threads + (scope.forward - scope.dense) / self.workers
        through = scope.tokens * forward / machine.product
        found: dict[str, float | None] = {"calibration": through}
        for p in passes:
            work = p.work(self.scope)
            found[p.name] = machine.time(work, self.workers, threads) if work.known else None
        return found


def planned(
    program: Program,
    passes: Sequence[Pass],
    tokens: int,
    row: int,
    *,
    workers: int | None = None,
    most: int | None = None,
) -> Plan:
    """Return the plan of a run of `passes` on `tokens` tokens, `row` of them in a batch.

    workers: as many as are wanted, or None: as many as cores and memory have room for. most: bytes
    that all processes may take. Raise MoeccError if they would take more, or if a GPU has less.
    """
    scope = scope_of(program, passes, tokens, row)
    scratch, least = needed(scope, passes)
    if program.device.type == "cpu":
        found = fitting(scope, workers, usable_cores(), most or free_memory(), scratch, least)
    else:
        found = on_gpu(scope, program.device, scratch, least)
    if most is not None and found.memory > most:
        advice = "give more, or fewer --workers, --rows or a smaller --length"
        raise MoeccError(
            f"this takes about {size(found.memory)} of memory, more than {size(most)}; {advice}"
        )
    return found


def needed(scope: Scope, passes: Sequence[Pass]) -> tuple[int, int]:
    """Return bytes on disk, and of memory that a pass takes beside this process."""
    works = [p.work(scope) for p in passes]
    # what passes over the whole model take for a while is gone before there are codes
    passing = max([scope.weights * scope.bits // 8, *(work.scratch for work in works)])
    memory = max((work.memory for work in works), default=0)
    return int(passing + sum(work.kept for work in works)), int(memory)


def fitting(
    scope: Scope, workers: int | None, cores: int, most: int, scratch: int, least: int = 0
) -> Plan:
    """Return the plan with as many workers as are wanted or, without a wish, as fit.

    least: bytes that a pass takes in this process.
    """
    unit = _unit(scope)  # this process has work of that size too, such as a basis
    own = max(_own(scope), _resting(scope) + unit, PROCESS + least)
    worker = WORKER + unit + 2 * _payload(scope)
    count = workers
    if count is None:
        count = max(1, min(cores, (most - own) // worker, 1 + scope.weights // _OF_A_WORKER))
    if count == 1:
        own = max(own, _resting(scope) + unit + 2 * _payload(scope))
    found = Plan(scope, count, own, worker, scratch)
    return replace(found, spare=max(0, most - found.memory))


def on_gpu(scope: Scope, device: torch.device, scratch: int, least: int) -> Plan:
    """Return the plan on a GPU. Raise MoeccError if it has too little memory.

    least: bytes of its memory that a pass takes.
    """
    whole = whole_memory(device)
    experts = max((layer.experts for layer in scope.layers), default=0)
    together = min(experts * (_unit(scope) + _payload(scope)), for_a_unit(device))
    coding = max(_unit(scope) + _payload(scope), together)
    there = max(_activations(scope) + coding, least)
    if there > whole:
        advice = "give fewer --rows, a smaller --length, or --device cpu"
        raise MoeccError(
            f"this takes about {size(there)} of memory on {device}, which has {size(whole)}; "
            f"{advice}"
        )
    own = CUDA + _resting(replace(scope, tokens=0)) + 4 * scope.largest + together // _COPIES
    return Plan(scope, 1, own, 0, scratch, device, there, whole - there)


def _resting(scope: Scope) -> int:
    """Return bytes of this process while a layer is coded."""
    layer = max((x.experts * x.weights for x in scope.layers), default=0)
    return PROCESS + scope.states + layer * scope.bits // 8


def _own(scope: Scope) -> int:
    """Return bytes of this process while tokens go through a layer."""
    return PROCESS + _activations(scope)


def _activations(scope: Scope) -> int:
    """Return bytes of the tokens that go through a layer, and of its weights."""
    together = min(TOGETHER, scope.tokens)
    states = (_ACTIVATIONS + _OF_AN_EXPERT * scope.share) * scope.tokens + _OF_A_PART * together
    return 4 * (int(states) * scope.hidden + scope.largest + 3 * scope.expert)


def _unit(scope: Scope) -> int:
    """Return bytes that coding the largest unit takes."""
    sizes = [
        _COPIES * (columns * (rows + columns) + costs(rows, blocks))
        + _PAIRS * costs(rows, blocks) // max(blocks, 1)
        for _, rows, columns, blocks, _ in each(scope)
    ]
    return 4 * max(sizes, default=0)


def _payload(scope: Scope) -> int:
    """Return bytes of the largest unit before it is coded: weights, and twice its fair tokens."""
    tokens = [
        2 * scope.tokens * layer.top_k // layer.experts * layer.hidden for layer in scope.layers
    ]
    return 4 * (2 * scope.expert + max(tokens, default=0))

"""Calibration activations on their way through a program, one decoder layer at a time.

A Stream holds, for every calibration batch, the values that are alive between two stages of the graph. Running a stage loads that
stage's weights once, takes every batch through it and drops what no later stage reads; so memory is one layer's weights plus the
activations between two layers, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from moecc.checkpoint.memory import free_memory
from moecc.ir.graph import needed_for, run_nodes
from moecc.ir.program import Program, output_node, stage_nodes


class StageWeights(Mapping[str, Any]):
    """Placeholder name -> tensor, read from the program when first asked for and kept while the stage runs."""

    def __init__(self, program: Program, overrides: Mapping[str, Tensor] | None = None):
        self._program, self._loaded = program, dict(overrides or {})

    @classmethod
    def sharing(cls, loaded: StageWeights, overrides: Mapping[str, Tensor]) -> StageWeights:
        """The same weights but for `overrides`; what `loaded` reads later it reads once for both."""
        return _Overridden(loaded, overrides)

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = self._program.read(self._program.weights[name].name)
        return self._loaded[name]

    def __iter__(self) -> Any:
        return iter(self._program.weights)

    def __len__(self) -> int:
        return len(self._program.weights)


class _Overridden(StageWeights):
    def __init__(self, loaded: StageWeights, overrides: Mapping[str, Tensor]):
        super().__init__(loaded._program, overrides)
        self._base = loaded

    def __getitem__(self, name: str) -> Any:
        return self._loaded[name] if name in self._loaded else self._base[name]


class Stream:
    """The activations of all batches before stage `stage` of `program`: a dict of values by node name per batch."""

    def __init__(self, program: Program, batches: Iterable[Tensor]):
        name = program.user_inputs[0].name
        self.program, self.stage = program, 0
        self.values: list[dict[str, Any]] = [{name: ids} for ids in batches]

    @torch.no_grad()
    def advance(self, visit: Callable[[fx.Node, Any, int], None] | None = None) -> None:
        """Take every batch through the next stage; `visit(node, value, batch)` sees each result."""
        nodes = stage_nodes(self.program, self.stage)
        weights, keep = StageWeights(self.program), self.needed_after(self.stage)
        for batch, values in enumerate(self.values):
            for node, value in run_nodes(nodes, values, weights, keep):
                if visit is not None:
                    visit(node, value, batch)
            for name in [n for n in values if n not in keep]:
                del values[name]
        self.stage += 1

    @torch.no_grad()
    def tap(self, stage: int, names: Iterable[str]) -> dict[str, list[Any]]:
        """The values of the nodes called `names` in stage `stage`, without advancing; inputs of the stage are given too."""
        assert stage == self.stage, f"the stream stands before stage {self.stage}, not {stage}"
        wanted = set(names)
        found: dict[str, list[Any]] = {n: [] for n in wanted}
        nodes = needed_for(stage_nodes(self.program, stage), wanted)
        weights = StageWeights(self.program)
        for values in self.values:
            here = dict(values)
            for _ in run_nodes(nodes, here, weights, keep=wanted | set(values)):
                pass
            for name in wanted:
                found[name].append(here[name])
        return found

    def needed_after(self, stage: int) -> set[str]:
        """Names of values that a stage after `stage`, or the output, reads: what has to be kept of those made by then."""
        late = [
            n
            for n in self.program.graph.nodes
            if n.op == "output" or (n.op == "call_function" and n.meta["layer"] > stage)
        ]
        return {
            i.name for n in late for i in n.all_input_nodes if i.name not in self.program.weights
        }

    def output(self) -> list[Tensor]:
        """The program's first output (logits, or the last hidden state of a model without a head), batch by batch."""
        assert self.stage == self.program.layers, (
            "the stream has not reached the end of the program"
        )
        node = output_node(self.program)
        return [values[node.name] for values in self.values]


def run_program(
    program: Program,
    batches: Iterable[Tensor],
    visit: Callable[[fx.Node, Any, int], None] | None = None,
) -> list[Tensor]:
    """The program's outputs for `batches`, layer by layer."""
    stream = Stream(program, batches)
    while stream.stage < program.layers:
        stream.advance(visit)
    return stream.output()


def first_tokens(batches: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The first of equally large batches, up to `tokens` tokens in all (one batch at least)."""
    return list(batches[: max(1, tokens // batches[0].numel())])


def fits_in_memory(program: Program) -> bool:
    """Whether all weights take no more than half of what is free, so that they can stay once they were read."""
    values = [
        n.meta["val"]
        for n in program.graph.nodes
        if n.op == "placeholder" and n.name in program.weights
    ]
    return bool(sum(v.numel() * v.element_size() for v in values) < free_memory() // 2)

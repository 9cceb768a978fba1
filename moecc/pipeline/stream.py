"""Stream calibration activations through a program, one decoder layer at a time.

A Stream holds, for every calibration batch, the values that are alive between two stages of the
graph. To run a stage, it loads the stage's weights once, takes every batch through and drops the
values that no later stage reads. So the memory is one layer's weights plus the activations between
two layers, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from moecc.errors import MoeccError
from moecc.ir.graph import needed_for
from moecc.ir.program import Program, output_node, stage_nodes
from moecc.pipeline.batches import Visit, run_batches
from moecc.pipeline.workers.base import Workers
from moecc.types import Value

_ADVICE = "the model's own numbers leave the range of float32; check its weights"


def require_numbers(value: Value, what: str) -> None:
    """Raise MoeccError if there is NaN in a value; infinities may be masks."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any():
        raise MoeccError(f"{what} is NaN: {_ADVICE}")


def require_squares(value: Tensor, what: str) -> None:
    """Raise MoeccError if float32 can't hold the sum of a value's squares."""
    if not value.float().square().sum().isfinite():
        raise MoeccError(f"{what} has squares of more than float32 holds: {_ADVICE}")


class StageWeights(Mapping[str, Tensor]):
    """Placeholder name -> tensor, read from the program at first access and kept from then on."""

    def __init__(self, program: Program, overrides: Mapping[str, Tensor] | None = None):
        self._program = program
        self._loaded: dict[str, Tensor] = dict(overrides or {})

    @classmethod
    def sharing(cls, loaded: StageWeights, overrides: Mapping[str, Tensor]) -> StageWeights:
        """Return the same weights except for `overrides`; a tensor is read once for both."""
        return _Overridden(loaded, overrides)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._loaded:
            self._loaded[name] = self._program.read(self._program.weights[name].name)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._program.weights)

    def __len__(self) -> int:
        return len(self._program.weights)


class _Overridden(StageWeights):
    def __init__(self, loaded: StageWeights, overrides: Mapping[str, Tensor]):
        super().__init__(loaded._program, overrides)
        self._base = loaded

    def __getitem__(self, name: str) -> Tensor:
        return self._loaded[name] if name in self._loaded else self._base[name]


class Stream:
    """The activations of all batches before stage `stage` of `program`.

    values: a dict of values by node name for each batch. workers: those that run experts; None: all
    threads of this process.
    """

    def __init__(self, program: Program, batches: Iterable[Tensor], workers: Workers | None = None):
        name = program.user_inputs[0].name
        self.program, self.stage, self.workers = program, 0, workers
        self.values: list[dict[str, Value]] = [{name: ids.to(program.device)} for ids in batches]

    @torch.no_grad()
    def advance(self, visit: Visit | None = None) -> None:
        """Take every batch through the next stage; call `visit(node, value, batch)` per result.

        Raise MoeccError if a value that a later stage reads is NaN.
        """
        nodes, keep = stage_nodes(self.program, self.stage), self.needed_after(self.stage)

        def checked(node: fx.Node, value: Value, batch: int) -> None:
            if node.name in keep:
                require_numbers(value, f"what {self._place()} gives")
            if visit is not None:
                visit(node, value, batch)

        self._run(nodes, self.values, keep, checked)
        for values in self.values:
            for name in [n for n in values if n not in keep]:
                del values[name]
        self.stage += 1

    @torch.no_grad()
    def tap(self, stage: int, names: Iterable[str]) -> dict[str, list[Value]]:
        """Return, batch by batch, the values of the nodes called `names`, without advancing.

        stage: where the stream stands. names: nodes of this stage or inputs of it.
        """
        assert stage == self.stage, f"the stream stands before stage {self.stage}, not {stage}"
        wanted = set(names)
        found: dict[str, list[Value]] = {n: [] for n in wanted}
        nodes = needed_for(stage_nodes(self.program, stage), wanted)
        here = [dict(values) for values in self.values]
        keep = wanted.union(*self.values)
        self._run(nodes, here, keep, lambda node, value, batch: None)
        for values in here:
            for name in wanted:
                require_numbers(values[name], f"{name} in {self._place()}")
                found[name].append(values[name])
        return found

    def _run(
        self, nodes: Sequence[fx.Node], values: list[dict[str, Value]], keep: set[str], visit: Visit
    ) -> None:
        weights = StageWeights(self.program)
        run_batches(self.program, nodes, values, weights, keep, visit, self.workers)

    def _place(self) -> str:
        """The stage that comes next, as users count layers."""
        if self.stage == 0:
            return "the embedding"
        return "the head" if self.stage == self.program.layers - 1 else f"layer {self.stage - 1}"

    def needed_after(self, stage: int) -> set[str]:
        """Return the names of the values that a later stage or the output reads."""
        nodes = self.program.graph.nodes
        late = [n for n in nodes if n.op == "call_function" and n.meta["layer"] > stage]
        late += [n for n in nodes if n.op == "output"]
        read = {i.name for n in late for i in n.all_input_nodes}
        return {name for name in read if name not in self.program.weights}

    def output(self) -> list[Tensor]:
        """Return the program's first output, batch by batch.

        It is the logits, or the last hidden state of a model without a head.
        """
        assert self.stage == self.program.layers, (
            "the stream has not reached the end of the program"
        )
        node = output_node(self.program)
        return [values[node.name] for values in self.values]


def run_program(
    program: Program,
    batches: Iterable[Tensor],
    visit: Visit | None = None,
) -> list[Tensor]:
    """Run the program on `batches` layer by layer and return its outputs, batch by batch."""
    stream = Stream(program, batches)
    while stream.stage < program.layers:
        stream.advance(visit)
    return stream.output()


def first_tokens(batches: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Return the first of equally large batches: `tokens` tokens in all, at least one batch."""
    return list(batches[: max(1, tokens // batches[0].numel())])


def fits_in_memory(program: Program, room: int) -> bool:
    """Return whether all weights take less than half of so many bytes, so that they can stay.

    The other half is for the float model, which passes compare with.
    """
    values = [
        n.meta["val"]
        for n in program.graph.nodes
        if n.op == "placeholder" and n.name in program.weights
    ]
    return bool(sum(v.numel() * v.element_size() for v in values) < room // 2)

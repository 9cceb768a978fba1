"""The whole model as a function of trained tensors, differentiated layer by layer.

  1. Run forward without a graph. Keep the values that are alive between two stages, nothing else.
  2. Run backward from the last stage to the first. Run each stage again from its kept inputs, now
     with a graph; pull the gradients of its results back to its inputs and to the trained tensors
     that it reads; drop its graph.

Memory: the activations between all layers for one batch, one layer's weights and one layer's graph.
Cost: one forward more. The loss is a function of the output and of the values that are alive before
the last stage (the last hidden state). Losses of single values inside the layers (router scores)
come on top; they are taken when their layer runs backward.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

import torch
from torch import Tensor

from moecc.ir.graph import descendants, run_nodes
from moecc.ir.program import Program, output_node, stage_nodes
from moecc.passes._tune.experts import tunable
from moecc.pipeline.stream import StageWeights, Stream, fits_in_memory
from moecc.types import Value

Values = dict[str, Value]  # by node name
# placeholders of a stage -> their values, as functions of the parameters
TrainedValues = Callable[[set[str]], Mapping[str, Tensor]]
Inner = Mapping[str, Callable[[Tensor], Tensor]]  # node name -> the loss of its value


class Whole:
    """A program, stage by stage, in which functions of parameters stand for some weights."""

    def __init__(
        self, program: Program, trained: set[str], watch: Container[str] = (), *, spare: int = 0
    ):
        """trained: the placeholders of these weights. watch: nodes inside the layers to report.

        spare: bytes; weights stay in memory once they are read, if all of them fit in there.
        """
        self.program = program
        self.kept = StageWeights(program) if fits_in_memory(program, spare) else None
        self.input, self.output = program.user_inputs[0].name, output_node(program).name
        run = tunable(program)
        self.stages = [stage_nodes(run, i) for i in range(program.layers)]
        stream = Stream(program, ())
        self.alive = [stream.needed_after(i) for i in range(program.layers)]
        self.alive[-1] = {self.output}
        # lists, because losses are summed in this order
        self.watched = [[n.name for n in s if n.name in watch] for s in self.stages]
        self.reads = [
            {i.name for n in s for i in n.all_input_nodes if i.name in trained} for s in self.stages
        ]
        roots = [n for n in run.graph.nodes if n.name in trained]
        self.moving = {n.name for n in descendants([n for s in self.stages for n in s], roots)}

    def weights(self) -> StageWeights:
        """The stored weights: those that stay in memory, or some to be read anew."""
        return StageWeights(self.program) if self.kept is None else self.kept

    def run(self, stage: int, values: Values, trained: TrainedValues) -> Values:
        """Take the values before `stage` through it; return those alive after it or watched."""
        weights = StageWeights.sharing(self.weights(), trained(self.reads[stage]))
        here, wanted = dict(values), self.alive[stage].union(self.watched[stage])
        for _ in run_nodes(self.stages[stage], here, weights, keep=wanted):
            pass
        return {k: v for k, v in here.items() if k in wanted}

    @torch.no_grad()
    def forward(self, ids: Tensor, trained: TrainedValues) -> list[Values]:
        """The values alive before each stage, and those watched in the stage before it.

        The last entry holds the inputs of the head.
        """
        kept: list[Values] = [{self.input: ids}]
        for stage in range(self.program.layers - 1):
            kept.append(self.run(stage, kept[-1], trained))
        return kept

    @torch.no_grad()
    def head(self, values: Values, trained: TrainedValues) -> Tensor:
        """The output, from the values alive before the last stage."""
        output: Tensor = self.run(self.program.layers - 1, values, trained)[self.output]
        return output

    def backward(
        self,
        ids: Tensor,
        trained: TrainedValues,
        loss: Callable[[Values, Tensor], Tensor],
        inner: Inner | None = None,
    ) -> None:
        """Add the gradient of a loss to the parameters behind `trained`.

        loss: of the values alive before the head and of the output. inner: losses on top.
        """
        kept, inner = self.forward(ids, trained), inner or {}
        values = self.leaves(kept.pop())
        with torch.enable_grad():
            loss(values, self.run(self.program.layers - 1, values, trained)[self.output]).backward()
        for stage in reversed(range(self.program.layers - 1)):
            grads = {
                k: v.grad for k, v in values.items() if isinstance(v, Tensor) and v.grad is not None
            }
            values = self.leaves(kept.pop())
            with torch.enable_grad():
                after = self.run(stage, values, trained)
                reached = [k for k in grads if after[k].requires_grad]
                inside = [k for k in self.watched[stage] if k in inner and after[k].requires_grad]
                losses = [inner[k](after[k]) for k in inside]
                if reached or losses:
                    ends = [*(after[k] for k in reached), *losses]
                    starts = [*(grads[k] for k in reached), *map(torch.ones_like, losses)]
                    torch.autograd.backward(ends, starts)

    def leaves(self, values: Values) -> Values:
        """The same values; those that depend on trained tensors become leaves with a gradient."""
        return {
            k: v.detach().requires_grad_() if k in self.moving and v.is_floating_point() else v
            for k, v in values.items()
        }

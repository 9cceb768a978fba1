"""The whole model as a function of tensors that are trained, differentiated with one layer in memory at a time.

  1. Forward, without a graph: the values alive between two stages are kept, nothing else.
  2. Backward from the last stage to the first: a stage is run again from its kept inputs, now with a graph; the gradients of what
     it gave are pulled back to its inputs and to the trained tensors that it reads, and its graph is dropped.

Memory: the activations between all layers for one batch, one layer's weights and one layer's graph. Cost: one forward more.
The loss is a function of what is alive before the last stage (the last hidden state) and of the output, plus losses of single
values inside the layers (router scores), which are taken where their layer is run backward.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor

from moecc.ir.graph import descendants, run_nodes
from moecc.ir.program import Program, output_node, stage_nodes
from moecc.pipeline.stream import StageWeights, Stream, fits_in_memory

Values = dict[str, Any]
# placeholders of a stage -> their values, as functions of the parameters
Trained = Callable[[set[str]], Mapping[str, Tensor]]
Inner = Mapping[str, Callable[[Tensor], Tensor]]  # node name -> the loss of its value


class Whole:
    """A program, stage by stage, with the weights behind the placeholders `trained` replaced by functions of parameters."""

    def __init__(self, program: Program, trained: set[str], watch: Container[str] = ()):
        """watch: nodes inside the layers whose values are wanted. Weights that fit in memory stay there once they were read."""
        self.program, self.keep = program, fits_in_memory(program)
        self.input, self.output = program.user_inputs[0].name, output_node(program).name
        self.stages = [stage_nodes(program, i) for i in range(program.layers)]
        stream = Stream(program, ())
        self.alive = [stream.needed_after(i) for i in range(program.layers)]
        self.alive[-1] = {self.output}
        self.watched = [
            [n.name for n in s if n.name in watch] for s in self.stages
        ]  # in order, for losses are summed
        self.reads = [
            {i.name for n in s for i in n.all_input_nodes if i.name in trained} for s in self.stages
        ]
        roots = [n for n in program.graph.nodes if n.name in trained]
        self.moving = {n.name for n in descendants([n for s in self.stages for n in s], roots)}
        self._weights: dict[int, StageWeights] = {}

    def weights(self, stage: int) -> StageWeights:
        """The stored weights of a stage."""
        if not self.keep:
            return StageWeights(self.program)
        return self._weights.setdefault(stage, StageWeights(self.program))

    def run(self, stage: int, values: Values, trained: Trained) -> Values:
        """What is alive after `stage`, from what was alive before it, and what is watched inside."""
        return self.run_with(
            StageWeights.sharing(self.weights(stage), trained(self.reads[stage])), stage, values
        )

    def run_with(
        self,
        weights: StageWeights,
        stage: int,
        values: Values,
        change: Callable[[str, Any], Any] = lambda _, v: v,
    ) -> Values:
        """The same with these weights; `change` gives each node's value from its name and what it computed."""
        here, wanted = dict(values), self.alive[stage].union(self.watched[stage])
        for node, value in run_nodes(self.stages[stage], here, weights, keep=wanted):
            here[node.name] = change(node.name, value)
        return {k: v for k, v in here.items() if k in wanted}

    @torch.no_grad()
    def forward(self, ids: Tensor, trained: Trained) -> list[Values]:
        """What is alive before each stage and was watched in the one before; the last entry is what is alive before the head."""
        kept: list[Values] = [{self.input: ids}]
        for stage in range(self.program.layers - 1):
            kept.append(self.run(stage, kept[-1], trained))
        return kept

    @torch.no_grad()
    def head(self, values: Values, trained: Trained) -> Tensor:
        """The output, from what is alive before the last stage."""
        output: Tensor = self.run(self.program.layers - 1, values, trained)[self.output]
        return output

    def backward(
        self,
        ids: Tensor,
        trained: Trained,
        loss: Callable[[Values, Tensor], Tensor],
        inner: Inner | None = None,
    ) -> None:
        """Add the gradient of loss(what is alive before the head, output), and of inner losses, to what is behind `trained`."""
        kept = self.forward(ids, trained)
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
                inside = [
                    k
                    for k in self.watched[stage]
                    if inner and k in inner and after[k].requires_grad
                ]
                losses = [inner[k](after[k]) for k in inside] if inner else []
                if reached or losses:
                    ends = [*(after[k] for k in reached), *losses]
                    torch.autograd.backward(
                        ends, [*(grads[k] for k in reached), *(torch.ones_like(x) for x in losses)]
                    )

    def leaves(self, values: Values) -> Values:
        """The same values, those that move as leaves that collect a gradient."""
        return {
            k: v.detach().requires_grad_() if k in self.moving and v.is_floating_point() else v
            for k, v in values.items()
        }

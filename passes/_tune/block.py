"""One layer's block behind the compressed earlier layers, compared with the float model's.

The terms of the objective (VSRAQ, arXiv 2606.05688):
  reconstruction  of the block's output. An error d costs d^T S d (`sensitivity`), relative to the
                  cost of the spread of the float model's output.
  routing         the terms of `_tune.routing` on the next router, reached through the next layer's
                  own attention and norm.
  head            behind the last experts there is no router, and the model's head chooses the
                  token: KL(float logits || logits) in nats per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, fx

from moecc.ir.graph import descendants, needed_for, run_nodes, written
from moecc.ir.moe import MoE
from moecc.ir.program import Program, output_node, stage_nodes
from moecc.ir.relative import relative
from moecc.passes._code.metric import damped
from moecc.passes._tune.divergence import divergence
from moecc.passes._tune.experts import tunable
from moecc.passes._tune.routing import (
    boundary_loss,
    flips,
    order_loss,
    selection_scores,
    standardized,
    value_loss,
)
from moecc.passes._tune.whole import Values
from moecc.pipeline.passes import Layer
from moecc.pipeline.stream import StageWeights, require_squares

# Every direction costs at least this share of the mean, because a direction that a sample of tokens
# does not show to matter still may.
_DAMPING = 0.05
ROUTING: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "value": value_loss,
    "order": order_loss,
    "boundary": boundary_loss,
}


class Block:
    """One layer's block and the way on to the next router; targets are the float model's values.

    A row is the number of a calibration batch.
    """

    def __init__(
        self, layer: Layer, routing: Iterable[str], sensitivity: Mapping[str, Tensor], *, head: bool
    ):
        """routing: the wanted terms of `_tune.routing`; without any the router isn't reached.

        sensitivity: [D, D] by name of a value between layers; without an entry, errors of a value
        count alike in all directions. head: whether that term is wanted.
        """
        self.layer, self.routing = layer, tuple(routing)
        program = tunable(layer.program)
        self.inputs = layer.inputs.values
        self.targets = layer.targets.values
        body = stage_nodes(program, layer.index)
        experts = {m.node.name for m in layer.moe}
        changed = descendants(body, [n for n in body if n.name in experts])
        live = layer.inputs.needed_after(layer.index)
        self.outputs = [
            n.name
            for n in body
            if n in changed and n.name in live and n.meta["val"].is_floating_point()
        ]
        # all of it, because the way on may read values that the experts have no part in
        body = needed_for(body, live)
        self.before = [n for n in body if n not in changed]
        self.body = [n for n in body if n in changed]
        following = next_router(layer.program, layer.index)
        self.router = following if self.routing else None
        self.head = output_logits(layer.program) if head and following is None else None
        goal = self.router[1] if self.router else self.head
        self.goal = "" if goal is None else goal.name
        self.onward = [] if goal is None else _path_to(program, layer.index, goal)
        self.weights = StageWeights(layer.program)
        self.reference_weights = StageWeights(layer.reference)
        self.roots = {
            n: torch.linalg.cholesky(damped(sensitivity[n].unsqueeze(0), _DAMPING)[0])
            for n in self.outputs
            if n in sensitivity
        }
        for name in self.outputs:
            for values in self.targets:
                require_squares(values[name], f"what layer {layer.index - 1} gives")
        self.spread = {
            n: torch.stack([self._cost(n, v[n] - v[n].mean()) for v in self.targets]).mean()
            for n in self.outputs
        }
        nodes = {n.name: n for n in layer.reference.graph.nodes}
        self.reference_onward = [nodes[n.name] for n in self.onward]
        self.kept: dict[int, Values] = {}
        self.scores = (
            [self._teacher(row) for row in range(len(self.targets))] if self.router else []
        )

    @torch.no_grad()
    def _teacher(self, row: int) -> Tensor:
        """The float model's scores or logits of one batch, [T, E] or [T, vocabulary]."""
        return self._reach(self.reference_onward, dict(self.targets[row]), self.reference_weights)

    def _reach(self, onward: list[fx.Node], values: Values, weights: StageWeights) -> Tensor:
        """Go on to the router or the head, from the values behind the block."""
        for _ in run_nodes(onward, values, weights):
            pass
        reached: Tensor = values[self.goal]
        return reached.flatten(0, -2).float()

    def terms(self, rows: list[int], overrides: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every term of the objective, averaged over calibration batches.

        overrides: the values of tuned tensors, by placeholder.
        """
        sums: dict[str, Tensor] = {}
        for row in rows:
            for name, value in self._row(row, overrides).items():
                sums[name] = sums.get(name, torch.zeros(())) + value / len(rows)
        return sums

    @torch.no_grad()
    def _before(self, row: int) -> Values:
        """The values of one batch that the experts have no part in.

        They are computed once. Those that an in-place op writes into are copied each time.
        """
        if row not in self.kept:
            values = dict(self.inputs[row])
            read = {i.name for n in (*self.body, *self.onward) for i in n.all_input_nodes}
            for _ in run_nodes(self.before, values, self.weights, keep=read):
                pass
            self.kept[row] = {k: v for k, v in values.items() if k in read}
        into = {i.name for n in (*self.body, *self.onward) for i in written(n)}
        return {k: v.clone() if k in into else v for k, v in self.kept[row].items()}

    def _row(self, row: int, overrides: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = self._before(row)
        weights = StageWeights.sharing(self.weights, overrides)
        for _ in run_nodes(self.body, values, weights):
            pass
        errors = [
            relative(self._cost(n, values[n] - self.targets[row][n]), self.spread[n])
            for n in self.outputs
        ]
        found = {"reconstruction": torch.stack(errors).sum()}
        if self.head is not None:
            teacher = self._teacher(row)  # not kept: a vocabulary is wide
            student = self._reach(self.onward, values, weights)
            found["head"] = divergence(student, teacher)
        if self.router is None:
            return found
        k = self.router[0].top_k
        s, t = standardized(self._reach(self.onward, values, weights), self.scores[row])
        for name in self.routing:
            found[name] = ROUTING[name](s, t, k)
        found["flips"] = flips(s.detach(), t, k)
        return found

    def _cost(self, name: str, error: Tensor) -> Tensor:
        """Mean over tokens of d^T S d, S the identity for a value without one."""
        d = error.float()
        return (d @ self.roots[name] if name in self.roots else d).square().mean()

    @torch.no_grad()
    def losses(self, rows: list[int], stored: Mapping[str, Tensor]) -> dict[str, float]:
        """The terms as plain numbers, on tensors as they would be stored."""
        return {k: float(v) for k, v in self.terms(rows, stored).items()}


def next_router(program: Program, stage: int) -> tuple[MoE, fx.Node] | None:
    """The first router after `stage`, and the node whose values its top-k compares."""
    for moe in program.moe_layers():
        if moe.layer > stage and moe.logits is not None:
            return moe, selection_scores(moe)
    return None


def output_logits(program: Program) -> fx.Node | None:
    """The program's logits, None for a model without a head."""
    node, config = output_node(program), program.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return node if node.meta["val"].shape[-1] == getattr(text, "vocab_size", None) else None


def _path_to(program: Program, stage: int, target: fx.Node) -> list[fx.Node]:
    later = [n for n in program.graph.nodes if n.op == "call_function" and n.meta["layer"] > stage]
    return needed_for(later, {target.name})

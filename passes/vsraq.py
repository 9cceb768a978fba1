"""VSRAQ: tune what is continuous in the compressed experts so that the routers behind them choose as before.  arXiv 2606.05688.

  1. A layer's block runs behind the compressed earlier layers; its target is the float model's own output of that layer.
  2. Codes stay. Codebooks (rounded to whole numbers on the way, straight-through), row scales, biases, bases and coefficient
     scales are trained by Adam on
         reconstruction of the block's output
       + value * sensitivity-weighted alignment of the next router's scores
       + order * alignment of the order of its chosen experts  +  boundary * alignment of its top-k boundary   (`_routing`)
     Each term is divided by its value before tuning, so that weights mean the same on any model; 0 switches a term off.
  3. An eighth of the calibration batches (at least one) is held out. The state with the least held-out loss is kept, the start
     included, so tuning never makes a layer worse on text it did not see.

The next router is reached through the next layer's own attention and norm, in float. The last layer has no router behind it and is
tuned on reconstruction. No inference cost: the tensors keep their shapes and types. Not done: codes are not chosen again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from moecc.base import Context, Layer, LayerPass, option
from moecc.ir import MoE, Program, ancestors, needed_for, run_nodes, stage_nodes
from moecc.ops import VQ_EXPERTS
from moecc.passes._coding import clamp_codebook
from moecc.passes._routing import boundary_loss, flips, order_loss, standardized, value_loss
from moecc.passes._store import compact
from moecc.stream import StageWeights

_TUNED = ("codebook", "scale", "bias", "basis", "coef_scale")


@dataclass(frozen=True, kw_only=True)
class AlignRouting(LayerPass):
    name: ClassVar[str] = "vsraq"
    requires: ClassVar[frozenset[str]] = frozenset({"folded"})
    provides: ClassVar[frozenset[str]] = frozenset({"routing"})
    needs_data: ClassVar[bool] = True
    steps: int = option(200, help="optimizer steps per layer", low=1, high=100_000)
    batches: int = option(1, help="calibration batches per step", low=1, high=4096)
    lr: float = option(1.0, help="factor on all learning rates", low=1e-4, high=100)
    reconstruction: float = option(1.0, help="weight of the block's output", low=0, high=1e4)
    value: float = option(1.0, help="weight of router value alignment", low=0, high=1e4)
    order: float = option(0.1, help="weight of expert order alignment", low=0, high=1e4)
    boundary: float = option(0.3, help="weight of top-k boundary alignment", low=0, high=1e4)

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        found = [m for m in layer.moe if m.node.target is VQ_EXPERTS]
        if not found:
            return False
        tuned = Tuned.of(layer.program, found)
        block = Block(layer, self)
        before, after = self.train(block, tuned, ctx.seed_for("vsraq", layer.index), ctx)
        for moe in found:
            for projection in ("gate_up", "down"):
                ctx.record(f"{moe.path}.{projection}", tuned={"before": before, "after": after})
        return tuned.store(layer.program)

    def train(self, block: Block, tuned: Tuned, seed: int, ctx: Context) -> tuple[dict[str, float], dict[str, float]]:
        """Steps 2 and 3; the held-out losses before and after."""
        generator = torch.Generator().manual_seed(seed)
        rows = len(block.inputs)
        held_out = list(range(7, rows, 8)) or list(range(rows - 1, rows))
        train = [i for i in range(rows) if i not in held_out] or held_out
        optimizer = torch.optim.Adam(tuned.groups(self.lr), betas=(0.9, 0.95))
        rates = [g["lr"] for g in optimizer.param_groups]
        before = block.losses(held_out, tuned.stored())
        block.start = {k: max(v, 1e-12) for k, v in before.items()}
        best, best_loss, best_terms = tuned.state(), self.total(before, block.start), before
        for step in ctx.progress(range(self.steps), f"vsraq layer {block.layer.index}"):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / self.steps)
            picked = torch.randint(len(train), (min(self.batches, len(train)),), generator=generator)
            with torch.enable_grad():
                terms = block.terms([train[i] for i in picked.tolist()], tuned.rounded())
                loss = sum(self.weights()[k] * v / block.start[k] for k, v in terms.items() if k != "flips")
                loss.backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % max(self.steps // 4, 1) == 0 or step + 1 == self.steps:
                terms_now = block.losses(held_out, tuned.stored())
                if (now := self.total(terms_now, block.start)) < best_loss:
                    best, best_loss, best_terms = tuned.state(), now, terms_now
        tuned.restore(best)
        return before, best_terms

    def weights(self) -> dict[str, float]:
        return {
            "reconstruction": self.reconstruction,
            "value": self.value,
            "order": self.order,
            "boundary": self.boundary,
        }

    def total(self, terms: dict[str, float], start: dict[str, float]) -> float:
        return sum(self.weights()[k] * v / start[k] for k, v in terms.items() if k != "flips")


class Tuned:
    """The continuous tensors of a layer's experts as trainable values; relative ones are trained in units of their own size."""

    def __init__(self, names: dict[str, str], kinds: dict[str, str], values: dict[str, Tensor], bits: dict[str, int]):
        self.names, self.kinds, self.bits = names, kinds, bits  # placeholder -> weight name, kind, bits
        self.unit = {k: _unit(kinds[k], v) for k, v in values.items()}
        self.parameters = {k: (v / self.unit[k]).requires_grad_() for k, v in values.items()}

    @classmethod
    def of(cls, program: Program, found: list[MoE]) -> Tuned:
        names, kinds, values, bits = {}, {}, {}, {}
        for moe in found:
            for projection in ("gate_up", "down"):
                for kind in _TUNED:
                    node = moe.operand(f"{projection}_{kind}")
                    if node is None:
                        continue
                    name = program.weights[node.name].name
                    names[node.name], kinds[node.name] = name, kind
                    values[node.name] = program.read(name).float().clone()
                    signs = moe.operand(f"{projection}_signs")
                    bits[node.name] = 3 if signs is not None else 2
        return cls(names, kinds, values, bits)

    def groups(self, factor: float) -> list[dict[str, Any]]:
        rates = {"codebook": 0.15, "scale": 2e-3, "bias": 2e-2, "basis": 5e-3, "coef_scale": 2e-3}
        return [{"params": [p], "lr": rates[self.kinds[k]] * factor} for k, p in self.parameters.items()]

    def rounded(self) -> dict[str, Tensor]:
        """Differentiable values; codebooks rounded to the format's whole numbers with a straight-through gradient."""
        found = {}
        for k, p in self.parameters.items():
            value = p * self.unit[k]
            found[k] = (
                value + (clamp_codebook(value, self.bits[k]) - value).detach() if self.kinds[k] == "codebook" else value
            )
        return found

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """The tensors exactly as `store` writes them."""
        found = {}
        for k, p in self.parameters.items():
            value = p * self.unit[k]
            codebook = self.kinds[k] == "codebook"
            found[k] = clamp_codebook(value, self.bits[k]).to(torch.int8) if codebook else compact(value)
        return found

    def state(self) -> dict[str, Tensor]:
        return {k: p.detach().clone() for k, p in self.parameters.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        for k, p in self.parameters.items():
            p.copy_(state[k])

    def store(self, program: Program) -> bool:
        """Write what differs from the stored tensors; whether anything did."""
        changed = False
        for placeholder, value in self.stored().items():
            held = program.read(self.names[placeholder])
            if held.dtype != value.dtype or not torch.equal(held, value):
                program.add(self.names[placeholder], value)
                changed = True
        return changed


def _unit(kind: str, value: Tensor) -> Tensor:
    """Scales move relative to themselves, shared or signed tensors relative to their size, codebooks in steps of one."""
    if kind in ("scale", "coef_scale"):
        return value.abs().clamp(min=1e-8)
    return value.new_ones(()) if kind == "codebook" else value.abs().mean().clamp(min=1e-8)


class Block:
    """One layer's block of the program and the way on to the next router, with the float model's values as targets."""

    def __init__(self, layer: Layer, options: AlignRouting):
        self.layer, self.options = layer, options
        program = layer.program
        self.inputs = layer.inputs.values
        self.targets = layer.targets.values
        self.start: dict[str, float] = {}
        body = stage_nodes(program, layer.index)
        changed = _descendants(body, [m.node for m in layer.moe])
        live = layer.inputs.needed_after(layer.index)
        self.outputs = [n.name for n in body if n in changed and n.name in live and n.meta["val"].is_floating_point()]
        self.body = needed_for(body, set(self.outputs))
        self.router = next_router(program, layer.index) if options.value or options.order or options.boundary else None
        self.onward = _path_to(program, layer.index, self.router[1]) if self.router else []
        self.weights = StageWeights(program)
        self.spread = {n: torch.stack([v[n].float().var() for v in self.targets]).mean() for n in self.outputs}
        self.scores = self._teacher_scores()

    @torch.no_grad()
    def _teacher_scores(self) -> list[Tensor]:
        if self.router is None:
            return []
        reference = self.layer.reference
        nodes = {n.name: n for n in reference.graph.nodes}
        onward = [nodes[n.name] for n in self.onward]
        weights = StageWeights(reference)
        return [self._scores(onward, dict(values), weights) for values in self.targets]

    def _scores(self, onward: list[fx.Node], values: dict[str, Any], weights: StageWeights) -> Tensor:
        assert self.router is not None
        for _ in run_nodes(onward, values, weights):
            pass
        scores: Tensor = values[self.router[1].name]
        return scores.flatten(0, -2).float()

    def terms(self, rows: list[int], overrides: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every term of the objective, averaged over calibration rows."""
        sums: dict[str, Tensor] = {}
        for row in rows:
            for name, value in self._row(row, overrides).items():
                sums[name] = sums.get(name, torch.zeros(())) + value / len(rows)
        return sums

    def _row(self, row: int, overrides: dict[str, Tensor]) -> dict[str, Tensor]:
        values = dict(self.inputs[row])
        weights = StageWeights.sharing(self.weights, overrides)
        for _ in run_nodes(self.body, values, weights):
            pass
        errors = [
            (values[n].float() - self.targets[row][n].float()).square().mean() / self.spread[n] for n in self.outputs
        ]
        found = {"reconstruction": torch.stack(errors).sum()}
        if self.router is None:
            return found
        k = self.router[0].top_k
        s, t = standardized(self._scores(self.onward, values, weights), self.scores[row])
        for name, loss in _ROUTING.items():
            if getattr(self.options, name):
                found[name] = loss(s, t, k)
        found["flips"] = flips(s.detach(), t, k)
        return found

    @torch.no_grad()
    def losses(self, rows: list[int], stored: dict[str, Tensor]) -> dict[str, float]:
        """The terms as plain numbers, on tensors as they would be stored."""
        return {k: float(v) for k, v in self.terms(rows, stored).items()}


_ROUTING: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "value": value_loss,
    "order": order_loss,
    "boundary": boundary_loss,
}


def next_router(program: Program, stage: int) -> tuple[MoE, fx.Node] | None:
    """The first router after `stage`, and the node whose values its top-k compares (its logits where that is a softmax)."""
    for moe in program.moe_layers():
        if moe.layer > stage and moe.logits is not None:
            return moe, selection_scores(moe)
    return None


def selection_scores(moe: MoE) -> fx.Node:
    """What the last top-k before the experts looks at; a softmax keeps the order of its logits, which are easier to train on."""
    assert moe.logits is not None and isinstance(moe.node.args[1], fx.Node)
    between = ancestors([moe.node.args[1]]) - ancestors([moe.logits])
    topk = [n for n in moe.node.graph.nodes if n in between and "topk" in str(n.target)]
    if not topk:
        return moe.logits
    scores = topk[-1].args[0]
    assert isinstance(scores, fx.Node)
    return moe.logits if scores is moe.logits or _only_softmax(scores, moe.logits) else scores


def _only_softmax(node: fx.Node, logits: fx.Node) -> bool:
    steps = [str(n.target) for n in ancestors([node]) - ancestors([logits])]
    return all(any(word in s for word in ("softmax", "to.dtype", "_to_copy", "view", "reshape")) for s in steps)


def _path_to(program: Program, stage: int, target: fx.Node) -> list[fx.Node]:
    later = [n for n in program.graph.nodes if n.op == "call_function" and n.meta["layer"] > stage]
    return needed_for(later, {target.name})


def _descendants(nodes: list[fx.Node], roots: list[fx.Node]) -> set[fx.Node]:
    found = set(roots)
    for node in nodes:
        if any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found

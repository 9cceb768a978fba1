"""One MoE layer in the graph: its experts node, the node's operands, and the router before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from moecc.ir import ops
from moecc.ir.gates import rows_per_unit
from moecc.ir.graph import ancestors
from moecc.ir.text import target_text
from moecc.types import Json


@dataclass(eq=False)
class MoE:
    """One experts node and its surroundings.

    path: of the experts module. layer: the stage of the node. logits: the router's last linear;
    None if the trace shows none.
    """

    node: fx.Node
    path: str
    layer: int
    logits: fx.Node | None

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return int(self.node.args[1].meta["val"].shape[1])  # type: ignore[union-attr]

    @property
    def attributes(self) -> Json:
        """The op's attributes: act, gate, alpha, limit and eps."""
        return dict(self.node.kwargs)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """E experts, N rows of gate_up, D hidden, F intermediate."""
        first = self.operand("gate_up_scale" if self.node.target is ops.VQ_EXPERTS else "gate_up")
        experts, rows = (int(n) for n in first.meta["val"].shape[:2])  # type: ignore[union-attr]
        hidden = int(self.node.args[0].meta["val"].shape[1])  # type: ignore[union-attr]
        gate = str(self.node.kwargs["gate"])
        return experts, rows, hidden, rows // rows_per_unit(gate)

    @property
    def gate_up(self) -> Projection:
        """The projection from the residual stream to gate and up rows."""
        return Projection(self, "gate_up")

    @property
    def down(self) -> Projection:
        """The projection from hidden units back to the residual stream."""
        return Projection(self, "down")

    @property
    def projections(self) -> tuple[Projection, Projection]:
        """Both projections, in the order of computation."""
        return self.gate_up, self.down

    @property
    def weights(self) -> int:
        """Number of weights of the dense experts, E N D + E D F, however they are stored."""
        return sum(p.weights for p in self.projections)

    def operand(self, name: str) -> fx.Node | None:
        """Return the operand that the op's schema calls `name`; None if it is absent."""
        return operand(self.node, name)

    def set_operands(self, values: Mapping[str, fx.Node | None]) -> None:
        """Replace operands by name; None removes one."""
        names, args = operand_names(self.node), list(self.node.args)
        for name, value in values.items():
            args[names.index(name)] = value
        self.node.args = tuple(args)


@dataclass(frozen=True)
class Projection:
    """One of a layer's two projections, a matrix per expert: `gate_up` [E, N, D], `down` [E, D, F].

    The op's schema names an operand after its projection: the dense matrix is `gate_up`, its parts
    are `gate_up_bias`, `gate_up_codes` and so on. Methods take the name of the part; "" is the
    matrix.
    """

    moe: MoE
    name: str

    @property
    def path(self) -> str:
        """Its name in the audit, and the prefix of its stored tensors' names."""
        return f"{self.moe.path}.{self.name}"

    @property
    def input_side(self) -> bool:
        """Whether it reads the residual stream (gate_up); down writes it.

        A shared basis is on the side of the residual stream.
        """
        return self.name == "gate_up"

    @property
    def shape(self) -> tuple[int, int, int]:
        """E experts, N rows, K columns."""
        experts, rows, hidden, intermediate = self.moe.sizes
        return (experts, rows, hidden) if self.input_side else (experts, hidden, intermediate)

    @property
    def weights(self) -> int:
        """Number of weights, E N K."""
        return math.prod(self.shape)

    def operand_name(self, part: str = "") -> str:
        """Return the name of a part in the op's schema."""
        return f"{self.name}_{part}" if part else self.name

    def operand(self, part: str = "") -> fx.Node | None:
        """Return a part's placeholder; None if it is absent or the op has no such operand."""
        name = self.operand_name(part)
        return self.moe.operand(name) if name in operand_names(self.moe.node) else None

    def set_operands(self, values: Mapping[str, fx.Node | None]) -> None:
        """Replace parts by name; None removes one."""
        self.moe.set_operands({self.operand_name(part): value for part, value in values.items()})

    def bits(self, part: str = "") -> int:
        """Return the bits per weight of codes and signs, of the mean's if `part` is vq4.MEAN."""
        codebook = self.operand(part + "codebook")
        assert codebook is not None
        if self.operand(part + "signs") is not None:
            return 3
        return 4 if codebook.meta["val"].shape[-1] == 2 else 2


def operand_names(node: fx.Node) -> list[str]:
    """Return the names of a dialect call's tensors, in order."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return [a.name for a in node.target._schema.arguments if not a.kwarg_only]


def operand(node: fx.Node, name: str) -> fx.Node | None:
    """Return the operand called `name` of a dialect call; None if it is absent."""
    position = operand_names(node).index(name)
    value = node.args[position] if position < len(node.args) else None
    return value if isinstance(value, fx.Node) else None


def router_logits(experts: fx.Node) -> fx.Node | None:
    """Return the router's last linear; None if there is none.

    Walk back from the chosen indices to the nearest linear that the experts' input does not need.
    If scores multiply the experts' input (llama4), the input needs that linear too; then take the
    nearest linear that has a row per expert.
    """
    chosen = experts.args[1]
    if not isinstance(chosen, fx.Node):
        return None
    found = _nearest_linear(chosen, ancestors([experts.args[0]]))  # type: ignore[list-item]
    if found is None:
        found = _nearest_linear(chosen, set())
        count = experts.args[3].meta["val"].shape[0]  # type: ignore[union-attr]
        found = found if found is not None and found.meta["val"].shape[-1] == count else None
    return found


def _nearest_linear(start: fx.Node, avoid: set[fx.Node]) -> fx.Node | None:
    frontier, seen = [start], set()
    while frontier:
        node = max(frontier)  # the last in graph order
        frontier.remove(node)
        if node in seen:
            continue
        seen.add(node)
        if node.op == "call_function" and node not in avoid and _is_linear(node):
            return node
        frontier += [i for i in node.all_input_nodes if i.op == "call_function" and i not in avoid]
    return None


def _is_linear(node: fx.Node) -> bool:
    name = target_text(node.target)
    return "linear" in name or name in {"aten.mm", "aten.addmm", "aten.matmul"}

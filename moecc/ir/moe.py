"""One MoE layer in the graph: its experts node, that node's operands, and the router in front of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from moecc.errors import MoeccError
from moecc.ir import ops, vq4
from moecc.ir.gates import rows_per_unit
from moecc.ir.graph import SHORT, ancestors, target_text, type_text


@dataclass(eq=False)
class MoE:
    """One experts node and the names around it.

    path: of the experts module; layer: the stage that the node is in; logits: the router's last linear, None if the trace shows none.
    """

    node: fx.Node
    path: str
    layer: int
    logits: fx.Node | None

    @property
    def top_k(self) -> int:
        """Experts that a token takes."""
        return int(self.node.args[1].meta["val"].shape[1])  # type: ignore[union-attr]

    @property
    def attributes(self) -> dict[str, Any]:
        """act, gate, alpha, limit and eps, as the op takes them."""
        return dict(self.node.kwargs)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """E experts, N rows of gate_up, D hidden, F intermediate."""
        first = self.operand("gate_up_scale" if self.node.target is ops.VQ_EXPERTS else "gate_up")
        experts, rows = (int(n) for n in first.meta["val"].shape[:2])  # type: ignore[union-attr]
        hidden = int(self.node.args[0].meta["val"].shape[1])  # type: ignore[union-attr]
        return experts, rows, hidden, rows // rows_per_unit(self.node.kwargs["gate"])  # type: ignore[arg-type]

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
        """Both, in the order in which a token meets them."""
        return self.gate_up, self.down

    @property
    def weights(self) -> int:
        """Weights of the dense experts, E N D + E D F, whatever they are stored as."""
        return sum(p.weights for p in self.projections)

    def operand(self, name: str) -> fx.Node | None:
        """The operand called `name` in the op's schema, None if it is absent."""
        return operand(self.node, name)

    def set_operands(self, values: Mapping[str, fx.Node | None]) -> None:
        """Give operands by name other placeholders, or take them out (None)."""
        names, args = operand_names(self.node), list(self.node.args)
        for name, value in values.items():
            args[names.index(name)] = value
        self.node.args = tuple(args)


@dataclass(frozen=True)
class Projection:
    """One of the two matrices that each expert of a layer has: `gate_up` [E, N, D] or `down` [E, D, F].

    An operand that belongs to a projection is named after it in the op's schema: the dense matrix `gate_up`, its parts
    `gate_up_bias`, `gate_up_codes`. Methods take the part's name alone, "" for the dense matrix.
    """

    moe: MoE
    name: str

    @property
    def path(self) -> str:
        """Its name in the audit, and what the names of its stored tensors begin with."""
        return f"{self.moe.path}.{self.name}"

    @property
    def input_side(self) -> bool:
        """Whether it reads the residual stream, so that a shared basis is on its input's side; down writes to it."""
        return self.name == "gate_up"

    @property
    def shape(self) -> tuple[int, int, int]:
        """E experts, N rows, K columns."""
        experts, rows, hidden, intermediate = self.moe.sizes
        return (experts, rows, hidden) if self.input_side else (experts, hidden, intermediate)

    @property
    def weights(self) -> int:
        """E N K."""
        return math.prod(self.shape)

    def operand_name(self, part: str = "") -> str:
        """The name of a part in the op's schema."""
        return f"{self.name}_{part}" if part else self.name

    def operand(self, part: str = "") -> fx.Node | None:
        """The placeholder of a part, None if it is absent or the node's op has no such operand."""
        name = self.operand_name(part)
        return self.moe.operand(name) if name in operand_names(self.moe.node) else None

    def set_operands(self, values: Mapping[str, fx.Node | None]) -> None:
        """Give parts other placeholders, or take them out (None)."""
        self.moe.set_operands({self.operand_name(part): value for part, value in values.items()})

    def bits(self, part: str = "") -> int:
        """Bits per weight of codes and signs; `part` vq4.MEAN: of those of the mean."""
        codebook = self.operand(part + "codebook")
        assert codebook is not None
        if self.operand(part + "signs") is not None:
            return 3
        return 4 if codebook.meta["val"].shape[-1] == 2 else 2


def operand_names(node: fx.Node) -> list[str]:
    """The names of a dialect call's tensors, in order."""
    return [a.name for a in node.target._schema.arguments if not a.kwarg_only]  # type: ignore[union-attr]


def operand(node: fx.Node, name: str) -> fx.Node | None:
    """The operand called `name` of a dialect call, None if it is absent."""
    position = operand_names(node).index(name)
    value = node.args[position] if position < len(node.args) else None
    return value if isinstance(value, fx.Node) else None


def check_operands(node: fx.Node) -> None:
    """Shapes of an experts node's weights against each other; MoeccError names node, operand and shape."""
    if node.target is ops.Q_LINEAR:
        return
    val = {name: operand(node, name) for name in operand_names(node)}
    shape = {k: tuple(v.meta["val"].shape) for k, v in val.items() if isinstance(v, fx.Node)}
    experts, rows, hidden, intermediate = MoE(node, "", 0, None).sizes
    expected: dict[str, tuple[int, ...]] = {
        "gate_up": (experts, rows, hidden), "down": (experts, hidden, intermediate), "gate_up_bias": (experts, rows),
        "down_bias": (experts, hidden), "gate_up_scale": (experts, rows), "down_scale": (experts, hidden),
        "gate_up_slope": (experts, rows), "gate_up_offset": (experts, rows), "down_slope": (experts, hidden),
        "down_offset": (experts, hidden), "post_norm": (hidden,),
    }  # fmt: skip
    for projection, n, k, input_side in (
        ("gate_up", rows, hidden, True),
        ("down", hidden, intermediate, False),
    ):
        own = {t: shape[f"{projection}_{t}"] for t in vq4.TENSORS if f"{projection}_{t}" in shape}
        for whole in (vq4.SHARED[:3], [vq4.MEAN + t for t in vq4.CODED if t != "signs"]):
            missing = [t for t in whole if t not in own]
            if 0 < len(missing) < len(whole):
                present = next(t for t in whole if t in own)
                raise MoeccError(
                    f"node %{node.name} ({target_text(node.target)}): {projection}_{present} without {projection}_{missing[0]}"
                )
        expected.update(
            {
                f"{projection}_{t}": s
                for t, s in _stored_shapes(own, experts, n, k, hidden, input_side).items()
            }
        )
    for name, want in expected.items():
        if name in shape and shape[name] != want:
            raise MoeccError(
                f"node %{node.name} ({target_text(node.target)}): {name} is {shape[name]}, expected {want}"
            )
    for name, node_of in val.items() if node.target is ops.VQ_EXPERTS else ():
        kind = name.removeprefix("gate_up_").removeprefix("down_").removeprefix(vq4.MEAN)
        if (
            kind in vq4.DTYPES
            and isinstance(node_of, fx.Node)
            and node_of.meta["val"].dtype not in vq4.DTYPES[kind]
        ):
            want_type = " or ".join(SHORT[d] for d in vq4.DTYPES[kind])
            raise MoeccError(
                f"node %{node.name} ({target_text(node.target)}): {name} is {type_text(node_of.meta['val'])}, expected {want_type}"
            )


def _stored_shapes(
    own: dict[str, tuple[int, ...]],
    experts: int,
    rows: int,
    columns: int,
    hidden: int,
    input_side: bool,
) -> dict[str, tuple[int, ...]]:
    """What codes, signs, codebook, basis and coefficients of one projection must look like, given the others."""
    expected: dict[str, tuple[int, ...]] = {}
    if "codebook" in own:
        books, v = own["codebook"][0], own["codebook"][-1]
        expected["codebook"] = (
            books if books in (1, experts) else experts,
            vq4.CODEBOOK_SIZE,
            v if v in (2, 4) else 4,
        )
        expected["codes"] = (experts, rows, vq4.padded(columns) // expected["codebook"][2])
        expected["signs"] = (experts, rows, vq4.padded(columns) // 8)
    if "basis" in own:
        rank = own["basis"][0]
        expected["basis"] = (rank, hidden)
        expected["coef"] = (experts, rows, rank) if input_side else (experts, rank, columns)
        expected["coef_scale"] = expected["coef"][:2]
    mean = {t.removeprefix(vq4.MEAN): s for t, s in own.items() if t.startswith(vq4.MEAN)}
    if mean:
        expected[vq4.MEAN + "scale"] = (1, rows)
        for t, s in _stored_shapes(mean, 1, rows, columns, hidden, input_side).items():
            expected[vq4.MEAN + t] = s
    return expected


def router_logits(experts: fx.Node) -> fx.Node | None:
    """The router's last linear: walk back from the chosen indices to the nearest linear that the experts' input does not need.

    Where scores multiply the experts' input (llama4) it does need it; then the nearest linear with a row per expert.
    """
    found = _nearest_linear(experts.args[1], ancestors([experts.args[0]]))  # type: ignore[list-item]
    if found is None:
        found = _nearest_linear(experts.args[1], set())
        count = experts.args[3].meta["val"].shape[0]  # type: ignore[union-attr]
        found = found if found is not None and found.meta["val"].shape[-1] == count else None
    return found


def _nearest_linear(start: Any, avoid: set[fx.Node]) -> fx.Node | None:
    frontier, seen = [start], set()
    while frontier:
        node = max(frontier)
        frontier.remove(node)
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.op == "call_function" and node not in avoid:
            if "linear" in target_text(node.target) or target_text(node.target) in {
                "aten.mm",
                "aten.addmm",
                "aten.matmul",
            }:
                return node
        frontier += [i for i in node.all_input_nodes if i.op == "call_function" and i not in avoid]
    return None

"""What the layers of one model have in common, and the operands that their experts nodes take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from moecc.ir import vq4
from moecc.types import Json

ROUTED = ("x", "topk_index", "topk_weight")
DENSE = ("gate_up", "down", "gate_up_bias", "down_bias", "post_norm")


def coded_inputs() -> list[str]:
    """Return the names of VQExperts's inputs, in order."""
    return [*ROUTED, *(f"{p}_{t}" for p in ("gate_up", "down") for t in vq4.TENSORS), "post_norm"]


def dense_inputs() -> list[str]:
    """Return the names of Experts's inputs, in order."""
    return [*ROUTED, *DENSE]


class Presence(NamedTuple):
    """Whether some layers of the model have an operand, and whether all have it."""

    some: bool
    all: bool


@dataclass(frozen=True)
class Structure:
    """All that a function body depends on.

    ragged: some size is no multiple of 64, so inputs are padded and outputs are cut.
    """

    attributes: Json  # act, gate, alpha, limit, eps
    present: dict[str, Presence]  # operand -> which layers have it
    ragged: bool = True

    def has(self, name: str) -> bool:
        return name in self.present and self.present[name].some

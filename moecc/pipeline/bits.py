"""How many bits a program's routed experts take."""

from __future__ import annotations

import torch

from moecc.ir.moe import MoE
from moecc.ir.program import Program


def experts_bits(program: Program) -> float:
    """Bits per weight of the routed experts as they would be stored now, everything counted."""
    found = program.moe_layers()
    weights = sum(expert_weights(m) for m in found)
    return sum(stored_bits(program, m) for m in found) / weights if weights else 0.0


def stored_bits(program: Program, moe: MoE) -> int:
    """Bits stored for one layer's routed experts."""
    operands = [n for n in moe.node.args[3:] if isinstance(n, torch.fx.Node)]
    return sum(n.meta["val"].numel() * _stored_bits(program, n) for n in operands)


def _stored_bits(program: Program, node: torch.fx.Node) -> int:
    name = program.weights[node.name].name
    origin = program.origins(name)[0]
    if (
        program.store is not None and origin in program.store
    ):  # as the checkpoint has it, whatever the program computes in
        rewritten = origin in program.tensors and origin not in program.rounded
        return 8 * (program.dtype if rewritten else program.stored_dtype(origin)).itemsize
    bits = 8 * int(node.meta["val"].element_size())
    return (
        min(bits, 16) if name in program.tensors else bits
    )  # what is still dense would be stored in 16 bits


def expert_weights(moe: MoE) -> int:
    """Weights that a layer's routed experts had before anything was done to them: E N D + E D F."""
    experts, rows, hidden, intermediate = moe.sizes
    return experts * (rows * hidden + hidden * intermediate)

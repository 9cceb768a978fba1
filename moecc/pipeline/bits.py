"""Bits: the one place where they are counted, everything that is stored included.

coded_bits, basis_bits   what parts of the format take, from their sizes, before anything is stored
stored_bits              what one layer's routed experts of a program take as they are now
experts_bits             the same per weight, over all layers
everything_bits          the whole model per weight, as it lies on disk
"""

from __future__ import annotations

import math

from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from moecc.ir import vq4
from moecc.ir.moe import MoE
from moecc.ir.program import Program, Weight


def coded_bits(matrices: int, rows: int, columns: int, bits: int, *, books: int = 1) -> int:
    """Codes, signs, codebooks and scales of [matrices, rows, columns] at `bits` bits a weight."""
    entries = vq4.CODEBOOK_SIZE * vq4.group_size(bits)
    return matrices * rows * (bits * vq4.padded(columns) + 16) + 8 * entries * books


def basis_bits(rank: int, experts: int, rows: int, columns: int, *, input_side: bool) -> int:
    """A basis of `rank` rows with its coefficients and their scales. input_side: gate_up, else down."""
    if rank == 0:
        return 0
    hidden, other, scales = (columns, rows, rows) if input_side else (rows, columns, rank)
    return 16 * rank * hidden + 8 * experts * rank * other + 16 * experts * scales


def stored_bits(program: Program, moe: MoE) -> int:
    """The operands of one layer's routed experts, as they would be stored now."""
    operands = [n for n in moe.node.args[3:] if isinstance(n, fx.Node)]
    return sum(n.meta["val"].numel() * _element_bits(program, n) for n in operands)


def _element_bits(program: Program, node: fx.Node) -> int:
    name = program.weights[node.name].name
    origin = program.origins(name)[0]
    if program.store is not None and origin in program.store:
        # as the checkpoint has it, whatever the program computes in
        rewritten = origin in program.tensors and origin not in program.rounded
        return 8 * (program.dtype if rewritten else program.stored_dtype(origin)).itemsize
    bits = 8 * int(node.meta["val"].element_size())
    return min(bits, 16) if name in program.tensors else bits  # a dense remainder counts as 16 bits


def experts_bits(program: Program, reference: Program | None = None) -> float:
    """Bits per weight of the routed experts, 0 for a program without any; per weight of the reference's, if one is given."""
    stored = sum(stored_bits(program, m) for m in program.moe_layers())
    return per_weight(stored, sum(m.weights for m in (reference or program).moe_layers()))


def everything_bits(program: Program, reference: Program) -> float:
    """Bits that `program` stores per weight of `reference`: tied tensors once, unreached ones too."""
    gone = _live(reference) - _live(program)  # what a pass replaced; the checkpoint still has it
    stored = {n for n in _stored(program) if n not in gone} | _made(program)
    return per_weight(
        sum(_size(program, n) * _dtype_bits(program, n) for n in stored),
        sum(_size(reference, n) for n in _stored(reference)),
    )


def per_weight(bits: float, weights: float) -> float:
    """Their ratio, 0 without weights."""
    return bits / weights if weights else 0.0


def _live(program: Program) -> set[str]:
    return {origin for w in program.weights.values() for origin in _origins(program, w)}


def _origins(program: Program, weight: Weight) -> tuple[str, ...]:
    return (
        (weight.name,) if weight.name in program.tensors or not weight.sources else weight.sources
    )


def _stored(program: Program) -> set[str]:
    store = program.store
    return set() if store is None else {n for n in store.names() if n not in store.tied}


def _made(program: Program) -> set[str]:
    """Held tensors that a pass made, not constants that tracing captured and the code computes again."""
    specs = program.exported_from.graph_signature.input_specs
    captured = {
        s.target for s in specs if s.kind not in (InputKind.USER_INPUT, InputKind.PARAMETER)
    }
    return {n for n in program.tensors if n not in captured}


def _held(program: Program, name: str) -> Tensor | None:
    return program.tensors[name] if name in program.tensors else None


def _size(program: Program, name: str) -> int:
    held = _held(program, name)
    if held is not None:
        return held.numel()
    assert program.store is not None
    return math.prod(program.store.shape(name))


def _dtype_bits(program: Program, name: str) -> int:
    held = _held(program, name)
    if held is not None:
        return 8 * held.dtype.itemsize
    assert program.store is not None
    return 8 * program.store.dtype(name).itemsize

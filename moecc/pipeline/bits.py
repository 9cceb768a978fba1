"""Count bits, in one place; everything that is stored counts.

coded_bits, basis_bits   parts of the format, from their sizes, before anything is stored
stored_bits              the routed experts of one layer, as they are now
experts_bits             bits per weight of the routed experts, over all layers
everything_bits          bits per weight of the whole model, as it is on disk
"""

from __future__ import annotations

import math

from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from moecc.ir import vq4
from moecc.ir.moe import MoE
from moecc.ir.program import Program, Weight


def coded_bits(matrices: int, rows: int, columns: int, bits: int, *, books: int = 1) -> int:
    """Return the bits of codes, signs, codebooks and scales of [matrices, rows, columns].

    bits: per weight, 2, 3 or 4. books: the number of codebooks.
    """
    entries = vq4.CODEBOOK_SIZE * vq4.group_size(bits)
    return matrices * rows * (bits * vq4.padded(columns) + 16) + 8 * entries * books


def basis_bits(rank: int, experts: int, rows: int, columns: int, *, input_side: bool) -> int:
    """Return the bits of a basis of `rank` rows, its coefficients and their scales.

    input_side: gate_up, else down.
    """
    if rank == 0:
        return 0
    hidden, other, scales = (columns, rows, rows) if input_side else (rows, columns, rank)
    return 16 * rank * hidden + 8 * experts * rank * other + 16 * experts * scales


def stored_bits(program: Program, moe: MoE) -> int:
    """Return the bits of one layer's routed experts, if they were stored as they are now."""
    operands = [n for n in moe.node.args[3:] if isinstance(n, fx.Node)]
    return sum(n.meta["val"].numel() * _element_bits(program, n) for n in operands)


def _element_bits(program: Program, node: fx.Node) -> int:
    name = program.weights[node.name].name
    origin = program.origins(name)[0]
    if program.store is not None and origin in program.store:
        # the checkpoint's type, which may differ from the type that the program computes in
        rewritten = origin in program.tensors and origin not in program.rounded
        return 8 * (program.dtype if rewritten else program.stored_dtype(origin)).itemsize
    bits = 8 * int(node.meta["val"].element_size())
    # a dense remainder counts as 16 bits
    return min(bits, 16) if name in program.tensors else bits


def experts_bits(program: Program, reference: Program | None = None) -> float:
    """Return the bits of the routed experts per weight of the `reference`'s.

    The reference defaults to `program`. Return 0 if it has no experts.
    """
    stored = sum(stored_bits(program, m) for m in program.moe_layers())
    return per_weight(stored, sum(m.weights for m in (reference or program).moe_layers()))


def everything_bits(program: Program, reference: Program, weights: int | None = None) -> float:
    """Return the bits that `program` stores per weight of `reference`.

    A tied tensor counts once; parameters that no traced path reads count too. weights: of the
    reference, by default those that it stores; a compressed one stores codes.
    """
    # the checkpoint still has the parameters that a pass replaced
    gone = _live(reference) - _live(program)
    stored = {n for n in _stored(program) if n not in gone} | _made(program)
    return per_weight(
        sum(_size(program, n) * _dtype_bits(program, n) for n in stored),
        weights or sum(_size(reference, n) for n in _stored(reference)),
    )


def per_weight(bits: float, weights: float) -> float:
    """Return bits / weights; 0 if there are no weights."""
    return bits / weights if weights else 0.0


def _live(program: Program) -> set[str]:
    """Return the names of the tensors that the program reads."""
    return {origin for w in program.weights.values() for origin in _origins(program, w)}


def _origins(program: Program, weight: Weight) -> tuple[str, ...]:
    plain = weight.name in program.tensors or not weight.sources
    return (weight.name,) if plain else weight.sources


def _stored(program: Program) -> set[str]:
    store = program.store
    return set() if store is None else {n for n in store.names() if n not in store.tied}


def _made(program: Program) -> set[str]:
    """Return the held tensors that a pass made.

    A constant that tracing captured is not stored: the model's code computes it again.
    """
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

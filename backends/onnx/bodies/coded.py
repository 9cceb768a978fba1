"""One stack of coded matrices in ONNX operators: a matrix by its number, times some rows.

M is the number of vectors that can stand for the v weights of a group: 256, one for each code, or
at 3 bit 4096, for there each code comes with four signs. There are J = Kp / v groups in a column of
Kp and Np rows, which are K and N rounded up to 64. Codes and signs are in the order of `layout`.
"""

from __future__ import annotations

from onnx_ir import Value

from moecc.backends.onnx.bodies.structure import Structure
from moecc.backends.onnx.graph import FLOAT, INT32, UINT8, Ops

# Up to this many tokens of one expert, lookups cost less than decoding; with signs, tables are 16
# times as long.
FEW_TOKENS, FEW_WITH_SIGNS = 4, 2
STRIPES = 8  # parts of a matrix to decode: a runtime shares rows out among its threads


class Stack:
    """The coded matrices of gate_up, of down, or of one of their means; [N, K] each."""

    def __init__(self, structure: Structure, inputs: dict[str, Value], name: str):
        self.ragged = structure.ragged
        self.codes, self.codebook, self.scale = (
            inputs[f"{name}_{t}"] for t in ("codes", "codebook", "scale")
        )
        self.signs = inputs[f"{name}_signs"] if structure.has(f"{name}_signs") else None
        self.present = {t: structure.present.get(f"{name}_{t}") for t in ("codes", "signs")}

    @property
    def in_all_layers(self) -> bool:
        codes = self.present["codes"]
        return codes is not None and codes.all

    def looked_up(self, op: Ops, x: Value, which: Value) -> Value:
        """Return each row of x [P, K] through a matrix of its own, number which[p]: [P, N]."""
        parts = self.groups(op, x)

        def route(op: Ops, p: Value) -> Value:
            expert = op.Gather(which, p)
            own = op.Gather(parts, p)
            return pick(op, own, self.entries(op, expert), self.picked(op, expert))

        y = op.each(op.Squeeze(op.size(x, 0)), route)
        y = self.cut(op, y, op.size(self.scale, 1))
        return op.Mul(y, op.Gather(self.scale, which))

    def times(self, op: Ops, x: Value, which: Value) -> Value:
        """Return x [n, K] through the matrix of number `which`, without its scales: [n, N]."""
        picked = self.picked(op, which)
        entries = self.entries(op, which)
        parts = self.groups(op, x)
        tokens = op.size(x, 0)
        v, groups, rows = op.size(entries, 0), op.size(picked, 0), op.size(picked, 1)

        def look_up(op: Ops) -> Value:
            def token(op: Ops, t: Value) -> Value:
                return pick(op, op.Gather(parts, t), entries, picked)

            return op.each(op.Squeeze(tokens), token)

        def decode(op: Ops) -> Value:
            # Component c of all groups is a matrix of its own, [J, Np]; x is taken apart alike.
            index = op.shaped(picked, STRIPES, op.Div(op.Mul(groups, rows), op.ints(STRIPES)))
            columns = op.Transpose(parts, perm=[2, 0, 1])

            def component(op: Ops, c: Value) -> Value:
                own = op.Gather(entries, c)
                own = op.Expand(own, op.Concat(op.ints(STRIPES), op.size(entries, 1), axis=0))
                weight = op.shaped(op.GatherElements(own, index, axis=1), groups, rows)
                return op.MatMul(op.Gather(columns, c), weight)

            return op.ReduceSum(op.each(op.Squeeze(v), component), op.ints(0), keepdims=0)

        few = op.number(FEW_TOKENS if self.signs is None else FEW_WITH_SIGNS)
        y = op.choose(op.LessOrEqual(op.Squeeze(tokens), few), look_up, decode)
        return self.cut(op, y, op.size(self.scale, 1))

    def groups(self, op: Ops, x: Value) -> Value:
        """Return x [n, K], padded, by groups: [n, J, v]."""
        v = op.size(self.codebook, 2)
        groups = op.Mul(op.size(self.codes, 1), op.size(self.codes, 3))
        return op.shaped(self.padded(op, x, op.Mul(groups, v)), op.size(x, 0), groups, v)

    def entries(self, op: Ops, which: Value) -> Value:
        """Return the vectors that can stand for a group in one matrix: [v, M]."""
        # Each expert has a codebook of its own, or one serves all.
        last = op.Sub(op.Squeeze(op.size(self.codebook, 0)), op.number(1))
        book = op.Gather(self.codebook, op.Min(which, last))
        entries = op.transposed(op.Cast(book, to=FLOAT))
        if self.signs is None:
            return entries
        v = op.size(self.codebook, 2)
        patterns = [float(pattern >> i & 1) for i in range(4) for pattern in range(16)]
        every = op.shaped(op.Constant(value_floats=patterns), 4, 16, 1)
        bits = op.Slice(every, op.ints(0), v, op.ints(0))
        plain = op.Sub(op.number(1.0), op.Add(bits, bits))
        # A weight p whose sign is set stands for -1 - p.
        signed = op.Sub(op.Mul(op.Unsqueeze(entries, op.ints(1)), plain), bits)
        return op.shaped(signed, v, 4096)

    def picked(self, op: Ops, which: Value) -> Value:
        """Return which of the vectors each group of one matrix has: i32 [J, Np], below M."""
        codes = op.Gather(self.codes, which)  # [Kp / 64, Np / 64, S, 64]
        picked = op.Cast(by_group(op, codes), to=INT32)
        if self.signs is None:
            return picked
        signs = op.Cast(by_group(op, self.unpacked(op, self.signs, which, codes)), to=INT32)
        return op.Add(picked, op.Mul(signs, op.Cast(op.number(256), to=INT32)))

    def unpacked(self, op: Ops, packed: Value, which: Value, codes: Value) -> Value:
        """Return the four signs of each code of one matrix: u8 [Kp / 64, Np / 64, S, 64]."""
        own = op.Gather(packed, which)  # [Kp / 64, Np / 64, 16, 32]
        low = op.BitwiseAnd(own, op.Cast(op.number(15), to=UINT8))
        high = op.BitShift(own, op.Cast(op.number(4), to=UINT8), direction="RIGHT")
        signs = op.Concat(low, high, axis=-1)  # rows 0..31, then 32..63
        present = self.present["signs"]
        assert present is not None
        if present.all:
            return signs
        # A layer without signs has them for no row, and its groups may be pairs.
        rows = op.Sub(op.size(codes, 1), op.size(signs, 1))
        groups = op.Sub(op.size(codes, 2), op.size(signs, 2))
        return op.Pad(signs, op.Concat(op.ints(0, 0, 0, 0, 0), rows, groups, op.ints(0), axis=0))

    def padded(self, op: Ops, x: Value, columns: Value) -> Value:
        """Return x [n, K] with zero columns up to `columns` [1]."""
        if not self.ragged:
            return x
        return op.Pad(x, op.Concat(op.ints(0, 0, 0), op.Sub(columns, op.size(x, 1)), axis=0))

    def cut(self, op: Ops, y: Value, rows: Value) -> Value:
        """Return the first `rows` [1] columns of y [n, Np]."""
        return op.Slice(y, op.ints(0), rows, op.ints(1)) if self.ragged else y


def pick(op: Ops, parts: Value, entries: Value, picked: Value) -> Value:
    """Return one input [J, v] through a matrix: [Np].

    A table holds the product of every group with every vector; the matrix picks from it.
    """
    # The sum over groups is a product with ones: ReduceSum takes 15 times as long.
    ones = op.Expand(op.number(1.0), op.Concat(op.ints(1), op.size(picked, 0), axis=0))
    products = op.GatherElements(op.MatMul(parts, entries), picked, axis=1)
    return op.Squeeze(op.MatMul(ones, products), op.ints(0))


def by_group(op: Ops, blocks: Value) -> Value:
    """Reorder [Kp / 64, Np / 64, S, 64] to [J, Np]."""
    groups = op.Mul(op.size(blocks, 0), op.size(blocks, 2))
    rows = op.Mul(op.size(blocks, 1), op.size(blocks, 3))
    # Both sizes are given: Reshape cannot infer one where a mean is empty.
    return op.shaped(op.Transpose(blocks, perm=[0, 2, 1, 3]), groups, rows)

"""Between the codes of a matrix and its values: decode it, and pull a gradient of it back.

Shapes: N rows and K columns of one expert's matrix, v columns of a code (`moecc.ir.vq4`).
  W = scale * value(code, signs)
  decode                W [N, K]
  pull, of G = dL/dW    dL/dbook [256, v], the sum of scale * G over the places of each code, and
                        dL/dscale [N], the sum of G * value over a row

Compiled loops do both (`_code/native/lookup.h`); without them, or in float64, PyTorch does. Sums
are over the same parts for any number of threads.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from moecc.ir import vq4
from moecc.passes._code import native
from moecc.passes._code.sums import sums_by_code

_OF_A_THREAD = 1 << 19  # weights; for fewer, another thread isn't worth its start
_SUMMED_ROWS = 256  # whose gradients of a codebook are one sum


@dataclass(frozen=True)
class CodedMatrix:
    """One expert's matrix as it is coded. book and scale have the type to compute in."""

    codes: Tensor  # u8 [N, Kp/v]
    signs: Tensor | None  # u8 [N, Kp/8]
    book: Tensor  # [256, v]
    scale: Tensor  # [N]

    def decode(self, out: Tensor) -> Tensor:
        """Write W to `out` [N, K] and return it."""
        if not native.serves(out):
            return torch.mul(self._values(out.shape[1]), self.scale.unsqueeze(-1), out=out)
        loops = native.loops()

        def part(rows: slice) -> None:
            loops.decode(ctypes.byref(self._rows(out, rows)))

        native.threaded(part, len(out), least=-(-_OF_A_THREAD // out.shape[1]))
        return out

    def pull(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of book and scale from that of W [N, K]."""
        if not native.serves(grad):
            return self._pull(grad)
        loops, rows = native.loops(), len(grad)
        starts = range(0, rows, _SUMMED_ROWS)
        books = self.book.new_empty(len(starts), *self.book.shape)
        scale = self.scale.new_empty(rows)

        def part(numbers: slice) -> None:
            for i in range(numbers.start, numbers.stop):
                some = slice(starts[i], min(starts[i] + _SUMMED_ROWS, rows))
                ends = {"book_grad": native.at(books[i]), "scale_grad": native.at(scale[some])}
                loops.pull(ctypes.byref(self._rows(grad, some, **ends)))

        least = -(-_OF_A_THREAD // (_SUMMED_ROWS * grad.shape[1]))
        native.threaded(part, len(starts), least)
        return books.sum(0), scale

    def _rows(self, dense: Tensor, part: slice, **ends: int) -> native.Rows:
        """The struct of some rows. dense: W or its gradient. ends: where gradients go."""
        return native.Rows(
            part.stop - part.start,
            dense.shape[1],
            self.book.shape[1],
            *native.strided(self.codes[part]),
            *native.strided(None if self.signs is None else self.signs[part]),
            *(native.at(t) for t in (self.book, self.scale[part], dense[part])),
            **ends,
        )

    def _values(self, columns: int) -> Tensor:
        one = (None if t is None else t.unsqueeze(0) for t in (self.codes, self.signs, self.book))
        codes, signs, book = one
        assert codes is not None and book is not None
        return vq4.decode(codes, signs, book, columns, book.dtype)[0]

    def _pull(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        columns, v = grad.shape[1], self.book.shape[1]
        scale = torch.linalg.vecdot(grad, self._values(columns))
        moved = grad * self.scale.unsqueeze(-1)
        if self.signs is not None:
            moved = torch.where(vq4.unpack_signs(self.signs)[:, :columns], -moved, moved)
        # padding belongs to no column
        stored = self.codes.shape[1] * v
        if columns < stored:
            moved = torch.nn.functional.pad(moved, (0, stored - columns))
        codes = self.codes.flatten().long()
        if grad.device.type != "cpu":
            return sums_by_code(codes.unsqueeze(0), 1)(moved.reshape(1, -1, v))[0], scale
        # of PyTorch's ways to add rows by number, the quickest
        code = codes.unsqueeze(-1).expand(-1, v)
        return torch.zeros_like(self.book).scatter_add_(0, code, moved.reshape(-1, v)), scale

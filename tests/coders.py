"""Weights, codebooks and coders for the tests of coding, and slow measures of their errors.

Shapes: E experts, N rows, K columns, v columns per code. Shared codebooks have one book, else E.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from moecc.ir import vq4
from moecc.passes._code import native
from moecc.passes._code.coded import Coded
from moecc.passes._code.coder import Coder
from moecc.passes._code.feedback import choose
from moecc.passes._code.metric import weighted_error

E, N, K = 2, 6, 16  # experts, rows, columns
BITS = [2, 3, 4]


@pytest.fixture(scope="module", params=["compiled", "pytorch"])
def loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a module's tests with both inner loops of coding."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "pytorch":
            patch.setattr(native, "compiled", lambda: None)
        elif native.compiled() is None:
            pytest.skip("no C++ compiler")
        yield


def drawn(
    seed: int = 0, *, experts: int = E, rows: int = N, columns: int = K
) -> tuple[Tensor, Tensor]:
    """Return weights [E, N, K] and full second moments [E, K, K].

    The weights are standard normal; the columns of the moments have unequal sizes.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(experts, 3 * columns, columns, generator=g) * torch.linspace(0.3, 2.0, columns)
    mixed = x + 0.7 * x.roll(1, -1) + 0.4 * torch.randn(experts, 3 * columns, 1, generator=g)
    return torch.randn(experts, rows, columns, generator=g), mixed.mT @ mixed / x.shape[1]


def codebooks(bits: int, seed: int = 0, *, books: int = E, size: int = 256) -> Tensor:
    """Return random codebooks [books, size, v] of whole numbers."""
    g = torch.Generator().manual_seed(100 + seed)
    v = vq4.group_size(bits)
    low = 0 if bits == 3 else -127
    return torch.randint(low, 128, (books, size, v), generator=g).float()


def coder(
    bits: int, seed: int = 0, *, feedback: bool = True, output: Tensor | None = None, **shape: int
) -> Coder:
    weight, moment = drawn(seed, **shape)
    importance = moment.diagonal(dim1=-2, dim2=-1)
    return Coder(
        weight, moment, importance / importance.mean(-1, keepdim=True), bits, feedback, output
    )


def scales(c: Coder) -> Tensor:
    """Return row scales [E, N] that bring codebooks of -127..127 to the weights' size.

    They are unequal, and not the best ones.
    """
    rows = c.target.shape[:2]
    return 0.02 + 0.01 * torch.rand(rows, generator=torch.Generator().manual_seed(3))


def state(bits: int, seed: int = 0, *, books: int = E) -> tuple[Coder, Coded]:
    """Return a coder and the codes it chooses."""
    c = coder(bits, seed)
    return c, choose(c, codebooks(bits, seed, books=books), scales(c))


def random_state(bits: int, seed: int = 0, *, books: int = E) -> tuple[Coder, Coded]:
    """Return a coder with random codes and signs."""
    c, g = coder(bits, seed), torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (E, N, K // vq4.group_size(bits)), generator=g)
    negative = torch.rand(E, N, K, generator=g) < 0.5 if bits == 3 else None
    return c, Coded(codes, negative, codebooks(bits, seed, books=books), scales(c))


def error_of(c: Coder, s: Coded) -> Tensor:
    """Return tr(D H D^T) per expert by its definition, in float64.

    With output costs S it is tr(S D H D^T).
    """
    d, h = (s.dense().double() - c.target.double()), c.moment.double()
    found = [sum(float(row @ h[e] @ row) for row in d[e]) for e in range(len(d))]
    if c.output is not None:
        s = from_blocks(c.output).double()
        found = [float(torch.trace(s[e] @ d[e] @ h[e] @ d[e].T)) for e in range(len(d))]
    return torch.tensor(found, dtype=torch.float64)


def never_more(after: Tensor, before: Tensor) -> None:
    assert bool((after <= before * (1 + 1e-5) + 1e-9).all()), (before.tolist(), after.tolist())


# ---- nearest


def distance(t: np.ndarray, q: np.ndarray, metric: np.ndarray) -> float:
    """Return |(t - q) M|^2, component by component."""
    d = t - q
    image = [sum(d[i] * metric[i, j] for i in range(len(d))) for j in range(len(d))]
    return sum(y * y for y in image)


def slow_nearest(
    t: np.ndarray, table: np.ndarray, metric: np.ndarray, bits: int
) -> tuple[int, np.ndarray]:
    """Try all codes; at 3 bit, with the signs of t + 1/2. Return the best code and its vector."""
    best, chosen, least = 0, table[0], np.inf
    for code, p in enumerate(table):
        q = np.array(
            [-1 - c if bits == 3 and x + 0.5 < 0 else c for c, x in zip(p, t, strict=True)]
        )
        d = distance(t, q, metric)
        if d < least:
            best, chosen, least = code, q, d
    return best, chosen


def costs(likeness: float, seed: int = 0, rows: int = 64, blocks: int = 1) -> Tensor:
    """Return costs of output errors in so many blocks, [E, b, B, B], full ones.

    The larger `likeness`, the more alike are the rows.
    """
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(E, rows, 4 * rows, generator=g) + likeness * torch.randn(
        E, 1, 4 * rows, generator=g
    )
    return in_blocks(a @ a.mT / a.shape[-1], blocks)


def in_blocks(output: Tensor, blocks: int) -> Tensor:
    """Return the blocks of a matrix: [.., N, N] -> [.., b, B, B]."""
    return torch.stack([output[..., i::blocks, i::blocks] for i in range(blocks)], -3)


def from_blocks(output: Tensor) -> Tensor:
    """Return the matrix that has these blocks, and zeros beside them."""
    blocks, rows = output.shape[-3:-1]
    found = output.new_zeros(*output.shape[:-3], blocks * rows, blocks * rows)
    for i in range(blocks):
        found[..., i::blocks, i::blocks] = output[..., i, :, :]
    return found


def relative(weight: Tensor, moment: Tensor, coded: Coded) -> float:
    """Return the weighted error of the codes relative to that of coding everything to zero."""
    return float(
        weighted_error(coded.dense() - weight, moment).sum() / weighted_error(weight, moment).sum()
    )

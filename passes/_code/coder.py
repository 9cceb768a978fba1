"""One projection while it is coded: everything that stays the same from round to round.

Shapes: E experts, N rows, K columns (a multiple of 8), v weights per code, G = K/v groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moecc.ir import vq4
from moecc.passes._code.coded import Coded
from moecc.passes._code.metric import apart, costly, feedback_factor

_STEPS = 32  # in which rows are coded, one after the other, if the metric couples them
_ROWS = 16  # of each block in a step, at least


@dataclass(eq=False)
class Coder:
    """The weights to be coded and the metric of their error.

    An error D of the weights costs tr(S D H D^T), where H is `moment` and S is `output`.
    """

    target: Tensor  # [E, N, K], each row divided by its size
    moment: Tensor  # H [E, K, K], damped
    importance: Tensor  # [E, K]: the diagonal of H, relative to its mean
    bits: int
    feedback: bool  # False: plain nearest codes by importance
    output: Tensor | None = None  # S [E, b, B, B], costly rows first; None: the identity
    _left: tuple[Coded, Tensor] | None = None  # of the last state that was asked for

    @property
    def v(self) -> int:
        """Weights per code."""
        return vq4.group_size(self.bits)

    @property
    def blocks(self) -> int:
        """Blocks of S."""
        return 1 if self.output is None else self.output.shape[1]

    @cached_property
    def steps(self) -> list[slice]:
        """Rows of each block that are coded at once; a single step if S is the identity."""
        rows = self.target.shape[1] // self.blocks
        step = rows if self.output is None else max(_ROWS, rows // _STEPS)
        return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]

    def rows(self, step: slice) -> slice:
        """The rows of all blocks in a step."""
        return slice(step.start * self.blocks, step.stop * self.blocks)

    def apart(self, rows: Tensor) -> Tensor:
        """The rows of each block: [E, n, K] -> [E, b, n/b, K]."""
        return apart(rows, self.blocks)

    @cached_property
    def order(self) -> Tensor:
        """Groups in the order of coding, [E, G].

        The costly ones come first, while all others can still make up for their errors.
        """
        groups = self.importance.unflatten(-1, (-1, self.v)).sum(-1)
        return torch.argsort(groups, dim=-1, descending=True, stable=True)

    @cached_property
    def columns(self) -> Tensor:
        """Columns in the order of coding, [E, K]."""
        within = torch.arange(self.v, device=self.order.device)
        return (self.order.unsqueeze(-1) * self.v + within).flatten(1)

    @cached_property
    def ordered_importance(self) -> Tensor:
        """`importance` in the order of coding, [E, K]."""
        return torch.gather(self.importance, 1, self.columns)

    @cached_property
    def upper(self) -> Tensor:
        """U with H^-1 = U^T U, columns in the order of coding, [E, K, K]."""
        wide = self.target.shape[-1]
        rows = torch.gather(self.moment, 1, self.columns.unsqueeze(-1).expand(-1, -1, wide))
        both = torch.gather(rows, 2, self.columns.unsqueeze(1).expand(-1, wide, -1))
        return feedback_factor(both)

    @cached_property
    def row_upper(self) -> Tensor:
        """U with S^-1 = U^T U, [E, b, B, B]."""
        assert self.output is not None
        return feedback_factor(self.output)

    @cached_property
    def shortened(self) -> list[Tensor]:
        """What a move of all rows in one of `steps` is divided by, [E, 1, 1] for each step.

        All rows move at once. If they pull the same way, that overshoots.
        """
        assert self.output is not None
        found = []
        for step in self.steps:
            inner = self.output[..., step, step]
            own = inner.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
            largest = torch.linalg.eigvalsh(inner / (own * own.mT).sqrt())[..., -1].amax(1)
            found.append(largest.clamp(min=2.0)[:, None, None] - 1)
        return found

    @cached_property
    def inner(self) -> Tensor:
        """The blocks of H on its diagonal, one per group, [E, G, v, v]."""
        blocks: Tensor = self.moment.unflatten(-2, (-1, self.v)).unflatten(-1, (-1, self.v))
        return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)

    @cached_property
    def inverses(self) -> Tensor:
        """Their inverses, [E, G, v, v]."""
        found: Tensor = torch.linalg.inv(self.inner)
        return found.contiguous()

    @cached_property
    def roots(self) -> Tensor:
        """Their Cholesky factors, [E, G, v, v]."""
        found: Tensor = torch.linalg.cholesky(self.inner)
        return found

    @cached_property
    def metrics(self) -> Tensor:
        """M of each group in the order of coding, [E, G, v, v].

        An error d of the group costs |d M|^2 if all later groups make up for it as well as they
        can. Without feedback M is the root of the columns' importance.
        """
        if not self.feedback:
            groups = self.ordered_importance.sqrt().unflatten(-1, (-1, self.v))
            return torch.diag_embed(groups)
        blocks = self.upper.unflatten(-2, (-1, self.v)).unflatten(-1, (-1, self.v))
        found: Tensor = torch.linalg.inv(blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1))
        return found

    @cached_property
    def pulled(self) -> Tensor:
        """W H of the weights W to be coded, [E, N, K]."""
        return self.target @ self.moment

    @cached_property
    def costly(self) -> Tensor:
        """S W H, [E, N, K]; W H if S is the identity."""
        return costly(self.pulled, self.output)

    def left(self, state: Coded, image: Tensor | None = None) -> Tensor:
        """(W - Q) H of a state's weights Q, [E, N, K].

        image: Q H in units of the rows' scales, if it is known. The last state's is kept, because
        each product with H costs as much as coding all weights.
        """
        if self._left is None or self._left[0] is not state:
            image = state.unscaled() @ self.moment if image is None else image
            self._left = state, self.pulled - image * state.scale.unsqueeze(-1)
        return self._left[1]

    def error(self, state: Coded) -> Tensor:
        """The cost of each expert's error, [E]."""
        cost = costly(self.left(state), self.output)
        return (cost * (self.target - state.dense())).sum((-2, -1))

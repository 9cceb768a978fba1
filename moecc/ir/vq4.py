"""The compressed-experts format `vq4`, version 1: the stored tensors of one projection.

E experts; N rows and K columns of one projection (gate_up: N = 2F or F, K = D; down: N = D, K = F);
r basis rows; v weights per code (4 at 2 and 3 bits, 2 at 4 bits); Kp: K rounded up to a multiple of
8.

  tensor       shape, dtype                 meaning
  codes        u8 [E, N, Kp/v]              one code for v neighbouring weights along K
  signs        u8 [E, N, Kp/8]              3 bits only: one sign bit per weight
  codebook     i8 [E or 1, 256, v]          centroids, per expert or one book for the layer
  scale        f16/bf16 [E, N]              per output row; includes the affine slope
  bias         f16/bf16 [E, N] or absent    per output row: affine offset plus the expert's own bias
  basis        f16/bf16 [r, D] or absent    shared by the layer, on the residual-stream side
  coef         i8 [E, N, r] | i8 [E, r, F]  gate_up | down: an expert's coordinates in the basis
  coef_scale   f16/bf16 [E, N] | [E, r]     one scale per row of coef
  mean_codes, mean_signs, mean_codebook, mean_scale, or absent
                                            the mean: one more matrix [1, N, K], coded as above at
                                            2, 3 or 4 bits of its own, which every expert adds with
                                            weight 1

The padding from K to Kp is decoded and cut off; it counts as bits.

  2, 4 bits: weight = codebook[code]
  3 bits:    weight = p if the sign bit is clear, else -1-p (symmetric about -1/2, p in 0..127).
             Bit c of a sign byte's low nibble belongs to component c of the even group of four, bit
             c of its high nibble to component c of the odd group.

  gate_up:  y_e = scale_e * (VQ_e x) + coef_e (basis x) + mean_scale * (VQ_mean x) + bias_e
  down:     y   = sum_e w_e (scale_e * (VQ_e h_e) + bias_e)
                  + basis^T sum_e w_e (coef_e h_e) + mean_scale * (VQ_mean sum_e w_e h_e)

So a backend can compute the shared parts once per token. If a family normalises each expert's
output before the sum, the shared parts of down are applied per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Shape: TypeAlias = tuple[int, ...]
VERSION = 1
CODEBOOK_SIZE = 256
# The suffixes of one projection's tensors, in the order of the op's operands: a coded matrix per
# expert (the mean's tensors have the same names behind MEAN), the bias, and the parts that experts
# share.
CODED = ("codes", "signs", "codebook", "scale")
MEAN = "mean_"
SHARED = ("basis", "coef", "coef_scale", *(MEAN + name for name in CODED))
TENSORS = (*CODED, "bias", *SHARED)
_HALF = (torch.float16, torch.bfloat16)
DTYPES = {
    "codes": (torch.uint8,),
    "signs": (torch.uint8,),
    "codebook": (torch.int8,),
    "scale": _HALF,
    "bias": _HALF,
    "basis": _HALF,
    "coef": (torch.int8,),
    "coef_scale": _HALF,
}


def is_alike(tensor: str) -> bool:
    """Return whether all experts share the tensor of this name as it is."""
    return tensor == "basis" or tensor.startswith(MEAN)


def fault(
    shapes: Mapping[str, Shape],
    sizes: tuple[int, int, int],
    *,
    input_side: bool,
    called: Callable[[str], str] = str,
) -> str | None:
    """Return what is wrong with a projection's stored tensors, None if they fit each other.

    shapes: by names of TENSORS; codebook and basis fix the group size and the rank. sizes: E, N, K.
    called: what a tensor is called in the text.
    """
    for whole in (SHARED[:3], [MEAN + t for t in CODED if t != "signs"]):
        there = [t for t in whole if t in shapes]
        missing = [t for t in whole if t not in shapes]
        if there and missing:
            return f"{called(there[0])} without {called(missing[0])}"
    if odd := next((t for t, s in shapes.items() if len(s) != _axes(t)), None):
        return f"{called(odd)} is {shapes[odd]}, expected {_axes(odd)} axes"
    for name, want in _wanted(shapes, sizes, input_side).items():
        if name in shapes and shapes[name] != want:
            return f"{called(name)} is {shapes[name]}, expected {want}"
    return None


def _axes(tensor: str) -> int:
    return 2 if tensor.removeprefix(MEAN) in ("scale", "bias", "basis", "coef_scale") else 3


def _wanted(
    shapes: Mapping[str, Shape], sizes: tuple[int, int, int], input_side: bool
) -> dict[str, Shape]:
    experts, rows, columns = sizes
    wanted: dict[str, Shape] = {"scale": (experts, rows), "bias": (experts, rows)}
    if "codebook" in shapes:
        books, v = shapes["codebook"][0], shapes["codebook"][-1]
        books = books if books in (1, experts) else experts
        wanted["codebook"] = (books, CODEBOOK_SIZE, v if v in (2, 4) else 4)
        wanted["codes"] = (experts, rows, padded(columns) // wanted["codebook"][2])
        wanted["signs"] = (experts, rows, padded(columns) // 8)
    if "basis" in shapes:
        rank = shapes["basis"][0]
        wanted["basis"] = (rank, columns if input_side else rows)
        wanted["coef"] = (experts, rows, rank) if input_side else (experts, rank, columns)
        wanted["coef_scale"] = wanted["coef"][:2]
    if mean := {t.removeprefix(MEAN): s for t, s in shapes.items() if t.startswith(MEAN)}:
        stored = _wanted(mean, (1, rows, columns), input_side)
        wanted |= {MEAN + t: s for t, s in stored.items() if t in CODED}
    return wanted


def group_size(bits: int) -> int:
    """Return v, the weights per code."""
    return 2 if bits == 4 else 4


def padded(columns: int) -> int:
    """Return Kp, the stored columns."""
    return -(-columns // 8) * 8


def pack_signs(negative: Tensor) -> Tensor:
    """Pack bool [..., Kp] into u8 [..., Kp/8]; bit i of a byte is the sign of its weight i."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=negative.device)
    eights: Tensor = negative.unflatten(-1, (-1, 8)).to(torch.uint8)
    return (eights * weights).sum(-1, dtype=torch.uint8)


def unpack_signs(signs: Tensor) -> Tensor:
    """Unpack u8 [..., Kp/8] into bool [..., Kp]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=signs.device)
    return ((signs.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)


def decode(
    codes: Tensor, signs: Tensor | None, codebook: Tensor, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return the unscaled weights [E, N, columns] in `dtype`.

    Differentiable in `codebook` if that is floating.
    """
    experts = codes.shape[0]
    table = codebook.to(dtype).expand(experts, -1, -1)
    offset = torch.arange(experts, device=codes.device).view(-1, 1, 1) * table.shape[1]
    # the gradient of index_select is an index_add; that of indexing adds one element at a time
    flat = table.reshape(-1, table.shape[2]).index_select(0, (codes.long() + offset).flatten())
    values = flat.view(*codes.shape[:2], -1)
    if signs is not None:
        values = torch.where(unpack_signs(signs), -1 - values, values)
    return values[..., :columns]


def basis_part(
    coef: Tensor, coef_scale: Tensor, basis: Tensor, dtype: torch.dtype, *, input_side: bool
) -> Tensor:
    """Return the dense [E, N, K] of basis and coefficients (input_side: gate_up, else down)."""
    scaled = coef.to(dtype) * coef_scale.to(dtype).unsqueeze(-1)
    return scaled @ basis.to(dtype) if input_side else basis.to(dtype).T @ scaled


def mean_part(
    tensors: Mapping[str, Tensor | None], columns: int, dtype: torch.dtype
) -> Tensor | None:
    """Return the dense mean [1, N, columns]; None if `tensors`, by names of SHARED, have none."""
    codes, signs, codebook, scale = (tensors.get(MEAN + name) for name in CODED)
    if codes is None or codebook is None or scale is None:
        return None
    return decode(codes, signs, codebook, columns, dtype) * scale.to(dtype).unsqueeze(-1)


def shared_part(
    tensors: Mapping[str, Tensor | None], columns: int, dtype: torch.dtype, *, input_side: bool
) -> Tensor | None:
    """Return the dense [E, N, columns] of basis and mean, which are taken out before coding.

    [1, N, columns] if there is only a mean; None if there is neither.
    """
    basis, coef, coef_scale = (tensors.get(name) for name in SHARED[:3])
    mean = mean_part(tensors, columns, dtype)
    if basis is None or coef is None or coef_scale is None:
        return mean
    low = basis_part(coef, coef_scale, basis, dtype, input_side=input_side)
    return low if mean is None else low + mean


def dense(
    tensors: Mapping[str, Tensor | None], columns: int, dtype: torch.dtype, *, input_side: bool
) -> Tensor:
    """Return the dense [E, N, columns] that a projection's tensors, by TENSORS, stand for.

    The bias isn't part of it.
    """
    codes, signs, codebook, scale = (tensors[name] for name in CODED)
    assert codes is not None and codebook is not None and scale is not None
    weight = decode(codes, signs, codebook, columns, dtype) * scale.to(dtype).unsqueeze(-1)
    shared = shared_part(tensors, columns, dtype, input_side=input_side)
    return weight if shared is None else weight + shared

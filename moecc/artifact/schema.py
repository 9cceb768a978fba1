"""What moecc.json says: the rows of the audit and their sums.

What config.json says is in `moecc.checkpoint.schema`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from moecc.checkpoint.reading import read_json_if_there
from moecc.checkpoint.roles import ROUTED
from moecc.errors import MoeccError, quoted
from moecc.ir.program import Program
from moecc.pipeline.bits import per_weight
from moecc.pipeline.fate import Fate
from moecc.types import Json

_STRICT = {"strict": True, "extra": "ignore", "allow_inf_nan": False}


@dataclass
class Row:
    """One line of the audit: a parameter of the model, a tensor that it has no place for, or the
    files' headers.

    bits: per weight of the parameter, everything stored for it counted. Of routed experts: experts
    is the module's path, projection which of its two, layer the decoder layer's number; tokens are
    the calibration tokens that each expert saw, and starved the experts that saw too few, each with
    the tokens that were sent to it on purpose. fallback: why a pass left it in float. details: what
    passes recorded besides. error: of the stored weights, relative to the source's.
    in_sample_error: of the output on the calibration tokens that the codes were fitted to; it falls
    with fewer tokens, and `moecc eval` measures quality.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    fate: Fate
    nbytes: int
    bits: float = 0.0
    error: float | None = None
    tokens: list[int] | None = None
    starved: dict[str, int] = field(default_factory=dict)
    fallback: str = ""
    experts: str = ""
    projection: str = ""
    layer: int | None = None
    in_sample_error: float | None = None
    details: Json = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Weights that it counts for: those of a tied tensor are another row's."""
        return 0 if not self.shape or self.fate.kind == "tied" else math.prod(self.shape)

    def as_json(self) -> Json:
        """The row as moecc.json has it; fields that say nothing are left out."""
        plain = asdict(self) | {"fate": self.fate.as_json(), "shape": list(self.shape)}
        always = ("name", "role", "shape", "fate", "nbytes")
        said = {k: v for k, v in plain.items() if v is not None and v not in ("", {}, [])}
        return {k: plain[k] for k in plain if k in always or k in said}

    @classmethod
    def of_json(cls, value: Json) -> Row:
        """The row that `as_json` wrote."""
        return cls(**{**value, "shape": tuple(value["shape"]), "fate": Fate.of_json(value["fate"])})


def summary(rows: Iterable[Row]) -> Json:
    """Sum up an audit: bytes by role (headers included) and bits per weight.

    Bits are over the routed experts and over everything (tensors alone); None without weights.
    """
    roles: dict[str, int] = {}
    stored = weights = everything = 0
    for row in rows:
        roles[row.role] = roles.get(row.role, 0) + row.nbytes
        everything += row.weights
        if row.role == ROUTED and row.bits:
            # a row of coded experts stands for their biases too, whose weights its bits do not
            # count
            kept = row.fate.kind == "kept"
            stored += row.nbytes
            weights += row.weights if kept else round(8 * row.nbytes / row.bits)
    total = sum(roles.values())
    tensors = total - roles.get("file format", 0)
    return {
        "bytes": total,
        "bytes_by_role": roles,
        "bits_per_weight_experts": per_weight(8 * stored, weights) or None,
        "bits_per_weight": per_weight(8 * tensors, everything) or None,
    }


@dataclass(frozen=True)
class _Summary:
    """The sums that are shown."""

    __pydantic_config__: ClassVar[Any] = _STRICT

    bits_per_weight: float | None = None
    bits_per_weight_experts: float | None = None


@dataclass(frozen=True)
class _Manifest:
    """What is looked up in moecc.json; its other entries are for people.

    experts_kept: numbers of the source's experts by their module's path. Raise ValueError for one
    below 0.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT

    pipeline: str = ""
    source: str = ""
    calibration_digest: str = ""
    summary: _Summary = field(default_factory=_Summary)
    experts_kept: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(expert < 0 for rows in self.experts_kept.values() for expert in rows):
            raise ValueError("experts_kept has a number below 0")


def read_manifest(folder: Path) -> Json:
    """Return the content of moecc.json, {} if the folder has none: moecc did not write it.

    Raise MoeccError if the file can't be read, or if what is looked up in it isn't what moecc
    writes.
    """
    from pydantic import ValidationError

    file = folder / "moecc.json"
    found = read_json_if_there(file, "compile the model again")
    try:
        _adapter().validate_json(json.dumps(found))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = quoted(".".join(map(str, first["loc"])))
        raise MoeccError(
            f"{file} isn't what moecc writes ({where}: {first['msg']}); compile the model again"
        ) from None
    return found


def number_experts(program: Program, folder: Path) -> None:
    """Let `program` number its experts as moecc.json of `folder` does, if that lacks some.

    Raise MoeccError if it doesn't give one ascending number for each expert of a layer.
    """
    kept = read_manifest(folder).get("experts_kept", {})
    program.kept = {path: tuple(rows) for path, rows in kept.items()}
    sizes = {moe.path: moe.sizes[0] for moe in program.moe_layers()}
    for path, rows in program.kept.items():
        if list(rows) != sorted(set(rows)) or len(rows) != sizes.get(path):
            what = f"experts_kept of {path!r} isn't one ascending number for each expert there"
            raise MoeccError(f"{folder / 'moecc.json'}: {what}; compile the model again")


@cache
def _adapter() -> Any:
    """Return the check of moecc.json; pydantic is imported when the first one is read."""
    from pydantic import TypeAdapter

    return TypeAdapter(_Manifest)

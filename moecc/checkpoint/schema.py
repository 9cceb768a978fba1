"""The compressed tensors of an artifact, as `quantization_config` in its config.json lists them.

quantization_config = {
  quant_method, version,
  experts: {path: {attributes, remove: [dense parameters, relative],
                   gate_up: {tensor: [shape, dtype]}, down: {...}}},
  linears: {path: {bits, tensors: {tensor: [shape, dtype]}}},
  guard: [names of dense parameters]}

Everybody who opens an artifact reads it by `Compression.of`, which takes what moecc writes and
nothing else. That it fits a model is checked where the model gets its compressed modules
(`moecc.frontend.prepare`), and that the files hold these tensors where they are read.

Programs that don't know the format have to stop, not to fill in random experts. They print
quant_method, so it says what to install. Stock transformers skips a method that it doesn't know.
There config.json asks for an experts implementation of that name, which is refused; and for
whoever asks for another one, the files have an empty tensor under the name of each parameter in
`guard`, whose shape can't be right. transformers 4 knows neither; it stops at pruned_heads, whose
keys have to be numbers there, and which transformers 5 doesn't read.

Version 2 brought quant_method's advice and the guard. Both versions are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch

from moecc.errors import MoeccError
from moecc.ir import gates, vq4
from moecc.types import Config, Json

METHOD = "moecc (pip install moecc)"  # quant_method of the checkpoints that moecc writes
METHODS = (METHOD, "moecc")  # those that it reads
# what config.json says beside quantization_config, for programs without moecc
REFUSALS: Json = {"experts_implementation": METHOD, "pruned_heads": {METHOD: []}}
VERSION = 2
VERSIONS = (1, 2)
ATTRIBUTES = ("act", "gate", "alpha", "limit", "eps")  # of moecc::vq_experts
DType: TypeAlias = Literal["uint8", "int8", "float16", "bfloat16", "float32"]
# shape, and dtype as torch spells it
TensorSpec: TypeAlias = tuple[tuple[int, ...], DType]
TensorSpecs: TypeAlias = Mapping[str, TensorSpec]  # by tensor name
_FLOATS = ("float16", "bfloat16", "float32")
_STRICT = {"strict": True, "extra": "forbid", "allow_inf_nan": False}


class TensorLike(Protocol):
    """A tensor, or an entry of a file's header."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class StoredExperts:
    """One layer's compressed experts.

    attributes: those of the op moecc::vq_experts. remove: the dense parameters that the compressed
    tensors replace, named relative to the experts module. Raise ValueError if they don't make
    experts.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT

    attributes: Mapping[str, str | float]
    remove: Sequence[str]
    gate_up: TensorSpecs
    down: TensorSpecs

    def __post_init__(self) -> None:
        self._require_attributes()
        for name, specs in (("gate_up", self.gate_up), ("down", self.down)):
            _require_tensors(name, specs)
        for name, shape in self.shapes.items():
            if 0 in shape:
                raise ValueError(f"{name} is {shape}")
            stored = {t: own for t, (own, _) in getattr(self, name).items()}
            if found := vq4.fault(stored, shape, input_side=name == "gate_up"):
                raise ValueError(f"{name}: {found}")

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Return E, N and K of gate_up and of down."""
        experts, rows, _ = self.gate_up["codes"][0]
        hidden = self.down["codes"][0][1]
        units = gates.rows_per_unit(str(self.attributes["gate"]))
        return {"gate_up": (experts, rows, hidden), "down": (experts, hidden, rows // units)}

    def _require_attributes(self) -> None:
        given = self.attributes
        if sorted(given) != sorted(ATTRIBUTES):
            raise ValueError(f"attributes are {sorted(given)}, expected {sorted(ATTRIBUTES)}")
        if given["act"] not in gates.ACTIVATIONS or given["gate"] not in {*gates.GATES, "none"}:
            raise ValueError(f"no experts have act {given['act']!r} and gate {given['gate']!r}")
        if any(isinstance(given[name], str) for name in ("alpha", "limit", "eps")):
            raise ValueError("alpha, limit and eps are numbers")


def _require_tensors(name: str, specs: TensorSpecs) -> None:
    """Raise ValueError unless a projection has the tensors that it can't do without, and types."""
    if unknown := next((t for t in specs if t not in vq4.TENSORS), None):
        raise ValueError(f"{name}: no tensor is called {unknown!r}")
    if missing := next((t for t in ("codes", "codebook", "scale") if t not in specs), None):
        raise ValueError(f"{name} has no {missing}")
    for tensor, (shape, dtype) in specs.items():
        kinds = vq4.DTYPES[tensor.removeprefix(vq4.MEAN)]
        if dtype not in (wanted := [str(k).removeprefix("torch.") for k in kinds]):
            raise ValueError(f"{name}: {tensor} is {dtype}, expected {' or '.join(wanted)}")
        if tensor == "codes" and len(shape) != 3:
            raise ValueError(f"{name}: codes is {shape}, expected 3 axes")


@dataclass(frozen=True)
class StoredLinear:
    """One group-quantized linear: weight u8 [N, K * bits / 8], scale and zero [N, K / group].

    bias: [N], if the linear has one. Raise ValueError if the tensors don't fit each other.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT

    bits: Literal[4, 8]
    tensors: TensorSpecs

    def __post_init__(self) -> None:
        if self.tensors.keys() - {"bias"} != {"weight", "scale", "zero"}:
            raise ValueError(f"tensors are {sorted(self.tensors)}, expected weight, scale, zero")
        (rows, columns), groups = self.shape, self.tensors["scale"][0]
        if len(groups) != 2 or groups[0] != rows or not groups[1] or columns % groups[1]:
            raise ValueError(f"scale is {groups} for {rows} rows of {columns} weights")
        wanted: dict[str, tuple[tuple[int, ...], Sequence[str]]] = {
            "weight": (self.tensors["weight"][0], ["uint8"]),
            "scale": (groups, _FLOATS),
            "zero": (groups, ["uint8"]),
            "bias": ((rows,), _FLOATS),
        }
        for name, (shape, dtype) in self.tensors.items():
            if shape != wanted[name][0] or dtype not in wanted[name][1]:
                raise ValueError(f"{name} is {dtype} {shape}")

    @property
    def shape(self) -> tuple[int, int]:
        """Return N and K. Raise ValueError if the codes have no rows and columns."""
        shape = self.tensors["weight"][0]
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"weight is {shape}, expected 2 axes")
        return shape[0], shape[1] * 8 // self.bits


@dataclass(frozen=True)
class Compression:
    """Everything that an artifact stores in compressed form, by module path.

    guard: dense parameters in whose place an empty tensor stops programs that don't know moecc.
    """

    __pydantic_config__: ClassVar[Any] = _STRICT

    experts: dict[str, StoredExperts] = field(default_factory=dict)
    linears: dict[str, StoredLinear] = field(default_factory=dict)
    guard: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, settings: Config) -> Compression:
        """Read a quantization_config, or a model configuration that may have one.

        Raise MoeccError if it is none that moecc writes, or of a version that it doesn't read.
        """
        found: object = getattr(settings, "quantization_config", settings)
        found = found.to_dict() if hasattr(found, "to_dict") else found
        if not isinstance(found, Mapping) or found.get("quant_method") not in METHODS:
            return cls()
        rest = {k: v for k, v in found.items() if k not in ("quant_method", "version")}
        require_version(found.get("version", 1))
        return _parsed(rest)

    def require(self, stored: Mapping[str, TensorLike]) -> None:
        """Raise MoeccError unless `stored` has these compressed tensors and no others.

        Shapes and dtypes are compared. stored: what files have, by name.
        """
        listed = dict(self._tensors())
        coded = (n for n in stored if n.rpartition(".")[2] in ("codes", "zero"))
        if other := next((n for n in coded if n not in listed), None):
            what = f"the weight files have {other!r}, and config.json says nothing of it"
            raise MoeccError(f"{what}; fetch config.json and the weight files again")
        for name, (shape, dtype) in listed.items():
            there = stored.get(name)
            if there is None:
                raise MoeccError(f"the weight files have no {name!r}; fetch them again")
            if (tuple(there.shape), str(there.dtype)) != (shape, f"torch.{dtype}"):
                found = f"{there.dtype} {tuple(there.shape)}".removeprefix("torch.")
                what = f"{name!r} is {found}, and config.json says {dtype} {shape}"
                raise MoeccError(f"{what}; fetch config.json and the weight files again")

    def names(self) -> list[str]:
        """Return the names of all compressed tensors."""
        return [name for name, _ in self._tensors()]

    def _tensors(self) -> Iterator[tuple[str, TensorSpec]]:
        for path, entry in self.experts.items():
            for projection, specs in (("gate_up", entry.gate_up), ("down", entry.down)):
                yield from ((f"{path}.{projection}.{t}", spec) for t, spec in specs.items())
        for path, linear in self.linears.items():
            yield from ((f"{path}.{t}", spec) for t, spec in linear.tensors.items())

    def as_config(self) -> Json:
        """Return the quantization_config that `of` reads back."""
        return {"quant_method": METHOD, "version": VERSION, **asdict(self)}


def require_version(version: object) -> None:
    """Raise MoeccError for a format version that this moecc does not read."""
    if type(version) is not int or version not in VERSIONS:
        raise MoeccError(
            f"this artifact is of format version {version!r:.40}, this moecc reads "
            f"{' and '.join(map(str, VERSIONS))}; compile it again"
        )


def _parsed(settings: Mapping[str, object]) -> Compression:
    from pydantic import ValidationError

    advice = "the artifact is damaged; fetch or compile it again"
    try:
        found: Compression = _adapter().validate_json(json.dumps(settings))
        return found
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where, what = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise MoeccError(f"quantization_config, {where!r:.200}: {what:.300}; {advice}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise MoeccError(f"quantization_config is no JSON ({error}); {advice}") from error


@cache
def _adapter() -> Any:
    """Return the parser; pydantic is imported when the first artifact is read."""
    from pydantic import TypeAdapter

    return TypeAdapter(Compression)

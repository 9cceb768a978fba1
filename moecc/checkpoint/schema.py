"""The compressed tensors of an artifact, as `quantization_config` in its config.json lists them.

quantization_config = {
  quant_method: "moecc", version,
  experts: {path: {attributes, remove: [dense parameters, relative],
                   gate_up: {tensor: [shape, dtype]}, down: {...}}},
  linears: {path: {bits, tensors: {tensor: [shape, dtype]}}}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeAlias

from moecc.errors import MoeccError
from moecc.ir import vq4
from moecc.types import Config, Json

METHOD = "moecc"  # quant_method of the checkpoints that moecc writes
# tensor name -> (shape, dtype as torch spells it: "uint8")
TensorSpecs: TypeAlias = Mapping[str, tuple[Sequence[int], str]]


@dataclass(frozen=True)
class StoredExperts:
    """One layer's compressed experts.

    attributes: those of the op moecc::vq_experts. remove: the dense parameters that the compressed
    tensors replace, named relative to the experts module."""

    attributes: Mapping[str, str | float]
    remove: Sequence[str]
    gate_up: TensorSpecs
    down: TensorSpecs


@dataclass(frozen=True)
class StoredLinear:
    """One group-quantized linear."""

    bits: int
    tensors: TensorSpecs


@dataclass(frozen=True)
class Compression:
    """Everything that an artifact stores in compressed form, by module path."""

    experts: dict[str, StoredExperts] = field(default_factory=dict)
    linears: dict[str, StoredLinear] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Config) -> Compression:
        """Read a quantization_config, or a model configuration that may have one.

        Raise MoeccError for another version of the format."""
        found: object = getattr(settings, "quantization_config", settings)
        found = found.to_dict() if hasattr(found, "to_dict") else found
        if not isinstance(found, Mapping) or found.get("quant_method") != METHOD:
            return cls()
        require_version(found.get("version", vq4.VERSION))
        experts = {path: StoredExperts(**entry) for path, entry in found.get("experts", {}).items()}
        linears = {path: StoredLinear(**entry) for path, entry in found.get("linears", {}).items()}
        return cls(experts, linears)

    def as_config(self) -> Json:
        """Return the quantization_config that `of` reads back."""
        return {"quant_method": METHOD, "version": vq4.VERSION, **asdict(self)}


def require_version(version: object) -> None:
    """Raise MoeccError for a format version that this moecc does not read."""
    if version != vq4.VERSION:
        raise MoeccError(
            f"this artifact is of format version {version}, this moecc reads {vq4.VERSION}; "
            "compile it again"
        )

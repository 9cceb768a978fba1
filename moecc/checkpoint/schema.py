"""What an artifact's config.json says of its compressed tensors: the one reading of `quantization_config`.

quantization_config = {
  quant_method: "moecc", version,
  experts: {path: {attributes, remove: [dense parameters, relative], gate_up: {tensor: [shape, dtype]}, down: {...}}},
  linears: {path: {bits, tensors: {tensor: [shape, dtype]}}}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moecc.errors import MoeccError
from moecc.ir import vq4

METHOD = "moecc"  # quant_method of the checkpoints that moecc writes
TensorSpecs = Mapping[
    str, tuple[Sequence[int], str]
]  # tensor name -> (shape, dtype as torch spells it: "uint8")


@dataclass(frozen=True)
class StoredExperts:
    """One layer's compressed experts. attributes: the op's; remove: the dense parameters that they replace, relative."""

    attributes: Mapping[str, Any]
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
    """All that an artifact stores in compressed form, by module path."""

    experts: dict[str, StoredExperts] = field(default_factory=dict)
    linears: dict[str, StoredLinear] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Any) -> Compression:
        """Of a quantization_config, or of a model configuration that may have one; MoeccError for another version."""
        found = getattr(settings, "quantization_config", settings)
        found = found.to_dict() if hasattr(found, "to_dict") else found
        if not isinstance(found, Mapping) or found.get("quant_method") != METHOD:
            return cls()
        require_version(found.get("version", vq4.VERSION))
        experts = {path: StoredExperts(**entry) for path, entry in found.get("experts", {}).items()}
        linears = {path: StoredLinear(**entry) for path, entry in found.get("linears", {}).items()}
        return cls(experts, linears)

    def as_config(self) -> dict[str, Any]:
        """The quantization_config that says it."""
        return {"quant_method": METHOD, "version": vq4.VERSION, **asdict(self)}


def require_version(version: Any) -> None:
    """MoeccError for a format version that this moecc does not read."""
    if version != vq4.VERSION:
        raise MoeccError(
            f"this artifact is of format version {version}, this moecc reads {vq4.VERSION}; compile it again"
        )

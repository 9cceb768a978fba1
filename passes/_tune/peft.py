"""PEFT LoRA adapter folders: what update they give to which weight.

  1. `adapter_config.json` says how large the update is: scaling = alpha / r, or alpha / sqrt(r) with rslora (arXiv 2312.03732),
     alpha by `alpha_pattern` where a module matches it, r as the tensors have it.
  2. A linear's update is scaling * B A: A [r, K], B [N, r].
  3. Fused experts are adapted as parameters (`target_parameters`): A [E r, K], expert by expert; B [N, r E], the expert running
     fastest: update_e = scaling * B[:, :, e] A[e], transposed where the experts are stored so. PEFT names such tensors by nesting
     (`experts.base_layer.lora_A`), the module's last adapted parameter outermost.
  4. Every tensor of the adapter must find its weight, or nothing is merged.

Not read, each with an error: DoRA and other variants, adapters that came with changed base weights (PiSSA, OLoRA, ...), trained
biases, embeddings and whole modules; an update of a weight that is tied to another, which would change both.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moecc.errors import MoeccError
from moecc.ir.program import Program

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(
    r"^(?:base_model\.model\.)?(.+?)((?:\.base_layer)*)\.lora_([AB])(?:\.default)?\.weight$"
)
# Options that change what the tensors mean, or what else was trained; merging A and B alone would be wrong under them.
_UNKNOWN = (
    "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "layer_replication", "modules_to_save",
    "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip


def adapter_files(owner: str, path: str) -> list[Path]:
    """The files that say what an adapter is; MoeccError, before any work, where they can't be read."""
    Adapter.read(owner, path)
    return [Path(path) / name for name in (_CONFIG, _TENSORS)]


def require_fitting(owner: str, path: str, program: Program) -> None:
    """MoeccError where a tensor of the adapter finds no weight in `program`."""
    Adapter.read(owner, path).updates(program)


def merge_into(program: Program, weight: str, update: Update) -> None:
    """Let the program's `weight` be the sum, in float32, rounded to the type that the checkpoint stores it in."""
    dtype = program.stored_dtype(weight)
    before = (
        program.tensors.reader(weight)
        if weight in program.tensors
        else partial(_stored, program, weight)
    )
    program.tensors.spill(weight, partial(_merged, before, update, dtype))
    program.rounded.add(weight)


def _stored(program: Program, weight: str) -> Tensor:
    assert program.store is not None
    return program.store.read(weight, dtype=program.dtype)


def _merged(read: Callable[[], Tensor], update: Update, dtype: torch.dtype) -> Tensor:
    """The weight plus its update, as the checkpoint's type holds it."""
    value = read()
    whole: Tensor = (value.float() + update.delta()).to(dtype).to(value.dtype)
    return whole


@dataclass(frozen=True)
class Update:
    """One weight's low-rank update; experts and transposed are for three-dimensional ones."""

    a: Tensor
    b: Tensor
    scaling: float
    experts: int = 0
    transposed: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank}, scaling {self.scaling:g}"

    @property
    def rank(self) -> int:
        return len(self.a) // max(self.experts, 1)

    def shape(self) -> tuple[int, ...]:
        rows, columns = self.b.shape[0], self.a.shape[1]
        if not self.experts:
            return rows, columns
        return (self.experts, columns, rows) if self.transposed else (self.experts, rows, columns)

    def delta(self) -> Tensor:
        """[N, K], or [E, N, K] ([E, K, N] where transposed), float32."""
        a, b = self.a.float(), self.b.float()
        if not self.experts:
            return b @ a * self.scaling
        each: Tensor = b.unflatten(1, (-1, self.experts)).permute(2, 0, 1) @ a.unflatten(
            0, (self.experts, -1)
        )
        each = each * self.scaling
        return each.mT if self.transposed else each


@dataclass
class Adapter:
    """An adapter folder: its configuration, and A and B by module path and depth of nesting."""

    folder: Path
    config: dict[str, Any]
    pairs: dict[tuple[str, int], dict[str, Tensor]]

    @classmethod
    def read(cls, owner: str, path: str) -> Adapter:
        """The adapter that the pass `owner` was given."""
        if not path:
            raise MoeccError(f"{owner}: no adapter given; write {owner}{{path=FOLDER}}")
        folder = Path(path)
        for name in (_CONFIG, _TENSORS):
            if not (folder / name).is_file():
                raise MoeccError(
                    f"{folder}: no {name}; give a folder that PEFT saved a LoRA adapter in"
                )
        try:
            config = json.loads((folder / _CONFIG).read_text())
        except ValueError as error:
            raise MoeccError(
                f"{folder / _CONFIG}: not JSON ({error}); save the adapter again"
            ) from None
        _require_plain(folder, config)
        pairs: dict[tuple[str, int], dict[str, Tensor]] = {}
        try:
            tensors = load_file(folder / _TENSORS)
        except SafetensorError as error:
            raise MoeccError(
                f"{folder / _TENSORS}: not a safetensors file ({error}); save the adapter again"
            ) from None
        for key, tensor in tensors.items():
            match = _KEY.match(key)
            if not match:
                raise MoeccError(
                    f"{folder}: {key} is no LoRA matrix of a linear or of experts; merge it with PEFT first"
                )
            module, nesting, side = match.groups()
            pairs.setdefault((module, nesting.count("base_layer")), {})[side] = tensor
        for (module, _), pair in pairs.items():
            if len(pair) != 2:
                raise MoeccError(
                    f"{folder}: {module} has lora_{next(iter(pair))} alone; save the adapter again"
                )
        return cls(folder, config, pairs)

    def updates(self, program: Program) -> dict[str, Update]:
        """Weight name -> update; MoeccError where a tensor of the adapter fits none."""
        found: dict[str, Update] = {}
        for (module, depth), pair in self.pairs.items():
            weight = self._weight(program, module, depth)
            if others := _tied_to(program, weight):
                raise MoeccError(
                    f"{self.folder}: the adapter updates {weight}, which is tied to {', '.join(others)}; untie them in the model "
                    f"(a tensor of its own for each, tie_word_embeddings=false), or leave {module} out of the adapter"
                )
            shape = tuple(program.store.shape(weight))  # type: ignore[union-attr]
            update = Update(pair["A"], pair["B"], self._scaling(weight.removesuffix(".weight"), pair["A"], shape),
                            *((shape[0], _transposed(program, weight)) if len(shape) == 3 else ()))  # fmt: skip
            if update.shape() != shape:
                raise MoeccError(
                    f"{self.folder}: the adapter of {weight} updates {list(update.shape())}, but the weight is {list(shape)}; "
                    "give the model that the adapter was trained on"
                )
            found[weight] = update
        return found

    def _weight(self, program: Program, module: str, depth: int) -> str:
        store: Any = program.store
        names: list[str] = (
            [n for n in store.names() if n.rpartition(".")[0] == module]
            if store is not None
            else []
        )
        wanted = [str(t) for t in self.config.get("target_parameters") or ()]
        parameters = [n for n in names if any(n == t or n.endswith("." + t) for t in wanted)]
        if parameters and depth < len(parameters):
            return parameters[-1 - depth]
        if depth == 0 and f"{module}.weight" in names:
            return f"{module}.weight"
        raise MoeccError(
            f"{self.folder}: the model has no weight for the adapter of {module}; give the model it was trained on"
        )

    def _scaling(self, key: str, a: Tensor, shape: tuple[int, ...]) -> float:
        patterns = self.config.get("alpha_pattern") or {}
        alpha = next(
            (v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", key)),
            self.config.get("lora_alpha"),
        )
        if not isinstance(alpha, int | float):
            raise MoeccError(f"{self.folder / _CONFIG}: no lora_alpha; save the adapter again")
        rank = len(a) // (shape[0] if len(shape) == 3 else 1)
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else max(rank, 1))


def _tied_to(program: Program, weight: str) -> list[str]:
    """Other names of the checkpoint's tensor behind `weight`."""
    tied: dict[str, str] = getattr(program.store, "tied", {})
    owner = tied.get(weight, weight)
    return [name for name in (owner, *tied) if name != weight and tied.get(name, name) == owner]


def _require_plain(folder: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise MoeccError(
            f"{folder}: an adapter of type {config.get('peft_type')}; moecc merges LORA, merge this one with PEFT first"
        )
    start = config.get("init_lora_weights", True)
    odd = [k for k in _UNKNOWN if config.get(k)] + _if(
        config.get("bias") not in (None, "none"), "bias"
    )
    odd += _if(
        isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"),
        f"init_lora_weights={start}",
    )
    if odd:
        raise MoeccError(
            f"{folder}: {', '.join(odd)} in its {_CONFIG} can't be merged here; merge it with PEFT first"
        )


def _if(condition: bool, word: str) -> list[str]:
    return [word] if condition else []


def _transposed(program: Program, weight: str) -> bool:
    """Whether experts store [E, in, out]: then the program's canonical operand is computed by a transposition."""
    derived: Iterable[Any] = (
        w for w in program.weights.values() if w.recipe is not None and weight in w.sources
    )
    return any(
        "transpose" in str(n.target) or "permute" in str(n.target)
        for w in derived
        for n in w.recipe.graph.nodes
    )

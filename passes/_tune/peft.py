"""PEFT LoRA adapter folders: which weight they update, and by how much.

  1. `adapter_config.json` gives the size of the update: scaling = alpha / r, or alpha / sqrt(r)
     with rslora (arXiv 2312.03732). alpha comes from `alpha_pattern` if the module matches one of
     its patterns, r from the tensors.
  2. The update of a linear is scaling * B A: A [r, K], B [N, r].
  3. Fused experts are adapted as parameters (`target_parameters`): A [E r, K], expert by expert;
     B [N, r E], the expert running fastest. update_e = scaling * B[:, :, e] A[e], transposed if the
     experts are stored so. PEFT names such tensors by nesting (`experts.base_layer.lora_A`), the
     module's last adapted parameter outermost.
  4. Every tensor of the adapter must find its weight, or nothing is merged.

Not read, each with an error: DoRA and other variants; adapters that came with changed base weights
(PiSSA, OLoRA, ...); trained biases, embeddings and whole modules; an update of a weight that is
tied to another, because it would change both.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moecc.checkpoint.files import TensorFile
from moecc.checkpoint.reading import inside, read_json
from moecc.errors import MoeccError, quoted
from moecc.ir.program import Program
from moecc.passes._tune.update import Update

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(
    r"^(?:base_model\.model\.)?(.+?)((?:\.base_layer)*)\.lora_([AB])(?:\.default)?\.weight$"
)
# Options that change the meaning of the tensors, or that train something else too: with one of
# them, merging A and B alone would be wrong.
_UNKNOWN = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "modules_to_save",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
# Initialisations that leave the base weights as they are.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
Config = dict[str, Any]  # of adapter_config.json
Pairs = dict[tuple[str, int], dict[str, Tensor]]  # (module path, nesting) -> "A" and "B"


def adapter_files(owner: str, path: str) -> list[Path]:
    """The files that an adapter consists of.

    owner: the pass that was given it. Raise MoeccError if they cannot be read, before any work.
    """
    Adapter.read(owner, path)
    return [Path(path) / name for name in (_CONFIG, _TENSORS)]


def require_fitting(owner: str, path: str, program: Program) -> None:
    """Raise MoeccError if a tensor of the adapter finds no weight in `program`."""
    Adapter.read(owner, path).updates(program)


@dataclass
class Adapter:
    """An adapter folder: its configuration and its tensors."""

    folder: Path
    config: Config
    pairs: Pairs

    @classmethod
    def read(cls, owner: str, path: str) -> Adapter:
        """Read the adapter that the pass `owner` was given.

        Raise MoeccError if there is none, or if it holds more than plain LoRA matrices.
        """
        if not path:
            raise MoeccError(f"{owner}: no adapter given; write {owner}{{path=FOLDER}}")
        folder = Path(path)
        for name in (_CONFIG, _TENSORS):
            if not (folder / name).is_file():
                raise MoeccError(
                    f"{folder}: no {name}; give a folder that PEFT saved a LoRA adapter in"
                )
        config = read_json(folder / _CONFIG)
        _require_plain(folder, config)
        return cls(folder, config, _read_pairs(folder))

    def updates(self, program: Program) -> dict[str, Update]:
        """The update of each weight by its name.

        Raise MoeccError if a tensor fits no weight of `program`, or a weight tied to another.
        """
        found: dict[str, Update] = {}
        for (module, depth), pair in self.pairs.items():
            weight = self._weight(program, module, depth)
            if others := _tied_to(program, weight):
                raise MoeccError(
                    f"{self.folder}: the adapter updates {weight}, which is tied to "
                    f"{', '.join(others)}; untie them in the model (a tensor of its own for each, "
                    f"tie_word_embeddings=false), or leave {module} out of the adapter"
                )
            shape = tuple(program.store.shape(weight))  # type: ignore[union-attr]
            fused = (shape[0], _transposed(program, weight)) if len(shape) == 3 else ()
            scaling = self._scaling(weight.removesuffix(".weight"), pair["A"], shape)
            update = Update(pair["A"], pair["B"], scaling, *fused)
            if update.shape() != shape:
                raise MoeccError(
                    f"{self.folder}: the adapter of {weight} updates {list(update.shape())}, but "
                    f"the weight is {list(shape)}; give the model that the adapter was trained on"
                )
            found[weight] = update
        return found

    def _weight(self, program: Program, module: str, depth: int) -> str:
        """Step 3's names: the weight of `module` that the tensors at this nesting adapt."""
        stored = [] if program.store is None else program.store.names()
        names = [n for n in stored if n.rpartition(".")[0] == module]
        wanted = [str(t) for t in self.config.get("target_parameters") or ()]
        parameters = [n for n in names if any(n == t or n.endswith("." + t) for t in wanted)]
        if parameters and depth < len(parameters):
            return parameters[-1 - depth]
        if depth == 0 and f"{module}.weight" in names:
            return f"{module}.weight"
        raise MoeccError(
            f"{self.folder}: the model has no weight for the adapter of {quoted(module)}; "
            "give the model it was trained on"
        )

    def _scaling(self, key: str, a: Tensor, shape: tuple[int, ...]) -> float:
        """Step 1 for the module `key`."""
        patterns = self.config.get("alpha_pattern") or {}
        alpha = next(
            (v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", key)),
            self.config.get("lora_alpha"),
        )
        if not isinstance(alpha, int | float):
            raise MoeccError(f"{self.folder / _CONFIG}: no lora_alpha; save the adapter again")
        rank = len(a) // (shape[0] if len(shape) == 3 else 1)
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else max(rank, 1))


def _read_pairs(folder: Path) -> Pairs:
    pairs = Pairs()
    for key, tensor in TensorFile(inside(folder, _TENSORS)).items():
        match = _KEY.match(key)
        if not match:
            raise MoeccError(
                f"{folder}: {quoted(key)} is no LoRA matrix of a linear or of experts; "
                "merge it with PEFT first"
            )
        module, nesting, side = match.groups()
        pairs.setdefault((module, nesting.count("base_layer")), {})[side] = tensor
    for (module, _), pair in pairs.items():
        if len(pair) != 2:
            raise MoeccError(
                f"{folder}: {quoted(module)} has lora_{next(iter(pair))} alone; "
                "save the adapter again"
            )
    return pairs


def _tied_to(program: Program, weight: str) -> list[str]:
    """Other names of the checkpoint's tensor behind `weight`."""
    tied = {} if program.store is None else program.store.tied
    owner = tied.get(weight, weight)
    return [name for name in (owner, *tied) if name != weight and tied.get(name, name) == owner]


def _require_plain(folder: Path, config: Config) -> None:
    """Raise MoeccError if the configuration asks for more than scaling * B A."""
    if config.get("peft_type") != "LORA":
        raise MoeccError(
            f"{folder}: an adapter of type {quoted(config.get('peft_type'))}; moecc merges LORA, "
            "merge this one with PEFT first"
        )
    odd = [k for k in _UNKNOWN if config.get(k)]
    if config.get("bias") not in (None, "none"):
        odd.append("bias")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _PLAIN_STARTS:
        odd.append(f"init_lora_weights={start}")
    if odd:
        raise MoeccError(
            f"{folder}: {', '.join(odd)} in its {_CONFIG} can't be merged here; "
            "merge it with PEFT first"
        )


def _transposed(program: Program, weight: str) -> bool:
    """Whether experts are stored as [E, in, out].

    Then a transposition computes the program's canonical operand from them.
    """
    recipes = [w.recipe for w in program.weights.values() if weight in w.sources]
    targets = [str(n.target) for r in recipes if r is not None for n in r.graph.nodes]
    return any("transpose" in t or "permute" in t for t in targets)

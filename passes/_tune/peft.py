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

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moecc.checkpoint.files import TensorFile
from moecc.checkpoint.reading import inside
from moecc.errors import MoeccError, quoted
from moecc.ir.program import Program
from moecc.ir.tensors import nonfinite
from moecc.passes._tune.adapter_settings import Settings
from moecc.passes._tune.update import Update

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(
    r"^(?:base_model\.model\.)?(.+?)((?:\.base_layer)*)\.lora_([AB])(?:\.default)?\.weight$"
)
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
    """An adapter folder: its settings and its tensors."""

    folder: Path
    settings: Settings
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
        settings = Settings.read(folder / _CONFIG)
        return cls(folder, settings, _read_pairs(folder))

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
            rank, rest = divmod(len(pair["A"]), max(shape[0], 1) if fused else 1)
            scaling = self.settings.scaling(weight.removesuffix(".weight"), rank)
            update = Update(pair["A"], pair["B"], scaling, *fused)
            if update.shape() != shape or rest:
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
        wanted = self.settings.parameters
        parameters = [n for n in names if any(n == t or n.endswith("." + t) for t in wanted)]
        if parameters and depth < len(parameters):
            return parameters[-1 - depth]
        if depth == 0 and f"{module}.weight" in names:
            return f"{module}.weight"
        raise MoeccError(
            f"{self.folder}: the model has no weight for the adapter of {quoted(module)}; "
            "give the model it was trained on"
        )


def _read_pairs(folder: Path) -> Pairs:
    pairs = Pairs()
    for key, tensor in TensorFile(inside(folder, _TENSORS)).items():
        match = _KEY.match(key)
        if not match or tensor.dim() != 2 or not tensor.is_floating_point():
            raise MoeccError(
                f"{folder}: {quoted(key)} is no LoRA matrix of a linear or of experts; "
                "merge it with PEFT first"
            )
        if found := nonfinite(tensor):
            raise MoeccError(f"{folder}: {quoted(key)} holds {found}; train the adapter again")
        module, nesting, side = match.groups()
        pairs.setdefault((module, nesting.count("base_layer")), {})[side] = tensor
    for (module, _), pair in pairs.items():
        if len(pair) != 2:
            raise MoeccError(
                f"{folder}: {quoted(module)} has lora_{next(iter(pair))} alone; "
                "save the adapter again"
            )
        if (rank := len(pair["A"])) != (other := pair["B"].shape[1]):
            raise MoeccError(
                f"{folder}: {quoted(module)} has lora_A of rank {rank} and lora_B of rank {other}; "
                "save the adapter again"
            )
    return pairs


def _tied_to(program: Program, weight: str) -> list[str]:
    """Other names of the checkpoint's tensor behind `weight`."""
    tied = {} if program.store is None else program.store.tied
    owner = tied.get(weight, weight)
    return [name for name in (owner, *tied) if name != weight and tied.get(name, name) == owner]


def _transposed(program: Program, weight: str) -> bool:
    """Whether experts are stored as [E, in, out].

    Then a transposition computes the program's canonical operand from them.
    """
    recipes = [w.recipe for w in program.weights.values() if weight in w.sources]
    targets = [str(n.target) for r in recipes if r is not None for n in r.graph.nodes]
    return any("transpose" in t or "permute" in t for t in targets)

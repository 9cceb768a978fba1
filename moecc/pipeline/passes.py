"""What a pass is, and what it is given.

A pass is a frozen dataclass: its class attributes say what it is called and what it needs and gives (facts), its fields are its
options. `str(pass)` prints the text that builds it again: `vq{bits=3,codebook=layer}`.

  Pass        run(program, ctx)       once over the whole program
  LayerPass   run_layer(layer, ctx)   once per decoder layer; consecutive layer passes run layer by layer, so that a later layer is
                                      calibrated behind the compressed earlier ones (`own_round`: alone)
  Composite   expand()                a name for several passes

Facts in use: lora, sensitivity, budget, moments, basis, vq, affine, folded, routing, adapters, merged, absorbed, dense. `requires`
must hold before, `provides` holds after, `spoils` no longer does, `leads_to` must follow, `within_layer` is gone with the layer.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from moecc.errors import MoeccError
from moecc.ir import vq4
from moecc.ir.moe import MoE, Projection
from moecc.ir.program import Program
from moecc.options import Options, option
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.fate import Fate
from moecc.pipeline.stream import Stream
from moecc.types import Json

__all__ = ["Composite", "Context", "Kept", "Layer", "LayerPass", "MoeccError", "Pass", "option"]


@dataclass(frozen=True, kw_only=True)
class Pass(Options):
    """One named rewrite of a program."""

    requires: ClassVar[frozenset[str]] = frozenset()
    after: ClassVar[frozenset[str]] = (
        frozenset()
    )  # facts that come first where a pass of the pipeline provides them
    provides: ClassVar[frozenset[str]] = frozenset()
    spoils: ClassVar[frozenset[str]] = frozenset()
    leads_to: ClassVar[frozenset[str]] = (
        frozenset()
    )  # facts that must follow before the program can be stored
    needs_data: ClassVar[bool] = False  # whether calibration text must have been given
    within_layer: ClassVar[frozenset[str]] = (
        frozenset()
    )  # facts that lie in `Layer.data`, for one layer of one round
    makes_reference: ClassVar[bool] = (
        False  # whether what it leaves is the float model that later passes compare with
    )

    @abstractmethod
    def run(self, program: Program, ctx: Context) -> bool:
        """Rewrite `program` in place; return whether it changed."""

    def check(self, program: Program) -> None:
        """MoeccError where this pass cannot handle `program`, the model that a run starts from; asked before any pass runs."""
        return None

    def estimate(self, found: Estimate) -> None:
        """Change `found` as this pass would change what is stored, from sizes alone."""
        found.unknown.append(self.name)

    def files(self) -> list[Path]:
        """Files whose contents a run depends on besides model and text: an interrupted run goes on only with the same."""
        return [Path(self.file)] if self.file else []


@dataclass(frozen=True, kw_only=True)
class LayerPass(Pass):
    """A pass that works on one decoder layer at a time."""

    own_round: ClassVar[bool] = (
        False  # whether the passes before it finish all layers before it begins with the first
    )

    @abstractmethod
    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        """Rewrite the nodes of `layer` and the tensors behind them; return whether anything changed."""

    def run(self, program: Program, ctx: Context) -> bool:
        raise MoeccError(f"{self.name} is a layer pass; run it with moecc.pipeline.run")


@dataclass(frozen=True, kw_only=True)
class Composite(Pass):
    """A name for several passes; it never runs itself. An option that it lacks is passed on to the one of `parts` that has it."""

    parts: ClassVar[tuple[type[Pass], ...]]
    passed_on: tuple[tuple[str, Any], ...] = ()  # option of a part -> value

    @abstractmethod
    def stands_for(self) -> list[Pass]:
        """The passes it stands for, in order, but for the options that are passed on."""

    def expand(self) -> list[Pass]:
        """The passes it stands for, in order. MoeccError where an option is of a part that these options do not bring in."""
        found, given = self.stands_for(), dict(self.passed_on)
        for key in given:
            if not any(key in _option_names(p) for p in found):
                owner = next(p.name for p in self.parts if key in _option_names(p))
                raise MoeccError(
                    f"{self.name}: {key} is of {owner}, which is not part of it here; leave {key} out"
                )
        return [
            replace(p, **{k: v for k, v in given.items() if k in _option_names(p)}) for p in found
        ]

    @classmethod
    def build_from(cls, text: str, defaults: dict[str, Any] | None = None) -> Self:
        given, own = cls.read(text), _option_names(cls)
        passed_on = tuple((k, v) for k, v in given.items() if k not in own)
        return cls(
            **{**(defaults or {}), **{k: v for k, v in given.items() if k in own}},
            passed_on=passed_on,
        )

    @classmethod
    def option_called(cls, key: str) -> Field[Any]:
        if key in _option_names(cls):
            return super().option_called(key)
        owners = [p for p in cls.parts if key in _option_names(p)]
        if len(owners) > 1:
            names = ", ".join(p.name for p in owners)
            raise MoeccError(
                f"{cls.name}: {key} is an option of {names}; name these passes one by one"
            )
        return owners[0].option_called(key) if owners else super().option_called(key)

    def changed(self) -> dict[str, Any]:
        return {**super().changed(), **dict(self.passed_on)}

    def run(self, program: Program, ctx: Context) -> bool:
        raise MoeccError(f"{self.name} stands for {[str(p) for p in self.expand()]}; run those")


def _option_names(p: Pass | type[Pass]) -> set[str]:
    return {f.name for f in p.options()}


@dataclass(frozen=True)
class Kept:
    """What a pass over the whole model keeps of its work: tensors by name, read when asked, and facts that JSON holds."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Any = None


@dataclass(eq=False)
class Context:
    """What passes share during one run: the seed, the audit, how to show progress, and where an interrupted run finds its work."""

    seed: int = 0
    audit: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # weight name -> what became of it
    ledger: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # place and text of a pass -> stage -> its line
    notes: list[str] = field(
        default_factory=list
    )  # named lines of the audit: fallbacks, starved experts
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, label: items
    # (key, work) -> the same work, where a journal holds it on disk; key -> the last work so kept, by an interrupted run too
    keep: Callable[[str, Kept], Kept] = lambda key, work: work
    kept: Callable[[str], Kept | None] = lambda key: None
    # set when a run starts: the model as it was traced, the float model that passes compare with, and the calibration token ids
    traced: Program | None = None
    reference: Program | None = None
    batches: Sequence[Tensor] = ()
    # what passes over the whole model leave for later ones, by the fact that they provide
    data: dict[str, Any] = field(default_factory=dict)

    def seed_for(self, *key: object) -> int:
        """A seed that depends on the run's seed and `key` only, not on what ran before."""
        text = "/".join(map(str, (self.seed, *key)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")

    def once(self, key: str, make: Callable[[], Kept]) -> Kept:
        """What `make` gives, made only where no interrupted run has kept it under `key`, which is this use's alone."""
        found = self.kept(key)
        return self.keep(key, make()) if found is None else found

    def keep_experts(self, program: Program, keep: Mapping[str, Sequence[int]]) -> None:
        """Leave layers of the program, by path, with the experts `keep` (ascending) alone; for passes that make the reference."""
        program.keep_experts(keep)
        self.traced = program.copy()

    def record(self, name: str, **facts: Any) -> None:
        """Add to the audit's row of the weight `name` (of coded experts `path.gate_up` or `path.down`): values that JSON holds."""
        try:
            plain = json.dumps(facts, allow_nan=False, default=_fate_as_json)
            self.audit.setdefault(name, {}).update(json.loads(plain))
        except (TypeError, ValueError) as e:
            raise MoeccError(
                f"{name}: can't record {sorted(facts)} ({e}); give finite numbers, text, lists or dicts"
            ) from e


def _fate_as_json(value: Any) -> Json:
    if isinstance(value, Fate):
        return value.as_json()
    raise TypeError(f"{value!r} is nothing that JSON holds")


@dataclass(eq=False)
class Layer:
    """One decoder layer as a layer pass sees it.

    `program` is the program being compiled, `inputs` the activations that enter this layer in it (behind compressed earlier
    layers); `reference` is the float model, `targets` its activations after this layer (before it where this is the head: logits
    of all the text would fill the memory). `data` carries what passes leave for each other within the layer, by fact and path.
    """

    index: int
    program: Program
    reference: Program
    inputs: Stream
    targets: Stream
    data: dict[tuple[str, str], Any] = field(default_factory=dict)

    @property
    def moe(self) -> list[MoE]:
        """The experts nodes of this layer, dense or compressed."""
        return [m for m in self.program.moe_layers() if m.layer == self.index]

    def tap(self, names: Iterable[str]) -> dict[str, list[Any]]:
        """Run every calibration batch through this layer and return the values of the nodes called `names`, batch by batch."""
        return self.inputs.tap(self.index, names)

    def weight(self, projection: Projection, part: str = "") -> Tensor | None:
        """The program's float32 tensor of a projection (or of a `part`, such as its bias), None if it has none."""
        return _float(self.program, projection, part)

    def original(self, projection: Projection, part: str = "") -> Tensor | None:
        """The float model's."""
        same = next(m for m in self.reference.moe_layers() if m.path == projection.moe.path)
        return _float(self.reference, replace(projection, moe=same), part)

    def stored(self, projection: Projection) -> dict[str, Tensor | None]:
        """A coded projection's tensors in the types that they are stored in, by the names of `vq4.TENSORS`."""
        nodes = {part: projection.operand(part) for part in vq4.TENSORS}
        return {
            part: None if node is None else self.program.value(node) for part, node in nodes.items()
        }


def _float(program: Program, projection: Projection, part: str) -> Tensor | None:
    node = projection.operand(part)
    return None if node is None else program.value(node).to(torch.float32)

"""The interface of a pass, and the objects that a run hands to it.

A pass is a frozen dataclass. Its class attributes are its name and the facts that it needs and
provides; its fields are its options. `str(pass)` prints the text that builds it again, such as
`vq{bits=3,codebook=layer}`.

  Pass        run(program, ctx)      once over the whole program
  LayerPass   run_layer(layer, ctx)  once per decoder layer; consecutive layer passes run layer by
                                     layer, so that a later layer is calibrated behind the
                                     compressed earlier ones (`own_round`: alone)
  Composite   expand()               a name for several passes

Facts in use: lora, sensitivity, budget, moments, basis, vq, affine, folded, routing, adapters,
merged, absorbed, dense.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from moecc.errors import MoeccError, naming
from moecc.ir import vq4
from moecc.ir.moe import MoE, Projection
from moecc.ir.program import Program
from moecc.options import Options, option
from moecc.pipeline import recorded
from moecc.pipeline.estimate import Estimate
from moecc.pipeline.fate import Fate
from moecc.pipeline.stream import Stream
from moecc.pipeline.work import Scope, Work
from moecc.pipeline.workers.base import Alone, Workers
from moecc.types import Json, Progress, Value

__all__ = ["Composite", "Context", "Kept", "Layer", "LayerPass", "MoeccError", "Pass", "option"]


@dataclass(frozen=True, kw_only=True)
class Pass(Options):
    """One named rewrite of a program."""

    requires: ClassVar[frozenset[str]] = frozenset()  # facts that must hold before
    # facts whose providers, if there are any in the pipeline, come first
    after: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()  # facts that hold after
    spoils: ClassVar[frozenset[str]] = frozenset()  # facts that no longer hold after
    # facts that a later pass must provide before the program can be stored
    leads_to: ClassVar[frozenset[str]] = frozenset()
    needs_data: ClassVar[bool] = False  # whether it needs calibration text
    # whether it measures what errors of the experts' outputs cost, for passes that code
    weighs_errors: ClassVar[bool] = False
    # facts that lie in `Layer.data`, and so hold for one layer of one round
    within_layer: ClassVar[frozenset[str]] = frozenset()
    # whether it leaves the float model that later passes compare with
    makes_reference: ClassVar[bool] = False

    @abstractmethod
    def run(self, program: Program, ctx: Context) -> bool:
        """Rewrite `program` in place; return whether it changed."""

    def check(self, program: Program) -> None:
        """Raise MoeccError if this pass cannot handle `program`; asked before any pass runs."""
        return None

    def estimate(self, found: Estimate) -> None:
        """Change `found` as this pass would change the stored bits; uses sizes only."""
        found.unknown.append(self.name)

    def widths(self) -> Collection[int]:
        """Return the bits of the codes that this pass may choose, if any."""
        return ()

    def work(self, scope: Scope) -> Work:
        """Return the work of this pass over all layers, from sizes only."""
        return Work(known=False)

    def machinery(self, device: torch.device) -> str:
        """Return what of this machine the last bits of a result depend on, in a word or two.

        device: the one that the run computes on, whose kind counts anyway. An interrupted run goes
        on only where all this is the same. Raise MoeccError if something that the pass needs of the
        machine fails.
        """
        return ""

    def files(self) -> list[Path]:
        """Return the files, besides model and text, on whose contents a run depends.

        An interrupted run goes on only if they are unchanged.
        """
        return [Path(self.file)] if self.file else []


@dataclass(frozen=True, kw_only=True)
class LayerPass(Pass):
    """A pass that works on one decoder layer at a time."""

    # whether the passes before it finish all layers before it begins
    own_round: ClassVar[bool] = False

    @abstractmethod
    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        """Rewrite the nodes and tensors of `layer`; return whether anything changed."""

    def run(self, program: Program, ctx: Context) -> bool:
        raise MoeccError(f"{self.name} is a layer pass; run it with moecc.pipeline.run.run_passes")


@dataclass(frozen=True, kw_only=True)
class Composite(Pass):
    """A name for several passes; it never runs itself.

    An option that it lacks is passed on to the one of `parts` that has it.
    """

    parts: ClassVar[tuple[type[Pass], ...]]
    # option of a part -> value; printed as if it were an option of the composite
    passed_on: tuple[tuple[str, object], ...] = field(default=(), metadata={"printed": True})

    @abstractmethod
    def stands_for(self) -> list[Pass]:
        """Return the passes, in order, without the options that are passed on."""

    def expand(self) -> list[Pass]:
        """Return the passes, in order.

        Raise MoeccError for an option of a part that does not occur among them.
        """
        with naming(self):
            found, given = self.stands_for(), dict(self.passed_on)
        if not isinstance(found, list) or not all(isinstance(p, Pass) for p in found):
            raise MoeccError(f"{self} stands for {found!r}; give a list of passes")
        for key in given:
            if not any(key in _option_names(p) for p in found):
                owner = next(p.name for p in self.parts if key in _option_names(p))
                why = f"{key} is of {owner}, which is not part of it here"
                raise MoeccError(f"{self.name}: {why}; leave {key} out")
        return [_with_known(p, given) for p in found]

    @classmethod
    def build_from(cls, text: str, defaults: Json | None = None) -> Self:
        given, own = cls.read(text), _option_names(cls)
        kept = {k: v for k, v in given.items() if k in own}
        passed_on = tuple((k, v) for k, v in given.items() if k not in own)
        return cls(**{**(defaults or {}), **kept}, passed_on=passed_on)

    @classmethod
    def option_names(cls) -> set[str]:
        return super().option_names().union(*(p.option_names() for p in cls.parts))

    @classmethod
    def option_called(cls, key: str) -> Field[object]:
        if key in _option_names(cls):
            return super().option_called(key)
        owners = [p for p in cls.parts if key in _option_names(p)]
        if len(owners) > 1:
            names = ", ".join(p.name for p in owners)
            raise MoeccError(
                f"{cls.name}: {key} is an option of {names}; name these passes one by one"
            )
        return owners[0].option_called(key) if owners else super().option_called(key)

    def changed(self) -> Json:
        return {**super().changed(), **dict(self.passed_on)}

    def run(self, program: Program, ctx: Context) -> bool:
        raise MoeccError(f"{self.name} stands for {[str(p) for p in self.expand()]}; run those")


def _option_names(p: Pass | type[Pass]) -> set[str]:
    return {f.name for f in p.options()}


def _with_known(p: Pass, given: Json) -> Pass:
    """Return the pass with those of the given options that it has."""
    return replace(p, **{k: v for k, v in given.items() if k in _option_names(p)})


@dataclass(frozen=True)
class Kept:
    """The work that a pass over the whole model keeps: tensors by name, read on demand, and facts.

    facts: any value that JSON holds.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Any = None


UNIT = "unit "  # how names of the work begin that a unit kept


@dataclass(eq=False)
class Context:
    """The state that passes share during one run."""

    seed: int = 0
    audit: dict[str, Json] = field(default_factory=dict)  # weight name -> its row
    # place and text of a pass -> stage -> its line
    ledger: dict[str, dict[str, Json]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # remarks: fallbacks, starved experts
    progress: Progress = lambda items, label: items
    # (key, work) -> the same work, on disk if there is a journal
    keep: Callable[[str, Kept], Kept] = lambda key, work: work
    # key -> the last work kept under it, by an interrupted run too
    kept: Callable[[str], Kept | None] = lambda key: None
    forget: Callable[[str], None] = lambda key: None  # the work kept under a key
    spare: int = 1 << 30  # bytes that weights may take where they stay in memory
    # who computes units of work: `workers.run(function, units, shared)`
    workers: Workers = field(default_factory=Alone)
    # set when a run starts: the traced model, the float model that passes compare with, and the
    # calibration token ids
    traced: Program | None = None
    reference: Program | None = None
    batches: Sequence[Tensor] = ()
    # data that passes over the whole model leave for later ones, by the fact that they provide
    data: dict[str, Any] = field(default_factory=dict)

    def seed_for(self, *key: object) -> int:
        """Return a seed that depends on the run's seed and `key` only, not on earlier passes."""
        text = "/".join(map(str, (self.seed, *key)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")

    def once(self, key: str, make: Callable[[], Kept]) -> Kept:
        """Return the work that an interrupted run kept under `key`, or make and keep it.

        The key must be unique to this use.
        """
        found = self.kept(key)
        return self.keep(key, make()) if found is None else found

    def results(
        self,
        function: Callable[..., Mapping[str, Tensor]],
        units: Sequence[tuple[str, Callable[[], object]]],
        shared: object = None,
    ) -> Iterator[Mapping[str, Tensor]]:
        """Yield the result of every unit of work, in order; an interrupted run's are taken up.

        function: of a unit and of what all share, as `Workers.run` takes it. units: a name that
        tells each from all others of the run, and a function that makes it.
        """
        kept = {name: self.kept(UNIT + name) for name, _ in units}
        left = (make() for name, make in units if kept[name] is None)
        made = self.workers.run(function, left, shared)
        for name, _ in units:
            found = kept[name] or self.keep(UNIT + name, Kept(_in_memory(next(made))))
            yield found.tensors

    def keep_experts(self, program: Program, keep: Mapping[str, Sequence[int]]) -> None:
        """Keep only the experts `keep` (ascending) of layers, by path.

        For passes that make the reference. Raise MoeccError if a layer cannot have so many experts,
        or if a pass has coded experts or linears already.
        """
        program.keep_experts(keep)
        self.traced = program.copy()

    def record(self, name: str, **facts: object) -> None:
        """Add facts to a weight's row of the audit.

        name: of coded experts, `path.gate_up` or `path.down`. facts: fates, or values that JSON
        holds; raise MoeccError for any other, and for one that report.html can't show.
        """
        recorded.require(name, facts)
        try:
            plain = json.dumps(facts, allow_nan=False, default=_fate_as_json)
            self.audit.setdefault(name, {}).update(json.loads(plain))
        except (TypeError, ValueError) as e:
            advice = "give finite numbers, text, lists or dicts"
            raise MoeccError(f"{name}: can't record {sorted(facts)} ({e}); {advice}") from e


def _in_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _fate_as_json(value: object) -> Json:
    if isinstance(value, Fate):
        return value.as_json()
    raise TypeError(f"{value!r} is nothing that JSON holds")


@dataclass(eq=False)
class Layer:
    """One decoder layer as a layer pass sees it.

    program, inputs: the program being compiled, and the activations that enter this layer in it,
    behind compressed earlier layers. reference, unmoved: the float model, and its activations
    somewhere before the end of this layer, which go on if `targets` are asked for. data: what
    passes leave for each other within the layer, by fact and path.
    """

    index: int
    program: Program
    reference: Program
    inputs: Stream
    unmoved: Stream
    data: dict[tuple[str, str], Any] = field(default_factory=dict)

    @property
    def moe(self) -> list[MoE]:
        """The experts nodes of this layer, dense or compressed."""
        return [m for m in self.program.moe_layers() if m.layer == self.index]

    @property
    def targets(self) -> Stream:
        """The float model's activations after this layer.

        If the layer is a head without experts, before it, because the logits of all calibration
        text would fill the memory.
        """
        head = self.index == self.program.layers - 1 and not self.moe
        return self._float_at(self.index + (not head))

    def _float_at(self, stage: int) -> Stream:
        while self.unmoved.stage < stage:
            self.unmoved.advance()
        return self.unmoved

    def tap(self, names: Iterable[str], *, original: bool = False) -> dict[str, list[Value]]:
        """Run every calibration batch through this layer; return the values of the named nodes.

        original: through the float model's layer, behind its earlier ones; not once `targets` were
        asked for.
        """
        return (self._float_at(self.index) if original else self.inputs).tap(self.index, names)

    def weight(
        self, projection: Projection, part: str = "", experts: Sequence[int] | None = None
    ) -> Tensor | None:
        """Return a projection's float32 tensor, or that of a `part` such as its bias, if any.

        experts: read only these. All experts of a large layer may not fit into memory.
        """
        return _float(self.program, projection, part, experts)

    def original(
        self, projection: Projection, part: str = "", experts: Sequence[int] | None = None
    ) -> Tensor | None:
        """Return the same tensor of the float model."""
        same = replace(projection, moe=self._originals[projection.moe.path])
        return _float(self.reference, same, part, experts)

    @cached_property
    def _originals(self) -> dict[str, MoE]:
        """The experts nodes of the float model by path; to find them takes a while."""
        return {m.path: m for m in self.reference.moe_layers()}

    def stored(self, projection: Projection) -> dict[str, Tensor | None]:
        """Return a coded projection's stored tensors, by the names of `vq4.TENSORS`."""
        nodes = {part: projection.operand(part) for part in vq4.TENSORS}
        value = self.program.value
        return {part: None if node is None else value(node) for part, node in nodes.items()}


def _float(
    program: Program, projection: Projection, part: str, experts: Sequence[int] | None
) -> Tensor | None:
    node = projection.operand(part)
    return None if node is None else program.value(node, experts).to(torch.float32)

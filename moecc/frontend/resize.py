"""Make a model with fewer experts: its configuration, graph and weights, as if it were made so.

  1. the family's configuration gets the new number; transformers' families have one for all layers
  2. the model is traced again from it: the graph, router included, is what the family's code does
     with so many experts
  3. each parameter whose declared shape has changed is cut to the experts that stay
     (`moecc.checkpoint.cut`)

Routers that choose groups of experts first keep equally many in each group. A family that looks
experts up in a table, or whose parameters change otherwise, is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, fx, nn

from moecc.checkpoint.cut import Cut, CutStore
from moecc.errors import MoeccError
from moecc.frontend.config import text_config
from moecc.frontend.skeleton import EXPERT_COUNTS, Skeleton
from moecc.ir import ops
from moecc.ir.moe import MoE
from moecc.ir.program import Program
from moecc.ir.text import target_text
from moecc.types import Config

_GROUPS = ("n_group", "num_expert_group", "num_expert_groups")


# a configuration -> the program without weights that a trace of it gives, and the model
Build = Callable[[Config], tuple[Program, nn.Module]]


@dataclass(frozen=True)
class Remade:
    """The graph for another number of experts.

    shapes: of its parameters. edits: entries of the configuration that changed, by dotted name.
    """

    program: Program
    shapes: Mapping[str, tuple[int, ...]]
    edits: Mapping[str, object]


def expert_groups(config: Config) -> int:
    """Return the number of groups of neighbouring experts from which the router chooses first."""
    part = text_config(config)
    return next((n for key in _GROUPS if (n := getattr(part, key, None))), 1)


class Resizer:
    """Makes programs of one traced model that have fewer experts."""

    def __init__(self, found: Skeleton, build: Build):
        self.found, self.build = found, build
        self.made: dict[tuple[int, ...], Remade] = {}  # by the number of experts in each layer

    def groups(self, program: Program) -> int:
        """Return the number of groups from which the router chooses first.

        Equally many experts must stay in each.
        """
        return expert_groups(program.config)

    def require(self, program: Program, counts: Mapping[str, int]) -> None:
        """Raise MoeccError, with the possible numbers, if the model can't have so many experts.

        counts: number of experts by the layer's path.
        """
        self._remade(program, counts)

    def resize(self, program: Program, keep: Mapping[str, Sequence[int]]) -> Program:
        """Return the program whose layers have only the experts `keep` (ascending), by path.

        Raise MoeccError as `require` does, if the program has no weights, or if passes have coded
        some already: the graph is traced again, and their nodes would be lost.
        """
        counts = {path: len(rows) for path, rows in keep.items()}
        remade, store = self._remade(program, counts), program.store
        if store is None:
            raise MoeccError(
                f"{self.found.name}: no experts can be taken out, it was traced without weights; "
                "give a checkpoint folder or hub id"
            )
        _require_uncoded(program, remade.program)
        made, cuts = remade.program.copy(), _cuts(program, remade.shapes, keep)
        made.store, made.source = CutStore(store, cuts), program.source
        made.config_edits = {**program.config_edits, **remade.edits}
        numbers = {m.path: range(m.sizes[0]) for m in program.moe_layers()} | program.kept
        made.kept = program.kept | {
            path: tuple(numbers[path][e] for e in rows) for path, rows in keep.items()
        }
        made.resizer = self
        parameters = set(store.names())
        # a buffer that the constructor computed; the checkpoint's counts
        for name in parameters & made.tensors.keys():
            made.tensors.pop(name)
        for name in program.tensors:  # rewritten before, such as by a merged adapter
            if name in parameters:
                read, cut = program.tensors.reader(name).whole, cuts.get(name)
                made.tensors.spill(name, read if cut is None else partial(_read_cut, read, cut))
        made.rounded = program.rounded & parameters
        made.facts = set(program.facts)
        return made

    def _remade(self, program: Program, counts: Mapping[str, int]) -> Remade:
        """Return the graph for so many experts in each layer, without weights."""
        if self.found.folder is None and self.found.mode is None:
            raise MoeccError(
                f"{self.found.name}: the number of experts of a module in memory can't change; "
                "save it and give its folder"
            )
        wanted = {m.path: counts.get(m.path, m.sizes[0]) for m in program.moe_layers()}
        key = tuple(wanted.values())
        if key not in self.made:
            self.made[key] = self._remake(program, wanted)
        return self.made[key]

    def _remake(self, program: Program, wanted: Mapping[str, int]) -> Remade:
        _require_choice(self.found.name, program, wanted, self.groups(program))
        config, edits = _edited(self.found.name, program, wanted)
        many = " or ".join(sorted({str(n) for n in wanted.values()}))
        try:
            made, model = self.build(config)
        except MoeccError as error:
            raise MoeccError(f"{self.found.name} can't have {many} experts: {error}") from error
        got = {m.path: m.sizes[0] for m in made.moe_layers()}
        if got != dict(wanted):
            layer = next(path for path in wanted if got.get(path) != wanted[path])
            raise MoeccError(
                f"{self.found.name}: {layer} can't have {wanted[layer]} experts: "
                "its configuration has one number for all layers; keep as many in each"
            )
        _require_no_table(self.found.name, program, model)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return Remade(made, shapes, edits)


def _read_cut(read: Callable[[], Tensor], cut: Cut) -> Tensor:
    return cut.apply(read())


def _require_uncoded(program: Program, remade: Program) -> None:
    """Raise MoeccError if passes have made nodes of `program` other than the trace has them."""
    traced = set(_codable(remade))
    for path, target in _codable(program):
        if (path, target) not in traced:
            raise MoeccError(
                f"{path}: a pass made it {target_text(target)} already, which would be lost; "
                "take experts out before that, in a pass with makes_reference = True"
            )


def _codable(program: Program) -> Iterator[tuple[str, fx.node.Target]]:
    """Yield path and op of the nodes that passes make coded ones, or have made so."""
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in ops.MOE_OPS | {ops.Q_LINEAR}:
            yield node.meta["path"], node.target


def _require_choice(name: str, program: Program, wanted: Mapping[str, int], groups: int) -> None:
    """Raise MoeccError if a token could not choose its experts any more."""
    part = text_config(program.config)
    for moe in program.moe_layers():
        count, before = wanted[moe.path], moe.sizes[0]
        if not moe.top_k <= count <= before:
            raise MoeccError(
                f"{name}: {moe.path} can't have {count} experts; a token takes {moe.top_k}, "
                f"so {moe.top_k} to {before} are possible"
            )
        if groups > 1:
            chosen = int(getattr(part, "topk_group", None) or groups)
            least = max(2, -(-moe.top_k // chosen))
            if count % groups or count // groups < least:
                raise MoeccError(
                    f"{name}: {moe.path} can't have {count} experts; its router chooses from "
                    f"{groups} groups, so multiples of {groups} from {groups * least} to {before} "
                    "are possible"
                )


def _edited(
    name: str, program: Program, wanted: Mapping[str, int]
) -> tuple[Config, dict[str, object]]:
    """Return the configuration for so many experts, and what changed in it by dotted entry."""
    config = copy.deepcopy(program.config)
    before = {m.path: m.sizes[0] for m in program.moe_layers()}
    part, prefix = text_config(config), ""
    if part is not config:
        prefix = next((f"{k}." for k, v in vars(config).items() if v is part), "")
    if (inner := getattr(part, "ffn_config", None)) is not None:
        part, prefix = inner, prefix + "ffn_config."
    aliases = getattr(type(part), "attribute_map", {})  # the file's may be anything
    edits: dict[str, object] = {}
    for key in dict.fromkeys(aliases.get(key, key) for key in EXPERT_COUNTS):
        value = getattr(part, key, None)
        if isinstance(value, int) and value in before.values():
            edits[key] = next(iter(wanted.values()))
    if not edits:
        raise MoeccError(
            f"{name}: moecc knows no number of experts in its configuration, so it can't change"
        )
    for key, value in edits.items():
        setattr(part, key, value)
    return config, {prefix + key: value for key, value in edits.items()}


def _require_no_table(name: str, program: Program, model: nn.Module) -> None:
    """Raise MoeccError if numbers of experts may be stored as numbers.

    Taking experts out would change what they mean.
    """
    store = program.store
    for entry, tensor in model.state_dict().items():
        whole = not tensor.is_floating_point() and tensor.dim() > 0
        if whole and store is not None and entry in store:
            raise MoeccError(
                f"{name}: {entry} holds whole numbers, which may stand for experts; "
                "its number of experts can't change"
            )


def _cuts(
    program: Program, shapes: Mapping[str, tuple[int, ...]], keep: Mapping[str, Sequence[int]]
) -> dict[str, Cut]:
    """Return the cut of each parameter of `program` whose shape changes."""
    assert program.store is not None
    moes = {m.path: m for m in program.moe_layers()}
    cuts = {}
    for name in program.store.names():
        old, new = tuple(program.store.shape(name)), shapes.get(name)
        if new is None or old == new or name in program.store.tied:
            continue
        moe = _layer_of(name, list(moes.values()))
        cut = None if moe is None else _cut(old, new, moe.sizes[0], keep[moe.path])
        if cut is None:
            raise MoeccError(
                f"{name} would change from {list(old)} to {list(new)} with the number of experts; "
                "moecc doesn't know how, so it can't change for this family"
            )
        cuts[name] = cut
    return cuts


def _layer_of(name: str, moes: Sequence[MoE]) -> MoE | None:
    """Return the MoE layer whose path shares most with a parameter's name; None if several do."""
    parts = name.split(".")

    def shared(moe: MoE) -> int:
        pairs = zip(parts, moe.path.split("."), strict=False)
        return next(
            (i for i, (a, b) in enumerate(pairs) if a != b),
            min(len(parts), moe.path.count(".") + 1),
        )

    most = max(map(shared, moes))
    found = [m for m in moes if shared(m) == most]
    return found[0] if len(found) == 1 else None


def _cut(
    old: tuple[int, ...], new: tuple[int, ...], experts: int, keep: Sequence[int]
) -> Cut | None:
    """Return the cut from one shape to another if the experts `keep` of so many stay.

    None if there is no such cut.
    """
    differ = [i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
    if len(old) != len(new) or len(differ) != 1:
        return None
    (dim,) = differ
    before, after = old[dim], new[dim]
    each = before // experts
    if before == experts * each and after == len(keep) * each:
        return Cut(dim, tuple(e * each + i for e in keep for i in range(each)))
    if before - after == experts - len(keep) and before > experts:
        return Cut(dim, (*keep, *range(experts, before)))
    return None

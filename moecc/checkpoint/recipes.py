"""Which checkpoint tensors make each tensor of a model, matched by name as transformers does it.

transformers renames checkpoint tensors and converts them: a converter merges per-expert tensors
into one, or splits one tensor into several. `Recipes` applies these rules to names alone, before
anything is read. `Recipe.make` runs one converter on tensors.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moecc.errors import MoeccError, quoted
from moecc.types import FamilyModule


@dataclass
class Recipe:
    """How checkpoint tensors make one tensor of a model, or several if the converter splits."""

    target: str
    converter: WeightConverter | None
    # source pattern -> names of checkpoint tensors, in the order of the experts
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        return [key for keys in self.sources.values() for key in keys]

    @property
    def per_expert(self) -> bool:
        """Whether each expert and projection has a tensor that no later step mixes with others."""
        if self.converter is None:
            return False
        first, *rest = self.converter.operations
        stacks = isinstance(first, MergeModulelist) and first.dim == 0
        return stacks and all(isinstance(op, Concatenate) and op.dim > 0 for op in rest)

    def make(
        self,
        model: FamilyModule,
        load: Callable[[str], Tensor],
        experts: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Return the tensors of the model that `load`, called by checkpoint name, gives.

        experts: only those of a `per_expert` recipe, in that order.
        """
        if self.converter is None:
            return {self.target: load(self.keys[0])}
        converter = copy.deepcopy(self.converter)  # it collects the tensors it is given
        for pattern, keys in self.sources.items():
            for key in keys if experts is None else [keys[e] for e in experts]:
                # It wants a Future, but calls whatever is callable.
                converter.add_tensor(self.target, key, pattern, cast(Any, partial(load, key)))
        made = converter.convert(self.target, model=model, config=model.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }


class Recipes:
    """The recipe of every tensor of `model` that a checkpoint with tensors `keys` can make.

    declared: the model's `state_dict`. tied: names that share the tensor of another name.
    missing: names that nothing makes. unexpected: checkpoint tensors that nothing takes.
    ignored: those that transformers says to leave, such as a multi-token-prediction head.
    """

    def __init__(self, model: FamilyModule, keys: Iterable[str]) -> None:
        self.model = model
        self.declared: dict[str, Tensor] = model.state_dict()
        self._recipes: dict[str, Recipe] = {}
        unmatched = self._match(keys)
        self.tied = self._find_tied()
        skip = _pattern(getattr(model, "_keys_to_ignore_on_load_missing", None))
        self.missing = [n for n in self.declared if n not in self and not (skip and skip.search(n))]
        skip = _pattern(
            getattr(model, "_keys_to_ignore_on_load_unexpected", None),
            _moved_buffers(name for name, _ in model.named_buffers()),
        )
        ignored = {key for key, name in unmatched.items() if skip and skip.search(name)}
        self.ignored = sorted(ignored, key=dot_natural_key)
        self.unexpected = [key for key in unmatched if key not in ignored]

    def __contains__(self, name: object) -> bool:
        return name in self._recipes or name in self.tied

    def get(self, name: str) -> Recipe | None:
        """Return the recipe that makes `name` or the tensor it is tied to."""
        return self._recipes.get(self.tied.get(name, name))

    def groups(self) -> list[tuple[Recipe, list[str]]]:
        """Return each recipe once, with the names of the tensors that it makes."""
        names: dict[int, list[str]] = defaultdict(list)
        for name, recipe in self._recipes.items():
            names[id(recipe)].append(name)
        return [(self._recipes[group[0]], group) for group in names.values()]

    def _match(self, keys: Iterable[str]) -> dict[str, str]:
        """Give every checkpoint tensor to a recipe; return the rest with their renamed names."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        left: dict[str, str] = {}
        # Natural order: expert 10 follows expert 9, and a stateful renaming sees its guard first.
        for key in sorted(keys, key=_in_order):
            name, pattern = self._rename(key, renamings, converters)
            if name not in self.declared and key in self.declared:
                name, pattern = self._rename(key, [], [])
            converter = by_pattern[pattern] if pattern is not None else None
            if name not in self.declared or not self._take(name, converter, pattern or key, key):
                left[key] = name
        return left

    def _rename(
        self, key: str, renamings: list[WeightRenaming], converters: list[WeightConverter]
    ) -> tuple[str, str | None]:
        return rename_source_key(
            key, renamings, converters, self.model.base_model_prefix, self.declared
        )

    def _take(self, name: str, converter: WeightConverter | None, pattern: str, key: str) -> bool:
        recipe = self._recipes.get(name)
        if recipe is None:
            recipe = Recipe(name, converter)
            first, *others = converter.target_patterns if converter else [name]
            for sibling in [name, *(name.replace(first, other) for other in others)]:
                if sibling in self.declared:
                    self._recipes[sibling] = recipe
        elif recipe.converter is not converter or converter is None:
            return False  # a second way to make the same tensor: the first one counts
        recipe.sources.setdefault(pattern, []).append(key)
        return True

    def _find_tied(self) -> dict[str, str]:
        """Tie only names without a tensor of their own: if both are stored, each is read."""
        groups: dict[str, set[str]] = defaultdict(set)
        for alias, owner in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            groups[owner] |= {alias, owner}
        tied: dict[str, str] = {}
        for owner, names in groups.items():
            stored = [n for n in [owner, *sorted(names - {owner})] if n in self._recipes]
            tied.update({n: stored[0] for n in names if stored and n not in self._recipes})
        return tied


def _in_order(key: str) -> Any:
    """Return what transformers sorts names by; raise MoeccError if it can't sort this one."""
    try:
        return dot_natural_key(key)
    except ValueError as error:  # a part of digits that isn't a number, or too long for one
        raise MoeccError(
            f"the checkpoint has a tensor {quoted(key)}, whose number can't be read: fetch it again"
        ) from error


def _pattern(patterns: Iterable[str] | None, more: Iterable[str] = ()) -> re.Pattern[str] | None:
    every = sorted([*(patterns or ()), *more])
    return re.compile("|".join(f"({p})" for p in every)) if every else None


def _moved_buffers(buffers: Iterable[str]) -> list[str]:
    """Return patterns of buffers that old checkpoints store and newer models compute.

    transformers skips them too.
    """
    leaves = {name.rpartition(".")[2] for name in buffers}
    moved = {"inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
    return [pattern for leaf, pattern in moved.items() if leaf in leaves]

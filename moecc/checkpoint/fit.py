"""Whether a checkpoint fits a model, found from names, dtypes and shapes; no weight is read.

The recipes run on tensors without storage that have the shapes of the file headers, so a
checkpoint that doesn't fit is refused within seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moecc.checkpoint.low_bit import Entry
from moecc.checkpoint.recipes import Recipe, Recipes
from moecc.checkpoint.schema import Compression
from moecc.errors import MoeccError, quoted, reason

_MOST_LEFT_OUT = 100_000  # tensors: those of the largest models would do, with one layer configured
# Checkpoint tensors that one of a model is made of at most: gate and up of an expert, each with its
# scale; queries, keys and values with theirs.
_PER_EXPERT, _PER_TENSOR = 4, 8
CHECK_CONFIG = "check that config.json belongs to these weights"


def require_few(folder: Path, count: int, model: nn.Module) -> None:
    """Raise MoeccError if `folder` has many more tensors than make the model.

    count: how many. Names are matched by many patterns, so that this comes before.
    """
    declared = model.state_dict().values()
    made_of = sum(_PER_EXPERT * t.shape[0] if t.dim() > 2 else _PER_TENSOR for t in declared)
    if count > made_of + _MOST_LEFT_OUT:
        raise MoeccError(
            f"{folder} has {count} tensors, and the model is made of {made_of} at most; "
            f"{CHECK_CONFIG}"
        )


@dataclass(frozen=True)
class Fit:
    """The checks of the tensors `entries` in `folder` against the recipes of a model."""

    folder: Path
    entries: Mapping[str, Entry]
    recipes: Recipes

    def check(self) -> None:
        """Raise MoeccError for a missing or quantized tensor, or for a shape that doesn't fit."""
        if self.recipes.missing:
            raise self._missing()
        if len(self.recipes.unexpected) > _MOST_LEFT_OUT:
            raise MoeccError(
                f"{self.folder} has {len(self.recipes.unexpected)} tensors that fit nothing in the "
                f"model, more than moecc leaves out; {CHECK_CONFIG}"
            )
        for recipe, names in self.recipes.groups():
            self._check_recipe(recipe, names)

    def _missing(self) -> MoeccError:
        missing, unexpected = self.recipes.missing, self.recipes.unexpected
        lost = f"{len(missing)} of {len(self.recipes.declared)} missing"
        hint = (
            f", {len(unexpected)} fit nothing, e.g. {quoted(unexpected[0])}" if unexpected else ""
        )
        todo = self._quantized() or f"{CHECK_CONFIG}, or fetch them again"
        return MoeccError(f"{self.folder} has no tensor for '{missing[0]}' ({lost}{hint}); {todo}")

    def _quantized(self) -> str:
        config = self.recipes.model.config
        by_another = Compression.of(config) == Compression()  # an artifact lacks what was damaged
        if getattr(config, "quantization_config", None) and by_another:
            return "the checkpoint is quantized already; use one in bf16, fp16 or fp32"
        return ""

    def _check_recipe(self, recipe: Recipe, names: list[str]) -> None:
        declared = self.recipes.declared
        for key in recipe.keys:
            self._check_dtype(self.entries[key], declared[names[0]])
        if recipe.per_expert:
            self._check_experts(recipe)
        first = self.entries[recipe.keys[0]]
        what = f"{quoted(first.name)} in {first.file} is {list(first.shape)}"
        try:
            made = recipe.make(self.recipes.model, self._without_storage)
        # Converters check little, so torch may raise anything for shapes they don't expect.
        except Exception as error:
            raise MoeccError(
                f"{what} and doesn't merge into '{recipe.target}' with its siblings: "
                f"{reason(error)}"
            ) from error
        for name in names:
            got = list(made[name].shape) if name in made else None
            want = list(declared[name].shape)
            if got != want:
                what += f", which makes '{name}' {got}" if got != list(first.shape) else ""
                raise MoeccError(
                    f"{what}, but config.json implies {want}; check that it belongs to these "
                    "weights"
                )

    def _without_storage(self, key: str) -> Tensor:
        return torch.empty(self.entries[key].shape, device="meta")

    def _check_dtype(self, entry: Entry, declared: Tensor) -> None:
        if declared.is_floating_point():
            fits = entry.dtype.is_floating_point and entry.dtype.itemsize > 1
            todo = self._quantized()
        else:
            fits, todo = torch.promote_types(entry.dtype, declared.dtype) == declared.dtype, ""
        if not fits:
            raise MoeccError(
                f"{quoted(entry.name)} in {entry.file} is {entry.dtype}, but the model has "
                f"{declared.dtype} there; {todo or CHECK_CONFIG}"
            )

    def _check_experts(self, recipe: Recipe) -> None:
        """Raise MoeccError unless each projection has every expert once, all of one shape."""
        assert recipe.converter is not None
        experts = self.recipes.declared[recipe.target].shape[0]
        for pattern in recipe.converter.source_patterns:
            keys = recipe.sources.get(pattern, [])
            what = (
                f"'{recipe.target}' takes {experts} experts and {self.folder} has {len(keys)} "
                f"of '{pattern}'"
            )
            if len(keys) > experts:
                raise MoeccError(f"{what}; {CHECK_CONFIG}")
            if absent := _absent_expert(keys, experts) or len(keys) < experts:
                which = f" ({quoted(absent)} is missing)" if isinstance(absent, str) else ""
                raise MoeccError(f"{what}{which}; fetch it again")
            usual = Counter(self.entries[key].shape for key in keys).most_common(1)[0][0]
            for entry in (self.entries[key] for key in keys if self.entries[key].shape != usual):
                what = f"{quoted(entry.name)} in {entry.file} is {list(entry.shape)}"
                raise MoeccError(
                    f"{what}, but the other experts have {list(usual)}; fetch it again"
                )


def _absent_expert(keys: list[str], experts: int) -> str | None:
    """Return the name that the first missing expert would have, or None if none is missing.

    The number of the expert is the first part of the dotted names that varies.
    """
    parts = [key.split(".") for key in keys]
    for at, column in enumerate(zip(*parts, strict=False)):
        numbers = {int(part) for part in column if part.isdecimal() and len(part) < 10}
        if len(numbers) > 1:
            gap = min(set(range(experts)) - numbers, default=None)
            return (
                None if gap is None else ".".join([*parts[0][:at], str(gap), *parts[0][at + 1 :]])
            )
    return None

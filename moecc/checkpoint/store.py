"""A model's weights by name, read when asked.

1. `CheckpointStore` maps every parameter of a model without weights to the checkpoint tensors behind it. The map is
   transformers' own (renamings, and converters that merge per-expert tensors), so a read gives the same bits as
   `from_pretrained`, one parameter or some experts of it at a time. What is stored in 8 or 4 bits is read as
   bfloat16 (`moecc.checkpoint.low_bit`).
2. `check` runs the same converters on shapes alone, so that a checkpoint which doesn't fit fails in seconds.
3. `ModuleStore` is the same interface over a module in memory.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moecc.checkpoint.files import checkpoint_entries
from moecc.checkpoint.low_bit import Entry, block_size, decoded
from moecc.errors import MoeccError
from moecc.ir.tensors import nonfinite


@dataclass
class _Recipe:
    """How one runtime tensor (or several siblings, for a converter that splits) is made from checkpoint tensors."""

    target: str
    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(
        default_factory=dict
    )  # source pattern -> checkpoint names, in expert order

    @property
    def keys(self) -> list[str]:
        return [key for keys in self.sources.values() for key in keys]

    @property
    def per_expert(self) -> bool:
        """One checkpoint tensor per expert and projection, and nothing after the stacking that mixes experts."""
        if self.converter is None:
            return False
        first, *rest = self.converter.operations
        stacks = isinstance(first, MergeModulelist) and first.dim == 0
        return stacks and all(isinstance(op, Concatenate) and op.dim > 0 for op in rest)


class CheckpointStore:
    """The weights of `model`, a skeleton without any, in the safetensors files of `folder`.

    Names are the model's own (`state_dict` keys). `tied` maps a name that shares another's tensor to that name;
    `missing` are names nothing in the checkpoint gives; `unexpected` are checkpoint tensors nothing takes, and
    `ignored` the ones that transformers says to leave (a multi-token-prediction head, say). Files that are absent,
    truncated or corrupt raise right here, before `check`.
    """

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.folder, self.model = Path(folder), cast(Any, model)
        self.stored = checkpoint_entries(self.folder)
        self.entries = decoded(self.stored, block_size(self.folder))
        self._declared: dict[str, Tensor] = model.state_dict()
        self._buffers = {name for name, _ in model.named_buffers()}
        self._recipes: dict[str, _Recipe] = {}
        unmatched = self._match()
        self.tied = self._find_tied()
        skip = _pattern(self.model, "_keys_to_ignore_on_load_missing")
        given = self._recipes.keys() | self.tied.keys()
        self.missing = [
            n for n in self._declared if n not in given and not (skip and skip.search(n))
        ]
        skip = _pattern(
            self.model, "_keys_to_ignore_on_load_unexpected", _moved_buffers(self._buffers)
        )
        ignored = {key for key, name in unmatched.items() if skip and skip.search(name)}
        self.ignored = sorted(ignored, key=dot_natural_key)
        self.unexpected = [key for key in unmatched if key not in ignored]

    # -- the map

    def _match(self) -> dict[str, str]:
        """Give every checkpoint tensor to a recipe, as transformers does while loading; returns the ones left over."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        left: dict[str, str] = {}
        # Natural order: expert 10 comes after expert 9, and a stateful renaming sees its guard first.
        for key in sorted(self.entries, key=dot_natural_key):
            name, pattern = self._rename(key, renamings, converters)
            if name not in self._declared and key in self._declared:
                name, pattern = self._rename(key, [], [])
            converter = by_pattern[pattern] if pattern is not None else None
            if name not in self._declared or not self._take(name, converter, pattern or key, key):
                left[key] = name
        return left

    def _rename(
        self, key: str, renamings: list[Any], converters: list[Any]
    ) -> tuple[str, str | None]:
        return rename_source_key(
            key, renamings, converters, self.model.base_model_prefix, self._declared
        )

    def _take(self, name: str, converter: WeightConverter | None, pattern: str, key: str) -> bool:
        recipe = self._recipes.get(name)
        if recipe is None:
            recipe = _Recipe(name, converter)
            first, *others = converter.target_patterns if converter else [name]
            for sibling in [name, *(name.replace(first, other) for other in others)]:
                if sibling in self._declared:
                    self._recipes[sibling] = recipe
        elif recipe.converter is not converter or converter is None:
            return False  # a second way to make the same tensor: the first one counts
        recipe.sources.setdefault(pattern, []).append(key)
        return True

    def _find_tied(self) -> dict[str, str]:
        """Only names without a tensor of their own are tied: where both are stored, each is read."""
        groups: dict[str, set[str]] = defaultdict(set)
        for alias, owner in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            groups[owner] |= {alias, owner}
        tied: dict[str, str] = {}
        for owner, names in groups.items():
            stored = [n for n in [owner, *sorted(names - {owner})] if n in self._recipes]
            tied.update({n: stored[0] for n in names if stored and n not in self._recipes})
        return tied

    def _recipe(self, name: str) -> _Recipe:
        recipe = self._recipes.get(self.tied.get(name, name))
        if recipe is None:
            raise MoeccError(f"{self.folder} has no tensor for '{name}'")
        return recipe

    # -- what there is

    def names(self) -> list[str]:
        """Every name that can be read, tied ones included, in the model's order."""
        return [name for name in self._declared if name in self]

    def __contains__(self, name: object) -> bool:
        return name in self._recipes or name in self.tied

    def sources(self, name: str) -> list[str]:
        """The checkpoint tensors behind `name`."""
        return self._recipe(name).keys

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape the config implies; `check` makes sure that the checkpoint has it."""
        self._recipe(name)
        return tuple(self._declared[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype on disk; the widest where the sources differ."""
        dtypes = {self.entries[key].dtype for key in self._recipe(name).keys}
        out = dtypes.pop()
        for other in dtypes:
            out = torch.promote_types(out, other)
        return out

    @property
    def files(self) -> list[Path]:
        return sorted({entry.file for entry in self.stored.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files on disk."""
        return sum(file.stat().st_size for file in self.files)

    # -- reading

    def read(
        self,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        experts: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The tensor of `name`, a copy the caller owns, in the dtype on disk or as `from_pretrained(dtype=dtype)` gives
        it (which keeps some parameters in float32).

        `experts` asks for those rows of a fused [E, ...] parameter, in that order. NaN or infinity raises."""
        recipe = self._recipe(name)
        to = (
            self.dtype(name)
            if dtype is None
            else kept_dtype(self.model, name, self._declared[name], dtype)
        )
        load = partial(self._load, dtype=to, device=torch.device(device))
        if experts is None:
            return self._make(recipe, load)[self.tied.get(name, name)]
        if recipe.converter is None:
            return load(recipe.keys[0], rows=experts)
        if recipe.per_expert:
            return self._make(recipe, load, experts)[self.tied.get(name, name)]
        return self._make(recipe, load)[self.tied.get(name, name)][list(experts)]

    def _load(
        self,
        key: str,
        rows: Sequence[int] | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        entry = self.entries[key]
        tensor = entry.read(rows)
        require_finite(tensor, f"'{key}' in {entry.file}")
        return tensor.to(device=device, dtype=dtype)

    def _make(
        self, recipe: _Recipe, load: Callable[[str], Tensor], experts: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        if recipe.converter is None:
            return {recipe.target: load(recipe.keys[0])}
        converter = copy.deepcopy(recipe.converter)
        for pattern, keys in recipe.sources.items():
            for key in keys if experts is None else [keys[e] for e in experts]:
                converter.add_tensor(recipe.target, key, pattern, cast(Any, partial(load, key)))
        made = converter.convert(recipe.target, model=self.model, config=self.model.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }

    # -- checks that need no weights

    def check(self) -> None:
        """Raise if the checkpoint doesn't fit the model: missing tensors, quantized ones, shapes that the config
        doesn't imply. The converters run on tensors without storage, made from the file headers."""
        if self.missing:
            lost, left = (
                f"{len(self.missing)} of {len(self._declared)} missing",
                len(self.unexpected),
            )
            hint = f", {left} fit nothing, e.g. '{self.unexpected[0]}'" if left else ""
            todo = (
                self._quantized()
                or "check that config.json belongs to these weights, or fetch them again"
            )
            raise MoeccError(
                f"{self.folder} has no tensor for '{self.missing[0]}' ({lost}{hint}); {todo}"
            )
        names: dict[int, list[str]] = defaultdict(list)
        for name, recipe in self._recipes.items():
            names[id(recipe)].append(name)
        for group in names.values():
            self._check_recipe(self._recipes[group[0]], group)

    def _quantized(self) -> str:
        quantization = getattr(self.model.config, "quantization_config", None)
        return (
            "the checkpoint is quantized already; use one in bf16, fp16 or fp32"
            if quantization
            else ""
        )

    def _check_recipe(self, recipe: _Recipe, names: list[str]) -> None:
        for key in recipe.keys:
            self._check_dtype(self.entries[key], self._declared[names[0]])
        if recipe.per_expert:
            self._check_experts(recipe)
        first = self.entries[recipe.keys[0]]
        what = f"'{first.name}' in {first.file} is {list(first.shape)}"
        try:
            made = self._make(
                recipe, lambda key: torch.empty(self.entries[key].shape, device="meta")
            )
        except (
            Exception
        ) as error:  # converters check little: whatever torch makes of shapes they didn't expect
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise MoeccError(
                f"{what} and doesn't merge into '{recipe.target}' with its siblings: {why}"
            ) from error
        for name in names:
            got, want = (
                list(made[name].shape) if name in made else None,
                list(self._declared[name].shape),
            )
            if got != want:
                what += f", which makes '{name}' {got}" if got != list(first.shape) else ""
                raise MoeccError(
                    f"{what}, but config.json implies {want}; check that it belongs to these weights"
                )

    def _check_dtype(self, entry: Entry, declared: Tensor) -> None:
        if declared.is_floating_point():
            fits, todo = (
                entry.dtype.is_floating_point and entry.dtype.itemsize > 1,
                self._quantized(),
            )
        else:
            fits, todo = torch.promote_types(entry.dtype, declared.dtype) == declared.dtype, ""
        if not fits:
            what = f"'{entry.name}' in {entry.file} is {entry.dtype}, but the model has {declared.dtype} there"
            raise MoeccError(f"{what}; {todo or 'check that config.json belongs to these weights'}")

    def _check_experts(self, recipe: _Recipe) -> None:
        """Every expert once for each projection, all of one shape; names the tensor that breaks this."""
        assert recipe.converter is not None
        experts = self._declared[recipe.target].shape[0]
        for pattern in recipe.converter.source_patterns:
            keys = recipe.sources.get(pattern, [])
            what = f"'{recipe.target}' takes {experts} experts and {self.folder} has {len(keys)} of '{pattern}'"
            if len(keys) > experts:
                raise MoeccError(f"{what}; check that config.json belongs to these weights")
            if absent := _absent_expert(keys, experts) or len(keys) < experts:
                which = f" ('{absent}' is missing)" if isinstance(absent, str) else ""
                raise MoeccError(f"{what}{which}; fetch it again")
            usual = Counter(self.entries[key].shape for key in keys).most_common(1)[0][0]
            for entry in (self.entries[key] for key in keys if self.entries[key].shape != usual):
                what = f"'{entry.name}' in {entry.file} is {list(entry.shape)}"
                raise MoeccError(
                    f"{what}, but the other experts have {list(usual)}; fetch it again"
                )

    def digest(self) -> str:
        """SHA-256 over config.json, names, sizes and headers of the weight files and samples of their content.

        A file up to 16 MiB counts whole, a larger one with 256 bytes from the middle of each tensor. That tells
        checkpoints apart, fine-tunes of one another too; it doesn't prove that every byte is intact."""
        sha, by_file = hashlib.sha256((self.folder / "config.json").read_bytes()), defaultdict(list)
        for entry in sorted(self.stored.values(), key=lambda e: e.start):
            by_file[entry.file].append(entry)
        for file, entries in sorted(by_file.items()):
            size = file.stat().st_size
            sha.update(f"{file.name}\0{size}\0".encode())
            with open(file, "rb") as f:
                sha.update(f.read(size if size <= 16 << 20 else entries[0].start))
                for entry in entries if size > 16 << 20 else []:
                    f.seek(entry.start + max(0, entry.nbytes // 2 - 128))
                    sha.update(f.read(min(256, entry.nbytes)))
        return sha.hexdigest()


def _absent_expert(keys: list[str], experts: int) -> str | None:
    """The name that the first missing expert's tensor would have, from the number that runs through the names."""
    parts = [key.split(".") for key in keys]
    for at, column in enumerate(zip(*parts, strict=False)):
        numbers = {int(part) for part in column if part.isdigit()}
        if len(numbers) > 1:
            gap = min(set(range(experts)) - numbers, default=None)
            return (
                None if gap is None else ".".join([*parts[0][:at], str(gap), *parts[0][at + 1 :]])
            )
    return None


def _pattern(model: Any, attribute: str, more: Iterable[str] = ()) -> re.Pattern[str] | None:
    patterns = [*(getattr(model, attribute, None) or ()), *more]
    return re.compile("|".join(f"({p})" for p in sorted(patterns))) if patterns else None


def _moved_buffers(buffers: Iterable[str]) -> list[str]:
    """Buffers that old checkpoints store and newer models compute; transformers leaves them in the same way."""
    leaves = {name.rpartition(".")[2] for name in buffers}
    moved = {"inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
    return [pattern for leaf, pattern in moved.items() if leaf in leaves]


def kept_dtype(model: Any, name: str, declared: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that `name` gets when the model is loaded as `dtype`.

    Codes and indices are never cast; neither are buffers or parameters that the model declares in a dtype of their own,
    nor the float32 exceptions transformers lists (routing biases, for the most part)."""
    if not declared.is_floating_point():
        return declared.dtype
    plan: dict[str, torch.dtype] = (
        model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    )
    for pattern, kept in plan.items():
        if re.search(pattern.replace("*", ".*"), name):
            return kept
    is_buffer = not isinstance(_attribute(model, name), nn.Parameter)
    usual = next((p.dtype for p in model.parameters() if p.is_floating_point()), dtype)
    return declared.dtype if is_buffer or declared.dtype != usual else dtype


def _attribute(model: nn.Module, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf, None)


def require_finite(tensor: Tensor, what: str) -> None:
    """Raise if a float tensor holds NaN or infinity. `what` says which tensor of which file."""
    if found := nonfinite(tensor):
        raise MoeccError(f"{what} holds {found}: fetch it again or retrain it")

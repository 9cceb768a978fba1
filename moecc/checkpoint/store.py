"""The weights of a checkpoint by the model's names, read on demand.

1. `moecc.checkpoint.recipes` maps every tensor of a model without weights to the checkpoint tensors
   that make it. The map is transformers' own, so a read gives the same bits as `from_pretrained`,
   for one parameter at a time or for some experts of one. Weights that are stored in 8 or 4 bits
   are read as bfloat16 (`moecc.checkpoint.low_bit`).
2. `check` makes sure that the checkpoint fits the model, without reading it
   (`moecc.checkpoint.fit`).

`moecc.checkpoint.module` offers the same interface for a module in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from moecc.checkpoint.fit import Fit, require_few
from moecc.checkpoint.low_bit import block_size, decoded
from moecc.checkpoint.reading import opened
from moecc.checkpoint.recipes import Recipe, Recipes
from moecc.checkpoint.schema import Compression
from moecc.checkpoint.shards import checkpoint_entries
from moecc.checkpoint.values import kept_dtype, require_finite, require_squares
from moecc.errors import MoeccError, quoted

WHOLE = 16 << 20  # bytes of the largest file that a digest reads whole
SAMPLE = 256  # bytes that it reads of each tensor in a larger one


class CheckpointStore:
    """The weights of `model`, a skeleton without any, in the safetensors files of `folder`.

    Names are the model's own (`state_dict` keys). `tied`, `missing`, `unexpected` and `ignored` are
    those of `moecc.checkpoint.recipes.Recipes`. notes: remarks for the user. Raise MoeccError right
    here, before `check`, if a file is absent, truncated or corrupt, or if there are far too many
    tensors for the model.
    """

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.folder, self.model = Path(folder), model
        self.stored, self.notes = checkpoint_entries(self.folder)
        require_few(self.folder, len(self.stored), model)
        self.entries = decoded(self.stored, block_size(self.folder))
        self._recipes = Recipes(model, self.entries)
        self.tied, self.missing = self._recipes.tied, self._recipes.missing
        self.unexpected, self.ignored = self._recipes.unexpected, self._recipes.ignored

    def names(self) -> list[str]:
        """Return every name that can be read, tied ones included, in the model's order."""
        return [name for name in self._recipes.declared if name in self]

    def __contains__(self, name: object) -> bool:
        return name in self._recipes

    def sources(self, name: str) -> list[str]:
        """Return the names of the checkpoint tensors that make `name`."""
        return self._recipe(name).keys

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that the config implies; `check` makes sure the checkpoint has it."""
        self._recipe(name)
        return tuple(self._recipes.declared[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype on disk, the widest if the sources differ."""
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

    def read(
        self,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        experts: Sequence[int] | None = None,
    ) -> Tensor:
        """Return the tensor of `name`, as a copy that the caller owns.

        dtype: by default the one on disk, else what `from_pretrained(dtype=dtype)` gives, which
        keeps some parameters in float32. experts: rows of a fused [E, ...] parameter, in that
        order. Raise MoeccError for a name without a tensor, and for NaN or infinity.
        """
        recipe = self._recipe(name)
        to = (
            self.dtype(name)
            if dtype is None
            else kept_dtype(self.model, name, self._recipes.declared[name], dtype)
        )
        load = partial(self._load, dtype=to)
        if experts is None:
            return recipe.make(self.model, load)[self.tied.get(name, name)]
        if recipe.converter is None:
            return load(recipe.keys[0], rows=experts)
        if recipe.per_expert:
            return recipe.make(self.model, load, experts)[self.tied.get(name, name)]
        return recipe.make(self.model, load)[self.tied.get(name, name)][list(experts)]

    def _recipe(self, name: str) -> Recipe:
        recipe = self._recipes.get(name)
        if recipe is None:
            raise MoeccError(f"{self.folder} has no tensor for {quoted(name)}")
        return recipe

    def _load(
        self,
        key: str,
        rows: Sequence[int] | None = None,
        *,
        dtype: torch.dtype,
    ) -> Tensor:
        entry = self.entries[key]
        tensor = entry.read(rows)
        for require in (require_finite, require_squares):
            require(tensor, f"{quoted(key)} in {entry.file}")
        return tensor.to(dtype)

    def check(self) -> None:
        """Raise MoeccError if the checkpoint doesn't fit the model; no weight is read."""
        compression = Compression.of(self.model.config)
        if compression.experts or compression.linears:
            compression.require(self.stored)
        Fit(self.folder, self.entries, self._recipes).check()

    @cached_property
    def _config(self) -> bytes:
        return (self.folder / "config.json").read_bytes()

    def digest(self) -> str:
        """Return SHA-256 over config.json, and the names, sizes and content of the weight files.

        config.json is read the first time only: what is copied of a model may be gone later.

        A file of up to 16 MiB counts whole. A larger one counts with its header and 256 bytes from
        the middle of each tensor. That tells checkpoints apart, even fine-tunes of one another, but
        it doesn't prove that every byte is intact.
        """
        sha, by_file = hashlib.sha256(self._config), defaultdict(list)
        for entry in sorted(self.stored.values(), key=lambda e: e.start):
            by_file[entry.file].append(entry)
        for file, entries in sorted(by_file.items()):
            with opened(file) as f:
                size = os.fstat(f.fileno()).st_size
                sha.update(f"{file.name}\0{size}\0".encode())
                sha.update(f.read(size if size <= WHOLE else entries[0].start))
                for entry in entries if size > WHOLE else []:
                    f.seek(entry.start + max(0, entry.nbytes // 2 - SAMPLE // 2))
                    sha.update(f.read(min(SAMPLE, entry.nbytes)))
        return sha.hexdigest()

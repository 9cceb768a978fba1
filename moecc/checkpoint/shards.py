"""Which files hold the weights of a checkpoint, and which of them has each tensor.

The `weight_map` of a shard index decides. What contradicts it is refused, or told in a note if the
map leaves no doubt about what is meant.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from moecc.checkpoint.files import TensorEntry, read_header, require_few
from moecc.checkpoint.reading import inside, read_json
from moecc.errors import MoeccError, quoted

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_SHARDS = 10_000  # of a checkpoint


def read_index(folder: Path) -> dict[str, str]:
    """Return the file name of each tensor, as the shard index of a checkpoint gives it.

    Raise MoeccError if the index is invalid.
    """
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
        raise MoeccError(
            f"{folder / INDEX} isn't a valid index ('weight_map' must give file names): "
            "fetch it again"
        )
    require_few(len(where), str(folder / INDEX))
    if (shards := len(set(where.values()))) > _MOST_SHARDS:
        raise MoeccError(
            f"{folder / INDEX} names {shards} files, and moecc takes at most {_MOST_SHARDS}: "
            "fetch it again"
        )
    return where


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds safetensors files, or one that its shard index names.

    A folder that was fetched to be inspected may hold the index alone.
    """
    if any(folder.glob("*.safetensors")):
        return True
    indexed = os.path.lexists(folder / INDEX)
    return indexed and any(os.path.lexists(folder / s) for s in set(read_index(folder).values()))


def tensor_names(folder: Path) -> Iterable[str]:
    """Return the names of a checkpoint's tensors, as its index or its only header lists them."""
    if os.path.lexists(folder / INDEX):
        return read_index(folder)
    return read_header(inside(folder, SINGLE))[0] if os.path.lexists(folder / SINGLE) else ()


def weight_files(folder: Path) -> dict[Path, set[str]]:
    """Return the weight files of a checkpoint, each with the tensors that the index says it has.

    Raise MoeccError if one is missing or leads out of the folder, or if there are two sets of
    weights.
    """
    if not os.path.lexists(folder / INDEX):
        if not os.path.lexists(folder / SINGLE):
            raise MoeccError(
                f"{folder} has neither {SINGLE} nor {INDEX}; moecc reads safetensors checkpoints "
                "only"
            )
        return {inside(folder, SINGLE): set()}
    where = read_index(folder)
    shards = sorted(set(where.values()))
    if os.path.lexists(folder / SINGLE) and SINGLE not in shards:
        raise MoeccError(
            f"{folder} has {SINGLE} and {INDEX}, which doesn't name it; these are two sets of "
            "weights: remove the one that isn't meant"
        )
    for shard in shards:
        if not os.path.lexists(folder / shard):
            raise MoeccError(
                f"{folder} lacks {quoted(shard)}, one of the {len(shards)} files its index names: "
                "fetch it again"
            )
    files: dict[Path, set[str]] = {inside(folder, shard): set() for shard in shards}
    for name, shard in where.items():
        files[folder / shard].add(name)
    return files


def checkpoint_entries(folder: Path) -> tuple[dict[str, TensorEntry], list[str]]:
    """Return every tensor of a checkpoint, and remarks on copies that the index doesn't name.

    Raise MoeccError if a file is missing or corrupt, if a shard lacks a tensor that the index says
    it has, if several have one that the index doesn't name, or if there are too many tensors.
    """
    files = weight_files(folder)
    named = {name for names in files.values() for name in names}
    entries: dict[str, TensorEntry] = {}
    stale: list[TensorEntry] = []
    for file, names in files.items():
        held = read_header(file)[0]
        require_few(len(entries) + len(held), str(folder))
        for name in names:
            if name not in held:
                raise MoeccError(
                    f"{file} has no {quoted(name)}, which {INDEX} says it has: fetch both again"
                )
        for name, entry in held.items():
            if name in named and name not in names:
                stale.append(entry)
            elif name in entries:
                raise MoeccError(
                    f"{quoted(name)} is in {entries[name].file.name} and in {file.name} of "
                    f"{folder}, and {INDEX} names neither: fetch it again"
                )
            else:
                entries[name] = entry
    if not stale:
        return entries, []
    first = f"{quoted(stale[0].name)} in {stale[0].file.name}"
    more = f", and so are {len(stale) - 1} more" if len(stale) > 1 else ""
    return entries, [f"{first} is left out, because {INDEX} names another file for it{more}"]

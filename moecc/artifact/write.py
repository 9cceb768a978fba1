"""Writing the artifact: weight files, configuration, audit; its bytes equal those that the audit counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moecc.artifact.audit import Plan, Row, summary
from moecc.checkpoint.files import LazyTensor, free_space, write_safetensors
from moecc.checkpoint.source import SMALL_FILES, has_code
from moecc.errors import MoeccError
from moecc.ir import vq4
from moecc.ir.program import Program

SHARD_BYTES = 4 << 30
_NOT_COPIED = ("config.json", "moecc.json", "model.safetensors.index.json")


# ---- writing


def write_artifact(
    folder: Path,
    found: Plan,
    program: Program,
    source: Path | None,
    facts: Mapping[str, Any],
    progress: Any = None,
) -> list[Row]:
    """Write the artifact into the existing folder `folder`; the complete audit, whose bytes equal those on disk."""
    free_space(folder, int(found.nbytes * 1.01) + (1 << 20))
    shards = _shards(found.tensors)
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for name, keys in (progress or (lambda items, label: items))(
        list(zip(names, shards, strict=True)), "writing"
    ):
        write_safetensors(folder / name, {k: found.tensors[k] for k in keys}, {"format": "pt"})
    if len(shards) > 1:
        index = {k: name for name, keys in zip(names, shards, strict=True) for k in keys}
        _json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": found.nbytes}, "weight_map": index},
        )
    rows = [*found.rows, _header_row(folder, names, found.nbytes)]
    _check_total(folder, names, rows)
    copy_small_files(source, folder)
    _json(folder / "config.json", _config(program, source, found))
    _json(
        folder / "moecc.json",
        {**facts, "summary": summary(rows), "audit": [asdict(r) for r in rows]},
    )
    return rows


def _shards(tensors: Mapping[str, LazyTensor]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def _header_row(folder: Path, names: list[str], tensors: int) -> Row:
    header = sum((folder / n).stat().st_size for n in names) - tensors
    return Row("(safetensors headers)", "file format", (), "names, shapes and types", header)


def _check_total(folder: Path, names: list[str], rows: Iterable[Row]) -> None:
    on_disk, accounted = (
        sum((folder / n).stat().st_size for n in names),
        sum(r.nbytes for r in rows),
    )
    if on_disk != accounted:
        raise MoeccError(
            f"the audit accounts for {accounted} bytes but the files hold {on_disk}; this is a fault of moecc"
        )


def copy_small_files(source: Path | None, folder: Path) -> None:
    if source is None:
        return
    for pattern in (*SMALL_FILES, *(["*.py"] if has_code(source) else [])):
        for file in sorted(source.glob(pattern)):
            if (
                file.name not in _NOT_COPIED
                and not file.name.endswith(".index.json")
                and file.stat().st_size < (64 << 20)
            ):
                shutil.copyfile(file, folder / file.name)


def _config(program: Program, source: Path | None, found: Plan) -> dict[str, Any]:
    config: dict[str, Any] = (
        json.loads((source / "config.json").read_text())
        if source is not None
        else program.config.to_dict()
    )
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.pop(
                "quantization_config", None
            )  # how the source's weights were stored (`moecc.checkpoint.low_bit`)
    if found.experts or found.linears:
        config["quantization_config"] = {
            "quant_method": "moecc", "version": vq4.VERSION, "experts": found.experts, "linears": found.linears,
        }  # fmt: skip
    return config


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")

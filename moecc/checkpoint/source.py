"""From what the user typed to a checkpoint folder: a local one, or a hub id that is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

from moecc.errors import MoeccError

# *.py for tokenizers that are code; it is run only where the user says so
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
# Copies of the same weights in other layouts (`original/`, `consolidated.safetensors`) would double a download.
HUB_SKIPPED = ["*/*", "consolidated*"]
# What a model's folder holds besides weights and code.
SMALL_FILES = ("*.json", "merges.txt", "vocab.txt", "*.model", "*.jinja", "*.tiktoken")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def checkpoint_folder(source: str, *, revision: str | None = None) -> Path:
    """The checkpoint folder behind `source`: a local folder, or a hub id whose safetensors files are downloaded."""
    return _require_safetensors(model_folder(source, HUB_FILES, revision=revision), source)


def model_folder(source: str, files: list[str], *, revision: str | None = None) -> Path:
    """The folder behind `source`, which holds a config.json: a local one, or `files` of a hub id downloaded."""
    folder = Path(source).expanduser()
    if folder.exists() and not folder.is_dir():
        raise MoeccError(
            f"{source} is a file; give the folder that holds config.json and the safetensors files"
        )
    if not folder.is_dir():
        if source.startswith((".", "/", "~")) or source.count("/") > 1 or not source:
            raise MoeccError(
                f"no folder '{source}'; give a checkpoint folder or a hub id such as 'Qwen/Qwen1.5-MoE-A2.7B'"
            )
        folder = _download(source, files, revision)
    if not (folder / "config.json").is_file():
        raise MoeccError(
            f"{source} has no config.json; give the folder of a transformers checkpoint"
        )
    return folder


def _download(repo: str, files: list[str], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=files, ignore_patterns=HUB_SKIPPED
            )
        )
    except (
        Exception
    ) as error:  # the hub client raises OSError, ValueError and httpx's own errors for one bad name
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise MoeccError(
            f"no folder '{repo}' here, and the hub gave no model of that name ({type(error).__name__}: {why[0]}); "
            "check the name, log in for a gated model, or download it once while online"
        ) from error


def _require_safetensors(folder: Path, source: str) -> Path:
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES and f.is_file())
    if pickles and not any(folder.glob("*.safetensors")):
        raise MoeccError(
            f"{source} has only pickled weights ({pickles[0]}), which moecc never loads; convert them to "
            "safetensors, e.g. AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) where you trust the file"
        )
    return folder


def has_code(folder: Path) -> bool:
    """Whether the folder's tokenizer comes with Python code of its own."""
    try:
        return "auto_map" in json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False

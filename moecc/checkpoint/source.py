"""From what the user typed to a checkpoint folder: a local one, or a downloaded hub model."""

from __future__ import annotations

import json
from pathlib import Path

from moecc.errors import MoeccError

# *.py is for tokenizers that are code; it runs only if the user allows it.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
# Copies of the same weights in other layouts (`original/`, `consolidated.safetensors`) would
# double a download.
HUB_SKIPPED = ["*/*", "consolidated*"]
# The files of a model's folder besides weights and code.
SMALL_FILES = ("*.json", "merges.txt", "vocab.txt", "*.model", "*.jinja", "*.tiktoken")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def checkpoint_folder(source: str, *, revision: str | None = None) -> Path:
    """Return the checkpoint folder of `source`: a local folder, or the download of a hub id.

    Raise MoeccError if there is no such model, or if all its weights are pickled."""
    return _require_safetensors(model_folder(source, HUB_FILES, revision=revision), source)


def model_folder(source: str, files: list[str], *, revision: str | None = None) -> Path:
    """Return the folder of `source`: a local folder, or a download of a hub id's `files`.

    Raise MoeccError if there is no such model or no config.json in its folder."""
    folder = Path(source).expanduser()
    if folder.exists() and not folder.is_dir():
        raise MoeccError(
            f"{source} is a file; give the folder that holds config.json and the safetensors files"
        )
    if not folder.is_dir():
        if source.startswith((".", "/", "~")) or source.count("/") > 1 or not source:
            raise MoeccError(
                f"no folder '{source}'; "
                "give a checkpoint folder or a hub id such as 'Qwen/Qwen1.5-MoE-A2.7B'"
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
    # For one bad name the hub client raises OSError, ValueError or an error of httpx.
    except Exception as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise MoeccError(
            f"no folder '{repo}' here, and the hub gave no model of that name "
            f"({type(error).__name__}: {why[0]}); "
            "check the name, log in for a gated model, or download it once while online"
        ) from error


def _require_safetensors(folder: Path, source: str) -> Path:
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES and f.is_file())
    if pickles and not any(folder.glob("*.safetensors")):
        raise MoeccError(
            f"{source} has only pickled weights ({pickles[0]}), which moecc never loads; "
            "convert them to safetensors, e.g. AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(...) where you trust the file"
        )
    return folder


def has_code(folder: Path) -> bool:
    """Return whether the folder's tokenizer brings Python code."""
    try:
        return "auto_map" in json.loads(
            (folder / "tokenizer_config.json").read_text(encoding="utf-8")
        )
    except (OSError, ValueError, TypeError):
        return False

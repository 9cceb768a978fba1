"""From what the user typed to a checkpoint folder: a local one, or a downloaded hub model."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from moecc.checkpoint.reading import inside, read_json_if_there
from moecc.checkpoint.shards import INDEX, SINGLE, has_weights, read_index, weight_files
from moecc.errors import MoeccError, quoted, reason

CHAT_TEMPLATES = "additional_chat_templates/*.jinja"
# What may be done with the model is copied along with it.
LICENSES = (
    "*LICEN[CS]E*",
    "*Licen[cs]e*",
    "*licen[cs]e*",
    "*NOTICE*",
    "*Notice*",
    "COPYING*",
    "COPYRIGHT*",
    "USE_POLICY*",
)
# *.py is for tokenizers that are code; it runs only if the user allows it.
HUB_FILES = (
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"),
    *LICENSES,
)
# Copies of the same weights in other layouts (`original/`, `consolidated.safetensors`) would
# double a download.
HUB_SKIPPED = ["*/*", "consolidated*"]
# The files of a model's folder besides weights and code.
SMALL_FILES = (
    *("*.json", "merges.txt", "vocab.txt", "*.model", "*.jinja", "*.tiktoken"),
    *(CHAT_TEMPLATES, *LICENSES),
)
ADAPTER = "adapter_config.json"  # PEFT's; where it is installed, transformers adds the adapter
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHTS = (".safetensors", *PICKLES)  # never a licence


def checkpoint_folder(source: str) -> Path:
    """Return the checkpoint folder of `source`: a local folder, or the download of a hub id.

    Raise MoeccError if there is no such model, if a file of it leads out of its folder, or if it
    has no weights but pickled ones."""
    folder = model_folder(source, HUB_FILES)
    if not has_weights(folder):
        _refuse_pickles(folder, source)
        raise MoeccError(
            f"{source} has no *.safetensors weights; give a complete checkpoint or artifact"
        )
    if any(os.path.lexists(folder / name) for name in (SINGLE, INDEX)):
        weight_files(folder)
    return folder


def model_folder(source: str, files: Sequence[str]) -> Path:
    """Return the folder of `source`: a local folder, or a download of a hub id's `files`.

    Raise MoeccError if there is no such model or no config.json in its folder, or as `small_files`.
    """
    folder = Path(os.path.expanduser(source))  # leaves the home of nobody as it is
    try:
        there = bool(source) and folder.exists()  # Path("") would be the current folder
    except OSError as error:  # such as a name that is too long
        raise MoeccError(f"no folder {quoted(source)}: {error.strerror}") from error
    if there and not folder.is_dir():
        raise MoeccError(
            f"{source} is a file; give the folder that holds config.json and the safetensors files"
        )
    if not there:
        if source.startswith((".", "/", "~")) or source.count("/") > 1 or not source:
            raise MoeccError(
                f"no folder '{source}'; "
                "give a checkpoint folder or a hub id such as 'Qwen/Qwen1.5-MoE-A2.7B'"
            )
        folder = _download(source, files)
    if not (folder / "config.json").is_file():
        raise MoeccError(
            f"{source} has no config.json; give the folder of a transformers checkpoint"
        )
    small_files(folder)
    return folder


def small_files(folder: Path, code: bool | None = None) -> list[str]:
    """Return the names of a model's files besides its weights, relative to its folder.

    code: with Python files; by default if its tokenizer brings any. Links to nothing and folders of
    such names are among them. Raise MoeccError if a file leads out of the folder or isn't regular:
    transformers reads some, and artifacts get copies of all.
    """
    with_code = has_code(folder) if code is None else code
    patterns = (*SMALL_FILES, *(["*.py"] if with_code else []))
    found = {f for pattern in patterns for f in folder.glob(pattern) if f.suffix not in _WEIGHTS}
    for file in found:
        if file.exists() and not file.is_dir():
            inside(folder, file.relative_to(folder).as_posix())
    return sorted(file.relative_to(folder).as_posix() for file in found)


def adapter_beside(folder: Path) -> str:
    """Return what to say of an adapter in a model's folder, "" if there is none.

    moecc reads the model without it.
    """
    if not os.path.lexists(folder / ADAPTER):
        return ""
    return f"an adapter ({ADAPTER}) beside the weights is left out; a pass can merge one"


def _download(repo: str, files: Sequence[str]) -> Path:
    folder = _snapshot(repo, files, HUB_SKIPPED)
    if "*.safetensors" in files:
        shards = set(read_index(folder).values()) if (folder / INDEX).exists() else set()
        below = [glob.escape(shard) for shard in sorted(shards) if "/" in shard]
        _snapshot(repo, [CHAT_TEMPLATES, *below], [], folder.name)  # the same commit
    return folder


def _snapshot(
    repo: str, files: Sequence[str], skipped: Sequence[str], revision: str | None = None
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(files), ignore_patterns=list(skipped)
            )
        )
    # For one bad name the hub client raises OSError, ValueError or an error of httpx.
    except Exception as error:
        raise MoeccError(
            f"no folder '{repo}' here, and the hub gave no model of that name "
            f"({type(error).__name__}: {reason(error)}); "
            "check the name, log in for a gated model, or download it once while online"
        ) from error


def _refuse_pickles(folder: Path, source: str) -> None:
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES and f.is_file())
    if pickles:
        raise MoeccError(
            f"{source} has only pickled weights ({quoted(pickles[0])}), which moecc never loads; "
            "convert them to safetensors, e.g. AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(...) where you trust the file"
        )


def has_code(folder: Path) -> bool:
    """Return whether the folder's tokenizer brings Python code.

    Raise MoeccError if its tokenizer_config.json can't be read.
    """
    return "auto_map" in read_json_if_there(folder / "tokenizer_config.json")

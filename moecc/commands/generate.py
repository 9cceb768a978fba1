"""`moecc generate`: a few tokens from an artifact or a checkpoint, through transformers; greedy by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moecc.checkpoint.schema import METHOD
from moecc.checkpoint.source import checkpoint_folder
from moecc.checkpoint.store import CheckpointStore, require_finite
from moecc.commands.rows import tokenizer_of
from moecc.errors import MoeccError, reason
from moecc.frontend.config import longest_row, quantization_method, read_config
from moecc.frontend.skeleton import bare


@torch.no_grad()
def generate(
    model: str,
    prompt: str,
    *,
    new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """prompt, text (what follows it) and tokens of a folder's or hub id's model. The seed is for a temperature > 0."""
    folder = checkpoint_folder(model)
    tokenizer = tokenizer_of(folder, trust_remote_code=trust_remote_code)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[-1] == 0:
        raise MoeccError("the prompt has no tokens; give some text with --prompt")
    store = _checked_store(folder)
    loaded = _load(str(folder))
    if store is not None:
        _require_finite(loaded, store)
    if int(ids.max()) >= loaded.config.get_text_config().vocab_size:
        raise MoeccError(
            f"{model}: its tokenizer makes tokens that the model doesn't have; copy the model's own tokenizer"
        )
    limit = longest_row(loaded.config)
    if limit is not None and (length := ids.shape[-1] + new_tokens) > limit:
        raise MoeccError(
            f"{length} tokens with the prompt's, but {model} has positions for {limit}; give fewer --max-new-tokens"
        )
    settings: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
        torch.manual_seed(seed)
    made = loaded.generate(
        input_ids=ids.long(), attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **settings,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )[0, ids.shape[-1] :]  # fmt: skip
    text = tokenizer.decode(made, skip_special_tokens=True)
    return {"model": model, "prompt": prompt, "text": text, "tokens": made.tolist()}


def _checked_store(folder: Path) -> CheckpointStore | None:
    """The folder's weight files, which fit its model; None where only transformers knows how to load it.

    transformers puts random numbers where a tensor is missing, and says so only in a log."""
    if quantization_method(read_config(folder)[0]) not in (None, METHOD):
        return None
    found = bare(folder)
    if not found.experts:
        return None
    store = CheckpointStore(folder, found.model)
    store.check()
    return store


def _require_finite(loaded: Any, store: CheckpointStore) -> None:
    """Looked for in what is loaded, so that no file is read twice but the one that holds such numbers."""
    for name, tensor in loaded.state_dict().items():
        if name in store:
            try:
                require_finite(tensor, f"'{name}'")
            except MoeccError:
                store.read(name)  # says which tensor of which file
                raise


def _load(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, trust_remote_code=False
        )
    except MoeccError:
        raise
    except Exception as error:  # transformers raises what the family's code raises
        raise MoeccError(
            f"{folder}: transformers can't load it as a causal language model: {reason(error)}"
        ) from error
    return found.eval()

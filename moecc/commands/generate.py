"""`moecc generate`: continue a prompt with transformers, greedily by default."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from moecc.checkpoint.schema import METHODS
from moecc.checkpoint.source import adapter_beside, checkpoint_folder
from moecc.checkpoint.store import CheckpointStore
from moecc.checkpoint.values import require_finite
from moecc.commands.rows import tokenizer_of, using
from moecc.errors import MoeccError, out_of_memory, reason
from moecc.frontend.config import longest_row, quantization_method, read_config
from moecc.frontend.skeleton import bare
from moecc.frontend.traceable import logits_alone
from moecc.pipeline.device import device_called
from moecc.types import FamilyModule, Json

_LEAST_TEMPERATURE = 1e-30  # logits are divided by it, in float32


@torch.no_grad()
def generate(
    model: str,
    prompt: str,
    *,
    new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Json:
    """Return the prompt, the text that follows it and that text's token ids.

    model: folder or hub id. temperature: 0 is greedy; above 0, `seed` decides what is drawn.
    device: what computes, by `device_called`. Raise MoeccError if the prompt is no text, if no
    token can be drawn at the temperature, or if the model cannot be loaded, does not fit its
    tokenizer, or has too few positions.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # the command line makes surrogates of such bytes
        raise MoeccError("the prompt has bytes that are no UTF-8 text; give text") from error
    if temperature != 0 and not _LEAST_TEMPERATURE <= temperature < math.inf:
        advice = f"give 0 for the likeliest token, or {_LEAST_TEMPERATURE} and more"
        raise MoeccError(f"no tokens can be drawn at temperature {temperature}; {advice}")
    where = device_called(device)
    folder = checkpoint_folder(model)
    tokenizer = tokenizer_of(folder, trust_remote_code=trust_remote_code)
    with using(tokenizer):
        ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"]
    length = ids.shape[-1]
    if length == 0:
        raise MoeccError("the prompt has no tokens; give some text with --prompt")
    store = _checked_store(folder)
    loaded = _load(str(folder))
    if store is not None:
        _require_finite(loaded, store)
    if int(ids.max()) >= loaded.config.get_text_config().vocab_size:
        raise MoeccError(
            f"{model}: its tokenizer makes tokens that the model doesn't have; "
            "copy the model's own tokenizer"
        )
    limit = longest_row(loaded.config)
    if limit is not None and length + new_tokens > limit:
        raise MoeccError(
            f"{length + new_tokens} tokens with the prompt's, "
            f"but {model} has positions for {limit}; give fewer --max-new-tokens"
        )
    padding = tokenizer.pad_token_id
    settings: dict[str, object] = {"do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
        torch.manual_seed(seed)
    settings["pad_token_id"] = tokenizer.eos_token_id if padding is None else padding
    loaded, ids = loaded.to(where), ids.to(where)
    tokens = _continued(model, loaded, ids, max_new_tokens=new_tokens, **settings)[0, length:]
    with using(tokenizer):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
    return {"model": model, "prompt": prompt, "text": text, "tokens": tokens.tolist()}


def _continued(model: str, loaded: FamilyModule, ids: Tensor, **settings: object) -> Tensor:
    """Return token ids with those that generate() appends.

    It takes further settings from the model's generation_config.json.
    """
    try:
        with logits_alone(loaded):  # generate() decides about the cache by itself
            made: Tensor = loaded.generate(
                input_ids=ids.long(), attention_mask=torch.ones_like(ids), **settings
            )
    except Exception as error:  # transformers raises what the settings bring about
        if out_of_memory(error):
            raise
        raise MoeccError(
            f"{model}: transformers can't generate with it: {reason(error)}; "
            "check its generation_config.json"
        ) from error
    return made


def _checked_store(folder: Path) -> CheckpointStore | None:
    """Return the folder's weight files, once they are known to fit its model.

    transformers fills a missing tensor with random numbers and says so only in a log. It also takes
    copies that the index doesn't name, and adapters. Return None if only transformers knows how to
    read the files.
    """
    if quantization_method(read_config(folder)[0]) not in (None, *METHODS):
        return None
    found = bare(folder)
    if not found.experts:
        return None
    store = CheckpointStore(folder, found.model)
    store.check()
    if left := next(iter((*store.notes, adapter_beside(folder))), ""):
        advice = "transformers, which runs the model, may take it; mend the folder first"
        raise MoeccError(f"{folder}: {left}: {advice}")
    return store


def _require_finite(loaded: FamilyModule, store: CheckpointStore) -> None:
    """Raise MoeccError if a loaded weight holds NaN or infinite values.

    The check reads what is loaded, so that no file is read twice except one with such values.
    """
    for name, tensor in loaded.state_dict().items():
        if name in store:
            try:
                require_finite(tensor, f"'{name}'")
            except MoeccError:
                store.read(name)  # its error names the tensor and the file
                raise


def _load(folder: str) -> FamilyModule:
    from transformers import AutoModelForCausalLM

    try:
        found: FamilyModule = AutoModelForCausalLM.from_pretrained(
            folder,
            config=read_config(folder)[0],
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
        )
    except MoeccError:
        raise
    except Exception as error:  # transformers raises what the family's code raises
        raise MoeccError(
            f"{folder}: transformers can't load it as a causal language model: {reason(error)}"
        ) from error
    return found.eval()

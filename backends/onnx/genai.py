"""genai_config.json: what onnxruntime-genai has to know of a model."""

from __future__ import annotations

from pathlib import Path

from moecc.backends.onnx.cached import Cached
from moecc.checkpoint.reading import read_json_if_there
from moecc.frontend.config import longest_row, text_config
from moecc.frontend.skeleton import Skeleton
from moecc.types import Config, Json

FILE = "genai_config.json"
_INPUTS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
}
_OUTPUTS = {
    "logits": "logits",
    "present_key_names": "present.%d.key",
    "present_value_names": "present.%d.value",
}


def config(found: Skeleton, cached: Cached, folder: Path, library: Path | None) -> Json:
    """Return the content of the file. library: the op library beside the model, if there is one."""
    part = text_config(found.config)
    eos, bos, pad = (_token(part, folder, f"{name}_token_id") for name in ("eos", "bos", "pad"))
    stop = [] if eos is None else eos if isinstance(eos, list) else [eos]
    first = (stop or [0])[0]
    length = longest_row(found.config) or 2048
    return {
        "model": {
            "type": "decoder",
            "context_length": length,
            "vocab_size": part.vocab_size,
            "eos_token_id": stop,
            "bos_token_id": first if bos is None else bos,
            "pad_token_id": first if pad is None else pad,
            "decoder": _decoder(part, cached, library),
        },
        # The cache grows by concatenation, so past and present are no shared buffer.
        "search": {"past_present_share_buffer": False, "max_length": length, "do_sample": False},
    }


def _decoder(part: Config, cached: Cached, library: Path | None) -> Json:
    options: Json = {"provider_options": []}
    if library is not None:
        options["custom_ops_library"] = library.name
    return {
        "session_options": options,
        "filename": "model.onnx",
        "hidden_size": part.hidden_size,
        "head_size": cached.cache[0].key_width,
        "num_attention_heads": part.num_attention_heads,
        "num_key_value_heads": cached.cache[0].heads,
        "num_hidden_layers": len(cached.cache),
        "inputs": _INPUTS,
        "outputs": _OUTPUTS,
    }


def _token(part: Config, folder: Path, name: str) -> int | list[int] | None:
    """Return a special token's number.

    generation_config.json comes before the configuration, as it does for `generate`.
    """
    given = read_json_if_there(folder / "generation_config.json")
    token: int | list[int] | None = given.get(name, getattr(part, name, None))
    return token

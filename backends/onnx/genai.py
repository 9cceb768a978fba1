"""genai_config.json: what onnxruntime-genai has to be told of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moecc.backends.onnx.cached import Cached
from moecc.frontend.config import longest_row, text_config
from moecc.frontend.skeleton import Skeleton

FILE = "genai_config.json"


def config(found: Skeleton, cached: Cached, folder: Path, library: Path | None) -> dict[str, Any]:
    """Its content. The cache grows by concatenation, so past and present don't share a buffer."""
    part, first = text_config(found.config), cached.cache[0]
    eos, bos, pad = (
        _token(part, folder, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")
    )
    options: dict[str, Any] = {"provider_options": []}
    if library is not None:
        options["custom_ops_library"] = library.name
    stop = [] if eos is None else eos if isinstance(eos, list) else [eos]
    length = longest_row(found.config) or 2048
    return {
        "model": {
            "type": "decoder", "context_length": length, "vocab_size": part.vocab_size, "eos_token_id": stop,
            "bos_token_id": bos if bos is not None else (stop or [0])[0],
            "pad_token_id": pad if pad is not None else (stop or [0])[0],
            "decoder": {
                "session_options": options, "filename": "model.onnx", "hidden_size": part.hidden_size,
                "head_size": first.key_width, "num_attention_heads": part.num_attention_heads,
                "num_key_value_heads": first.heads, "num_hidden_layers": len(cached.cache),
                "inputs": {
                    "input_ids": "input_ids", "attention_mask": "attention_mask", "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"past_present_share_buffer": False, "max_length": length, "do_sample": False},
    }  # fmt: skip


def _token(part: Any, folder: Path, name: str) -> Any:
    """A special token's number, from generation_config.json before the configuration, as `generate` has it."""
    file = folder / "generation_config.json"
    given = json.loads(file.read_text()) if file.exists() else {}
    return given.get(name, getattr(part, name, None))

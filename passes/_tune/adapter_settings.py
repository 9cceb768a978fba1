"""What the adapter_config.json of a LoRA adapter says, as far as it is merged here.

Anyone may have written the file. Its patterns are regular expressions, and one of a few characters
can take Python hours, so that only plain ones are read.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from moecc.checkpoint.reading import read_json
from moecc.errors import MoeccError, quoted
from moecc.types import Json

# Options that change the meaning of the tensors, or that train something else too: with one of
# them, merging A and B alone would be wrong.
_UNKNOWN = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "modules_to_save",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
# Initialisations that leave the base weights as they are.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
# A pattern of names, choices between names, digits and wildcards. Only single characters repeat.
_PLAIN_PATTERN = re.compile(
    r"\^?(?:[\w|-]|\\\.|(?:\.|\\d|\[[\w-]+\])[*+]?|\((?:\?:)?[\w.|-]+\))*\$?"
)
_MOST_REPETITIONS = 2
_LONGEST = 500  # characters of a pattern


@dataclass(frozen=True)
class Settings:
    """alpha: of modules that no pattern matches. parameters: those that are adapted themselves."""

    alpha: float
    patterns: tuple[tuple[re.Pattern[str], float], ...]
    rank_stabilized: bool
    parameters: tuple[str, ...]

    @classmethod
    def read(cls, file: Path) -> Settings:
        """Return what an adapter_config.json says.

        Raise MoeccError if the adapter is no plain LoRA, or if a setting can't be read.
        """
        config = read_json(file)
        _require_plain(file, config)
        patterns = config.get("alpha_pattern") or {}
        parameters = config.get("target_parameters") or []
        if not isinstance(patterns, dict):
            raise _odd(file, "alpha_pattern", patterns)
        if not isinstance(parameters, list):
            raise _odd(file, "target_parameters", parameters)
        return cls(
            alpha=_number(file, "lora_alpha", config.get("lora_alpha")),
            patterns=tuple((_pattern(file, p), _number(file, p, a)) for p, a in patterns.items()),
            rank_stabilized=bool(config.get("use_rslora")),
            parameters=tuple(map(str, parameters)),
        )

    def scaling(self, module: str, rank: int) -> float:
        """Return the factor of B A: alpha / rank, or alpha / sqrt(rank) (arXiv 2312.03732)."""
        alpha = next((a for pattern, a in self.patterns if pattern.match(module)), self.alpha)
        return alpha / (math.sqrt(max(rank, 1)) if self.rank_stabilized else max(rank, 1))


def _require_plain(file: Path, config: Json) -> None:
    """Raise MoeccError if the configuration asks for more than scaling * B A."""
    if config.get("peft_type") != "LORA":
        raise MoeccError(
            f"{file.parent}: an adapter of type {quoted(config.get('peft_type'))}; moecc merges "
            "LORA, merge this one with PEFT first"
        )
    odd = [k for k in _UNKNOWN if config.get(k)]
    if config.get("bias") not in (None, "none"):
        odd.append("bias")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _PLAIN_STARTS:
        odd.append(f"init_lora_weights={quoted(start)}")
    if odd:
        raise MoeccError(
            f"{file.parent}: {', '.join(odd)} in its {file.name} can't be merged here; "
            "merge it with PEFT first"
        )


def _number(file: Path, name: str, value: object) -> float:
    if value is None:
        raise MoeccError(f"{file}: no {name}; save the adapter again")
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise _odd(file, name, value)
    return float(value)


def _pattern(file: Path, text: str) -> re.Pattern[str]:
    """Return what PEFT makes of a pattern: it matches the end of a module's path."""
    few = len(text) <= _LONGEST and len(re.findall("[*+]", text)) <= _MOST_REPETITIONS
    try:
        if few and _PLAIN_PATTERN.fullmatch(text):
            return re.compile(rf"(.*\.)?({text})$")
    except re.error:
        pass
    raise MoeccError(
        f"{file}: {quoted(text)} in alpha_pattern is no simple pattern; merge it with PEFT first"
    )


def _odd(file: Path, name: str, value: object) -> MoeccError:
    return MoeccError(f"{file}: {quoted(name)} is {quoted(value)}; save the adapter again")

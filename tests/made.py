"""Checkpoints of tiny models, runs of commands, and what loaded models compute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, make
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from moecc import cli
from moecc.checkpoint.files import write_safetensors
from moecc.pipeline import journal
from moecc.types import FamilyModule, Json

EVERYTHING = "kbvq{rank=4,mean=2},vsraq{steps=3},dense{group=16}"
QUICK = "vq{rounds=1,codebook=layer}"
ROWS = ("--rows", "8", "--length", "32")
ROOT = Path(__file__).parents[1]
TINYMOE = ROOT / "examples" / "tinymoe"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with the tiny models' 64 tokens: one per character, none in front."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,:;()[]{}=_-+*/'\"<>#"
    vocabulary = {token: i for i, token in enumerate([*special, *letters][:64])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


# tests/families.py leaves these sizes as in the real model, and a compilation then takes minutes.
SMALLER: dict[str, dict[str, Any]] = {
    "muse_spark_text": dict(moe_hidden_size=32),
    "glm5_next_text": dict(linear_num_heads=2, linear_head_dim=8),
    "kimi_linear": dict(linear_num_heads=2, linear_head_dim=8),
}


def checkpoint(
    folder: Path,
    family: str = "mixtral",
    dtype: torch.dtype = torch.float32,
    shard: str = "1GB",
    **config: Any,
) -> Path:
    """Save a tiny model of a family and its tokenizer as a checkpoint; return the folder.

    shard: the size of its largest file. config: settings that differ from those in
    tests/families.py.
    """
    entry = FAMILIES[family]
    smaller = replace(entry, config={**entry.config, **SMALLER.get(family, {}), **config})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, family, smaller)
        make(family, dtype).save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    return folder


def copy_tokenizer(folder: Path) -> None:
    """Copy the example model's tokenizer, of 4096 tokens, into `folder`."""
    for name in TOKENIZER:
        shutil.copy(TINYMOE / name, folder)


class Run:
    """One run of the command line: its exit code, stdout and stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *args: str | int | Path):
        capsys.readouterr()
        self.code = cli.main([str(a) for a in args])
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> Json:
        found: Json = json.loads(self.out)
        return found


def with_rows(
    options: Sequence[str | int | Path], rows: Sequence[str] = ROWS
) -> list[str | int | Path]:
    """Return options, and those of `rows` that they don't give: no option is taken twice."""
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return [*options, *(word for pair in pairs if pair[0] not in options for word in pair)]


Command = Callable[..., Run]  # the fixture `moecc` of conftest.py
Compile = Callable[..., Run]  # the fixture `compile` of conftest.py


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file in a folder, by its relative path."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> FamilyModule:
    """Load a checkpoint or an artifact in transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


PROMPT = torch.tensor([[5, 9, 12, 20, 33, 7, 8, 41, 17, 17, 30, 6]])


@torch.no_grad()
def logits(model: FamilyModule) -> Tensor:
    """Return a model's logits on PROMPT."""
    found: Tensor = model(input_ids=PROMPT).logits
    return found


@torch.no_grad()
def greedy(model: FamilyModule, ids: Tensor, steps: int) -> Tensor:
    """Decode by argmax, without a cache."""
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def generated(model: FamilyModule, ids: Tensor, steps: int) -> Tensor:
    """Decode with transformers' generate() and its cache, past any end-of-text token."""
    model.generation_config.eos_token_id = None
    made: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        do_sample=False,
        use_cache=True,
    )
    return made


def stop(patch: pytest.MonkeyPatch, where: str, stage: int, how: Callable[[], object]) -> None:
    """Make the next run call `how`.

    where: "before saving" or "after saving" the work of a stage, or "writing" the artifact.
    """
    save, write = journal.Journal.save, write_safetensors

    def saving(self: journal.Journal, at: int, *rest: Any) -> None:
        if where == "before saving" and at == stage:
            how()
        save(self, at, *rest)
        if where == "after saving" and at == stage:
            how()

    patch.setattr(journal.Journal, "save", saving)
    patch.setattr(
        "moecc.artifact.write.write_safetensors",
        lambda *args: how() if where == "writing" else write(*args),
    )


def watch(patch: pytest.MonkeyPatch) -> list[bool]:
    """Record for each stage of the next run whether it is restored."""
    restored: list[bool] = []
    original = journal.Journal.restore

    def restore(self: journal.Journal, *rest: Any) -> bool:
        restored.append(original(self, *rest))
        return restored[-1]

    patch.setattr(journal.Journal, "restore", restore)
    return restored


def interrupt() -> None:
    """Interrupt a run as Ctrl-C does."""
    raise KeyboardInterrupt


# a layer pass of a user's own
MY_PASS = '''"""Halves the first layer's norm."""

from dataclasses import dataclass

from moecc.pipeline.passes import LayerPass, option


@dataclass(frozen=True, kw_only=True)
class Shrink(LayerPass):
    name = "shrink"
    by: float = option(2.0, help="divisor", low=1, high=8)

    def run_layer(self, layer, ctx):
        if layer.index != 1:
            return False
        weight = "model.layers.0.input_layernorm.weight"
        layer.program.add(weight, layer.program.read(weight) / self.by)
        return True
'''


def flip(data: bytes) -> bytes:
    """Change one bit in the last quarter: of a safetensors file, one of its tensors."""
    at = len(data) * 3 // 4
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-1],
    "a bit": flip,
    "empty": lambda data: b"",
    "a list": lambda data: b"[]",
    "null": lambda data: b"null",
}

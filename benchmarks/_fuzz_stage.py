"""What the fuzzer's inputs are changes of: tiny checkpoints, an artifact, a journal, an adapter.

Also the actions of its runner: they read a file as the commands do, and end before the slow part.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from _fuzz_run import Action, Case, Runner

from moecc.artifact import hf
from moecc.backends.onnx import build
from moecc.checkpoint.source import checkpoint_folder
from moecc.cli.arguments import parser
from moecc.commands.rows import token_rows, tokenizer_of
from moecc.errors import MoeccError, reason
from moecc.frontend.skeleton import bare, skeleton
from moecc.frontend.trace import store_of, trace
from moecc.ir.program import Program
from moecc.passes._tune.peft import adapter_files, require_fitting
from moecc.pipeline.order import require_whole, resolve
from moecc.pipeline.parse import parse_passes
from moecc.target import parse_target

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
import made  # noqa: E402
import traces  # noqa: E402
from families import FAMILIES, Missing, config  # noqa: E402

# The family of each checkpoint: the first is in shards, as a large one is; two have low bits.
CHECKPOINTS = {"mixtral": "mixtral", "qwen": "qwen2_moe", "fp8": "deepseek_v3", "mxfp4": "gpt_oss"}
TEXT = "def main(a, b): return [a + b, 'x' * 3]  # what it is for, in a few words\n" * 40
CHAT = {"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": TEXT}]}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
CALIBRATION = ("--calib", "text.txt", "--rows", "4", "--length", "16")
PASSES = {
    "artifact": "kbvq{rank=4,mean=2,rounds=1},dense{group=16}",
    "stopped": made.QUICK,
    "kept": "sensitivity,vq{rounds=1,codebook=layer}",
}
ADAPTED = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj")


def compilation(part: str) -> list[str]:
    """Return the command that compiles the result or the journal `part`."""
    return ["compile", "mixtral", "--passes", PASSES[part], "-o", "out", *CALIBRATION]


class Stage:
    """The parts, each made when it is first needed, in `folder`/stage.

    patch: makes torch.export run once for every configuration. models: the checkpoints that are
    changed. families: those whose configurations are changed.
    """

    def __init__(
        self,
        folder: Path,
        patch: pytest.MonkeyPatch,
        models: Sequence[str] = tuple(CHECKPOINTS),
        families: Sequence[str] = tuple(FAMILIES),
    ):
        self.folder, self.models, self.families = folder / "stage", models, families
        self.folder.mkdir(parents=True)
        traces.trace_once(patch)
        self._names: dict[tuple[str, str], list[str]] = {}
        self._program: Program | None = None
        self.runner = Runner(self.folder, self._actions())

    def need(self, *parts: str) -> tuple[str, ...]:
        """Make the parts that aren't there; return them."""
        for part in parts:
            if not (self.folder / part).exists():
                self._maker(part)(self.folder / part)
        return parts

    def read(self, path: str) -> bytes:
        """Return the bytes of a file of a part, which is made if it isn't there."""
        self.need(path.split("/")[0])
        return (self.folder / path).read_bytes()

    def names(self, part: str, pattern: str = "*") -> list[str]:
        """Return the paths of the files in a part."""
        if (part, pattern) not in self._names:
            self.need(part)
            found = (f for f in (self.folder / part).rglob(pattern) if f.is_file())
            self._names[part, pattern] = sorted(str(f.relative_to(self.folder)) for f in found)
        return self._names[part, pattern]

    def program(self) -> Program:
        """Return the traced program of the first checkpoint."""
        self.need("mixtral")
        if self._program is None:
            self._program = trace(self.folder / "mixtral", dtype=torch.float32)
        return self._program

    # ---------------------------------------------------------------- parts

    def _maker(self, part: str) -> Callable[[Path], object]:
        if part in CHECKPOINTS:
            return self._checkpoint
        made_by: dict[str, Callable[[Path], object]] = {
            "artifact": self._compiled,
            "whole-stopped": self._compiled,
            "whole-kept": self._compiled,
            "stopped": self._journal,
            "kept": self._journal,
            "adapter": _adapter,
            "exported": self._exported,
            "configs": self._configs,
            "text.txt": lambda file: file.write_text(TEXT, encoding="utf-8"),
            "rows.jsonl": lambda file: file.write_text(
                "".join(json.dumps(row) + "\n" for row in ({"text": TEXT}, CHAT)), encoding="utf-8"
            ),
            "rows.json": lambda file: file.write_text(
                json.dumps([{"text": TEXT}, CHAT]), encoding="utf-8"
            ),
        }
        return made_by[part]

    def _checkpoint(self, folder: Path) -> None:
        made.checkpoint(folder, CHECKPOINTS[folder.name])
        settings = folder / "tokenizer_config.json"
        told = json.loads(settings.read_text()) | {"chat_template": TEMPLATE}
        settings.write_text(json.dumps(told))
        if folder.name == "mixtral":
            model = made.load(folder)
            (folder / "model.safetensors").unlink()
            model.save_pretrained(folder, max_shard_size="60KB")
        if folder.name in ("fp8", "mxfp4"):
            from test_low_bit import FP8, MXFP4, in_fp8, in_mxfp4, rewritten

            method, change = (FP8, in_fp8) if folder.name == "fp8" else (MXFP4, in_mxfp4)
            rewritten(folder, method, change)
        trace(folder, dtype=torch.float32)  # the forked processes find it

    def _compiled(self, folder: Path) -> None:
        self._keep(compilation(folder.name.removeprefix("whole-")), "out", folder)
        if folder.name == "artifact":
            trace(folder, dtype=torch.float32)

    def _journal(self, folder: Path) -> None:
        stage = "1" if folder.name == "stopped" else "2"
        command = ["stopped", stage, *compilation(folder.name)]
        self._keep(command, "out.partial", folder, code=130)

    def _exported(self, folder: Path) -> None:
        build.library()  # else `bench` compiles it
        self._keep(["export", "artifact", "--to", "onnx", "-o", "out"], "out", folder, "artifact")

    def _keep(
        self, command: Sequence[str], made_there: str, folder: Path, *more: str, code: int = 0
    ) -> None:
        """Run a command in a process of its own, and keep the folder that it makes."""
        parts = self.need("mixtral", "text.txt", *more)
        self.runner.keep(Case("stage", parts, {}, command), made_there, folder, code)

    def _configs(self, folder: Path) -> None:
        for name in self.families:
            try:
                config(name).save_pretrained(folder / name)
            except Missing:
                continue

    # ---------------------------------------------------------------- actions

    def _actions(self) -> dict[str, Action]:
        def fit(arguments: Sequence[str]) -> None:
            adapter_files("lora", arguments[0])
            require_fitting("lora", arguments[0], self.program())

        return {
            "store": _store,
            "skeleton": lambda arguments: _done(skeleton(arguments[0])),
            "load": _load,
            "rows": _rows,
            "fit": fit,
            "resolve": _resolve,
            "target": lambda arguments: parse_target(arguments[0]).check(Path(arguments[1])),
            "stopped": _stopped,
        }


def _done(found: object) -> None:
    return None


def _load(arguments: Sequence[str]) -> None:
    """Load an artifact in transformers. What transformers itself refuses counts as refused."""
    try:
        hf.load(arguments[0])
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, MoeccError) or any("/moecc/" in f.filename for f in frames[2:]):
            raise
        raise MoeccError(reason(error)) from error


def _store(arguments: Sequence[str]) -> None:
    """Check that a folder's weights fit its configuration, and read them all."""
    store = store_of(bare(checkpoint_folder(arguments[0])))
    if store is None:
        raise MoeccError("no weights")
    store.check()
    for name in store.names():
        store.read(name)
    store.digest()


def _rows(arguments: Sequence[str]) -> None:
    """Make token rows of texts with a folder's tokenizer."""
    folder, *files = arguments
    tokenizer = tokenizer_of(checkpoint_folder(folder))
    token_rows(tokenizer, [Path(f) for f in files], count=4, length=16)


def _resolve(arguments: Sequence[str]) -> None:
    """Put the passes of a text in order, and print the text of what that gives."""
    passes = resolve(parse_passes(arguments[0])[0])[0]
    require_whole(passes)
    print(",".join(map(str, passes)))


def _stopped(arguments: Sequence[str]) -> None:
    """Run a command, and interrupt it once a stage is in its journal."""
    stage, *command = arguments
    made.stop(pytest.MonkeyPatch(), "after saving", int(stage), made.interrupt)
    options = parser().parse_args(command)
    options.run(options)


def _adapter(folder: Path) -> None:
    """Write plain LoRA of two matrices, as PEFT saves it."""
    from test_lora import adapter, linear

    shapes = linear(ADAPTED[0], 32, 32) | linear(ADAPTED[1], 16, 32)
    adapter(folder, shapes, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 3})

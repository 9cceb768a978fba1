"""The command line: bad input is one line, and streams and exit codes are as promised."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from families import config, make
from made import ROOT, TINYMOE, Command, copy_tokenizer

from moecc import cli
from moecc.cli import calls
from moecc.errors import MoeccError, may_pass

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once")


# ---- bad input


BAD = {
    "no command": "",
    "no such command": "complie",
    "an unknown option": "passes --nope",
    "compile without passes": "compile MODEL -o OUT",
    "compile without an output": "compile MODEL --passes vq",
    "compile with zero bits": "compile MODEL --passes vq --bits 0 -o OUT",
    "compile with a misspelt pass": "compile MODEL --passes kbvqq -o OUT",
    "compile with a bad option": "compile MODEL --passes vq{bitz=2} -o OUT",
    "compile a missing model": "compile ./nothing --passes vq -o OUT",
    "compile with a missing text": "compile MODEL --passes vq --calib ./none.txt -o OUT",
    "compile for a missing backend": "compile MODEL --passes vq --backend nope -o OUT",
    "compile onto itself": "compile MODEL --passes vq -o MODEL",
    "inspect a missing model": "inspect ./nothing",
    "inspect in the home of nobody": "inspect ~no-such-user/model",
    "inspect a file": "inspect MODEL/config.json",
    "inspect with bits alone": "inspect MODEL --bits 2",
    "inspect with a misspelt pass": "inspect MODEL --passes kbvqq",
    "eval without a reference": "eval MODEL",
    "eval with a missing reference": "eval MODEL --reference ./nothing",
    "eval with a binary text": "eval MODEL --reference MODEL --text MODEL/model.safetensors",
    "eval with no rows": "eval MODEL --reference MODEL --rows -1",
    "generate from a missing model": "generate ./nothing",
    "generate with a negative temperature": "generate MODEL --temperature -1",
    "generate with a seed beyond 64 bits": "generate MODEL --seed 99999999999999999999",
    "generate from an empty prompt": "generate MODEL --prompt ''",
    "generate more than there are positions for": "generate MODEL --max-new-tokens 100000",
    "generate from bytes that are no text": "generate MODEL --prompt \udcff",
    "a bar for a command that has none": "passes --progress",
    "diff of three models": "diff MODEL MODEL MODEL",
    "passes with a misspelt name": "passes kbvqq",
    "passes of a missing file": "passes ./my_pass.py",
    "export of a profile with bits that it doesn't take": "export MODEL --to onnx{bits=8} -o OUT",
    "diff with one model": "diff MODEL",
    "diff with a missing model": "diff MODEL ./nothing",
    "two references": "eval OUT --reference MODEL --reference MODEL",
    "threads twice": "bench OUT --threads 1 --threads 2",
}


WORDS = {
    "compile M --pases kbvq -o O": "no option --pases; did you mean --passes?",
    "compile M --passes kbvq --sed 1 -o O": "no option --sed; did you mean --seed?",
    "generate M --zzz=1": "no option --zzz",
    "generate M --prompt=--zzz --zzz x": "no option --zzz",
    "generate M --prompt '--zzz x' --zzz x": "no option --zzz",
    "compile M --passes kbvq -o ''": "argument -o/--out: '' is no path; is a variable empty?",
    "compile M --passes kbvq -o O --dump=": "argument --dump: '' is no path; is a variable empty?",
    "eval M --reference M --text ''": "argument --text: '' is no path; is a variable empty?",
    "bench ''": "argument OUT: '' is no path; is a variable empty?",
    "diff M M M": "unrecognized arguments: M",
}


@pytest.mark.parametrize(("line", "says"), WORDS.items())
def test_arguments_that_cannot_be_read_are_named(moecc: Command, line: str, says: str) -> None:
    got = moecc(*shlex.split(line))
    command = line.split()[0]
    assert got.code == 2
    assert got.err == f"moecc: error: {says}; see `moecc {command} --help`\n"


def test_each_command_line_is_read_anew(moecc: Command) -> None:
    for _ in range(2):
        assert "no folder './nothing'" in moecc("generate", "./nothing", "--seed", "1").err


@pytest.mark.parametrize("line", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("as_json", [False, True])
def test_bad_input_is_one_line(
    moecc: Command, line: str, as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = [arg.replace("MODEL", str(TINYMOE)) for arg in shlex.split(line)]
    got = moecc(*args, *(["--json"] if as_json and args else []))
    assert got.code == 2
    assert got.out == ""
    last = got.err.splitlines()[-1]
    assert last.startswith("moecc: error: ") and len(last) > 30
    assert "Traceback" not in got.err
    assert len([x for x in got.err.splitlines() if "error" in x]) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["inspect", "compile"])
def test_commands_refuse_a_missing_model_in_the_same_words(
    moecc: Command, command: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    options = ("--passes", "vq", "-o", tmp_path / "out") if command == "compile" else ()
    for source, says in (
        ("./nothing", "no folder './nothing'; give a checkpoint folder or a hub id such as "),
        ("nothing", "no folder 'nothing' here, and the hub gave no model of that name"),
        (tmp_path / "empty", "has no config.json; give the folder of a transformers checkpoint"),
        (TINYMOE / "config.json", "is a file; give the folder that holds config.json and"),
    ):
        got = moecc(command, source, *options)
        assert got.code == 2 and says in got.err
        assert Path(source).name in got.err


def test_a_checkpoint_without_weights_or_tokenizer_is_refused(
    moecc: Command, tmp_path: Path
) -> None:
    config("mixtral").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert "no tokenizer" in moecc("eval", tmp_path, "--reference", tmp_path).err
    (tmp_path / "model.safetensors").unlink()
    copy_tokenizer(tmp_path)
    compare = ("eval", tmp_path, "--reference", tmp_path, "--rows", "1")
    for args in (compare, ("diff", tmp_path, tmp_path), ("generate", tmp_path)):
        got = moecc(*args)
        assert got.code == 2 and "no *.safetensors weights" in got.err
        assert "\n" not in got.err.strip()


def test_rows_that_a_trace_does_not_hold_for_are_refused(moecc: Command, tmp_path: Path) -> None:
    model = make("zaya")
    model.config.vocab_size = 4096  # as the tokenizer's
    model.resize_token_embeddings(4096)
    model.save_pretrained(tmp_path)
    copy_tokenizer(tmp_path)
    got = moecc("eval", tmp_path, "--reference", tmp_path, "--rows", "1", "--length", "2")
    assert "note: the trace holds for sequence other than 2 only\n" in got.err
    assert got.code == 2
    assert "rows of 2 tokens, but the trace holds for sequence other than 2 only" in got.err


def test_a_tokenizer_of_another_model_is_refused(moecc: Command, tmp_path: Path) -> None:
    make("mixtral").save_pretrained(tmp_path)
    copy_tokenizer(tmp_path)
    got = moecc("eval", tmp_path, "--reference", tmp_path, "--rows", "1", "--length", "16")
    assert got.code == 2 and "outside the model's vocabulary" in got.err
    got = moecc("generate", tmp_path)
    assert got.code == 2 and "copy the model's own tokenizer" in got.err


# ---- exit codes and streams


def raising(error: BaseException) -> Callable[..., NoReturn]:
    """Return a command that prints to stdout and then raises `error`."""

    def run(*args: object, **kwargs: object) -> NoReturn:
        print("a library's chatter")
        raise error

    return run


def test_each_kind_of_error_has_its_exit_code(
    moecc: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MoeccError("two\nlines"), 2, "error: two lines"),
        (RuntimeError("a fault"), 3, "internal error: RuntimeError: a fault"),
        (SystemExit(0), 3, "internal error: SystemExit: 0"),
        (SystemExit("a text"), 3, "internal error: SystemExit: a text"),
    ]
    for error, code, line in cases:
        monkeypatch.setattr("moecc.commands.inspect.inspect_model", raising(error))
        got = moecc("inspect", TINYMOE, "--json")
        assert got.code == code and got.out == ""
        assert f"moecc: {line}" in got.err and "Traceback" not in got.err
        monkeypatch.setenv("MOECC_DEBUG", "1")
        assert ("Traceback" in moecc("inspect", TINYMOE).err) == (code != 130)
        monkeypatch.delenv("MOECC_DEBUG")


class OfALibrary(Exception):
    """An error as onnxruntime has it, of no base class but Python's."""


def test_too_little_memory_is_one_line(moecc: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        OfALibrary("std::bad_alloc"),
    ):
        assert may_pass(error)
        monkeypatch.setattr("moecc.commands.inspect.inspect_model", raising(error))
        got = moecc("inspect", TINYMOE)
        line = got.err.splitlines()[-1]
        assert got.code == 2 and line.startswith("moecc: error: out of memory")
    assert not may_pass(MoeccError("'out of memory' is the name of a tensor"))


class Closed(io.StringIO):
    """A stream that nobody reads any more."""

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


@pytest.mark.parametrize("debug", ["0", "1"])
def test_what_compiled_libraries_print_joins_no_result(debug: str) -> None:
    code = (
        "import ctypes, os, sys\n"
        "from moecc import cli\n"
        "from moecc.commands import passes\n"
        "real = passes.describe_pass\n"
        "def found(name):\n"
        "    os.write(1, b'chatter of Rust\\n')\n"
        "    ctypes.CDLL(None).printf(b'chatter of C\\n')\n"
        "    return real(name)\n"
        "passes.describe_pass = found\n"
        "sys.exit(cli.main(['passes', 'vq', '--json']))\n"
    )
    exit_code, out, err = process("-c", code, MOECC_DEBUG=debug)
    assert exit_code == 0 and json.loads(out)["name"] == "vq"
    assert err == ("chatter of Rust\nchatter of C\n" if debug == "1" else "")


def test_a_closed_stderr_ends_no_run(moecc: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []

    def inspecting(*args: object, **kwargs: object) -> NoReturn:
        for line in ("a remark", "another"):
            calls.say(line)
            print("a library's chatter", flush=True)
            said.append(1)
        raise MoeccError("no model")

    monkeypatch.setattr("moecc.commands.inspect.inspect_model", inspecting)
    monkeypatch.setattr(sys, "stderr", Closed())
    assert moecc("inspect", TINYMOE).code == 2 and said == [1, 1]


def test_a_process_without_stderr_writes_remarks_into_no_other_file(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.close(2); sys.stderr = None\n"
        "from moecc import cli; cli.main(['passes', 'x'])\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); assert file.fileno() > 2\n"
        "os.write(2, b'a remark'); file.close(); print(open(file.name).read())"
    )
    assert process("-c", code) == (0, "\n", "")


def test_help_and_version_go_to_stdout(moecc: Command) -> None:
    assert moecc("--version").out.startswith("moecc ")
    for args in ([], ["compile"], ["inspect"], ["eval"], ["generate"], ["passes"], ["diff"]):
        got = moecc(*args, "--help")
        assert got.code == 0 and "usage: moecc" in got.out and got.err == ""


def test_a_stdout_that_takes_no_more_is_one_line() -> None:
    code = (
        "import sys; from moecc import cli; cli._run = lambda *args: cli._write('x' * 9000)\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    says = "moecc: error: stdout can't be written: No space left on device; free some space"
    for line in (["--version"], ["passes"]):
        with open("/dev/full", "w") as full:
            got = subprocess.run(
                [sys.executable, "-c", code, *line], stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert (got.returncode, got.stderr) == (2, f"{says} or write elsewhere\n")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_gets_no_control_characters_of_a_result(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdout = io.StringIO()
    monkeypatch.setattr(stdout, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", stdout)
    said = "caf\u00e9\t\u200d\U0001f44d\n\x1b[2J\r\x9b\x7f"
    found = argparse.Namespace(run=lambda options: (0, {}, said), json=False)
    assert cli._run(found, debug=True) == 0
    shown = "caf\u00e9\t\u200d\U0001f44d\n\\x1b[2J\\r\\x9b\\x7f"
    assert stdout.getvalue() == (shown if terminal else said) + "\n"


def process(*args: str, **environment: str) -> tuple[int, str, str]:
    """Run Python with these arguments; return exit code, stdout and stderr."""
    got = subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )
    return got.returncode, got.stdout, got.stderr


def test_a_process_ends_with_the_exit_code() -> None:
    line = "moecc: error: no pass 'kbvqq'; did you mean 'kbvq'?\n"
    assert process("-m", "moecc.cli", "passes", "kbvqq") == (2, "", line)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_text_that_a_stream_cannot_encode_is_escaped(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lone surrogate, of bytes in an argument that are no text, fits no encoding."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, errors="strict") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    made = {"prompt": "日本", "text": "né\udcff"}

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise MoeccError("no 日本")

    monkeypatch.setattr("moecc.commands.generate.generate", lambda *args, **kwargs: made)
    assert cli.main(["generate", "MODEL"]) == 0
    monkeypatch.setattr("moecc.commands.generate.generate", refuse)
    assert cli.main(["generate", "MODEL"]) == 2
    assert out.errors == err.errors == "strict"
    said, complained = (stream.buffer.getvalue() for stream in (out, err))  # type: ignore[attr-defined]
    assert said == "日本né\udcff\n".encode(encoding, "backslashreplace")
    assert complained == "moecc: error: no 日本\n".encode(encoding, "backslashreplace")


def test_an_interrupt_while_torch_is_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    path = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]"
    code = f"{path}; from moecc.cli import main; sys.exit(main())"
    assert process("-c", code, "passes") == (130, "", "moecc: interrupted\n")


def test_a_command_imports_all_it_needs() -> None:
    code, out, _ = process(
        "-c", "import sys; from moecc.cli import main; sys.exit(main())", "passes", "vq"
    )
    assert code == 0 and "moments -> vq" in out


def test_progress_is_off_unless_asked_for(moecc: Command) -> None:
    assert "comparing" not in moecc("diff", TINYMOE, TINYMOE).err
    assert "comparing" in moecc("diff", TINYMOE, TINYMOE, "--progress").err


# ---- passes


def test_passes_lists_every_pass_with_its_options(moecc: Command) -> None:
    found = moecc("passes", "--json").json["passes"]
    assert {"moments", "klt", "vq", "affine", "fold", "kbvq"} <= {p["name"] for p in found}
    assert all(p["summary"] and p["scope"] in ("layer", "model", "composite") for p in found)
    one = moecc("passes", "vq")
    assert one.code == 0
    for part in ("bits=2", "2 | 3 | 4", "moments -> vq"):
        assert part in one.out
    assert "stands for moments,klt,vq,affine,fold" in moecc("passes", "kbvq").out
    options = {o["name"]: o for o in moecc("passes", "vq", "--json").json["options"]}
    assert options["bits"]["default"] == 2 and options["bits"]["help"]


COMPOSITE = """from dataclasses import dataclass
from moecc.passes.vq import VectorQuantize
from moecc.pipeline.passes import Composite

@dataclass(frozen=True, kw_only=True)
class Mine(Composite):
    name = "mine"
    parts = (VectorQuantize,)

    def stands_for(self):
        {body}
"""
WRONG = {
    "raise KeyError('x')": "failed: KeyError: 'x' ({file}, line 11)",
    "raise SystemExit(3)": "failed: SystemExit: 3 ({file}, line 11)",
    "return None": "stands for None; give a list of passes",
    "return [VectorQuantize]": "stands for [<class 'moecc.passes.vq.VectorQuantize'>]; give a list",
}


@pytest.mark.parametrize("body", WRONG)
def test_a_composite_of_ones_own_that_is_wrong_is_named(
    body: str, moecc: Command, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(COMPOSITE.format(body=body))
    for args in (("passes", file), ("inspect", TINYMOE, "--passes", file)):
        got = moecc(*args)
        assert got.code == 2
        assert got.err.startswith(f"moecc: error: {file} " + WRONG[body].format(file=file))

"""The op library's part of the fuzzer: nodes whose operands and attributes are changed.

Sessions run in a process of their own, in which the library was compiled with address and
undefined-behaviour sanitizers. Weights are inputs of the graph, so that each tensor has memory that
ends where the tensor does. A node is refused with a message or computed; a report of a sanitizer
ends the process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _fuzz_run import Case, Outcome, Runner, fault_of_signal
from _fuzz_stage import Stage
from _fuzz_worker import MEMORY, PATIENCE, asleep
from _mutate import NUMBERS, STRINGS, WHOLE, Mutator

_SESSIONS = Path(__file__).with_name("_fuzz_sessions.py")
_REPORT = "==ERROR: ", "runtime error: "
_FLOATS = [n for n in NUMBERS if isinstance(n, float)]
_INT64 = [n for n in WHOLE if -(1 << 63) <= n < 1 << 63]
Arrays = dict[str, np.ndarray]


# ---------------------------------------------------------------- inputs


def draw(m: Mutator, stage: Stage) -> Case:
    """A node of the dialect with changed operands, shapes, values, types or attributes."""
    import onnx

    nodes(stage)
    name = m.pick(stage.names("ops", "*.onnx")).removesuffix(".onnx")
    model = onnx.load_from_string(stage.read(f"{name}.onnx"))
    arrays = dict(np.load(io.BytesIO(stage.read(f"{name}.npz"))))
    for _ in range(m.pick([1, 1, 2, 3])):
        if m.chance(0.85):
            _change(m, arrays)
        else:
            _change_node(m, next(n for n in model.graph.node if n.domain == "moecc"))
    _fit(model, arrays)
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    changes = {"model.onnx": model.SerializeToString(), "inputs.npz": packed.getvalue()}
    return Case("ops", (), changes, ["ops", m.pick(isas())])


def nodes(stage: Stage) -> None:
    """Write the nodes that are changed, each with operands that fit: `ops/*.onnx` and `*.npz`."""
    folder = stage.folder / "ops"
    if folder.exists():
        return
    folder.mkdir()
    import onnx
    import test_attention
    import test_masks
    import test_native

    for name, case in test_native.CASES.items():
        if not name.startswith(("act_", "loud_", "plain_")) and case.hidden < 500:
            test_native.write(folder, f"e_{name}", replace(case, fed=True, tokens=(3,)))
    for name, case in test_attention.CASES.items():
        test_attention.write(folder, f"a_{name}", case, case.made())
    for i, (tokens, padding, total, window) in enumerate(test_masks.CASES):
        onnx.save(test_masks.of_one_node(window), folder / f"m_{i}.onnx")
        np.savez(folder / f"m_{i}.npz", **test_masks.feed(tokens, padding, total))
    for file in folder.glob("*.npz"):  # "RUN/OPERAND" of the one run
        arrays = {n.rpartition("/")[2]: a for n, a in np.load(file).items()}
        np.savez(file, **arrays)


def isas() -> list[str]:
    """Return the instruction sets that this machine has kernels for."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = {"avx2": " avx2 ", "avx512": " avx512_vnni "}
    return ["scalar", *(name for name, flag in found.items() if flag in flags)]


def _change(m: Mutator, arrays: Arrays) -> None:
    """Change an operand."""
    name = m.pick(list(arrays)) if arrays else "x"
    array = arrays.get(name, np.zeros((1, 1), np.float32))
    match m.random.randrange(8):
        case 0:
            arrays.pop(name, None)
        case 1:
            other = m.pick(list(arrays) or [name])
            arrays[name], arrays[other] = arrays.get(other, array), array
        case 2:
            kinds = (np.float16, np.float32, np.int8, np.uint8, np.int64, np.bool_)
            with np.errstate(all="ignore"):
                arrays[name] = array.astype(m.pick(kinds))
        case 3 | 4:
            arrays[name] = _values(m, array)
        case _:
            arrays[name] = _shaped(m, array)


def _shaped(m: Mutator, array: np.ndarray) -> np.ndarray:
    """Change a shape: a size, the order of sizes, or how many there are."""
    sizes = list(array.shape)
    if sizes and m.chance(0.6):
        at = m.random.randrange(len(sizes))
        n = sizes[at]
        sizes[at] = m.pick([n + 1, max(n - 1, 0), 2 * n, n // 2, 0, 1, n + 64, 256])
        if 0 in sizes and m.chance(0.3):  # no elements, and a size that nobody has memory for
            sizes[m.random.randrange(len(sizes))] = m.pick([1 << 20, 1 << 31, 1 << 40])
            sizes = [0, *sizes[1:]] if 0 not in sizes else sizes
    else:
        ways = [sizes[::-1], sizes[:-1], [*sizes, 1], [1, *sizes], [], [array.size]]
        sizes = m.pick([*ways, [*sizes, *[1] * 9]])
    return np.resize(array, sizes) if 0 not in sizes else np.empty(sizes, array.dtype)


def _values(m: Mutator, array: np.ndarray) -> np.ndarray:
    """Change some values: to odd ones of the type."""
    changed = array.copy()
    flat = changed.reshape(-1)
    if not flat.size:
        return changed
    at = slice(None) if m.chance(0.3) else m.random.randrange(flat.size)
    with np.errstate(all="ignore"):
        if array.dtype.kind == "f":
            flat[at] = m.pick(_FLOATS)
        elif array.dtype == np.int64:
            flat[at] = m.pick(_INT64)
        else:
            bytes_of = np.frombuffer(m.random.randbytes(changed.nbytes), np.uint8)
            flat.view(np.uint8)[at] = bytes_of[at] if array.dtype != np.bool_ else bytes_of[at] & 1
    return changed


def _change_node(m: Mutator, node: Any) -> None:
    """Change, drop or double an attribute, or leave an operand out."""
    from onnx import AttributeProto, helper

    if not node.attribute or m.chance(0.2):
        at = m.random.randrange(len(node.input))
        node.input[at] = m.pick(["", *node.input])
        return
    at = m.random.randrange(len(node.attribute))
    name, kind = node.attribute[at].name, node.attribute[at].type
    del node.attribute[at]
    words = [word for word in STRINGS if "\ud800" > word or word > "\udfff"]
    values: dict[int, Sequence[Any]] = {
        AttributeProto.FLOAT: _FLOATS,
        AttributeProto.INT: _INT64,
        AttributeProto.STRING: ["silu", "gelu", "relu", "glu", "oai", "clamp", "none", *words],
    }
    if m.chance(0.9):
        wanted = values.get(kind) if m.chance(0.9) else values[AttributeProto.INT]
        node.attribute.append(helper.make_attribute(name, m.pick(wanted or [[1, 2]])))


def _fit(model: Any, arrays: Arrays) -> None:
    """Declare the graph's inputs as the operands are, so that the op gets to see them."""
    from onnx import helper

    del model.graph.input[:]
    for name, array in arrays.items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        model.graph.input.append(helper.make_tensor_value_info(name, kind, [None] * array.ndim))
    # what the node reads and nobody gives is left out
    made = {name for node in model.graph.node for name in node.output} | arrays.keys()
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            if node.domain == "moecc" and name not in made:
                node.input[at] = ""


# ---------------------------------------------------------------- running them


class OpsRunner:
    """Runs cases of `draw`, in a process for each instruction set."""

    def __init__(self, stage: Path):
        self._files = Runner(stage)
        self._running: dict[str, subprocess.Popen[str]] = {}

    def run(self, case: Case, debug: bool = False) -> Outcome:
        """Run a case and judge it."""
        with tempfile.TemporaryDirectory(dir=self._files.stage.parent) as place:
            folder = Path(place) / "run"
            self._files.prepare(case, folder)
            isa = case.command[1]
            if isa not in self._running:
                self._running[isa] = _process(isa, self._log(isa))
            return self._asked(isa, folder)

    def close(self) -> None:
        for process in self._running.values():
            process.kill()
            process.wait()

    def _log(self, isa: str) -> Path:
        return self._files.stage.with_name(f"ops-{isa}.log")

    def _asked(self, isa: str, folder: Path) -> Outcome:
        process = self._running[isa]
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{folder}\n")
            process.stdin.flush()
        slept = 0
        while slept <= PATIENCE and not select.select([process.stdout], [], [], 1)[0]:
            slept += asleep(process.pid)
        if slept > PATIENCE:
            process.kill()
        if told := process.stdout.readline():
            code, said, seconds, size = json.loads(told)
            return Outcome(code, _fault(said, size), said, seconds, size)
        del self._running[isa]
        ended = process.wait()
        report = self._log(isa).read_text(errors="replace")
        first = next((line for line in report.splitlines() if any(r in line for r in _REPORT)), "")
        fault = f"a sanitizer said {first.strip()[:200]}" if first else fault_of_signal(ended)
        return Outcome(ended, fault, report[-4000:], 0, 0)


def _fault(said: str, size: int) -> str:
    if size > MEMORY:
        return "it took more than 1 GiB of memory"
    if "moecc::" in said and not said.strip().isprintable():
        return "it printed control characters"
    return ""


def _process(isa: str, log: Path) -> subprocess.Popen[str]:
    """Start a process in which the library and its sanitizers are loaded; they report to `log`."""
    from test_native import sanitized

    library, environment = sanitized()
    # what nobody has memory for is an error of the op, not of the allocator
    environment["ASAN_OPTIONS"] += ":quarantine_size_mb=16:allocator_may_return_null=1"
    with log.open("w") as reports:
        process = subprocess.Popen(
            [sys.executable, str(_SESSIONS), str(library)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=reports,
            text=True,
            env=os.environ | environment | {"MOECC_ISA": isa},
        )
    assert process.stdout
    if not process.stdout.readline():
        raise RuntimeError(f"no sessions under sanitizers: {log.read_text()[-2000:]}")
    return process

"""Compile a kernel ahead of time for a card that is not there, and read its machine code.

`compile_launch(launch, target)` turns a `Launch`, whose tensors may be on the meta device, into a
Report: registers, stack, shared memory, matrix instructions and, for the grouped product,
instructions per weight of its inner loop. The triton wheel brings the assembler and the
disassembler. Not for use under TRITON_INTERPRET=1, where kernels are not compiled.

  A spill shows as a stack or as LDL and STL instructions; ptxas reports 0 bytes of local memory
  even so. Instructions per weight are counted in the code, not measured: instructions of the loop *
  threads / weights of a step.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from moecc.backends.triton.parts import Argument, Launch
from moecc.errors import MoeccError


class Target(NamedTuple):
    """A card to compile for."""

    name: str
    backend: str  # triton's
    arch: int | str  # triton's
    lanes: int  # of a warp
    shared: int  # bytes of shared memory per block
    matrix: str  # pattern of its matrix instruction in the machine code


# pattern of sm_80's, which several later cards share
_IMMA = r"\bIMMA\.16832\.S8\.S8"
_HOPPER = r"\bIGMMA\.64x\d+x32\.S8\.S8|\bHGMMA\.64x\d+x16\.F32"
TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", 80, 32, 163 << 10, _IMMA),
        Target("sm_86", "cuda", 86, 32, 99 << 10, _IMMA),
        Target("sm_89", "cuda", 89, 32, 99 << 10, _IMMA),
        Target("sm_90", "cuda", 90, 32, 227 << 10, _HOPPER),
        # triton 3.6 emits IMMA on sm_100
        Target("sm_100", "cuda", 100, 32, 227 << 10, rf"\bUTCIMMA|{_IMMA}"),
        Target("sm_120", "cuda", 120, 32, 99 << 10, _IMMA),
        Target("gfx90a", "hip", "gfx90a", 64, 64 << 10, r"\bv_mfma_i32_\w*i8"),
        Target("gfx942", "hip", "gfx942", 64, 64 << 10, r"\bv_mfma_i32_\w*i8"),
        Target("gfx1100", "hip", "gfx1100", 32, 64 << 10, r"\bv_wmma_i32_\w*iu8"),
    )
}


@dataclass(frozen=True)
class Report:
    """The resources of one kernel on one card."""

    registers: int
    stack: int  # bytes; AMD: spilled registers
    spills: int  # instructions that load or store a spilled register
    shared: int  # bytes
    matrix: int  # matrix instructions
    loops: list[list[str]]  # instructions of the innermost loops with a matrix instruction
    per_weight: float | None  # instructions of the longest of them per weight and lane, if any
    # Machine code. Reading NVIDIA's takes half a second; it stays empty without product and stack.
    code: str
    assembly: str  # the source of the machine code: PTX; on AMD the same as code


_POINTERS = {
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}
_DIVISIBLE = [["tt.divisibility", 16]]


def compile_launch(launch: Launch, target: Target) -> Report:
    """Compile the kernel of a launch for `target` and report on it.

    Arguments are specialised as triton does it: None and 1 become constants, and pointers and
    multiples of 16 are declared divisible. Raise MoeccError if the disassembler's output is
    unknown.
    """
    made = triton.compile(
        _source(launch),
        target=GPUTarget(target.backend, target.arch, target.lanes),
        options={**launch.options, "enable_fp_fusion": True},
    )
    read = _amd if target.backend == "hip" else _nvidia
    return read(made, target, _weights(launch) / (target.lanes * launch.options["num_warps"]))


def _source(launch: Launch) -> ASTSource:
    constants = {p.name for p in launch.kernel.params if p.is_constexpr}
    plain = {p.name for p in launch.kernel.params if p.do_not_specialize}
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Argument] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        one = isinstance(value, int) and value == 1 and name not in plain
        if name in constants or value is None or one:
            signature[name], constexprs[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(i,)] = _POINTERS[value.dtype], _DIVISIBLE
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0 and name not in plain:
                attributes[(i,)] = _DIVISIBLE
        else:
            signature[name] = "fp32"
    told = dict(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    if launch.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(**told)
    return ASTSource(**told)


def _weights(launch: Launch) -> int:
    """Return how many weights a program decodes in one step, 0 if it decodes none."""
    return 64 * launch.number("HEIGHT") * 128 * launch.number("UNROLL", 1)


def _nvidia(made: CompiledKernel, target: Target, weights_per_lane: float) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise MoeccError(
                f"cuobjdump reports no registers for {target.name}: {usage.strip()[:200]!r}"
            )
        code = _cuobjdump("-sass", file.name) if weights_per_lane or int(found[2]) else ""
    instructions = [(int(a, 16), op, rest) for a, op, rest in _INSTRUCTION.findall(code)]
    loops = _loops(instructions, target.matrix)
    longest = max(map(len, loops), default=0)
    return Report(
        registers=int(found[1]),
        stack=int(found[2]),
        spills=sum(op.split(".")[0] in ("LDL", "STL") for _, op, _ in instructions),
        shared=made.metadata.shared + sum(4 * int(n) for n in _TABLE.findall(made.asm["ptx"])),
        matrix=len(re.findall(target.matrix, code)),
        loops=loops,
        per_weight=longest / weights_per_lane if longest and weights_per_lane else None,
        code=code,
        assembly=made.asm["ptx"],
    )


# the lookup table of `decode.spread_table` and of `hopper`, which triton does not count
_TABLE = re.compile(r"\.b32 moecc_table\[(\d+)\]")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*?);")


def _loops(instructions: list[tuple[int, str, str]], matrix: str) -> list[list[str]]:
    """Return the instructions of each innermost loop that has a matrix instruction.

    instructions are (address, operation, operands). A backward jump into the middle of a loop is no
    loop: a wait that took longer than usual ends like that.
    """
    spans = []
    for address, op, rest in instructions:
        to = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if to and (start := int(to[1], 16)) < address:
            if any(re.search(matrix, o) for a, o, _ in instructions if start <= a <= address):
                spans.append((start, address))
    spans = [(s, e) for s, e in spans if not any(a < s <= b < e for a, b in spans)]
    inner = [
        (s, e)
        for s, e in spans
        if not any((s, e) != (a, b) and s <= a and b <= e for a, b in spans)
    ]
    return [[o + r for a, o, r in instructions if s <= a <= e] for s, e in inner]


def _cuobjdump(*options: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), *options], capture_output=True, text=True, check=True).stdout


def _amd(made: CompiledKernel, target: Target, weights_per_lane: float) -> Report:
    code = made.asm["amdgcn"]
    pattern = r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)"
    numbers = {n: int(v) for n, v in re.findall(pattern, code)}
    return Report(
        registers=numbers["vgpr_count"],
        stack=numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"],
        spills=len(re.findall(r"\bscratch_(?:load|store)", code)),
        shared=made.metadata.shared,
        matrix=len(re.findall(target.matrix, code)),
        loops=[],
        per_weight=None,
        code=code,
        assembly=code,
    )


# ---------------------------------------------------------------- a table


def may_spill(launch: Launch) -> int:
    """Return how many bytes of stack a launch may use.

    None, unless 64 tokens or more take every register of sm_90. A program then spills addresses of
    rows of x and reads them again in every step; on an H100 that cost less than a smaller tile did.
    `hopper` reads what it spills once per tile.
    """
    if "STAGES" in launch.arguments:
        return 256
    return 96 if launch.arguments["HOPPER"] and launch.number("TOKENS") >= 64 else 0


class Row(NamedTuple):
    """One kernel on one card."""

    card: str
    kernel: str
    bits: int
    report: Report
    may_spill: int


def row(launch: Launch, target: Target) -> Row:
    """Compile a launch for a card, and return what the compiler reports of it."""
    report = compile_launch(launch, target)
    return Row(target.name, launch.name, launch.number("BITS"), report, may_spill(launch))


def table(rows: list[Row]) -> str:
    """Return a Markdown table with one line per kernel and card."""
    columns = [
        "card",
        "kernel",
        "bits",
        "registers",
        "spilled",
        "shared memory, bytes",
        "matrix instructions",
        "instructions per weight",
    ]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for r in rows:
        per_weight = "" if r.report.per_weight is None else f"{r.report.per_weight:.2f}"
        lines.append(
            f"| {r.card} | {r.kernel} | {r.bits or ''} | {r.report.registers} | {r.report.stack} | "
            f"{r.report.shared} | {r.report.matrix or ''} | {per_weight} |"
        )
    return "\n".join(lines)

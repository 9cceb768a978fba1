"""What a kernel becomes on a card that isn't there: compiled ahead of time, with what the launcher would have given it.

`compile_launch(launch, target)` turns a `Launch` whose tensors may be on the meta device into a Report: registers, stack, shared
memory, matrix instructions and, for the grouped product, instructions per weight of its inner loop. The triton wheel brings
the assembler and the disassembler. Not under TRITON_INTERPRET=1, where kernels aren't compiled.

  A spill shows as a stack or as LDL and STL instructions; ptxas reports 0 bytes of local memory all the same.
  Instructions per weight are counted in the code, not measured: a loop's instructions * threads / weights of a step.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moecc.backends.triton.launch import Launch, Plan, plan
from moecc.backends.triton.pack import COLUMNS, tiles
from moecc.backends.triton.tiles import Card, Tile
from moecc.errors import MoeccError
from moecc.ir.gates import rows_per_unit


class Target(NamedTuple):
    """A card: triton's backend and architecture, lanes of a warp, shared memory of a block in bytes, its matrix instruction."""

    name: str
    backend: str
    arch: Any
    lanes: int
    shared: int
    matrix: str  # pattern in the machine code


TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", 80, 32, 163 << 10, r"\bIMMA\.16832\.S8\.S8"),
        Target("sm_86", "cuda", 86, 32, 99 << 10, r"\bIMMA\.16832\.S8\.S8"),
        Target("sm_89", "cuda", 89, 32, 99 << 10, r"\bIMMA\.16832\.S8\.S8"),
        Target(
            "sm_90",
            "cuda",
            90,
            32,
            227 << 10,
            r"\bIGMMA\.64x\d+x32\.S8\.S8|\bHGMMA\.64x\d+x16\.F32",
        ),
        Target(
            "sm_100", "cuda", 100, 32, 227 << 10, r"\bUTCIMMA|\bIMMA\.16832\.S8\.S8"
        ),  # triton 3.6 knows the second
        Target("sm_120", "cuda", 120, 32, 99 << 10, r"\bIMMA\.16832\.S8\.S8"),
        Target("gfx90a", "hip", "gfx90a", 64, 64 << 10, r"\bv_mfma_i32_\w*i8"),
        Target("gfx942", "hip", "gfx942", 64, 64 << 10, r"\bv_mfma_i32_\w*i8"),
        Target("gfx1100", "hip", "gfx1100", 32, 64 << 10, r"\bv_wmma_i32_\w*iu8"),
    )
}


@dataclass(frozen=True)
class Report:
    """What one kernel takes on one card."""

    registers: int
    stack: int  # bytes; AMD: spilled registers
    spills: int  # instructions that load or store a spilled register
    shared: int  # bytes
    matrix: int  # matrix instructions
    loops: list[list[str]]  # instructions of the innermost loops with a matrix instruction
    per_weight: (
        float | None
    )  # of the longest of them, for each weight and lane; None where there is none
    code: str  # of the machine; empty for a kernel of an NVIDIA card without product and stack: reading it takes half a second
    assembly: str  # what it was made of: PTX, AMD's as code


_POINTERS = {
    torch.int8: "*i8", torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
}  # fmt: skip


def compile_launch(launch: Launch, target: Target) -> Report:
    """Compile what a launch would run on `target`. Integers are specialised as triton does: 1, and multiples of 16."""
    names, constants = (
        launch.kernel.arg_names,
        {p.name for p in launch.kernel.params if p.is_constexpr},
    )
    plain = {p.name for p in launch.kernel.params if p.do_not_specialize}
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(names):
        value = launch.arguments[name]
        if (
            name in constants
            or value is None
            or (isinstance(value, int) and value == 1 and name not in plain)
        ):
            signature[name], constexprs[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(i,)] = _POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0 and name not in plain:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    of: Any = ASTSource
    if launch.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        of = GluonASTSource
    source = of(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {**launch.options, "enable_fp_fusion": True}
    made = triton.compile(
        source, target=GPUTarget(target.backend, target.arch, target.lanes), options=options
    )
    read = _amd if target.backend == "hip" else _nvidia
    return read(made, target, _weights(launch) / (target.lanes * launch.options["num_warps"]))


def _weights(launch: Launch) -> int:
    """Weights that a program decodes in one step; 0 where it decodes none."""
    height, unroll = launch.arguments.get("HEIGHT", 0), launch.arguments.get("UNROLL", 1)
    return int(64 * height * 128 * unroll)


def _nvidia(made: Any, target: Target, weights_per_lane: float) -> Report:
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
        registers=int(found[1]), stack=int(found[2]), spills=sum(op.split(".")[0] in ("LDL", "STL") for _, op, _ in instructions),
        shared=made.metadata.shared + sum(4 * int(n) for n in _TABLE.findall(made.asm["ptx"])),
        matrix=len(re.findall(target.matrix, code)), loops=loops, code=code, assembly=made.asm["ptx"],
        per_weight=longest / weights_per_lane if longest and weights_per_lane else None,
    )  # fmt: skip


_TABLE = re.compile(
    r"\.b32 moecc_table\[(\d+)\]"
)  # of grouped._spread and of hopper; triton doesn't count it
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*?);")


def _loops(instructions: list[tuple[int, str, str]], matrix: str) -> list[list[str]]:
    """What is in each loop with a matrix instruction, but in those that have another such loop in them. A jump into the middle of
    a loop from behind it is none: so waiting ends that took longer than usual."""
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


def _amd(made: Any, target: Target, weights_per_lane: float) -> Report:
    code = made.asm["amdgcn"]
    numbers = {
        n: int(v)
        for n, v in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", code)
    }
    spills = numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]
    return Report(
        registers=numbers["vgpr_count"], stack=spills, spills=len(re.findall(r"\bscratch_(?:load|store)", code)),
        shared=made.metadata.shared, matrix=len(re.findall(target.matrix, code)), loops=[], per_weight=None, code=code,
        assembly=code,
    )  # fmt: skip


# ---------------------------------------------------------------- layers without tensors


class Shape(NamedTuple):
    """One MoE layer's sizes: E experts, k of them per token, D hidden, F intermediate."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int

    @property
    def weights(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.intermediate


SHAPES = {
    "Qwen1.5-MoE-A2.7B": Shape(60, 4, 2048, 1408),
    "Qwen3-30B-A3B": Shape(128, 8, 2048, 768),
    "Mixtral-8x7B": Shape(8, 2, 4096, 14336),
}


def abstract_plan(
    shape: Shape, tokens: int, bits: int, *, dtype: torch.dtype = torch.bfloat16, rank: int = 0, mean: int = 0,
    bias: bool = False, norm: bool = False, act: str = "silu", gate: str = "glu", card: str = "sm_90",
    tile: Tile | None = None,
) -> Plan:  # fmt: skip
    """The plan of a layer of this shape, on the meta device. mean: bits of a shared mean, 0 for none; tile: as `plan`'s."""
    e, d, f = shape.experts, shape.hidden, shape.intermediate

    def coded(
        prefix: str, matrices: int, rows: int, columns: int, bits: int, gated: bool
    ) -> dict[str, Tensor]:
        down, across = tiles(rows, gated=gated), -(-columns // COLUMNS)
        found = {
            "codes": torch.empty(
                (matrices, down, 2 if bits == 4 else 1, across, 512),
                dtype=torch.int32,
                device="meta",
            ),
            "codebook": torch.empty(
                (matrices, 256, 2 if bits == 4 else 4), dtype=torch.int8, device="meta"
            ),
            "scale": torch.empty((matrices, rows), dtype=dtype, device="meta"),
        }
        if bits == 3:
            found["signs"] = torch.empty(
                (matrices, down, across, 256), dtype=torch.int32, device="meta"
            )
        return {prefix + name: t for name, t in found.items()}

    def projection(rows: int, columns: int, *, input_side: bool) -> dict[str, Tensor]:
        gated = input_side and gate != "none"
        p = coded("", e, rows, columns, bits, gated)
        if mean:
            p |= coded("mean_", 1, rows, columns, mean, gated)
        if bias:
            p["bias"] = torch.empty((e, rows), dtype=dtype, device="meta")
        if rank:
            coef = (e, rows, rank) if input_side else (e, rank, columns)
            p["basis"] = torch.empty((rank, d), dtype=dtype, device="meta")
            p["coef"] = torch.empty(coef, dtype=torch.int8, device="meta")
            p["coef_scale"] = torch.empty(coef[:2], dtype=dtype, device="meta")
        return p

    x = torch.empty((tokens, d), dtype=dtype, device="meta")
    index = torch.empty((tokens, shape.top_k), dtype=torch.int64, device="meta")
    weight = torch.empty((tokens, shape.top_k), dtype=dtype, device="meta")
    gate_up = projection(rows_per_unit(gate) * f, d, input_side=True)
    down = projection(d, f, input_side=False)
    post_norm = torch.empty(d, dtype=dtype, device="meta") if norm else None
    attributes: dict[str, Any] = dict(act=act, gate=gate, alpha=1.0, limit=1.0, eps=1e-6)
    return plan(
        x, index, weight, gate_up, down, post_norm, **attributes, tile=tile, card=Card(card)
    )


# ---------------------------------------------------------------- a table


def may_spill(launch: Launch) -> int:
    """Bytes of stack. None but where 64 tokens or more take every register of sm_90: then those addresses of rows of x that are
    read again in every step, which on an H100 was less than a smaller tile cost. `hopper` reads what it spills once in a tile."""
    if "STAGES" in launch.arguments:
        return 256
    return 96 if launch.arguments["HOPPER"] and launch.arguments.get("TOKENS", 0) >= 64 else 0


class Row(NamedTuple):
    """One kernel on one card."""

    card: str
    kernel: str
    bits: int
    report: Report
    may_spill: int


def row(launch: Launch, target: Target) -> Row:
    report = compile_launch(launch, target)
    return Row(target.name, launch.name, launch.arguments.get("BITS", 0), report, may_spill(launch))


def table(rows: list[Row]) -> str:
    """Registers, shared memory and instructions per weight, a line for each kernel and card."""
    lines = [
        "| card | kernel | bits | registers | spilled | shared memory, bytes | matrix instructions | instructions per weight |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        per_weight = "" if r.report.per_weight is None else f"{r.report.per_weight:.2f}"
        lines.append(
            f"| {r.card} | {r.kernel} | {r.bits or ''} | {r.report.registers} | {r.report.stack} | {r.report.shared} | "
            f"{r.report.matrix or ''} | {per_weight} |"
        )
    return "\n".join(lines)

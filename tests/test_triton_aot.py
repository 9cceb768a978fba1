"""The kernels of plans, compiled for cards that are not there, and checked in their machine code.

No register spills unless `aot.may_spill` says why, shared memory fits, products use the matrix
unit, and decoding a weight takes few enough instructions: per clock and multiprocessor, an H100
reads 74 weights from memory at 2 bit and 50 at 3 bit, and issues 128 instructions.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import ALL

pytestmark = pytest.mark.aot
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under TRITON_INTERPRET=1 nothing is compiled", allow_module_level=True)

triton = pytest.importorskip("triton")
from moecc.backends.triton import aot, combine, grouped, hopper, prepare, route  # noqa: E402
from moecc.backends.triton.abstract import SHAPES, Shape, abstract_plan  # noqa: E402
from moecc.backends.triton.aot import TARGETS, Report, Target, compile_launch  # noqa: E402
from moecc.backends.triton.launch import most_tokens  # noqa: E402
from moecc.backends.triton.parts import Launch  # noqa: E402
from moecc.backends.triton.tiles import Tile  # noqa: E402
from moecc.passes._code.triton_coder import AMD, NVIDIA, abstract  # noqa: E402

MIXTRAL, QWEN = SHAPES["Mixtral-8x7B"], SHAPES["Qwen3-30B-A3B"]
BUDGET = {2: 1.75, 3: 2.6}  # instructions per weight, one token
COUNTED_WITH = "3.9."  # of triton; another compiler makes other code
PINNED = triton.__version__.startswith(COUNTED_WITH)
# bytes; other versions of triton spill up to eight registers, for a round number of them
STACK = 0 if PINNED else 32
FLOATS = Tile(tokens=16, height=1, unroll=1, warps=4, stages=2, waves=0, half=True)
KERNELS = {
    value
    for module in (combine, grouped, hopper, prepare, route)
    for name, value in vars(module).items()
    if name.endswith("_kernel")
}
EVERYTHING: dict[str, Any] = dict(rank=32, mean=3, bias=True)


def unfit(report: Report, target: Target, may_spill: int = 0) -> list[str]:
    """Return what the card has too little of."""
    found = []
    if report.stack > max(STACK, may_spill * (1 if PINNED else 2)):
        found.append(f"spills: {report.stack} bytes of stack, {report.spills} instructions")
    if report.shared > target.shared:
        found.append(f"{report.shared} bytes of shared memory, {target.name} has {target.shared}")
    return found


def wrong(report: Report, target: Target, launch: Launch) -> list[str]:
    """Return the faults of a compiled kernel."""
    found = unfit(report, target, aot.may_spill(launch))
    if "HEIGHT" in launch.arguments and not report.matrix:
        found.append("no matrix instruction")
    if launch.kernel is hopper.persistent_kernel:
        # a spilled register, or a wait for every product
        slow = re.compile(r"(?:LDL|STL)\b|WARPGROUP\.DEPBAR.*, 0x0")
        found += [f"in every step: {o}" for loop in report.loops for o in loop if slow.match(o)]
        if len(report.loops) != 2:
            found.append(
                f"{len(report.loops)} loops with products, not one each for full, half blocks"
            )
    if target.name == "sm_90" and early(report.assembly):
        found.append("doesn't wait for the kernel before")
    return found


def early(ptx: str) -> bool:
    """Whether memory is accessed before the previous kernel ended (see `triton.chain`)."""
    wait = ptx.find("griddepcontrol.wait")
    access = re.search(r"\b(?:ld|st)\.global\b|\bcp\.async\.c", ptx)
    assert access
    return wait < 0 or access.start() < wait


def over_budget(report: Report, bits: int) -> bool:
    return report.per_weight is None or report.per_weight > BUDGET[bits]


# `make test` takes one card of each matrix instruction and vendor.
CARDS = tuple(TARGETS) if ALL else ("sm_80", "sm_90", "sm_120", "gfx942")
# Every launch is compiled for these cards; for others, the fullest launch of each kernel.
WHOLE = tuple(TARGETS) if ALL else ("sm_80", "sm_90")
MOST = {
    "decode: prepare",
    "decode: gate_up",
    "decode: hidden",
    "decode: combine",
    "norm: down",
    "norm: norm",
    "prefill: gate_up",
    "prefill, float32: down",
    "prefill, mean: count",
    "prefill, sums: sums",
}


def launches(target: str) -> dict[str, Launch]:
    """One launch of each kind with all its options: decode, a middle batch, prefill; 2 to 4 bit."""
    plans = {
        "decode": (
            abstract_plan(MIXTRAL, 1, 2, card=target, **EVERYTHING),
            ["prepare", "gate_up", "hidden", "down coef", "combine"],
        ),
        "decode, 3 bit": (abstract_plan(MIXTRAL, 1, 3, card=target), ["down"]),
        "norm": (abstract_plan(QWEN, 1, 4, card=target, norm=True, **EVERYTHING), ["down", "norm"]),
        "middle": (abstract_plan(MIXTRAL, 64, 3, card=target), ["gate_up"]),
        "prefill": (abstract_plan(MIXTRAL, 4096, 3, card=target, **EVERYTHING), ["gate_up"]),
        "prefill, 4 bit": (abstract_plan(MIXTRAL, 4096, 4, card=target), ["down"]),
        "prefill, plain": (abstract_plan(MIXTRAL, 4096, 3, card=target), ["gate_up", "down"]),
        "prefill, basis": (abstract_plan(MIXTRAL, 4096, 2, card=target, rank=32), ["down coef"]),
        "prefill, float32": (
            abstract_plan(MIXTRAL, 4096, 2, card=target, dtype=torch.float32),
            ["gate_up", "down"],
        ),
        "prefill, mean": (
            abstract_plan(QWEN, 4096, 2, card=target, mean=3),
            ["count", "prepare", "down mean"],
        ),
        # on any card, hidden units that stay floats
        "prefill, sums": (abstract_plan(QWEN, 4096, 2, card=target, mean=3, tile=FLOATS), ["sums"]),
    }
    if target == "sm_90":  # tiles that only this card has
        plans |= {
            "prefill, mean and bias": (
                abstract_plan(MIXTRAL, 4096, 2, card=target, mean=3, bias=True),
                ["gate_up"],
            ),
            "prefill, less": (abstract_plan(MIXTRAL, 256, 2, card=target), ["gate_up", "down"]),
        }
    found = {
        f"{label}: {name}": made.named(name)
        for label, (made, names) in plans.items()
        for name in names
    }
    return {label: launch for label, launch in found.items() if target in WHOLE or label in MOST}


@pytest.mark.parametrize("name", CARDS)
def test_every_kernel_fits_every_card(name: str) -> None:
    target, found = TARGETS[name], launches(name)
    assert {launch.kernel for launch in found.values()} == KERNELS - (
        {hopper.persistent_kernel} if name != "sm_90" else set()
    )
    faults = {
        label: wrong(compile_launch(launch, target), target, launch)
        for label, launch in found.items()
    }
    assert not {label: fault for label, fault in faults.items() if fault}


# `make test` takes the fullest step of coding, and one of the others for one card.
CODING = [
    (name, step, bits)
    for name in CARDS
    for step in ("choose", "sweep")
    for bits in (2, 3, 4)
    if ALL or (step, bits) == ("sweep", 3) or (name, step, bits) == ("sm_90", "choose", 4)
]


@pytest.mark.parametrize(("name", "step", "bits"), CODING)
def test_coding_fits_every_card(name: str, step: str, bits: int) -> None:
    target = TARGETS[name]
    launch = abstract(step, bits, AMD if target.backend == "hip" else NVIDIA)
    assert not unfit(compile_launch(Launch(*launch), target), target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape", [*SHAPES.values(), Shape(1024, 16, 2048, 512), Shape(2, 1, 64, 64)]
)
def test_no_grid_is_too_large_for_any_number_of_tokens(shape: Shape, dtype: torch.dtype) -> None:
    """CUDA's limits: 2^31 - 1 programs along the first axis, 65535 along the others."""
    tokens = min(1_500_000, most_tokens(shape.top_k))
    for card, norm in ((card, norm) for card in TARGETS for norm in (False, True)):
        for launch in abstract_plan(
            shape, tokens, 2, card=card, dtype=dtype, norm=norm, mean=2, rank=8
        ).launches:
            assert launch.grid[0] < 1 << 31 and all(n <= 65535 for n in launch.grid[1:]), (
                card,
                launch.name,
                launch.grid,
            )


def steps(ptx: str) -> list[str]:
    """Return each loop with products, twice, and the code after it up to the wait for all."""
    labels = {m[1]: m.end() for m in re.finditer(r"^(\$L__BB\w+):", ptx, re.MULTILINE)}
    jumps = [
        (labels[m[1]], m.start())
        for m in re.finditer(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);", ptx)
        if m[1] in labels
    ]
    loops = [
        (start, end) for start, end in jumps if start < end and "wgmma.mma_async" in ptx[start:end]
    ]
    straight = [(start, end) for start, end in loops if "\n$L__BB" not in ptx[start:end]]
    assert straight
    for start, end in loops:  # branches inside a loop are not followed
        inside = [ptx[s:e] for s, e in straight if start <= s and e <= end]
        assert ptx[start:end].count("wgmma.mma_async") == sum(
            body.count("wgmma.mma_async") for body in inside
        )
    return [
        ptx[s:e] * 2 + re.split(r"(?<=wgmma\.wait_group\.sync\.aligned 0)", ptx[e:])[0]
        for s, e in straight
    ]


def overrun(ptx: str) -> set[str]:
    """Return the registers that are written while a product of a loop may still read them.

    That is between wgmma and the wait for it.
    """
    found: set[str] = set()
    for body in steps(ptx):  # a body is there twice: products of one step may run into the next
        # the registers that each group of running products reads; the last group is open
        running: list[set[str]] = [set()]
        for statement in re.split("[;\n]", body):
            statement = re.sub(r"^@!?%\w+\s+", "", statement.partition("//")[0].strip())
            operands = re.findall(r"\{[^}]*\}|[^,{}]+", statement.partition(" ")[2] or statement)
            wait = re.search(r"wgmma\.wait_group\S*\s+(\d+)$", statement)
            if "wgmma.mma_async" in statement:
                running[-1] = running[-1] | set(
                    re.findall(r"%\w+", re.findall(r"\{[^}]*\}", statement)[1])
                )
            elif "wgmma.commit_group" in statement:
                running.append(set())
            elif wait:
                running = running[max(0, len(running) - 1 - int(wait[1])) :]
            elif operands and not operands[0].strip().startswith("["):
                found |= set().union(*running) & set(re.findall(r"%\w+", operands[0]))
    return found


@pytest.mark.parametrize(
    ("tokens", "bits", "told", "name"),
    [
        (1, 2, {}, "gate_up"),
        (64, 3, {}, "down"),
        (256, 2, {}, "down"),
        (1024, 3, {}, "gate_up"),
        (4096, 2, {}, "gate_up"),
        (4096, 3, {}, "down"),
        (4096, 4, {}, "down"),
        (4096, 2, EVERYTHING, "gate_up"),
        (4096, 2, EVERYTHING, "down coef"),
        (4096, 2, EVERYTHING, "down mean"),
    ],
)
def test_no_operand_is_overwritten_while_a_product_reads_it(
    tokens: int, bits: int, told: dict[str, Any], name: str
) -> None:
    """wgmma reads registers until it is waited for (PTX ISA).

    Without such waits, results on an H100 differed from run to run.
    """
    ptx = compile_launch(
        abstract_plan(MIXTRAL, tokens, bits, **told).named(name), TARGETS["sm_90"]
    ).assembly
    # for what cp.async has written; triton 3.6 sets no fence itself
    assert all("fence.proxy.async" in step for step in steps(ptx))
    assert not overrun(ptx)


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_a_product_that_runs_into_the_next_step_is_found(tokens: int) -> None:
    """The control: the same code with faults put in.

    Each wait lets one more product run; or registers are loaded while a product reads them.
    """
    ptx = compile_launch(abstract_plan(MIXTRAL, tokens, 2).named("down"), TARGETS["sm_90"]).assembly
    careless = re.sub(r"(wgmma\.wait_group\S*\s+)(\d)", lambda m: m[1] + str(int(m[2]) + 1), ptx)
    assert not overrun(ptx) and overrun(careless)
    product = re.search(r"wgmma\.mma_async[^{]*\{[^}]*\}, \{(%\w+),(%\w+)[^;]*;", steps(ptx)[0])
    assert product
    read = f"{product[0]}\n@%p1 ld.global.v2.b32 {{ {product[1]}, {product[2]} }}, [%rd1];"
    assert overrun(ptx.replace(product[0], read)) == {product[1], product[2]}


def test_faults_in_the_steps_of_the_persistent_kernel_are_found() -> None:
    target, launch = TARGETS["sm_90"], abstract_plan(MIXTRAL, 4096, 2).named("down")
    report = compile_launch(launch, target)
    assert not wrong(report, target, launch)
    full, half = report.loops
    for bad in ("LDL R1, [R2]", "WARPGROUP.DEPBAR.LE gsb0, 0x0"):
        assert wrong(replace(report, loops=[full, [*half, bad]]), target, launch) == [
            f"in every step: {bad}"
        ]
    assert wrong(replace(report, loops=[full]), target, launch)


@pytest.mark.skipif(
    not PINNED, reason=f"budgets were counted with triton {COUNTED_WITH}x, not this version"
)
@pytest.mark.parametrize("bits", BUDGET)
@pytest.mark.parametrize(
    "name", [name for name, target in TARGETS.items() if target.backend == "cuda"]
)
def test_decoding_takes_few_instructions(name: str, bits: int) -> None:
    report = compile_launch(abstract_plan(MIXTRAL, 1, bits, card=name).named("down"), TARGETS[name])
    assert not over_budget(report, bits), report.per_weight


def test_a_tile_too_large_is_found_to_spill() -> None:
    """The control: the check sees a spill."""
    target = TARGETS["sm_100"]
    launch = abstract_plan(MIXTRAL, 4096, 2, card="sm_100").named("down")
    large = launch._replace(
        arguments={**launch.arguments, "TOKENS": 64, "UNROLL": 2},
        options={"num_warps": 4, "num_stages": 3},
    )
    assert any("spills" in fault for fault in wrong(compile_launch(large, target), target, large))


def test_a_product_without_the_matrix_unit_is_found() -> None:
    target = TARGETS["sm_80"]._replace(matrix=r"\bHMMA\b", shared=1024)
    launch = abstract_plan(MIXTRAL, 1, 2, card="sm_80").named("down")
    faults = wrong(compile_launch(launch, target), target, launch)
    assert "no matrix instruction" in faults and any("shared memory" in fault for fault in faults)


def test_a_kernel_that_does_not_wait_for_the_one_before_is_found() -> None:
    target, launch = TARGETS["sm_90"], abstract_plan(MIXTRAL, 1, 2).named("combine")
    careless = launch._replace(arguments={**launch.arguments, "HOPPER": False})
    assert not wrong(compile_launch(launch, target), target, launch)
    assert wrong(compile_launch(careless, target), target, careless) == [
        "doesn't wait for the kernel before"
    ]


def test_too_many_instructions_are_found() -> None:
    """The control: two lookups per four weights, as at 4 bit, exceed both budgets."""
    launch = abstract_plan(MIXTRAL, 1, 4, card="sm_90").named("down")
    assert over_budget(compile_launch(launch, TARGETS["sm_90"]), 3)


def test_the_table_has_a_line_for_every_card() -> None:
    table = aot.table(
        [aot.row(abstract_plan(QWEN, 1, 2, card="sm_90").named("down"), TARGETS["sm_90"])]
    )
    assert table.splitlines()[0].startswith("| card ") and "| sm_90 " in table.splitlines()[2]

"""What a compilation is planned to take: workers, memory, scratch disk and time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pipelines import Tiny, resolved

from moecc.errors import MoeccError
from moecc.pipeline import work
from moecc.pipeline.pace import Pace, duration
from moecc.pipeline.plan import PROCESS, fitting, planned, scope_of
from moecc.pipeline.work import BLOCK, DECODE, Coding, Experts, Machine, Scope, Work, blocks

QWEN = Experts(128, 1536, 2048, 768, 8)
SCOPE = Scope((QWEN,) * 48, 32768, 48 * 4 * 2048**2, 150_000 * 2048)


def test_a_scope_counts_experts_and_what_each_token_meets(tiny: Tiny) -> None:
    program = tiny("MD")
    scope = scope_of(program, resolved("kbvq"), 48, 16)
    (experts,) = scope.layers
    assert experts == Experts(4, 16, 16, 8, 2) and not scope.weighted
    assert scope.weights == 4 * (16 * 16 + 16 * 8) and experts.weights == 16 * 16 + 16 * 8
    parameters = {n: w.name for n, w in program.weights.items()}
    sizes = {
        name: node.meta["val"].numel()
        for node in program.graph.nodes
        if (name := parameters.get(node.name)) is not None
    }
    ends = sum(n for name, n in sizes.items() if name.startswith(("embed", "head")))
    routed = scope.weights
    assert scope.dense == sum(sizes.values()) - ends - routed
    assert scope.forward == scope.dense + 2 * experts.weights
    assert scope_of(program, resolved("vsraq,kbvq"), 48, 16).weighted
    for text, bits in (("kbvq", 2), ("kbvq{bits=3}", 3), ("sensitivity,budget,kbvq", 4)):
        assert scope_of(program, resolved(text), 48, 16).bits == bits


def test_workers_are_as_many_as_cores_memory_and_work_allow() -> None:
    one = fitting(SCOPE, None, 1, 1 << 50, 0)
    assert one.workers == 1 and one.memory == one.own
    many = fitting(SCOPE, None, 16, 1 << 50, 0)
    assert many.workers == 16 and many.memory == many.own + 16 * many.worker
    few = fitting(SCOPE, None, 16, many.own + 3 * many.worker, 0)
    assert few.workers == 3
    assert fitting(SCOPE, None, 16, 0, 0).workers == 1
    assert fitting(SCOPE, 5, 16, 0, 0).workers == 5  # as users say
    small = Scope((Experts(4, 16, 16, 8, 2),), 48, 0, 0)
    assert fitting(small, None, 16, 1 << 50, 0).workers == 1  # it is done before others start


@pytest.mark.parametrize(
    ("rows", "units", "most", "count"),
    [
        (1536, 768, 1536, 1),
        (1536, 768, 1535, 2),
        (28672, 14336, 1024, 28),
        (7168, 7168, 2048, 4),
        (18, 9, 6, 3),  # two of 9 rows are too large, and 9 units make no four
        (26, 13, 12, 13),  # a prime number of units
        (8, 4, 1, 4),  # no unit is cut
    ],
)
def test_rows_are_cut_into_as_few_blocks_of_whole_units_as_can_be(
    rows: int, units: int, most: int, count: int
) -> None:
    assert blocks(rows, units, most) == count


def test_costs_of_outputs_count_by_their_blocks() -> None:
    """Those of all rows together would be 28672^2 numbers and as many steps for every weight."""
    mixtral = Experts(8, 28672, 4096, 14336, 2)
    plain = Scope((mixtral,), 4096, 0, 0)
    weighted = replace(plain, weighted=True)
    up, down = mixtral.blocks
    assert max(28672 / up, 4096 / down) <= BLOCK
    (vq,) = (p for p in resolved("vq") if p.name == "vq")
    works = [vq.work(scope) for scope in (plain, weighted)]
    assert [[c.coupled for c in w.coded] for w in works] == [[0, 0], [28672 // up, 4096 // down]]
    factors = up * (28672 / up) ** 3 + down * (4096 / down) ** 3
    assert works[1].factors - works[0].factors == pytest.approx(8 * 2 / 3 * factors)
    block = 28672 // up
    grown = 4 * (8 * up * block**2 + 24 * block**2)  # of float32; affine has one in float64
    memory = [fitting(s, 2, 2, 1 << 50, 0).worker for s in (plain, weighted)]
    assert 0 < memory[1] - memory[0] <= grown


def test_memory_grows_with_tokens_and_costs_of_outputs() -> None:
    def memory(scope: Scope) -> tuple[int, int]:
        found = fitting(scope, 2, 2, 1 << 50, 0)
        return found.own, found.worker

    own, worker = memory(SCOPE)
    assert memory(replace(SCOPE, tokens=2 * SCOPE.tokens))[0] > own + 6 * 4 * SCOPE.tokens * 2048
    assert memory(replace(SCOPE, weighted=True))[1] > worker
    assert memory(replace(SCOPE, bits=4)) == (own, worker)  # tokens take more than codes
    few = replace(SCOPE, tokens=512, largest=0)
    assert memory(replace(few, bits=4))[0] == memory(few)[0] + 128 * QWEN.weights * 2 // 8


def test_a_bound_that_can_not_be_held_is_refused(tiny: Tiny) -> None:
    with pytest.raises(
        MoeccError, match=r"this takes about .* of memory, more than 1\.00 kB; give"
    ):
        planned(tiny("M"), resolved("kbvq"), 48, 16, most=1000)
    assert planned(tiny("M"), resolved("kbvq"), 48, 16, most=1 << 40).workers == 1


def test_what_is_left_of_a_bound_is_spare(tiny: Tiny) -> None:
    """Where more is free than the bound, it does not count."""
    found = planned(tiny("M"), resolved("kbvq,rilq"), 48, 16, most=1 << 40)
    assert found.spare == (1 << 40) - found.memory
    assert fitting(SCOPE, 4, 4, 1 << 30, 0).spare == 0
    many = fitting(SCOPE, 4, 4, 1 << 40, 0)
    assert many.spare == (1 << 40) - many.own - 4 * many.worker


def test_a_run_takes_the_memory_and_disk_of_its_costs(tiny: Tiny) -> None:
    """Of 8192 tokens in 48 layers, two activations are held; what exceeds 1 GiB is on disk."""
    both, kl = (resolved(t)[0].work(SCOPE) for t in ("sensitivity", "sensitivity{routing=0}"))
    held = 2 * 48 * 4 * 8192 * 2048
    assert both.scratch == kl.scratch == held - (1 << 30)
    assert both.kept == 2 * kl.kept == 2 * 48 * 4 * 2048**2
    assert both.memory > (1 << 30) + 4 * SCOPE.largest
    wide = resolved("sensitivity")[0].work(replace(SCOPE, outputs=150_000))
    assert wide.memory >= both.memory + 4 * 2 * SCOPE.row * 150_000
    few = resolved("sensitivity")[0].work(replace(SCOPE, tokens=512))
    assert few.scratch == 0 and few.memory < both.memory - (1 << 29)
    (off,) = resolved("sensitivity{kl=0,routing=0}")
    assert off.work(SCOPE) == Work()

    program = tiny("MM")
    scope = scope_of(program, resolved("vsraq"), 48, 16)
    assert scope.outputs == 16
    codes = scope.weights * 2 // 8
    plain, costly = (planned(program, resolved(t), 48, 16) for t in ("kbvq", "vsraq,kbvq"))
    assert plain.scratch == codes and costly.scratch == codes + 2 * 2 * 4 * 16**2
    least = int(resolved("sensitivity")[0].work(scope).memory)
    assert fitting(scope, 1, 1, 0, 0, 1 << 40).own == PROCESS + (1 << 40)
    assert costly.own >= PROCESS + least


def test_passes_count_what_they_hold_beside_the_tokens_of_a_layer() -> None:
    """The metrics of sampled experts, the float model's scores, and a step's slots and logits."""

    def memory(text: str, scope: Scope = SCOPE) -> float:
        return next(p for p in resolved(text) if p.name in text).work(scope).memory

    plain, costs = (1536 * 2048 + 2048**2, 2048 * 768 + 768**2), (1536**2, 2048**2)
    some = (6, 10)  # as many as 1 << 26 numbers hold, costs among them
    sampled = sum(n * x for n, x in zip(some, plain, strict=True))
    assert memory("klt") == SCOPE.states + 2 * 4 * sampled
    more = memory("klt", replace(SCOPE, weighted=True)) - memory("klt")
    assert more == 2 * 4 * sum(n * x for n, x in zip(some, costs, strict=True))
    wide = replace(SCOPE, outputs=150_000)
    for text, tokens in (("vsraq", 1024), ("vsraq{batches=3}", 3 * 1024), ("rilq", 1024)):
        assert memory(text, wide) - memory(text) == 4 * 4 * tokens * 150_000, text
        taller = replace(SCOPE, layers=(replace(QWEN, rows=2 * 1536),) * 48)
        assert memory(text, taller) >= memory(text) + 4 * tokens * 8 * 1536, text
    assert memory("vsraq{head=0}", wide) == memory("vsraq")
    assert memory("vsraq") > SCOPE.states
    scores = 4 * SCOPE.tokens * 128 * 48
    longer = replace(SCOPE, tokens=2 * SCOPE.tokens)
    assert memory("rilq", longer) - memory("rilq") == scores + 4 * SCOPE.tokens * 2048
    assert memory("rilq{rank=32}") - memory("rilq") == 4 * 7 * 16 * 8 * 2048 * 48


def test_a_plan_is_said_with_its_time_if_that_is_worth_measuring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(1e9, 1e9)
    monkeypatch.setattr(machine, "_fitted", lambda coding: (1e-6, 1e-10))
    monkeypatch.setattr(Machine, "measured", lambda: machine)
    small = fitting(Scope((Experts(4, 16, 16, 8, 2),), 48, 0, 0), None, 1, 1 << 50, 10**9)
    assert small.lines(resolved("kbvq"), 1) == [
        "plan: experts are coded in this process; about "
        f"{small.memory / 1e6:.2f} MB of memory, 1.00 GB of disk in OUT.partial"
    ]
    lines = fitting(SCOPE, 4, 4, 1 << 50, 0).lines(resolved("kbvq,absorb"), 1)
    assert "by 4 workers" in lines[0] and lines[1].startswith("plan: about ")
    assert lines[1].endswith("; without absorb, not known")


def test_time_is_that_of_all_parts_of_the_work() -> None:
    machine = Machine(product=1e9, factor=5e8)
    machine._known["so", False] = (1e-6, 1e-9)
    coding = Coding(3, 100, 200, coupled=0, how="so", code=lambda r, c: None)
    assert machine.seconds(coding) == pytest.approx(3 * 100 * 200 * (1e-6 + 200 * 1e-9))
    done = Work(products=2e9, factors=1e9, coded=[coding], here=4e9)
    spread = 2 + 2 + machine.seconds(coding)
    assert machine.time(done, 1, 1) == pytest.approx(spread + 4)
    assert machine.time(done, 2, 4) == pytest.approx(spread / 2 + 1)


def test_the_time_of_a_weight_is_fitted_to_two_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call takes 1 us a weight, 1 ns more for each column, and what its factorization takes."""
    clock = [0.0]
    monkeypatch.setattr(work.time, "perf_counter", lambda: clock[0])
    machine = Machine(1e9, 1e9)

    def code(rows: int, columns: int) -> None:
        clock[0] += rows * columns * (1e-6 + 1e-9 * columns) + work.factor(columns) / 1e9

    coding = Coding(1, 10, 4096, coupled=0, how="so", code=code)
    assert machine.seconds(coding) == pytest.approx(10 * 4096 * (1e-6 + 1e-9 * 4096), rel=1e-6)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (99.9, "99.9 s"), (101, "2 min"), (5399, "90 min"), (5400, "1.5 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_each_layer_is_said_with_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = [0.0], list[str]()
    monkeypatch.setattr("moecc.pipeline.pace.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("moecc.pipeline.pace.peak_memory", lambda: 2_000_000_000)
    pace = Pace([1, 2, 4], 4096, " until vsraq", said.append)
    for stage, took in ((1, 10.0), (2, 20.0), (3, 100.0), (4, 30.0)):
        pace.begin()
        clock[0] += took
        pace.layer(stage, [0.01, 0.03] if stage == 1 else [])
    memory = "at most 2.00 GB of memory"
    assert said == [
        f"layer 0, 1 of 3: error 0.0200, 4096 tokens, 10.0 s, {memory}, "
        "about 20.0 s left until vsraq",
        f"layer 1, 2 of 3: 4096 tokens, 20.0 s, {memory}, about 15.0 s left until vsraq",
        f"layer 3, 3 of 3: 4096 tokens, 30.0 s, {memory}",
    ]


PIPELINES = ["kbvq", "vsraq,kbvq", "sensitivity,budget,kbvq", "kbvq,rilq,merge"]


@pytest.mark.parametrize("text", PIPELINES)
def test_every_pass_of_a_common_pipeline_knows_its_work(text: str) -> None:
    """More of anything that it goes through is more work, and nothing else changes it."""
    passes = [p for p in resolved(text) if p.name != "fold"]
    bigger = {
        "tokens": replace(SCOPE, tokens=2 * SCOPE.tokens),
        "layers": replace(SCOPE, layers=SCOPE.layers * 2, dense=2 * SCOPE.dense),
        "width": replace(SCOPE, layers=(replace(QWEN, hidden=4096),) * 48),
    }
    for p in passes:
        found = p.work(SCOPE)
        assert found.known, p.name
        for what, scope in bigger.items():
            more = p.work(scope)
            if what == "layers":
                assert more.here == pytest.approx(2 * found.here), (p.name, what)
                assert more.products == pytest.approx(2 * found.products)
            assert more.here >= found.here and more.products >= found.products, (p.name, what)


def test_tuning_takes_longer_with_more_steps_and_klt_only_with_a_choice() -> None:
    (few, many) = (resolved(f"vsraq{{steps={n}}}")[-1].work(SCOPE).here for n in (60, 120))
    tokens = 60 * (3 * SCOPE.row * (8 * QWEN.weights + SCOPE.around) + DECODE * 128 * QWEN.weights)
    assert many - few == pytest.approx(48 * tokens)
    (klt,) = (p for p in resolved("kbvq{rank=0,mean=off}") if p.name == "klt")
    assert klt.work(SCOPE) == Work()

"""moecc's Triton kernels on a GPU: correct first, then one MoE layer beside others, then a whole model. Four minutes on an H100.

  python benchmarks/gpu.py                        table to benchmarks/results/gpu.md, .json and .svg
  python benchmarks/gpu.py --only layers          the model's rows stay as --out has them, if they are this card's
  python benchmarks/gpu.py --only layers --tokens 4096              the layers of other sizes, too
  python benchmarks/gpu.py --tokens 1 16 --shapes Mixtral-8x7B --only layers --out DIR
  TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny --out DIR      on the CPU: that it works; its times mean nothing

1. Every layer is compared with moecc's reference, at 2, 3 and 4 bit and with all that a layer can have, and must give the same
   bits when it is run again. If not, nothing is timed and the exit code is 1.
2. Memory bandwidth is measured by a kernel that reads and writes 4 GB. The roofline of a call is the bytes of the experts that
   its tokens chose, once.
3. A layer: routed experts alone, from tokens and choices to the sum. Each call is a CUDA graph; before each the L2 cache is
   overwritten; medians. The others: bfloat16 weights, transformers' implementations, vLLM's and gpt-oss' (triton_kernels)
   where they are installed; and torch's two grouped products alone, on tokens that were sorted before, without gate and
   sum: less than a layer needs.
4. Qwen3-30B-A3B's sizes with random weights, greedy decoding at batch 1 and 16: by generate, and with the step of a token as a
   CUDA graph, as it is and with torch.compile (fullgraph) before (--compile: that takes minutes); in bfloat16 by transformers.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _gpu
import torch
from _gpu import Call, Routed, Shape, routed

from moecc.backends.triton.aot import abstract_plan
from moecc.backends.triton.launch import Plan
from moecc.backends.triton.tiles import card_of

RESULTS = Path(__file__).resolve().parent / "results"
WITHIN = 1.2e-2  # of the largest output: x is rounded to bfloat16 where the layer ends
Row = dict[str, Any]


# ---------------------------------------------------------------- correct?


CHECKED: tuple[tuple[int, dict[str, int]], ...] = (
    (2, {}),
    (3, {}),
    (4, {}),
    (2, dict(rank=32, mean=3)),
)
BATCHES = (1, 33, 300, 3000)  # each leads to another tile


def small(shape: Shape) -> Shape:
    """With few experts."""
    return shape._replace(experts=min(shape.experts, 8), top_k=min(shape.top_k, 4))


def check(shapes: dict[str, Shape], device: str) -> list[Row]:
    """Each shape with few experts, against the reference."""
    rows = []
    for name, shape in shapes.items():
        for bits, optional in CHECKED:
            layer = _gpu.layer(small(shape), bits, device, **optional)
            for tokens in (1, 9) if device == "cpu" else BATCHES:
                r = routed(small(shape), tokens, device)
                call, wanted = layer.call(r), layer.reference(r)
                error, same = compare([call() for _ in range(2 if device == "cpu" else 11)], wanted)
                rows.append(
                    dict(shape=name, bits=bits, **optional, tokens=tokens, error=error, same=same)
                )
    return rows


def plans(shapes: dict[str, Shape], tokens: list[int], bits: list[int]) -> Iterator[Plan]:
    """All that is checked and timed but the model, of tensors without memory, the largest first."""
    card = card_of(torch.device("cuda")).name
    for shape in shapes.values():
        for t, b in ((t, b) for t in sorted(tokens, reverse=True) for b in bits):
            yield abstract_plan(shape, t, b, card=card)
        for t, (b, optional) in ((t, each) for t in reversed(BATCHES) for each in CHECKED):
            yield abstract_plan(small(shape), t, b, card=card, **optional)


def compare(results: list[torch.Tensor], wanted: torch.Tensor) -> tuple[float, bool]:
    """The first one's largest error over the largest output, and whether the others are the same bits."""
    error = float((results[0].float() - wanted).abs().max() / wanted.abs().max())
    return error, all(torch.equal(other, results[0]) for other in results[1:])


# ---------------------------------------------------------------- timing


class Clock:
    """Microseconds of a call: on a GPU as a graph, with a cold L2 cache; on the CPU by the wall clock."""

    def __init__(self, device: str, repeats: int):
        self.device, self.repeats = device, repeats
        self.flush = torch.empty(
            64 << 20 if device == "cuda" else 1, dtype=torch.int32, device=device
        )

    def __call__(self, call: Call) -> tuple[float, bool]:
        """The median, and whether it was a graph."""
        if self.device == "cpu":
            return self._wall(call), False
        try:
            run, graph = self.captured(call), True
        except RuntimeError:  # what synchronises can't be captured
            torch.cuda.synchronize()
            run, graph = call, False
        times = []
        for _ in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000)
        return statistics.median(times), graph

    def captured(self, call: Call) -> Callable[[], Any]:
        """The replay of a call as a graph; on the CPU the call."""
        if self.device == "cpu":
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _wall(self, call: Call) -> float:
        times = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
        return statistics.median(times)

    def bandwidth(self) -> float:
        """Bytes per second, read and written. By a kernel: in a graph a copy is the copy engine's, which is slower."""
        count = (1 << 29) if self.device == "cuda" else 1 << 20
        a, b = (torch.ones(count, device=self.device) for _ in range(2))
        microseconds, _ = self(lambda: torch.mul(a, 2.0, out=b))
        return 2 * a.nbytes / microseconds * 1e6


def time_layers(
    shapes: dict[str, Shape], tokens: list[int], bits: list[int], clock: Clock, bandwidth: float
) -> Iterator[Row]:
    for name, shape in shapes.items():
        batches = {t: routed(shape, t, clock.device) for t in tokens}
        weights = _gpu.dense_weights(shape, clock.device)
        for r in batches.values():
            for other, call in _gpu.others(shape, weights, r).items():
                yield _row(name, shape, r, other, call, clock, shape.weights * 2, bandwidth)
        del weights
        for b in bits:
            layer = _gpu.layer(shape, b, clock.device)
            for r in batches.values():
                yield _row(
                    name,
                    shape,
                    r,
                    f"moecc {b} bit",
                    layer.call(r),
                    clock,
                    layer.expert_bytes,
                    bandwidth,
                )
            del layer
        if clock.device == "cuda":
            torch.cuda.empty_cache()


def _row(
    name: str,
    shape: Shape,
    r: Routed,
    what: str,
    call: Call,
    clock: Clock,
    each: int,
    bandwidth: float,
) -> Row:
    row: Row = dict(shape=name, tokens=len(r.x), what=what, active=r.active)
    try:
        row["us"], row["graph"] = clock(call)
        row["roofline"] = r.active * each / bandwidth * 1e6 / row["us"]
    except (
        Exception
    ) as error:  # another package's kernel may not support a card or a size: its row says so
        if what.startswith("moecc"):
            raise
        row["error"] = (
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]
        )
    print(f"{name} {row['tokens']} tokens, {what}: {row.get('us', row.get('error'))}", flush=True)
    return row


def time_model(
    shape: Shape,
    bits: int,
    clock: Clock,
    *,
    layers: int,
    vocabulary: int,
    new_tokens: int,
    batches: tuple[int, ...],
    compiled: bool,
) -> Iterator[Row]:
    """Tokens per second of greedy decoding, prefill not in it. bits 16: what isn't compressed, by transformers."""
    if bits == 16:
        kinds = [f"CUDA graph, transformers {name}" for name in ("grouped_mm", "batched_mm")]
    else:
        kinds = ["generate", "CUDA graph"] + ["CUDA graph, torch.compile"] * compiled
    model = _gpu.model(shape, bits, clock.device, layers=layers, vocabulary=vocabulary)
    for kind in kinds:
        if bits == 16:
            model.set_experts_implementation(kind.split()[-1])
        if kind.endswith("torch.compile"):
            model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)
        for batch in batches:
            torch.manual_seed(batch)
            prompt = torch.randint(2, vocabulary, (batch, 16), device=clock.device)
            row: Row = dict(bits=bits, batch=batch, kind=kind)
            try:
                with torch.no_grad():
                    seconds = (_generate if kind == "generate" else _steps)(
                        model, prompt, new_tokens, clock
                    )
                row["tokens_per_second"] = batch * new_tokens / seconds
            except RuntimeError as error:  # what can't be captured
                row["error"] = str(error).splitlines()[0].split(". ")[0][:100]
            print(
                f"model, {bits} bit, batch {batch}, {kind}: {row.get('tokens_per_second', row.get('error'))}",
                flush=True,
            )
            yield row


def _generate(model: Any, prompt: torch.Tensor, new_tokens: int, clock: Clock) -> float:
    """Seconds of `new_tokens` more."""
    told: dict[str, Any] = dict(
        do_sample=False, disable_compile=True, attention_mask=torch.ones_like(prompt)
    )
    if clock.device == "cuda":  # it warms up
        model.generate(prompt, min_new_tokens=new_tokens + 1, max_new_tokens=new_tokens + 1, **told)
    seconds = []
    for count in (1, new_tokens + 1):
        clock.wait()
        start = time.perf_counter()
        model.generate(prompt, min_new_tokens=count, max_new_tokens=count, **told)
        clock.wait()
        seconds.append(time.perf_counter() - start)
    return max(seconds[1] - seconds[0], 1e-9)


def _steps(model: Any, prompt: torch.Tensor, new_tokens: int, clock: Clock) -> float:
    """Seconds of `new_tokens` steps, each the replay of one graph."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + new_tokens + 8)
    ids = (
        type(model)
        .forward(model, input_ids=prompt, past_key_values=cache)
        .logits[:, -1:]
        .argmax(-1)
    )
    run = clock.captured(
        lambda: ids.copy_(model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1))
    )
    clock.wait()
    start = time.perf_counter()
    for _ in range(new_tokens):
        run()
    clock.wait()
    return time.perf_counter() - start


# ---------------------------------------------------------------- what is written


def report(found: dict[str, Any]) -> str:
    worst = max(row["error"] for row in found["checks"])
    lines = [
        "# Triton kernels on a GPU", "",
        f"`python benchmarks/gpu.py`, {found['device']}, torch {found['torch']}, triton {found['triton']}. Memory bandwidth, "
        f"measured: {found['bandwidth'] / 1e12:.2f} TB/s. {len(found['checks'])} layers against the reference: largest error "
        f"{worst:.1e} of the largest output, the same bits each time.", "",
        "One MoE layer's routed experts, microseconds, medians, CUDA graph, cold L2; in brackets the share of the memory "
        "roofline. *times* is the best bfloat16 implementation's time over moecc's, and that of its two products alone.",
        *(["", f"Of an earlier run: {' and '.join(found['kept'])}."] if found.get("kept") else []), "",
    ]  # fmt: skip
    for shape in dict.fromkeys(row["shape"] for row in found["layers"]):
        mine = sorted(
            (row for row in found["layers"] if row["shape"] == shape), key=lambda row: row["tokens"]
        )
        tokens, whats = (
            list(dict.fromkeys(row[key] for row in mine)) for key in ("tokens", "what")
        )
        lines += [
            f"## {shape}",
            "",
            "| | " + " | ".join(f"{t} tokens" for t in tokens) + " |",
            "|---|" + "---|" * len(tokens),
        ]
        cells = {(row["what"], row["tokens"]): row for row in mine}
        for what in whats:
            shown = (
                _cell(cells.get((what, t)), _best(mine, t), cells.get((_gpu.PRODUCTS, t)))
                for t in tokens
            )
            lines.append(f"| {what} | " + " | ".join(shown) + " |")
        lines.append("")
    if found["model"]:
        lines += [
            f"## {found['model_shape']}, random weights, tokens per second",
            "",
            "| bits | batch | | tokens/s |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {r['bits']} | {r['batch']} | {r['kind']} | "
            + (f"{r['tokens_per_second']:.1f} |" if "tokens_per_second" in r else f"{r['error']} |")
            for r in found["model"]
        ]
    return "\n".join(lines).rstrip() + "\n"


def _best(rows: list[Row], tokens: int) -> float | None:
    times = [
        r["us"]
        for r in rows
        if r["tokens"] == tokens
        and "us" in r
        and r["what"].startswith(("transformers", "vLLM", "gpt-oss"))
    ]
    return min(times, default=None)


def _cell(row: Row | None, best: float | None, products: Row | None) -> str:
    if row is None or "us" not in row:
        return "" if row is None else row["error"].split(":")[0]
    text = f"{row['us']:.1f} ({row['roofline']:.0%})" + ("" if row["graph"] else " no graph")
    if not row["what"].startswith("moecc") or not best or products is None:
        return text
    return f"{text}, **{best / row['us']:.2f}**, {products['us'] / row['us']:.2f} times"


def plot(found: dict[str, Any], path: Path) -> None:
    """How many times as fast as the best bfloat16 implementation, by tokens."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    series = dict.fromkeys(
        (r["shape"], r["what"]) for r in found["layers"] if r["what"].startswith("moecc")
    )
    for shape, what in series:
        mine = sorted(
            (r for r in found["layers"] if r["shape"] == shape), key=lambda r: r["tokens"]
        )
        points = [
            (r["tokens"], _best(mine, r["tokens"]), r["us"]) for r in mine if r["what"] == what
        ]
        shown = [(t, best / us) for t, best, us in points if best]
        axes.plot(
            [t for t, _ in shown], [y for _, y in shown], marker="o", label=f"{shape}, {what}"
        )
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(
        xscale="log",
        xlabel="tokens",
        ylabel="times as fast as the best bfloat16",
        title=found["device"],
    )
    axes.legend(fontsize=7)
    figure.savefig(path, bbox_inches="tight")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=_gpu.SHAPES, default=list(_gpu.SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256, 4096])
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3, 4), default=[2, 3])
    parser.add_argument(
        "--only",
        choices=("layers", "model"),
        help="the other part stays as --out has it, if it is this card's",
    )
    parser.add_argument("--compile", action="store_true", help="the model with torch.compile, too")
    parser.add_argument(
        "--tiny", action="store_true", help="sizes for triton's interpreter, on the CPU"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--kernels", nargs=2, type=int, metavar=("PART", "OF"), help=argparse.SUPPRESS
    )
    return parser.parse_args()


def main() -> int:
    told = options()
    import triton

    from moecc.backends.triton import require_device
    from moecc.errors import MoeccError

    try:
        require_device()
    except MoeccError as error:
        sys.exit(f"gpu.py: {error}")
    device = "cpu" if told.tiny else "cuda"
    shapes = _gpu.TINY if told.tiny else {name: _gpu.SHAPES[name] for name in told.shapes}
    if told.kernels:
        _gpu.compile_kernels(plans(shapes, told.tokens, told.bits), *told.kernels)
        return 0
    if not told.tiny:
        _gpu.compile_in_parallel()
    checks = check(shapes, device)
    if wrong := [row for row in checks if not row["error"] < WITHIN or not row["same"]]:
        print(
            *wrong,
            "the kernels are wrong on this card; nothing was timed",
            sep="\n",
            file=sys.stderr,
        )
        return 1
    clock = Clock(device, 1 if told.tiny else 30)
    found: dict[str, Any] = dict(
        device=platform.processor() or "CPU" if told.tiny else torch.cuda.get_device_name(), torch=torch.__version__,
        triton=triton.__version__, bandwidth=clock.bandwidth(), checks=checks, layers=[], model=[],
    )  # fmt: skip
    tokens = [1, 5] if told.tiny else told.tokens
    if told.only:
        sizes = {(name, t) for name in shapes for t in tokens}
        found = kept(found, told.out, told.only, sizes, {f"moecc {b} bit" for b in told.bits})
    told.out.mkdir(parents=True, exist_ok=True)
    if told.only != "layers":  # first, because importing vLLM changes settings of torch's
        found["model_shape"] = "tiny" if told.tiny else "Qwen3-30B-A3B"
        sizes: dict[str, Any] = dict(layers=48, vocabulary=151936, new_tokens=64, batches=(1, 16))
        if told.tiny:
            sizes = dict(layers=1, vocabulary=64, new_tokens=1, batches=(1, 2))
        shape = _gpu.TINY["tiny"] if told.tiny else _gpu.SHAPES["Qwen3-30B-A3B"]
        for bits in (16, told.bits[0]):
            for row in time_model(shape, bits, clock, compiled=told.compile, **sizes):
                found["model"].append(row)
                write(found, told.out)  # a row at a time: the next may take minutes
            if device == "cuda":
                torch.cuda.empty_cache()
    if told.only != "model":
        for row in time_layers(shapes, tokens, told.bits, clock, found["bandwidth"]):
            found["layers"].append(row)
            write(found, told.out)
        try:
            plot(found, told.out / "gpu.svg")
        except ImportError:
            print("no plot: pip install matplotlib", file=sys.stderr)
    return 0


def kept(
    found: dict[str, Any], out: Path, only: str, sizes: set[tuple[str, int]], ours: set[str]
) -> dict[str, Any]:
    """With what isn't measured anew of an earlier run on the same card with the same versions. sizes: shapes and tokens of the
    layers that are, ours: moecc's rows of them."""
    try:
        earlier = json.loads((out / "gpu.json").read_text())
    except FileNotFoundError:
        return found
    if any(earlier[key] != found[key] for key in ("device", "torch", "triton")):
        return found
    if only == "model":
        return found | dict(layers=earlier["layers"], kept=["the layers"])
    rest = [
        row for row in earlier["layers"]
        if (row["shape"], row["tokens"]) not in sizes or (row["what"].startswith("moecc") and row["what"] not in ours)
    ]  # fmt: skip
    again, names = {t for _, t in sizes}, ["the model"] * bool(earlier["model"])
    whole = sorted({row["tokens"] for row in rest} - again)
    if whole:
        names.append(f"layers of {', '.join(map(str, whole))} tokens")
    names += dict.fromkeys(
        f"{row['what']} of {row['shape']}, {row['tokens']} tokens"
        for row in rest
        if row["tokens"] in again
    )
    return found | dict(
        layers=rest, model=earlier["model"], model_shape=earlier.get("model_shape"), kept=names
    )


def write(found: dict[str, Any], out: Path) -> None:
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "gpu.md").write_text(report(found))


if __name__ == "__main__":
    raise SystemExit(main())

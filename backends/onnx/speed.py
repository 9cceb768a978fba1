"""`moecc bench OUT`: how fast an exported model is on this machine, and what memory it takes.

One process a row, so that each loads and runs alone, each thread on a core of its own: load seconds; prefill and decode tokens per
second (batch 1, medians, random token ids); private memory, which no other process shares and the system cannot drop, when all
is done.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moecc.errors import MoeccError

_REPEATS = 5  # prefills


def bench(
    folder: Path, *, threads: Iterable[int] = (1, 2), prompt: int = 128, new_tokens: int = 64,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each number of threads, without and (where it can be built) with the op library. folder: as `export` wrote it."""
    from moecc.backends.onnx import build

    model = folder / "model.onnx"
    libraries: list[Path | None] = [None]
    try:
        libraries.append(build.library())
    except MoeccError as error:
        say(f"without the op library: {error}")
    _require_positions(model.parent, prompt + new_tokens)
    rows = []
    for n in threads:
        for library in libraries:
            say(f"{'portable' if library is None else 'native'}, threads: {n}")
            rows.append(_apart(model, library, n, prompt, new_tokens))
    return rows


def _require_positions(folder: Path, length: int) -> None:
    """MoeccError where the model has not so many positions, by the genai_config.json beside it."""
    config = folder / "genai_config.json"
    if config.is_file() and length > (
        limit := int(json.loads(config.read_text())["model"]["context_length"])
    ):
        raise MoeccError(
            f"{length} tokens, but {config} says that the model has {limit} positions; give fewer --prompt-tokens or --new-tokens"
        )


def _apart(
    model: Path, library: Path | None, threads: int, prompt: int, new_tokens: int
) -> dict[str, Any]:
    arguments = [str(model), str(library or ""), str(threads), str(prompt), str(new_tokens)]
    done = subprocess.run(
        [sys.executable, "-m", __name__, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise MoeccError(
            lines[-1].partition("MoeccError: ")[2] or f"{model}: can't be run: {lines[-1]}"
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(
    model: Path, library: Path | None, threads: int, prompt: int, new_tokens: int
) -> dict[str, Any]:
    """One row, in this process."""
    import numpy as np

    from moecc.backends.onnx.run import Session

    before = private_bytes()
    start = time.perf_counter()
    session = Session(model, library=library, threads=threads, pinned=True)
    load = time.perf_counter() - start
    rng = np.random.default_rng(0)
    ids = rng.integers(0, session.vocabulary, (1, prompt))
    prefill, decode = [], []
    for _ in range(_REPEATS):
        cache = session.start(1)
        start = time.perf_counter()
        session.step(ids, cache)
        prefill.append(time.perf_counter() - start)
    for token in rng.integers(0, session.vocabulary, (new_tokens, 1, 1)):
        start = time.perf_counter()
        session.step(token, cache)
        decode.append(time.perf_counter() - start)
    return {
        "ops": "portable" if library is None else "native", "threads": threads, "load_seconds": load,
        "prefill_tokens_per_second": prompt / statistics.median(prefill),
        "decode_tokens_per_second": 1 / statistics.median(decode), "private_bytes": private_bytes() - before,
        "prompt": prompt, "new_tokens": new_tokens,
    }  # fmt: skip


def private_bytes() -> int:
    """Memory of this process that is its own: anonymous pages, not files that are mapped. 0 where the system doesn't say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["ops       threads  load s  prefill tok/s  decode tok/s  private MB"]
    for r in rows:
        lines.append(
            f"{r['ops']:<8}  {r['threads']:>7}  {r['load_seconds']:>6.2f}  {r['prefill_tokens_per_second']:>13.1f}  "
            f"{r['decode_tokens_per_second']:>12.1f}  {r['private_bytes'] / 1e6:>10.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    path, library, *numbers = sys.argv[1:]
    print(json.dumps(measure(Path(path), Path(library) if library else None, *map(int, numbers))))

"""`moecc bench OUT`: how fast an exported model is on this machine, and the memory it takes.

A row is measured in a process of its own that loads and runs alone, each thread on its own core:

  load seconds
  prefill and decode tokens per second   batch 1, medians, random token ids
  private memory                         at the end; no other process shares it, and the system
                                         cannot drop it
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import moecc
from moecc.checkpoint.reading import read_json
from moecc.errors import MoeccError
from moecc.types import Json, Say

_REPEATS = 5  # prefills
# In the new process moecc comes from where it is here, which may be the current folder alone.
_CHILD = f"""import sys
sys.path.insert(0, sys.argv.pop(1))
import moecc
del sys.path[0]
from {__name__} import main
main()"""


def bench(
    folder: Path,
    *,
    threads: Iterable[int] = (1, 2),
    prompt: int = 128,
    new_tokens: int = 64,
    say: Say = lambda line: None,
) -> list[Json]:
    """Return a row for each number of threads, without the op library and with it.

    folder: as `export` wrote it. A library that cannot be built is left out. Raise MoeccError if
    the model has too few positions or does not run.
    """
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
    """Raise MoeccError if genai_config.json says that the model has fewer positions."""
    config = folder / "genai_config.json"
    if not config.is_file():
        return
    try:
        limit = int(read_json(config)["model"]["context_length"])
    except (KeyError, TypeError) as error:
        raise MoeccError(f"{config} gives no context_length of its model; export again") from error
    if length > limit:
        raise MoeccError(
            f"{length} tokens, but {config} says that the model has {limit} positions; "
            "give fewer --prompt-tokens or --new-tokens"
        )


def _apart(model: Path, library: Path | None, threads: int, prompt: int, new_tokens: int) -> Json:
    """Return the row that `measure` finds in a new process."""
    arguments = [str(model), str(library or ""), str(threads), str(prompt), str(new_tokens)]
    # -P: without it, a statistics.py in the current folder would be imported, and run
    home = Path(moecc.__file__).parents[1]
    command = [sys.executable, "-P", "-c", _CHILD, str(home), *arguments]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        known = lines[-1].partition("MoeccError: ")[2]
        raise MoeccError(known or f"{model}: can't be run: {lines[-1]}")
    found: Json = json.loads(done.stdout)
    return found


def measure(model: Path, library: Path | None, threads: int, prompt: int, new_tokens: int) -> Json:
    """Measure one row in this process."""
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
        "ops": "portable" if library is None else "native",
        "threads": threads,
        "load_seconds": load,
        "prefill_tokens_per_second": prompt / statistics.median(prefill),
        "decode_tokens_per_second": 1 / statistics.median(decode),
        "private_bytes": private_bytes() - before,
        "prompt": prompt,
        "new_tokens": new_tokens,
    }


def private_bytes() -> int:
    """Return the size of this process's anonymous pages, which map no file.

    0 if the system does not say.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def table(rows: list[Json]) -> str:
    """Return the rows as text, a line each."""
    lines = ["ops       threads  load s  prefill tok/s  decode tok/s  private MB"]
    for r in rows:
        lines.append(
            f"{r['ops']:<8}  {r['threads']:>7}  {r['load_seconds']:>6.2f}  "
            f"{r['prefill_tokens_per_second']:>13.1f}  {r['decode_tokens_per_second']:>12.1f}  "
            f"{r['private_bytes'] / 1e6:>10.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line of a new process says, and print the row."""
    path, library, *numbers = sys.argv[1:]
    print(json.dumps(measure(Path(path), Path(library) if library else None, *map(int, numbers))))

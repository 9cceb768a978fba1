"""Quantize a checkpoint's routed experts with a peer tool, so that moecc can evaluate the result.

    python benchmarks/peers.py CHECKPOINT --ids ids.npy --method autoround-w2g128 autoround-w3g128

  1. The peer gets a virtual environment of its own (`--venv-dir`), made at first use: torch first,
     then the peer. On Linux without a GPU, point pip at CPU wheels of torch (`PIP_INDEX_URL`) to
     save some gigabytes.
  2. `_peer.py` runs in that environment on the caller's token ids, [rows, length] int64. It leaves
     a float32 checkpoint with the decoded experts and a report: seconds, peak memory, versions, how
     many expert matrices were really quantized, and bits/weight of the routed experts, counted from
     the stored tensors.
  3. Both are kept (`--cache-dir`). Their name is made of the method and of digests of options,
     token ids, checkpoint and the script itself, so asking a second time only reads the report.

From Python: `report = quantize(checkpoint, ids, "autoround-w2g128")`; `report["checkpoint"]` is the
folder to evaluate.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from moecc.errors import MoeccError
from moecc.types import Json

HOME = Path("~/.cache/moecc/peers").expanduser()
WORKER = Path(__file__).with_name("_peer.py")

# One line per `pip install` of each tool. torch comes first: the tool would choose another version.
REQUIREMENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "auto-round": (
        ("torch==2.13.0",),
        ("auto-round==0.16.1", "transformers==5.23.0", "safetensors", "numpy"),
    ),
    "gptqmodel": (
        ("torch==2.13.0",),
        ("gptqmodel==7.6.0", "torch==2.13.0", "transformers==5.24.0", "safetensors", "numpy"),
    ),
    # for llamacpp.py
    "llama-cpp": (("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors", "numpy"),),
}

# Each tool's options; all others stay at the peer's own defaults.
METHODS: dict[str, Json] = {
    "autoround-w2g128": {"tool": "auto-round", "bits": 2, "group_size": 128, "iters": 200},
    "autoround-w2g32": {"tool": "auto-round", "bits": 2, "group_size": 32, "iters": 200},
    "autoround-w2g128-rtn": {"tool": "auto-round", "bits": 2, "group_size": 128, "iters": 0},
    "autoround-w2g32-rtn": {"tool": "auto-round", "bits": 2, "group_size": 32, "iters": 0},
    "autoround-w3g128": {"tool": "auto-round", "bits": 3, "group_size": 128, "iters": 200},
    "autoround-w3g32": {"tool": "auto-round", "bits": 3, "group_size": 32, "iters": 200},
    "gptqmodel-w2g128": {"tool": "gptqmodel", "bits": 2, "group_size": 128, "iters": 0},
    "gptqmodel-w2g32": {"tool": "gptqmodel", "bits": 2, "group_size": 32, "iters": 0},
    "gptqmodel-w3g128": {"tool": "gptqmodel", "bits": 3, "group_size": 128, "iters": 0},
    "gptqmodel-w3g32": {"tool": "gptqmodel", "bits": 3, "group_size": 32, "iters": 0},
}


def last_line(text: str) -> str:
    """Return the last line of a program's output that is not empty: as a rule, its error."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


def environment(folder: Path, tool: str) -> Path:
    """Return the Python of the tool's virtual environment in `folder`, made if it is missing.

    Making it takes minutes and 1.5 GB. Raise MoeccError if pip fails.
    """
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "moecc-peer.json"
    wanted = json.dumps(REQUIREMENTS[tool])
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"installing {REQUIREMENTS[tool][-1][0]} into {folder}", file=sys.stderr)
    steps = [[sys.executable, "-P", "-m", "venv", str(folder)]]
    steps += [
        [str(python), "-P", "-m", "pip", "install", "--quiet", *line] for line in REQUIREMENTS[tool]
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MoeccError(
                f"{' '.join(step[1:])} failed: {last_line(done.stderr or done.stdout)}"
            )
    stamp.write_text(wanted)
    return python


def token_ids(file: Path) -> np.ndarray:
    """Read token ids [rows, length] from a .npy file, or from a .safetensors file of one tensor.

    Raise MoeccError if there is no such file, or if it holds several tensors.
    """
    if not file.is_file():
        raise MoeccError(f"no file {file}")
    if file.suffix == ".safetensors":
        tensors = load_file(file)
        if len(tensors) != 1:
            raise MoeccError(f"{file} holds {len(tensors)} tensors; one of token ids is wanted")
        return next(iter(tensors.values()))
    return np.load(file)


def digest(*parts: bytes | Path) -> str:
    """Return the SHA-256 of byte strings and of the contents of files, in order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        else:
            total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def checkpoint_digest(checkpoint: Path) -> str:
    """Return a digest of a checkpoint's configuration and weights; MoeccError if it has none."""
    if not (checkpoint / "config.json").is_file():
        raise MoeccError(f"{checkpoint} is not a checkpoint folder: it has no config.json")
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights:
        raise MoeccError(f"{checkpoint} has no .safetensors file")
    return digest(checkpoint / "config.json", *weights)


def run_worker(python: Path, arguments: list[str], log: Path) -> None:
    """Run the worker script and write its output to `log`. Raise MoeccError if it fails."""
    with log.open("w") as file:
        command = [str(python), str(WORKER), *arguments]
        # AutoRound would otherwise leave its scratch folder in the caller's current folder
        surroundings = os.environ | {
            "AR_WORK_SPACE": str(log.parent / "scratch"),
            "TOKENIZERS_PARALLELISM": "false",
        }
        # both tools leave files where they run
        place = log.parent
        code = subprocess.run(
            command, stdout=file, stderr=file, env=surroundings, cwd=place, check=False
        ).returncode
    if code:
        kept = Path(tempfile.gettempdir()) / f"moecc-peer-{time.time_ns()}.log"
        shutil.copy(log, kept)
        why = last_line(log.read_text(errors="replace"))
        raise MoeccError(f"the peer failed: {why} (all of its output: {kept})")


def quantize(
    checkpoint: str | Path,
    ids: np.ndarray,
    method: str,
    *,
    venv_dir: str | Path | None = None,
    cache_dir: str | Path = HOME / "results",
    threads: int = 0,
    device: str = "cpu",
) -> Json:
    """Quantize the routed experts of `checkpoint` with `method`, a name in METHODS.

    A kept result is reused. ids [rows, length] is the peer's calibration, row by row; the caller
    chooses and tokenizes the text. venv_dir is the tool's environment, by default one in HOME.
    threads and device are not part of the result's key: they change the time more than the result.

    Return the report: "checkpoint", the float32 folder with decoded experts; "cached"; and what the
    worker measured. Raise MoeccError if the peer cannot be installed or fails.
    """
    if method not in METHODS:
        raise MoeccError(f"no peer method {method!r}; there are {sorted(METHODS)}")
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise MoeccError(
            f"token ids must be integers [rows, length], not {ids.dtype} {list(ids.shape)}"
        )
    checkpoint, ids = Path(checkpoint).resolve(), np.ascontiguousarray(ids, dtype=np.int64)
    tool = METHODS[method]["tool"]
    inputs = {
        "model_digest": checkpoint_digest(checkpoint),
        "ids_digest": digest(repr(ids.shape).encode(), ids.tobytes()),
        "options": METHODS[method],
        "requirements": REQUIREMENTS[tool],
    }
    key = digest(json.dumps(inputs, sort_keys=True).encode(), WORKER)[:16]
    result = Path(cache_dir).expanduser() / f"{method}-{key}"
    cached = (result / "report.json").exists()
    if not cached:
        python = environment(Path(venv_dir or HOME / tool).expanduser(), tool)
        run_peer(python, checkpoint, ids, method, inputs, result, threads, device)
    report = json.loads((result / "report.json").read_text())
    return report | {"checkpoint": str(result / "checkpoint"), "cached": cached}


def run_peer(
    python: Path,
    checkpoint: Path,
    ids: np.ndarray,
    method: str,
    inputs: Json,
    result: Path,
    threads: int,
    device: str,
) -> None:
    """Run the worker and move what it leaves into the folder `result`, the report last."""
    result.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f"{method}-", suffix=".partial", dir=result.parent
    ) as partial:
        work = Path(partial)
        np.save(work / "ids.npy", ids)
        values = {
            "model": checkpoint,
            "ids": work / "ids.npy",
            "out": work,
            "threads": threads,
            "device": device,
        }
        options = values | METHODS[method]
        arguments = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
        run_worker(python, arguments, work / "log.txt")
        (work / "report.json").rename(work / "worker.json")
        report = {"method": method, **inputs, "rows": ids.shape[0], "length": ids.shape[1]}
        report |= json.loads((work / "worker.json").read_text())
        result.mkdir(exist_ok=True)
        for name in ("checkpoint", "log.txt"):
            shutil.rmtree(result / name, ignore_errors=True)
            (work / name).rename(result / name)
        # the report comes last: it marks the folder as complete
        (result / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def line(report: Json) -> str:
    """Return a line of text about a report."""
    done, total = report["expert_matrices_quantized"], report["expert_matrices"]
    verdict = f"{done}/{total} expert matrices quantized"
    if not report["experts_quantized"]:
        verdict = f"EXPERTS LEFT UNQUANTIZED: {verdict}"
    return (
        f"{report['method']:22s} {report['bits_per_weight']:.3f} bits/weight, {verdict}, "
        f"{report['seconds']:.0f} s, {report['peak_memory_bytes'] / 2**30:.2f} GiB"
        f"{', cached' if report['cached'] else ''}: {report['checkpoint']}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="quantize a checkpoint's routed experts with a peer tool"
    )
    parser.add_argument(
        "checkpoint", type=Path, help="checkpoint folder (config.json, *.safetensors)"
    )
    parser.add_argument(
        "--ids",
        type=Path,
        required=True,
        help=".npy or .safetensors file of token ids [rows, length]",
    )
    parser.add_argument(
        "--method",
        nargs="+",
        default=list(METHODS),
        metavar="NAME",
        help=f"of {', '.join(METHODS)}",
    )
    parser.add_argument("--venv-dir", type=Path, help=f"default {HOME}/TOOL")
    parser.add_argument(
        "--cache-dir", type=Path, default=HOME / "results", help="default %(default)s"
    )
    parser.add_argument(
        "--out", type=Path, help="also copy each result there, as NAME/ and NAME.json"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads of the peer; 0: its own choice"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    places = {k: getattr(options, k) for k in ("venv_dir", "cache_dir", "threads", "device")}
    try:
        ids = token_ids(options.ids)
        for method in options.method:
            report = quantize(options.checkpoint, ids, method, **places)
            print(line(report), flush=True)
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                shutil.copytree(report["checkpoint"], options.out / method, dirs_exist_ok=True)
                (options.out / f"{method}.json").write_text(json.dumps(report, indent=2) + "\n")
    except MoeccError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

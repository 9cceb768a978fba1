"""The process in which `_fuzz_ops` runs nodes: it has the sanitizers, and no torch."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from _fuzz_worker import SECONDS, limit_seconds


def run(library: str, folder: Path) -> None:
    """Run the node in a folder once."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.register_custom_ops_library(library)
    model = (folder / "model.onnx").read_bytes()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = dict(np.load(folder / "inputs.npz"))
    session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})


def main() -> None:
    """Run each folder that stdin names; print its exit code, message, seconds and bytes as JSON."""
    print("ready", flush=True)
    for line in sys.stdin:
        limit_seconds(SECONDS)
        start = resource.getrusage(resource.RUSAGE_SELF)
        code, said = 0, ""
        try:
            run(sys.argv[1], Path(line.strip()))
        except Exception as error:  # ONNX Runtime raises what it likes
            code, said = 2, str(error)
        end = resource.getrusage(resource.RUSAGE_SELF)
        seconds = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
        print(
            json.dumps([code, said, seconds, (end.ru_maxrss - start.ru_maxrss) * 1024]), flush=True
        )


if __name__ == "__main__":
    main()

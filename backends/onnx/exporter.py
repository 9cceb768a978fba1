"""`moecc export OUT --to onnx`: a folder that any ONNX Runtime, and onnxruntime-genai, runs.

  model.onnx, model.onnx.data    the graph with its functions, and the weights, which a runtime maps into memory
  genai_config.json              for onnxruntime-genai; tokenizer files beside it
  moecc_onnx.json                what was exported, from what, how far its logits are from the artifact's

Written under a temporary name, loaded by ONNX Runtime, compared with the artifact (prefill, then token by token), renamed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from moecc import __version__
from moecc.artifact.write import copy_small_files
from moecc.backends.onnx import OnnxTarget, build, genai, run
from moecc.backends.onnx.cached import capture_cached
from moecc.backends.onnx.rewrites import embeddings, joined, qmoe
from moecc.backends.onnx.translate import translate
from moecc.backends.onnx.weights import Weights
from moecc.checkpoint.files import free_space, size
from moecc.checkpoint.store import CheckpointStore
from moecc.errors import MoeccError
from moecc.frontend.config import text_config
from moecc.frontend.skeleton import skeleton
from moecc.frontend.trace import trace
from moecc.pipeline.stream import run_program

DTYPES = {"float32": torch.float32, "float16": torch.float16}
MODEL, DATA, RECORD, LIBRARY = "model.onnx", "model.onnx.data", "moecc_onnx.json", "libmoecc_ops.so"
_TOKENS = (2, 12)  # of the comparison: rows, and tokens of each; the last third one by one
# of the largest logit: sums in another order; float16; dense matrices whose inputs are rounded to int8; experts rounded anew
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "int8 activations": 5e-2, "other weights": 0.5}
_MOST = 0.75  # of tokens, which are to be within it, all at float32


def export(
    folder: Path,
    out: Path,
    options: OnnxTarget | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Export the artifact (or checkpoint) `folder` to the new folder `out`; what was written and how it compares.

    MoeccError in one line, with nothing left behind, where that can't be done.
    """
    options = options or OnnxTarget()
    profile, opset, dtype = options.profile, options.opset, options.dtype
    if out.exists():
        raise MoeccError(f"{out} exists; give another folder or remove it")
    if profile == "qmoe":
        qmoe.require()
    found = skeleton(folder, DTYPES[dtype])
    store = CheckpointStore(folder, found.model)
    store.check()
    free_space(out, 2 * store.nbytes)  # what is bfloat16 in the artifact is float32 here
    say(f"tracing {folder}")
    cached = capture_cached(found)
    if profile == "qmoe":
        qmoe.require_known(cached.program.graph)
    model = translate(cached, opset, store)
    if profile == "qmoe":
        qmoe.lower(model, store, 4 if options.bits == "auto" else int(options.bits))
    if options.embeddings == "int8":
        embeddings.lower(model, store)
    Weights(model, store).fill()
    joined.join(model)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        say("writing")
        ir.save(model, partial / MODEL, external_data=DATA, alignment=4096)
        onnx.checker.check_model(str(partial / MODEL))
        copy_small_files(folder, partial)
        library = _library(partial, say) if profile == "native" else None
        (partial / genai.FILE).write_text(
            json.dumps(genai.config(found, cached, folder, library), indent=1) + "\n"
        )
        rounded = any(
            node.op_type in ("MatMulNBits", "QMoE", "GatherBlockQuantized") for node in model.graph
        )
        rounding = (
            "other weights" if profile == "qmoe" else "int8 activations" if rounded else dtype
        )
        record = _compare(folder, partial, text_config(found.config).vocab_size, rounding, library)
        record |= {
            "moecc": __version__, "source": store.digest(), "opset": opset,
            "profile": "portable" if profile == "native" and library is None else profile, "dtype": dtype,
            "runs_from": oldest_runtime(model),
            "bytes": sum((partial / f).stat().st_size for f in (MODEL, DATA)),
        }  # fmt: skip
        (partial / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return record


def summary(out: Path, record: Mapping[str, Any]) -> str:
    """The record of an export in one line."""
    return (
        f"{out}: {size(record['bytes'])}, logits differ by {record['difference']:.1e} of the largest, three tokens "
        f"in four by at most {record['difference_of_most']:.1e}; runs in {record['runs_from']} and later"
    )


def oldest_runtime(model: ir.Model) -> str:
    """The first ONNX Runtime that has all operators of a graph (1.20.1, 1.21.1, 1.22.1 and 1.23.2 were tried)."""
    needs = [{21: 20, 23: 23}[model.opset_imports[""]]]
    for node in model.graph:
        if (
            node.op_type in ("MatMulNBits", "GatherBlockQuantized")
            and node.attributes["bits"].as_int() == 8
        ):
            needs.append(22 if node.op_type == "MatMulNBits" else 23)
        elif node.op_type == "QMoE":
            needs.append(31)
    return f"onnxruntime 1.{max(needs)}"


def _library(partial: Path, say: Callable[[str], None]) -> Path | None:
    """The op library, copied beside the model; None where it can't be built: then the file's functions run everywhere."""
    try:
        return shutil.copyfile(build.library(), partial / LIBRARY)
    except MoeccError as error:
        say(f"no op library: {error}. The model runs by its portable functions")
        return None


def _compare(
    folder: Path, partial: Path, vocabulary: int, rounding: str, library: Path | None
) -> dict[str, Any]:
    """How far the file's logits are from the artifact's. MoeccError where that is more than `rounding` explains."""
    rows, tokens = _TOKENS
    ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
    want = run_program(trace(folder, dtype=torch.float32), [ids])[0].float()
    session = run.Session(partial / MODEL, library=library)
    got = session.logits(ids, [tokens - tokens // 3, *[1] * (tokens // 3)])
    largest, most = differences(got, want)
    found, where = (largest, "") if rounding == "float32" else (most, ", in too many tokens")
    if not found <= TOLERANCE[rounding]:
        raise MoeccError(
            f"{folder.name}: logits of the ONNX file differ by {found:.2g} of the largest{where}; nothing was kept"
        )
    return {"difference": largest, "difference_of_most": most, "runtime": run.version()}


def differences(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Of logits [B, S, vocabulary]: the largest error, of the largest of all; and what `_MOST` of the tokens are within, each of
    its own largest. Rounding can send a token to another expert, and then its logits are others, though nothing is wrong."""
    error = (got - want).abs()
    if not bool(error.isfinite().all()):
        return math.inf, math.inf
    each, size = error.amax(-1).flatten(), want.abs().amax(-1).flatten().clamp(min=1e-12)
    within = (each / size).sort().values[math.ceil(_MOST * len(each)) - 1]
    return float(each.max() / size.max()), float(within)

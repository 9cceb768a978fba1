"""`moecc export OUT --to onnx`: a folder that any ONNX Runtime, and onnxruntime-genai, runs.

  model.onnx, model.onnx.data    the graph with its functions, and the weights, which a runtime
                                 maps into memory
  genai_config.json              for onnxruntime-genai; tokenizer files beside it
  moecc_onnx.json                what was exported, from what, and how far its logits are from the
                                 artifact's

The folder is written under a temporary name, loaded by ONNX Runtime, compared with the artifact
(prefill, then token by token) and renamed.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from moecc import __version__
from moecc.artifact.draft import new_folder
from moecc.artifact.write import copy_small_files, write_json
from moecc.backends.onnx import OPSETS, OnnxTarget, build, genai, run
from moecc.backends.onnx.cached import Cached, capture_cached
from moecc.backends.onnx.rewrites import embeddings, joined, qmoe
from moecc.backends.onnx.translate import translate
from moecc.backends.onnx.weights import Weights
from moecc.checkpoint.files import free_space, size
from moecc.checkpoint.store import CheckpointStore
from moecc.errors import MoeccError
from moecc.frontend.config import text_config
from moecc.frontend.skeleton import Skeleton, skeleton
from moecc.frontend.trace import trace
from moecc.ir.relative import relative
from moecc.pipeline.stream import run_program
from moecc.target import Sizes
from moecc.types import Json, Say

DTYPES = {"float32": torch.float32, "float16": torch.float16}
MODEL, DATA, RECORD, LIBRARY = "model.onnx", "model.onnx.data", "moecc_onnx.json", "libmoecc_ops.so"
_TOKENS = (2, 12)  # of the comparison: rows, and tokens of each; the last third comes one by one
# The allowed difference, as a share of the largest logit, for what an export changes.
TOLERANCE = {
    "float32": 1e-4,  # sums in another order
    "float16": 1e-2,
    "int8 activations": 5e-2,  # inputs of dense matrices are rounded
    "other weights": 0.5,  # experts are rounded again
}
_MOST = 0.75  # the share of tokens that has to be within it; with float32 all have to
_ROUNDING_OPS = ("MatMulNBits", "QMoE", "GatherBlockQuantized")


def export(
    folder: Path, out: Path, options: OnnxTarget | None = None, *, say: Say = lambda line: None
) -> Json:
    """Export the artifact or checkpoint `folder` to the new folder `out`.

    Return the record of what was written and how it compares. Raise MoeccError, and leave nothing
    behind, if the model cannot be exported or its logits differ too much.
    """
    options = options or OnnxTarget()
    options.require()
    with new_folder(out) as draft:
        return _export(folder, draft, options, say)


def require_exportable(folder: Path, options: OnnxTarget) -> None:
    """Raise MoeccError if no export of the checkpoint or of its artifact can be written."""
    cached = capture_cached(skeleton(folder, DTYPES[options.dtype]))
    if options.profile == "qmoe":
        qmoe.require_known(cached.program.graph)


def _export(folder: Path, partial: Path, options: OnnxTarget, say: Say) -> Json:
    """Write and compare all of it in the folder `partial`."""
    found = skeleton(folder, DTYPES[options.dtype])
    store = CheckpointStore(folder, found.model)
    store.check()
    free_space(partial, options.least_bytes(folder, Sizes(0, store.nbytes)))
    copy_small_files(folder, partial, say)
    say(f"tracing {folder}")
    cached = capture_cached(found)
    library = _write_beside(folder, partial, found, cached, options, say)
    model = _lowered(cached, store, options)
    say("writing")
    ir.save(model, partial / MODEL, external_data=DATA, alignment=4096)
    onnx.checker.check_model(str(partial / MODEL))
    vocabulary = text_config(found.config).vocab_size
    record = _compare(folder, partial, vocabulary, _rounding(model, options), library)
    record |= _facts(model, store, options, library)
    record["bytes"] = sum((partial / f).stat().st_size for f in (MODEL, DATA))
    write_json(partial / RECORD, record)
    return record


def _lowered(cached: Cached, store: CheckpointStore, options: OnnxTarget) -> ir.Model:
    """Return the ONNX model of a traced program, its weights read when it is written."""
    if options.profile == "qmoe":
        qmoe.require_known(cached.program.graph)
    model = translate(cached, options.opset, store)
    if options.profile == "qmoe":
        qmoe.lower(model, store, 4 if options.bits == "auto" else int(options.bits))
    if options.embeddings == "int8":
        embeddings.lower(model, store)
    Weights(model, store).fill()
    joined.join(model)
    return model


def _write_beside(
    folder: Path, partial: Path, found: Skeleton, cached: Cached, options: OnnxTarget, say: Say
) -> Path | None:
    """Write what goes with the model: op library, genai's configuration.

    Return the op library in the cache, None if the profile has none or it cannot be built.
    """
    library = _library(partial, say) if options.profile == "native" else None
    beside = None if library is None else partial / LIBRARY
    settings = genai.config(found, cached, folder, beside)
    text = json.dumps(settings, indent=1) + "\n"
    (partial / genai.FILE).write_text(text, encoding="utf-8")
    return library


def _library(partial: Path, say: Say) -> Path | None:
    """Copy the op library beside the model; return the one in the cache.

    Return None if it cannot be built: the functions in the file run everywhere.
    """
    try:
        library = build.library()
    except MoeccError as error:
        say(f"no op library: {error}. The model runs by its portable functions")
        return None
    shutil.copyfile(library, partial / LIBRARY)
    return library


def _rounding(model: ir.Model, options: OnnxTarget) -> str:
    """Return the key of `TOLERANCE` for a model."""
    if options.profile == "qmoe":
        return "other weights"
    rounded = any(node.op_type in _ROUNDING_OPS for node in model.graph)
    return "int8 activations" if rounded else options.dtype


def _facts(
    model: ir.Model, store: CheckpointStore, options: OnnxTarget, library: Path | None
) -> Json:
    """Return what was exported and from what, for the record."""
    without_library = options.profile == "native" and library is None
    return {
        "moecc": __version__,
        "source": store.digest(),
        "opset": options.opset,
        "profile": "portable" if without_library else options.profile,
        "dtype": options.dtype,
        "runs_from": oldest_runtime(model),
    }


def summary(out: Path, record: Json) -> str:
    """Return the record of an export in one line."""
    return (
        f"{out}: {size(record['bytes'])}, "
        f"logits differ by {record['difference']:.1e} of the largest, three tokens "
        f"in four by at most {record['difference_of_most']:.1e}; "
        f"runs in {record['runs_from']} and later"
    )


def oldest_runtime(model: ir.Model) -> str:
    """Return the first ONNX Runtime that has all operators of a graph.

    1.20.1, 1.21.1, 1.22.1 and 1.23.2 were tried.
    """
    needs = [OPSETS[model.opset_imports[""]].runtime]
    eight_bits = {"MatMulNBits": 22, "GatherBlockQuantized": 23}
    for node in model.graph:
        if node.op_type in eight_bits and node.attributes["bits"].as_int() == 8:
            needs.append(eight_bits[node.op_type])
        elif node.op_type == "QMoE":
            needs.append(31)
    return f"onnxruntime 1.{max(needs)}"


def _compare(
    folder: Path, partial: Path, vocabulary: int, rounding: str, library: Path | None
) -> Json:
    """Return how far the file's logits are from the artifact's.

    Raise MoeccError if that is more than `rounding` explains.
    """
    rows, tokens = _TOKENS
    ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
    want = run_program(trace(folder, dtype=torch.float32), [ids])[0].float()
    session = run.Session(partial / MODEL, library=library)
    got = session.logits(ids, [tokens - tokens // 3, *[1] * (tokens // 3)])
    largest, most = differences(got, want)
    found, where = (largest, "") if rounding == "float32" else (most, ", in too many tokens")
    if not found <= TOLERANCE[rounding]:
        raise MoeccError(
            f"the ONNX file's logits and the artifact's differ by {found:.2g} of the "
            f"largest{where}; nothing was kept"
        )
    return {"difference": largest, "difference_of_most": most, "runtime": run.version()}


def differences(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Return the error of logits [B, S, vocabulary] in two ways.

    First the largest error, as a share of the largest logit of all. Second the error that `_MOST`
    of the tokens stay within, each as a share of its own largest logit: rounding can send a token
    to another expert, and then its logits are others, though nothing is wrong.
    """
    error = (got - want).abs()
    if not bool(error.isfinite().all()):
        return math.inf, math.inf
    each, size = error.amax(-1).flatten(), want.abs().amax(-1).flatten()
    within = relative(each, size).sort().values[math.ceil(_MOST * len(each)) - 1]
    return float(relative(each.max(), size.max())), float(within)

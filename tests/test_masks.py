"""moecc::CausalMask: function and op library compute a causal mask.

test_onnx.py tests which masks of a model become one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from moecc.backends.onnx import build
from moecc.native.build import COMPILERS

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")

from moecc.backends.onnx.rewrites import masks  # noqa: E402

# new tokens, padding of each row, all tokens
SIZES = ((1, [0], 1), (3, [0, 2, 9], 8), (1, [4, 0], 9), (6, [1], 6))
CASES = [(*size, window) for size in SIZES for window in (1, 3, masks.NO_WINDOW)]


@pytest.mark.parametrize("library", (False, True))
def test_function_and_library_compute_the_mask(library: bool) -> None:
    for tokens, padding, total, window in CASES:
        session = one(window, library)
        y = session.run(None, feed(tokens, padding, total))[0]
        assert y.shape == (len(padding), 1, tokens, total) and y.dtype == bool
        for b, s, t in np.ndindex(len(padding), tokens, total):
            place = total - tokens + s
            assert y[b, 0, s, t] == (padding[b] <= t <= place and place - t < window)


def feed(tokens: int, padding: list[int], total: int) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.zeros((len(padding), tokens), np.int64),
        "attention_mask": masks._counting(padding, total),
    }


def test_an_operand_of_a_wrong_shape_is_named() -> None:
    session = one(3, True)
    ids = np.zeros((2, 4), np.int64)
    for counts, text in (
        (
            np.ones((2, 3), np.int64),
            "attention_mask has shape [2, 3], which is of fewer tokens than input_ids [2, 4]",
        ),
        (np.ones((1, 5), np.int64), "attention_mask has shape [1, 5], expected [2, 5]"),
    ):
        with pytest.raises(Exception, match="moecc::CausalMask") as failed:
            session.run(None, {"input_ids": ids, "attention_mask": counts})
        assert text in str(failed.value)
    with pytest.raises(Exception, match="window is 0, expected 1 or more"):
        one(0, True)


def one(window: int, library: bool) -> Any:
    """A session of one node."""
    if library and not any(map(shutil.which, COMPILERS)):
        pytest.skip("no C++ compiler")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(str(build.library()))
    model = of_one_node(window).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def of_one_node(window: int) -> Any:
    node = onnx.helper.make_node(
        masks.NAME, list(masks._INPUTS), ["y"], domain="moecc", window=window
    )
    info, kinds = onnx.helper.make_tensor_value_info, onnx.TensorProto
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [
            info("input_ids", kinds.INT64, ["B", "S"]),
            info("attention_mask", kinds.INT64, ["B", "T"]),
        ],
        [info("y", kinds.BOOL, ["B", 1, "S", "T"])],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("moecc", 1)]
    functions = [ir.serde.serialize_function(masks.function(21))]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    onnx.checker.check_model(model)
    return model


# ---- which window a mask has


def mask(new: int, padding: list[int], total: int, sees: Callable[..., np.ndarray]) -> np.ndarray:
    """Return the mask [B, 1, S, T] of `sees`, a function of a token's place and the places seen."""
    place, t = np.arange(total - new, total)[:, None], np.arange(total)[None]
    counts = t >= np.array(padding)[:, None, None]
    return (counts & sees(place, t))[:, None]


@pytest.mark.parametrize("window", [1, 2, 5, 100, 4095, 4096, 70_000])
def test_a_window_is_found_from_a_mask_s_values(window: int) -> None:
    def sees(place: np.ndarray, t: np.ndarray) -> np.ndarray:
        return (t <= place) & (place - t < window)

    assert masks._window(partial(mask, sees=sees)) == window


def test_a_mask_that_sees_all_that_came_before_has_no_window() -> None:
    assert masks._window(partial(mask, sees=lambda place, t: t <= place)) == masks.NO_WINDOW


@pytest.mark.parametrize("window", [1, 2, 5, 30])
def test_masks_that_only_look_like_a_window_have_none(window: int) -> None:
    def chunks(place: np.ndarray, t: np.ndarray) -> np.ndarray:
        return (t <= place) & (t // (window + 1) == place // (window + 1))

    def future(place: np.ndarray, t: np.ndarray) -> np.ndarray:
        return abs(place - t) < window + 1

    def late(new: int, padding: list[int], total: int) -> np.ndarray:
        """Forget the window from window + 3 new tokens on: not before a window is full."""
        width = window if new < window + 3 else 1 << 40
        return mask(new, padding, total, lambda place, t: (t <= place) & (place - t < width))

    def unpadded(new: int, padding: list[int], total: int) -> np.ndarray:
        none = [0] * len(padding)
        return mask(new, none, total, lambda place, t: (t <= place) & (place - t < window))

    for kind in (partial(mask, sees=chunks), partial(mask, sees=future), late, unpadded):
        assert masks._window(kind) is None

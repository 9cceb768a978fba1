"""What a pass may record of a weight: types that can be shown, and nothing that moecc counts."""

from __future__ import annotations

import pytest
from checkpoints import fails

from moecc.pipeline.fate import Fate
from moecc.pipeline.recorded import require

BOTH = {"before": {"kl": 1, "mse": 0.5}, "after": {}}


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"error": 0.5, "in_sample_error": 1, "fate": Fate("coded"), "fallback": ""},
        {"tokens": [0, 3], "starved": {0: 2, "11": 0}},
        {"tokens": [], "starved": {}, "fallback": "too few tokens"},
        {"loss": BOTH, "rank": 3, "any": None, "before": 1},
        {"loss": {"before": 1}, "more": {"after": "x"}, "other": {"before": {"kl": "x"}}},
        {"loss": {"before": {}, "after": {"kl": 2.5}, "steps": "three"}},
    ],
)
def test_facts_that_can_be_shown_are_taken(facts: dict[str, object]) -> None:
    require("w", facts)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("error", "0.5", "a number"),
        ("error", True, "a number"),
        ("error", None, "a number"),
        ("in_sample_error", [0.5], "a number"),
        ("fate", "coded", "a Fate"),
        ("tokens", (1, 2), "a list of counts"),
        ("tokens", [1, -1], "a list of counts"),
        ("tokens", [1.0], "a list of counts"),
        ("tokens", [True], "a list of counts"),
        ("starved", [1], "a dict of counts by expert"),
        ("starved", {"x": 1}, "a dict of counts by expert"),
        ("starved", {-1: 1}, "a dict of counts by expert"),
        ("starved", {1: 1, 2: -1}, "a dict of counts by expert"),
        ("starved", {1: 1, 2: 0.5}, "a dict of counts by expert"),
        ("fallback", None, "text"),
        ("loss", {"before": 1, "after": {}}, "a dict of numbers for both before and after"),
        ("loss", {"before": {}, "after": 1}, "a dict of numbers for both before and after"),
        ("loss", {"before": {"kl": "x"}, "after": {}}, "a dict of numbers for both"),
        ("loss", {"before": {}, "after": {"a": 1, "b": True}}, "a dict of numbers for both"),
    ],
)
def test_a_fact_that_cannot_be_shown_is_refused(key: str, value: object, wanted: str) -> None:
    fails(lambda: require("w", {"rank": 3, key: value}), f"w: can't record {key}={value!r}; give ")
    fails(lambda: require("w", {key: value}), f"; give {wanted}")


@pytest.mark.parametrize("key", ["bytes", "source_bits"])
def test_what_moecc_counts_is_not_recorded(key: str) -> None:
    fails(lambda: require("w", {"rank": 3, key: 1}), f"w: can't record {key}, which moecc counts")


def test_facts_are_of_a_weight_s_name() -> None:
    fails(lambda: require(3, {}), "can't record anything of 3")  # type: ignore[arg-type]

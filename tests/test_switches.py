"""Switches of config.json that give a model other outputs change nothing that moecc computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from made import PROMPT, Command, load, logits
from refusals import edit_config

from moecc.artifact import verify
from moecc.backends.onnx.cached import capture_cached
from moecc.frontend.skeleton import skeleton
from moecc.frontend.trace import trace

SWITCHES = {
    "output_router_logits": True,  # fine-tuning with the auxiliary loss leaves it
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": False,
    "use_cache": False,
}


@pytest.fixture
def switched(model: Path) -> Path:
    """`model` with all switches."""
    edit_config(model, **SWITCHES)
    return model


def test_a_program_is_the_same(mixtral: Path, switched: Path) -> None:
    assert trace(switched).text() == trace(mixtral).text()


def test_a_program_with_its_cache_gives_logits_first(switched: Path) -> None:
    cached = capture_cached(skeleton(switched))
    outputs = next(iter(cached.program.graph.find_nodes(op="output"))).args[0]
    assert len(outputs) == len(cached.output_names)
    assert outputs[0].meta["val"].shape[-1] == 64


def test_the_reload_check_compares_logits(mixtral: Path, switched: Path) -> None:
    (found,) = verify._by_transformers(switched, [PROMPT])
    assert torch.equal(found, logits(load(mixtral)))


def test_generate_continues_the_same(moecc: Command, mixtral: Path, switched: Path) -> None:
    options = ("--prompt", "abc", "--max-new-tokens", "4", "--json")
    want, got = (moecc("generate", folder, *options) for folder in (mixtral, switched))
    assert got.code == 0, got.err
    assert got.json["tokens"] == want.json["tokens"]

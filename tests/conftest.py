"""What every test starts from: one thread per worker, reproducible examples, no network."""

from __future__ import annotations

import os

# Before transformers is imported; a test that needs a hub model must say so itself.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "moecc",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("moecc")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests that draw without a generator of their own draw the same in any order."""
    torch.manual_seed(0)

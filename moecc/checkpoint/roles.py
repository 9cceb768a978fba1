"""The role of a parameter, told by the names in transformers' families.

Roles are for reading only: no arithmetic depends on them.
"""

from __future__ import annotations

ROUTED = "routed experts"
# The first rule decides that has a word which a part of the name contains.
_RULES = (
    ("embeddings", ("embed", "wte", "lm_head", "embed_out")),
    ("shared expert", ("shared",)),
    ("norm", ("norm", "layernorm", "ln_")),
    ("attention", ("attn", "attention", "conv", "mamba")),
    ("router", ("gate", "router", "gating")),
    (ROUTED, ("experts",)),
    ("dense MLP", ("mlp", "ffn", "feed_forward")),
    ("attention", ("mixer",)),
)
ROLES = (*dict.fromkeys(role for role, _ in _RULES), "other")


def role_of(name: str) -> str:
    """Return one of ROLES for a parameter's dotted name."""
    parts = name.lower().split(".")
    for role, words in _RULES:
        if role == "router" and any("gate_proj" in p or "gate_up" in p for p in parts):
            continue
        if any(word in p for p in parts for word in words):
            return role
    return "other"

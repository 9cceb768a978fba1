"""The one error a user sees: what is wrong, where, and what to do, in one line."""

from __future__ import annotations


class MoeccError(ValueError):
    """Bad input or a model that moecc can't take. The command line prints it as one line and exits with 2."""

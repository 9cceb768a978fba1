"""The one error a user sees: what is wrong, where, and what to do, in one line."""

from __future__ import annotations


class MoeccError(ValueError):
    """Bad input or a model that moecc can't take. The command line prints it as one line and exits with 2."""


def reason(error: BaseException) -> str:
    """What an exception of a library says, in one line: its first, with the next where that only introduces it."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return (" ".join(lines[:2]) if lines[0].endswith(":") else lines[0]).rstrip(".")

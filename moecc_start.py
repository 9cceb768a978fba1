"""The command `moecc`. What it runs brings in torch and transformers, which takes seconds; Ctrl-C is one line in these too."""

from __future__ import annotations

import sys


def main() -> int:
    """Run one command; the exit code."""
    try:
        from moecc.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("moecc: interrupted", file=sys.stderr)
        return 130

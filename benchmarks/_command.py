"""The command line as a process of its own: its result, its seconds and its peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from moecc.errors import MoeccError
from moecc.types import Json


def moecc_command(*args: str | Path) -> tuple[Json, float, int]:
    """Run the command line and return its JSON, its seconds and its peak memory in bytes.

    Raise MoeccError, with the command's last line of output, if it fails.
    """
    command = [sys.executable, "-P", "-m", "moecc.cli", *map(str, args), "--json"]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True)
        errors = process.stderr.read() if process.stderr else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        result = out.read()
    if process.returncode:
        why = errors.strip().splitlines()[-1] if errors.strip() else status
        raise MoeccError(f"moecc {args[0]} failed: {why}")
    found: Json = json.loads(result)
    return found, time.perf_counter() - start, usage.ru_maxrss * 1024

"""The program of a worker process, which `processes` starts by its path.

It does what it is asked on stdin and answers on what was stdout when it began, until nobody can ask
any more: the process that started it has closed the pipe, or is gone. Then it ends at once, in the
middle of its work too. It is not started as a copy of the process that asks (`multiprocessing`),
which would run the main program of a script or a notebook again.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds, and until then this process has to notice its end
    from moecc.pipeline.workers.packed import Packed

HEAD = 16  # bytes, by which every request begins


def main() -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too; who started it decides
    with suppress(OSError):  # if memory is short, Linux ends workers before their driver
        Path("/proc/self/oom_score_adj").write_text("500", encoding="utf-8")
    asked, answers = _own_pipes()
    sys.path[:] = json.loads(_line(asked))
    requests: SimpleQueue[Packed] = SimpleQueue()
    Thread(target=_take, args=(asked, requests), daemon=True).start()

    from moecc.pipeline.workers.service import serve

    serve(requests, answers)


def _own_pipes() -> tuple[FileIO, FileIO]:
    """Take the pipes away from whatever else reads stdin and writes to stdout in this process."""
    pipes = FileIO(os.dup(0), "r"), FileIO(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return pipes


def _line(pipe: FileIO) -> bytes:
    found = b""
    while not found.endswith(b"\n"):
        byte = pipe.read(1)
        if not byte:
            os._exit(0)
        found += byte
    return found


def _take(pipe: FileIO, requests: SimpleQueue[Packed]) -> None:
    """Put all requests into the queue; end the process after the last, and if memory is short."""
    code = 1
    try:
        while head := pipe.read(HEAD):
            from moecc.pipeline.workers.packed import Packed

            requests.put(Packed.receive(pipe, head))
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()

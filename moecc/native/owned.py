"""Who else could put another file in the place of one that is loaded as code."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from moecc.errors import MoeccError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_ADVICE = "set MOECC_CACHE to a folder of your own"


def require_own(path: Path) -> None:
    """Raise MoeccError if someone other than this user and root could replace `path`.

    path: an absolute path without links, of a file or folder that exists. It and all folders above
    it must belong to the user or to root. Nobody else may write into any of them, except into a
    sticky folder such as /tmp above it, where only the owner of a file replaces it.
    """
    if not hasattr(os, "geteuid"):  # no POSIX: there are no such modes
        return
    for part in (*reversed(path.parents), path):
        found = part.lstat()
        if found.st_uid not in (0, os.geteuid()):
            raise MoeccError(f"{part} belongs to another user; {_ADVICE}")
        sticky = part != path and found.st_mode & stat.S_ISVTX
        if found.st_mode & _OTHERS_WRITE and not sticky:
            raise MoeccError(f"others may write to {part}; chmod go-w it, or {_ADVICE}")


def make_own(folder: Path) -> None:
    """Make a folder, and those that are missing above it, for this user alone."""
    for part in (*reversed(folder.parents), folder):
        part.mkdir(mode=0o700, exist_ok=True)

"""The folder of what is kept on this machine, and files that are written as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """$DTR_KERNELS_CACHE, $XDG_CACHE_HOME/dtr_kernels or ~/.cache/dtr_kernels; there need not be one."""
    own, shared = os.environ.get("DTR_KERNELS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    # A home that is unknown, as in some containers, stays "~", where no file is found.
    return Path(own) if own else Path(shared or os.path.expanduser("~/.cache")) / "dtr_kernels"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to; what is written takes the place of ``path`` when it is complete and on the disk.

    Folders are made. A reader, and another process that writes the same file, never find half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)

"""A progress bar if tqdm is installed, else nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def ticking(total: int, done: int, unit: str, shown: bool) -> Iterator[Callable[[], object]]:
    """Show ``done`` of ``total`` units; yield a function to call after each further one."""
    try:
        from tqdm import tqdm
    except ImportError:
        shown = False
    if not shown:
        yield lambda: None
        return
    # Redraw often for a person, but leave few lines in a log.
    interval = 0.2 if sys.stderr.isatty() else 15.0
    with tqdm(total=total, initial=done, unit=f" {unit}", mininterval=interval) as bar:
        yield bar.update

"""Ctrl-C, held back wherever it would leave half a step behind.

Python raises KeyboardInterrupt between any two instructions of the main thread: between two writes to ``p.grad``, or
while other ranks wait for this one. During a step it takes effect at once in the passes and the weighting, where the
caller's code may take long, and at the end of the call elsewhere, where little time is spent.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

# Blocks in the order in which they began; only the main thread has any.
_running: list[HeldBack] = []


class HeldBack:
    """A ``with`` block after which Ctrl-C takes the effect that it would have had inside."""

    # Not generators: one that an interrupt has left suspended could run its end at any later time.
    def __init__(self) -> None:
        self._handler: Any = None
        self._arrived: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> None:
        # A handler that is not a function raises nothing.
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
            self.begin()
            _running.append(self)

    def begin(self) -> None:
        """Replace the handler."""
        self._handler = signal.signal(signal.SIGINT, self._note)

    def end(self) -> None:
        """Restore the handler, and call it if Ctrl-C came meanwhile."""
        signal.signal(signal.SIGINT, self._handler)
        arrived, self._arrived = self._arrived, None
        if arrived:
            self._handler(*arrived)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._arrived = number, frame

    def __exit__(self, *_: object) -> None:
        if self in _running:
            _running.remove(self)
            self.end()


class LetThrough:
    """A ``with`` block inside ``HeldBack`` in which Ctrl-C takes effect at once."""

    def __enter__(self) -> None:
        self._held = _running[-1] if _running and threading.current_thread() is threading.main_thread() else None
        if self._held:
            self._held.end()

    def __exit__(self, *_: object) -> None:
        if self._held:
            self._held.begin()

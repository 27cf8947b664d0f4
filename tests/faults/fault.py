"""One kind of fault."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    """A kind of fault, which can be tried again and again.

    Attributes:
        name: of the row in the table.
        expected: what must be left afterwards, in words.
        tries: called with a source of random numbers and an empty folder. Each item is one fault tried: None if all was
            as expected, or a sentence that says what was lost and how to repeat it.
    """

    name: str
    expected: str
    tries: Callable[[random.Random, Path], Iterator[str | None]]

    def run(self, seed: int, folder: Path, seconds: float) -> tuple[int, list[str]]:
        """Try once, which takes the preparations, and for so many seconds; return how often, and what was lost."""
        tried, lost, end = 0, [], math.inf
        for outcome in self.tries(random.Random(seed), folder):
            if tried == 0:
                end = time.monotonic() + seconds
            tried += 1
            if outcome is not None:
                lost.append(outcome)
            if time.monotonic() >= end:
                break
        return tried, lost

"""Argument types that several command lines share."""

from __future__ import annotations

import argparse
from contextlib import suppress


def positive(text: str) -> int:
    """Parse a positive count.

    Raises:
        argparse.ArgumentTypeError: if it is not a whole number of at least 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """Parse a share of a whole.

    Raises:
        argparse.ArgumentTypeError: if it is not a number above 0 and up to 1.
    """
    with suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number above 0 and up to 1, got {text!r}")

"""Assertions on the errors for bad input."""

from __future__ import annotations

import pytest


def refused(call, error, fragments):
    """``call`` raises just ``error``, and the message holds all of ``fragments``."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error, f"a subclass, raised elsewhere: {caught.value!r}"
    missing = [fragment for fragment in fragments if fragment not in str(caught.value)]
    assert not missing, f"{missing} not in {str(caught.value)!r}"

"""Texts that fit into an error message, whatever a file or an argument holds."""

_LONGEST = 200


def shortened(thing: object) -> str:
    """Return a text of it that fits into an error message, whatever a file held."""
    text = str(thing)
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]} ... {text[-half:]}"


def quoted(value: object) -> str:
    """Return the ``repr`` of a value, shortened, for an error message."""
    try:
        return shortened(repr(value))
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"{type(value).__name__} with too many digits to be shown"

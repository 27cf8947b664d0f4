"""Texts for error messages that stay short, whatever a file or an argument holds."""

_LONGEST = 200


def shortened(thing: object) -> str:
    """Return ``str(thing)``, shortened to fit into an error message."""
    text = str(thing)
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]} ... {text[-half:]}"


def quoted(value: object) -> str:
    """Return the ``repr`` of a value, shortened, for an error message."""
    try:
        return shortened(repr(value))
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"{type(value).__name__} with too many digits to be shown"

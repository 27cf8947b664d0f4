"""Check that stored results fit the types of the fields that they are read into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dtr_kernels.quoting import quoted

_hints = cache(get_type_hints)


def misfit(value: object, kind: Any, name: str) -> str | None:
    """Return the name of the first value of another type than declared; None if all fit.

    Args:
        value: of a dataclass, a container or a plain type.
        kind: its type, as in an annotation. Integers count as floats, too.
        name: of the value.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        found = [misfit(value, of, name) for of in inner]
        return None if None in found else found[0]
    if kind is Any or (origin is Literal and value in inner):
        return None
    parts: list[tuple[object, Any, str]] = []
    if is_dataclass(kind) and type(value) is kind:
        parts = [(getattr(value, field), of, f"{name}.{field}") for field, of in _hints(kind).items()]
    elif isinstance(value, dict) and origin in (dict, Mapping):
        parts = [
            (part, of, f"{name}[{quoted(key)}]")
            for key in value
            for part, of in ((key, inner[0]), (value[key], inner[1]))
        ]
    elif isinstance(value, list) and origin in (list, Sequence):
        parts = [(part, inner[0], f"{name}[{i}]") for i, part in enumerate(value)]
    elif type(value) is not kind and not (kind is float and type(value) is int):
        return name
    return next(filter(None, (misfit(*part) for part in parts)), None)

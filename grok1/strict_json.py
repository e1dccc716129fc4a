"""Strict JSON, without repeated keys, NaN, and numbers too large for a float."""

import json
import math
from collections.abc import Iterable
from typing import NoReturn

# The value of a JSON text.
Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None

_MOST_DIGITS = 309  # of an integer that a float can hold
_MOST_NESTED = 64  # arrays and objects, one inside the other
_TOO_DEEP = f"it is nested more than {_MOST_NESTED} levels deep"


def read_json(text: str | bytes) -> Json:
    """Return the value of a JSON text; bytes are UTF-8, perhaps with a byte order mark.

    Raises ValueError with a short reason, also for a repeated key in an object, for NaN and
    Infinity, for a number too large for a float, and for a text nested too deeply.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = _containers([value])
    for _ in range(_MOST_NESTED):
        level = _containers(
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        )
    if level:  # it would overflow the stack when printed or compared
        raise ValueError(_TOO_DEEP)
    return value


def _containers(values: Iterable[Json]) -> list[dict[str, Json] | list[Json]]:
    return [value for value in values if isinstance(value, (dict, list))]


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    fields: dict[str, Json] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"the key {_short(ascii(key))} is repeated in an object")
        fields[key] = value
    return fields


def _integer(text: str) -> int:
    # The length first: converting very long ones takes quadratic time, or is refused by Python.
    if len(text.lstrip("-")) > _MOST_DIGITS or math.isinf(float(text)):
        raise ValueError(f"the number {_short(text)} is too large for a float")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {_short(text)} is too large for a float")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."

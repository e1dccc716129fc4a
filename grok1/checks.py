"""Checks of single values, with uniform error messages."""

import math
import numbers
from typing import TypeGuard

_LONG = 10**40
_MOST_SHOWN = 400  # characters


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer, Python's or NumPy's; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a real number, Python's or NumPy's; True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def require(condition: bool, field: str, expected: str, got: object) -> None:
    """Raise ValueError, `field: expected ..., got ...`, unless the condition holds."""
    if not condition:
        raise ValueError(f"{field}: expected {expected}, got {_shorten(got)}")


def require_integers(config: object, least: int, *fields: str, most: float = math.inf) -> None:
    """Raise ValueError unless these attributes are integers from `least` to `most`."""
    for field in fields:
        value = getattr(config, field)
        require(is_integer(value) and value >= least, field, f"an integer >= {least}", value)
        require(value <= most, field, f"an integer <= {most}", value)


def require_positive(config: object, least: float, most: float, *fields: str) -> None:
    """Raise ValueError unless these attributes are positive numbers from `least` to `most`."""
    for field in fields:
        value = getattr(config, field)
        require(is_number(value) and 0 < value < math.inf, field, "a positive number", value)
        within = least <= value <= most
        require(within, field, f"a number from {least:g} to {most:g}", value)


def _shorten(value: object) -> str:
    """Return the text of a value for an error message, shortened if it is very long."""
    if is_integer(value) and abs(value) >= _LONG:
        return "an integer of more than 40 digits"  # Python refuses to print very long ones
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."

"""Checks of single values, with the sentence that a wrong one gets."""

import math
import numbers
from typing import Any, TypeGuard


def is_integer(value: Any) -> TypeGuard[int]:
    """Return whether a value is an integer, Python's or NumPy's; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a real number, Python's or NumPy's; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def require(condition: bool, field: str, expected: str, got: Any) -> None:
    """Raise ValueError, `field: expected ..., got ...`, unless the condition holds."""
    if not condition:
        raise ValueError(f"{field}: expected {expected}, got {got!r}")


def require_integers(config: Any, least: int, *fields: str) -> None:
    """Raise ValueError unless these attributes are integers of at least `least`."""
    for field in fields:
        value = getattr(config, field)
        require(is_integer(value) and value >= least, field, f"an integer >= {least}", value)


def require_positive(config: Any, *fields: str) -> None:
    """Raise ValueError unless these attributes are finite numbers above 0."""
    for field in fields:
        value = getattr(config, field)
        require(is_number(value) and 0 < value < math.inf, field, "a positive number", value)

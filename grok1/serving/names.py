"""Alternative names of Request fields, and suggestions for misspelled names.

Does not import jax, which takes seconds.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")

PUBLISHED = {"seed": "rng_seed", "top_p": "nucleus_p", "max_tokens": "max_len"}


def published_names(fields: Mapping[str, Value]) -> dict[str, Value]:
    """Return the fields under the names that they have in Request.

    Raises ValueError if one is given under both of its names.
    """
    for name, published in PUBLISHED.items():
        if name in fields and published in fields:
            raise ValueError(f"{name} and {published} are one setting; give one of them")
    return {PUBLISHED.get(name, name): value for name, value in fields.items()}


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return a message suffix with the most similar known name, or an empty string."""
    bare = {other.lstrip("-"): other for other in known}  # leading hyphens do not count
    name = name.lstrip("-")
    longer = [other for other in bare if len(name) > 1 and other.startswith(name)]
    found = longer or difflib.get_close_matches(name, bare, n=1, cutoff=0.7)
    return f"; the nearest is {bare[found[0]]}" if found else ""

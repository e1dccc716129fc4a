"""What the fields of a Request are called elsewhere, and the nearest name to a wrong one.

Known without jax, which takes seconds to import.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

PUBLISHED = {"seed": "rng_seed", "top_p": "nucleus_p", "max_tokens": "max_len"}


def published_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields by the names that they have in Request.

    Raises ValueError if one is given by both of its names.
    """
    for name, published in PUBLISHED.items():
        if name in fields and published in fields:
            raise ValueError(f"{name} and {published} are one setting; give one of them")
    return {PUBLISHED.get(name, name): value for name, value in fields.items()}


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence, with the most similar of the known names if one is similar."""
    bare = {other.lstrip("-"): other for other in known}  # hyphens are no likeness
    name = name.lstrip("-")
    longer = [other for other in bare if len(name) > 1 and other.startswith(name)]
    found = longer or difflib.get_close_matches(name, bare, n=1, cutoff=0.7)
    return f"; the nearest is {bare[found[0]]}" if found else ""

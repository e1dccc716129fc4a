"""Hooks in the compiled steps: what they are compiled for, and what they get."""

import functools
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grok1.inspection import Hook, Site

NOT_FINITE = (
    "expected finite logits, got NaN or infinity, so the weights are damaged; look for the file "
    "with `python checkpoint.py verify DIRECTORY`"
)
MOST_KEPT = 16  # steps with hooks whose programs are kept
STATIC = ("config", "execution", "top_logprobs", "capture", "capture_layers")


class SameHook:
    """A hook that equals none but itself: two equal bound methods may do different things."""

    def __init__(self, hook: Hook):
        self.hook = hook

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameHook) and other.hook is self.hook

    def __hash__(self) -> int:
        return id(self.hook)


Hooks = tuple[tuple[Site, SameHook], ...]


def as_hooks(hooks: Mapping[Site, Hook]) -> Hooks:
    """Return hooks as a static argument of a step."""
    return tuple((site, SameHook(hook)) for site, hook in hooks.items())


def bind(hooks: Hooks, arguments: Sequence[Any]) -> dict[Site, Hook]:
    """Return hooks as the model takes them; each gets these arguments beside layer and array."""

    def bound(hook: Hook) -> Hook:
        return lambda layer, array: hook(layer, array, *arguments)

    return {site: bound(same.hook) for site, same in hooks}


def not_finite(hooks: Hooks) -> str:
    """Return what is wrong with logits that are not finite."""
    if not hooks:
        return NOT_FINITE
    return (
        "expected finite logits, got NaN or infinity with hooks; look at what they return, and "
        "whether the same is finite without them"
    )


def with_hooks(step: Any, hooks: Hooks) -> Any:
    """Return a step of steps.py with hooks, which get its `hook_args`."""
    return _with_hooks(step, hooks) if hooks else step


@functools.lru_cache(maxsize=MOST_KEPT)  # a program would else be kept as long as its hooks
def _with_hooks(step: Any, hooks: Hooks) -> Any:
    own = functools.partial(step.__wrapped__, hooks=hooks)
    names = inspect.signature(own).parameters
    static = [name for name in STATIC if name in names]
    donated = [name for name in ("state", "memory") if name in names]
    return jax.jit(own, static_argnames=static, donate_argnames=donated)


def as_arguments(arguments: Sequence[Any], devices: Collection[Any]) -> tuple[Any, ...]:
    """Return what a step on these devices can give to hooks: numbers, too, as arrays of one dtype.

    Raises ValueError for what is no tuple or list of arrays and numbers, or does not fit the dtype.
    """
    if not isinstance(arguments, tuple | list):
        got = type(arguments).__name__
        raise ValueError(f"hook_args: expected a tuple or list of arrays, got one {got}")
    try:
        return jax.tree.map(functools.partial(_as_array, devices=devices), tuple(arguments))
    except TypeError as error:
        raise ValueError(f"hook_args: expected arrays and numbers, {error}") from error


def _as_array(value: Any, devices: Collection[Any]) -> Any:
    """Return an array of a dtype that jax computes with, as it makes one of float64."""
    if isinstance(value, jax.Array) and value.sharding.device_set == devices:
        return value
    array = np.asarray(value)
    if not (jnp.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise TypeError(f"got {value!r}")
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    with np.errstate(over="ignore"):
        found = array.astype(dtype)
    whole = jnp.issubdtype(dtype, np.integer)
    if np.any(found != array if whole else np.isfinite(found) != np.isfinite(array)):
        raise TypeError(f"got {value!r}, which {dtype} does not hold")
    return found

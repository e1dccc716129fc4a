"""Hooks in the compiled steps: as static arguments, and with their own arguments."""

import functools
import inspect
from collections.abc import Collection
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from grok1.inspection import Hook, HookArgs, Site, SiteHooks

Step = TypeVar("Step")  # a compiled function of steps.py

NOT_FINITE = (
    "expected finite logits, got NaN or infinity, so the weights are damaged; find the file "
    "with `python checkpoint.py verify DIRECTORY`"
)
MOST_KEPT = 16  # number of steps with hooks whose programs are kept
STATIC = ("config", "execution", "top_logprobs", "capture", "capture_layers")


class SameHook:
    """A hook compared by identity: two equal bound methods may do different things."""

    def __init__(self, hook: Hook):
        self.hook = hook

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameHook) and other.hook is self.hook

    def __hash__(self) -> int:
        return id(self.hook)


Hooks = tuple[tuple[Site, SameHook], ...]


def as_hooks(hooks: SiteHooks) -> Hooks:
    """Return hooks as a static argument of a step."""
    return tuple((site, SameHook(hook)) for site, hook in hooks.items())


def bind(hooks: Hooks, arguments: HookArgs) -> dict[Site, Hook]:
    """Return hooks for the model, called with these arguments after layer and array."""

    def bound(hook: Hook) -> Hook:
        return lambda layer, array: hook(layer, array, *arguments)

    return {site: bound(same.hook) for site, same in hooks}


def not_finite(hooks: Hooks) -> str:
    """Return the error message for logits that are not finite."""
    if not hooks:
        return NOT_FINITE
    return (
        "expected finite logits, got NaN or infinity with hooks; check what they return, and "
        "whether the logits are finite without them"
    )


def with_hooks(step: Step, hooks: Hooks) -> Step:
    """Return a step of steps.py with hooks, which receive its `hook_args`."""
    return _with_hooks(step, hooks) if hooks else step


@functools.lru_cache(maxsize=MOST_KEPT)  # an unbounded cache would keep programs as long as hooks
def _with_hooks(step: Any, hooks: Hooks) -> Any:
    own = functools.partial(step.__wrapped__, hooks=hooks)
    names = inspect.signature(own).parameters
    static = [name for name in STATIC if name in names]
    donated = [name for name in ("state", "memory") if name in names]
    return jax.jit(own, static_argnames=static, donate_argnames=donated)


def as_arguments(arguments: HookArgs, devices: Collection[jax.Device]) -> tuple[ArrayLike, ...]:
    """Return hook arguments for a step on these devices, with numbers converted to arrays.

    Raises ValueError unless it is a tuple or list of arrays and numbers that fit their jax dtype.
    """
    if not isinstance(arguments, tuple | list):
        got = type(arguments).__name__
        raise ValueError(f"hook_args: expected a tuple or list of arrays, got {got}")
    try:
        return jax.tree.map(functools.partial(_as_array, devices=devices), tuple(arguments))
    except TypeError as error:
        raise ValueError(f"hook_args: expected arrays and numbers, {error}") from error


def _as_array(value: ArrayLike, devices: Collection[jax.Device]) -> ArrayLike:
    """Return an array in its canonical jax dtype, such as float32 for float64."""
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

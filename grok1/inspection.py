"""Capture or change arrays inside the model, by name.

A site is a point in the model where an array passes through `tap`. In a LanguageModel's call,
`capture=` names the sites whose arrays are returned; `hooks={site: function}` changes arrays as
they are computed, and `hooks={(site, layer): function}` those of one layer. Sites that a call does
not name add nothing to the compiled program.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import (
    Callable,
    Collection,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from grok1.checks import is_integer

if TYPE_CHECKING:
    from model import TransformerConfig

Hook = Callable[..., jax.Array]  # (layer, array, *hook_args) -> array
HookArgs = Sequence[ArrayLike]
Site = str | tuple[str, int]  # in all layers, or in one of them
SiteHooks = Mapping[Site, Hook]
Found = Any  # an array of jax or NumPy, or None: who has captured it need not test for None


class Captured(NamedTuple):
    """Arrays from inside the model, in the order in which they are computed; None: not captured.

    Float32 except `expert_index`. `L` is all layers, or those of `capture_layers` in that order;
    `S` is `T` without a memory, else the memory's length; other letters as in model.py. If a hook
    changes an array, the changed one is captured.

    embeddings: [B, T, D], the residual stream before the first layer.
    queries: [L, B, T, N, H], keys, values: [L, B, T, K, H], of this call's tokens, as attention
        uses them: queries and keys after the rotary embedding.
    attention_weights: [L, B, N, T, S], the weight of each key for each query: they sum to one over
        S, or are zero for a query that sees no key.
    head_outputs: [L, B, T, N, H], each head's sum of values by these weights, before the output
        projection.
    attention_output: [L, B, T, D], what attention adds to the residual stream.
    router_logits: [L, B, T, E], the router's scores.
    router_probs: [L, B, T, E], the softmax over all experts.
    expert_index: int32 [L, B, T, A], the chosen experts, best first; E for a masked token. A hook
        may replace them: the gates are unchanged, and an index outside [0, E) means no expert.
    expert_gates: [L, B, T, A], the factor of each chosen expert's output; zero for a masked token.
    feed_forward_output: [L, B, T, D], what the experts add to the residual stream.
    hidden_states: [L, B, T, D], the residual stream after the layer.
    """

    embeddings: Found = None
    queries: Found = None
    keys: Found = None
    values: Found = None
    attention_weights: Found = None
    head_outputs: Found = None
    attention_output: Found = None
    router_logits: Found = None
    router_probs: Found = None
    expert_index: Found = None
    expert_gates: Found = None
    feed_forward_output: Found = None
    hidden_states: Found = None


CAPTURE_SITES = Captured._fields
ROUTER_SITES = ("router_logits", "router_probs", "expert_index", "expert_gates")
HEAD_SITES = ("queries", "keys", "values", "attention_weights", "head_outputs")
OUTSIDE_LAYERS = ("embeddings",)


class Probe:
    """What a call of the model captures and changes; `found` holds the captured arrays.

    capture: the sites to capture. layers: the layers to capture, as indices from 0; None: all.
    hooks: functions (layer, array) -> array by site, or by site and layer from 0. layer: int32 [],
    passed to hooks; -1 outside the layers. positions: those of the call's tokens, int32 [B, T],
    and which are not pads, bool [B, T]. changing: site and number of axes of the array that a hook
    is processing. The function `positions` uses `positions` and `changing`.
    """

    def __init__(
        self,
        capture: Collection[str] = (),
        layers: Sequence[int] | None = None,
        hooks: SiteHooks | None = None,
        layer: jax.Array | int = -1,
    ):
        self.capture = capture
        self.layers = layers
        self.hooks = hooks or {}
        self.layer = layer
        self.positions: tuple[jax.Array, jax.Array] | None = None
        self.changing: tuple[str, int] | None = None
        self.found: dict[str, jax.Array] = {}

    def within(self, layer: jax.Array) -> Probe:
        """Return a probe for the same sites and hooks in one layer, with nothing found yet."""
        probe = Probe(self.capture, self.layers, self.hooks, layer)
        probe.positions = self.positions
        return probe

    def __call__(self, site: str, array: jax.Array) -> jax.Array:
        """Change the array by the hook of its site, capture it, and return it; see `tap`."""
        for key, hook in self.hooks.items():
            name, only = _parts(key)
            if name == site:
                new = self._changed(site, hook, array)
                array = new if only is None else jnp.where(self.layer == only, new, array)
        if site in self.capture:
            self.found[site] = array
        return array

    def uses(self, site: str) -> bool:
        """Whether a site is captured or changed."""
        return site in self.capture or any(_parts(key)[0] == site for key in self.hooks)

    def _changed(self, site: str, hook: Hook, array: jax.Array) -> jax.Array:
        self.changing = site, array.ndim
        try:
            new = hook(jnp.asarray(self.layer, jnp.int32), array)
        except Exception as error:  # including jax's, such as for `if layer == 3`
            what = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ValueError(
                f"hooks: the function of {site!r} failed ({what}); it must be a pure function "
                "(layer, array, *hook_args) -> array of traced arrays: use jax.numpy, and "
                "jnp.where(layer == 3, x, y) in place of if"
            ) from error
        finally:
            self.changing = None
        got = getattr(new, "shape", None), getattr(new, "dtype", None)
        if got != (array.shape, array.dtype):
            given = f"{array.dtype} {list(array.shape)}"
            what = type(new).__name__ if got[0] is None else f"{got[1]} {list(got[0])}"
            raise ValueError(f"hooks: {site!r} must return {given}, as it was given, got {what}")
        return new


def _parts(key: Site) -> tuple[str, int | None]:
    """Return the site and the layer, None for all, of a key of hooks."""
    return key if isinstance(key, tuple) else (key, None)


# The probe of the call being traced; a ContextVar, so that each thread has its own.
_asked: ContextVar[Probe | None] = ContextVar("asked", default=None)


def tap(site: str, array: jax.Array) -> jax.Array:
    """Return the array of a site, with which the model continues.

    The array is captured, or changed by a hook, if the call being traced asks for that. Otherwise
    this is the identity, and adds nothing to the compiled program.

    Raises ValueError if a hook fails on traced arrays, or returns another shape or dtype.
    """
    probe = _asked.get()
    return array if probe is None else probe(site, array)


def tapped(site: str) -> bool:
    """Return whether the call being traced asks for a site."""
    probe = _asked.get()
    return probe is not None and probe.uses(site)


def positions() -> jax.Array:
    """Return the positions of the tokens that a hook's array belongs to, int32; -1: a pad.

    Call this in a hook: `jnp.where(positions() == 3, 0, array)` changes one token of each sequence,
    however that is split into chunks. The result has as many axes as the array: B and T where the
    array has them (T of the queries, for attention_weights), and 1 elsewhere. Raises RuntimeError
    outside a hook.
    """
    probe = _asked.get()
    if probe is None or probe.positions is None or probe.changing is None:
        raise RuntimeError("positions: expected to be called by a hook, got a call outside one")
    position, valid = probe.positions
    found, (site, axes) = jnp.where(valid, position, -1), probe.changing
    if site == "attention_weights":
        return found[:, None, :, None]
    return found.reshape(*found.shape, *(1,) * (axes - found.ndim))


def asked() -> Probe | None:
    """Return the probe that `tap` calls now, or None."""
    return _asked.get()


@contextlib.contextmanager
def asking(probe: Probe | None) -> Iterator[None]:
    """Context in which `tap` calls this probe, in this thread."""
    token = _asked.set(probe)
    try:
        yield
    finally:
        _asked.reset(token)


def check_capture(capture: Collection[str], config: TransformerConfig) -> tuple[str, ...]:
    """Return the sites to capture.

    Raises ValueError for an unknown site, or if `capture` is not a collection.
    """
    if isinstance(capture, str) or not isinstance(capture, Iterable):
        raise ValueError(
            f"capture: expected a collection of sites, such as ('router_probs',), got {capture!r}"
        )
    capture = tuple(capture)
    for name in capture:
        _check_site("capture", name, config)
    return capture


def check_hooks(hooks: SiteHooks | None, config: TransformerConfig) -> dict[Site, Hook]:
    """Return hooks, with layers counted from 0.

    Raises ValueError for an unknown site or layer, or if `hooks` is not a dict of functions.
    """
    if hooks is None:
        return {}
    if not isinstance(hooks, Mapping):
        raise ValueError(f"hooks: expected a dict {{site: function}}, got {hooks!r}")
    found: dict[Site, Hook] = {}
    for key, hook in hooks.items():
        if isinstance(key, tuple) and len(key) == 2:
            name, layer = key
            _check_site("hooks", name, config)
            if name in OUTSIDE_LAYERS:
                raise ValueError(f"hooks: {name!r} is in no layer, got {key!r}")
            (layer,) = check_layers([layer], config.num_layers, f"hooks: {key!r}")
            if (name, layer) in found:
                raise ValueError(f"hooks: {key!r} is given twice, as {layer} is the same layer")
            found[name, layer] = hook
        else:
            _check_site("hooks", key, config)
            found[key] = hook
        # Hashable: a runner looks up compiled programs by their hooks.
        if not callable(hook) or not isinstance(hook, Hashable):
            wanted = "a hashable function (layer, array)"
            raise ValueError(f"hooks: {key!r} must be {wanted}, got {hook!r}")
    return found


def _check_site(field: str, name: object, config: TransformerConfig) -> None:
    sites = tuple(s for s in CAPTURE_SITES if config.num_experts > 1 or s not in ROUTER_SITES)
    if name not in sites:
        raise ValueError(f"{field}: expected names from {sites}, got {name!r}")


def check_layers(
    layers: Sequence[int], num_layers: int, field: str = "capture_layers"
) -> tuple[int, ...]:
    """Return layers as indices from 0; -1 is the last one. field: their name in messages.

    Raises ValueError for an unknown or repeated layer, or if there are none.
    """
    wanted = f"one or more integers from {-num_layers} to {num_layers - 1}, each layer once"
    wrong = ValueError(f"{field}: expected {wanted}, got {layers!r}")
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise wrong
    found = []
    for layer in layers:
        if not is_integer(layer) or not -num_layers <= layer < num_layers:
            raise wrong
        found.append(int(layer) % num_layers)
    if len({*found}) != len(found) or not found:
        raise wrong
    return tuple(found)


def make_probe(
    config: TransformerConfig,
    capture: Collection[str],
    layers: Sequence[int] | None,
    hooks: SiteHooks | None,
) -> Probe:
    """Return the probe for these arguments. Raises ValueError."""
    capture = check_capture(capture, config)
    if layers is not None:
        layers = check_layers(layers, config.num_layers)
    return Probe(capture, layers, check_hooks(hooks, config))


def captured_shapes(
    config: TransformerConfig,
    capture: Collection[str],
    *,
    batch: int,
    steps: int,
    positions: int,
    layers: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of captured arrays, with four bytes per element, by site.

    steps: T. positions: S. layers: how many; None: all.
    """
    each = (config.num_layers if layers is None else layers, batch)
    width, heads = config.emb_size, config.num_q_heads
    shared = (*each, steps, config.num_kv_heads, config.key_size)
    shapes = {
        "embeddings": (batch, steps, width),
        "queries": (*each, steps, heads, config.key_size),
        "keys": shared,
        "values": shared,
        "attention_weights": (*each, heads, steps, positions),
        "head_outputs": (*each, steps, heads, config.key_size),
        "expert_index": (*each, steps, config.num_selected_experts),
        "expert_gates": (*each, steps, config.num_selected_experts),
        **dict.fromkeys(("router_logits", "router_probs"), (*each, steps, config.num_experts)),
        **dict.fromkeys(
            ("attention_output", "feed_forward_output", "hidden_states"), (*each, steps, width)
        ),
    }
    return {site: shapes[site] for site in capture}


def nbytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the total bytes of arrays of these `captured_shapes`."""
    return sum(4 * math.prod(shape) for shape in shapes.values())

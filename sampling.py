"""Logits to token ids: the filters, the draw, and what is reported about it. Pure functions.

Dimension letters: `B` sequences, `V` vocabulary.

Every sequence has its own settings and its own key, and all of them are arrays: changing them never
recompiles, and a sequence draws the same token in any slot and in any company. The filters apply in
the order mask, temperature, top-k, nucleus, each to what the one before it left, renormalised.

Nothing is sorted: on a CPU, sorting a row of the full vocabulary (131,072) takes ten times as long
as the bisection in `_shortest_prefix`, which needs only sums over it, wherever its parts lie. The
sums are in float64: a float32 one is off by some 2e-7 of the whole, which is more than most tokens
have, and the nucleus would be off by as many.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TOP_K = 8  # how many alternatives are reported beside each token


class SampleSettings(NamedTuple):
    """How each sequence is sampled.

    temperature: float32 [B]; 0 takes the most probable token, of equal ones that of the lowest id.
    nucleus_p: float32 [B], in (0, 1]; 1 keeps every token.
    mask: bool [B, V]; True for a token that may be sampled.
    active: bool [B]; False for an unused slot, whose other settings may hold anything.
    top_k: int32 [B]; 0 means no limit, as does None for the whole batch.
    """

    temperature: jax.Array
    nucleus_p: jax.Array
    mask: jax.Array
    active: jax.Array
    top_k: jax.Array | None = None


class SampleOutput(NamedTuple):
    """The tokens drawn, and how probable they were. A slot that is not active has zeros throughout.

    token_id: int32 [B, 1].
    prob: float32 [B, 1], the probability of the token after all filters.
    top_k_token_ids: int32 [B, min(TOP_K, V)], the most probable tokens after all filters, in order;
        where fewer than that are left, the rest have probability 0 and mean nothing.
    top_k_probs: float32 [B, min(TOP_K, V)], their probabilities after all filters.
    logprob: float32 [B, 1], the model's own log-probability of the token: log_softmax of the
        logits before mask, temperature and filters.
    """

    token_id: jax.Array
    prob: jax.Array
    top_k_token_ids: jax.Array
    top_k_probs: jax.Array
    logprob: jax.Array


class HasLogits(Protocol):
    """What `sample_token` reads of the model's output."""

    @property
    def logits(self) -> jax.Array:
        """The logits [B, 1, V] of each sequence's next token."""


def validate_settings(settings: SampleSettings) -> None:
    """Check settings on the host: those of a batch, or of one sequence without the axis B.

    Slots that are not active are not looked at. Raises ValueError that names the field, what it may
    hold and what it holds.
    """
    active, mask = np.asarray(settings.active), np.asarray(settings.mask)
    if mask.dtype != bool:
        raise ValueError(f"mask must be bool, True for an allowed token, got dtype {mask.dtype}")
    float_max, int_max = np.finfo(np.float32).max, np.iinfo(np.int32).max
    top_k = 0 if settings.top_k is None else settings.top_k

    def check(field: str, value: Any, allowed: str, holds: Callable[[Any], Any]) -> None:
        try:
            numbers = np.asarray(value, np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{field} must be {allowed}, got {value!r}") from None
        wrong = active & ~holds(numbers)
        for index in np.argwhere(wrong)[:1]:
            got = np.broadcast_to(numbers, wrong.shape)[tuple(index)]
            place = f" in sequence {index[0]}" if len(index) else ""
            raise ValueError(f"{field} must be {allowed}, got {got:g}{place}")

    finite = "a finite number of at least 0"
    check("temperature", settings.temperature, finite, lambda x: (x >= 0) & (x <= float_max))
    fraction = "a number above 0 and at most 1"
    check("nucleus_p", settings.nucleus_p, fraction, lambda x: (x > 0) & (x <= 1))
    count = "an integer of at least 0 (0: no limit)"
    check("top_k", top_k, count, lambda x: (x >= 0) & (x <= int_max) & (x % 1 == 0))
    check("mask", mask.sum(axis=-1), "True for at least one token", lambda x: x > 0)


def top_k_filter(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """Keep the `top_k` largest logits of each row, of equal ones those of the lower ids.

    logits: float32 [B, V]; -inf marks a token that is already out.
    top_k: int32 [B]; 0 keeps everything.
    Returns float32 [B, V], -inf for the tokens that are out.
    """
    limit = jnp.where(top_k > 0, top_k, logits.shape[-1])
    keep = _shortest_prefix(logits, jnp.ones(logits.shape, jnp.int32), limit)
    return jnp.where(keep, logits, -jnp.inf)


def top_p_filter(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Keep the nucleus of each row: the fewest tokens whose probability together reaches `top_p`.

    Of equal logits those of the lower ids come first. At least one token is kept. Nucleus sampling
    is from Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.

    logits: float32 [B, V]; -inf marks a token that is already out.
    top_p: float32 [B], in [0, 1]; 1 keeps everything, 0 the first token.
    Returns float32 [B, V], -inf for the tokens that are out.
    """
    return _nucleus(logits, top_p, jnp.ones_like(top_p))


def sample_token(rngs: jax.Array, lm_outputs: HasLogits, settings: SampleSettings) -> SampleOutput:
    """Draw the next token of each sequence.

    rngs: one key a sequence, [B] typed or uint32 [B, 2] raw.
    lm_outputs: anything with `logits` [B, 1, V]. A token at -inf is drawn only if every allowed
        token is; NaN and +inf must not occur.
    settings: a batch of B; `validate_settings` says what it may hold.
    """
    logits = lm_outputs.logits
    assert logits.ndim == 3 and logits.shape[1] == 1, f"{logits.shape=}, expected [B, 1, V]"
    logits = logits[:, 0].astype(jnp.float32)  # [B, V]
    active = settings.active[:, None]

    # To be greedy is to keep the first token only, as a nucleus of 0 does. Temperatures below the
    # normal numbers, which devices may flush to 0, are 0.
    greedy = settings.temperature < jnp.finfo(jnp.float32).tiny
    temperature = jnp.where(greedy, 1, settings.temperature)
    nucleus_p = jnp.where(greedy, 0, settings.nucleus_p)

    allowed = settings.mask | ~active
    filtered = jnp.where(allowed, logits, -jnp.inf)
    # Where the model rules out all that is allowed, one allowed token is as good as another.
    stuck = jnp.max(filtered, axis=-1, keepdims=True) == -jnp.inf
    filtered = jnp.where(stuck & allowed, 0, filtered)
    if settings.top_k is not None:  # before the temperature, which does not change the order
        filtered = top_k_filter(filtered, settings.top_k)
    filtered = _nucleus(filtered, nucleus_p, temperature)

    probs = _probabilities(filtered, temperature)
    # The default mode misjudges events of probability below 1e-7: many, in a large vocabulary.
    draw = jax.vmap(lambda key, row: jax.random.categorical(key, row, mode="high"))
    token_id = draw(rngs, jnp.log(probs))[:, None].astype(jnp.int32)  # [B, 1]
    _, top_ids = lax.top_k(filtered, min(TOP_K, logits.shape[-1]))
    output = SampleOutput(
        token_id=token_id,
        prob=jnp.take_along_axis(probs, token_id, axis=-1),
        top_k_token_ids=top_ids.astype(jnp.int32),
        top_k_probs=jnp.take_along_axis(probs, top_ids, axis=-1),
        logprob=_log_probability(logits, token_id),
    )
    return jax.tree.map(lambda x: jnp.where(active, x, jnp.zeros_like(x)), output)


def _weights(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """float64 [B, V] in proportion to the probabilities, the largest 1. Needs `enable_x64`."""
    logits = logits.astype(jnp.float64)
    return jnp.exp((logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature[:, None])


def _probabilities(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """Softmax of logits [B, V] at a temperature [B], summed in float64 and returned as float32."""
    with jax.enable_x64(True):
        weights = _weights(logits, temperature)
        return (weights / jnp.sum(weights, axis=-1, keepdims=True)).astype(jnp.float32)


def _log_probability(logits: jax.Array, token_id: jax.Array) -> jax.Array:
    """Log-softmax of logits [B, V] at token_id [B, 1], summed in float64, float32 [B, 1]."""
    with jax.enable_x64(True):
        logits = logits.astype(jnp.float64)
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return (jnp.take_along_axis(logits, token_id, axis=-1) - total).astype(jnp.float32)


def _nucleus(logits: jax.Array, top_p: jax.Array, temperature: jax.Array) -> jax.Array:
    """`top_p_filter` where the probabilities are those at a temperature [B]."""
    with jax.enable_x64(True):
        weights = _weights(logits, temperature)
        mass = top_p * jnp.sum(weights, axis=-1)
        # A top_p of 1 keeps even tokens of weight 0; one of 0 keeps the first token.
        mass = jnp.where(top_p < 1, jnp.maximum(mass, jnp.finfo(jnp.float64).tiny), jnp.inf)
        keep = _shortest_prefix(logits, weights, mass)
    return jnp.where(keep, logits, -jnp.inf)


def _shortest_prefix(logits: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """Mark the first tokens, by falling logit and rising id, whose weights add up to the target.

    logits: float32 [B, V]. weights: [B, V], at least 0, equal where logits are. target: [B], of the
    weights' dtype. Returns bool [B, V]; all True in a row whose weights never reach the target.
    """
    order = _ordered_bits(logits)  # [B, V]

    def add_bit(bit: jax.Array, last: jax.Array) -> jax.Array:
        trial = last | (jnp.uint32(1) << bit.astype(jnp.uint32))
        reached = jnp.sum(jnp.where(order >= trial, weights, 0), axis=-1, keepdims=True)
        return jnp.where(reached >= target[:, None], trial, last)

    # The largest number such that the logits from it upwards reach the target, from its top bit
    # downwards; 0, which stands below every logit, if they never do.
    last = jnp.zeros_like(order[:, :1])
    last = lax.fori_loop(0, 32, lambda i, last: add_bit(31 - i, last), last)
    above, tied = order > last, order == last
    rank = jnp.cumsum(tied, axis=-1, dtype=jnp.int32)  # 1 for the tied token of the lowest id
    before = jnp.sum(jnp.where(above, weights, 0), axis=-1, keepdims=True) + (rank - 1) * weights
    return above | (tied & (before < target[:, None]))


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 numbers above 0 that compare as the float32 x do, -inf included, NaN not."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    # The bits of negative numbers count down, so they turn; the others, with -0 among them as it is
    # not less than 0, get the sign bit to stand above.
    return jnp.where(x < 0, ~bits, bits | jnp.uint32(1 << 31))

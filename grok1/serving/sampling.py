"""Logits to token ids: filters, sampling, and reported probabilities. Pure functions.

Dimension letters: `B` sequences, `V` vocabulary.

Every sequence has its own settings and its own key, all of them arrays: changing them never
recompiles, and a sequence draws the same token in any slot, whatever else is in the batch. The
order is penalties and bias, mask, temperature, top-k, nucleus, min-p; each filter applies to the
renormalised output of the previous one. A filter that no sequence uses is skipped.

Nothing is sorted: on a CPU, sorting a row of the full vocabulary (131,072) takes ten times as long
as the bisection in `_shortest_prefix`, which needs only sums over the row, however it is sharded.
The sums are in float64: in float32 the relative error of about 2e-7 exceeds the probability of most
tokens, so the nucleus could gain or lose many of them. Kernels may have a form of their own.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from grok1.ops.numbers import ordered_bits, uniform_numbers
from grok1.serving.request_limits import LARGEST_BIAS, LARGEST_PENALTY, MOST_LOGPROBS

TOP_K = 8  # number of alternatives reported with each token
TOP_LOGPROBS = MOST_LOGPROBS


class SampleSettings(NamedTuple):
    """How each sequence is sampled. A field after `active` may be None, if no sequence uses it.

    temperature: float32 [B]; 0 takes the most probable token; ties go to the lowest id.
    nucleus_p: float32 [B], in (0, 1]; 1 keeps every token.
    mask: bool [B, V]; True for a token that may be sampled.
    active: bool [B]; False for an unused slot, whose other settings are ignored.
    top_k: int32 [B]; 0 means no limit.
    min_p: float32 [B], in [0, 1]; keeps the tokens at least min_p times as probable as the most
        probable one (Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling"); 0 keeps all.
    repetition_penalty: float32 [B], above 0; divides the positive logits of the tokens in prompt
        and answer, and multiplies the negative ones (Keskar et al. 2019, "CTRL", section 4.1, in
        its common form); 1 changes nothing.
    presence_penalty: float32 [B]; subtracted from the logits of the tokens in the answer.
    frequency_penalty: float32 [B]; subtracted once for each time a token is in the answer.
    bias: float32 [B, V]; added to the logits.
    in_prompt: bool [B, V]; the tokens in the prompt. in_answer: int32 [B, V]; how often each token
        is in the answer. Required with the penalties.
    top_logprobs: int32 [B], up to TOP_LOGPROBS; how many of the model's most probable tokens to
        report. If any sequence sets it above 0, all TOP_LOGPROBS are reported.
    """

    temperature: jax.Array
    nucleus_p: jax.Array
    mask: jax.Array
    active: jax.Array
    top_k: jax.Array | None = None
    min_p: jax.Array | None = None
    repetition_penalty: jax.Array | None = None
    presence_penalty: jax.Array | None = None
    frequency_penalty: jax.Array | None = None
    bias: jax.Array | None = None
    in_prompt: jax.Array | None = None
    in_answer: jax.Array | None = None
    top_logprobs: jax.Array | None = None


class SampleOutput(NamedTuple):
    """The drawn tokens and their probabilities. All values of an inactive slot are zero.

    token_id: int32 [B, 1].
    prob: float32 [B, 1], the probability of the token after all filters.
    top_k_token_ids: int32 [B, min(TOP_K, V)], the most probable tokens after all filters, in order;
        if fewer are left, the rest have probability 0 and are meaningless.
    top_k_probs: float32 [B, min(TOP_K, V)], their probabilities after all filters.
    logprob: float32 [B, 1], the model's own log-probability of the token: log_softmax of the
        logits before penalties, mask, temperature and filters.
    top_logprob_ids: int32 [B, min(TOP_LOGPROBS, V)], the model's most probable tokens, in order;
        zeros if no sequence requests them, None if `top_logprobs` is None in the settings.
    top_logprobs: float32 [B, min(TOP_LOGPROBS, V)], their log-probabilities.
    """

    token_id: jax.Array
    prob: jax.Array
    top_k_token_ids: jax.Array
    top_k_probs: jax.Array
    logprob: jax.Array
    top_logprob_ids: jax.Array | None = None
    top_logprobs: jax.Array | None = None


Draw = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]  # as `draw_token`


class HasLogits(Protocol):
    """The part of the model's output that `sample_token` reads."""

    @property
    def logits(self) -> jax.Array:
        """The logits [B, 1, V] of each sequence's next token."""


def validate_settings(settings: SampleSettings) -> None:
    """Check settings on the host: those of a batch, or of one sequence without the axis B.

    Inactive slots are ignored. Raises ValueError with the field, its allowed values and its value.
    """
    active, mask = np.asarray(settings.active), np.asarray(settings.mask)
    if mask.dtype != bool:
        raise ValueError(f"mask must be bool, True for an allowed token, got dtype {mask.dtype}")
    float_max, int_max = np.finfo(np.float32).max, np.iinfo(np.int32).max
    top_k = 0 if settings.top_k is None else settings.top_k

    def check(
        field: str, value: object, allowed: str, holds: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        try:
            with np.errstate(all="ignore"):
                numbers = np.asarray(value, np.float64)
                wrong = active & ~holds(numbers)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{field} must be {allowed}, got {value!r}") from None
        if np.any(wrong):
            index = np.argwhere(wrong)[0]
            got = np.broadcast_to(numbers, wrong.shape)[tuple(index)]
            place = f" in sequence {index[0]}" if len(index) else ""
            raise ValueError(f"{field} must be {allowed}, got {got:g}{place}")

    def in_range(value: np.ndarray) -> np.ndarray:
        return (value >= 0) & (value <= 1)

    finite = "a finite number of at least 0"
    check("temperature", settings.temperature, finite, lambda x: (x >= 0) & (x <= float_max))
    fraction = "a number above 0 and at most 1"
    check("nucleus_p", settings.nucleus_p, fraction, lambda x: (x > 0) & (x <= 1))
    count = "an integer of at least 0 (0: no limit)"
    check("top_k", top_k, count, lambda x: (x >= 0) & (x <= int_max) & (x % 1 == 0))
    check("mask", mask.sum(axis=-1), "True for at least one token", lambda x: x > 0)
    if settings.min_p is not None:
        check("min_p", settings.min_p, "a number from 0 to 1", in_range)
    if settings.repetition_penalty is not None:
        least = float(np.float32(1 / LARGEST_PENALTY))  # a little less than in float64
        check(
            "repetition_penalty",
            settings.repetition_penalty,
            f"a number from {least:g} to {LARGEST_PENALTY:g} (1: none)",
            lambda x: (x >= least) & (x <= LARGEST_PENALTY),
        )
    for field in ("presence_penalty", "frequency_penalty"):
        if (penalty := getattr(settings, field)) is not None:
            number = f"a number from -{LARGEST_BIAS:g} to {LARGEST_BIAS:g} (0: none)"
            check(field, penalty, number, lambda x: abs(x) <= LARGEST_BIAS)
    if settings.bias is not None:
        largest = np.max(np.abs(np.asarray(settings.bias, np.float64)), axis=-1)
        most = f"numbers from -{LARGEST_BIAS:g} to {LARGEST_BIAS:g}"
        check("bias", largest, most, lambda x: x <= LARGEST_BIAS)
    if settings.top_logprobs is not None:
        allowed = f"an integer from 0 to {TOP_LOGPROBS}"
        check(
            "top_logprobs",
            settings.top_logprobs,
            allowed,
            lambda x: (x >= 0) & (x <= TOP_LOGPROBS) & (x % 1 == 0),
        )


def top_k_filter(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """Keep the `top_k` largest logits of each row; among equal logits, lower ids come first.

    logits: float32 [B, V]; -inf marks a token that is already excluded.
    top_k: int32 [B]; 0 keeps everything.
    Returns float32 [B, V], -inf for the excluded tokens.
    """
    limit = jnp.where(top_k > 0, top_k, logits.shape[-1])
    keep = _shortest_prefix(logits, jnp.ones(logits.shape, jnp.int32), limit)
    return jnp.where(keep, logits, -jnp.inf)


def top_p_filter(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Keep the nucleus of each row: the fewest tokens whose total probability reaches `top_p`.

    Among equal logits, lower ids come first. At least one token is kept. Nucleus sampling is from
    Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.

    logits: float32 [B, V]; -inf marks a token that is already excluded.
    top_p: float32 [B], in [0, 1]; 1 keeps everything, 0 only the most probable token.
    Returns float32 [B, V], -inf for the excluded tokens.
    """
    return _nucleus(logits, top_p, jnp.ones_like(top_p))


def sample_token(
    rngs: jax.Array, lm_outputs: HasLogits, settings: SampleSettings, draw: Draw | None = None
) -> SampleOutput:
    """Draw the next token of each sequence.

    rngs: one key per sequence, [B] typed or uint32 [B, 2] raw.
    lm_outputs: anything with `logits` [B, 1, V]. A token at -inf is drawn only if every allowed
        token is at -inf; NaN and +inf must not occur.
    settings: for a batch of B, with values that `validate_settings` accepts.
    draw: a processor's form of filters and draw, as `Operations.draw`. It has the same
        probabilities, but may draw another token for a key.
    """
    logits = lm_outputs.logits
    assert logits.ndim == 3 and logits.shape[1] == 1, f"{logits.shape=}, expected [B, 1, V]"
    return sample_logits(rngs, logits[:, 0], settings, draw)


def sample_logits(
    rngs: jax.Array, logits: jax.Array, settings: SampleSettings, draw: Draw | None = None
) -> SampleOutput:
    """`sample_token` for logits [B, V]."""
    logits = logits.astype(jnp.float32)
    active = settings.active[:, None]
    # Subnormal temperatures, which devices may flush to 0, count as 0.
    greedy = settings.temperature < jnp.finfo(jnp.float32).tiny
    temperature = jnp.where(greedy, 0, settings.temperature)
    arrays = _penalised(logits, settings), settings.mask | ~active, settings, temperature
    reported = min(TOP_K, logits.shape[-1])
    token_id, top_ids, probs = (draw or draw_token)(rngs, *arrays, reported)
    total = _log_total(logits)
    output = SampleOutput(
        token_id=token_id,
        prob=probs[:, :1],
        top_k_token_ids=top_ids,
        top_k_probs=probs[:, 1:],
        logprob=_log_probabilities(logits, total, token_id),
    )
    if settings.top_logprobs is not None:
        asked = jnp.any((settings.top_logprobs > 0) & settings.active)
        ids = lax.cond(asked, _first_ids, lambda x: jnp.zeros_like(_first_ids(x)), logits)
        logprobs = jnp.where(asked, _log_probabilities(logits, total, ids), 0)
        output = output._replace(top_logprob_ids=ids, top_logprobs=logprobs)
    return jax.tree.map(lambda x: jnp.where(active, x, jnp.zeros_like(x)), output)


def draw_token(
    rngs: jax.Array,
    logits: jax.Array,
    allowed: jax.Array,
    settings: SampleSettings,
    temperature: jax.Array,
    reported: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Filter logits [B, V] at a temperature [B], 0 for the most probable token, and draw a token.

    allowed: bool [B, V], the tokens that may be drawn; one at -inf is drawn only if all are.
    Returns the token, int32 [B, 1]; the `reported` most probable ones, int32 [B, reported]; and the
    probabilities of all these, float32 [B, 1 + reported].
    """
    greedy = temperature == 0
    filtered = jnp.where(allowed, logits, -jnp.inf)
    # If all allowed tokens are at -inf, make them equally probable.
    stuck = jnp.max(filtered, axis=-1, keepdims=True) == -jnp.inf
    filtered = jnp.where(stuck & allowed, 0, filtered)
    others = jnp.arange(logits.shape[-1]) != most_probable(filtered)[:, None]
    filtered = jnp.where(greedy[:, None] & others, -jnp.inf, filtered)
    temperature = jnp.where(greedy, 1, temperature)
    filtered = _filtered(filtered, settings, temperature, settings.active & ~greedy)
    top_ids = lax.top_k(filtered, reported)[1].astype(jnp.int32)
    token_id, probs = _draw(rngs, filtered, temperature, top_ids)
    return token_id, top_ids, probs


def _penalised(logits: jax.Array, settings: SampleSettings) -> jax.Array:
    """Apply penalties and bias to logits [B, V]."""
    if settings.repetition_penalty is not None:
        penalty = settings.repetition_penalty[:, None]
        worse = jnp.where(logits > 0, logits / penalty, logits * penalty)
        worse = jnp.nan_to_num(worse)  # clip overflow to the float32 range
        assert settings.in_prompt is not None and settings.in_answer is not None
        before = settings.in_prompt | (settings.in_answer > 0)
        logits = jnp.where(before & jnp.isfinite(logits), worse, logits)
    if settings.presence_penalty is not None:
        assert settings.in_answer is not None
        logits -= jnp.where(settings.in_answer > 0, settings.presence_penalty[:, None], 0)
    if settings.frequency_penalty is not None:
        assert settings.in_answer is not None
        logits -= settings.frequency_penalty[:, None] * settings.in_answer
    return logits if settings.bias is None else logits + settings.bias


def _filtered(
    logits: jax.Array, settings: SampleSettings, temperature: jax.Array, drawing: jax.Array
) -> jax.Array:
    """Apply top-k, nucleus and min-p to logits [B, V] for the sequences `drawing` bool [B]."""
    if settings.top_k is not None:  # before the temperature, which does not change the order
        top_k = jnp.where(drawing, settings.top_k, 0)
        logits = _apply_if_any(top_k > 0, lambda x: top_k_filter(x, top_k), logits)
    nucleus_p = jnp.where(drawing, settings.nucleus_p, 1)
    logits = _apply_if_any(nucleus_p < 1, lambda x: _nucleus(x, nucleus_p, temperature), logits)
    if settings.min_p is not None:
        min_p = jnp.where(drawing, settings.min_p, 0)
        logits = _apply_if_any(min_p > 0, lambda x: min_p_filter(x, min_p, temperature), logits)
    return logits


def _apply_if_any(
    asked: jax.Array, function: Callable[[jax.Array], jax.Array], x: jax.Array
) -> jax.Array:
    """Apply a filter if any row needs it, asked bool [B]; otherwise it would change nothing."""
    return lax.cond(jnp.any(asked), function, lambda x: x, x)


def most_probable(logits: jax.Array) -> jax.Array:
    """Return the id of the largest of logits [..., V], the lowest one on ties, int32 [...].

    As jnp.argmax, which takes a CPU eight times as long, but without a rule for NaN.
    """
    last = logits.shape[-1] - 1
    largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest, jnp.arange(last + 1), last), axis=-1)


def first_choices(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return ids and log-probabilities [B, min(TOP_LOGPROBS, V)] of the largest logits [B, V]."""
    ids = _first_ids(logits)
    return ids, log_probabilities(logits, ids)


def _first_ids(logits: jax.Array) -> jax.Array:
    return lax.top_k(logits, min(TOP_LOGPROBS, logits.shape[-1]))[1].astype(jnp.int32)


def _weights(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """float64 [B, V] in proportion to the probabilities, the largest 1. Needs `enable_x64`."""
    return jnp.exp(_exponents(logits, temperature))


def _exponents(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """Return the logarithms of `_weights`."""
    logits = logits.astype(jnp.float64)
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature[:, None]


def _draw(
    rngs: jax.Array, logits: jax.Array, temperature: jax.Array, others: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draw a token of each row of logits [B, V] by its probability at a temperature [B].

    Returns the token, int32 [B, 1], and the probabilities of that token and of `others` int
    [B, n], float32 [B, 1 + n].

    Draws one random number per sequence and inverts the cumulative sum of the weights. One number
    per token, as in the Gumbel trick, takes a CPU several times as long for a full vocabulary.
    """
    batch, vocabulary = logits.shape
    size = math.isqrt(vocabulary - 1) + 1  # number of blocks, and tokens per block
    uniform = uniform_numbers(rngs)
    with jax.enable_x64(True):
        # Rounded to float32: exp is several times faster, and 1e-7 of a probability do not matter.
        exponent = _exponents(logits, temperature).astype(jnp.float32)
        weights = jnp.exp(exponent).astype(jnp.float64)
        weights = jnp.pad(weights, ((0, 0), (0, size * size - vocabulary)))
        blocks = weights.reshape(batch, size, size)
        sums = jnp.sum(blocks, axis=-1)
        total = jnp.sum(sums, axis=-1, keepdims=True)
        block, point = _locate(sums, uniform * total)
        inside = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
        token, _ = _locate(inside, point)
        token_id = (block * size + token).astype(jnp.int32)
        reported = jnp.concatenate([token_id, others.astype(jnp.int32)], axis=-1)
        probs = jnp.take_along_axis(weights, reported, axis=-1) / total
        return token_id, probs.astype(jnp.float32)


def _locate(weights: jax.Array, point: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Find the weight [B, n] whose cumulative interval contains a point [B, 1] -> index, remainder.

    Never returns an index of weight zero, even if rounding puts the point beyond the total.
    """
    ends = jnp.cumsum(weights, axis=-1)
    last = jnp.max(jnp.where(weights > 0, jnp.arange(weights.shape[-1]), 0), -1, keepdims=True)
    index = jnp.minimum(jnp.sum(ends <= point, axis=-1, keepdims=True), last)
    begins = jnp.take_along_axis(ends - weights, index, axis=-1)
    return index, jnp.maximum(point - begins, 0)


def log_probabilities(logits: jax.Array, token_ids: jax.Array) -> jax.Array:
    """Log-softmax of logits [B, V] at token_ids int [B, n], summed in float64, float32 [B, n]."""
    return _log_probabilities(logits, _log_total(logits), token_ids)


def _log_total(logits: jax.Array) -> jax.Array:
    """Return the logarithm of the sum of exponentials of logits [B, V], float64 [B, 1]."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    shift = jnp.where(jnp.isfinite(largest), largest, 0)
    weights = jnp.exp(logits - shift)  # in float32, as in `_draw`
    with jax.enable_x64(True):
        sums = jnp.sum(weights.astype(jnp.float64), axis=-1, keepdims=True)
        return jnp.log(sums) + shift


def _log_probabilities(logits: jax.Array, total: jax.Array, token_ids: jax.Array) -> jax.Array:
    with jax.enable_x64(True):
        chosen = jnp.take_along_axis(logits, token_ids, axis=-1).astype(jnp.float64)
        return (chosen - total).astype(jnp.float32)


def min_p_filter(logits: jax.Array, min_p: jax.Array, temperature: jax.Array) -> jax.Array:
    """Keep the tokens at least `min_p` times as probable as the most probable one of their row.

    logits: float32 [B, V]; -inf marks a token that is already excluded.
    min_p: float32 [B], in [0, 1]; 0 keeps everything.
    temperature: float32 [B], that of the probabilities.
    Returns float32 [B, V], -inf for the excluded tokens.
    """
    with jax.enable_x64(True):
        keep = _weights(logits, temperature) >= min_p.astype(jnp.float64)[:, None]
    return jnp.where(keep, logits, -jnp.inf)


def _nucleus(logits: jax.Array, top_p: jax.Array, temperature: jax.Array) -> jax.Array:
    """`top_p_filter` for the probabilities at a temperature [B]."""
    with jax.enable_x64(True):
        weights = _weights(logits, temperature)
        mass = top_p * jnp.sum(weights, axis=-1)
        # top_p = 1 keeps even tokens of weight 0; top_p = 0 keeps only the most probable one.
        mass = jnp.where(top_p < 1, jnp.maximum(mass, jnp.finfo(jnp.float64).tiny), jnp.inf)
        keep = _shortest_prefix(logits, weights, mass)
    return jnp.where(keep, logits, -jnp.inf)


def _shortest_prefix(logits: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """Mark the first tokens, by descending logit, then id, whose weights add up to the target.

    logits: float32 [B, V]. weights: [B, V], at least 0, equal where logits are. target: [B], of the
    weights' dtype. Returns bool [B, V]; all True in a row whose weights never reach the target.
    """
    order = ordered_bits(logits)  # [B, V]

    def add_bit(bit: jax.Array, last: jax.Array) -> jax.Array:
        trial = last | (jnp.uint32(1) << bit.astype(jnp.uint32))
        reached = jnp.sum(jnp.where(order >= trial, weights, 0), axis=-1, keepdims=True)
        return jnp.where(reached >= target[:, None], trial, last)

    # Bisect, from the top bit downwards, for the largest threshold at which the weights of the
    # logits from it upwards reach the target; 0, below every logit, if they never do.
    last = jnp.zeros_like(order[:, :1])
    last = lax.fori_loop(0, 32, lambda i, last: add_bit(31 - i, last), last)
    above, tied = order > last, order == last
    rank = jnp.cumsum(tied, axis=-1, dtype=jnp.int32)  # 1 for the lowest id among ties
    before = jnp.sum(jnp.where(above, weights, 0), axis=-1, keepdims=True) + (rank - 1) * weights
    return above | (tied & (before < target[:, None]))

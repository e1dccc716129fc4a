"""Sampling is held to an independent float64 version, and its draws to the exact probabilities."""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grok1.serving.request_limits import LARGEST_BIAS, LARGEST_PENALTY
from grok1.serving.sampling import (
    TOP_K,
    TOP_LOGPROBS,
    SampleOutput,
    SampleSettings,
    min_p_filter,
    sample_token,
    top_k_filter,
    top_p_filter,
    validate_settings,
)

FULL_VOCABULARY = 131_072
jitted_sample = jax.jit(sample_token)
jitted_top_k = jax.jit(top_k_filter)
jitted_top_p = jax.jit(top_p_filter)


PLAIN: dict[str, tuple[Any, Any]] = {  # the type of each field, and the value that filters nothing
    "temperature": (np.float32, 1.0),
    "nucleus_p": (np.float32, 1.0),
    "mask": (bool, True),
    "active": (bool, True),
    "top_k": (np.int32, 0),
    "min_p": (np.float32, 0.0),
    "repetition_penalty": (np.float32, 1.0),
    "presence_penalty": (np.float32, 0.0),
    "frequency_penalty": (np.float32, 0.0),
    "bias": (np.float32, 0.0),
    "in_prompt": (bool, False),
    "in_answer": (np.int32, 0),
    "top_logprobs": (np.int32, 0),
}
EVEN = [True, False] * 4
PER_TOKEN = ("mask", "bias", "in_prompt", "in_answer")


class ModelOutput(NamedTuple):
    """The part of the model's output that sampling reads."""

    logits: Any


def make_settings(logits: np.ndarray, **changes: Any) -> SampleSettings:
    """Settings that filter nothing, for a batch of logits [B, V], with the given fields changed."""
    fields: dict[str, Any] = {}
    for field, (dtype, value) in PLAIN.items():
        shape = logits.shape if field in PER_TOKEN else logits.shape[:1]
        value = changes.get(field, value)
        fields[field] = np.broadcast_to(np.asarray(value, dtype), shape)
    assert changes.keys() <= fields.keys()
    return SampleSettings(**fields)


def draw(logits: np.ndarray, seed: int = 0, **changes: Any) -> SampleOutput:
    """Sample each row of logits [B, V] once; the output's fields as NumPy arrays [B, ...].

    The batch is filled up with inactive slots, so that most calls share a compiled function.
    """
    rows = len(logits)
    settings = make_settings(logits, **changes)
    padding = [(0, -rows % 64), (0, 0)]
    settings = jax.tree.map(lambda field: np.pad(field, padding[: field.ndim]), settings)
    logits = np.pad(logits, padding)
    keys = jax.random.split(jax.random.key(seed), len(logits))
    output = jitted_sample(keys, ModelOutput(logits[:, None]), settings)
    return jax.tree.map(lambda field: np.asarray(field)[:rows], output)


def exact_top_k(logits: np.ndarray, top_k: int) -> np.ndarray:
    """The ids that top-k keeps of logits [V], the most probable first."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    return np.array(order[:top_k] if top_k else order)


def exact_nucleus(logits: np.ndarray, top_p: float, temperature: float = 1.0) -> np.ndarray:
    """The ids that the nucleus keeps of logits [V], the most probable first."""
    ids = exact_top_k(logits, 0)
    if top_p == 1:
        return ids
    weights = np.exp((logits[ids].astype(np.float64) - logits.max()) / float(temperature))
    mass = np.cumsum(weights) / np.sum(weights)
    return ids[: 1 + int(np.sum(mass < float(top_p)))]


def exact_logits(logits: np.ndarray, **settings: Any) -> np.ndarray:
    """Logits [V] with penalties and bias, float64."""
    logits = logits.astype(np.float64)
    counts = np.broadcast_to(np.asarray(settings.get("in_answer", 0), np.int32), logits.shape)
    answer = counts > 0
    before = answer | np.broadcast_to(settings.get("in_prompt", False), logits.shape)
    penalty = np.float64(np.float32(settings.get("repetition_penalty", 1)))
    logits = np.where(before, np.where(logits > 0, logits / penalty, logits * penalty), logits)
    presence = np.float64(np.float32(settings.get("presence_penalty", 0)))
    frequency = np.float64(np.float32(settings.get("frequency_penalty", 0)))
    logits = logits - presence * answer - frequency * counts
    return logits + np.asarray(settings.get("bias", 0), np.float32)


def exact_distribution(
    logits: np.ndarray,
    temperature: float = 1.0,
    nucleus_p: float = 1.0,
    mask: Any = True,
    top_k: int = 0,
    min_p: float = 0.0,
    **penalties: Any,
) -> np.ndarray:
    """The probabilities [V] after all filters: float64, one row, one step after the other."""
    logits = exact_logits(logits, **penalties)
    ids = np.flatnonzero(np.broadcast_to(mask, logits.shape))
    if temperature == 0:
        temperature, top_k = 1.0, 1
    ids = ids[exact_top_k(logits[ids], top_k)]
    ids = ids[exact_nucleus(logits[ids], np.float32(nucleus_p), temperature)]
    weights = np.exp((logits[ids] - logits[ids].max()) / float(temperature))
    weights[weights < np.float32(min_p)] = 0
    probabilities = np.zeros(len(logits))
    probabilities[ids] = weights / weights.sum()
    return probabilities


def logits_with_ties(rng: np.random.Generator, rows: int, vocabulary: int) -> np.ndarray:
    """Random logits [rows, vocabulary]; every second row has many ties, and both zeros."""
    logits = rng.normal(size=(rows, vocabulary)) * 2
    logits[::2] = np.round(logits[::2])
    return logits.astype(np.float32)


def assert_keeps(filtered: Any, logits: np.ndarray, expected: list[np.ndarray]) -> None:
    """Assert that of each row just the expected ids are left, and that these are unchanged."""
    filtered = np.asarray(filtered)
    for row, ids in enumerate(expected):
        wanted = np.full_like(logits[row], -np.inf)
        wanted[ids] = logits[row, ids]
        np.testing.assert_array_equal(filtered[row], wanted, err_msg=f"row {row}")


@pytest.mark.parametrize("vocabulary", [1, 7, 1000])
def test_top_k_keeps_the_largest_and_of_ties_the_lower_ids(vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    logits = logits_with_ties(rng, 24, vocabulary)
    logits[3, vocabulary // 2 :] = -np.inf
    top_k = rng.integers(0, vocabulary + 3, size=24).astype(np.int32)
    top_k[:5] = 0, 1, vocabulary, vocabulary + 1, np.iinfo(np.int32).max
    expected = [exact_top_k(row, k) for row, k in zip(logits, top_k, strict=True)]
    assert_keeps(jitted_top_k(logits, top_k), logits, expected)


@pytest.mark.parametrize("vocabulary", [1, 7, 1000])
def test_nucleus_is_the_smallest_set_that_reaches_p_and_of_ties_the_lower_ids(
    vocabulary: int,
) -> None:
    rng = np.random.default_rng(vocabulary)
    logits = logits_with_ties(rng, 24, vocabulary)
    logits[3, 1 + vocabulary // 2 :] = -np.inf
    top_p = rng.uniform(0.01, 1, size=24).astype(np.float32)
    top_p[:5] = 1, 1e-30, 1e-6, 0.999999, 0.5
    expected = [exact_nucleus(row, p) for row, p in zip(logits, top_p, strict=True)]
    assert_keeps(jitted_top_p(logits, top_p), logits, expected)


@pytest.mark.parametrize("tokens", [1, 3, 4, 7, 8])
def test_nucleus_ends_with_the_token_that_reaches_p_exactly(tokens: int) -> None:
    """A mass that equals p has reached it, one float below has not: at 3 of 8, p = 3/8 keeps 3."""
    logits = np.zeros((2, 8), np.float32)
    p = np.float32(tokens / 8)
    top_p = np.array([p, np.nextafter(p, np.float32(0))], np.float32)
    expected = [np.arange(tokens), np.arange(tokens)]
    assert_keeps(jitted_top_p(logits, top_p), logits, expected)
    if tokens < 8:
        top_p = np.full(2, np.nextafter(p, np.float32(1)))
        assert_keeps(jitted_top_p(logits, top_p), logits, [np.arange(tokens + 1)] * 2)


def test_nucleus_is_exact_over_the_full_vocabulary() -> None:
    """Prevents a cumulative sum in float32, whose rounding moves the end of a nucleus."""
    rng = np.random.default_rng(0)
    logits = np.stack([rng.normal(size=FULL_VOCABULARY) * width for width in (0.5, 1, 2, 3, 0, 1)])
    logits = logits.astype(np.float32)
    top_p = np.array([0.9, 0.99, 0.95, 0.999, 0.5, 1 - 2**-24], np.float32)
    expected = [exact_nucleus(row, p) for row, p in zip(logits, top_p, strict=True)]
    assert len(expected[4]) == FULL_VOCABULARY // 2
    assert_keeps(jitted_top_p(logits, top_p), logits, expected)


def test_nucleus_of_one_keeps_every_token_and_a_tiny_one_the_best() -> None:
    logits = np.random.default_rng(1).normal(size=(2, FULL_VOCABULARY)).astype(np.float32) * 100
    filtered = np.asarray(jitted_top_p(logits, np.array([1, 1e-38], np.float32)))
    np.testing.assert_array_equal(filtered[0], logits[0])
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(filtered[1])), logits[1].argmax())


@pytest.mark.parametrize("vocabulary", [3, 8, 50])
def test_reported_probabilities_are_those_after_all_filters(vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    rows = 64
    logits = logits_with_ties(rng, rows, vocabulary)
    settings: dict[str, Any] = {
        "temperature": rng.choice([0, 0.1, 0.7, 1, 2.5], rows).astype(np.float32),
        "nucleus_p": rng.choice([0.1, 0.5, 0.9, 1], rows).astype(np.float32),
        "mask": rng.random((rows, vocabulary)) < 0.7,
        "top_k": rng.choice([0, 1, 2, 5, 40], rows).astype(np.int32),
    }
    settings["mask"][:, 0] |= ~settings["mask"].any(axis=1)
    output = draw(logits, **settings)
    shown = min(TOP_K, vocabulary)
    assert output.top_k_token_ids.shape == output.top_k_probs.shape == (rows, shown)
    for row in range(rows):
        exact = exact_distribution(
            logits[row], **{field: values[row] for field, values in settings.items()}
        )
        token = output.token_id[row, 0]
        assert exact[token] > 0
        np.testing.assert_allclose(output.prob[row, 0], exact[token], rtol=1e-6)
        ranked = np.argsort(-exact, kind="stable")[:shown]
        np.testing.assert_allclose(output.top_k_probs[row], exact[ranked], rtol=1e-6)
        alive = exact[ranked] > 0
        np.testing.assert_array_equal(output.top_k_token_ids[row][alive], ranked[alive])


def test_filters_apply_in_order_each_to_the_renormalised_rest() -> None:
    """Each row has another outcome if two neighbouring filters change places."""
    logits = np.full((4, 8), -np.inf, np.float32)
    logits[:, :4] = np.log([0.4, 0.3, 0.2, 0.1])
    mask = np.ones(logits.shape, bool)
    mask[:2, 0] = False
    output = draw(
        logits,
        # 0: top-k counts allowed tokens only. 1: so does the nucleus, 0.3 / 0.6 of which is token
        # 1. 2: the nucleus is of the two that top-k left: 0.4 / 0.7 > 0.5. 3: it is taken after
        # the temperature, at which token 0 has 16 / 30 > 0.5.
        mask=mask,
        top_k=[2, 0, 2, 0],
        nucleus_p=[1, 0.49, 0.5, 0.5],
        temperature=[1, 1, 1, 0.5],
    )
    expected = np.zeros((4, 8))
    expected[:, :4] = [0, 0.6, 0.4, 0], [0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]
    for row, wanted in enumerate(expected):
        got = np.zeros(8)
        got[output.top_k_token_ids[row]] = output.top_k_probs[row]
        np.testing.assert_allclose(got, wanted, rtol=1e-6, err_msg=f"row {row}")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 3.0, "top_k": 5},
        {"nucleus_p": 0.8},
        {"mask": [True, False, True, True, False, True, True, True], "top_k": 4},
        {"temperature": 1.5, "nucleus_p": 0.9, "top_k": 6, "mask": [False] + [True] * 7},
        {"min_p": 0.2},
        {"min_p": 0.3, "temperature": 2.0},
        {"min_p": 0.25, "top_k": 6, "nucleus_p": 0.9, "temperature": 1.3},
        {"repetition_penalty": 1.7, "in_prompt": [True] * 2 + [False] * 6, "in_answer": EVEN},
        {"frequency_penalty": 0.4, "in_answer": [3, 0, 1, 0, 0, 2, 0, 1]},
        {"presence_penalty": 0.9, "bias": np.arange(8) / 4, "in_answer": EVEN, "min_p": 0.1},
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_their_probability_says(changes: dict[str, Any]) -> None:
    draws = 20_000
    row = np.array([1.5, 1.0, 0.3, 0.3, 0.0, -0.5, -1.0, -2.0], np.float32)
    expected = draws * exact_distribution(row, **changes)
    tokens = draw(np.tile(row, (draws, 1)), seed=1, **changes).token_id[:, 0]
    counts = np.bincount(tokens, minlength=8)
    alive = expected > 0
    assert counts[~alive].sum() == 0
    statistic = np.sum((counts - expected)[alive] ** 2 / expected[alive])
    freedom = alive.sum() - 1  # the mean of the statistic, whose variance is twice that
    assert statistic < freedom + 3 * np.sqrt(2 * freedom)


def test_a_sequence_gets_the_same_bits_in_any_slot_and_company() -> None:
    rng = np.random.default_rng(3)
    logits = logits_with_ties(rng, 5, 50)
    fields = {
        "temperature": np.array([0.7, 1.3, 0, 1e-6, 2], np.float32),
        "nucleus_p": np.array([0.9, 1, 0.5, 0.7, 0.99], np.float32),
        "mask": rng.random(logits.shape) < 0.8,
        "active": np.array([True, True, True, True, False]),
        "top_k": np.array([0, 40, 0, 7, 100], np.int32),
        "min_p": np.array([0, 0.1, 0, 0, 1], np.float32),
        "repetition_penalty": np.array([1, 1.3, 1, 2, 1], np.float32),
        "presence_penalty": np.array([0, 0.5, -1, 0, 9], np.float32),
        "frequency_penalty": np.array([0, 0.25, 0, -1, 2], np.float32),
        "bias": rng.normal(size=logits.shape).astype(np.float32),
        "in_prompt": rng.random(logits.shape) < 0.5,
        "in_answer": rng.integers(0, 3, logits.shape, np.int32),
        "top_logprobs": np.full(5, 3, np.int32),
    }
    keys = jax.random.split(jax.random.key(4), 5)
    first = jitted_sample(keys, ModelOutput(logits[:, None]), make_settings(logits, **fields))
    for slots in ([4, 3, 2, 1, 0], [1, 2, 3, 4, 0], [0, 0, 0, 1, 1], [1], [3]):
        moved = make_settings(logits[slots], **{name: fields[name][slots] for name in fields})
        second = jitted_sample(keys[np.array(slots)], ModelOutput(logits[slots][:, None]), moved)
        for name, before, after in zip(SampleOutput._fields, first, second, strict=True):
            np.testing.assert_array_equal(np.asarray(before)[slots], after, err_msg=name)


def test_a_filter_that_only_others_ask_for_changes_no_bit() -> None:
    """It is skipped where nobody asks for it, and does nothing for those that do not."""
    logits = logits_with_ties(np.random.default_rng(11), 4, 50)
    alone = draw(logits)
    asking: list[dict[str, Any]] = [{"top_k": 3}, {"nucleus_p": 0.5}, {"min_p": 0.5}]
    for changes in asking:
        others = {
            name: np.where(np.arange(4) < 2, PLAIN[name][1], value)
            for name, value in changes.items()
        }
        output = draw(logits, **others)
        for name, before, after in zip(SampleOutput._fields, alone, output, strict=True):
            np.testing.assert_array_equal(before[:2], after[:2], err_msg=name)
        assert np.any(alone.top_k_probs[2:] != output.top_k_probs[2:])


def test_penalties_and_bias_change_the_logits_as_computed_by_hand() -> None:
    """Probabilities before the filters, in order, at tokens that came before or did not."""
    logits = np.array([[2.0, -1.0, 0.5, -3.0, 1.0, 0.0]], np.float32)
    in_prompt = np.array([[True, True, False, False, False, True]])
    in_answer = np.array([[0, 0, 1, 2, 0, 3]])
    bias = np.array([[0.0, 0.0, 0.0, 1.0, -2.0, 0.25]], np.float32)
    output = draw(
        logits,
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.125,
        bias=bias,
        in_prompt=in_prompt,
        in_answer=in_answer,
    )
    # 2 / 2; -1 * 2; 0.5 / 2 - 0.5 - 1 / 8; -3 * 2 - 0.5 - 2 / 8 + 1; 1 - 2; 0 - 0.5 - 3 / 8 + 0.25
    by_hand = np.array([1.0, -2.0, -0.375, -5.75, -1.0, -0.625])
    order = np.argsort(-by_hand, kind="stable")
    np.testing.assert_array_equal(output.top_k_token_ids[0], order)
    probabilities = np.exp(by_hand) / np.exp(by_hand).sum()
    np.testing.assert_allclose(output.top_k_probs[0], probabilities[order], rtol=1e-6)


def test_min_p_keeps_what_is_a_fraction_as_probable_as_the_first() -> None:
    weights = np.array([[8, 4, 4, 2, 1, 0]] * 4, np.float64)
    with np.errstate(divide="ignore"):
        logits = np.log(weights).astype(np.float32)
    # Each a little below the fraction of a token, so that rounding has no say.
    min_p = np.array([0, 0.4999, 0.2499, 1], np.float32)
    expected = [np.arange(6), np.arange(3), np.arange(4), np.arange(1)]
    assert_keeps(jax.jit(min_p_filter)(logits, min_p), logits, expected)


def test_the_models_own_first_choices_are_reported_before_all_filters() -> None:
    rng = np.random.default_rng(12)
    logits = logits_with_ties(rng, 4, 50) + 0.0  # no -0, which lax.top_k puts below 0
    mask = rng.random(logits.shape) < 0.3
    mask[:, 0] = True
    asked = draw(logits, top_logprobs=[1, 0, 0, 20], mask=mask, temperature=3, bias=logits)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    assert asked.top_logprob_ids is not None
    for row in range(4):
        ids = exact_top_k(logits[row], TOP_LOGPROBS)
        np.testing.assert_array_equal(asked.top_logprob_ids[row], ids)
        np.testing.assert_allclose(asked.top_logprobs[row], exact[row, ids], rtol=1e-6)
    unasked = draw(logits, top_logprobs=0)
    assert not np.any(unasked.top_logprob_ids) and not np.any(unasked.top_logprobs)


def test_raw_and_typed_keys_draw_the_same() -> None:
    logits = np.random.default_rng(5).normal(size=(64, 50)).astype(np.float32)
    raw_keys = jax.random.key_data(jax.random.split(jax.random.key(6), 64))
    raw = jitted_sample(raw_keys, ModelOutput(logits[:, None]), make_settings(logits)).token_id
    typed = draw(logits, seed=6).token_id
    np.testing.assert_array_equal(raw, typed)
    assert len(np.unique(typed)) > 20


def test_greedy_takes_the_lowest_of_the_best_allowed_tokens_whatever_the_filters() -> None:
    logits = np.array([[1, 5, 3, 5, 2, 3, 3, 0]] * 4, np.float32)
    mask = np.ones(logits.shape, bool)
    mask[1, 1] = mask[2, [1, 3]] = False
    mask[3] = [False] * 7 + [True]
    for nucleus_p, top_k in ((1, 0), (0.1, 0), (0.99, 3)):
        output = draw(logits, temperature=0, mask=mask, nucleus_p=nucleus_p, top_k=top_k)
        np.testing.assert_array_equal(output.token_id[:, 0], [1, 3, 2, 7])
        np.testing.assert_array_equal(output.prob, 1)
        np.testing.assert_array_equal(output.top_k_token_ids[:, 0], [1, 3, 2, 7])
        np.testing.assert_array_equal(output.top_k_probs, [[1] + [0] * (TOP_K - 1)] * 4)


@pytest.mark.parametrize("temperature", [1e-2, 1e-6, 1e-30, 1.2e-38, 1e-42])
def test_a_tiny_temperature_takes_the_best_token_and_stays_finite(temperature: float) -> None:
    logits = np.random.default_rng(7).normal(size=(8, 50)).astype(np.float32) * 1000
    logits[1] = -1e30
    logits[1, 9] = 1e30
    logits[2, ::2] = -np.inf
    output = draw(logits, temperature=temperature)
    np.testing.assert_array_equal(output.token_id[:, 0], logits.argmax(axis=1))
    np.testing.assert_array_equal(output.prob, 1)
    np.testing.assert_array_equal(output.top_k_probs[:, 1:], 0)
    assert np.isfinite(output.logprob).all()


@pytest.mark.parametrize("kind", [float, np.float32])
def test_a_penalty_may_be_at_its_limits(kind: type) -> None:
    settings = make_settings(np.zeros([1, 5], np.float32))
    for value in (1 / LARGEST_PENALTY, LARGEST_PENALTY):
        validate_settings(settings._replace(repetition_penalty=kind(value)))


@pytest.mark.parametrize("largest", [30, 1e30, 3.4e38])
def test_of_finite_logits_every_number_is_one(largest: float) -> None:
    """At the limits of every setting: an allowed token, its probability, and no NaN."""
    rng = np.random.default_rng(14)
    tiny, half = np.finfo(np.float32).tiny, 256
    logits = rng.uniform(-1, 1, (2 * half, 50)) * largest
    logits[rng.random(logits.shape) < 0.1] = largest
    mask = rng.random(logits.shape) < 0.3
    mask[:half] = False
    mask[np.arange(half), rng.integers(0, 50, half)] = True  # one token only
    mask[half:, 7] = True

    def any_of(*values: float) -> np.ndarray:
        return rng.choice(values, len(logits)).astype(np.float32)

    settings = {
        "mask": mask,
        "temperature": any_of(0, 1e-45, tiny, 1, 1e6, np.finfo(np.float32).max),
        "nucleus_p": any_of(tiny, 0.5, 1),
        "min_p": any_of(0, 0.5, 1),
        "top_k": any_of(0, 1, 3, 2**31 - 256),
        "repetition_penalty": any_of(1 / LARGEST_PENALTY, 1, LARGEST_PENALTY),
        "presence_penalty": any_of(-LARGEST_BIAS, 0, LARGEST_BIAS),
        "frequency_penalty": any_of(-LARGEST_BIAS, 0, LARGEST_BIAS),
        "bias": rng.choice([-LARGEST_BIAS, 0, LARGEST_BIAS], logits.shape),
        "in_prompt": rng.random(logits.shape) < 0.5,
        "in_answer": rng.integers(0, 3, logits.shape, np.int32),
        "top_logprobs": any_of(0, TOP_LOGPROBS),
    }
    output = draw(logits.astype(np.float32), **settings)
    assert np.take_along_axis(mask, output.token_id, axis=1).all()
    assert (output.prob > 0).all() and (output.prob <= 1).all()
    assert (output.logprob <= 0).all()
    assert (output.top_k_probs >= 0).all() and (output.top_logprobs <= 0).all()


def test_logprob_is_the_models_own_before_mask_temperature_and_filters() -> None:
    rng = np.random.default_rng(8)
    logits = rng.normal(size=(32, 50)).astype(np.float32) * 3
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    mask = rng.random(logits.shape) < 0.5
    mask[:, 0] = True
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 0},
        {"temperature": 2, "nucleus_p": 0.6, "mask": mask},
    ]
    for changes in settings:
        output = draw(logits, **changes)
        wanted = np.take_along_axis(exact, np.asarray(output.token_id), axis=1)
        np.testing.assert_allclose(output.logprob, wanted, rtol=1e-6)


def test_an_inactive_slot_has_zeros_whatever_its_settings_and_disturbs_no_other() -> None:
    logits = np.random.default_rng(9).normal(size=(3, 50)).astype(np.float32)
    alone = draw(logits)
    logits[1] = -np.inf
    mask = np.ones(logits.shape, bool)
    mask[1] = False
    output = draw(
        logits,
        active=[True, False, True],
        mask=mask,
        temperature=[1, np.nan, 1],
        nucleus_p=[1, 0, 1],
        top_k=[0, -1, 0],
    )
    for name, lone, field in zip(SampleOutput._fields, alone, output, strict=True):
        np.testing.assert_array_equal(field[1], 0, err_msg=name)
        np.testing.assert_array_equal(field[[0, 2]], lone[[0, 2]], err_msg=name)


def test_a_token_at_minus_infinity_is_drawn_only_if_nothing_else_is_allowed() -> None:
    logits = np.full((64, 8), -np.inf, np.float32)
    logits[:, [2, 4]] = 1, 0
    mask = np.ones(logits.shape, bool)
    mask[32:, [0, 2, 4, 6, 7]] = False
    output = draw(logits, mask=mask, temperature=1e38, in_prompt=True)
    assert set(output.token_id[:32, 0]) == {2, 4}
    assert set(output.token_id[32:, 0]) == {1, 3, 5}
    np.testing.assert_allclose(output.prob[:32], 1 / 2)
    np.testing.assert_allclose(output.prob[32:], 1 / 3)


def test_fields_left_out_change_nothing() -> None:
    logits = np.random.default_rng(10).normal(size=(64, 50)).astype(np.float32)
    settings = SampleSettings(*make_settings(logits, temperature=1.5, nucleus_p=0.95)[:4])
    keys = jax.random.split(jax.random.key(11), 64)
    without = jitted_sample(keys, ModelOutput(logits[:, None]), settings)
    unchanged = draw(logits, seed=11, temperature=1.5, nucleus_p=0.95)
    assert without.top_logprobs is None and without.top_logprob_ids is None
    for name, one, other in zip(SampleOutput._fields, without, unchanged, strict=True):
        if one is not None:
            np.testing.assert_array_equal(one, other, err_msg=name)


def test_changed_settings_do_not_compile_anew() -> None:
    traces = []

    @jax.jit
    def traced_sample(*arguments: Any) -> SampleOutput:
        traces.append(arguments)
        return sample_token(*arguments)

    logits = np.zeros((2, 11), np.float32)
    for changes in ({}, {"temperature": 0}, {"nucleus_p": 0.5, "top_k": 3, "active": False}):
        keys = jax.random.split(jax.random.key(0), 2)
        traced_sample(keys, ModelOutput(logits[:, None]), make_settings(logits, **changes))
    assert len(traces) == 1


def test_full_vocabulary_split_over_devices_draws_the_same_tokens() -> None:
    logits = np.random.default_rng(12).normal(size=(4, FULL_VOCABULARY)).astype(np.float32) * 2
    keys = jax.random.split(jax.random.key(13), 4)
    settings = make_settings(logits, temperature=[0, 0.8, 1, 1], nucleus_p=0.9, top_k=[0, 0, 50, 0])
    whole = jitted_sample(keys, ModelOutput(logits[:, None]), settings)
    devices = jax.devices()
    split = NamedSharding(Mesh(np.array(devices), ("model",)), PartitionSpec(None, None, "model"))
    outputs = ModelOutput(jax.device_put(logits[:, None], split))
    assert len(outputs.logits.sharding.device_set) == len(devices)
    parted = jitted_sample(keys, outputs, settings)
    np.testing.assert_array_equal(whole.token_id, parted.token_id)
    np.testing.assert_array_equal(whole.top_k_token_ids, parted.top_k_token_ids)
    np.testing.assert_allclose(whole.prob, parted.prob, rtol=1e-6)
    assert whole.token_id[0, 0] == logits[0].argmax()
    assert len(np.unique(whole.token_id)) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": [1, -0.5]}, "temperature must be .* at least 0, got -0.5 in sequence 1"),
        ({"temperature": np.nan}, "temperature must be a finite .*, got nan in sequence 0"),
        ({"temperature": np.inf}, "temperature must be a finite .*, got inf"),
        ({"nucleus_p": [1, 0]}, "nucleus_p must be .* above 0 and at most 1, got 0 in sequence 1"),
        ({"nucleus_p": 1.5}, "nucleus_p must be .*, got 1.5 in sequence 0"),
        ({"nucleus_p": np.nan}, "nucleus_p must be .*, got nan"),
        ({"top_k": -1}, "top_k must be an integer of at least 0 .*, got -1 in sequence 0"),
        ({"min_p": [0.5, 1.5]}, "min_p must be a number from 0 to 1, got 1.5 in sequence 1"),
        (
            {"repetition_penalty": 0},
            "repetition_penalty must be a number from 1e-06 to 1e.06 .*, got 0",
        ),
        ({"repetition_penalty": np.inf}, "repetition_penalty must be a number .*, got inf"),
        ({"presence_penalty": np.nan}, "presence_penalty must be a number from -1e.09 .* got nan"),
        ({"frequency_penalty": 2e9}, "frequency_penalty must be a number from -1e.09 .* got 2e.09"),
        ({"bias": [[0] * 4 + [np.inf]] * 2}, "bias must be numbers from -1e.09 to 1e.09, got inf"),
        ({"bias": [[0] * 5, [np.nan] * 5]}, "bias must be numbers .*, got nan in sequence 1"),
        ({"top_logprobs": 21}, "top_logprobs must be an integer from 0 to 20, got 21"),
        ({"mask": [[True], [False]]}, "mask must be True for at least one .*, got 0 in sequence 1"),
    ],
)
def test_validation_names_the_field_what_it_may_hold_and_what_it_holds(
    changes: dict[str, Any], message: str
) -> None:
    settings = make_settings(np.zeros((2, 5), np.float32), **changes)
    with pytest.raises(ValueError, match=message):
        validate_settings(settings)
    inactive: Any = np.zeros(2, bool)
    validate_settings(settings._replace(active=inactive))


def test_validation_takes_one_sequence_in_plain_numbers() -> None:
    good: dict[str, Any] = {
        "temperature": 0.7,
        "nucleus_p": 0.9,
        "mask": np.ones(5, bool),
        "active": True,
        "top_k": 40,
    }
    validate_settings(SampleSettings(**good))
    validate_settings(SampleSettings(**{**good, "temperature": 0, "nucleus_p": 1, "top_k": None}))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"temperature": "hot"}, "temperature must be .*, got 'hot'"),
        ({"temperature": 1e39}, "temperature must be .*, got 1e\\+39$"),
        ({"top_k": 2.5}, "top_k must be .*, got 2.5$"),
        ({"top_k": 2**31}, "top_k must be .*"),
        ({"mask": np.zeros(5, bool)}, "mask must be .*, got 0$"),
        ({"mask": np.ones(5)}, "mask must be bool, .*, got dtype float64"),
    ]
    for changes, message in wrong:
        with pytest.raises(ValueError, match=message):
            validate_settings(SampleSettings(**{**good, **changes}))

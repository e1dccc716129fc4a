"""Sampling is compared with a separate float64 version, and its draws with the probabilities."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grok1.kernels.gpu import draw as gpu_draw
from grok1.kernels.gpu.tiles import interpreted_kernels, run_kernel
from grok1.parallel.sharding import auto
from grok1.serving.request_limits import LARGEST_BIAS, LARGEST_PENALTY
from grok1.serving.sampling import (
    TOP_K,
    TOP_LOGPROBS,
    SampleOutput,
    SampleSettings,
    min_p_filter,
    sample_token,
    top_p_filter,
    validate_settings,
)

FULL_VOCABULARY = 131_072
ROWS, VOCABULARY = 256, 48  # of most batches, which share a compiled function
sample_by_bisection = jax.jit(sample_token)
draw_by_sorting = interpreted_kernels()(gpu_draw.draw_token)
sample_by_sorting = jax.jit(functools.partial(sample_token, draw=draw_by_sorting))
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
EVEN = [1, 0, 1, 0, 1, 0, 1]
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


@pytest.fixture(params=["bisection", "sorting"])
def sample(request: pytest.FixtureRequest) -> Any:
    """`sample_token` in each form."""
    if request.param == "bisection":
        return sample_by_bisection

    def sample(*arrays: Any) -> SampleOutput:
        with jax.enable_x64(True):  # for the interpreter, which traces the kernel again
            return sample_by_sorting(*arrays)

    return sample


@pytest.fixture
def draw(sample: Any) -> Any:
    """Return `draw_padded` of each form."""
    return functools.partial(draw_padded, sample)


def draw_padded(sample: Any, logits: np.ndarray, seed: int = 0, **changes: Any) -> SampleOutput:
    """Sample each row of logits [B, V] once; the output's fields as NumPy arrays [B, ...].

    The batch is padded with inactive slots to a multiple of ROWS.
    """
    rows = len(logits)
    settings = make_settings(logits, **changes)
    padding = [(0, -rows % ROWS), (0, 0)]
    settings = jax.tree.map(lambda field: np.pad(field, padding[: field.ndim]), settings)
    logits = np.pad(logits, padding)
    keys = jax.random.split(jax.random.key(seed), len(logits))
    output = sample(keys, ModelOutput(logits[:, None]), settings)
    return jax.tree.map(lambda field: np.asarray(field)[:rows], output)


def exact_top_k(logits: np.ndarray, top_k: int) -> np.ndarray:
    """The ids that top-k keeps of logits [V], the most probable first."""
    order = np.argsort(-logits, kind="stable")  # lower ids first on ties
    return order[:top_k] if top_k else order


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


def random_batch(seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Random logits [ROWS, VOCABULARY], and settings of every kind.

    Every second row has many ties, and both zeros. The logits are multiples of 1/1024, so that
    penalties and bias are exact in float32, too.
    """
    rng, shape = np.random.default_rng(seed), (ROWS, VOCABULARY)
    logits = np.round(rng.normal(size=shape) * 2 * 1024) / 1024
    logits[::2] = np.round(logits[::2])

    def any_of(*values: float) -> np.ndarray:
        return rng.choice(values, ROWS)

    settings = {
        "temperature": any_of(0, 0.1, 0.7, 1, 2.5).astype(np.float32),
        "nucleus_p": any_of(0.1, 0.5, 0.9, 1, 1).astype(np.float32),
        "mask": rng.random(shape) < 0.7,
        "top_k": any_of(0, 0, 1, 2, 5, 40),
        "min_p": any_of(0, 0, 0.1, 0.3),
        "repetition_penalty": any_of(0.5, 1, 2),
        "presence_penalty": any_of(-0.5, 0, 0.75),
        "frequency_penalty": any_of(-0.25, 0, 0.5),
        "bias": rng.integers(-4, 5, shape) / 4,
        "in_prompt": rng.random(shape) < 0.3,
        "in_answer": rng.integers(0, 3, shape),
        "top_logprobs": any_of(0, 3),
    }
    return logits.astype(np.float32), settings


def assert_keeps(filtered: Any, logits: np.ndarray, expected: list[np.ndarray]) -> None:
    """Assert that in each row only the expected ids are left, with unchanged logits."""
    filtered = np.asarray(filtered)
    for row, ids in enumerate(expected):
        wanted = np.full_like(logits[row], -np.inf)
        wanted[ids] = logits[row, ids]
        np.testing.assert_array_equal(filtered[row], wanted, err_msg=f"row {row}")


def test_nucleus_ends_with_token_reaching_p_exactly() -> None:
    """Of 8 equal tokens, p = 3/8 keeps 3, and so does the next smaller float; the larger, 4."""
    p = np.array([1, 3, 4, 7], np.float32) / 8
    below, above = (np.nextafter(p, np.float32(limit)) for limit in (0, 1))
    expected = [np.arange(n) for n in (1, 3, 4, 7, 1, 3, 4, 7, 2, 4, 5, 8)]
    logits = np.zeros((12, 8), np.float32)
    assert_keeps(jitted_top_p(logits, np.concatenate([p, below, above])), logits, expected)


def test_nucleus_is_exact_over_the_full_vocabulary() -> None:
    """A cumulative sum in float32 would round, and end the nucleus at another token."""
    rng = np.random.default_rng(0)
    widths = (0.5, 1, 2, 3, 0, 1, 100, 100)
    logits = np.stack([rng.normal(size=FULL_VOCABULARY) * width for width in widths])
    logits = logits.astype(np.float32)
    top_p = np.array([0.9, 0.99, 0.95, 0.999, 0.5, 1 - 2**-24, 1, 1e-38], np.float32)
    expected = [exact_nucleus(row, p) for row, p in zip(logits, top_p, strict=True)]
    assert [len(ids) for ids in expected[4::2]] == [FULL_VOCABULARY // 2, FULL_VOCABULARY]
    assert expected[7].tolist() == [logits[7].argmax()]
    assert_keeps(jitted_top_p(logits, top_p), logits, expected)


def test_sorted_nucleus_is_exact_over_the_full_vocabulary() -> None:
    """Every token that is kept is reported, and has a probability."""
    logits = np.random.default_rng(0).normal(size=(2, FULL_VOCABULARY)).astype(np.float32)
    settings = make_settings(logits, nucleus_p=[0.99, 1 - 2**-24])
    keys, even = jax.random.split(jax.random.key(0), 2), np.ones(2, np.float32)
    with jax.enable_x64(True):
        arrays = keys, logits, settings.mask, settings, even
        _, ids, probs = draw_by_sorting(*arrays, FULL_VOCABULARY)
    for row, p in enumerate(settings.nucleus_p):
        kept = np.asarray(ids[row])[np.asarray(probs)[row, 1:] > 0]
        np.testing.assert_array_equal(kept, exact_nucleus(logits[row], p))


def test_sorted_draw_is_finite_if_rounding_empties_a_block() -> None:
    """(b + 1/2) - 1/2 is more than b, so that of the last block found no token is kept."""
    ulp = 2.0**-52
    sums = np.array([[1.5 + 3 * ulp, 1.5 + 5 * ulp]])  # before the second block, less than half
    weights = np.array([[1, 0.5 + 3 * ulp, 0.5, 0.5]])
    ids = np.arange(4, dtype=np.int32)[None]
    uniform, nucleus, min_p = np.array([[0.9], [0.5], [0]], np.float32)
    with jax.enable_x64(True), interpreted_kernels():
        chosen, probs = run_kernel(
            functools.partial(gpu_draw._draw_kernel, 2),
            (1,),
            [((1, 3), np.int32), ((1, 3), np.float32)],
            [sums, weights, ids, uniform, nucleus, min_p],
            name="draw_token",
            warps=4,
            stages=1,
        )
    assert chosen.tolist() == [[1, 0, 1]]
    np.testing.assert_allclose(probs, [[1 / 3, 2 / 3, 1 / 3]], rtol=1e-6)


def test_min_p_keeps_tokens_by_share_of_the_largest() -> None:
    weights = np.array([[8, 4, 4, 2, 1, 0]] * 4, np.float64)
    with np.errstate(divide="ignore"):
        logits = np.log(weights).astype(np.float32)
    # Each slightly below the share of a token, so that rounding does not matter.
    min_p = np.array([0, 0.4999, 0.2499, 1], np.float32)
    expected = [np.arange(6), np.arange(3), np.arange(4), np.arange(1)]
    assert_keeps(jax.jit(min_p_filter)(logits, min_p, np.ones(4)), logits, expected)


def test_reported_probabilities_are_after_all_filters(draw: Any) -> None:
    logits, settings = random_batch(3)
    output = draw(logits, **settings)
    del settings["top_logprobs"]
    assert output.top_k_token_ids.shape == output.top_k_probs.shape == (ROWS, TOP_K)
    for row in range(ROWS):
        exact = exact_distribution(
            logits[row], **{field: values[row] for field, values in settings.items()}
        )
        token = output.token_id[row, 0]
        assert exact[token] > 0
        np.testing.assert_allclose(output.prob[row, 0], exact[token], rtol=1e-6)
        ranked = np.argsort(-exact, kind="stable")[:TOP_K]
        np.testing.assert_allclose(output.top_k_probs[row], exact[ranked], rtol=1e-6)
        alive = exact[ranked] > 0
        np.testing.assert_array_equal(output.top_k_token_ids[row][alive], ranked[alive])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 1.5, "nucleus_p": 0.9, "top_k": 6, "mask": [False] + [True] * 6},
        {"presence_penalty": 0.9, "bias": np.arange(7) / 4, "in_answer": EVEN, "min_p": 0.1},
    ],
    ids=("plain", "filters", "penalties"),
)
def test_tokens_are_drawn_with_their_probabilities(changes: dict[str, Any], draw: Any) -> None:
    """Of a vocabulary that is smaller than TOP_K."""
    draws = 20_000
    row = np.array([1.5, 1.0, 0.3, 0.3, 0.0, -0.5, -1.0], np.float32)
    expected = draws * exact_distribution(row, **changes)
    output = draw(np.tile(row, (draws, 1)), seed=1, **changes)
    assert output.top_k_probs.shape == (draws, 7)
    counts = np.bincount(output.token_id[:, 0], minlength=7)
    alive = expected > 0
    assert counts[~alive].sum() == 0
    statistic = np.sum((counts - expected)[alive] ** 2 / expected[alive])
    freedom = alive.sum() - 1  # the mean of the statistic, whose variance is twice that
    assert statistic < freedom + 3 * np.sqrt(2 * freedom)


def test_sequence_gets_the_same_bits_in_any_batch(sample: Any) -> None:
    """In any slot, and also if a filter is skipped because no other sequence uses it."""
    logits, fields = random_batch(4)
    keys = jax.random.split(jax.random.key(4), ROWS)
    first = sample(keys, ModelOutput(logits[:, None]), make_settings(logits, **fields))
    plain = (fields["nucleus_p"] == 1) & (fields["top_k"] == 0) & (fields["min_p"] == 0)
    drawing = (fields["temperature"] > 0) & (fields["top_logprobs"] > 0)
    alone = np.flatnonzero(plain & drawing)[:1]
    for slots in (np.random.default_rng(5).permutation(ROWS), alone):
        moved = make_settings(logits[slots], **{name: fields[name][slots] for name in fields})
        second = sample(keys[slots], ModelOutput(logits[slots][:, None]), moved)
        for name, before, after in zip(SampleOutput._fields, first, second, strict=True):
            np.testing.assert_array_equal(np.asarray(before)[slots], after, err_msg=name)


def test_logprobs_are_the_models_own_before_filters(draw: Any) -> None:
    logits, settings = random_batch(12)
    logits = logits + 0.0  # no -0, which lax.top_k puts below 0
    asked = draw(logits, **settings)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    wanted = np.take_along_axis(exact, np.asarray(asked.token_id), axis=1)
    np.testing.assert_allclose(asked.logprob, wanted, rtol=1e-6)
    assert asked.top_logprob_ids is not None
    for row in range(ROWS):
        ids = exact_top_k(logits[row], TOP_LOGPROBS)
        np.testing.assert_array_equal(asked.top_logprob_ids[row], ids)
        np.testing.assert_allclose(asked.top_logprobs[row], exact[row, ids], rtol=1e-6)
    unasked = draw(logits, **settings | {"top_logprobs": 0})
    assert not np.any(unasked.top_logprob_ids) and not np.any(unasked.top_logprobs)


def test_tiny_temperature_takes_the_best_token(draw: Any) -> None:
    temperature = np.repeat(np.array([1e-2, 1e-6, 1e-30, 1.2e-38, 1e-42], np.float32), 8)
    logits = np.random.default_rng(7).normal(size=(40, VOCABULARY)).astype(np.float32) * 1000
    logits[1::8] = -1e30
    logits[1::8, 9] = 1e30
    logits[2::8, ::2] = -np.inf
    output = draw(logits, temperature=temperature)
    np.testing.assert_array_equal(output.token_id[:, 0], logits.argmax(axis=1))
    np.testing.assert_array_equal(output.prob, 1)
    np.testing.assert_array_equal(output.top_k_probs[:, 1:], 0)
    assert np.isfinite(output.logprob).all()


@pytest.mark.parametrize("largest", [30, 1e30, 3.4e38])
def test_extreme_settings_of_finite_logits_give_no_nan(largest: float, draw: Any) -> None:
    rng = np.random.default_rng(14)
    tiny, half = np.finfo(np.float32).tiny, ROWS // 2
    logits = rng.uniform(-1, 1, (ROWS, VOCABULARY)) * largest
    logits[rng.random(logits.shape) < 0.1] = largest
    mask = rng.random(logits.shape) < 0.3
    mask[:half] = False
    mask[np.arange(half), rng.integers(0, VOCABULARY, half)] = True  # one token only
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


def test_inactive_slot_has_zeros_and_changes_no_other(draw: Any) -> None:
    logits = np.random.default_rng(9).normal(size=(3, VOCABULARY)).astype(np.float32)
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


def test_nan_draws_a_token_of_the_vocabulary_and_changes_no_other(draw: Any) -> None:
    """A kernel must not read beyond its arrays, and the server reports such logits."""
    logits = np.random.default_rng(9).normal(size=(4, VOCABULARY)).astype(np.float32)
    alone = draw(logits)
    logits[1], logits[2, 5] = np.nan, np.nan
    output = draw(logits)
    assert np.all((output.token_id >= 0) & (output.token_id < VOCABULARY))
    for name, one, other in zip(SampleOutput._fields, alone, output, strict=True):
        np.testing.assert_array_equal(one[[0, 3]], other[[0, 3]], err_msg=name)


def test_minus_infinity_is_drawn_only_if_unavoidable(draw: Any) -> None:
    logits = np.full((64, VOCABULARY), -np.inf, np.float32)
    logits[:, [2, 4]] = 1, 0
    mask = np.ones(logits.shape, bool)
    mask[32:] = False
    mask[32:, [1, 3, 5]] = True
    output = draw(logits, mask=mask, temperature=1e38, in_prompt=True)
    assert set(output.token_id[:32, 0]) == {2, 4}
    assert set(output.token_id[32:, 0]) == {1, 3, 5}
    np.testing.assert_allclose(output.prob[:32], 1 / 2)
    np.testing.assert_allclose(output.prob[32:], 1 / 3)


def test_omitted_settings_and_raw_keys_change_nothing(draw: Any, sample: Any) -> None:
    logits = np.random.default_rng(10).normal(size=(ROWS, VOCABULARY)).astype(np.float32)
    settings = SampleSettings(*make_settings(logits, temperature=1.5, nucleus_p=0.95)[:4])
    raw_keys = jax.random.key_data(jax.random.split(jax.random.key(11), ROWS))
    without = sample(raw_keys, ModelOutput(logits[:, None]), settings)
    unchanged = draw(logits, seed=11, temperature=1.5, nucleus_p=0.95)
    assert without.top_logprobs is None and without.top_logprob_ids is None
    for name, one, other in zip(SampleOutput._fields, without, unchanged, strict=True):
        if one is not None:
            np.testing.assert_array_equal(one, other, err_msg=name)
    assert len(np.unique(unchanged.token_id)) > 20


def test_vocabulary_split_over_devices_draws_the_same(sample: Any) -> None:
    logits, changes = random_batch(13)
    keys, settings = jax.random.split(jax.random.key(13), ROWS), make_settings(logits, **changes)
    whole = sample(keys, ModelOutput(logits[:, None]), settings)
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",), axis_types=auto(["model"]))
    split = NamedSharding(mesh, PartitionSpec(None, None, "model"))
    outputs = ModelOutput(jax.device_put(logits[:, None], split))
    parted = sample(keys, outputs, settings)
    np.testing.assert_array_equal(whole.token_id, parted.token_id)
    np.testing.assert_array_equal(whole.top_k_token_ids, parted.top_k_token_ids)
    np.testing.assert_allclose(whole.prob, parted.prob, rtol=1e-6)
    assert len(np.unique(whole.token_id)) > 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": [1, -0.5]}, "temperature must be .* at least 0, got -0.5 in sequence 1"),
        ({"temperature": np.nan}, "temperature must be a finite .*, got nan in sequence 0"),
        ({"temperature": np.inf}, "temperature must be a finite .*, got inf"),
        ({"nucleus_p": [1, 0]}, "nucleus_p must be .* above 0 and at most 1, got 0 in sequence 1"),
        ({"nucleus_p": 1.5}, "nucleus_p must be .*, got 1.5 in sequence 0"),
        ({"top_k": -1}, "top_k must be an integer of at least 0 .*, got -1 in sequence 0"),
        ({"min_p": [0.5, 1.5]}, "min_p must be a number from 0 to 1, got 1.5 in sequence 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be .* 1e-06 to 1e.06 .*, got 0"),
        ({"repetition_penalty": np.inf}, "repetition_penalty must be a number .*, got inf"),
        ({"presence_penalty": np.nan}, "presence_penalty must be a number from -1e.09 .* got nan"),
        ({"frequency_penalty": 2e9}, "frequency_penalty must be a number from -1e.09 .* got 2e.09"),
        ({"bias": [[0] * 5, [np.nan] * 5]}, "bias must be numbers .*, got nan in sequence 1"),
        ({"top_logprobs": 21}, "top_logprobs must be an integer from 0 to 20, got 21"),
        ({"mask": [[True], [False]]}, "mask must be True for at least one .*, got 0 in sequence 1"),
    ],
)
def test_validation_names_field_and_sequence(changes: dict[str, Any], message: str) -> None:
    settings = make_settings(np.zeros((2, 5), np.float32), **changes)
    with pytest.raises(ValueError, match=message):
        validate_settings(settings)
    inactive: Any = np.zeros(2, bool)
    validate_settings(settings._replace(active=inactive))


GOOD: dict[str, Any] = {
    "temperature": 0.7,
    "nucleus_p": 0.9,
    "mask": np.ones(5, bool),
    "active": True,
    "top_k": 40,
}


def test_validation_accepts_one_sequence_and_limits() -> None:
    validate_settings(SampleSettings(**GOOD))
    validate_settings(SampleSettings(**{**GOOD, "temperature": 0, "nucleus_p": 1, "top_k": None}))
    for limit in (1 / LARGEST_PENALTY, LARGEST_PENALTY):
        for kind in (float, np.float32):
            validate_settings(SampleSettings(**GOOD, repetition_penalty=kind(limit)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": "hot"}, "temperature must be .*, got 'hot'"),
        ({"temperature": 1e39}, "temperature must be .*, got 1e\\+39$"),
        ({"temperature": 10**400}, "temperature must be a finite .*, got 10000"),
        ({"top_k": 2.5}, "top_k must be .*, got 2.5$"),
        ({"top_k": 2**31}, "top_k must be .*"),
        ({"mask": np.zeros(5, bool)}, "mask must be .*, got 0$"),
        ({"mask": np.ones(5)}, "mask must be bool, .*, got dtype float64"),
    ],
)
def test_validation_of_one_sequence_names_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_settings(SampleSettings(**{**GOOD, **changes}))

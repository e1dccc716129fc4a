"""What a request accepts, in which types, and what it rejects before any work is done."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok1.serving.request import AnswerError, CheckedRequest, Completion, Request, RequestError
from grok1.serving.text import Vocabulary, load_tokenizer
from servers import TINY, TOKENIZER
from small import assert_same


@functools.cache
def vocabulary():
    return Vocabulary(load_tokenizer(TOKENIZER, TINY.vocab_size))


def check(request):
    return CheckedRequest(request, TINY, vocabulary())


def assert_same_request(got, expected):
    """Both checked requests ask for the same, on the host and on the device."""
    assert got.request.num_samples == expected.request.num_samples
    for field in ("ids", "limit", "stops", "stop_tokens"):
        assert getattr(got, field) == getattr(expected, field)
    assert_same(got.slot(), expected.slot())


FIELDS = {
    "prompt": [5, 6, 7],
    "stop": ["e", "an"],
    "stop_tokens": [66, 67],
    "allowed_tokens": [65, 66, 67, 68],
}


def on_device(values):
    return values if isinstance(values[0], str) else jnp.array(values)


KINDS = {
    "iterator": iter,
    "numpy": np.array,
    "keys": lambda values: dict.fromkeys(values).keys(),
    "jax": on_device,
    "jax numbers": lambda values: list(on_device(values)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_iterables_are_equal_to_lists(kind):
    fields = {name: KINDS[kind](values) for name, values in FIELDS.items()}
    assert_same_request(check(Request(**fields)), check(Request(**FIELDS)))


def test_later_changes_of_callers_lists_have_no_effect():
    fields, bias = {name: [*values] for name, values in FIELDS.items()}, {66: 5.0}
    request = Request(**fields, logit_bias=bias)
    checked, expected = check(request), check(Request(**FIELDS, logit_bias={66: 5.0}))
    for values in (*fields.values(), bias, request.logit_bias):
        values.clear()
    assert_same_request(checked, expected)


@pytest.mark.parametrize("kind", [np.int8, np.uint64, np.array, jnp.int32])
def test_numbers_of_numpy_and_jax_are_equal_to_pythons(kind):
    fields = {"rng_seed": 5, "max_len": 7, "min_len": 2, "top_k": 3, "top_logprobs": 2}
    typed = {name: kind(value) for name, value in fields.items()}
    temperature = np.array(0.5)
    typed |= {"num_samples": kind(2), "logit_bias": {9: kind(4)}, "ignore_eos": np.True_}
    request = Request([5], **typed, temperature=temperature)
    temperature[...] = np.nan
    fields |= {"num_samples": 2, "logit_bias": {9: 4}, "ignore_eos": True}
    assert_same_request(check(request), check(Request([5], **fields, temperature=0.5)))
    with pytest.raises(ValueError, match="max_len = 100"):
        check(Request([5], max_len=kind(100)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [5, 4096]}, "expected token ids from 0 to 4095, got 4096"),
        ({"prompt": [-1]}, "got -1"),
        ({"prompt": [1.7]}, "expected token ids from 0 to 4095, got 1.7"),
        ({"prompt": np.array(5)}, "list of token ids, got array.5."),
        ({"prompt": b"cat"}, "expected a string or a list of token ids, got b'cat'"),
        ({"prompt": bytearray(b"cat")}, "list of token ids, got bytearray"),
        ({"prompt": {5, 6}}, "list of token ids, got {5, 6}"),
        ({"prompt": [5] * 64}, "prompt has 64 tokens, and the context of 64 must hold at least"),
        (
            {"prompt": [5] * 60, "max_len": 5},
            "has 60 tokens, and the .* must hold max_len = 5 more; shorten it, or keep only",
        ),
        ({"max_len": 64, "truncate": "left"}, "max_len = 64 leaves no room .*; set it below 64"),
        ({"truncate": "right"}, "truncate must be None or \"left\", got 'right'"),
        ({"truncate": np.array(["left"] * 2)}, "truncate must be None"),
        ({"max_len": 0}, "max_len must be an integer of at least 1, got 0"),
        ({"max_len": 2.5}, "max_len must be an integer"),
        ({"max_len": 3, "min_len": 4}, "min_len must be .* 0 to max_len = 3, got 4"),
        ({"min_len": 1, "allowed_tokens": [2]}, "min_len = 1 needs a token in allowed_tokens"),
        ({"allowed_tokens": []}, "allowed_tokens must contain"),
        ({"allowed_tokens": "ab"}, "allowed_tokens: expected .* got 'ab'"),
        ({"stop_tokens": [-1]}, "stop_tokens: expected token ids from 0 to 4095, got -1"),
        ({"stop_tokens": b"ab"}, "stop_tokens: .* got b'ab'"),
        ({"stop": ["a", ""]}, "stop must contain non-empty strings, got ''"),
        ({"stop": [7]}, "stop must contain non-empty strings, got 7"),
        ({"stop": 7}, "stop must be a string or a list of strings, got 7"),
        ({"logit_bias": {5: "x"}}, "numbers from -1e.09 to 1e.09, got 'x' for 5"),
        ({"logit_bias": {5: -2e9}}, "numbers from -1e.09 to 1e.09, got -2000000000.0 for 5"),
        ({"logit_bias": {4096: 1.0}}, "logit_bias: expected token ids from 0 to 4095, got 4096"),
        ({"logit_bias": [1.0]}, "logit_bias must map token ids"),
        ({"num_samples": 0}, "num_samples must be an integer from 1 to 1024, got 0"),
        ({"num_samples": 1.5}, "num_samples must be .* got 1.5"),
        ({"rng_seed": 2**32}, "rng_seed must be .* 0 to 4294967295, got 4294967296"),
        ({"rng_seed": jax.random.key(0)}, "rng_seed must be .* got Array"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False"),
        ({"top_logprobs": 2.0}, "top_logprobs must be an integer, got 2.0"),
        ({"top_logprobs": 21}, "top_logprobs must be .* 0 to 20, got 21"),
        ({"temperature": [1.0, 2.0]}, "temperature must be a single number, got"),
        ({"min_p": True}, "min_p must be a single number, got True"),
        ({"min_p": 2.0}, "min_p must be a number from 0 to 1, got 2"),
    ],
)
def test_wrong_field_is_named_with_what_it_may_hold(fields, message):
    with pytest.raises(ValueError, match=message):
        check(Request(**{"prompt": [5]} | fields))


def test_text_needs_a_tokenizer():
    for request in (Request("words"), Request([5], stop="words")):
        with pytest.raises(ValueError, match="need.? a tokenizer; give "):
            CheckedRequest(request, TINY, None)


def test_errors_are_pickled_with_all_their_fields():
    """An error that cannot be unpickled blocks a multiprocessing.Pool."""
    completion = Completion(None, [5], [7], [-1.0], None, "error", error="why")
    for error in (RequestError(3, "why"), AnswerError(3, "why", [completion])):
        for copied in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert type(copied) is type(error) and vars(copied) == vars(error)
            assert str(copied) == "request 4: why"

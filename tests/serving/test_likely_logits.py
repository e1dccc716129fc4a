"""Decode steps that read the output table rounded: the same tokens, and nearly their logarithms."""

import dataclasses

import jax
import numpy as np
import pytest

from grok1.execution import Execution
from grok1.serving import likely_logits
from grok1.serving.request import CheckedRequest, Request
from runner import InferenceRunner, ModelRunner
from servers import TINY

CONFIG = dataclasses.replace(TINY, vocab_size=1 << 14, output_multiplier_scale=1.5)
PROMPTS = [5, 6, 7], [8, 9], [10, 11, 12, 13], [14]
PLAIN = [
    {"temperature": 0, "top_logprobs": 20},
    {"temperature": 1},
    {"temperature": 0.7, "nucleus_p": 0.9},
    {"temperature": 1.3, "top_k": 500, "min_p": 0.01},
]
REORDERING = [
    {"logit_bias": {7: -1}},
    {"allowed_tokens": range(4000, 9000)},
    {"repetition_penalty": 1.2},
    {"presence_penalty": 0.5},
    {"frequency_penalty": -0.5},
    {"min_len": 8},
]


def made(slots=4):
    runner = ModelRunner(CONFIG, slots, None, rng_seed=1, execution=Execution(kernels="cpu"))
    server = InferenceRunner("tiny", runner, None, None, pad_sizes=(8,))
    server.initialize()
    return server


@pytest.fixture(scope="module")
def servers():
    """One that reads the table, and one that reads it rounded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likely_logits, "LEAST_BYTES", 0)
        rounding = made()
    found = made(), rounding
    assert [server._get_loaded()[0].rounded is not None for server in found] == [False, True]
    return found


@pytest.mark.parametrize("more", [{}, *REORDERING[:2]], ids=["plain", "bias", "allowed tokens"])
def test_answers_with_a_rounded_table_are_the_same(more, servers):
    requests = [
        Request(prompt, rng_seed=seed, max_len=20, ignore_eos=True, **settings, **more)
        for seed, (prompt, settings) in enumerate(zip(PROMPTS, PLAIN, strict=True))
    ]
    for one, other in zip(*(server.generate(requests) for server in servers), strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
        for most, again in zip(one.top_logprobs or (), other.top_logprobs or (), strict=True):
            tops, others = (zip(*pairs, strict=True) for pairs in (most, again))
            (ids, values), (other_ids, other_values) = tops, others
            assert ids == other_ids
            np.testing.assert_allclose(values, other_values, rtol=0, atol=1e-5)


def test_a_slot_does_not_depend_on_what_others_reorder(servers):
    """To the bit, in the logarithms of tokens drawn from all of the vocabulary."""
    request = Request([14], rng_seed=3, temperature=3, max_len=20, ignore_eos=True)
    other = Request([8, 9], max_len=20, ignore_eos=True, logit_bias={7: -1})
    alone, (together, _) = servers[1].generate(request), servers[1].generate([request, other])
    assert alone.token_ids == together.token_ids and alone.logprobs == together.logprobs


def test_hooks_read_the_table_itself(servers):
    hooks = {"embeddings": lambda _, x: 2 * x}
    settings = {"temperature": 0, "max_len": 4, "ignore_eos": True, "hooks": hooks}
    one, other = (server.generate([5, 6], **settings) for server in servers)
    assert one == other


def test_slots_that_reorder_tokens_are_found():
    def reorders(**settings):
        slot = CheckedRequest(Request([5], **settings), CONFIG, None).slot()
        return likely_logits._reorders(jax.tree.map(lambda x: x[None], slot)).tolist() == [True]

    assert not any(reorders(**settings) for settings in PLAIN)
    assert all(reorders(**settings) for settings in REORDERING)

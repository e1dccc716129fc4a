"""Logits at every position of a text, and the log-probability of each of its tokens."""

import types

import jax
import numpy as np
import pytest

import golden
from grok1.execution import ONE_DEVICE
from grok1.serving import scoring
from grok1.serving.request import Request
from grok1.serving.steps import apply_model
from servers import TINY, drain, logprobs, server


def random_ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(3, TINY.vocab_size, shape)


def test_logits_equal_one_forward_pass():
    ids = random_ids(2, TINY.sequence_len)
    forward = jax.jit(lambda p, t: apply_model(TINY, ONE_DEVICE, p, t).logits)
    expected = np.asarray(forward(server().params, ids))
    for length in (1, 8, 9, 31, 64):
        got = server().logits(ids[:, :length])
        assert got.shape == (2, length, TINY.vocab_size) and got.dtype == np.float32
        assert golden.relative_error(got, expected[:, :length]).max() < 1e-5


def test_logits_of_more_rows_than_slots():
    ids = random_ids(6, 5)
    assert np.array_equal(server().logits(ids)[5], server().logits(ids[5])[0])


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("logits", [5] * 65, "at most the context of 64 tokens, got 65"),
        ("logits", [[5, 6], [7]], "rows of different lengths"),
        ("logits", [[5.5, 6]], "expected integer token ids"),
        ("logits", [[5, 4096]], "expected token ids from 0 to 4095, got 4096"),
        ("logits", {5: 6}, "expected integer token ids"),
        ("score", [None, 6], "expected a string or a list of token ids, got None"),
        ("score", [5.5, 6], "expected token ids from 0 to 4095, got 5.5"),
    ],
)
def test_wrong_token_ids_are_refused(method, given, message):
    with pytest.raises(ValueError, match=message):
        getattr(server(), method)(given)


def score_by_hand(ids, start, end, bos=True):
    """Log-probabilities of ids[start:end], read from the logits of one window."""
    window = ([1] if bos else []) + ids[start:end]
    return logprobs(window[:-1])[np.arange(len(window) - 1), window[1:]]


@pytest.mark.parametrize("length", [7, 64, 65, 96, 97, 150])
def test_long_texts_are_scored_in_windows_that_overlap(length):
    ids = random_ids(length, seed=length).tolist()
    [scores] = server().score([ids])
    expected = list(score_by_hand(ids, 0, 64))
    # A window from `begin` reads ids[begin - 1 : begin + 63] and counts its second half.
    for begin in range(32, length - 32, 32):
        end = min(begin + 64, length)
        expected += list(score_by_hand(ids, begin - 1, end, bos=False)[32:])
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_scores_do_not_depend_on_other_texts():
    texts = [random_ids(n, seed=n).tolist() for n in (3, 64, 100, 1, 33)]
    together = server().score([*texts, []])
    for text, scores in zip(texts, together[:-1], strict=True):
        np.testing.assert_allclose(server().score([text])[0], scores, atol=1e-5)
    assert together[-1].shape == (0,)


def test_continuations_are_scored_like_complete_texts():
    texts = [random_ids(n, seed=n).tolist() for n in (0, 1, 9, 40, 41, 42)]
    ends = [random_ids(n, seed=100 + n).tolist() for n in (0, 1, 2, 3, 9, 24, 70)]
    pairs = [(texts[3], end) for end in ends[1:6]]  # at most the context of 64
    pairs += [(texts[0], ends[2]), (texts[4], ends[3]), (texts[0], ends[1]), (texts[1], ends[5])]
    pairs += [(texts[2], ends[0]), (texts[2], ends[1]), (texts[5], ends[6]), (texts[5], ends[1])]
    pairs += [(text, end) for text in (texts[1], [7, 8], [9]) for end in ends[2:4]]
    found = server().score_continuations(pairs)
    for (first, second), scores in zip(pairs, found, strict=True):
        before = len(first) - 1
        whole = np.array([*(first or [1]), *second][:65])  # the first window of the context of 64
        after = logprobs(whole[:-1].tolist()) if len(whole) > 1 else np.zeros([0, TINY.vocab_size])
        expected = after[np.arange(len(whole) - 1), whole[1:]][max(0, before) :]
        greedy = (np.argmax(after, axis=-1) == whole[1:])[max(0, before) :]
        assert scores.greedy.shape == scores.logprobs.shape == (len(second),)
        np.testing.assert_allclose(scores.logprobs[: len(expected)], expected, atol=1e-5)
        assert np.array_equal(scores.greedy[: len(expected)], greedy)
    assert server().score_continuations([]) == []


def test_text_before_several_continuations_is_read_once(monkeypatch):
    read, step = [], scoring.score_step

    def counted(params, memory, length, *arrays, **options):
        read.append(length.tolist())
        return step(params, memory, length, *arrays, **options)

    monkeypatch.setattr(scoring, "score_step", counted)
    first, second = random_ids(40).tolist(), random_ids(33, seed=1).tolist()
    server().score_continuations([(first, [5]), (second, [6, 7]), (first, [8]), (second, [9])])
    assert read == [[32, 32, 0, 0], [7, 0, 0, 0], [1, 2, 0, 0], [1, 1, 0, 0]]


def test_scores_need_a_tokenizer_with_bos(monkeypatch):
    without = types.SimpleNamespace(bos_id=lambda: -1)
    monkeypatch.setitem(vars(server()), "tokenizer", without)
    with pytest.raises(ValueError, match="tokenizer with a piece for the beginning of a text"):
        server().score(["The cat"])


def test_scoring_frees_the_memory_of_unused_slots():
    drain()
    server().generate([Request([5], max_len=3)])
    assert server()._scheduler._state is not None
    server().score([[5, 6]])
    assert server()._scheduler._state is None
    handle = server().submit(Request([5], max_len=3, ignore_eos=True))
    found = server().step()
    server().score([[5, 6]])  # the slot in use keeps its memory
    assert server()._scheduler._state is not None
    assert len(found + list(server().stream(handle))) == 3

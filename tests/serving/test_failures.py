"""Damaged weights, failed steps and Ctrl-C: some answers end, and all others are unchanged."""

import contextlib
import functools
import itertools
import re
import signal
import threading

import numpy as np
import pytest

from grok1.execution import Execution
from grok1.ops.quantization import QuantizedWeight8bit
from grok1.serving import scheduler
from grok1.serving.request import Answer, AnswerError, Request
from grok1.serving.scheduler import EventQueue, Handle, Scheduler
from servers import SLOTS, alone, drain, make, sample, server

# ------------------------------------------------------------------------------ damaged weights

MOE = "transformer/decoder_layer/moe/linear"
ALLOWED = {"allowed_tokens": [8, 9], "ignore_eos": True, "max_len": 5}


@functools.cache
def damaged(kernels="xla_cpu"):
    """A server with NaN in one expert of the first layer, which reads token 7, but not 8 or 9."""
    found = make(execution=Execution(kernels=kernels), pad_sizes=(8,))
    weight = found.params[MOE]["w"]
    expert = found.inspect([7]).captured.expert_index[0, 0, 0]
    assert expert not in found.inspect([8, 9, 8]).captured.expert_index[0]
    scales = weight.scales.at[0, expert].set(np.nan)
    found.params[MOE]["w"] = QuantizedWeight8bit(weight.weight, scales)
    return found


kernels_ = pytest.mark.parametrize(
    "kernels", ["xla_cpu", "cpu", pytest.param("plain", marks=pytest.mark.exhaustive)]
)


@kernels_
def test_nan_ends_only_its_own_answers(kernels):
    bad = Request([8, 7, 8, 8, 8, 8, 9, 9, 9], num_samples=2, **ALLOWED)
    good = [Request([9, 8, 9], **ALLOWED), Request([8], **ALLOWED)]
    expected = damaged(kernels).generate(good)
    with pytest.raises(AnswerError, match="request 1: expected finite logits, got NaN") as raised:
        damaged(kernels).generate([bad, *good] * SLOTS)
    found = raised.value.completions
    assert [found[2::4], found[3::4]] == [[answer] * SLOTS for answer in expected]
    for answer in found[0::4] + found[1::4]:
        assert answer.finish_reason == "error" and "checkpoint.py verify" in answer.error
        assert answer.token_ids == answer.logprobs == [] and answer.text == ""


@kernels_
def test_next_request_in_a_slot_sees_no_nan(kernels):
    """Whether the prompt before was read, scored, or cancelled half-way."""
    good = [Request([8], **ALLOWED)] * SLOTS
    expected = damaged(kernels).generate(good)
    for bad in (Request([7] * 30), Request([8, 7, 9], prompt_logprobs=True)):
        for event in damaged(kernels).generate_events([bad] * SLOTS):
            assert event.finish_reason == "error"
        assert damaged(kernels).generate(good) == expected
    for handle in [damaged(kernels).submit(Request([7] * 45)) for _ in range(SLOTS)]:
        damaged(kernels).step()
        damaged(kernels).cancel(handle)
    assert damaged(kernels).generate(good) == expected


def test_answer_with_nan_ends_no_other_sample():
    """Others copy the prompt's cache from the slot of the first answer, or draw in it next."""
    request = Request([8], num_samples=3 * SLOTS, allowed_tokens=[7, 8, 9], rng_seed=3, max_len=6)
    found = []
    for requests in ([request], [sample(request, i) for i in range(request.num_samples)]):
        with pytest.raises(AnswerError) as raised:
            damaged().generate(requests)
        found.append(raised.value.completions)
    reasons = {answer.finish_reason for answer in found[0]}
    assert found[0] == found[1] and reasons == {"error", "length"}


def test_answer_ends_with_its_last_finite_token():
    asked = Request([8], allowed_tokens=[7], max_len=5)
    *_, event, last = damaged().generate_events([asked])
    assert last[1:3] == (None, "") and last.finish_reason == "error"
    assert event.token_id == 7 and event.finish_reason is None
    assert last.completion.token_ids == [7]


def test_nan_in_prompt_scores_ends_all_answers():
    asked = Request([7, 8, 9], max_len=5, num_samples=SLOTS + 2, prompt_logprobs=True)
    events = list(damaged().generate_events([asked]))
    assert {(event.sample, event.finish_reason) for event in events} == {
        (sample, "error") for sample in range(SLOTS + 2)
    }
    assert len(events) == SLOTS + 2 and not damaged().busy
    assert events[0].completion.prompt_logprobs == [None]
    with pytest.raises(ValueError, match="expected finite logits"):
        damaged().score([[7, 8]])


# --------------------------------------------------------------------------------- failed steps


def test_failed_step_ends_requests_with_its_error(monkeypatch):
    drain()

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    handle = server().submit(Request([5], max_len=9, ignore_eos=True))
    ours = server().generate_events([Request([6], max_len=9, ignore_eos=True)])
    theirs = server().generate_events([Request([7], max_len=9, ignore_eos=True)])
    next(ours), next(theirs)
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "decode", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(ours)
    *_, last = theirs
    assert last.token_id is None and last.finish_reason == "error"
    expected = "the step that worked on it .* [(]RuntimeError: out of memory[)]; try again"
    for answer in (handle.completion, last.completion):
        assert answer.finish_reason == "error" and re.fullmatch(expected, answer.error)
    drain()
    request = Request([5], temperature=0.0, max_len=5)
    assert server().generate([request]) == [alone(request)[0]]


@pytest.mark.parametrize(("name", "call"), [("_fetch", 2), ("_start", SLOTS + 1)])
def test_failed_step_ends_answers_waiting_for_prompt(monkeypatch, name, call):
    """Also where it fails after the slots of the answers before them were freed."""
    drain()
    handle = server().submit(Request([5, 6], max_len=1, num_samples=3 * SLOTS))
    later = server().submit(Request([9], max_len=2, ignore_eos=True))
    work, calls = getattr(Scheduler, name), itertools.count(1)

    def fail_later(*arguments):
        if next(calls) == call:
            raise RuntimeError("lost")
        return work(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, name, fail_later)
        with pytest.raises(RuntimeError, match="lost"):
            drain()
    assert handle.finished and {a.finish_reason for a in handle.completions} == {"length", "error"}
    drain()
    assert later.completion.finish_reason == "length"


def test_token_that_cannot_be_decoded_ends_one_answer(monkeypatch):
    take = Answer.take

    def fail(self, token, *found):
        if self.checked.ids[0] == 5:
            raise RuntimeError("no such piece")
        return take(self, token, *found)

    drain()
    other = Request([6], max_len=3)
    expected = alone(other)[0]
    monkeypatch.setattr(Answer, "take", fail)
    message = "request 1: token .* could not be decoded .no such piece"
    with pytest.raises(AnswerError, match=message) as raised:
        server().generate([Request([5], max_len=3), other])
    assert raised.value.completions[1] == expected


# -------------------------------------------------------------------------------------- Ctrl-C


def test_interrupted_step_loses_no_event(monkeypatch):
    drain()
    wanted = [server().submit(Request([5 + i], max_len=6, ignore_eos=True)) for i in range(2)]
    own = server()._scheduler
    take, turns, events = own._take_unread, itertools.cycle((True, False)), []

    def interrupted(*lists):
        take(*lists)
        if lists[0] and next(turns):
            raise KeyboardInterrupt

    monkeypatch.setattr(own, "_take_unread", interrupted)
    while server().busy:
        try:
            events += server().step()
        except KeyboardInterrupt:
            assert server().busy
    for handle in wanted:
        own = [event.token_id for event in events if event.request == handle.number]
        assert own == handle.completion.token_ids and len(own) == 6


@pytest.mark.parametrize(
    ("kind", "name"), [(Answer, "take"), (Answer, "end"), (EventQueue, "put"), (Scheduler, "_put")]
)
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_second_interrupt_in_a_step_blocks_nothing(monkeypatch, kind, name, count):
    """The first Ctrl-C waits for the end of a step; a second one may strike after any call."""
    drain()
    work, calls = getattr(kind, name), itertools.count(1)

    def cut(*arguments):
        result = work(*arguments)
        if next(calls) == count:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(kind, name, cut)
    requests = [Request([5], max_len=3, num_samples=2), Request([6], max_len=3, ignore_eos=True)]
    handles = [server().submit(request) for request in [*requests, *[Request([7], max_len=40)] * 2]]
    events = []
    for _ in range(100):
        with contextlib.suppress(KeyboardInterrupt):
            events += server().step()
            server().cancel(handles[-1])
    assert not server().busy and all(handle.finished for handle in handles)
    for handle in handles[:-1]:
        last = [e.sample for e in events if e.request == handle.number and e.finish_reason]
        assert {*last} == {*range(len(handle.completions))}
    assert server().generate(requests[1:]) == [alone(requests[1])[0]]


@pytest.mark.parametrize("name", ["_fill", "_deliver", "_note", "_take", "_wait"])
@pytest.mark.parametrize("last", ["_abandon", "_end", "_forget"])
def test_third_interrupt_leaves_no_answer_with_a_gap(monkeypatch, name, last):
    """It strikes while the failed step is cleaned up: the next call does that again."""
    drain()
    requests = [Request([n], max_len=12, ignore_eos=True) for n in (5, 6, 7)]
    expected = [alone(request)[0] for request in requests]
    handles = [server().submit(request) for request in requests]
    for _ in range(3):
        server().step()

    def cut(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        for each in (name, last):
            patch.setattr(Scheduler, each, cut)
        with pytest.raises(KeyboardInterrupt):
            server().step()
    scores = server().score([[5, 6, 7]])[0]  # a call in between
    server().cancel(handles[0])
    later = server().submit(requests[0])
    drain()
    ended = [handle.completion for handle in handles]
    assert ended[0].finish_reason in ("cancelled", "error")
    for found, answer in zip(ended, expected, strict=True):
        assert found.token_ids == answer.token_ids[: len(found.token_ids)]
    for found in ended[1:]:
        assert found.finish_reason == "error" and found.error.endswith("; try again")
    assert later.completion == expected[0] and server().generate(requests) == expected
    np.testing.assert_array_equal(scores, server().score([[5, 6, 7]])[0])


@pytest.mark.parametrize("name", ["end", "_answer"])
@pytest.mark.parametrize("times", [1, 2])
def test_interrupted_cancel_blocks_no_stream(monkeypatch, name, times):
    drain()
    handle = server().submit(Request([5], max_len=4, num_samples=3))
    kind = Answer if name == "end" else Handle
    work, left = getattr(kind, name), [signal.SIGINT] * times

    def interrupted(*arguments):
        result = work(*arguments)
        while left:
            signal.raise_signal(left.pop())
        return result

    with monkeypatch.context() as patch:
        patch.setattr(kind, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            server().cancel(handle)
    assert handle.finished and not server().busy
    reader = threading.Thread(target=lambda: list(server().stream(handle)), daemon=True)
    reader.start()
    reader.join(10)
    assert not reader.is_alive()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

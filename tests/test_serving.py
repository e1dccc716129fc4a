"""Requests that come and go: each gets what it gets alone, and nothing is lost or mixed up."""

import copy
import functools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import serving
import steps
from request import Request
from test_runner import make

SLOTS = 4


@functools.cache
def server():
    return make(slots=SLOTS)


prompts = st.one_of(
    st.lists(st.integers(0, 4095), min_size=1, max_size=45),
    st.sampled_from(["The cat", "Once upon a time", "caf\u00e9 <|mask|>"]),
)
requests = st.builds(
    Request,
    prompt=prompts,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    nucleus_p=st.sampled_from([1.0, 0.9, 0.3]),
    rng_seed=st.integers(0, 3),
    max_len=st.integers(1, 12),
    top_k=st.sampled_from([0, 1, 40]),
    allowed_tokens=st.sampled_from([None, [70, 71, 72, 2]]),
    min_p=st.sampled_from([0.0, 0.2]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    presence_penalty=st.sampled_from([0.0, 2.0]),
    logit_bias=st.sampled_from([None, {2: 12.0}, {66: 9.0, 67: 9.0}]),
    stop=st.sampled_from([(), ("e",), (" the", "an")]),
    stop_tokens=st.sampled_from([(), (66,)]),
    ignore_eos=st.booleans(),
    top_logprobs=st.sampled_from([0, 2]),
)
# What happens: a request comes, a step is done, or one of the requests is cancelled.
actions = st.one_of(requests, requests, st.none(), st.none(), st.none(), st.integers(0, 99))
known: dict[str, Any] = {}


def alone(request):
    """The answer of a request that is served with no other, and its text as it was streamed."""
    key = repr(request)
    if key not in known:
        handle = server().submit(request)
        text = "".join(event.text for event in server().stream(handle))
        assert not server().busy or not list(server().stream(handle))
        known[key] = handle.completion, text
    return known[key]


def drain():
    found = []
    for _ in range(1000):
        if not server().busy:
            return found
        found += server().step()
    raise AssertionError("it never ends")


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(st.lists(actions, min_size=12, max_size=30))
def test_each_request_gets_what_it_gets_alone_whatever_comes_and_goes(schedule):
    """Tokens, log-probabilities and text bit for bit; of one that is cancelled, the beginning."""
    drain()
    asked, events, cancelled = [], [], set()
    for action in schedule:
        if isinstance(action, Request):
            asked.append((action, server().submit(action)))
        elif action is None:
            events += server().step()
        elif asked:
            handle = asked[action % len(asked)][1]
            if not handle.finished:
                cancelled.add(handle.number)
            server().cancel(handle)
    events += drain()
    handles = {handle.number: handle for _, handle in asked}
    assert {event.request for event in events} <= handles.keys()
    for request, handle in asked:
        own = [event for event in events if event.request == handle.number]
        found = copy.deepcopy(handle.completion)
        expected, text = alone(request)
        assert [event.token_id for event in own] == found.token_ids
        assert "".join(event.text for event in own) == found.text
        if handle.number not in cancelled:
            assert found == expected and found.text == text
            continue
        assert found.finish_reason == "cancelled"
        count = len(found.token_ids)
        assert found.token_ids == expected.token_ids[:count]
        assert found.logprobs == expected.logprobs[:count]
        assert expected.text.startswith(found.text)


def test_a_request_takes_a_free_slot_while_others_go_on():
    drain()
    first = server().submit(Request([5], max_len=30, ignore_eos=True))
    for _ in range(5):
        server().step()
    before = len(first.completion.token_ids)
    second = server().submit(Request([*range(3, 43)], max_len=3, ignore_eos=True))
    list(server().stream(second))
    assert before < len(first.completion.token_ids) < 30
    assert second.completion.finish_reason == "length" and not first.finished
    server().cancel(first)
    drain()


def test_a_long_prompt_is_read_a_chunk_at_a_time_between_the_tokens_of_others():
    drain()
    first = server().submit(Request([5], max_len=40, ignore_eos=True))
    for _ in range(4):
        server().step()
    server().submit(Request([7] * 40, max_len=1))  # chunks of 32 and 8
    tokens = [[event.request for event in server().step()] for _ in range(4)]
    assert all(first.number in step for step in tokens)  # it waits for none of them
    server().cancel(first)
    drain()


def test_requests_wait_in_order_and_one_that_waits_can_be_cancelled():
    drain()
    handles = [server().submit(Request([5 + i], max_len=4, ignore_eos=True)) for i in range(7)]
    server().cancel(handles[5])
    ended = []
    while server().busy:
        server().step()
        ended += [h.number for h in handles if h.finished and h.number not in ended]
    assert handles[5].completion.token_ids == []
    del handles[5]
    numbers = [handle.number for handle in handles]
    assert [number for number in ended if number in numbers] == numbers


def test_the_next_step_is_on_its_way_before_the_tokens_of_the_last_one_are_read(monkeypatch):
    drain()
    order, deliver = [], serving.Serving._deliver

    def dispatched(name):
        step = getattr(serving, name)

        def call(*arguments, **options):
            order.append(name)
            return step(*arguments, **options)

        monkeypatch.setattr(serving, name, call)

    def delivered(*arguments):
        order.append("read")
        return deliver(*arguments)

    for name in ("prefill", "first_token", "decode"):
        dispatched(name)
    monkeypatch.setattr(serving.Serving, "_deliver", delivered)
    list(server().generate_events([Request([5], max_len=4, ignore_eos=True)]))
    # The first token, for which nothing else waits; then one step ahead.
    begin = ["prefill", "first_token", "read"]
    assert order == [*begin, "decode", *["decode", "read"] * 2, "read"]


def test_scoring_frees_the_memory_of_slots_that_nobody_uses():
    drain()
    server().generate([Request([5], temperature=0.0, stop_tokens=[1], max_len=3)])
    assert not server().busy and server()._serving._state is not None
    server().score([[5, 6]])
    assert server()._serving._state is None
    handle = server().submit(Request([5], max_len=3, ignore_eos=True))
    server().step()
    server().score([[5, 6]])  # which leaves what is running alone
    assert server()._serving._state is not None
    assert len(list(server().stream(handle))) == 3


def test_an_answer_that_others_cancel_is_what_there_is_of_it():
    drain()
    events = server().generate_events([Request([5], max_len=30, ignore_eos=True)])
    tokens = [next(events).token_id]
    handle = next(taken for taken in server()._serving._slots if taken is not None).handle
    server().cancel(handle)
    tokens += [event.token_id for event in events]  # what was drawn before
    assert handle.completion.finish_reason == "cancelled"
    assert handle.completion.token_ids == tokens and len(tokens) < 30


def test_leaving_an_iterator_cancels_what_it_asked_for():
    drain()
    events = server().generate_events([Request([5], max_len=30), Request([6], max_len=30)])
    next(events)
    events.close()
    drain()
    answer = server().generate([Request([9], temperature=0.0, max_len=3)])[0]
    assert answer.token_ids == alone(Request([9], temperature=0.0, max_len=3))[0].token_ids


def test_a_step_that_fails_ends_what_was_running_and_the_next_request_is_served(monkeypatch):
    drain()
    request = Request([5], temperature=0.0, max_len=5)
    expected = server().generate([request])
    handle = server().submit(request)
    server().step()

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(serving, "decode", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(server().stream(handle))
    assert handle.completion.finish_reason == "cancelled"
    assert server().generate([request]) == expected


def test_coming_and_going_compiles_nothing_new():
    drain()
    server().generate([Request([5] * 40, max_len=2)])
    functions = (steps.start, steps.prefill, steps.first_token, steps.decode, steps.new_state)
    compiled = [function._cache_size() for function in functions]
    handles = [server().submit(Request([5] * (1 + i), max_len=1 + i)) for i in range(8)]
    for _ in range(3):
        server().step()
    server().cancel(handles[2])
    drain()
    assert [function._cache_size() for function in functions] == compiled

"""Requests that come and go: each gets the answer that it gets alone, in order and in time."""

import copy
import dataclasses
import gc
import threading
import time
import weakref
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grok1.serving import scheduler
from grok1.serving.request import CheckedRequest, Request
from grok1.serving.scheduler import Scheduler, Statistics
from grok1.serving.steps import MOST_TOKENS
from servers import SLOTS, TINY, alone, drain, logprobs, make, sample, server

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
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([None, {2: 12.0}, {66: 9.0, 67: 9.0}]),
    stop=st.sampled_from([(), ("e",), (" the", "an")]),
    stop_tokens=st.sampled_from([(), (66,)]),
    ignore_eos=st.booleans(),
    top_logprobs=st.sampled_from([0, 2]),
    num_samples=st.sampled_from([1, 1, 1, 2, 6]),
    prompt_logprobs=st.booleans(),
)


class Steps(NamedTuple):
    """A step of so many tokens at a time."""

    tokens: int


# What happens: a request comes, a step is done, or one of the requests is cancelled.
steps_of = st.builds(Steps, st.sampled_from([1, 1, 2, 8]))
actions = st.one_of(requests, requests, steps_of, steps_of, steps_of, st.integers(0, 99))
schedules = st.lists(actions, min_size=12, max_size=30)


def many(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


@many(16)
@given(schedules)
def test_each_request_gets_its_answer_in_any_schedule(schedule):
    run_schedule(schedule)


@pytest.mark.exhaustive
@many(300)
@given(schedules)
def test_requests_get_their_answers_in_many_schedules(schedule):
    run_schedule(schedule)


def run_schedule(schedule):
    """Compare tokens, log-probabilities and text bit for bit; if cancelled, the first ones."""
    drain()
    asked, events, cancelled = [], [], set()
    for action in schedule:
        if isinstance(action, Request):
            asked.append((action, server().submit(action)))
        elif isinstance(action, Steps):
            events += server().step(action.tokens)
        elif asked:
            handle = asked[action % len(asked)][1]
            if not handle.finished:
                cancelled.add(handle.number)
            server().cancel(handle)
    events += drain()
    handles = {handle.number: handle for _, handle in asked}
    assert {event.request for event in events} <= handles.keys()
    for request, handle in asked:
        assert len(handle.completions) == request.num_samples
        for index, answer in enumerate(copy.deepcopy(handle.completions)):
            place = handle.number, index
            own = [event for event in events if (event.request, event.sample) == place]
            check(answer, own, sample(request, index), handle.number in cancelled)


def check(found, events, request, cancelled):
    """Compare an answer and its events with those of the request alone."""
    expected, text = alone(request)
    assert [event.token_id for event in events] == found.token_ids
    assert "".join(event.text for event in events) == found.text
    if not cancelled or found.finish_reason != "cancelled":
        assert found == expected and found.text == text
        *others, last = [event.finish_reason for event in events]
        assert last == found.finish_reason and not any(others)
        return
    assert not any(event.finish_reason for event in events)
    count = len(found.token_ids)
    assert found.token_ids == expected.token_ids[:count]
    assert found.logprobs == expected.logprobs[:count]
    assert expected.text.startswith(found.text)
    if request.prompt_logprobs:
        assert found.prompt_logprobs == expected.prompt_logprobs[: len(found.prompt_logprobs)]
    if found.prompt_top_logprobs is not None:
        count = len(found.prompt_top_logprobs)
        assert found.prompt_top_logprobs == expected.prompt_top_logprobs[:count]


# ----------------------------------------------------------------------------- order and fairness


def test_request_takes_a_free_slot_while_others_go_on():
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


def test_long_prompt_is_read_between_tokens_of_others():
    drain()
    first = server().submit(Request([5], max_len=40, ignore_eos=True))
    for _ in range(4):
        server().step()
    server().submit(Request([7] * 40, max_len=1))  # chunks of 32 and 8
    # It waits for none of them, and does not make them wait for several tokens of its own.
    numbers = [[event.request for event in server().step(8)] for _ in range(2)]
    assert [step.count(first.number) for step in numbers] == [1, 1]
    server().cancel(first)
    drain()


def test_requests_are_served_in_order_or_cancelled():
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


def test_next_step_is_dispatched_before_reading_tokens(monkeypatch):
    drain()
    order, deliver = [], Scheduler._deliver

    def dispatched(name):
        step = getattr(scheduler, name)

        def call(*arguments, **options):
            order.append(name)
            return step(*arguments, **options)

        monkeypatch.setattr(scheduler, name, call)

    def delivered(*arguments):
        order.append("read")
        return deliver(*arguments)

    for name in ("prefill", "first_token", "decode"):
        dispatched(name)
    monkeypatch.setattr(Scheduler, "_deliver", delivered)
    list(server().generate_events([Request([5], max_len=4, ignore_eos=True)]))
    # The first token, for which nothing else waits; then one step ahead.
    begin = ["prefill", "first_token", "read"]
    assert order == [*begin, "decode", *["decode", "read"] * 2, "read"]


def test_long_prompt_bounds_the_steps_in_flight(monkeypatch):
    """With too many, XLA's CPU client aborts the process."""
    drain()
    flying, most = [0], [0]
    read, wait = scheduler.prefill, Scheduler._wait

    def dispatched(*arguments, **options):
        flying[0] += 1
        most[0] = max(most[0], flying[0])
        return read(*arguments, **options)

    def waited(self, arrays):
        wait(self, arrays)
        flying[0] = 0

    monkeypatch.setattr(scheduler, "prefill", dispatched)
    monkeypatch.setattr(Scheduler, "_wait", waited)
    monkeypatch.setattr(scheduler, "MOST_IN_FLIGHT", 6)
    monkeypatch.setattr(scheduler, "_schedulers", ["this one", "another"])
    monkeypatch.setattr(server()._scheduler, "_pad_sizes", [8])
    (answer,) = server().generate([Request([5, 6, 7, 8] * 15, max_len=3, ignore_eos=True)])
    assert most[0] == 3 and len(answer.token_ids) == 3


@pytest.mark.slow
def test_prompt_of_hundreds_of_chunks_is_read_on_mesh():
    config = dataclasses.replace(TINY, sequence_len=1024)
    own = make(config, slots=8, mesh=(2, 4), pad_sizes=(4,))
    (answer,) = own.generate([Request([5, 6, 7, 8] * 250, temperature=0.0, max_len=3)])
    assert len(answer.token_ids) == 3


@pytest.mark.slow
def test_servers_that_share_devices_do_not_deadlock():
    """Together they dispatch no more than XLA's CPU client takes; else it aborts the process."""
    servers = [make(slots=1, mesh=(1, 8), pad_sizes=(1,)) for _ in range(5)]
    request = Request([*range(5, 60)], temperature=0.0, max_len=2)
    (expected,) = servers[0].generate([request])
    found = []

    def ask(server):
        for _ in range(5):
            found.extend(server.generate([request]))

    threads = [threading.Thread(target=ask, args=(server,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [expected] * 25


def test_statistics_count_what_was_decoded():
    drain()
    server().statistics = Statistics()
    assert server().statistics.slots_used == server().statistics.host_share == 0
    requests = [Request([5 + i], max_len=9, ignore_eos=True) for i in range(2)]
    server().generate(requests)
    found = server().statistics
    assert found.tokens == 16 and 8 <= found.steps <= 16  # first tokens are not decoded
    assert found.slots_used == found.tokens / found.steps
    assert 0 < found.waiting < found.seconds and 0 < found.host_share < 1


@pytest.mark.parametrize("ended_by", ["stop", "length"])
def test_nothing_is_drawn_after_the_end_of_an_answer(monkeypatch, ended_by):
    """The devices find the end: steps of several tokens draw no more than the answer has."""
    drain()
    drawn, unpack = [], scheduler.unpack

    def counted(rows):
        found = unpack(rows)
        drawn.append(found.drawn.sum())
        return found

    request = Request([5], max_len=8, ignore_eos=True)
    tokens = alone(request)[0].token_ids
    assert tokens[3] not in tokens[:3]
    ends = {"max_len": 4} if ended_by == "length" else {"stop_tokens": (tokens[3],)}
    monkeypatch.setattr(scheduler, "unpack", counted)
    handle = server().submit(dataclasses.replace(request, **ends))
    while not handle.finished:
        server().step(8)
    assert handle.completion.token_ids == tokens[:4]
    assert handle.completion.finish_reason == ended_by
    assert sum(drawn) == 4


# ---------------------------------------------------------------------- one prompt, several answers


def test_prompt_is_read_once_if_answers_exceed_slots(monkeypatch):
    drain()
    chunks, read = [], scheduler.prefill

    def counted(*arguments, **options):
        chunks.append(arguments)
        return read(*arguments, **options)

    monkeypatch.setattr(scheduler, "prefill", counted)
    several = Request([*range(103, 143)], num_samples=2 * SLOTS + 1, max_len=5, ignore_eos=True)
    answers = server().generate([several, Request([9], max_len=2)])
    assert len(chunks) == 3  # 32 tokens and 8, and the other prompt
    # In the order of the requests and of their seeds.
    assert answers[-1].prompt_ids == [9]
    for index, answer in enumerate(answers[:-1]):
        assert answer == alone(sample(several, index))[0]
    assert len({tuple(answer.token_ids) for answer in answers}) == len(answers)


@pytest.mark.parametrize("length", [3, 4])
def test_prompt_is_copied_before_its_slot_is_reused(length):
    """Two slots become free together, and the first goes to another answer to the prompt."""
    drain()
    one = Request("The cat", max_len=3, temperature=0.0, ignore_eos=True)
    first, long = dataclasses.replace(one, max_len=length), dataclasses.replace(one, max_len=40)
    several = dataclasses.replace(one, num_samples=2)
    asked = [server().submit(r) for r in [*[long] * (SLOTS - 2), first, several, one]]
    drain()
    assert asked[SLOTS - 1].completions == [alone(one)[0]] * 2


@pytest.mark.parametrize("top", [0, 3])
def test_prompt_logprobs_are_those_of_its_logits(top):
    prompt = [(7 * i) % 4093 + 3 for i in range(40)]
    scores = logprobs(prompt)
    for length in (1, 2, 8, 9, 40):
        asked = Request(prompt[:length], max_len=1, prompt_logprobs=True, top_logprobs=top)
        (answer,) = server().generate([asked])
        first, *others = answer.prompt_logprobs
        expected = [scores[i, token] for i, token in enumerate(prompt[1:length])]
        np.testing.assert_allclose(others, expected, rtol=0, atol=2e-5)
        assert first is None and (answer.prompt_top_logprobs is None) == (top == 0)
        for row, found in zip(scores, (answer.prompt_top_logprobs or [])[1:], strict=False):
            best = np.argsort(-row, kind="stable")[:top]
            assert [token for token, _ in found] == best.tolist()
            values = [value for _, value in found]
            np.testing.assert_allclose(values, row[best], rtol=0, atol=2e-5)
    assert answer.prompt_top_logprobs is None or len(answer.prompt_top_logprobs) == 40


# -------------------------------------------------------------------------- streams and iterators


def test_stream_has_all_tokens_drawn_after_the_call():
    drain()
    handle = server().submit(Request([5], max_len=6, ignore_eos=True))
    stream = server().stream(handle)
    assert not [event for _ in range(4) for event in server().step()]
    assert [event.token_id for event in stream] == handle.completion.token_ids


def test_closing_an_iterator_cancels_its_requests():
    drain()
    events = server().generate_events([Request([5], max_len=30), Request([6], max_len=30)])
    next(events)
    events.close()
    assert not server().busy
    request = Request([9], temperature=0.0, max_len=3)
    assert server().generate([request]) == [alone(request)[0]]


def test_iterator_collected_during_a_step_is_cancelled():
    drain()
    left: list[Any] = [server().generate_events([Request([5], max_len=30)] * 3)]
    next(left[0])
    left.append(left)
    del left
    request = Request([9], temperature=0.0, max_len=3)
    events = list(server().generate_events([request], phase=lambda _: gc.collect()))
    assert [event.token_id for event in events] == alone(request)[0].token_ids
    assert not server().busy


def test_cancelled_answer_keeps_tokens_drawn_so_far():
    drain()
    events = server().generate_events([Request([5], max_len=30, ignore_eos=True)])
    tokens = [next(events).token_id]
    handle = next(taken for taken in server()._scheduler._slots if taken is not None).handle
    server().cancel(handle)
    tokens += [event.token_id for event in events]  # what was drawn before
    assert handle.completion.finish_reason == "cancelled"
    assert handle.completion.token_ids == tokens and len(tokens) < 30


@pytest.mark.parametrize("change", ["clear", "finish", "none"])
def test_caller_may_change_a_completion_in_progress(change):
    drain()
    request = Request([5], max_len=9, ignore_eos=True)
    events = server().generate_events([request])
    answer = next(events).completion
    if change == "clear":
        answer.token_ids.clear()
    elif change == "finish":
        answer.finish_reason = "length"
    else:
        answer.token_ids = None
    assert sum(event.token_id is not None for event in events) == (0 if change == "none" else 8)
    assert not server().busy
    assert server().generate([request]) == [alone(request)[0]]


def test_handle_does_not_keep_the_model_in_memory():
    model = make()
    handle = model.submit(Request([5], max_len=1))
    assert copy.deepcopy([handle])[0] is handle
    drain(model)
    gone = weakref.ref(model._scheduler)
    del model
    gc.collect()
    assert gone() is None and len(handle.completion.token_ids) == 1


# ------------------------------------------------------------------------------ many requests


def test_waiting_requests_take_no_memory_or_time(monkeypatch):
    drain()
    alive = weakref.WeakSet()

    class Counted(CheckedRequest):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            alive.add(self)

    monkeypatch.setattr("runner.CheckedRequest", Counted)
    events = server().generate_events([Request([5], max_len=2, num_samples=1024)] * 4000)
    for _ in range(20):
        next(events)
        assert len(alive) <= 2 * SLOTS
    assert sum(len(handle._answers) for handle in server()._scheduler._line) <= 2 * SLOTS + 20
    began = time.thread_time()
    events.close()
    assert time.thread_time() - began < 0.5 and not server().busy


def test_cancelling_waiting_requests_takes_linear_time():
    drain()
    handles = [server().submit(Request([5], max_len=2)) for _ in range(8000)]
    began = time.thread_time()  # independent of other processes
    for handle in reversed(handles):
        server().cancel(handle)
    assert time.thread_time() - began < 1 and not server().busy


@pytest.mark.exhaustive
def test_forty_thousand_requests_take_linear_time():
    drain()
    requests = [Request([5 + i % 4000], max_len=1) for i in range(40_000)]
    times = [time.perf_counter()]
    for i, _ in enumerate(server().generate_events(requests, tokens=MOST_TOKENS), 1):
        if i % 10_000 == 0:
            times.append(time.perf_counter())
    first, *_, last = np.diff(times)
    assert last < 1.25 * first


@pytest.mark.exhaustive
def test_a_million_requests_start_in_minutes():
    drain()
    requests = [Request([5], max_len=1, num_samples=1024)] * 1_000_000
    began = time.perf_counter()
    events = server().generate_events(requests)
    next(events)
    events.close()
    assert time.perf_counter() - began < 180

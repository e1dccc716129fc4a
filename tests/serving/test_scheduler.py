"""Requests that come and go: each gets what it gets alone, and nothing is lost or mixed up."""

import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import pickle
import re
import signal
import threading
import time
import weakref
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grok1.execution import Execution
from grok1.ops.quantization import QuantizedWeight8bit
from grok1.serving import scheduler, steps
from grok1.serving.request import Answer, AnswerError, CheckedRequest, Request, RequestError
from grok1.serving.scheduler import EventQueue, Handle, Scheduler, Statistics
from grok1.serving.steps import MOST_TOKENS
from test_runner import TINY, make

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


def sample(request, index):
    """The request that has as its only answer one of those of a request."""
    return dataclasses.replace(request, num_samples=1, rng_seed=request.rng_seed + index)


def drain(of=None):
    found, of = [], of or server()
    for _ in range(1000):
        if not of.busy:
            return found
        found += of.step()
    raise AssertionError("it never ends")


def many(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


schedules = st.lists(actions, min_size=12, max_size=30)


@many(60)
@given(schedules)
def test_each_request_gets_what_it_gets_alone_whatever_comes_and_goes(schedule):
    go_through(schedule)


@pytest.mark.exhaustive
@many(300)
@given(schedules)
def test_each_request_gets_what_it_gets_alone_in_many_schedules(schedule):
    go_through(schedule)


def go_through(schedule):
    """Tokens, log-probabilities and text bit for bit; of one that is cancelled, the beginning."""
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
    """Whether an answer and its events are those of the request alone, or of their beginning."""
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
    # It waits for none of them, and does not make them wait for several tokens of its own.
    numbers = [[event.request for event in server().step(8)] for _ in range(2)]
    assert [step.count(first.number) for step in numbers] == [1, 1]
    server().cancel(first)
    drain()


def test_what_a_request_was_made_of_may_change_afterwards():
    drain()
    prompt, allowed, bias = [5, 6], [70, 71], {70: 5.0}
    request = Request(prompt, allowed_tokens=allowed, logit_bias=bias, max_len=5, ignore_eos=True)
    expected = server().generate([request])
    other = server().submit(Request([9], max_len=5, ignore_eos=True))
    handle = server().submit(request)
    assert request.logit_bias is not None
    for values in (prompt, allowed, bias, request.logit_bias):
        values.clear()
    assert [event.request for event in drain()].count(other.number) == 5
    assert handle.completions == expected


def test_iterators_are_as_good_as_lists():
    drain()
    lists = [[5, 6, 7], ["e", "an"], [66, 67], [65, 66, 67, 68]]
    fields = "prompt", "stop", "stop_tokens", "allowed_tokens"

    def ask(make):
        values = {field: make(value) for field, value in zip(fields, lists, strict=True)}
        return server().generate([Request(**values, rng_seed=3, max_len=20, num_samples=8)])

    expected = ask(list)
    assert ask(iter) == ask(np.array) == ask(lambda x: dict.fromkeys(x).keys()) == expected

    def on_device(values):
        return values if isinstance(values[0], str) else jnp.array(values)

    assert ask(on_device) == ask(lambda values: list(on_device(values))) == expected
    assert "stop" in {answer.finish_reason for answer in expected}


def test_errors_come_whole_from_another_process():
    """One that cannot be made again hangs a multiprocessing.Pool, and breaks other executors."""
    completion = server().generate([Request([5], max_len=1)])[0]
    for error in (RequestError(3, "why"), AnswerError(3, "why", [completion])):
        for copied in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert type(copied) is type(error) and vars(copied) == vars(error)
            assert str(copied) == "request 4: why"


def test_a_handle_keeps_no_model_in_memory():
    model = make(slots=1)
    handle = model.submit(Request([5], max_len=1))
    assert copy.deepcopy([handle])[0] is handle
    while model.busy:
        model.step()
    gone = weakref.ref(model._scheduler)
    del model
    gc.collect()
    assert gone() is None and len(handle.completion.token_ids) == 1


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, np.uint64, np.array, jnp.int32])
def test_numbers_of_any_kind_are_as_python_has_them(kind):
    drain()
    fields = {"rng_seed": 5, "max_len": 7, "min_len": 2, "top_k": 3, "top_logprobs": 2}
    typed = {name: kind(value) for name, value in fields.items()}
    temperature = np.array(0.5)
    typed |= {"num_samples": kind(2), "logit_bias": {9: kind(4)}, "ignore_eos": np.True_}
    request = Request([5], **typed, temperature=temperature)
    temperature[...] = np.nan
    fields |= {"num_samples": 2, "logit_bias": {9: 4}, "ignore_eos": True}
    plain = Request([5], **fields, temperature=0.5)
    assert server().generate([request]) == server().generate([plain])
    with pytest.raises(ValueError, match="max_len = 100"):
        server().submit(Request([5], max_len=kind(100)))


def test_ids_from_an_iterator_are_read_once():
    assert server().encode(iter([5, 6])) == [5, 6]
    np.testing.assert_array_equal(server().score([map(int, "56")])[0], server().score([[5, 6]])[0])


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
    order, deliver = [], scheduler.Scheduler._deliver

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
    monkeypatch.setattr(scheduler.Scheduler, "_deliver", delivered)
    list(server().generate_events([Request([5], max_len=4, ignore_eos=True)]))
    # The first token, for which nothing else waits; then one step ahead.
    begin = ["prefill", "first_token", "read"]
    assert order == [*begin, "decode", *["decode", "read"] * 2, "read"]


def test_scoring_frees_the_memory_of_slots_that_nobody_uses():
    drain()
    server().generate([Request([5], temperature=0.0, stop_tokens=[1], max_len=3)])
    assert not server().busy and server()._scheduler._state is not None
    server().score([[5, 6]])
    assert server()._scheduler._state is None
    handle = server().submit(Request([5], max_len=3, ignore_eos=True))
    found = server().step()
    server().score([[5, 6]])  # which leaves what is running alone
    assert server()._scheduler._state is not None
    assert len(found + list(server().stream(handle))) == 3


def test_an_answer_that_others_cancel_is_what_there_is_of_it():
    drain()
    events = server().generate_events([Request([5], max_len=30, ignore_eos=True)])
    tokens = [next(events).token_id]
    handle = next(taken for taken in server()._scheduler._slots if taken is not None).handle
    server().cancel(handle)
    tokens += [event.token_id for event in events]  # what was drawn before
    assert handle.completion.finish_reason == "cancelled"
    assert handle.completion.token_ids == tokens and len(tokens) < 30


def test_a_stream_has_all_that_comes_after_the_call():
    drain()
    handle = server().submit(Request([5], max_len=6, ignore_eos=True))
    stream = server().stream(handle)
    assert not [event for _ in range(4) for event in server().step()]
    assert [event.token_id for event in stream] == handle.completion.token_ids
    with pytest.raises(ValueError, match="expected a handle from submit, got 5"):
        server().stream(5)
    with pytest.raises(ValueError, match="tokens must be an integer from 1 to 16, got 0"):
        server().stream(handle, 0)


def test_leaving_an_iterator_cancels_what_it_asked_for():
    drain()
    events = server().generate_events([Request([5], max_len=30), Request([6], max_len=30)])
    next(events)
    events.close()
    drain()
    answer = server().generate([Request([9], temperature=0.0, max_len=3)])[0]
    assert answer.token_ids == alone(Request([9], temperature=0.0, max_len=3))[0].token_ids


def test_an_iterator_that_is_collected_during_a_step_cancels_what_it_asked_for():
    drain()
    left: list[Any] = [server().generate_events([Request([5], max_len=30)] * 3)]
    next(left[0])
    left.append(left)
    del left
    request = Request([9], temperature=0.0, max_len=3)
    events = list(server().generate_events([request], phase=lambda _: gc.collect()))
    assert [event.token_id for event in events] == alone(request)[0].token_ids
    assert not server().busy


def test_a_step_that_fails_ends_what_was_running_and_the_next_request_is_served(monkeypatch):
    drain()
    request = Request([5], temperature=0.0, max_len=5)
    expected = server().generate([request])
    handle = server().submit(request)
    server().step()

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "decode", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(server().stream(handle))
    assert handle.completion.finish_reason == "error"
    expected_error = "the step that worked on it .* [(]RuntimeError: out of memory[)]; try again"
    assert re.fullmatch(expected_error, handle.completion.error)
    assert server().generate([request]) == expected


def test_after_one_request_coming_and_going_compiles_nothing_new():
    server = make(slots=2)
    server.generate([Request([5] * 40, max_len=2)])
    functions = (steps.start, steps.prefill, steps.first_token, steps.decode, steps.new_state)
    compiled = [function._cache_size() for function in functions]
    handles = [server.submit(Request([5] * (1 + i), max_len=1 + i)) for i in range(8)]
    for _ in range(3):
        server.step()
    server.cancel(handles[2])
    while server.busy:
        server.step(8)
    server._scheduler.release()
    server.generate([Request([5] * 40, max_len=2, num_samples=3)])
    assert [function._cache_size() for function in functions] == compiled


# ------------------------------------------------------------------ several answers, several tokens


def counted(monkeypatch, name):
    """Returns the list of a step's inputs, one for each time that it is dispatched."""
    calls, step = [], getattr(scheduler, name)

    def call(*arguments, **options):
        calls.append(arguments)
        return step(*arguments, **options)

    monkeypatch.setattr(scheduler, name, call)
    return calls


def test_a_prompt_is_read_once_for_all_its_answers_more_than_there_are_slots(monkeypatch):
    drain()
    chunks = counted(monkeypatch, "prefill")
    request = Request([*range(3, 43)], num_samples=2 * SLOTS + 1, max_len=5, ignore_eos=True)
    answers = server().generate([request, Request([9], max_len=2)])
    assert len(chunks) == 3  # 32 tokens and 8, and the other prompt
    for index, answer in enumerate(answers[:-1]):
        assert answer == alone(sample(request, index))[0]
    assert len({tuple(answer.token_ids) for answer in answers}) == len(answers)


def test_the_answers_to_a_prompt_are_in_the_order_of_the_requests_and_of_their_seeds():
    drain()
    several = [
        Request([5, 6], num_samples=2, max_len=9, ignore_eos=True),
        Request([7], max_len=1),
        Request([8], num_samples=3, max_len=2, ignore_eos=True),
    ]
    answers = server().generate(several)
    assert [answer.prompt_ids for answer in answers] == [[5, 6]] * 2 + [[7]] + [[8]] * 3


@pytest.mark.parametrize("length", [1, 2, 8, 9, 40])
def test_the_log_probabilities_of_a_prompt_are_those_of_its_logits(length):
    drain()
    prompt = [(7 * i) % 4093 + 3 for i in range(length)]
    (answer,) = server().generate([Request(prompt, max_len=1, prompt_logprobs=True)])
    logits = server().logits([prompt])[0].astype(np.float64)
    scores = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    expected = [scores[i, token] for i, token in enumerate(prompt[1:])]
    assert answer.prompt_logprobs[0] is None and len(answer.prompt_logprobs) == length
    np.testing.assert_allclose(answer.prompt_logprobs[1:], expected, rtol=0, atol=2e-5)
    assert server().generate([Request(prompt, max_len=1)])[0].prompt_logprobs is None


def test_an_interrupt_loses_no_event(monkeypatch):
    drain()
    wanted = [server().submit(Request([5 + i], max_len=6, ignore_eos=True)) for i in range(2)]
    scheduler = server()._scheduler
    take, turns, events = scheduler._take_unread, itertools.cycle((True, False)), []

    def interrupted(*lists):
        take(*lists)
        if lists[0] and next(turns):
            raise KeyboardInterrupt

    monkeypatch.setattr(scheduler, "_take_unread", interrupted)
    while server().busy:
        try:
            events += server().step()
        except KeyboardInterrupt:
            assert server().busy
    for handle in wanted:
        own = [event.token_id for event in events if event.request == handle.number]
        assert own == handle.completion.token_ids and len(own) == 6


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)])
def test_the_prompt_has_top_logprobs(mesh):
    prompt = [(7 * i) % 4093 + 3 for i in range(21)]  # in two chunks and a part
    asked = Request(prompt, max_len=1, num_samples=2, prompt_logprobs=True, top_logprobs=3)
    scored = dataclasses.replace(asked, top_logprobs=0)
    own = server() if mesh == (1, 1) else make(slots=4, mesh=mesh)
    both = own.generate([asked, scored])
    assert both[2].prompt_top_logprobs is None
    assert both[2].prompt_logprobs == both[0].prompt_logprobs
    logits = server().logits([prompt])[0].astype(np.float64)
    scores = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    for answer in both[:2]:
        first, *others = answer.prompt_top_logprobs
        assert first is None and len(others) == len(prompt) - 1
        for position, found in enumerate(others):
            best = np.argsort(-scores[position], kind="stable")[:3]
            assert [token for token, _ in found] == best.tolist()
            values = [value for _, value in found]
            np.testing.assert_allclose(values, scores[position, best], rtol=0, atol=2e-5)


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


def test_several_parts_of_the_data_axis_read_prompts_and_share_them():
    """Answers of one prompt lie on both parts: what the first has read goes over to the others."""
    request = Request([*range(3, 43)], num_samples=6, max_len=4, ignore_eos=True)
    others = [Request([9, 8, 7], max_len=6), Request([5] * 33, max_len=6, prompt_logprobs=True)]
    found = [make(slots=4, mesh=mesh).generate([request, *others]) for mesh in [(2, 4), (1, 1)]]
    assert [a.token_ids for a in found[0]] == [a.token_ids for a in found[1]]
    scores = [answers[-1].prompt_logprobs[1:] for answers in found]
    np.testing.assert_allclose(*scores, rtol=0, atol=2e-5)


# ------------------------------------------------------------------------------ damaged weights


MOE = "transformer/decoder_layer/moe/linear"


@functools.cache
def damaged(kernels):
    """A server with NaN in one expert of the first layer, to which only some tokens go."""
    found = make(slots=SLOTS, execution=Execution(kernels=kernels))
    weight = found.params[MOE]["w"]
    expert = found.inspect([7]).captured.expert_index[0, 0, 0]
    assert expert not in found.inspect([8, 9, 8]).captured.expert_index[0]
    scales = weight.scales.at[0, expert].set(np.nan)
    found.params[MOE]["w"] = QuantizedWeight8bit(weight.weight, scales)
    return found


GOOD = [Request([8, 9], allowed_tokens=[8, 9], max_len=4), Request([9], allowed_tokens=[9])]


@pytest.mark.parametrize("kernels", ["plain", "xla_cpu", "cpu"])
def test_logits_that_are_not_finite_end_their_own_answer_only(kernels):
    bad = Request([8, 7], max_len=5, num_samples=2)
    expected = damaged(kernels).generate(GOOD)
    with pytest.raises(AnswerError, match="request 2: expected finite logits, got NaN") as raised:
        damaged(kernels).generate([GOOD[0], bad, GOOD[1]])
    first, one, other, last = raised.value.completions
    assert [first, last] == expected and None not in (first.text, last.text)
    for answer in (one, other):
        assert answer.finish_reason == "error" and "checkpoint.py verify" in answer.error
        assert answer.token_ids == answer.logprobs == [] and answer.text == ""


def test_an_answer_ends_with_its_last_finite_token():
    asked = Request([8], allowed_tokens=[7], max_len=5)
    *_, event, last = damaged("xla_cpu").generate_events([asked])
    assert last[1:3] == (None, "") and last.finish_reason == "error"
    assert event.token_id == 7 and event.finish_reason is None
    assert last.completion.token_ids == [7]


def test_scores_of_a_prompt_that_are_not_finite_end_its_answers():
    asked = Request([7, 8, 9], max_len=5, num_samples=SLOTS + 2, prompt_logprobs=True)
    events = list(damaged("xla_cpu").generate_events([asked]))
    assert {(event.sample, event.finish_reason) for event in events} == {
        (sample, "error") for sample in range(SLOTS + 2)
    }
    assert len(events) == SLOTS + 2 and not damaged("xla_cpu").busy
    with pytest.raises(ValueError, match="expected finite logits"):
        damaged("xla_cpu").score([[7, 8]])


@pytest.mark.parametrize("kernels", ["plain", "xla_cpu", "cpu"])
def test_the_next_request_in_a_slot_is_not_spoilt(kernels):
    bad = [Request([7] * 30, max_len=5)] * SLOTS
    bad += [Request([8, 7, 9], max_len=3, prompt_logprobs=True)] * SLOTS
    good = [dataclasses.replace(GOOD[0], prompt=[8, 9] * 15)] * SLOTS
    expected = damaged(kernels).generate(good)
    for wrong in (bad[:SLOTS], bad[SLOTS:]):
        for event in damaged(kernels).generate_events(wrong):
            assert event.finish_reason == "error"
        assert damaged(kernels).generate(good) == expected


@pytest.mark.parametrize("length", [3, 4])
def test_a_prompt_is_taken_over_before_its_slot_goes(length):
    """Where two slots become free together, and the first goes to another answer to it."""
    drain()
    one = Request("The cat", max_len=3, temperature=0.0, ignore_eos=True)
    first, long = dataclasses.replace(one, max_len=length), dataclasses.replace(one, max_len=40)
    several = dataclasses.replace(one, num_samples=2)
    asked = [server().submit(r) for r in [*[long] * (SLOTS - 2), first, several, one]]
    drain()
    assert asked[SLOTS - 1].completions == [alone(one)[0]] * 2


@pytest.mark.parametrize("kernels", ["plain", "xla_cpu", "cpu"])
def test_a_prompt_with_nan_spoils_no_other(kernels):
    bad = Request([8, 7, 8, 8, 8, 8, 9, 9, 9], max_len=5, allowed_tokens=[8, 9], ignore_eos=True)
    good = [dataclasses.replace(bad, prompt=prompt) for prompt in ([9, 8, 9], [8])]
    expected = damaged(kernels).generate(good)
    handles = [damaged(kernels).submit(request) for request in [bad, *good] * SLOTS]
    drain(damaged(kernels))
    found = [handle.completion for handle in handles]
    assert [found[1::3], found[2::3]] == [[answer] * SLOTS for answer in expected]
    assert {(*a.token_ids, a.finish_reason) for a in found[::3]} == {("error",)}


def test_a_cancelled_prompt_with_nan_spoils_no_other():
    good = [dataclasses.replace(GOOD[0], prompt=[8])] * SLOTS
    expected = damaged("plain").generate(good)
    for handle in [damaged("plain").submit(Request([7] * 45)) for _ in range(SLOTS)]:
        damaged("plain").step()
        damaged("plain").cancel(handle)
    assert damaged("plain").generate(good) == expected


def test_an_answer_with_nan_spoils_no_other_sample():
    """Which take over what the first has read, in its slot or in another."""
    request = Request([8], num_samples=3 * SLOTS, allowed_tokens=[7, 8, 9], rng_seed=3, max_len=6)
    ones = [
        dataclasses.replace(request, num_samples=1, rng_seed=request.rng_seed + i)
        for i in range(request.num_samples)
    ]
    found = []
    for requests in ([request], ones):
        with pytest.raises(AnswerError) as raised:
            damaged("xla_cpu").generate(requests)
        found.append(raised.value.completions)
    reasons = {answer.finish_reason for answer in found[0]}
    assert found[0] == found[1] and reasons == {"error", "length"}


@pytest.mark.parametrize("change", ["clear", "finish", "none"])
def test_what_is_done_to_a_completion_in_progress_hangs_nothing(change):
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


def test_a_tokenizer_that_fails_ends_one_answer(monkeypatch):
    take = Answer.take

    def fail(self, token, *found):
        if self.checked.ids[0] == 5:
            raise RuntimeError("no such piece")
        return take(self, token, *found)

    drain()
    monkeypatch.setattr(Answer, "take", fail)
    with pytest.raises(
        AnswerError, match="request 1: token .* could not be decoded .no such piece"
    ):
        server().generate([Request([5], max_len=3), Request([6], max_len=3)])
    assert server().generate([Request([6], max_len=3)]) == [alone(Request([6], max_len=3))[0]]


@pytest.mark.parametrize(
    ("kind", "name"), [(Answer, "take"), (Answer, "end"), (EventQueue, "put"), (Scheduler, "_put")]
)
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_a_call_that_is_cut_anywhere_hangs_nothing(monkeypatch, kind, name, count):
    """As by a second Ctrl-C, at the end of some call of a function."""
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
def test_a_step_whose_cleaning_up_is_cut_too_is_cleaned_up_after(monkeypatch, name, last):
    """As by three Ctrl-C: no answer goes on with tokens that are missing in its midst."""
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
    scores = server().score([[5, 6, 7]])[0]  # what comes in between
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
def test_a_cancel_that_is_interrupted_hangs_no_stream(monkeypatch, name, times):
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


def test_a_failed_step_ends_requests_with_answers_in_line(monkeypatch):
    """They wait for a prompt that is lost."""
    drain()
    handle = server().submit(Request([5, 6], max_len=1, num_samples=3 * SLOTS))
    later = server().submit(Request([9], max_len=2, ignore_eos=True))
    fetch, calls = scheduler.Scheduler._fetch, []

    def fail_later(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("lost")
        return fetch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(scheduler.Scheduler, "_fetch", fail_later)
        with pytest.raises(RuntimeError, match="lost"):
            drain()
    assert handle.finished and {a.finish_reason for a in handle.completions} == {"length", "error"}
    drain()
    assert later.completion.finish_reason == "length"


def test_the_answers_of_others_end_with_the_error_of_a_step(monkeypatch):
    drain()
    ours = server().generate_events([Request([5], max_len=9, ignore_eos=True)])
    theirs = server().generate_events([Request([6], max_len=9, ignore_eos=True)])
    next(ours), next(theirs)
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "decode", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(ours)
    *_, last = theirs
    assert last.token_id is None and last.finish_reason == "error"
    assert "ZeroDivisionError" in last.completion.error and not server().busy


# ------------------------------------------------------------------------------ many requests


def test_requests_that_wait_take_no_memory_and_are_given_up_at_once(monkeypatch):
    drain()
    alive = weakref.WeakSet()

    class Counted(CheckedRequest):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            alive.add(self)

    monkeypatch.setattr("runner.CheckedRequest", Counted)
    events = server().generate_events([Request([5], max_len=2, num_samples=1024)] * 16000)
    for _ in range(20):
        next(events)
        assert len(alive) <= 2 * SLOTS
    assert sum(len(handle._answers) for handle in server()._scheduler._line) <= 2 * SLOTS + 20
    began = time.perf_counter()
    events.close()
    assert time.perf_counter() - began < 0.5 and not server().busy


def test_what_is_cancelled_while_it_waits_costs_nothing():
    drain()
    handles = [server().submit(Request([5], max_len=2)) for _ in range(8000)]
    began = time.perf_counter()
    for handle in reversed(handles):
        server().cancel(handle)
    assert time.perf_counter() - began < 1 and not server().busy


def test_a_long_prompt_bounds_the_steps_in_flight(monkeypatch):
    drain()
    flying, most = [0], [0]
    read, wait = scheduler.prefill, scheduler.Scheduler._wait

    def dispatched(*arguments, **options):
        flying[0] += 1
        most[0] = max(most[0], flying[0])
        return read(*arguments, **options)

    def waited(self, arrays):
        wait(self, arrays)
        flying[0] = 0

    monkeypatch.setattr(scheduler, "prefill", dispatched)
    monkeypatch.setattr(scheduler.Scheduler, "_wait", waited)
    monkeypatch.setattr(scheduler, "_schedulers", weakref.WeakSet())
    config = dataclasses.replace(TINY, sequence_len=256)
    long = make(config, slots=1, mesh=(1, 2), pad_sizes=(4,))
    (answer,) = long.generate([Request([5, 6, 7, 8] * 50, temperature=0.0, max_len=3)])
    assert 10 < most[0] <= scheduler.MOST_IN_FLIGHT
    (expected,) = make(config, slots=1).generate([Request([5, 6, 7, 8] * 50, 0.0, max_len=3)])
    assert answer.token_ids == expected.token_ids


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 8), (2, 4)], ids=str)
def test_a_prompt_of_hundreds_of_chunks_is_read_on_a_mesh(mesh):
    config = dataclasses.replace(TINY, sequence_len=1024)
    server = make(config, slots=8, mesh=mesh, pad_sizes=(4,))
    (answer,) = server.generate([Request([5, 6, 7, 8] * 250, temperature=0.0, max_len=3)])
    assert len(answer.token_ids) == 3


@pytest.mark.slow
def test_servers_that_share_devices_do_not_wait_for_each_other():
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


@pytest.mark.exhaustive
def test_forty_thousand_requests_are_answered_as_fast_as_the_first():
    drain()
    requests = [Request([5 + i % 4000], max_len=1) for i in range(40_000)]
    times = [time.perf_counter()]
    for i, _ in enumerate(server().generate_events(requests, tokens=MOST_TOKENS), 1):
        if i % 10_000 == 0:
            times.append(time.perf_counter())
    first, *_, last = np.diff(times)
    assert last < 1.25 * first


@pytest.mark.exhaustive
def test_a_million_requests_start():
    drain()
    requests = [Request([5], max_len=1, num_samples=1024)] * 1_000_000
    began = time.perf_counter()
    events = server().generate_events(requests)
    next(events)
    events.close()
    assert time.perf_counter() - began < 180

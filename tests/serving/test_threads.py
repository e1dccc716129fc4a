"""Many callers of one server, in threads or in one: each gets what it asked for, and all of it."""

import contextlib
import copy
import dataclasses
import os
import random
import signal
import threading
import time

import pytest
from test_scheduler import alone, drain, make, server

from grok1.serving.request import Request

POOL = [
    Request([5 + i] * (1 + 7 * (i % 6)), temperature=0.7, rng_seed=i, max_len=1 + i % 9)
    for i in range(24)
] + [Request("The cat", max_len=6, num_samples=3), Request([9], max_len=5, stop=("e",))]


def expected(request):
    """The answers that a request has alone."""
    seeds = range(request.rng_seed, request.rng_seed + request.num_samples)
    return [alone(dataclasses.replace(request, num_samples=1, rng_seed=s))[0] for s in seeds]


def generate(requests):
    assert server().generate(requests) == [answer for r in requests for answer in expected(r)]


def stream(requests):
    for request in requests:
        handle = server().submit(request)
        # Until it is streamed, another's step returns what is drawn.
        events = list(server().stream(handle, 4))
        assert handle.completions == expected(request)
        for sample, answer in enumerate(expected(request)):
            tokens = [event.token_id for event in events if event.sample == sample]
            assert tokens == answer.token_ids[len(answer.token_ids) - len(tokens) :]


def cancel(requests):
    for request in requests:
        handle = server().submit(request)
        server().step()
        server().cancel(handle)
        for found, answer in zip(handle.completions, expected(request), strict=True):
            assert found.token_ids == answer.token_ids[: len(found.token_ids)]


def score(requests):
    ids = [answer.prompt_ids for request in requests for answer in expected(request)]
    for scores, length in zip(server().score(ids), map(len, ids), strict=True):
        assert len(scores) == length


def in_threads(seconds, *uses):
    """Let a thread for each use go through the requests of the pool for so long."""
    failures, done = [], [0] * len(uses)
    end = time.monotonic() + seconds

    def work(number, use):
        try:
            while time.monotonic() < end:
                first = (5 * number + 3 * done[number]) % (len(POOL) - 3)
                use(POOL[first : first + 3])
                done[number] += 1
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=each) for each in enumerate(uses)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    drain()
    assert not failures
    assert min(done) > max(done) / 20, done  # none keeps the others waiting
    return done


@pytest.fixture(autouse=True)
def nothing_unread():
    for request in POOL:
        expected(request)
    drain()


def test_two_threads_get_what_each_gets_alone():
    in_threads(2, generate, generate)


def test_threads_that_do_all_kinds_of_things_get_what_they_get_alone():
    in_threads(3, generate, stream, cancel, score)


@pytest.mark.exhaustive
def test_threads_get_what_each_gets_alone_for_a_minute():
    in_threads(60, generate, generate)
    in_threads(60, generate, generate, stream, stream, cancel, score)


def tokens_of(events):
    return [event.token_id for event in events]


LONG = [Request([5 + i], temperature=0.0, max_len=20, ignore_eos=True) for i in range(3)]


def test_iterators_that_take_turns_lose_nothing():
    first, second = (server().generate_events([request], tokens=1) for request in LONG[:2])
    pairs = list(zip(first, second, strict=True))
    assert [tokens_of(found) for found in zip(*pairs, strict=True)] == [
        alone(request)[0].token_ids for request in LONG[:2]
    ]


def test_generate_inside_a_loop_over_events_loses_nothing():
    found, inner = [], []
    for event in server().generate_events(LONG[:1]):
        found.append(event.token_id)
        if len(found) % 5 == 0:
            inner += server().generate(LONG[1:])
    assert found == alone(LONG[0])[0].token_ids
    assert inner == [alone(request)[0] for request in LONG[1:]] * 4


def test_a_step_returns_what_other_calls_have_drawn():
    handle = server().submit(LONG[0])
    server().generate(LONG[1:])
    found = tokens_of(server().step())
    assert len(found) > 10
    found += tokens_of(drain())
    assert found == handle.completion.token_ids == alone(LONG[0])[0].token_ids


def test_each_token_comes_from_a_stream_or_from_a_step():
    streamed, stepped = (server().submit(request) for request in LONG[:2])
    found = list(server().step()) + list(server().step())
    rest = list(server().stream(streamed))
    found += drain()
    own = [event.token_id for event in found if event.request == streamed.number]
    assert 0 < len(own) < 20 and own + tokens_of(rest) == alone(LONG[0])[0].token_ids
    own = [event.token_id for event in found if event.request == stepped.number]
    assert own == alone(LONG[1])[0].token_ids


def test_a_request_of_another_server_is_refused():
    handle = make(slots=1).submit(LONG[0])
    with pytest.raises(ValueError, match="submitted to another server"):
        list(server().stream(handle))


def test_cancelling_what_is_not_ours_is_refused():
    other = make(slots=1)
    handle = other.submit(LONG[0])
    for wrong, message in ((handle, "to another server"), (3, "expected a handle from submit")):
        with pytest.raises(ValueError, match=message):
            server().cancel(wrong)
    with pytest.raises(ValueError, match="to another server"):
        next(server().stream(handle))
    assert [event.token_id for event in other.step()]  # it still returns them
    other.cancel(copy.copy(handle))
    assert not other.step() and not other.busy


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a finalizer
def test_an_interrupted_caller_leaves_the_server_usable():
    """Wherever Ctrl-C strikes: others get all of theirs, and the same thread can ask again."""
    interrupt_often(seconds=4)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a finalizer
def test_many_interrupted_calls_leave_the_server_usable():
    interrupt_often(seconds=120)


def interrupt_often(seconds):
    wrong, right = [], []
    over = threading.Event()

    def others():
        while not over.is_set():
            found = tokens_of(server().generate_events(LONG[1:2]))
            (right if found == alone_ids else wrong).append(found)

    alone_ids = alone(LONG[1])[0].token_ids
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    thread = threading.Thread(target=others)
    thread.start()
    end, random_ = time.monotonic() + seconds, random.Random(0)
    try:
        while time.monotonic() < end:
            with contextlib.suppress(KeyboardInterrupt):
                try:
                    signal.setitimer(signal.ITIMER_REAL, random_.uniform(1e-4, 2e-2))
                    server().generate([Request([5], max_len=4, num_samples=6, ignore_eos=True)])
                    server().cancel(server().submit(LONG[0]))
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        over.set()
        thread.join(30)
        signal.signal(signal.SIGALRM, before)
    assert not thread.is_alive() and not wrong and len(right) > seconds
    drain()
    assert server().generate(LONG[:1]) == [alone(LONG[0])[0]]


def test_a_callback_that_asks_for_more_is_refused():
    events = server().generate_events(LONG[:1], phase=lambda _: server().generate(LONG[1:]))
    with pytest.raises(RuntimeError, match="called from inside another call"):
        next(events)
    assert server().generate(LONG[:1]) == [alone(LONG[0])[0]]


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_is_told_at_once():
    loaded = server()
    child = os.fork()
    if not child:
        try:
            loaded.generate(LONG[:1])
        except RuntimeError as error:
            os._exit(0 if "forked after the model was loaded" in str(error) else 2)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 10
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(ended[1]) == 0

"""Several callers of one server, in threads or in turn: each gets all of what it asked for."""

import contextlib
import copy
import os
import random
import signal
import threading
import time

import pytest

from grok1.serving.request import Request
from servers import alone, drain, make, sample, server

POOL = [
    Request([5 + i] * (1 + 7 * (i % 6)), temperature=0.7, rng_seed=i, max_len=1 + i % 9)
    for i in range(12)
] + [Request("The cat", max_len=6, num_samples=3), Request([9], max_len=5, stop=("e",))]
LONG = [Request([5 + i], temperature=0.0, max_len=20, ignore_eos=True) for i in range(3)]


def expected(request):
    """Return the answers that a request gets alone."""
    return [alone(sample(request, index))[0] for index in range(request.num_samples)]


def tokens_of(events):
    return [event.token_id for event in events]


@pytest.fixture(autouse=True)
def nothing_unread():
    drain()


# ------------------------------------------------------------------------------------- in threads


def generate(requests):
    assert server().generate(requests) == [answer for r in requests for answer in expected(r)]


def stream(requests):
    for request in requests:
        handle = server().submit(request)
        # Until it is streamed, another's step returns what is drawn.
        events = list(server().stream(handle, 4))
        assert handle.completions == expected(request)
        for index, answer in enumerate(expected(request)):
            tokens = [event.token_id for event in events if event.sample == index]
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
    for request in POOL:
        expected(request)
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


def test_threads_get_what_each_gets_alone():
    in_threads(3, generate, generate, stream, cancel, score)


@pytest.mark.exhaustive
def test_threads_get_what_each_gets_alone_for_minutes():
    in_threads(60, generate, generate)
    in_threads(60, generate, generate, stream, stream, cancel, score)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a finalizer
def test_interrupted_caller_leaves_server_usable():
    """Wherever Ctrl-C strikes: others get all of theirs, and the same thread can ask again."""
    interrupt_often(seconds=2)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a finalizer
def test_interrupts_for_minutes_leave_server_usable():
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


# ----------------------------------------------------------------------------------- in one thread


def test_generate_in_a_loop_over_events_loses_no_token():
    found, inner = [], []
    for event in server().generate_events(LONG[:1]):
        found.append(event.token_id)
        if len(found) % 5 == 0:
            inner += server().generate(LONG[1:])
    assert found == alone(LONG[0])[0].token_ids
    assert inner == [alone(request)[0] for request in LONG[1:]] * 4


def test_each_token_comes_from_either_stream_or_step():
    streamed, stepped = (server().submit(request) for request in LONG[:2])
    found = list(server().step()) + list(server().step())
    rest = list(server().stream(streamed))
    found += drain()
    own = [event.token_id for event in found if event.request == streamed.number]
    assert 0 < len(own) < 20 and own + tokens_of(rest) == alone(LONG[0])[0].token_ids
    own = [event.token_id for event in found if event.request == stepped.number]
    assert own == alone(LONG[1])[0].token_ids


def test_handle_of_another_server_is_refused():
    other = make()
    handle = other.submit(LONG[0])
    for wrong, message in ((handle, "submitted to another server"), (3, "handle from submit")):
        for method in ("cancel", "stream"):
            with pytest.raises(ValueError, match=message):
                getattr(server(), method)(wrong)
    assert tokens_of(other.step())  # it still returns them
    other.cancel(copy.copy(handle))
    assert not other.step() and not other.busy


def test_callback_that_calls_the_server_is_refused():
    events = server().generate_events(LONG[:1], phase=lambda _: server().generate(LONG[1:]))
    with pytest.raises(RuntimeError, match="called from inside another call"):
        next(events)
    assert server().generate(LONG[:1]) == [alone(LONG[0])[0]]


@pytest.mark.filterwarnings("ignore:.*fork")
def test_forked_process_gets_an_error_at_once():
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

"""Threads get a lock in the order in which they asked for it."""

import _thread
import threading
import time

import pytest

from grok1.serving.fair_lock import FairLock


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def start(function, *arguments):
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def test_threads_get_the_lock_in_their_order():
    lock, order, threads = FairLock(), [], []

    def wait(number):
        with lock.held():
            order.append(number)

    with lock.held():
        for number in range(5):
            threads.append(start(wait, number))
            wait_until(lambda line=number + 2: len(lock._line) == line)
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, 3, 4]


def test_a_thread_that_asks_again_waits_for_others():
    lock, order = FairLock(), []

    def wait():
        with lock.held():
            order.append("other")

    with lock.held():
        thread = start(wait)
        wait_until(lambda: len(lock._line) == 2)
    with lock.held():
        order.append("again")
    thread.join(10)
    assert order == ["other", "again"]


def test_asking_twice_is_an_error_and_no_deadlock():
    lock = FairLock()
    with lock.held():
        with pytest.raises(RuntimeError, match="called from inside another call"), lock.held():
            pass
        assert len(lock._line) == 1
    with lock.held():
        pass


def test_an_interrupted_wait_leaves_the_lock_usable():
    lock, release = FairLock(), threading.Event()

    def hold():
        with lock.held():
            wait_until(lambda: len(lock._line) == 2)
            _thread.interrupt_main()
            release.wait(10)

    thread = start(hold)
    wait_until(lambda: len(lock._line) == 1)
    with pytest.raises(KeyboardInterrupt), lock.held():
        pass
    release.set()
    thread.join(10)
    with lock.held():
        assert len(lock._line) == 1

"""Ctrl-C is delayed in critical sections."""

import signal
import threading

import pytest

from grok1.interrupts import uninterrupted


def test_interrupt_is_delayed_until_end_of_block():
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the second one is not delayed
        done.append(2)
    with uninterrupted():
        done.append(3)
    assert done == [1, 3] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGUSR1])
def test_each_signal_is_delayed_once(first):
    both, done = (signal.SIGINT, signal.SIGUSR1), []
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted(*both):
            for number in both:
                signal.raise_signal(number)
                done.append(number)
            signal.raise_signal(first)
            done.append(first)
        assert done == [*both]
        assert {signal.getsignal(number) for number in both} == {signal.default_int_handler}
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_interrupt_replaces_an_exception_of_the_block():
    with pytest.raises(KeyboardInterrupt) as caught, uninterrupted():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("as well")
    assert isinstance(caught.value.__context__, ValueError)


def test_threads_and_ignored_ctrl_c_are_left_alone():
    found = []

    def look():
        with uninterrupted():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        look()
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == [signal.default_int_handler, signal.SIG_IGN]

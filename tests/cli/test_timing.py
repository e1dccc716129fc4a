"""Arrival times of tokens, and the lines about them."""

import contextlib
import re

import pytest

from commands import COUNTED
from grok1.cli import timing


def test_first_and_later_tokens_are_counted_apart(clock):
    times = timing.Timing()
    for second, request in ((2, 0), (2.5, 1), (2.6, 0), (2.7, 0), (6, 2), (6.2, 1)):
        clock[0] = 100 + second
        times.take(request, prompt=4)
    clock[0] = 110
    assert times.block([("slots in use", "2.0 of 8")]).splitlines() == [
        "time to first token  median 2.50 s, largest 6.00 s, of 3 answers",
        "prompts              12 tokens in 6.00 s, 2.0 tokens/s, compilation included",
        "between tokens       median 600.0 ms, 99 % 3700.0 ms",
        "answers              6 tokens, 1.2 tokens/s",
        "slots in use         2.0 of 8",
    ]
    assert times.line() == (
        "6 tokens in 10.00 s, compilation included: 2.00 s to the first token, then 1.2 tokens/s"
    )
    assert re.fullmatch(COUNTED, times.line() + "\n")


def test_first_two_tokens_come_together_with_own_times(clock):
    """The model is compiled for the second one, which takes seconds."""
    left, waiting = [1, 2, 3], []

    def ask():
        clock[0] += 1
        return left.pop(0) if left else None

    @contextlib.contextmanager
    def shown():
        yield
        waiting.append(len(left))

    found = timing.arrivals(ask, shown())
    assert next(found) == (1, 101) and left == [3] and waiting == [1]
    assert [*found] == [(2, 102), (3, 103)]
    assert [*timing.arrivals(lambda: None, shown())] == []


def test_interrupt_does_not_lose_the_first_token():
    left = [1]

    def ask():
        if not left:
            raise KeyboardInterrupt
        return left.pop()

    found = timing.arrivals(ask, contextlib.nullcontext())
    assert next(found)[0] == 1
    with pytest.raises(KeyboardInterrupt):
        next(found)


@pytest.mark.parametrize("at_a_time", [1, 8])
def test_tokens_that_come_together_are_mentioned(at_a_time, clock):
    times = timing.Timing(at_a_time)
    for _ in range(2):
        clock[0] += 1
        times.take(0)
    assert ("; they come up to 8 at a time\n" in times.block()) == (at_a_time == 8)


def test_rows_without_values_are_left_out(clock):
    times = timing.Timing()
    assert times.block() == ""
    assert times.line() == "0 tokens in 0.00 s, compilation included: 0.00 s to the first"
    clock[0] += 1
    times.take(0)
    assert times.block() == "time to first token  median 1.00 s, largest 1.00 s, of 1 answers"
    assert times.line() == "1 tokens in 1.00 s, compilation included: 1.00 s to the first"


def test_percentile_is_one_of_the_values():
    for percent, value in ((0, 1), (1, 1), (50, 50), (99, 99), (100, 100)):
        assert timing.percentile(range(100, 0, -1), percent) == value


def test_times_of_many_tokens_take_little_memory(clock, monkeypatch):
    """Some of the intervals are kept, from the whole run."""
    monkeypatch.setattr(timing, "MOST_INTERVALS", 100)
    times = timing.Timing()
    for answer in range(200):
        for token in range(10):
            clock[0] += 0.001 * (answer + 1)
            times.take(answer, ended=token == 9)
    assert 50 <= len(times.between) <= 100 and not times._latest and len(times.first) == 200
    assert timing.statistics.median(times.between) == pytest.approx(0.1, rel=0.1)
    assert "between tokens       median 10" in times.block()

"""Arrival times of tokens: for the last line of a run, and for --stats."""

import array
import collections
import contextlib
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

Result = TypeVar("Result")

MOST_INTERVALS = 2**20  # kept; beyond it only every second, fourth, ... one is


def arrivals(
    ask: Callable[[], Result | None],
    waiting: contextlib.AbstractContextManager[object],
    together: int = 2,
) -> Iterator[tuple[Result, float]]:
    """Return an iterator over the results of `ask()` until None, with their arrival times.

    The first `together` ones are collected inside the context `waiting` and yielded together: at a
    first start, compiling the step for second tokens would delay the second event by seconds.
    """
    first: collections.deque[tuple[Result, float]] = collections.deque()
    event: Result | None = None
    try:
        with waiting:
            while len(first) < together and (event := ask()):
                first.append((event, time.perf_counter()))
    finally:  # also after Ctrl-C, so that no event is lost
        while first:  # and no reference is kept
            yield first.popleft()
    while event and (event := ask()):
        yield event, time.perf_counter()


class Timing:
    """Arrival times of the tokens of a run, counted from the creation of this object.

    at_a_time: how many tokens of an answer may arrive together.
    """

    def __init__(self, at_a_time: int = 1) -> None:
        self.at_a_time = at_a_time
        self.began = time.perf_counter()
        self.tokens = self.prompts = 0  # number of tokens drawn, and of prompt tokens read
        self.first = array.array("d")  # seconds to the first token of each answer
        self.between = array.array("d")  # seconds between the tokens of an answer
        self.last = 0.0
        self._every = 1  # `between` has one of this many intervals
        self._latest: dict[Hashable, float] = {}  # of each unfinished answer

    def take(
        self, answer: Hashable, ended: bool = False, prompt: int = 0, at: float | None = None
    ) -> None:
        """Record the arrival of a token of an answer; `ended` marks the last one.

        prompt: number of prompt tokens read for the first one. at: by time.perf_counter; None: now.
        """
        self.last = now = (time.perf_counter() if at is None else at) - self.began
        self.tokens += 1
        before = self._latest.pop(answer, None)
        if before is None:
            self.first.append(now)
            self.prompts += prompt
        elif self.tokens % self._every == 0:
            self.between.append(now - before)
            if len(self.between) > MOST_INTERVALS:
                self.between = self.between[::2]
                self._every *= 2
        if not ended:
            self._latest[answer] = now

    def line(self) -> str:
        """Return a summary in one line."""
        total = time.perf_counter() - self.began
        first = min(self.first, default=0.0)
        line = f"{self.tokens} tokens in {total:.2f} s, compilation included: {first:.2f} s to the"
        if self.tokens > 1:
            return f"{line} first token, then {self._speed():.1f} tokens/s"
        return f"{line} first"

    def _speed(self) -> float:
        """Return the number of tokens drawn per second after the first."""
        return (self.tokens - 1) / max(1e-9, self.last - min(self.first))

    def block(self, more: Sequence[tuple[str, str]] = ()) -> str:
        """Return the statistics and the names and values of `more`, one per line."""
        rows = [*self._rows(), *more]
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join(f"{name:{width}}  {value}" for name, value in rows)

    def _rows(self) -> list[tuple[str, str]]:
        rows = []
        if first := self.first:
            value = f"median {statistics.median(first):.2f} s, largest {max(first):.2f} s"
            rows.append(("time to first token", f"{value}, of {len(first)} answers"))
            if self.prompts:
                speed = f"{self.prompts / max(first):.1f} tokens/s, compilation included"
                rows.append(("prompts", f"{self.prompts} tokens in {max(first):.2f} s, {speed}"))
        if between := [1e3 * seconds for seconds in self.between]:
            value = f"median {statistics.median(between):.1f} ms"
            value += f", 99 % {percentile(between, 99):.1f} ms"
            if self.at_a_time > 1:
                value += f"; they come up to {self.at_a_time} at a time"
            rows.append(("between tokens", value))
        if self.tokens > 1:
            rows.append(("answers", f"{self.tokens} tokens, {self._speed():.1f} tokens/s"))
        return rows


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the least value that `percent` percent of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]

"""When tokens arrived: the last line of a run, and the block of --stats."""

import array
import collections
import contextlib
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

MOST_INTERVALS = 2**20  # that are kept: beyond it every second, fourth, ... one


def arrivals(
    ask: Callable[[], Any], waiting: contextlib.AbstractContextManager[Any], together: int = 2
) -> Iterator[tuple[Any, float]]:
    """Return an iterator over what `ask()` returns, to None, and the time at which each came.

    The first ones are given together, `waiting` is entered for them: at a first start the step for
    second tokens is compiled, for seconds in which nothing would follow the first one.
    """
    first: collections.deque[tuple[Any, float]] = collections.deque()
    event: Any = None
    try:
        with waiting:
            while len(first) < together and (event := ask()):
                first.append((event, time.perf_counter()))
    finally:  # after Ctrl-C, too, nothing that has come is lost
        while first:  # and none is kept
            yield first.popleft()
    while event and (event := ask()):
        yield event, time.perf_counter()


class Timing:
    """The times at which the tokens of a run arrived; it begins when this is made.

    at_a_time: how many tokens of an answer may arrive together.
    """

    def __init__(self, at_a_time: int = 1) -> None:
        self.at_a_time = at_a_time
        self.began = time.perf_counter()
        self.tokens = self.prompts = 0  # tokens, drawn and read
        self.first = array.array("d")  # of each answer, seconds from the beginning
        self.between = array.array("d")  # seconds between the tokens of an answer
        self.last = 0.0
        self._every = 1  # how many tokens there are for each that `between` has
        self._latest: dict[Hashable, float] = {}  # of each answer that goes on

    def take(
        self, answer: Hashable, ended: bool = False, prompt: int = 0, at: float | None = None
    ) -> None:
        """Note that a token of an answer is there; no other one follows if it has ended.

        prompt: how many tokens were read for its first one. at: by time.perf_counter; None: now.
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
        """Return what there was in one line."""
        total = time.perf_counter() - self.began
        first = min(self.first, default=0.0)
        line = f"{self.tokens} tokens in {total:.2f} s, compilation included: {first:.2f} s to the"
        if self.tokens > 1:
            return f"{line} first token, then {self._speed():.1f} tokens/s"
        return f"{line} first"

    def _speed(self) -> float:
        """Return how many tokens were drawn in a second, after the first."""
        return (self.tokens - 1) / max(1e-9, self.last - min(self.first))

    def block(self, more: Sequence[tuple[str, str]] = ()) -> str:
        """Return the statistics, a line each, and the names and values of `more`."""
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
    """Return the least of the values that so many percent of them do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]

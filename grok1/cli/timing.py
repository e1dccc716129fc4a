"""When tokens arrived: the last line of a run, and the block of --stats."""

import math
import statistics
import time
from collections.abc import Hashable, Sequence


class Timing:
    """The times at which the tokens of a run arrived; it begins when this is made.

    at_a_time: how many tokens of an answer may arrive together.
    """

    def __init__(self, at_a_time: int = 1) -> None:
        self.at_a_time = at_a_time
        self.began = time.perf_counter()
        self.tokens = 0
        self.first: dict[Hashable, float] = {}  # of each answer, seconds from the beginning
        self.between: list[float] = []  # seconds between the tokens of an answer
        self._latest: dict[Hashable, float] = {}

    def take(self, answer: Hashable) -> None:
        """Note that a token of an answer is there."""
        now = time.perf_counter() - self.began
        self.tokens += 1
        if answer in self.first:
            self.between.append(now - self._latest[answer])
        else:
            self.first[answer] = now
        self._latest[answer] = now

    def line(self) -> str:
        """Return what there was in one line."""
        total = time.perf_counter() - self.began
        first = min(self.first.values(), default=0.0)
        line = f"{self.tokens} tokens in {total:.2f} s, compilation included: {first:.2f} s to the"
        if self.tokens > 1:
            return f"{line} first token, then {(self.tokens - 1) / (total - first):.1f} tokens/s"
        return f"{line} first"

    def block(self, more: Sequence[tuple[str, str]] = ()) -> str:
        """Return the statistics, a line each, and the names and values of `more`."""
        rows = [*self._rows(), *more]
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join(f"{name:{width}}  {value}" for name, value in rows)

    def _rows(self) -> list[tuple[str, str]]:
        rows = []
        if first := list(self.first.values()):
            value = f"median {statistics.median(first):.2f} s, largest {max(first):.2f} s"
            rows.append(("time to first token", f"{value}, of {len(first)} answers"))
        if between := [1e3 * seconds for seconds in self.between]:
            value = f"median {statistics.median(between):.1f} ms"
            value += f", 99 % {percentile(between, 99):.1f} ms"
            if self.at_a_time > 1:
                value += f"; they come up to {self.at_a_time} at a time"
            rows.append(("between tokens", value))
        if total := max(self._latest.values(), default=0.0):
            rows.append(("tokens per second", f"{self.tokens / total:.1f}"))
        return rows


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the least of the values that so many percent of them do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]

"""What /metrics reports to Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector

from grok1.serving.request import Event

if TYPE_CHECKING:
    from grok1.serving.http.engine import Engine

FIRST = 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300  # seconds
LATER = 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10


class Metrics:
    """Counters and times of the server, in a registry of their own."""

    def __init__(self, engine: Engine):
        self._registry = to = CollectorRegistry()
        self.requests = Counter(
            "grok_requests", "Answered requests", ["path", "status"], registry=to
        )
        self.ended = Counter("grok_answers", "Answers by what ended them", ["reason"], registry=to)
        self._prompt = Counter("grok_prompt_tokens", "Tokens of prompts", registry=to)
        self._new = Counter("grok_generated_tokens", "Tokens of answers", registry=to)
        self._first = Histogram(
            "grok_time_to_first_token_seconds", "From a request to its first token",
            buckets=FIRST, registry=to,
        )  # fmt: skip
        self._later = Histogram(
            "grok_time_per_token_seconds", "From one token of an answer to the next",
            buckets=LATER, registry=to,
        )  # fmt: skip
        slots = engine.server.num_slots
        Gauge("grok_slots", "Sequences served at once", registry=to).set(slots)
        running = Gauge("grok_answers_running", "Answers that have a slot", registry=to)
        running.set_function(lambda: engine.answers - engine.waiting)
        waiting = Gauge("grok_answers_waiting", "Answers that wait for a slot", registry=to)
        waiting.set_function(lambda: engine.waiting)
        to.register(_PrefixCache(engine))

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def watch(self) -> Watch:
        """Return what counts the tokens of a request that begins now."""
        return Watch(self)


class _PrefixCache(Collector):
    """Reports how many tokens of prompts were taken over instead of read."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[CounterMetricFamily]:
        done = self._engine.server.statistics
        asked, reused = done.prompt_tokens, done.reused_tokens
        yield CounterMetricFamily(
            "grok_prefix_cache_queries", "Prompts' tokens, of all answers", value=asked
        )
        yield CounterMetricFamily(
            "grok_prefix_cache_hits", "Those copied from another prompt or answer", value=reused
        )


class Watch:
    """Counts the tokens of one request and takes their times."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._last: dict[int, float] = {}  # of each answer
        self._began = time.perf_counter()

    def take(self, event: Event) -> None:
        """Count a token."""
        now, own = time.perf_counter(), self._metrics
        if event.token_id is not None:
            own._new.inc()
            if not self._last:
                own._prompt.inc(len(event.completion.prompt_ids))
            if (last := self._last.get(event.sample)) is None:
                own._first.observe(now - self._began)
            else:
                own._later.observe(now - last)
            self._last[event.sample] = now
        if event.finish_reason is not None:
            own.ended.labels(event.finish_reason).inc()

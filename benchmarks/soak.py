"""Serve thousands of random requests, and check answers, compilations and memory.

python benchmarks/soak.py

Serves 2,000 requests on 8 slots of the demo: prompts of many lengths, settings of all kinds, one
answer or several, arriving at random times, some cancelled. They are drawn from a pool whose
answers were computed before, one request at a time. Ends with status 1 if an answer differs in any
bit from that of its request alone (for a cancelled request, from the beginning of it); if one is
lost or returned twice; if anything is compiled for a request that was answered before, even the
first one; or if the resident set (Linux) grows by 2 % or more after a warm-up of as many requests
as the pool has.
"""

import argparse
import collections
import ctypes
import dataclasses
import gc
import json
import os
import string
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402  (what follows is found by the line above)
import numpy as np  # noqa: E402

from grok1.cli.console import Parser, number, say  # noqa: E402
from model import LanguageModelConfig  # noqa: E402
from runner import Completion, Event, Handle, InferenceRunner, Request, load_server  # noqa: E402

COMPILED = "/jax/core/compile/backend_compile_duration"  # an event for each program
MOST_GROWTH = 0.02  # of the resident set
SLOTS = 8
CONTEXT = 128
PAD_SIZES = 8, 32
LONGEST_ANSWER = 40
MOST_OPEN = 4 * SLOTS  # requests at a time, in slots and queued
MOST_SILENT = 1000  # steps in a row without a token
SHOWN = 5  # failures of one kind
MIB = 1 << 20


# ------------------------------------------------------------------------------------ the requests


def draw_request(rng: np.random.Generator, config: LanguageModelConfig) -> Request:
    """Return a request with few or many settings that differ from their defaults."""
    size = config.vocab_size
    max_len = int(rng.integers(1, LONGEST_ANSWER + 1))
    room = CONTEXT - max_len

    def ids(most: int) -> list[int]:
        return rng.integers(size, size=rng.integers(1, most + 1)).tolist()

    def letters(most: int) -> str:
        return "".join(rng.choice(list(string.ascii_lowercase + " "), rng.integers(1, most + 1)))

    truncate = rng.random() < 0.1
    values = {
        "temperature": float(rng.choice([0.0, 0.5, 1.0, 1.5])),
        "top_k": int(rng.integers(1, 50)),
        "nucleus_p": float(rng.uniform(0.1, 1)),
        "min_p": float(rng.uniform(0, 0.5)),
        "repetition_penalty": float(rng.uniform(0.5, 2)),
        "presence_penalty": float(rng.uniform(-1, 2)),
        "frequency_penalty": float(rng.uniform(-0.5, 1)),
        "logit_bias": {token: float(rng.uniform(-5, 5)) for token in [config.eos_token, *ids(9)]},
        # So few that [EOS] and repeated tokens are drawn.
        "allowed_tokens": [config.eos_token, *rng.choice(size, rng.integers(9, 40)).tolist()],
        "stop": [letters(2) for _ in range(rng.integers(1, 4))],
        "stop_tokens": ids(200),
        "ignore_eos": True,
        "min_len": int(rng.integers(0, max_len + 1)),
        "num_samples": int(rng.integers(2, 4)),
        "prompt_logprobs": True,
        "top_logprobs": int(rng.integers(1, 21)),
        "parse_special": True,
    }
    chance = rng.choice([0.1, 0.4])
    chosen: dict[str, Any] = {k: value for k, value in values.items() if rng.random() < chance}
    prompt: Any = ids(2 * CONTEXT if truncate else room)
    if rng.random() < 0.3:
        prompt = letters(room - 1)  # at most one token per letter, and one for the leading space
    return Request(
        prompt,
        max_len=max_len,
        rng_seed=int(rng.integers(2**31)),
        truncate="left" if truncate else None,
        **chosen,
    )


def expected(answer: Completion, alone: Completion) -> Completion:
    """Return the expected answer: that of its request alone, cut if it was cancelled."""
    if answer.finish_reason != "cancelled":
        return alone
    count, scores, top = len(answer.token_ids), answer.prompt_logprobs, answer.prompt_top_logprobs
    return dataclasses.replace(
        alone,
        token_ids=alone.token_ids[:count],
        logprobs=alone.logprobs[:count],
        top_logprobs=alone.top_logprobs[:count],
        prompt_logprobs=None if scores is None else (alone.prompt_logprobs or [])[: len(scores)],
        prompt_top_logprobs=None if top is None else (alone.prompt_top_logprobs or [])[: len(top)],
        text=(alone.text or "")[: len(answer.text or "")],
        finish_reason="cancelled",
    )


def differing(answer: Completion, wanted: Completion) -> list[str]:
    """Return the fields that differ in any bit: a float's repr determines its bits."""
    names = [field.name for field in dataclasses.fields(Completion)]
    return [name for name in names if repr(getattr(answer, name)) != repr(getattr(wanted, name))]


# --------------------------------------------------------------------------------------- the soak


class Soak:
    """A server of requests from the pool, which keeps open requests, counts and a few failures.

    alone: the answers to each request of the pool. failures: a sentence for each.
    """

    def __init__(self, server: InferenceRunner, pool: Sequence[Request], rng: np.random.Generator):
        self.server = server
        self.pool = pool
        self.rng = rng
        self.alone = [server.generate([request]) for request in pool]
        self.submitted = 0
        self.ends: collections.Counter[str] = collections.Counter()
        self.wrong: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []
        self._open: dict[int, _Open] = {}  # by the number of the handle
        self._wanted = SLOTS  # the current target for open requests

    def serve(self, count: int) -> None:
        """Submit `count` more requests, and serve until all have ended."""
        last, silent = self.submitted + count, 0
        while self.submitted < last or self._open:
            self._arrive(last - self.submitted)
            self._cancel()
            events = self.server.step(int(self.rng.integers(1, 9)))
            for event in events:
                self._take(event)
            self._close()
            silent = 0 if events else silent + 1
            if silent == MOST_SILENT or (self._open and not self.server.busy):
                self._lose_all()
                silent = 0
        if self.server.busy:
            self._fail("busy", "the server is still busy when all requests have ended")

    def _arrive(self, left: int) -> None:
        """Submit some requests: at times slots are idle, at times requests are queued."""
        if self.rng.random() < 0.05:
            self._wanted = int(self.rng.integers(MOST_OPEN + 1))
        arriving = min(self._wanted - len(self._open), int(self.rng.integers(1, 5)), left)
        for _ in range(arriving):
            index = int(self.rng.integers(len(self.pool)))
            handle = self.server.submit(self.pool[index])
            patience = int(self.rng.integers(40)) if self.rng.random() < 0.15 else None
            self._open[handle.number] = _Open(handle, index, patience)
            self.submitted += 1

    def _cancel(self) -> None:
        """Cancel the requests whose patience has run out, some of them still queued."""
        for entry in self._open.values():
            if entry.patience is not None:
                if entry.patience == 0:
                    self.server.cancel(entry.handle)
                    entry.cancelled = True
                entry.patience -= 1

    def _take(self, event: Event) -> None:
        """Count a token of an open request."""
        entry = self._open.get(event.request)
        if entry is None or entry.cancelled:
            self._fail("late", f"a token arrived for request {event.request}, which had ended")
            return
        entry.events[event.sample] += 1
        entry.texts[event.sample] += event.text

    def _close(self) -> None:
        """Check and forget the requests that have ended."""
        ended = [entry for entry in self._open.values() if entry.handle.finished]
        for entry in ended:
            del self._open[entry.handle.number]
            self._check(entry)

    def _lose_all(self) -> None:
        """Record the open requests as lost, and cancel them."""
        for entry in self._open.values():
            self._fail("lost", f"{entry} was never answered to the end")
            self.server.cancel(entry.handle)
        self._open.clear()

    def _check(self, entry: "_Open") -> None:
        """Compare the answers to a request with those that it gets alone."""
        answers, alone = entry.handle.completions, self.alone[entry.index]
        if len(answers) != len(alone):
            self._fail("lost", f"{entry} got {len(answers)} answers instead of {len(alone)}")
            return
        for sample, (answer, whole) in enumerate(zip(answers, alone, strict=True)):
            name = f"answer {sample} to {entry}"
            self.ends[str(answer.finish_reason)] += 1
            if answer.finish_reason == "cancelled" and not entry.cancelled:
                self._fail("lost", f"{name} was cancelled unexpectedly")
            if fields := differing(answer, expected(answer, whole)):
                self._fail("differs", f"{name} differs from that alone in {', '.join(fields)}")
            if entry.events[sample] != len(answer.token_ids):
                came = f"{entry.events[sample]} events for {len(answer.token_ids)} tokens"
                self._fail("events", f"{name} came in {came}")
            if entry.texts[sample] != answer.text:
                self._fail("events", f"the text of {name} differs from that of its events")

    def _fail(self, kind: str, message: str) -> None:
        """Keep the first failures of a kind, and count them all."""
        self.wrong[kind] += 1
        if self.wrong[kind] <= SHOWN:
            self.failures.append(message)


class _Open:
    """A request that was submitted and has not ended.

    index: in the pool. patience: the number of steps after which it is cancelled; None: never.
    events, texts: the number of tokens and the text received for each of its answers.
    """

    def __init__(self, handle: Handle, index: int, patience: int | None):
        self.handle = handle
        self.index = index
        self.patience = patience
        self.cancelled = False
        self.events: collections.Counter[int] = collections.Counter()
        self.texts: collections.defaultdict[int, str] = collections.defaultdict(str)

    def __str__(self) -> str:
        return f"request {self.handle.number} (pool[{self.index}])"


# ---------------------------------------------------------------------------------- what is counted


class Compilations:
    """A counter of the programs that are compiled from now on."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, *_: Any, **__: Any) -> None:
        self.count += event == COMPILED

    def hears(self) -> bool:
        """Return whether it notices a program that is compiled now."""
        before = self.count
        jax.block_until_ready(jax.jit(lambda x: x + 1)(np.zeros(3, np.float32)))
        return self.count > before


def resident_bytes() -> int:
    """Return this process's resident set, after returning free memory to the system (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(requests: int, pool: int, seed: int, points: int) -> dict[str, Any]:
    """Serve all requests; return the figures and the failures."""
    compilations = Compilations()
    rng = np.random.default_rng(seed)
    began = time.perf_counter()
    server = load_server(
        *(ROOT / "checkpoints/demo", ROOT / "tokenizer.model"),
        slots=SLOTS,
        context=CONTEXT,
        pad_sizes=PAD_SIZES,
    )
    drawn = [draw_request(rng, server.config) for _ in range(pool)]
    server.generate(drawn[:1])
    once = compilations.count
    server.generate(drawn[:1])
    again = compilations.count - once
    soak = Soak(server, drawn, rng)
    before = compilations.count
    soak.serve(pool)  # the first concurrent requests allocate some more memory, once
    warm, resident = time.perf_counter(), [resident_bytes()]
    for point in range(points):
        soak.serve(requests * (point + 1) // points - requests * point // points)
        resident.append(resident_bytes())
    found = {
        "requests": requests,
        "warm_requests": pool,
        "answers": dict(soak.ends),
        "wrong": dict(soak.wrong),
        "compiled_before": before,
        "compiled_again": again,
        "compiled_after": compilations.count - before,
        "resident_bytes": resident,
        "growth": resident[-1] / resident[0] - 1,
        "warm_up_s": warm - began,
        "soak_s": time.perf_counter() - warm,
    }
    found["failures"] = soak.failures + judge(found, compilations.hears())
    return found


def judge(found: dict[str, Any], hears: bool) -> list[str]:
    """Return a sentence for each limit on compilations and memory that was exceeded."""
    failures = []
    if not (hears and found["compiled_before"]):
        failures.append(f"jax does not report {COMPILED}, so compilations cannot be counted")
    if found["compiled_again"]:
        times = f"{found['compiled_again']} programs were compiled"
        failures.append(f"{times} when the first request was answered a second time")
    if found["compiled_after"]:
        failures.append(f"{found['compiled_after']} programs were compiled after the warm-up")
    if found["growth"] >= MOST_GROWTH:
        limit = f"the limit is {MOST_GROWTH:.0%}"
        failures.append(f"the resident set grew by {found['growth']:.1%}; {limit}")
    return failures


# ------------------------------------------------------------------------------------- the command


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    count = number(int, 1, 10**9)
    add("--requests", type=count, default=2000, metavar="N", help="requests to serve (2000)")
    add("--pool", type=count, default=150, metavar="N", help="different requests (150)")
    add("--points", type=count, default=8, metavar="N", help="how often to measure memory (8)")
    seed = number(int, 0, 2**32 - 1)
    add("--seed", type=seed, default=0, metavar="N", help="of the requests and their arrival (0)")
    add("--json", action="store_true", help="print the figures as one JSON object")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the soak test; return 1 if anything failed."""
    options = parse_arguments()
    try:
        found = measure(options.requests, options.pool, options.seed, options.points)
    except ValueError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    if options.json:
        print(json.dumps(found))
    else:
        report(found)
    for failure in found["failures"]:
        say(f"error: {failure}")
    return 1 if found["failures"] else 0


def report(found: dict[str, Any]) -> None:
    """Print the figures as text."""
    ends = ", ".join(f"{count} {reason}" for reason, count in sorted(found["answers"].items()))
    wrong = sum(found["wrong"].values())
    seconds = f"{found['soak_s']:.0f} s after {found['warm_up_s']:.0f} s of warm-up"
    print(
        f"served       {found['requests']} requests in {seconds}, of {found['warm_requests']} more"
    )
    print(f"answers      {ends}; {wrong} things wrong")
    after, before = found["compiled_after"], found["compiled_before"]
    again = found["compiled_again"]
    print(f"compiled     {after} programs, after {before} for the warm-up, {again} of them twice")
    sizes = " ".join(f"{size / MIB:.1f}" for size in found["resident_bytes"])
    print(f"memory       {found['growth']:+.2%}, less than {MOST_GROWTH:.0%}   ({sizes} MiB)")


if __name__ == "__main__":
    sys.exit(main())

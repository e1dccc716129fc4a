"""Serve requests by HTTP: check answers and memory, measure throughput and the delay of tokens.

python benchmarks/http_server.py

Both measurements use the demo with 8 slots, a server in this process and clients in another one.

load: 64 clients send 2,000 requests of all kinds: prompts of many lengths, streams, several
answers, log-probabilities, settings of sampling. They are drawn from a pool whose answers were
computed before, one request at a time. Some requests are wrong on purpose, and some clients leave.
The same requests are answered by `generate`, without HTTP, before and after.
stream: 8 clients stream long answers at once; each token is timed from when the engine has it to
when its client has read it.

Ends with status 1 if an answer is lost, or differs in any bit from that of its request alone; if an
error was not asked for; if the resident set (Linux) grows by 2 % or more after a quarter of the
requests; if the server draws less than 0.85 of the tokens per second that `generate` does (the
mean of before and after); or if the median delay exceeds 2 ms. Needs requirements-dev.txt.
"""

import argparse
import asyncio
import collections
import concurrent.futures
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402  (what follows is found by the line above)

from grok1.cli.console import Parser, number, say  # noqa: E402
from grok1.serving.http import engine, fields, serve  # noqa: E402
from grok1.serving.http.answers import REASONS  # noqa: E402
from grok1.serving.http.app import Api  # noqa: E402
from grok1.serving.http.chat import Template  # noqa: E402
from grok1.serving.http.errors import ApiError  # noqa: E402
from grok1.serving.request import Completion, Request  # noqa: E402
from runner import InferenceRunner, load_server  # noqa: E402
from soak import resident_bytes  # noqa: E402

CONTEXT = 128
SLOTS = 8
CLIENTS = 64
LONGEST_ANSWER = 40
STREAMED = 100  # tokens of an answer whose delays are measured
PARTS = 4  # of the load, after each of which memory is measured
MOST_GROWTH = 0.02  # of the resident set, after the first part
LEAST_SHARE = 0.85  # of the tokens per second of `generate`
MOST_DELAY = 0.002  # seconds
SHOWN = 5  # failures
MIB = 1 << 20
WORDS = ("once", "upon", "a", "time", "there", "was", "the", "king", "who", "had", "three", "sons")
WRONG: tuple[dict[str, Any], ...] = (
    {"temperature": -1},
    {"prompt": [5] * (CONTEXT + 1)},
    {"colour": "red"},
    {"n": 0},
)


# ------------------------------------------------------------------------------------ the requests


def draw_body(rng: np.random.Generator) -> dict[str, Any]:
    """Return the body of a request with few or many fields."""
    length = int(rng.integers(1, LONGEST_ANSWER + 1))
    values = {
        "temperature": float(rng.choice([0.0, 0.5, 1.0])),
        "top_p": float(rng.uniform(0.1, 1)),
        "top_k": int(rng.integers(1, 50)),
        "min_p": float(rng.uniform(0, 0.5)),
        "presence_penalty": float(rng.uniform(-1, 2)),
        "frequency_penalty": float(rng.uniform(-0.5, 1)),
        "repetition_penalty": float(rng.uniform(0.8, 1.5)),
        "logit_bias": {str(rng.integers(4096)): float(rng.uniform(-5, 5)) for _ in range(3)},
        "stop": [str(word) for word in rng.choice(WORDS, 2)],
        "n": int(rng.integers(2, 4)),
        "logprobs": int(rng.integers(0, 6)),
        "echo": True,
        "ignore_eos": True,
        "stream": True,
    }
    chosen: dict[str, Any] = {k: value for k, value in values.items() if rng.random() < 0.25}
    prompt: Any = " ".join(rng.choice(WORDS, rng.integers(1, 20)))
    if rng.random() < 0.3 and "echo" not in chosen:
        prompt = rng.integers(3, 4096, rng.integers(1, CONTEXT - length)).tolist()
    seed = int(rng.integers(2**31))
    body = {"model": "demo", "prompt": prompt, "max_tokens": length, "seed": seed, **chosen}
    return body | WRONG[rng.integers(len(WRONG))] if rng.random() < 0.03 else body


class Choice(NamedTuple):
    """One answer as a client gets it. best: the highest log-probability at each token."""

    text: str
    reason: str | None
    logprobs: list[float | None] | None
    best: list[float | None] | None


def wanted(answer: Completion, asked: fields.Asked) -> Choice:
    """Return what a client has to get for an answer."""
    scores: list[float | None] = [*answer.logprobs]
    best: list[float | None] = [pairs[0][1] for pairs in answer.top_logprobs]
    text, likely = str(answer.text), answer.prompt_top_logprobs or []
    if asked.echo:
        text, scores = str(answer.prompt) + text, [*(answer.prompt_logprobs or []), *scores]
        best = [*(None if pairs is None else pairs[0][1] for pairs in likely), *best]
    given = asked.logprobs is not None
    reason = REASONS[str(answer.finish_reason)]
    return Choice(text, reason, scores if given else None, best if asked.logprobs else None)


# ------------------------------------------------------------------------------------- the clients


class Sent(NamedTuple):
    """A request. place: in the pool. leave: after how many chunks of a stream its client leaves."""

    place: int
    body: dict[str, Any]
    leave: int | None = None


class Got(NamedTuple):
    """What a client got. times: when each chunk of a stream was read, of the monotonic clock."""

    sent: Sent
    status: int
    choices: list[Choice]
    times: list[float]


def run_clients(port: int, requests: Sequence[Sent], count: int) -> list[Got]:
    """Send requests from `count` clients at once, each of which waits for its answer."""

    async def run() -> list[Got]:
        left, found = iter(requests), []

        async def client() -> None:
            for sent in left:
                found.append(await ask(port, sent))

        await asyncio.gather(*(client() for _ in range(count)))
        return found

    return asyncio.run(run())


async def ask(port: int, sent: Sent) -> Got:
    """Send a request and read its answer, with less work than a library for clients."""
    body = json.dumps(sent.body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=MIB)
    writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
    status = int((await reader.readline()).split()[1])
    parts, times = [], []
    async for line in reader:
        if line.startswith((b"data: {", b"{")):
            times.append(time.monotonic())
            parts.append(line.removeprefix(b"data: "))
            if len(parts) == sent.leave:
                break
    writer.close()
    return Got(sent, status, choices([json.loads(part) for part in parts]), times)


def choices(chunks: Sequence[dict[str, Any]]) -> list[Choice]:
    """Return the choices that an answer, or the chunks of a stream, consist of."""
    parts: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
    for chunk in chunks:
        for choice in chunk.get("choices", []):
            parts[choice["index"]].append(choice)
    return [together(parts[index]) for index in sorted(parts)]


def together(parts: Sequence[dict[str, Any]]) -> Choice:
    """Return the choice whose chunks these are."""
    text = "".join(part["text"] for part in parts)
    found = [part["logprobs"] for part in parts if part["logprobs"]]
    if not found:
        return Choice(text, parts[-1]["finish_reason"], None, None)
    scores = [score for part in found for score in part["token_logprobs"]]
    tops = [top for part in found for top in part["top_logprobs"]]
    best = [None if top is None else max(top.values()) for top in tops] if any(tops) else None
    return Choice(text, parts[-1]["finish_reason"], scores, best)


# ------------------------------------------------------------------------------------ measurements


def load_demo() -> InferenceRunner:
    """Return the demo, with all steps compiled."""
    demo = ROOT / "checkpoints/demo", ROOT / "tokenizer.model"
    server = load_server(*demo, slots=SLOTS, context=CONTEXT, pad_sizes=(16, 128))
    serve.compile_all(server)
    return server


def clients() -> concurrent.futures.Executor:
    """Return a process for the clients."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, mp_context=context)


def measure_load(server: InferenceRunner, requests: int, pool: int, seed: int) -> dict[str, Any]:
    """Send requests from many clients; return the figures and the failures."""
    rng = np.random.default_rng(seed)
    bodies = [draw_body(rng) for _ in range(pool)]
    expected = [answers_alone(server, body) for body in bodies]
    sent = [draw_sent(rng, bodies) for _ in range(requests)]
    whole = [one for one in sent if one.leave is None and expected[one.place]]
    asked = [request for one in whole for request in fields.completion(one.body)[0]]
    direct = [time_generate(server, asked)]
    statuses: collections.Counter[str] = collections.Counter()
    wrong, seconds, resident = [], 0.0, []
    api = Api(engine.Engine(server, most_waiting=4 * CLIENTS), "demo", Template())
    with serve.in_background(api) as port, clients() as process:
        for part in range(PARTS):
            own = sent[requests * part // PARTS : requests * (part + 1) // PARTS]
            process.submit(int).result()  # it has started
            began = time.perf_counter()
            got = process.submit(run_clients, port, own, CLIENTS).result()
            seconds += time.perf_counter() - began
            statuses.update(str(one.status) for one in got)
            wrong += [text for one in got if (text := difference(one, expected[one.sent.place]))]
            del got
            resident.append(resident_bytes())
    direct.append(time_generate(server, asked))
    tokens = direct[0][0]
    rates = [count / taken for count, taken in direct]
    return {
        "requests": requests,
        "statuses": dict(sorted(statuses.items())),
        "left": sum(one.leave is not None for one in sent),
        "wrong": wrong,
        "lost": requests - statuses.total(),
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "generate_tokens_per_s": rates,
        "share": tokens / seconds / (sum(rates) / len(rates)),
        "resident_bytes": resident,
        "growth": resident[-1] / resident[0] - 1,
    }


def draw_sent(rng: np.random.Generator, bodies: Sequence[dict[str, Any]]) -> Sent:
    """Choose a request, and sometimes when the client leaves."""
    place = int(rng.integers(len(bodies)))
    leaves = bodies[place].get("stream") and rng.random() < 0.1
    return Sent(place, bodies[place], int(rng.integers(1, 10)) if leaves else None)


def answers_alone(server: InferenceRunner, body: dict[str, Any]) -> list[Choice] | None:
    """Return the answers to a request that is alone on the server, None if it is refused."""
    try:
        given = fields.read_body(json.dumps(body).encode(), fields.COMPLETION)
        requests, asked = fields.completion(given)
        return [wanted(answer, asked) for answer in server.generate(requests)]
    except (ApiError, ValueError):
        return None


def time_generate(server: InferenceRunner, requests: Sequence[Request]) -> tuple[int, float]:
    """Return how many tokens `generate` draws for requests, and the seconds."""
    began = time.perf_counter()
    answers = server.generate(requests)
    return sum(len(answer.token_ids) for answer in answers), time.perf_counter() - began


def difference(got: Got, expected: list[Choice] | None) -> str | None:
    """Return what is wrong with an answer, or None."""
    name = f"request {got.sent.body}"
    if got.status != (400 if expected is None else 200):
        return f"{name} got the status {got.status}"
    if expected is None:
        return None
    if got.sent.leave is None:
        return None if got.choices == expected else f"{name} got {got.choices}, not {expected}"
    pairs = zip(got.choices, expected, strict=False)
    cut = all(whole.text.startswith(part.text) for part, whole in pairs)
    return None if cut else f"{name} got {got.choices}, which {expected} do not begin with"


def measure_stream(server: InferenceRunner, turns: int) -> dict[str, Any]:
    """Return the delays in seconds of all tokens of streams, from the engine to the client."""
    known: dict[int, list[float]] = collections.defaultdict(list)

    class TimedEngine(engine.Engine):
        """An engine that notes when it has tokens."""

        def _deliver(self, found: list[tuple[engine.Call, engine.Delivery]]) -> None:
            now = time.monotonic()
            for call, each in found:
                assert isinstance(each, tuple), each
                known[call.jobs[0].request.rng_seed].extend(now for _ in each[1])
            super()._deliver(found)

    delays: list[float] = []
    body = {"prompt": "Once upon a time", "max_tokens": STREAMED, "ignore_eos": True}
    body |= {"logprobs": 0, "stream": True}  # with log-probabilities each token has a chunk
    api = Api(TimedEngine(server, most_waiting=0), "demo", Template())
    with serve.in_background(api) as port, clients() as process:
        for turn in range(turns):
            seeds = range(turn * SLOTS, (turn + 1) * SLOTS)
            sent = [Sent(seed, body | {"seed": seed}) for seed in seeds]
            for got in process.submit(run_clients, port, sent, SLOTS).result():
                pairs = zip(known[got.sent.place], got.times, strict=True)
                delays += [read - had for had, read in pairs]
    steps = [b - a for times in known.values() for a, b in zip(times, times[1:], strict=False)]
    return {
        "tokens": len(delays),
        "delay_s": median(delays),
        "delay_90_s": float(np.quantile(delays, 0.9)),
        "step_s": median(steps),
    }


# ------------------------------------------------------------------------------------- the command


def judge(found: dict[str, Any]) -> list[str]:
    """Return a sentence for each thing that is wrong or exceeded a limit."""
    failures = []
    if load := found.get("load"):
        failures += load["wrong"][:SHOWN]
        if load["lost"]:
            failures.append(f"{load['lost']} requests were not answered")
        if load["growth"] >= MOST_GROWTH:
            limit = f"the limit is {MOST_GROWTH:.0%}"
            failures.append(f"the resident set grew by {load['growth']:.1%}; {limit}")
        if load["share"] < LEAST_SHARE:
            failures.append(
                f"the server draws {load['share']:.2f} of the tokens per second of `generate`; "
                f"the minimum is {LEAST_SHARE:g}"
            )
    if (stream := found.get("stream")) and stream["delay_s"] > MOST_DELAY:
        failures.append(
            f"a token reaches its client {1e3 * stream['delay_s']:.2f} ms after the engine has "
            f"it; the limit is {1e3 * MOST_DELAY:g} ms"
        )
    return failures


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    count = number(int, 1, 10**9)
    add("--load", action="store_true", help="measure the load of many clients")
    add("--stream", action="store_true", help="measure the delay of streamed tokens")
    add("--requests", type=count, default=2000, metavar="N", help="requests to send (2000)")
    add("--pool", type=count, default=250, metavar="N", help="different requests (250)")
    add("--turns", type=count, default=5, metavar="N", help="of the streams (5)")
    seed = number(int, 0, 2**32 - 1)
    add("--seed", type=seed, default=0, metavar="N", help="of the requests (0)")
    add("--json", action="store_true", help="print the figures as one JSON object")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of the chosen measurements."""
    found, server = {}, load_demo()
    both = not (options.load or options.stream)
    if options.stream or both:
        found["stream"] = measure_stream(server, options.turns)
    if options.load or both:
        found["load"] = measure_load(server, options.requests, options.pool, options.seed)
    return found


def main() -> int:
    """Run the benchmark; return 1 if anything failed."""
    options = parse_arguments()
    try:
        found = measure(options)
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
    failures = judge(found)
    for failure in failures:
        say(f"error: {failure}")
    return 1 if failures else 0


def report(found: dict[str, Any]) -> None:
    """Print the figures as text."""
    if stream := found.get("stream"):
        delay, later = 1e3 * stream["delay_s"], 1e3 * stream["delay_90_s"]
        print(
            f"stream       {delay:.2f} ms from the engine to the client (median of "
            f"{stream['tokens']} tokens; nine of ten {later:.2f} ms), "
            f"a step every {1e3 * stream['step_s']:.2f} ms"
        )
    if load := found.get("load"):
        statuses = ", ".join(f"{n} with {status}" for status, n in load["statuses"].items())
        print(f"served       {load['requests']} requests: {statuses}; {load['left']} clients left")
        print(f"answers      {len(load['wrong'])} wrong, {load['lost']} lost")
        direct = ", ".join(f"{rate:.0f}" for rate in load["generate_tokens_per_s"])
        print(
            f"throughput   {load['tokens_per_s']:.0f} tokens/s, generate {direct}: "
            f"{load['share']:.2f}"
        )
        sizes = " ".join(f"{size / MIB:.1f}" for size in load["resident_bytes"])
        print(f"memory       {load['growth']:+.2%}   ({sizes} MiB)")


if __name__ == "__main__":
    sys.exit(main())

"""Measure token latency while a prompt is read, the gain of batching, and the cost of the host.

python benchmarks/serving.py

latency: while one request streams, token by token, another with a prompt of 4,000 tokens arrives.
The time between two tokens of the first must be at most 1.5 times that of the longest chunk of the
prompt alone (medians of several turns; random weights, a context of 8,192).
batch: the demo with 8 slots, all busy, must draw at least 3 times as many tokens per second as
with one (median of the ratios of pairs, in turns).
host: in steps of 16 tokens, as in `generate`, the host's own work must take less than 15 % of the
time, with 1 slot and with 8 (medians).
prefix: the first token after 384 tokens that an earlier prompt began with and 16 others must come
at least 5 times sooner than without the prefix cache (the demo, chunks of at most 128; medians).

Runs all of them, unless options select some. Ends with status 1 if a limit was exceeded.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402  (what follows is found by the line above)
import numpy as np  # noqa: E402

from grok1.cli.console import Parser, number, say  # noqa: E402
from grok1.serving.scheduler import chunk_lengths  # noqa: E402
from grok1.serving.steps import MOST_TOKENS, new_state, prefill  # noqa: E402
from model import LanguageModelConfig, TransformerConfig  # noqa: E402
from runner import (  # noqa: E402
    InferenceRunner,
    ModelRunner,
    Request,
    Statistics,
    load_server,
)

MOST_CHUNKS = 1.5
LEAST_GAIN = 3.0
MOST_HOST = 0.15
LEAST_SOONER = 5.0
MEASUREMENTS = "latency", "batch", "host", "prefix"
SLOTS = 8
LONG_PROMPT = 4000
SHARED, OWN = 384, 16  # tokens of prompts that begin alike
DEMO_LEN = 200
PROMPTS = (
    *("Once upon a time", "The little rabbit", "The king", "In the middle of the night"),
    *("There was an old woman", "A fox", "The children went", "When the sun rose"),
)


# ----------------------------------------------------------------------------------------- latency


def make_long_server() -> InferenceRunner:
    """Return a runner with random int8 weights, Grok-1's context and two slots."""
    config = LanguageModelConfig(
        vocab_size=4096,
        sequence_len=8192,
        fprop_dtype=np.float32,
        model=TransformerConfig(
            emb_size=256,
            key_size=32,
            num_q_heads=8,
            num_kv_heads=4,
            num_layers=2,
            num_experts=8,
            num_selected_experts=2,
        ),
    )
    runner = ModelRunner(config, 2, None)
    sizes = (16, 128, 1024)
    # Without the prefix cache, since each turn reads the same prompt.
    server = InferenceRunner("latency", runner, None, None, pad_sizes=sizes, prefix_cache=False)
    server.initialize()
    return server


def time_chunks(server: InferenceRunner, prompt: Sequence[int]) -> list[float]:
    """Return the seconds of each chunk of a prompt that is read while nothing else runs."""
    assert server.executions is not None
    where: dict[str, Any] = {"config": server.config, "execution": server.executions.prefill}
    state = jax.block_until_ready(new_state(batch=server.num_slots, **where))
    seconds, first = [], 0
    for size in chunk_lengths(len(prompt), server.pad_sizes):
        part = prompt[first : first + size]
        tokens = np.zeros([1, size], np.int32)
        tokens[0, : len(part)] = part
        length, slot = np.array([[len(part)], [0]], np.int32)
        began = time.perf_counter()
        given = jax.device_put((tokens, length, slot))
        _, state = jax.block_until_ready(prefill(server.params, state, *given, **where))
        seconds.append(time.perf_counter() - began)
        first += size
    return seconds


def time_gaps(server: InferenceRunner, prompt: Sequence[int]) -> list[float]:
    """Return the seconds between the tokens of one request while another's prompt is read."""
    streaming = server.submit(Request([5, 6, 7], ignore_eos=True, max_len=64))
    while len(streaming.completion.token_ids) < 8:
        server.step()
    gaps, last = [], time.perf_counter()
    other = server.submit(Request(prompt, ignore_eos=True, max_len=8))
    while not other.finished:
        events = server.step()
        if any(event.request == streaming.number for event in events):
            now = time.perf_counter()
            gaps.append(now - last)
            last = now
    assert not streaming.finished, "it ended before the other's prompt was read"
    while server.busy:  # so that the server is idle when the next turn begins
        server.step()
    return gaps


def measure_latency(turns: int) -> dict[str, Any]:
    """Read a long prompt, alone and while another request streams, in turns."""
    server = make_long_server()
    prompt = np.random.default_rng(0).integers(3, server.config.vocab_size, LONG_PROMPT).tolist()
    time_chunks(server, prompt), time_gaps(server, prompt)  # compiles
    chunks, gaps = [], []
    for _ in range(turns):
        chunks.append(time_chunks(server, prompt))
        gaps.append(time_gaps(server, prompt))
    chunk = max(median(times) for times in zip(*chunks, strict=True))
    gap = median(max(turn) for turn in gaps)
    return {
        "chunks_s": chunks,
        "longest_gap_s": [max(turn) for turn in gaps],
        "chunk_s": chunk,
        "gap_s": gap,
        "ratio": gap / chunk,
    }


# ------------------------------------------------------------------------------- batch and host


def load_demo(slots: int, **options: Any) -> InferenceRunner:
    """Return the demo, warmed up."""
    demo = ROOT / "checkpoints/demo", ROOT / "tokenizer.model"
    server = load_server(*demo, slots=slots, **options)
    decode(server, MOST_TOKENS)
    return server


def decode(server: InferenceRunner, tokens: int) -> tuple[float, float]:
    """Answer as many requests as there are slots, `tokens` a step.

    Returns the tokens per second while all of them decode, and the host's share of that time.
    """
    handles = [
        server.submit(
            Request(prompt, temperature=0.7, rng_seed=seed, ignore_eos=True, max_len=DEMO_LEN)
        )
        for seed, prompt in enumerate(PROMPTS[: server.num_slots])
    ]
    while not all(handle.completion.token_ids for handle in handles):
        server.step(tokens)
    server.statistics = Statistics()
    count, began, rate, share = 0, time.perf_counter(), 0.0, 0.0
    while server.busy:  # to the end, so that the server is idle when the next turn begins
        events = server.step(tokens)
        if not any(handle.finished for handle in handles):
            count += len(events)
            rate = count / (time.perf_counter() - began)
            share = server.statistics.host_share
    return rate, share


def measure_batch(servers: dict[int, InferenceRunner], turns: int) -> dict[str, Any]:
    """Decode with one slot and with many, in turns."""
    rates: dict[int, list[float]] = {slots: [] for slots in servers}
    for _ in range(turns):
        for slots, server in servers.items():
            rates[slots].append(decode(server, MOST_TOKENS)[0])
    pairs = list(zip(rates[1], rates[SLOTS], strict=True))
    return {
        "one_slot_per_s": rates[1],
        "all_slots_per_s": rates[SLOTS],
        "ratio": median(many / one for one, many in pairs),
    }


def measure_host(servers: dict[int, InferenceRunner], turns: int) -> list[dict[str, Any]]:
    """Decode with one slot and with many, one token a step and several."""
    found = []
    for slots, server in servers.items():
        for tokens in (1, MOST_TOKENS):
            shares = [decode(server, tokens)[1] for _ in range(turns)]
            found.append(
                {"slots": slots, "tokens": tokens, "shares": shares, "share": median(shares)}
            )
    return found


# ------------------------------------------------------------------------------------------ prefix


def measure_prefix(turns: int) -> dict[str, Any]:
    """Read prompts that begin alike, with the prefix cache and without, in turns."""
    rng = np.random.default_rng(0)
    shared = rng.integers(3, 4096, SHARED).tolist()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    servers = {on: load_demo(SLOTS, pad_sizes=(16, 128), prefix_cache=on) for on in seconds}
    for turn in range(2 + turns):
        for on, server in servers.items():
            request = Request([*shared, *rng.integers(3, 4096, OWN).tolist()], max_len=1)
            began = time.perf_counter()
            server.generate([request])
            if turn > 1:  # the first ones compile
                seconds[on].append(time.perf_counter() - began)
    ratio = median(seconds[False]) / median(seconds[True])
    return {"with_s": seconds[True], "without_s": seconds[False], "ratio": ratio}


# ------------------------------------------------------------------------------------- the command


def measure(chosen: Sequence[str], turns: int) -> dict[str, Any]:
    """Return the figures of the chosen measurements."""
    found: dict[str, Any] = {}
    if "latency" in chosen:
        found["latency"] = measure_latency(turns)
    if "batch" in chosen or "host" in chosen:
        servers = {slots: load_demo(slots) for slots in (1, SLOTS)}
        if "batch" in chosen:
            found["batch"] = measure_batch(servers, turns)
        if "host" in chosen:
            found["host"] = measure_host(servers, turns)
    if "prefix" in chosen:
        found["prefix"] = measure_prefix(turns)
    return found


def judge(found: dict[str, Any]) -> list[str]:
    """Return a sentence for each limit that was exceeded."""
    failures = []
    if (latency := found.get("latency")) and latency["ratio"] > MOST_CHUNKS:
        failures.append(
            f"a token came {latency['gap_s']:.2f} s after the one before it, "
            f"{latency['ratio']:.2f} times a chunk; the limit is {MOST_CHUNKS:g}"
        )
    if (batch := found.get("batch")) and batch["ratio"] < LEAST_GAIN:
        failures.append(
            f"{SLOTS} slots draw {batch['ratio']:.2f} times as many tokens per second as one; "
            f"the minimum is {LEAST_GAIN:g}"
        )
    if (prefix := found.get("prefix")) and prefix["ratio"] < LEAST_SOONER:
        failures.append(
            f"a token after a known beginning comes {prefix['ratio']:.1f} times sooner than "
            f"without the prefix cache; the minimum is {LEAST_SOONER:g}"
        )
    for row in found.get("host", []):
        if row["tokens"] == MOST_TOKENS and row["share"] >= MOST_HOST:
            failures.append(
                f"the host takes {row['share']:.1%} of a step of {row['tokens']} tokens "
                f"(slots: {row['slots']}); the limit is {MOST_HOST:.0%}"
            )
    return failures


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--latency", action="store_true", help="measure token latency while a prompt is read")
    add("--batch", action="store_true", help="compare many slots with one")
    add("--host", action="store_true", help="measure the host's share of a step")
    add("--prefix", action="store_true", help="time prompts that begin like earlier ones")
    count = number(int, 1, 10**6)
    add("--turns", type=count, default=5, metavar="N", help="of each measurement (5)")
    add("--json", action="store_true", help="print the figures as one JSON object")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the benchmark; return 1 if a limit was exceeded."""
    options = parse_arguments()
    chosen = [name for name in MEASUREMENTS if getattr(options, name)] or MEASUREMENTS
    try:
        found = measure(chosen, options.turns)
    except ValueError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    failures = judge(found)
    if options.json:
        print(json.dumps({**found, "failures": failures}))
    else:
        report(found)
    for failure in failures:
        say(f"error: {failure}")
    return 1 if failures else 0


def report(found: dict[str, Any]) -> None:
    """Print the figures as text."""

    def row(name: str, figure: str, values: Sequence[float], form: str) -> None:
        print(f"{name:22} {figure}   ({' '.join(format(value, form) for value in values)})")

    if latency := found.get("latency"):
        longest = [max(turn) for turn in latency["chunks_s"]]
        row("chunk alone", f"{latency['chunk_s']:.2f} s", longest, ".2f")
        row("longest gap", f"{latency['gap_s']:.2f} s", latency["longest_gap_s"], ".2f")
        print(f"{'ratio':22} {latency['ratio']:.2f}, at most {MOST_CHUNKS:g}")
    if batch := found.get("batch"):
        for name, key in (("1 slot", "one_slot_per_s"), (f"{SLOTS} slots", "all_slots_per_s")):
            row(name, f"{median(batch[key]):.1f} tokens/s", batch[key], ".1f")
        print(f"{'ratio':22} {batch['ratio']:.2f}, at least {LEAST_GAIN:g}")
    if prefix := found.get("prefix"):
        for name, key in (("prefix cache", "with_s"), ("without", "without_s")):
            times = [1e3 * each for each in prefix[key]]
            row(name, f"{median(times):.1f} ms", times, ".1f")
        print(f"{'ratio':22} {prefix['ratio']:.1f}, at least {LEAST_SOONER:g}")
    for line in found.get("host", []):
        limit = f", less than {MOST_HOST:.0%}" if line["tokens"] == MOST_TOKENS else ""
        name = f"host, slots {line['slots']}, step {line['tokens']}"
        row(name, f"{line['share']:.1%}{limit}", line["shares"], ".1%")


if __name__ == "__main__":
    sys.exit(main())

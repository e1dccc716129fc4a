"""Measure prefill and decoding, relative to a straightforward form and to the machine's limits.

python benchmarks/speed.py [--config quarter|demo|grok-1-rank] [--json]

Four forms of one model run in turns, in one process: `baseline` (benchmarks/baseline.py), `plain`
(only JAX, and only the selected experts), `kernels` (grok1/kernels), and `int4`: the kernels with
experts of 4 bits, random ones except for the demo. Ratios are medians over the turns.

quarter: a quarter of Grok-1's width, 4 layers, float32 on a CPU. demo: the model of this
repository. grok-1-rank: exactly what one of eight devices stores and computes of the full model,
39.9 GB generated on the device, plus the time of two all-reduces per layer from
`limits.exchange_seconds`; with `--layers` only some layers, to test the command elsewhere.

The floor of a step is the larger of two times: the bytes that it must read (selected experts,
attention weights, filled cache and output table, as stored), divided by the bandwidth; and its
operations, divided by the rate of a product. Both limits are measured in each turn.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any


def _interrupted(*_: object) -> None:
    # At once: jax's threads would crash during interpreter shutdown, and there is nothing to save.
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _interrupted)  # also during the imports, which take seconds

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import jax  # noqa: E402  (what follows is found by the line above)
import jax.numpy as jnp  # noqa: E402
import jaxlib  # noqa: E402
import numpy as np  # noqa: E402

from baseline import Baseline  # noqa: E402
from grok1 import backend, compile_cache  # noqa: E402
from grok1.cli.console import Parser, number, say  # noqa: E402
from grok1.execution import fastest  # noqa: E402
from grok1.host_memory import available_memory  # noqa: E402
from grok1.kernels import dispatch as kernels  # noqa: E402
from grok1.ops.quantization import Params  # noqa: E402
from grok1.parameters import embedding_table, quantize_experts, shapes_with_4_bits  # noqa: E402
from grok1.serving.likely_logits import rounded_table  # noqa: E402
from grok1.serving.request import CheckedRequest, Request  # noqa: E402
from grok1.serving.scheduler import Scheduler  # noqa: E402
from grok1.serving.steps import (  # noqa: E402
    MOST_TOKENS,
    LoadedModel,
    State,
    abstract_inputs,
    apply_model,
    decode,
    device_bytes,
    first_token,
    new_state,
    prefill,
    start,
    stored_shapes,
)
from limits import (  # noqa: E402
    Limits,
    Machine,
    Work,
    decode_work,
    exchange_seconds,
    prefill_operations,
)
from model import LanguageModelConfig  # noqa: E402
from random_models import grok_1_rank, quarter, random_params, with_random_4_bits  # noqa: E402
from runner import load_server, read_model_config, with_settings  # noqa: E402

CONFIGS = "quarter", "demo", "grok-1-rank"
COMPILED = "kernels", "int4"
FORMS = "baseline", "plain", "kernels", "int4"
BATCHES = 1, 4, 16
PROMPTS = 16, 128, 1024
PROMPT = 128  # tokens in the cache when decoding begins
# The least figures of `quarter` that --check requires.
LIMITS = {
    "decode 1: plain / baseline": 6.0,
    "prefill 128: plain / baseline": 4.0,
    "decode 1: kernels / baseline": 40.0,
    "decode 1: kernels / floor": 0.7,
    "decode 16: kernels / floor": 0.6,
    "prefill 128: kernels / product rate": 0.8,
    "decode 1: int4 / kernels": 1.35,
    "decode 1: int4 / floor": 0.65,
    "decode 16: int4 / kernels": 1.0,
    "prefill 128: int4 / kernels": 1.0,
}


# ------------------------------------------------------------------------------------- the models


def make_config(options: argparse.Namespace) -> LanguageModelConfig:
    """Return the selected configuration, in the dtype for this platform."""
    if options.config == "demo":
        config = read_model_config(ROOT / "checkpoints/demo")
    else:
        config = quarter() if options.config == "quarter" else grok_1_rank(options.layers)
    on_cpu = backend.on_cpu() and options.config != "grok-1-rank"
    return with_settings(config, "float32" if on_cpu else "bfloat16", None)


def make_params(options: argparse.Namespace, config: LanguageModelConfig) -> Params:
    """Return the demo's parameters, or random ones."""
    if options.config == "demo":
        dtype = jnp.dtype(config.fprop_dtype).name
        return load_server(ROOT / "checkpoints/demo", dtype=dtype, kernels=False).params
    return random_params(config, groups=1 if options.config == "grok-1-rank" else None)


# --------------------------------------------------------------------------------- what is measured


class Form:
    """A form of the model, compiled ahead of time, and its compilation times."""

    most_tokens = MOST_TOKENS

    def __init__(self, name: str, config: LanguageModelConfig, params: Params):
        self.name, self.params, self.config = name, params, config
        self.executions = fastest(config, None, compiled=name in COMPILED)
        self.rounded = rounded_table(embedding_table(params), self.executions.decode)
        self.compile_s: dict[str, float] = {}
        self._compiled: dict[tuple[int, int | None], jax.stages.Compiled] = {}

    def compiled(self, batch: int, chunk: int | None = None) -> jax.stages.Compiled:
        """Return the program for prefill of a chunk, or for decoding, with `batch` slots."""
        key = batch, chunk
        if key not in self._compiled:
            step = decode if chunk is None else prefill
            execution = self.executions.decode if chunk is None else self.executions.prefill
            inputs = abstract_inputs(self.config, execution, batch, chunk)
            inputs = jax.tree.map(_shape, self.params), *inputs[1:]
            if chunk is None:
                inputs = *inputs, jax.tree.map(_shape, self.rounded)
            began = time.perf_counter()
            lowered = step.lower(*inputs, config=self.config, execution=execution)
            self._compiled[key] = lowered.compile()
            name = f"decode {batch}" if chunk is None else f"prefill {chunk}"
            self.compile_s.setdefault(name, time.perf_counter() - began)
        return self._compiled[key]

    def empty(self, batch: int) -> State:
        """Return the state of empty slots."""
        return new_state(config=self.config, batch=batch, execution=self.executions.decode)

    def rewound(self, state: State) -> State:
        """Return the state with nothing in the cache."""
        layers = state.memory.layers
        layers = layers._replace(step=jnp.zeros_like(layers.step))
        return state._replace(memory=state.memory._replace(layers=layers))

    def filled(self, state: State) -> float:
        """Return the mean number of filled positions of a cache."""
        return float(jnp.mean(state.memory.layers.step))

    def read(self, state: State, tokens: np.ndarray, slot: int = 0) -> State:
        """Read a prompt int32 [T] into a slot."""
        batch = state.slots.drawn.shape[0]
        length, place = np.array([len(tokens)], np.int32), np.array([slot], np.int32)
        inputs = jax.device_put((tokens[None], length, place))
        _, state = self.compiled(batch, len(tokens))(self.params, state, *inputs)
        return state

    def ready(self, prompts: list[np.ndarray]) -> State:
        """Return the state of slots that have each read a prompt and drawn one token."""
        where: dict[str, Any] = {"config": self.config, "execution": self.executions.decode}
        batch = len(prompts)
        state = self.empty(batch)
        for slot, prompt in enumerate(prompts):
            request = Request(prompt.tolist(), temperature=0.7, rng_seed=slot, ignore_eos=True)
            row = CheckedRequest(request, self.config, None).slot()
            row = row._replace(limit=jnp.int32(self.config.sequence_len))
            state = self.read(start(state, np.int32(slot), row, **where), prompt, slot)
        _, state = first_token(state, np.ones(batch, bool), **where)
        return jax.block_until_ready(state)

    def draw(self, state: State) -> State:
        """Draw `most_tokens` tokens for each slot."""
        batch = state.slots.drawn.shape[0]
        count = np.int32(self.most_tokens)
        inputs = jax.device_put((np.ones(batch, bool), count, np.array(False)))
        _, state = self.compiled(batch)(self.params, state, *inputs, self.rounded)
        return state


AnyForm = Form | Baseline


def _shape(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def random_prompt(config: LanguageModelConfig, tokens: int, seed: int) -> np.ndarray:
    """Return token ids int32 [tokens]."""
    return np.random.default_rng(seed).integers(3, config.vocab_size, tokens, dtype=np.int32)


def chosen_experts(form: Form, state: State) -> int:
    """Return how many experts, over all layers, the next step's tokens select together."""
    length = jnp.ones(state.slots.drawn.shape, jnp.int32)
    route = jax.jit(
        lambda params, state: apply_model(
            form.config, form.executions.decode, params, state.slots.token, state.memory, length,
            capture=("router_probs",),
        ).captured.router_probs
    )  # fmt: skip
    probs = np.asarray(route(form.params, state))[:, :, 0]  # [L, B, E]
    best = np.argsort(probs, axis=-1)[..., -form.config.model.num_selected_experts :]
    return sum(len(np.unique(layer)) for layer in best)


def in_turns(
    calls: dict[str, Callable[[], object]], turns: int, machine: Machine
) -> tuple[dict[str, list[float]], list[Limits]]:
    """Return the seconds of each call, and the machine's limits, for each turn.

    In each turn everything is called twice, and the second call counts: the first one is slower
    because another form has just used the memory and the caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    limits = []
    for _ in range(turns):
        limits.append(machine.limits())
        for name, call in calls.items():
            call()
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return seconds, limits


def measure_prefill(
    forms: Sequence[AnyForm], tokens: int, turns: int, machine: Machine
) -> dict[str, Any]:
    """Return the seconds that each form takes to read a prompt, and its share of the rate."""
    states: dict[str, Any] = {form.name: form.empty(1) for form in forms}
    prompt = random_prompt(forms[0].config, tokens, 0)

    def read(form: Any) -> None:
        state = form.read(form.rewound(states[form.name]), prompt)
        states[form.name] = jax.block_until_ready(state)

    calls: dict[str, Callable[[], object]] = {f.name: functools.partial(read, f) for f in forms}
    seconds, limits = in_turns(calls, turns, machine)
    work = Work(0, prefill_operations(forms[0].config, tokens))
    return _row(seconds, limits, dict.fromkeys(seconds, work))


def measure_decode(
    forms: Sequence[AnyForm], batch: int, turns: int, machine: Machine
) -> dict[str, Any]:
    """Return the seconds of each form's decode step, its least work, and its share of the floor."""
    fastest = forms[-1]
    prompts = [random_prompt(fastest.config, PROMPT, slot) for slot in range(batch)]
    states: dict[str, Any] = {form.name: form.ready(prompts) for form in forms}
    experts = {form.name: experts_of(form, forms, states, prompts) for form in forms}

    def draw(form: Any) -> None:
        states[form.name] = jax.block_until_ready(form.draw(states[form.name]))

    calls: dict[str, Callable[[], object]] = {f.name: functools.partial(draw, f) for f in forms}
    whole, limits = in_turns(calls, turns, machine)
    seconds = {form.name: [s / form.most_tokens for s in whole[form.name]] for form in forms}
    end = fastest.filled(states[fastest.name])
    filled = (PROMPT + fastest.most_tokens + end) / 2
    rounded = fastest.rounded if isinstance(fastest, Form) else None
    work = {
        form.name: decode_work(form.config, form.params, batch, filled, experts[form.name], rounded)
        for form in forms
    }
    return {"filled": filled, "experts": experts, **_row(seconds, limits, work)}


def experts_of(
    form: AnyForm, forms: Sequence[AnyForm], states: dict[str, Any], prompts: list[np.ndarray]
) -> int:
    """Return `chosen_experts` of a form, or of one with the same parameters.

    The baseline computes all experts, and selects none.
    """
    same = (one for one in forms if isinstance(one, Form) and one.params is form.params)
    chooser = next(same, None) or Form("plain", form.config, form.params)
    return chosen_experts(chooser, states.get(chooser.name) or chooser.ready(prompts))


def _row(
    seconds: dict[str, list[float]], limits: list[Limits], work: dict[str, Work]
) -> dict[str, Any]:
    """Return the record of a measurement; the shares are medians over the turns."""
    shares = {
        name: median(work[name].floor(own) / s for own, s in zip(limits, times, strict=True))
        for name, times in seconds.items()
    }
    least = {name: dataclasses.asdict(own) for name, own in work.items()}
    return {"seconds": seconds, "limits": limits, "share": shares, "work": least}


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """Return the speed of `fast` relative to `slow`, the median over the turns."""
    return median(s / f for s, f in zip(seconds[slow], seconds[fast], strict=True))


# ------------------------------------------------------------------------------------------- starts


def measure_starts(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds from a process's start to its first token, without and with caches."""
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, __file__, "--config", options.config, "--first-token"]
        if options.config == "grok-1-rank":
            command += ["--layers", str(options.layers)]
        found = []
        for _ in range(2):
            began = time.time()
            done = subprocess.run(
                command, env={**os.environ, "XDG_CACHE_HOME": home},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise ValueError(f"a start failed: {done.stderr.strip().splitlines()[-1]}")
            row = json.loads(done.stdout)
            found.append({"seconds": row["at"] - began, "peak_bytes": row["peak_bytes"]})
    cold, again = found
    return {
        "cold_s": cold["seconds"],
        "again_s": again["seconds"],
        "peak_bytes": cold["peak_bytes"],
    }


def draw_first_token(options: argparse.Namespace) -> None:
    """Start like a server, read a prompt of 128 tokens, and print the time of the first token."""
    compile_cache.enable()
    config = make_config(options)
    executions = fastest(config, None, compiled=kernels.available())
    params = make_params(options, config)
    rounded = rounded_table(embedding_table(params), executions.decode)
    model = LoadedModel(params, config, executions, 1, [PROMPT], rounded)
    engine = Scheduler(model)
    prompt = random_prompt(config, PROMPT, 0).tolist()
    request = Request(prompt, temperature=0.7, ignore_eos=True, max_len=2)
    engine.submit(CheckedRequest(request, config, None))
    while not engine.step():
        pass
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"at": time.time(), "peak_bytes": peak}))


# -------------------------------------------------------------------------------------- the command


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return all figures of a run."""
    names = [name for name in options.forms if name not in COMPILED or kernels.available()]
    if not names:
        raise ValueError("--forms: the kernels are not available here; select another form")
    config = make_config(options)
    prompts = [n for n in options.prompts or PROMPTS if n <= config.sequence_len]
    if options.prompts and prompts != list(options.prompts):
        raise ValueError(
            f"--prompts: expected at most the context of {config.sequence_len} tokens, got "
            f"{max(options.prompts)}"
        )
    prompts = [] if options.prompts == [] else prompts
    most = (config.sequence_len - PROMPT - 1) // (2 * MOST_TOKENS)
    if options.batches and options.turns > most:
        raise ValueError(
            f"--turns: expected at most {most}, which fills the context, got {options.turns}"
        )
    _check_memory(config, max([1, *options.batches]), names)
    found: dict[str, Any] = {"config": options.config, **describe_machine()}
    if options.config == "grok-1-rank":
        found["layers"] = options.layers
    if options.starts:
        found["start"] = measure_starts(options)
    forms = make_forms(options, config, names)
    machine = Machine(config)
    found["prefill"], found["decode"] = {}, {}
    found["dtype"] = jnp.dtype(config.fprop_dtype).name
    rank = options.config == "grok-1-rank"
    for tokens in prompts:
        row = measure_prefill(forms, tokens, options.turns, machine)
        if rank:
            row["exchange_s"] = exchange_seconds(config, tokens)
        found["prefill"][str(tokens)] = row
    for batch in options.batches:
        row = measure_decode(forms, batch, options.turns, machine)
        if rank:
            row["exchange_s"] = exchange_seconds(config, batch)
        found["decode"][str(batch)] = row
    rows = [row for kind in ("prefill", "decode") for row in found[kind].values()]
    limits = [own for row in rows for own in row["limits"]]
    found["bandwidth"] = median(own.bandwidth for own in limits)
    found["rate"] = median(own.rate for own in limits)
    found["compile_s"] = {form.name: form.compile_s for form in forms}
    found["figures"] = summarise(found)
    return found


def make_forms(
    options: argparse.Namespace, config: LanguageModelConfig, names: Sequence[str]
) -> list[AnyForm]:
    """Return the forms of these names, of one model."""
    params = make_params(options, config)

    def make(name: str) -> AnyForm:
        if name == "baseline":
            return Baseline(config, params)
        if name != "int4":
            return Form(name, config, params)
        make_4_bits = quantize_experts if options.config == "demo" else with_random_4_bits
        return Form(name, config, make_4_bits(params))

    return [make(name) for name in names]


def _check_memory(config: LanguageModelConfig, batch: int, names: Sequence[str]) -> None:
    """Raise ValueError if the models and one form's caches do not fit this machine."""
    free, needed = available_memory(), device_bytes(config, None, batch)
    if "int4" in names:
        stored = shapes_with_4_bits(stored_shapes(config))
        needed += device_bytes(config, None, 0, stored)
    if backend.on_cpu() and free is not None and needed > free:
        raise ValueError(
            f"the model and {batch} caches take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} "
            "GiB are free; give smaller --batches, or fewer --layers of grok-1-rank"
        )


def summarise(found: dict[str, Any]) -> dict[str, float]:
    """Return the figures by which runs are compared."""
    figures: dict[str, float] = {}
    for kind, count in (("prefill", "tokens"), ("decode", "tokens")):
        for size, row in found[kind].items():
            seconds = row["seconds"]
            for name, times in seconds.items():
                figures[f"{kind} {size}: {name} {count}/s"] = int(size) / median(times)
            if "baseline" in seconds:
                for name in seconds.keys() - {"baseline"}:
                    figures[f"{kind} {size}: {name} / baseline"] = ratio(seconds, "baseline", name)
            if {"kernels", "int4"} <= seconds.keys():
                figures[f"{kind} {size}: int4 / kernels"] = ratio(seconds, "kernels", "int4")
            of = "floor" if kind == "decode" else "product rate"
            for name, share in row["share"].items():
                figures[f"{kind} {size}: {name} / {of}"] = share
            if "exchange_s" in row:
                for name, times in seconds.items():
                    whole = median(times) + row["exchange_s"]
                    figures[f"{kind} {size}: {name}, of eight, tokens/s"] = int(size) / whole
    for name, kinds in found["compile_s"].items():
        for kind, seconds in kinds.items():
            figures[f"compile {kind}: {name} s"] = seconds
    for name, value in found.get("start", {}).items():
        figures[f"start: {name}"] = value
    return figures


def describe_machine() -> dict[str, Any]:
    """Return a description of the machine and the versions."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        with contextlib.suppress(OSError):
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
            name = names[0] if names else platform.processor()
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = ""
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": name,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "commit": commit or None,
    }


def report(found: dict[str, Any]) -> None:
    """Print the figures as a table."""
    names = list(next(iter({**found["prefill"], **found["decode"]}.values()))["seconds"])
    machine = f"{found['device']}, {found['cores']} cores, jax {found['jax']}"
    layers = f", {found['layers']} of 64 layers," if found.get("layers", 64) != 64 else ""
    print(f"{found['config']}{layers} on {machine}, commit {found['commit']}")
    print(f"{found['bandwidth'] / 1e9:.1f} GB/s, {found['rate'] / 1e9:.0f} GFLOP/s", end=" ")
    print(f"in {found['dtype']}")
    if start_ := found.get("start"):
        peak = start_["peak_bytes"] / 2**30
        print(f"first token after {start_['cold_s']:.1f} s, with the compilation cache", end=" ")
        print(f"{start_['again_s']:.1f} s; {peak:.2f} GiB at most")
    width = max(map(len, names)) + 2
    print(f"\n{'':24}" + "".join(f"{name:>{width + 16}}" for name in names))
    figures = found["figures"]
    for kind, share in (("prefill", "product rate"), ("decode", "floor")):
        for size in found[kind]:
            cells = []
            for name in names:
                rate = figures[f"{kind} {size}: {name} tokens/s"]
                part = figures[f"{kind} {size}: {name} / {share}"]
                times = figures.get(f"{kind} {size}: {name} / baseline")
                factor = "" if times is None else f"{times:.1f} x"
                cells.append(f"{rate:>{width}.1f} {part:>7.0%} {factor:>7}")
            print(f"{kind + ' ' + size + ', tokens/s':24}" + "".join(cells))
    kinds = {kind: None for own in found["compile_s"].values() for kind in own}
    for kind in kinds:
        cells = [f"{found['compile_s'][name].get(kind, math.nan):>{width}.2f}" for name in names]
        print(f"{'compile ' + kind + ', s':24}" + "".join(f"{cell}{'':16}" for cell in cells))
    print("\nThe share is of XLA's product rate (prefill) or of the floor's speed (decode).")
    if "baseline" in names:
        print("x: times the baseline's speed.")
    for name, value in figures.items():
        if "of eight" in name:
            print(f"{name}: {value:.1f} (all-reduces as modelled)")


def read_run(options: argparse.Namespace) -> dict[str, Any]:
    """Return the last run of this configuration in the file of --compare. Raises ValueError."""
    path, wanted = options.compare, options.config
    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
        rows = [row for row in rows if row["config"] == wanted and row["figures"] is not None]
        if wanted == "grok-1-rank":
            rows = [row for row in rows if row["layers"] == options.layers]
            wanted += f" of {options.layers} layers"
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"--compare: {path} holds no runs that --save has written") from None
    if not rows:
        raise ValueError(f"--compare: {path} holds no run of {wanted}")
    return rows[-1]


def compare(found: dict[str, Any], old: dict[str, Any]) -> None:
    """Print each figure next to that of an earlier run."""
    print(f"\ncompared with {old['commit']}, {old['time']}, {old['device']}:")
    for name, value in found["figures"].items():
        if name in old["figures"]:
            before = old["figures"][name]
            print(f"{name:44} {value:12.2f} {before:12.2f} {value / before:7.2f} x")


def save(path: str, line: str) -> None:
    """Append a run to a file. Raises ValueError if that fails."""
    try:
        with open(path, "a+") as file:
            file.seek(0)
            before = file.read()
            file.write("\n" + line if line and before and not before.endswith("\n") else line)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise ValueError(f"--save: {path} cannot be written ({reason})") from None


def check(found: dict[str, Any]) -> list[str]:
    """Return a sentence for each limit that was not reached."""
    figures = found["figures"]
    return [
        f"{name} is {figures[name]:.2f}, at least {least:g} is required"
        if name in figures
        else f"{name} was not measured, at least {least:g} is required"
        for name, least in LIMITS.items()
        if figures.get(name, 0) < least
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    count = number(int, 1, 10**6)
    add("--config", choices=CONFIGS, default="quarter", help="the model (quarter)")
    add("--layers", type=number(int, 1, 64), metavar="N",
        help="of grok-1-rank (64)")  # fmt: skip

    add("--forms", nargs="+", choices=FORMS, metavar="FORM", help=f"of {', '.join(FORMS)} (all)")
    add("--turns", type=count, default=5, metavar="N", help="of each measurement (5)")
    add("--batches", type=count, nargs="*", default=BATCHES, metavar="N",
        help="batch sizes of decoding, measured in turn (1 4 16)")  # fmt: skip
    add("--prompts", type=count, nargs="*", metavar="N",
        help="prompt lengths, measured in turn (16 128 1024, if the context allows)")  # fmt: skip
    add("--no-starts", dest="starts", action="store_false", help="do not measure starts")
    add("--json", action="store_true", help="print all figures as one JSON object")
    add("--save", metavar="FILE", help="append all figures to a file, one line per run")
    add("--compare", metavar="FILE", help="print ratios to the last such run in a file")
    add(
        "--check", action="store_true", help="end with status 1 if quarter's limits are not reached"
    )
    add("--first-token", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.forms is None:
        # The baseline would take too much time and memory: it computes all experts of a rank.
        options.forms = FORMS[1:] if options.config == "grok-1-rank" else FORMS
    options.forms = [name for name in FORMS if name in options.forms]
    if not options.batches and options.prompts == []:
        parser.error("nothing is left to measure: give --batches or --prompts")
    if options.compare and not Path(options.compare).is_file():
        parser.error(f"--compare: there is no file {options.compare}")
    if options.compare and options.json:
        parser.error("--compare and --json do not go together: ratios are printed as text")
    if options.check and options.config != "quarter":
        parser.error(f"--check: the limits are those of quarter, not of {options.config}")
    if options.layers is not None and options.config != "grok-1-rank":
        parser.error(f"--layers: only grok-1-rank has fewer layers, not {options.config}")
    options.layers = options.layers or 64
    return options


def main() -> int:
    """Run the benchmark; return 1 if a limit was not reached."""
    options = parse_arguments()
    try:
        if options.first_token:
            draw_first_token(options)
            return 0
        # Report unusable files before measuring for minutes.
        old = read_run(options) if options.compare else None
        if options.save:
            save(options.save, "")
        found = measure(options)
        if options.save:
            save(options.save, json.dumps(found) + "\n")
        if options.json:
            print(json.dumps(found))
        else:
            report(found)
        if old:
            compare(found, old)
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        return 2
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        say("error: too little memory for this model, or for the caches of each form")
        return 2
    failures = check(found) if options.check else []
    for failure in failures:
        say(f"error: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

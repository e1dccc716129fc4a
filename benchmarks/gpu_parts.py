"""The parts of gpu.py that are processes of their own.

python benchmarks/gpu_parts.py PART [--tiny]

prints lines, each a JSON object with one result. See gpu.py.
"""

import contextlib
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import jax  # noqa: E402  (what follows is found by the line above)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from gpu_kernels import Caches, Case, Sizes, cases  # noqa: E402
from grok1.execution import Execution  # noqa: E402
from grok1.kernels import dispatch  # noqa: E402
from grok1.kernels.gpu.tiles import (  # noqa: E402
    Ref,
    interpreted_kernels,
    load,
    run_kernel,
    store,
    whole,
)
from grok1.planning import projection  # noqa: E402
from grok1.serving.steps import apply_model, new_memory  # noqa: E402
from limits import Limits, Machine  # noqa: E402
from model import LanguageModelConfig, TransformerConfig, grok_1  # noqa: E402
from random_models import grok_1_rank, random_params  # noqa: E402
from runner import InferenceRunner, load_server, with_settings  # noqa: E402
from speed import describe_machine  # noqa: E402

GOLDEN = {"three-layers": 0.013, "twelve-layers": 0.030}  # median errors in bfloat16, see README.md
EXACT = 1e-5  # the largest error in float32
CALLS = 32  # of a kernel in one program; its weights take several times the GPU's cache
REPEATS, TRIES = 5, 3
# Plain forms are not timed: for their products the compiler need not try many kernels.
UNTUNED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
Found = Iterator[tuple[str, Any]]


def machine(_: bool) -> Found:
    """Yield what there is."""
    yield from describe_machine().items()
    yield "platform", jax.devices()[0].platform
    yield "devices", len(jax.devices())


# ---------------------------------------------------------------------------------- golden models


def golden(tiny: bool) -> Found:
    """Yield the relative error of each golden model's logits: the largest, in bfloat16 the median.

    In float32, tokens that follow a near tie between experts are left out: rounding decides it.
    """
    devices = len(jax.devices())
    meshes = ((1, 1), (1, devices)) if devices > 1 else ((1, 1),)
    runs = list(itertools.product(GOLDEN, meshes, ("float32", "bfloat16")))
    for name, mesh, dtype in runs[2:3] if tiny else runs:
        with np.load(ROOT / "tests/data/golden" / name / "golden.npz") as file:
            tokens, exact, margin = (file[k] for k in ("tokens", "exact_logits", "router_margin"))
        logits = logits_in_chunks(name, dtype, mesh, tokens)
        errors = np.linalg.norm(logits - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
        clear = (tokens > 0) & (np.minimum.accumulate(margin, axis=1) > 1e-4)
        exactly = dtype == "float32"
        error = errors[clear].max() if exactly else np.median(errors[tokens > 0])
        limit = EXACT if exactly else GOLDEN[name]
        yield f"{name}, {dtype}, mesh {mesh[0]},{mesh[1]}", {"error": finite(error), "limit": limit}


def logits_in_chunks(
    name: str, dtype: str, mesh: tuple[int, int], tokens: np.ndarray
) -> np.ndarray:
    """Return the logits of tokens [B, T] that are read as a prompt, a few, and a single one."""
    server: InferenceRunner = load_server(
        ROOT / "tests/data/golden" / name,
        dtype=dtype,
        context=tokens.shape[1],
        mesh=mesh,
        execution=Execution(kernels=dispatch.fastest(compiled=True)),
        compile_cache=False,
    )
    assert server.executions is not None
    config, execution = server.config, server.executions.prefill
    read = jax.jit(functools.partial(apply_model, config, execution))
    memory = new_memory(config=config, batch=len(tokens), execution=execution)
    logits = []
    for chunk in np.split(tokens, [40, 47], axis=1):
        found = read(server.params, chunk, memory)
        memory = found.model_state
        logits.append(np.asarray(found.logits, np.float64))
    return np.concatenate(logits, axis=1)


# ---------------------------------------------------------------------------------------- kernels


def kernels(tiny: bool) -> Found:
    """Yield the machine's limits, and each kernel's error, seconds and shares of these limits."""
    config = tiny_model() if tiny else with_settings(grok_1_rank(64), "bfloat16", None)
    limits = Machine(config).limits()
    yield "limits", limits._asdict()
    vocabulary = config.vocab_size if tiny else grok_1().vocab_size
    batches, prompt = ((2,), 80) if tiny else ((1, 8, 32), 1024)
    own = Sizes(config, random_params(config, groups=1), max(batches), vocabulary)
    wait = waiting_seconds(tiny)
    yield "wait", {"seconds": wait}
    for name, tokens, case in cases(own, batches, prompt):
        found: dict[str, Any]
        try:
            with jax.enable_x64(tiny and name == "draw_token"):  # the interpreter traces it again
                found = measure(own, case, tokens, limits, wait, tiny)
        except Exception as error:  # a compiler or driver may raise anything
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            found = {"limit": case.limit, "failed": reason}
        yield f"{name}, {tokens}", found


def tiny_model() -> LanguageModelConfig:
    """Return a model for which interpreted kernels take little time."""
    model = TransformerConfig(
        emb_size=64, key_size=16, num_q_heads=4, num_kv_heads=2, num_layers=2, num_experts=4,
        num_selected_experts=2, attn_output_multiplier=0.25,
    )  # fmt: skip
    return LanguageModelConfig(model, vocab_size=64, sequence_len=96, fprop_dtype=jnp.float32)


def measure(
    own: Sizes, case: Case, tokens: int, limits: Limits, wait: float, tiny: bool
) -> dict[str, float]:
    """Return the error of a kernel, the seconds of a call, and its shares of the limits."""
    layers = called_layers(case.layers or own.config.model.num_layers)
    caches = own.new_caches() if case.positions else ()
    arguments = jax.device_put((*case.inputs, case.weights))
    before = (caches,) if case.positions else ()
    plain = jax.jit(case.plain, compiler_options=None if tiny else UNTUNED)
    exact = jax.device_get(plain(jnp.int32(layers[-1]), *before, *arguments))
    run = chain(case, layers)
    result, caches = jax.block_until_ready(run(caches, arguments))
    found = {"error": relative_error(case, jax.device_get(result), exact), "limit": case.limit}
    times = []
    for _ in range(1 if tiny else TRIES):
        began = time.perf_counter()
        for _ in range(REPEATS):
            result, caches = run(caches, arguments)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - began) / REPEATS / len(layers))
    found["seconds"] = seconds = median(times) - wait
    found["share"] = own.bytes(case, exact) / seconds / limits.bandwidth
    if operations := own.operations(case, tokens):
        found["product share"] = operations / seconds / limits.rate
    return found


def called_layers(layers: int) -> range:
    """Return the layers that a program calls a kernel for, at most CALLS of them."""
    return range(0, layers, -(-layers // CALLS))


def chain(case: Case, layers: range) -> Callable[[Caches, tuple], tuple[Any, Caches]]:
    """Return a program that calls a kernel for one layer after another.

    Each call waits for the one before: its layer's index depends on that one's result.
    """
    step = jax.jit(case.kernel)

    def run(caches: Caches, arguments: tuple) -> tuple[Any, Caches]:
        result: Any = None
        index = jnp.int32(layers[0])
        for layer in layers:
            if result is not None:  # what is not seen of it may never have been written
                index = after(case.seen(result, *arguments[:-1]), layer)
            if case.positions:
                result, caches = step(index, caches, *arguments)
            else:
                result = step(index, *arguments)
        return result, caches

    return jax.jit(run, donate_argnums=0)


def after(result: Any, layer: int) -> jax.Array:
    """Return the index of a layer, int32 [], once a result is there; NaN or < 0 makes it 0."""
    first = jax.tree.leaves(result)[0].ravel()[0]
    bad = jnp.isnan(first) if jnp.issubdtype(first.dtype, jnp.floating) else first < 0
    return jnp.where(bad, 0, jnp.int32(layer))


def relative_error(case: Case, found: Any, exact: Any) -> float:
    """Return the norm of the difference over that of the exact values, of the worst array."""
    pairs = zip(
        *(jax.tree.leaves(case.seen(each, *case.inputs)) for each in (found, exact)), strict=True
    )
    errors = []
    for ours, theirs in pairs:
        a, b = (np.asarray(x, np.float64) for x in (ours, theirs))
        axis = -1 if case.by_token else None
        errors.append(np.median(np.linalg.norm(a - b, axis=axis) / np.linalg.norm(b, axis=axis)))
    return finite(np.max(errors))  # NaN if one of them is


def finite(error: float) -> float:
    """Return an error. Raises ValueError if it is not a number."""
    if not math.isfinite(error):
        raise ValueError("the result is not a number")
    return float(error)


# -------------------------------------------------------------------------------------- constants


def constants(tiny: bool) -> Found:
    """Yield what the time model assumes, as measured, in seconds."""
    launch = launch_seconds(tiny)
    yield "LAUNCH_S", {"seconds": launch, "assumed": projection.LAUNCH_S}

    def either(x: jax.Array) -> jax.Array:
        return lax.cond(x[0] > 0, small_kernel, functools.partial(small_kernel, added=2.0), x)

    # Beside the conditional, the program runs two operations: its predicate, and the kernel.
    seconds = slope(either, jnp.ones(128), tiny) - 2 * launch
    yield "CONDITIONAL_S", {"seconds": seconds, "assumed": projection.CONDITIONAL_S}
    yield "BANDWIDTH_SHARE", projection.BANDWIDTH_SHARE
    if len(jax.devices()) > 1:
        for tokens in (1,) if tiny else (1, 32, 1024):
            yield f"all-reduce of [{tokens}, 6144]", all_reduce_seconds(tokens, launch, tiny)


def small_kernel(x: jax.Array, added: jax.Array | float = 1.0) -> jax.Array:
    """Add a number to x, float32 [128], in a kernel, which the compiler cannot join to another."""

    def kernel(x_ref: Ref, added_ref: Ref, out_ref: Ref) -> None:
        columns = whole(128)
        store(out_ref, load(x_ref, columns) + load(added_ref), columns)

    arrays = [x, jnp.asarray(added, jnp.float32)]
    out = [(x.shape, x.dtype)]
    return run_kernel(kernel, (1,), out, arrays, name="small", warps=4, stages=1)[0]


def launch_seconds(tiny: bool) -> float:
    """Return the seconds of a small kernel that waits for the one before."""
    return slope(small_kernel, jnp.ones(128), tiny)


def waiting_seconds(tiny: bool) -> float:
    """Return the seconds that `after` adds to a call in `chain`."""

    def call(x: jax.Array) -> jax.Array:
        return small_kernel(x, after(x, 1).astype(jnp.float32))

    return max(0.0, slope(call, jnp.ones(128), tiny) - launch_seconds(tiny))


def all_reduce_seconds(tokens: int, launch: float, tiny: bool) -> dict[str, Any]:
    """Return the seconds of an all-reduce of float32 [tokens, 6144] over all devices.

    Each device adds its own numbers before each sum: the compiler drops a sum of what is equal on
    all devices. That is a launch, and for a large array also some time for reading.
    """
    mesh = Mesh(np.array(jax.devices()), ("all",))

    def add(x: jax.Array, own: jax.Array) -> jax.Array:
        return lax.psum((x + own) / mesh.size, "all")

    own = jnp.ones([mesh.size, tokens, 6144])
    add_all = jax.shard_map(add, mesh=mesh, in_specs=(P(), P("all")), out_specs=P())
    own = jax.device_put(own, jax.NamedSharding(mesh, P("all")))
    seconds = slope(lambda x, own: add_all(x, own), jnp.ones([1, tokens, 6144]), tiny, own) - launch
    assumed = sorted(projection.COLLECTIVE_S.values())
    return {"seconds": seconds, "bytes": tokens * 6144 * 4, "assumed if small": assumed}


def slope(call: Callable[..., jax.Array], x: jax.Array, tiny: bool, *others: jax.Array) -> float:
    """Return the seconds of one more call, x -> x, in a program of calls in succession."""
    counts, seconds = (2, 6) if tiny else (8, 56), []
    for count in counts:

        def run(x: jax.Array, *others: jax.Array, count: int = count) -> jax.Array:
            for _ in range(count):
                x = call(x, *others)
            return x

        program, times = jax.jit(run), []
        jax.block_until_ready(program(x, *others))
        for _ in range(3 if tiny else 50):
            began = time.perf_counter()
            jax.block_until_ready(program(x, *others))
            times.append(time.perf_counter() - began)
        seconds.append(median(times))
    return (seconds[1] - seconds[0]) / (counts[1] - counts[0])


PARTS = {f.__name__: f for f in (machine, golden, kernels, constants)}


def main() -> None:
    """Run a part, and print its results."""
    name, tiny = sys.argv[1], "--tiny" in sys.argv
    with interpreted_kernels() if tiny else contextlib.nullcontext():
        for key, value in PARTS[name](tiny):
            print(json.dumps({key: value}), flush=True)


if __name__ == "__main__":
    main()

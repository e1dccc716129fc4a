"""Plan whether a model fits a mesh, and what a token costs there, without weights or accelerators.

Sizes follow from the shapes of the parameters and their shardings. Prefill and decode are compiled
ahead of time for as many virtual CPU devices as the mesh has: temporaries and exchanges between
devices are read from the compiled programs. On a GPU temporaries differ and are mostly smaller,
since XLA for CPUs converts some arrays for its products; the rest is the same.

Sizes are in bytes, and per device unless stated otherwise.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

from grok1.execution import fastest
from grok1.formats import forms, layout
from grok1.formats.pickle_file import nbytes
from grok1.ops.quantization import QuantizedWeight8bit, Shapes
from grok1.parallel.sharding import (
    AnyMesh,
    SpecTree,
    abstract_mesh,
    make_mesh,
    named_shardings,
    parameter_specs,
)
from grok1.planning import hlo
from grok1.serving.memory_budget import available_memory
from grok1.serving.steps import (
    abstract_inputs,
    decode,
    device_bytes,
    memory_specs,
    new_memory,
    prefill,
    stored_shapes,
)

if TYPE_CHECKING:
    from model import LanguageModelConfig

Tree = TypeVar("Tree")

PREFILL_CHUNK = 1024
MOST_DEVICES = 128
MOST_ROWS = 4096  # sequences on each part of the data axis
MANY = 16
# The fraction of a GPU's memory that jax preallocates by default.
PREALLOCATED = 0.75
KINDS = ("attention", "experts", "embedding", "norms and router", "scales")

Sizes = tuple[int, int]  # of the mesh: (data, model)


@dataclasses.dataclass(frozen=True)
class Step:
    """What a compiled program takes in addition to weights and cache, and what devices exchange.

    temporaries: bytes that it needs while it runs. exchanged: for each kind of collective, the
    number of exchanges and the bytes that they return on each device, per run.
    """

    temporaries: int
    exchanged: dict[str, dict[str, int]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The result of `make_plan`.

    mesh: (data, model). weights: by kind. cache: keys, values and their masks. steps: "prefill" and
    "decode". peak: the most that is held at once. token: the cost of one decode step at the end of
    the context: floating-point operations, bytes read on a device, and the minimum seconds at the
    given bandwidth. largest: the largest batch that fits this context; for shorter contexts, a
    batch that fits but may not be the largest. files: what the checkpoint directory holds, None if
    none was given. host: free disk and memory of this machine, and the most memory that loading
    takes in addition to the parameters. verdict: one sentence.
    """

    parameters: int
    mesh: Sizes
    devices: int
    batch: int
    context: int
    dtype: str
    prefill_chunk: int
    weights: dict[str, int]
    cache: int
    steps: dict[str, Step]
    peak: int
    device_memory: int
    fits: bool
    token: dict[str, float]
    largest: list[dict[str, int]]
    files: dict[str, Any] | None
    host: dict[str, int | None]
    verdict: str


def make_plan(
    config: LanguageModelConfig,
    sizes: Sizes | None,
    *,
    batch: int | None = None,
    device_memory: int = 80 << 30,
    bandwidth: float = 3.35e12,
    directory: Path | None = None,
) -> Plan:
    """Return a plan for a mesh of (data, model) `sizes`, or, if None, for the smallest that fits.

    config: its sequence_len is the context. batch: sequences at once, over the entire mesh; by
    default one for each part of the data axis. device_memory: bytes. bandwidth: of a device's
    memory, in bytes a second. directory: a checkpoint to look for; weights found there are counted
    in their stored dtypes, others as int8 with scales.

    Needs as many jax devices as the mesh has. Raises ValueError for an invalid mesh or batch.
    """
    stored = None if directory is None else layout.shapes_in(directory, config.param_shapes())
    if sizes is None:
        sizes = smallest_mesh(config, batch or 1, device_memory, stored)
    check_sizes(config, sizes)
    batch = batch or sizes[0]
    if batch % sizes[0] or batch > MOST_ROWS * sizes[0]:
        raise ValueError(
            f"batch: expected a multiple of the mesh's data axis {sizes[0]}, of at most "
            f"{MOST_ROWS * sizes[0]}, got {batch}"
        )
    # XLA aborts the process if the size of an array does not fit 64 bits.
    if cache_bytes(config, (1, 1), MANY * batch) >= 1 << 62:
        raise ValueError(
            f"batch: expected one whose cache can be counted in bytes, got {batch} sequences of "
            f"{config.sequence_len} tokens; plan for fewer or a shorter context"
        )
    steps, known = compile_steps(config, sizes, batch, stored)
    weights = weight_bytes(config, sizes, stored)
    cache = cache_bytes(config, sizes, batch)
    held = sum(weights.values())
    most = max(step.temporaries for step in steps.values())
    peak = held + cache + most
    files = None if directory is None else find_files(config, directory, stored)
    found = Plan(
        parameters=parameter_count(config),
        mesh=sizes,
        devices=math.prod(sizes),
        batch=batch,
        context=config.sequence_len,
        dtype=jax.numpy.dtype(config.fprop_dtype).name,
        prefill_chunk=min(PREFILL_CHUNK, config.sequence_len),
        weights=weights,
        cache=cache,
        steps=steps,
        peak=peak,
        device_memory=device_memory,
        fits=peak <= device_memory,
        token=token_cost(config, sizes, batch, bandwidth, stored),
        largest=largest_batches(
            config, sizes, device_memory - held, steps["prefill"].temporaries, known
        ),
        files=files,
        host={**host_resources(directory), "loading": loading_bytes(config, sizes, stored)},
        verdict="",
    )
    return dataclasses.replace(found, verdict=verdict(config, found, stored))


# ----------------------------------------------------------------------------------- on which mesh


def mesh_of(config: LanguageModelConfig, sizes: Sizes) -> AnyMesh:
    """Return the mesh of these sizes, without devices."""
    return abstract_mesh(*sizes, num_kv_heads=config.model.num_kv_heads)


def check_sizes(config: LanguageModelConfig, sizes: Sizes) -> None:
    """Raise ValueError that names valid sizes if the model cannot be split over such a mesh."""
    config.check_mesh(mesh_of(config, sizes))
    if math.prod(sizes) > MOST_DEVICES:
        raise ValueError(
            f"mesh: expected at most {MOST_DEVICES} devices, got {sizes[0]} x {sizes[1]}; "
            "plan for a shorter data axis: each of its parts holds the same"
        )


def _options(config: LanguageModelConfig) -> list[Sizes]:
    """Return the meshes from which `smallest_mesh` chooses, the smallest first."""
    check_sizes(config, (1, 1))  # whether the configuration has such axes at all
    return [(1, n) for n in config.model_axis_sizes() if n <= MOST_DEVICES]


def devices_for(config: LanguageModelConfig, sizes: Sizes | None) -> int:
    """Return how many jax devices a plan for a mesh needs. Raises ValueError as make_plan does."""
    if sizes is None:
        return max(map(math.prod, _options(config)))
    check_sizes(config, sizes)
    return math.prod(sizes)


def smallest_mesh(
    config: LanguageModelConfig, batch: int, device_memory: int, stored: Shapes | None = None
) -> Sizes:
    """Return the smallest mesh on which weights and cache fit, or else the largest mesh."""
    options = _options(config)
    for sizes in options:
        # Temporaries, drivers and the buffers of collectives need memory, too.
        if fixed_bytes(config, sizes, batch, stored) <= 0.9 * device_memory:
            return sizes
    return options[-1]


# -------------------------------------------------------------------------------------- by formula


def kind_of(module: str) -> str:
    """Return the kind of a module's parameters, one of KINDS, except for their scales."""
    if "multi_head_attention" in module:
        return "attention"
    if "norm" in module or "router" in module:
        return "norms and router"
    return "embedding" if "embed" in module else "experts"


def by_kind(tree: Shapes, size: Callable[[jax.ShapeDtypeStruct], int]) -> dict[str, int]:
    """Add up `size(array)` over a parameter tree, by kind."""
    sizes = dict.fromkeys(KINDS, 0)
    for module, leaves in tree.items():
        for leaf in leaves.values():
            if isinstance(leaf, QuantizedWeight8bit):
                sizes["scales"] += size(leaf.scales)
                leaf = leaf.weight
            sizes[kind_of(module)] += size(leaf)
    return sizes


def parameter_count(config: LanguageModelConfig) -> int:
    """Return the number of parameters, without scales."""
    count = by_kind(config.param_shapes(), lambda array: math.prod(array.shape))
    return sum(count.values()) - count["scales"]


def on_device(tree: Tree, specs: SpecTree, mesh: AnyMesh) -> Tree:
    """Return the shape of each array's shard on one device."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype),
        tree,
        named_shardings(specs, mesh),
    )


def weight_bytes(
    config: LanguageModelConfig, sizes: Sizes, stored: Shapes | None = None
) -> dict[str, int]:
    """Return the bytes of the parameters on one device, by kind."""
    return by_kind(_own_weights(config, sizes, stored), nbytes)


def _own_weights(config: LanguageModelConfig, sizes: Sizes, stored: Shapes | None) -> Shapes:
    mesh, shapes = mesh_of(config, sizes), stored_shapes(config, stored)
    return on_device(shapes, parameter_specs(shapes, config.partition_rules(mesh), mesh), mesh)


def cache_bytes(config: LanguageModelConfig, sizes: Sizes, batch: int) -> int:
    """Return the bytes of the memory of `batch` sequences on one device."""
    memory = jax.eval_shape(lambda: new_memory(config=config, batch=batch))
    own = on_device(memory, memory_specs(config), mesh_of(config, sizes))
    return sum(map(nbytes, jax.tree.leaves(own)))


def fixed_bytes(
    config: LanguageModelConfig, sizes: Sizes, batch: int, stored: Shapes | None = None
) -> int:
    """Return the bytes of parameters and cache on one device."""
    return device_bytes(config, mesh_of(config, sizes), batch, stored)


def loading_bytes(config: LanguageModelConfig, sizes: Sizes, stored: Shapes | None = None) -> int:
    """Return a bound on the host memory of loading, in addition to the parameters on devices.

    Four times the largest part of a file that a device holds, plus 256 MiB; see loading.py.
    """
    mesh, shapes = mesh_of(config, sizes), stored or config.param_shapes()
    own = on_device(shapes, parameter_specs(shapes, config.partition_rules(mesh), mesh), mesh)
    slices = [
        nbytes(array) // (array.shape[0] if module.startswith(layout.STACKED) else 1)
        for module, leaves in own.items()
        for array in jax.tree.leaves(leaves)
    ]
    return 4 * max(slices) + (256 << 20)


def token_cost(
    config: LanguageModelConfig,
    sizes: Sizes,
    batch: int,
    bandwidth: float,
    stored: Shapes | None = None,
) -> dict[str, float]:
    """Return the cost of a decode step when the context is full.

    flops: floating-point operations per token, on all devices together: two for each weight that
    the token uses, and for each product in its attention.
    bytes: what one device must read in a decode step: its part of the cache and of all weights, of
    experts only those that `batch` tokens are expected to use if all are equally likely. seconds:
    the minimum time to read them.
    """
    model = config.model
    used = model.num_selected_experts / max(1, model.num_experts)
    weights = by_kind(config.param_shapes(), lambda array: math.prod(array.shape))
    met = weights["attention"] + weights["experts"] * used + weights["embedding"]
    if model.num_experts > 1:
        met += model.num_layers * model.emb_size * model.num_experts  # the router
    scores = model.num_layers * model.num_q_heads * model.key_size * config.sequence_len
    read = by_kind(_own_weights(config, sizes, stored), nbytes)
    tokens = batch // sizes[0]
    experts = read.pop("experts") * (1 - (1 - used) ** tokens if model.num_experts > 1 else 1)
    read_bytes = sum(read.values()) + experts + cache_bytes(config, sizes, batch)
    return {
        "flops": 2 * met + 2 * 2 * scores,
        "bytes": read_bytes,
        "seconds": read_bytes / bandwidth,
        "bandwidth": bandwidth,
    }


def largest_batches(
    config: LanguageModelConfig, sizes: Sizes, room: int, prompt: int, known: dict[int, int]
) -> list[dict[str, int]]:
    """Return the largest batch known to fit, for the given context and for shorter ones.

    room: bytes left over after the weights. prompt: the temporaries of prefill, for any batch.
    known: {batch: the temporaries of decode with the full context}.
    """
    data = sizes[0]
    batches = sorted(known)
    last = batches[-1]

    def taken(each: float, rows: int) -> float:
        """Return the bytes that `rows` sequences take, each with a cache of `each` bytes."""
        # Temporaries are the maximum of several phases, each linear in the sequences, and so
        # convex. Chords are upper bounds; beyond the last point, so is the ray from the origin.
        # Shorter contexts take less; how much is unknown without compiling them.
        between = float(np.interp(rows, batches, [known[batch] for batch in batches]))
        beyond = known[last] * rows / last if rows > last else 0.0
        return rows * each + max(prompt, between, beyond) if rows else 0.0

    found = []
    context = config.sequence_len
    while context >= min(PREFILL_CHUNK, config.sequence_len):
        shorter = dataclasses.replace(config, sequence_len=context)
        each = cache_bytes(shorter, sizes, data) / data
        # More sequences take more memory, so that bisection finds the most that fit.
        multiples = range(0, max(0, int(room / each)) + data, data)
        fitting = (
            bisect.bisect_right(multiples, float(room), key=functools.partial(taken, each)) - 1
        )
        found.append({"batch": multiples[max(0, fitting)], "context": context})
        context //= 2
    return found


# ------------------------------------------------------------------------------------ by compiling


def compile_steps(
    config: LanguageModelConfig, sizes: Sizes, batch: int, stored: Shapes | None = None
) -> tuple[dict[str, Step], dict[int, int]]:
    """Compile prefill and decode -> their Steps, and the temporaries of decode by batch."""
    mesh = make_mesh(sizes, num_kv_heads=config.model.num_kv_heads)
    executions = fastest(config, mesh, compiled=False)
    chunk = min(PREFILL_CHUNK, config.sequence_len)

    def lower(rows: int, chunk: int | None = None) -> jax.stages.Lowered:
        execution = executions.decode if chunk is None else executions.prefill
        inputs = abstract_inputs(config, execution, rows, chunk, stored)
        step = decode if chunk is None else prefill
        return step.lower(*inputs, config=config, execution=execution)

    def compile_step(lowered: jax.stages.Lowered, rows: int) -> Step:
        program = hlo.compile_for_inspection(lowered)
        return _read_step(program, fixed_bytes(config, sizes, rows, stored))

    batches = sorted({sizes[0], batch, MANY * batch})
    # XLA compiles without the GIL, while this thread lowers the next step.
    with ThreadPoolExecutor() as pool:
        # A chunk belongs to one prompt, however many sequences there are.
        prompts = pool.submit(compile_step, lower(batch, chunk), batch)
        decodes = {rows: pool.submit(compile_step, lower(rows), rows) for rows in batches}
    steps = {"prefill": prompts.result(), "decode": decodes[batch].result()}
    return steps, {rows: job.result().temporaries for rows, job in decodes.items()}


def _read_step(program: Any, held: int) -> Step:
    memory = program.memory_analysis()
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    # Settings and results are small, and are counted as temporaries.
    peak = arguments + outputs - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    count: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for operation in hlo.collectives(program.as_text()):
        if operation.devices == 1:
            continue
        count[operation.opcode] += operation.times
        sizes[operation.opcode] += operation.times * operation.nbytes
    exchanged = {kind: {"count": count[kind], "bytes": sizes[kind]} for kind in sorted(count)}
    return Step(temporaries=peak - held, exchanged=exchanged)


# ------------------------------------------------------------------------------------ this machine


def find_files(
    config: LanguageModelConfig, directory: Path, stored: Shapes | None = None
) -> dict[str, Any]:
    """Return which files of a checkpoint are in DIR, and which are missing or invalid.

    form: "released" or "safetensors"; without a checkpoint, "released" with all files missing.
    problem: the error found once all files are present, else None.
    """
    records = layout.files(stored or config.param_shapes())
    form = forms.form(directory) or forms.RELEASED
    found: dict[str, Any] = {
        "directory": str(directory),
        "form": form,
        "expected_bytes": sum(record.size for record in records),
        "missing": [],
        "wrong_size": [],
        "problem": None,
    }
    if form == forms.RELEASED:
        folder, there = directory / forms.FOLDER, {}
        if folder.is_dir():
            entries = [entry for entry in os.scandir(folder) if os.path.isfile(entry)]
            there = {entry.name: entry.stat().st_size for entry in entries}
        here = [record for record in records if record.file in there]
        found |= {
            "expected": len(records),
            "found": len(here),
            "found_bytes": sum(there[record.file] for record in here),
            "missing": [record.file for record in records if record.file not in there],
            "wrong_size": [record.file for record in here if there[record.file] != record.size],
        }
    if not found["missing"] and not found["wrong_size"]:
        try:
            layout.check_files(directory, records)
        except forms.CheckpointError as error:
            found["problem"] = str(error)
    return found


def host_resources(directory: Path | None) -> dict[str, int | None]:
    """Return the free bytes of the disk that DIR is on, and this machine's memory."""
    place = (directory or Path()).resolve()
    while not place.is_dir():
        place = place.parent
    memory = available_memory()
    return {"free_disk": shutil.disk_usage(place).free, "available_memory": memory}


# ----------------------------------------------------------------------------------------- in words


def verdict(config: LanguageModelConfig, plan: Plan, stored: Shapes | None = None) -> str:
    """Return one sentence: whether the plan fits, and if not, what would."""
    where = f"on each of {plan.devices} devices" if plan.devices > 1 else "on one device"
    load = f"{plan.batch} x {plan.context} tokens"
    if plan.fits:
        text = f"It fits: {gib(plan.peak)} of {gib(plan.device_memory)} {where}, for {load}"
        share = plan.peak / plan.device_memory
        if share > PREALLOCATED:
            fraction = min(0.99, math.ceil(100 * share + 2) / 100)
            text += (
                f"; on GPUs set XLA_PYTHON_CLIENT_MEM_FRACTION={fraction}, since jax takes "
                f"{PREALLOCATED:.0%} of the memory unless it is told otherwise"
            )
    else:
        over = gib(plan.peak - plan.device_memory)
        ways = [*_larger_meshes(config, plan, stored), *_smaller_loads(plan)]
        text = (
            f"It does not fit: {gib(plan.peak)} {where}, for {load}, are {over} more than "
            f"{gib(plan.device_memory)}; {' or '.join(ways) or 'use devices with more memory'}"
        )
    return f"{text}{_files_problem(plan)}."


def _larger_meshes(config: LanguageModelConfig, plan: Plan, stored: Shapes | None) -> list[str]:
    """Return advice to use the next larger model axis on which the plan should fit."""
    temporaries = plan.peak - plan.cache - sum(plan.weights.values())
    data, model = plan.mesh
    for size in config.model_axis_sizes():
        needed = fixed_bytes(config, (data, size), plan.batch, stored) + temporaries * model // size
        if model < size <= MOST_DEVICES // data and needed <= plan.device_memory:
            return [f"use --mesh {data},{size} ({gib(needed)} each)"]
    return []


def _smaller_loads(plan: Plan) -> list[str]:
    """Return advice to use a smaller batch or context on this mesh."""
    for found in plan.largest:
        batch, context = found["batch"], found["context"]
        if batch and (batch < plan.batch or context < plan.context):
            return [f"use --batch {min(batch, plan.batch)} --context {context}"]
    return []


def _files_problem(plan: Plan) -> str:
    files = plan.files
    if files is None:
        return ""
    if files["problem"]:
        return f"; but {files['problem']}"
    wrong, missing = files["wrong_size"], files["missing"]
    if not wrong and not missing:
        return ""
    lacking = files["expected_bytes"] - files["found_bytes"]
    faults = [f"{len(missing)} missing"] if missing else []
    faults += [f"{len(wrong)} of the wrong size, {wrong[0]} first"] if wrong else []
    text = f"; but {files['directory']} should hold {files['expected']} files, and there are "
    text += " and ".join(faults)
    if lacking > (plan.host["free_disk"] or 0):
        free = gigabytes(plan.host["free_disk"] or 0)
        text += f", and the {gigabytes(lacking)} of them are more than the {free} free on its disk"
    return text


def gib(size: float) -> str:
    """Return a size of memory as text."""
    if size < 0.1 * 2**30:
        return f"{size / 2**20:.2f} MiB"
    return f"{size / 2**30:.2f} GiB" if size < 10 * 2**30 else f"{size / 2**30:.1f} GiB"


def gigabytes(size: float) -> str:
    """Return a size of files or traffic as text."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    unit, name = next(((u, n) for u, n in units if size >= u), (1, "bytes"))
    return f"{size / unit:.3g} {name}"


def format_devices(count: int) -> str:
    """Return "1 device" or "8 devices"."""
    return f"{count} device{'s' if count > 1 else ''}"


def format_plan(plan: Plan) -> str:
    """Return the plan as a page of text."""
    data, model = plan.mesh
    total = sum(plan.weights.values())
    most = plan.peak - total - plan.cache
    temporaries = ", ".join(f"{n} {gib(s.temporaries)}" for n, s in plan.steps.items())
    copies = f"; the weights are there {data} times, once a part of data" if data > 1 else ""
    chunks = f"prompts in chunks of {plan.prefill_chunk}"
    lines = [
        f"model     {plan.parameters:,} parameters, {plan.dtype} activations",
        f"mesh      data {data} x model {model} = {format_devices(plan.devices)}{copies}",
        f"load      {plan.batch} x {plan.context} tokens, {chunks}",
        "",
        "memory of each device",
        *(f"  {kind:18} {gib(size):>10}" for kind, size in plan.weights.items()),
        f"  {'all weights':18} {gib(total):>10}",
        f"  {'KV cache':18} {gib(plan.cache):>10}",
        f"  {'temporaries':18} {gib(most):>10}   {temporaries}; as compiled for a CPU",
        f"  {'peak':18} {gib(plan.peak):>10}   of {gib(plan.device_memory)}; drivers take some",
        "",
        "exchanged in a step, by each device",
        *_exchange_lines(plan),
        "",
        "a token, at the end of the context",
        *_token_lines(plan),
        "",
        "largest batch x context that fits",
        "  " + _largest_line(plan),
        "",
        *_machine_lines(plan),
        "",
        plan.verdict,
    ]
    return "\n".join(lines)


def _largest_line(plan: Plan) -> str:
    first, *shorter = (f"{found['batch']} x {found['context']}" for found in plan.largest)
    return "; at least ".join([first, ", ".join(shorter)] if shorter else [first])


def _exchange_lines(plan: Plan) -> list[str]:
    lines = [
        f"  {name:8} {kind:18} {found['count']:5} times {gigabytes(found['bytes']):>10}"
        for name, step in plan.steps.items()
        for kind, found in step.exchanged.items()
    ]
    return lines or ["  nothing"]


def _token_lines(plan: Plan) -> list[str]:
    token = plan.token
    seconds = token["seconds"]
    return [
        f"  computes {token['flops'] / 1e9:.4g} GFLOP, on all devices together",
        f"  reads {gigabytes(token['bytes'])} on each device, for {plan.batch} at once",
        f"  takes at least {1000 * seconds:.3g} ms at {gigabytes(token['bandwidth'])}/s: "
        f"{plan.batch / seconds:.4g} tokens/s",
    ]


def _machine_lines(plan: Plan) -> list[str]:
    memory = plan.host["available_memory"]
    lines = []
    if plan.files is not None and plan.files["form"] == forms.RELEASED:
        files = plan.files
        lines.append(
            f"files     {files['found']} of {files['expected']} in {files['directory']}, "
            f"{gigabytes(files['found_bytes'])} of {gigabytes(files['expected_bytes'])}"
        )
    elif plan.files is not None:
        lines.append(f"files     safetensors in {plan.files['directory']}")
    host = f"host      {gigabytes(plan.host['free_disk'] or 0)} of disk free"
    if memory is not None:
        loading = gib(plan.host["loading"] or 0)
        host += f", {gib(memory)} of memory available; loading takes less than {loading} of it"
    return [*lines, host]

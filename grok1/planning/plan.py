"""Plan whether a model fits a mesh, and what a token costs there, without weights or accelerators.

Sizes follow from the shapes of the parameters and their shardings. Prefill and decode are compiled
ahead of time, for GPUs if asked to (see gpu_program.py), or else for as many virtual CPU devices as
the mesh has: temporaries and exchanges between devices are read from the compiled programs. On a
GPU temporaries differ and are mostly smaller, since XLA for CPUs converts some arrays for its
products; the rest is the same.

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
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from grok1.execution import fastest
from grok1.formats import forms, layout
from grok1.gpu_settings import MEMORY_FRACTION
from grok1.host_memory import available_memory
from grok1.ops.quantization import Shapes
from grok1.parallel.sharding import (
    make_mesh,
)
from grok1.parameters import shapes_with_4_bits
from grok1.planning import gpu_program, hlo, in_place
from grok1.planning.accelerators import Accelerator
from grok1.planning.in_place import InPlace
from grok1.planning.projection import GpuStep, inspect_step
from grok1.planning.sizes import (
    Sizes,
    cache_bytes,
    fixed_bytes,
    least_work,
    loading_bytes,
    mesh_of,
    parameter_count,
    token_cost,
    weight_bytes,
)
from grok1.planning.text import gib, gigabytes
from grok1.serving.steps import (
    abstract_inputs,
    decode,
    prefill,
)

if TYPE_CHECKING:
    from model import LanguageModelConfig

MEMORY, BANDWIDTH = 80 << 30, 3.35e12  # of a device, if not given: bytes, and bytes a second
PREFILL_CHUNK = 1024
MOST_DEVICES = 128
MOST_ROWS = 4096  # sequences on each part of the data axis
MANY = 16
# The fraction of a GPU's memory that jax takes under run.py.
PREALLOCATED = float(MEMORY_FRACTION[1])


class Gpus(NamedTuple):
    """The GPUs to compile for.

    kernels: "gpu" or "plain". shard_activations: split the residual stream, as published. save: a
    directory for the texts of the compiled programs, or None.
    """

    accelerator: Accelerator
    kernels: str = "gpu"
    shard_activations: bool = False
    save: Path | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """What a compiled program takes in addition to weights and cache, and what devices exchange.

    temporaries: bytes that it needs while it runs. exchanged: for each kind of collective, the
    number of exchanges and the bytes that they return on each device, per run.
    """

    temporaries: int
    exchanged: Mapping[str, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The result of `make_plan`.

    mesh: (data, model). weights: by kind. cache: keys, values and their masks. steps: "prefill" and
    "decode". peak: the most that is held at once. token: the cost of one decode step at the end of
    the context: floating-point operations, bytes read on a device, and the minimum seconds at the
    given bandwidth. largest: the largest batch that fits this context; for shorter contexts, a
    batch that fits but may not be the largest; empty for GPUs, where one batch is compiled. files:
    what the checkpoint directory holds, None if none was given. host: free disk and memory of this
    machine, and the most memory that loading takes in addition to the parameters. verdict: one
    sentence. accelerator: the GPU that was asked for, or None. gpu: what the steps do there, if
    they were compiled for it; if not, `note` says why. in_place: the costs if one CPU uses the
    files in place, if that was asked for.
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
    accelerator: str | None = None
    gpu: dict[str, GpuStep] | None = None
    note: str = ""
    in_place: InPlace | None = None


def make_plan(
    config: LanguageModelConfig,
    sizes: Sizes | None,
    *,
    batch: int | None = None,
    device_memory: int | None = None,
    bandwidth: float | None = None,
    directory: Path | None = None,
    int4_experts: bool = False,
    used_in_place: bool = False,
    gpus: Gpus | None = None,
) -> Plan:
    """Return a plan for a mesh of (data, model) `sizes`, or, if None, for the smallest that fits.

    config: its sequence_len is the context. batch: sequences at once, over the entire mesh; by
    default one for each part of the data axis. device_memory: bytes. bandwidth: of that memory, in
    bytes a second. Both are by default those of `gpus`, or of an H100. directory: a checkpoint to
    look for; weights found there are counted in their stored dtypes, others as int8 with scales.
    int4_experts: count the experts as if they were converted to 4 bits. used_in_place: add what a
    token costs one CPU that uses the files in place.
    gpus: what to compile for, if NVIDIA's compiler is installed, in place of virtual CPU devices.

    Needs as many jax devices as the mesh has. Raises ValueError for an invalid mesh or batch.
    """
    if gpus is not None:
        gpus = gpus._replace(accelerator=gpus.accelerator.limited(device_memory, bandwidth))
        device_memory, bandwidth = gpus.accelerator.memory, gpus.accelerator.bandwidth
    device_memory, bandwidth = device_memory or MEMORY, bandwidth or BANDWIDTH
    found_there = None if directory is None else layout.shapes_in(directory, config.param_shapes())
    stored = found_there
    if int4_experts:
        stored = shapes_with_4_bits(found_there or config.param_shapes())
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
    compiled = _compile(config, sizes, batch, stored, gpus)
    steps = compiled.steps
    weights = weight_bytes(config, sizes, stored)
    cache = cache_bytes(config, sizes, batch)
    held = sum(weights.values())
    most = max(step.temporaries for step in steps.values())
    peak = held + cache + most
    files = None if directory is None else find_files(config, directory, found_there)
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
            config, sizes, device_memory - held, steps["prefill"].temporaries, compiled.known
        ),
        files=files,
        host={**host_resources(directory), "loading": loading_bytes(config, sizes, stored)},
        verdict="",
        accelerator=gpus.accelerator.name if gpus else None,
        gpu=compiled.gpu,
        note=compiled.note,
        in_place=_in_place(config, stored, directory, cache) if used_in_place else None,
    )
    return dataclasses.replace(found, verdict=verdict(config, found, stored))


def _in_place(
    config: LanguageModelConfig, stored: Shapes | None, directory: Path | None, cache: int
) -> InPlace:
    held = cache + in_place.copied_bytes(config, stored or config.param_shapes())
    return in_place.estimate(config, stored, directory, held)


# ----------------------------------------------------------------------------------- on which mesh


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


def largest_batches(
    config: LanguageModelConfig, sizes: Sizes, room: int, prompt: int, known: dict[int, int]
) -> list[dict[str, int]]:
    """Return the largest batch known to fit, for the given context and for shorter ones.

    room: bytes left over after the weights. prompt: the temporaries of prefill, for any batch.
    known: {batch: the temporaries of decode with the full context}; nothing is known without.
    """
    if not known:
        return []
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


class _Compiled(NamedTuple):
    """The compiled steps, the temporaries of decode by batch, and the last fields of a Plan."""

    steps: dict[str, Step]
    known: dict[int, int]
    gpu: dict[str, GpuStep] | None = None
    note: str = ""


def _compile(
    config: LanguageModelConfig, sizes: Sizes, batch: int, stored: Shapes | None, gpus: Gpus | None
) -> _Compiled:
    """Compile for GPUs if possible, or else for virtual CPU devices."""
    if gpus is None:
        return _Compiled(*compile_steps(config, sizes, batch, stored))
    try:
        found = compile_for_gpus(config, sizes, batch, stored, gpus)
    except gpu_program.UnavailableError as error:
        note = f"not compiled for {gpus.accelerator.name}: {error}"
        return _Compiled(*compile_steps(config, sizes, batch, stored), note=note)
    held, layers = fixed_bytes(config, sizes, batch, stored), config.model.num_layers
    steps = {
        name: Step(step.arguments + step.temporaries - held, step.all_exchanges(layers))
        for name, step in found.items()
    }
    return _Compiled(steps, {}, found)


def compile_for_gpus(
    config: LanguageModelConfig, sizes: Sizes, batch: int, stored: Shapes | None, gpus: Gpus
) -> dict[str, GpuStep]:
    """Compile prefill and decode for GPUs, and write their texts if asked to.

    Raises gpu_program.UnavailableError, or ValueError if the texts cannot be written.
    """
    target, kernels, shard_activations, save = gpus
    chunk = min(PREFILL_CHUNK, config.sequence_len)
    job = gpu_program.Job(config, sizes, target, batch, chunk, kernels, shard_activations, stored)
    if save is not None:
        try:
            save.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{save}: expected a directory for the programs, but it cannot be made "
                f"({error.strerror}); give another path"
            ) from error
    programs = gpu_program.compile_for(job)
    if save is not None:
        for name, program in programs.items():
            (save / f"{name}.txt").write_text(program.text)
    work = {
        "prefill": least_work(config, sizes, chunk, sizes[0], stored),
        "decode": least_work(config, sizes, batch // sizes[0], batch, stored),
    }
    return {
        name: inspect_step(program, target, config.model.num_layers, work[name])
        for name, program in programs.items()
    }


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

    form: as in `forms.FORMS`; without a checkpoint, "released" with all files missing.
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
    if os.path.lexists(directory / forms.WORK) or not (found["missing"] or found["wrong_size"]):
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
    if plan.in_place is not None:
        there = plan.files is not None and plan.files["form"] == forms.MAPPED
        when = "" if there else "after checkpoint.py convert --to mapped, "
        return f"{when}{in_place.sentence(plan.in_place)}{_files_problem(plan)}."
    where = f"on each of {plan.devices} devices" if plan.devices > 1 else "on one device"
    load = f"{plan.batch} x {plan.context} tokens"
    if plan.fits:
        text = f"It fits: {gib(plan.peak)} of {gib(plan.device_memory)} {where}, for {load}"
        share = plan.peak / plan.device_memory
        if share > PREALLOCATED:
            fraction = min(0.99, math.ceil(100 * share + 2) / 100)
            text += (
                f"; on GPUs set {MEMORY_FRACTION[0]}={fraction}, since otherwise run.py lets jax "
                f"take {PREALLOCATED:.0%} of the memory"
            )
    else:
        over = gib(plan.peak - plan.device_memory)
        ways = [*_larger_meshes(config, plan, stored), *_smaller_loads(plan)]
        if plan.gpu is None and plan.cache + sum(plan.weights.values()) <= plan.device_memory:
            ways.append("plan it for a GPU with --accelerator, as temporaries are smaller there")
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

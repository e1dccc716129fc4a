"""A plan as a page of text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from grok1.formats import forms
from grok1.planning.projection import GpuStep

if TYPE_CHECKING:
    from grok1.planning.plan import Plan


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
    target = plan.accelerator if plan.gpu else "a CPU"
    if plan.in_place is not None:
        return "\n".join(
            [
                f"model     {plan.parameters:,} parameters, {plan.dtype} activations",
                f"load      {plan.batch} x {plan.context} tokens",
                f"memory    {gib(plan.cache)} of KV cache, besides what it holds of the files",
                "",
                plan.verdict,
            ]
        )
    lines = [
        f"model     {plan.parameters:,} parameters, {plan.dtype} activations",
        f"mesh      data {data} x model {model} = {format_devices(plan.devices)}{copies}",
        f"load      {plan.batch} x {plan.context} tokens, {chunks}",
        "",
        "memory of each device",
        *(f"  {kind:18} {gib(size):>10}" for kind, size in plan.weights.items()),
        f"  {'all weights':18} {gib(total):>10}",
        f"  {'KV cache':18} {gib(plan.cache):>10}",
        f"  {'temporaries':18} {gib(most):>10}   {temporaries}; as compiled for {target}",
        f"  {'peak':18} {gib(plan.peak):>10}   of {gib(plan.device_memory)}; drivers take some",
        "",
        "exchanged in a step, by each device",
        *_exchange_lines(plan),
        "",
        *_gpu_lines(plan),
        "a token, at the end of the context",
        *_token_lines(plan),
        "",
        *_largest_lines(plan),
        *_machine_lines(plan),
        "",
        plan.verdict,
    ]
    return "\n".join(lines)


def _largest_lines(plan: Plan) -> list[str]:
    if not plan.largest:
        return []
    first, *shorter = (f"{found['batch']} x {found['context']}" for found in plan.largest)
    line = "; at least ".join([first, ", ".join(shorter)] if shorter else [first])
    return ["largest batch x context that fits", f"  {line}", ""]


def _exchange_lines(plan: Plan) -> list[str]:
    lines = [
        f"  {name:8} {kind:18} {found['count']:5.0f} times {gigabytes(found['bytes']):>10}"
        for name, step in plan.steps.items()
        for kind, found in step.exchanged.items()
    ]
    return lines or ["  nothing"]


# What is shown of each step as compiled for a GPU, in this order.
_COUNTS: dict[str, Callable[[GpuStep], str]] = {
    "launches in a layer": lambda step: f"{step.layer.launches:.4g}",
    "launches outside the layers": lambda step: f"{step.outside.launches:.4g}",
    "exchanges in a layer": lambda step: f"{step.layer.exchanged:.4g}",
    "exchanges outside": lambda step: f"{step.outside.exchanged:.4g}",
    "conditionals in a layer": lambda step: f"{step.layer.conditionals:.4g}",
    "conditionals outside": lambda step: f"{step.outside.conditionals:.4g}",
    "loops in a layer": lambda step: f"{step.layer.loops:.4g}",
    "loops outside": lambda step: f"{step.outside.loops:.4g}",
    "bytes that must be read": lambda step: gigabytes(step.must_read),
    "bytes that are read": lambda step: gigabytes(step.read),
}
_SECONDS = ("reading", "computing", "launches", "exchanges", "conditionals", "total")


def _gpu_lines(plan: Plan) -> list[str]:
    """Return a table with a column for each step."""
    if plan.gpu is None:
        return [plan.note, ""] if plan.note else []
    rows = {"": list(plan.gpu)}
    for title, value in _COUNTS.items():
        rows[title] = [value(step) for step in plan.gpu.values()]
    for part in _SECONDS:
        seconds = [getattr(step.projection, part) for step in plan.gpu.values()]
        rows[f"projected {part}"] = [f"{1000 * each:.3f} ms" for each in seconds]
    kernels = [
        f"  {name:8} {kernel} has {found.registers} registers, {found.spilled} bytes spilled"
        for name, step in plan.gpu.items()
        for kernel, found in step.kernels.items()
    ]
    return [
        f"on each {plan.accelerator}; nothing was run, and times are projections",
        *(f"  {title:28}" + "".join(f"{cell:>12}" for cell in row) for title, row in rows.items()),
        *kernels,
        "",
    ]


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
        lines.append(f"files     {plan.files['form']} in {plan.files['directory']}")
    host = f"host      {gigabytes(plan.host['free_disk'] or 0)} of disk free"
    if memory is not None:
        loading = gib(plan.host["loading"] or 0)
        host += f", {gib(memory)} of memory available; loading takes less than {loading} of it"
    return [*lines, host]

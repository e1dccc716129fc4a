"""What a compiled step does on each GPU, and the time projected from it.

The time is a projection: nothing has been timed on a GPU. The constants are expectations for GPUs
of one host, to be replaced by measurements.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from grok1.planning.accelerators import NVLINK, PCIE, Accelerator
from grok1.planning.gpu_program import Kernel, Program
from grok1.planning.hlo import COLLECTIVES, Operation, collectives, operations
from grok1.planning.sizes import Work
from grok1.planning.traffic import bytes_read

LAUNCH_S = 1.5e-6  # of an operation, at least
CONDITIONAL_S = 15e-6  # of a conditional, whose predicate the host reads
COLLECTIVE_S = {NVLINK: 8e-6, PCIE: 25e-6}  # of an exchange of a few KiB
BANDWIDTH_SHARE = 0.85  # the share of the memory's bandwidth that a step can reach
LAYERS = "transformer/while"  # the end of jax's name for the loop over layers
EXCHANGE = "count", "bytes", "sent"  # what is added up of the exchanges of a kind


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a part of a program runs.

    launches: operations on the device, without exchanges between devices. exchanges: by kind, their
    number, the bytes that they return on a device, and the bytes that it sends. Every branch of a
    conditional is counted.
    """

    launches: float
    exchanges: dict[str, dict[str, float]]
    conditionals: float
    loops: float

    @property
    def exchanged(self) -> float:
        """The number of exchanges of all kinds."""
        return sum(found["count"] for found in self.exchanges.values())


@dataclasses.dataclass(frozen=True)
class Projection:
    """Seconds of a step. Reading and computing overlap; all others are added to the longer one."""

    reading: float
    computing: float
    launches: float
    exchanges: float
    conditionals: float
    total: float = 0.0

    def __post_init__(self) -> None:
        parts = self.launches + self.exchanges + self.conditionals
        object.__setattr__(self, "total", max(self.reading, self.computing) + parts)


@dataclasses.dataclass(frozen=True)
class GpuStep:
    """A step as compiled for a GPU.

    layer: what each layer runs. outside: what one run of the step adds. must_read: the bytes that
    it needs; read: the bytes that its operations read. kernels: of our own, by name.
    """

    arguments: int
    temporaries: int
    layer: Counts
    outside: Counts
    must_read: float
    read: float
    projection: Projection
    kernels: dict[str, Kernel]

    def all_exchanges(self, layers: int) -> dict[str, dict[str, float]]:
        """Return the number and the bytes of exchanges in a step, by kind."""
        found: dict[str, dict[str, float]] = {}
        for times, part in ((layers, self.layer), (1, self.outside)):
            for kind, each in part.exchanges.items():
                total = found.setdefault(kind, dict.fromkeys(EXCHANGE, 0.0))
                for name in total:
                    total[name] += times * each[name]
        return found


def inspect_step(program: Program, accelerator: Accelerator, layers: int, work: Work) -> GpuStep:
    """Return what a compiled step does, and its projected time."""
    every = operations(program.text)
    exchanges = [each for each in collectives(program.text) if each.devices > 1]
    parts = []
    for inside in (True, False):
        own = [operation for operation in every if in_layers(operation) == inside]
        moved = [operation for operation in exchanges if in_layers(operation) == inside]
        parts.append(count(own, moved, layers if inside else 1))
    layer, outside = parts
    read = bytes_read(program.text, work.experts)
    return GpuStep(
        arguments=program.arguments,
        temporaries=program.temporaries,
        layer=layer,
        outside=outside,
        must_read=work.bytes,
        read=read,
        projection=project(
            accelerator, dataclasses.replace(work, bytes=read), ((layers, layer), (1, outside))
        ),
        kernels=program.kernels,
    )


def in_layers(operation: Operation) -> bool:
    """Return whether an operation is in the loop over layers."""
    return any(loop.source.endswith(LAYERS) for loop in operation.loops)


def count(every: Sequence[Operation], moved: Sequence[Operation], rounds: int) -> Counts:
    """Return what these operations run, divided by the number of rounds."""
    kinds: Counter[str] = Counter()
    for operation in every:
        if operation.launched and operation.opcode.removesuffix("-start") not in COLLECTIVES:
            kinds["launched"] += operation.times
        elif operation.opcode in ("conditional", "while") and not operation.fused:
            kinds[operation.opcode] += operation.times
    exchanges: dict[str, dict[str, float]] = {}
    for operation in moved:
        each = dict(zip(EXCHANGE, (1, operation.nbytes, sent(operation)), strict=True))
        found = exchanges.setdefault(operation.opcode, dict.fromkeys(EXCHANGE, 0.0))
        for name, value in each.items():
            found[name] += operation.times * value / rounds
    return Counts(
        launches=kinds["launched"] / rounds,
        exchanges=exchanges,
        conditionals=kinds["conditional"] / rounds,
        loops=kinds["while"] / rounds,
    )


def sent(operation: Operation) -> float:
    """Return the bytes that each device sends in an exchange, if they form a ring."""
    devices, nbytes = operation.devices, operation.nbytes
    if operation.opcode == "all-reduce":
        return 2 * (devices - 1) / devices * nbytes
    if operation.opcode == "reduce-scatter":
        return (devices - 1) * nbytes
    if operation.opcode in ("all-gather", "all-to-all"):
        return (devices - 1) / devices * nbytes
    return nbytes


def exchange_seconds(accelerator: Accelerator, number: float, nbytes: float) -> float:
    """Return the projected time of a number of exchanges in which a device sends these bytes."""
    return COLLECTIVE_S[accelerator.link] * number + nbytes / accelerator.link_bandwidth


def project(
    accelerator: Accelerator, work: Work, parts: Sequence[tuple[int, Counts]]
) -> Projection:
    """Return the projected time of work and of parts that run so many times."""
    every = [(times, each) for times, part in parts for each in part.exchanges.values()]
    number = sum(times * each["count"] for times, each in every)
    nbytes = sum(times * each["sent"] for times, each in every)
    return Projection(
        reading=work.bytes / (BANDWIDTH_SHARE * accelerator.bandwidth),
        computing=work.operations / accelerator.rate,
        launches=LAUNCH_S * sum(times * part.launches for times, part in parts),
        exchanges=exchange_seconds(accelerator, number, nbytes),
        conditionals=CONDITIONAL_S * sum(times * part.conditionals for times, part in parts),
    )

"""Compile the steps of a model for GPUs that are not there.

XLA's CUDA compiler needs a description of a GPU, not the GPU; see accelerators.py. It runs in a
process of its own, since XLA logs to standard error, and aborts if a part of it is missing.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grok1 import gpu_settings
from grok1.default_files import ROOT
from grok1.ops.quantization import Shapes
from grok1.planning.accelerators import Accelerator
from grok1.planning.sizes import mesh_of
from grok1.planning.traffic import KERNELS
from grok1.serving.steps import abstract_inputs, decode, prefill

if TYPE_CHECKING:
    from model import LanguageModelConfig

PLUGINS = "jax-cuda12-plugin", "jax-cuda12-pjrt"
NVCC = "nvidia-cuda-nvcc-cu12"  # the package of ptxas
HOST_DEVICES = 8  # GPUs of a host
# Not `python -m`: what is pickled would then belong to a module __main__.
CHILD = f"from {__name__} import main; main()"


class UnavailableError(Exception):
    """Why nothing could be compiled for GPUs, in one sentence."""


class Job(NamedTuple):
    """What to compile: prefill of a chunk of one prompt, and a decode step of a batch; see `steps`.

    kernels: "gpu" or "plain". shard_activations: as in Execution; prefill by plain forms does as
    configured.
    """

    config: LanguageModelConfig
    mesh: tuple[int, int]
    accelerator: Accelerator
    batch: int
    chunk: int
    kernels: str
    shard_activations: bool
    stored: Shapes | None
    steps: tuple[str, ...] = ("prefill", "decode")


class Program(NamedTuple):
    """A compiled step.

    text: the optimized program. arguments: bytes of the arguments and results on a device, those
    that are updated in place once. temporaries: bytes of all else. kernels: what ptxas said of our
    own kernels, by name.
    """

    text: str
    arguments: int
    temporaries: int
    kernels: dict[str, Kernel]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The registers of each thread of a kernel.

    spilled: bytes that a thread stores and loads because its registers do not suffice.
    """

    registers: int
    spilled: int


# ------------------------------------------------------------------------------------ in the parent


def directory() -> Path:
    """Return where the compiler's packages are installed.

    Not beside jax: there they would be loaded at every start, and complain that there is no GPU.
    """
    return Path(sys.prefix) / "gpu-compiler"


def installed(name: str) -> importlib.metadata.Distribution | None:
    """Return an installed package, from `directory` or beside jax."""
    paths = [str(directory()), *sys.path]
    return next(iter(importlib.metadata.distributions(name=name, path=paths)), None)


def missing() -> str | None:
    """Return what is missing to compile for GPUs, in one sentence, or None."""
    wanted = importlib.metadata.version("jaxlib")
    exact = " ".join(f"{name}=={wanted}" for name in PLUGINS)
    remedy = f"run: pip install --no-deps --target {directory()} {exact} {NVCC}"
    for name in PLUGINS:
        found = installed(name)
        if found is None:
            return f"{name} is not installed; {remedy}"
        if found.version != wanted:
            return (
                f"{name}: expected version {wanted} as of jaxlib, got {found.version}; remove it, "
                f"with {directory()} if that exists, and {remedy}"
            )
    return None if ptxas() else f"NVIDIA's assembler, ptxas, was not found; {remedy}"


def ptxas() -> str | None:
    """Return the path of NVIDIA's assembler, from its package or a CUDA toolkit."""
    package = installed(NVCC)
    for file in (package and package.files) or ():
        if file.name == "ptxas" and os.access(path := str(file.locate()), os.X_OK):
            return path
    return shutil.which("ptxas")


def compile_for(job: Job) -> dict[str, Program]:
    """Return the compiled steps of a job. Raises UnavailableError."""
    if reason := missing():
        raise UnavailableError(reason)
    with tempfile.TemporaryDirectory() as dump:
        paths = filter(None, (ROOT, directory(), os.environ.get("PYTHONPATH")))
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",  # otherwise the plugin looks for a driver
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # a cached program has no PTX
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            # Later versions than jax 0.10 write PTX only if asked to.
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump} "
            "--xla_dump_emitter_re=ptx",
        }
        gpu_settings.add_flags(environment)
        done = subprocess.run(
            [sys.executable, "-P", "-c", CHILD, dump],  # -P: not the files of this directory
            input=pickle.dumps(job),
            env=environment,
            capture_output=True,
            check=False,
        )
        result = Path(dump) / "programs"
        if done.returncode or not result.exists():
            error = Path(dump) / "error"
            reason = error.read_text() if error.exists() else f"it ended with {done.returncode}"
            raise UnavailableError(f"the compiler failed: {reason}")
        return pickle.loads(result.read_bytes())


# ------------------------------------------------------------------------------------- in the child


def mesh_of_gpus(job: Job) -> Mesh:
    """Return a mesh of GPUs that can only be compiled for."""
    from jax.experimental import topologies

    mesh = mesh_of(job.config, job.mesh)
    each = mesh.size if mesh.size <= HOST_DEVICES else math.gcd(mesh.size, HOST_DEVICES)
    found = topologies.get_topology_desc(
        "", "cuda", target_config=job.accelerator.target_config(),
        topology=f"1x{mesh.size // each}x{each}",
    )  # fmt: skip
    devices = np.array(found.devices).reshape(mesh.axis_sizes)
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def lower_step(job: Job, mesh: Mesh, name: str) -> jax.stages.Lowered:
    """Return a step, ready to be compiled for the GPUs of a mesh."""
    execution = dataclasses.replace(job.config.model.execution(mesh), kernels=job.kernels)
    if name == "decode" or job.kernels == "gpu":  # as `execution.fastest` chooses
        execution = dataclasses.replace(execution, shard_activations=job.shard_activations)
    everywhere = NamedSharding(mesh, P())
    chunk = job.chunk if name == "prefill" else None
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or everywhere),
        abstract_inputs(job.config, execution, job.batch, chunk, job.stored),
    )
    step = prefill if name == "prefill" else decode
    traced = step.trace(*inputs, config=job.config, execution=execution)
    return traced.lower(lowering_platforms=("cuda",))


def inspect_kernels(dump: Path) -> dict[str, dict[str, Kernel]]:
    """Assemble our kernels again, and return what ptxas says of them, by program and name."""
    found: dict[str, dict[str, Kernel]] = {}
    for file in sorted(dump.glob("*.ptx")):
        text = file.read_text()
        name = re.search(rf"\.entry ((?:{'|'.join(KERNELS)})\w*)", text)
        target = re.search(r"^\.target (\w+)", text, re.MULTILINE)
        if name is None or target is None:
            continue
        command = [str(ptxas()), "-v", f"-arch={target[1]}", str(file), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        registers = re.search(r"Used (\d+) registers", said)
        spilled = re.findall(r"(\d+) bytes spill", said)
        kernel = Kernel(int(registers[1]) if registers else 0, sum(map(int, spilled)))
        step = file.name.split(".")[1].removeprefix("jit_")
        found.setdefault(step, {})[name[1]] = kernel
    return found


def compile_job(job: Job, dump: Path) -> dict[str, Program]:
    """Compile the steps of a job, whose PTX XLA writes to the directory `dump`."""
    mesh = mesh_of_gpus(job)
    with ThreadPoolExecutor() as pool:  # XLA compiles without the GIL
        jobs = [pool.submit(lower_step(job, mesh, name).compile) for name in job.steps]
    compiled = [each.result() for each in jobs]
    kernels = inspect_kernels(dump)
    found = {}
    for name, program in zip(job.steps, compiled, strict=True):
        memory = program.memory_analysis()
        assert memory is not None
        arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes
        found[name] = Program(
            text=program.as_text() or "",
            arguments=arguments - memory.alias_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            kernels=kernels.get(name, {}),
        )
    return found


def main() -> None:
    """Compile the job on standard input; write the programs, or an error, to a directory."""
    dump = Path(sys.argv[1])
    try:
        programs = compile_job(pickle.load(sys.stdin.buffer), dump)
    except Exception as error:  # a compiler may raise anything
        (dump / "error").write_text(str(error).strip().partition("\n")[0])
        sys.exit(1)
    (dump / "programs").write_bytes(pickle.dumps(programs))

"""Settings of XLA and jax that matter on GPUs; both read them when they start.

Imports only the standard library, so that it can be used before jax is imported.
"""

import importlib.util
from collections.abc import MutableMapping

FLAGS = {
    # The GPU is given the operations of a step all at once, as a CUDA graph. By default exchanges
    # and loops are no part of one, so that the host starts what is between them in pieces.
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,COLLECTIVES,WHILE,CONDITIONAL"
    ),
    # Nothing else can run while a layer waits for a sum over the devices. An exchange in the
    # background would only have to be waited for.
    "xla_gpu_disable_async_collectives": "ALLREDUCE,ALLGATHER,REDUCESCATTER",
    # Where the weights nearly fill the memory, XLA computes small arrays again rather than keep
    # them: on a mesh of 2,4 every layer's index four times, and the sorted vocabulary twice.
    "xla_disable_hlo_passes": "rematerialization",
}
# The share of a GPU's memory that jax reserves, 0.75 by default; the rest is for the driver and the
# library of the exchanges.
MEMORY_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92"
PLUGINS = "jax_cuda12_plugin", "jax_cuda13_plugin"  # with which jax can use GPUs


def prepare(environment: MutableMapping[str, str]) -> None:
    """Add the settings to the environment, if jax can use GPUs; what is set there wins."""
    if any(importlib.util.find_spec(name) for name in PLUGINS):
        add_flags(environment)
        environment.setdefault(*MEMORY_FRACTION)


def add_flags(environment: MutableMapping[str, str]) -> None:
    """Add FLAGS to XLA_FLAGS, except those that it has."""
    given = environment.get("XLA_FLAGS", "")
    added = [f"--{name}={value}" for name, value in FLAGS.items() if name not in given]
    environment["XLA_FLAGS"] = " ".join([given, *added]).strip()

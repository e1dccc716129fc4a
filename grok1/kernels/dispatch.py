"""The implementations ("forms") of the operations, and which of them this machine supports.

`plain`: grok1/ops, on any platform. `xla_cpu`: JAX code from which XLA generates fast code for a
CPU. `cpu`: compiled from C++. `gpu`: Pallas. Each is tested against the plain form.
"""

import functools
import logging
from types import ModuleType

from grok1 import backend
from grok1.kernels.error import KernelError
from grok1.ops.operations import Operations

_log = logging.getLogger(__name__)
NAMES = "plain", "xla_cpu", "cpu", "gpu"


def operations(name: str) -> Operations:
    """Return the operations of this name; those that it does not implement are the plain ones."""
    if name == "plain":
        return Operations()
    if name == "xla_cpu":
        from grok1.kernels import xla_cpu

        return xla_cpu.OPERATIONS
    return _compiled(name).OPERATIONS


def fastest(*, compiled: bool) -> str:
    """Return the name of the fastest forms for jax's platform.

    compiled: whether to include those that `load` has to compile.
    """
    if backend.on_cpu():
        return "cpu" if compiled else "xla_cpu"
    return "gpu" if compiled else "plain"


def check(name: str) -> None:
    """Raise ValueError if the forms of this name cannot be used on this machine."""
    if name in ("plain", "xla_cpu"):
        return
    here = backend.platform()
    if name != here:
        raise ValueError(
            f'kernels: expected "plain" or kernels for the platform {here!r}, got {name!r}'
        )
    try:
        _compiled(name).load()
    except KernelError as error:
        raise ValueError(
            f'kernels: {name!r} cannot be used here ({error}); use "plain", which computes the '
            "same, but slower"
        ) from error


def _compiled(name: str) -> ModuleType:
    """Return the module of compiled kernels."""
    if name == "cpu":
        from grok1.kernels import cpu

        return cpu
    from grok1.kernels.gpu import operations as gpu  # only when needed: Pallas takes long to import

    return gpu


def load() -> None:
    """Make this platform's compiled kernels available. Raises KernelError if that fails."""
    _compiled(fastest(compiled=True)).load()


@functools.cache
def available() -> bool:
    """Return whether this platform's compiled kernels are available; log, once, why not."""
    try:
        load()
    except KernelError as error:
        name = backend.platform().upper()
        _log.warning("note: running without the %s kernels, which is slower: %s", name, error)
        return False
    return True

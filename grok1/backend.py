"""The platform that jax runs on, asked for at this one place."""

import jax


def platform() -> str:
    """Return its name: "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


def on_cpu() -> bool:
    """Return whether jax runs on a CPU."""
    return platform() == "cpu"

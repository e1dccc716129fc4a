"""The platform that jax runs on, asked for at this one place."""

import collections
from typing import Any

import jax

# Settings of jax, and the values with which the model's programs can be built.
SETTINGS = dict.fromkeys(
    ("jax_enable_x64", "jax_disable_jit", "jax_no_tracing", "jax_no_execution"), False
)
# Those on which the numbers depend that are drawn and computed.
NUMERIC = (
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
    "jax_default_matmul_precision",
)


def check_settings() -> None:
    """Raise ValueError, in one sentence, if jax has a setting with which the model cannot run."""
    for name, wanted in SETTINGS.items():
        if (value := jax.config.values[name]) != wanted:
            raise ValueError(
                f"{name}: expected {wanted!r}, got {value!r}; leave {name.upper()} unset"
            )


def require_devices() -> None:
    """Raise ValueError if jax finds no devices."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter, without a word, for a lost driver
        why = (str(error) or "no driver found").splitlines()[0]
        if platforms := jax.config.values["jax_platforms"]:
            raise ValueError(
                f"JAX_PLATFORMS={platforms}: expected platforms of which devices are here, got "
                f"none ({why}); correct it or leave it unset"
            ) from error
        raise ValueError(f"jax found no devices ({why})") from error


def numerics() -> dict[str, Any]:
    """Return jax's version and the settings on which numbers depend, as JSON."""
    return {"version": jax.__version__} | {name: jax.config.values[name] for name in NUMERIC}


def use_numerics(wanted: dict[str, Any]) -> None:
    """Compute as another process does that has these `numerics`. Raises ValueError if jax can't."""
    if wanted["version"] != jax.__version__:
        raise ValueError(
            f"expected jax {wanted['version']}, which process 0 has, got {jax.__version__}; "
            "install the same on all hosts"
        )
    for name in NUMERIC:
        jax.config.update(name, wanted[name])


def devices_of_each_process() -> int:
    """Return how many devices every process has. Raises ValueError if not all have as many."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len({*counts.values()}) > 1:
        got = ", ".join(f"{counts[i]} in process {i}" for i in sorted(counts))
        raise ValueError(
            f"expected as many devices in each process, got {got}; start all on hosts that are "
            "alike, with the same XLA_FLAGS"
        )
    return jax.local_device_count()


def platform() -> str:
    """Return its name: "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


def on_cpu() -> bool:
    """Return whether jax runs on a CPU."""
    return platform() == "cpu"

"""The platform that jax runs on, and its settings."""

import collections
from collections.abc import Mapping

import jax

from grok1.strict_json import Json

# Settings of jax, and the values that the model's programs require.
SETTINGS = dict.fromkeys(
    ("jax_enable_x64", "jax_disable_jit", "jax_no_tracing", "jax_no_execution"), False
)
# Settings that affect the random numbers and the results.
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
    except (RuntimeError, AssertionError) as error:  # AssertionError: no message, driver missing
        why = (str(error) or "no driver found").splitlines()[0]
        if platforms := jax.config.values["jax_platforms"]:
            raise ValueError(
                f"JAX_PLATFORMS={platforms}: expected platforms with available devices, got "
                f"none ({why}); correct it or leave it unset"
            ) from error
        raise ValueError(f"jax found no devices ({why})") from error


def numerics() -> dict[str, Json]:
    """Return jax's version and the settings that affect numbers, as JSON values."""
    return {"version": jax.__version__} | {name: jax.config.values[name] for name in NUMERIC}


def use_numerics(wanted: Mapping[str, Json]) -> None:
    """Apply the `numerics` of another process. Raises ValueError if jax's version differs."""
    if wanted["version"] != jax.__version__:
        raise ValueError(
            f"expected jax {wanted['version']}, which process 0 has, got {jax.__version__}; "
            "install the same on all hosts"
        )
    for name in NUMERIC:
        jax.config.update(name, wanted[name])


def devices_of_each_process() -> int:
    """Return how many devices each process has. Raises ValueError if these numbers differ."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len({*counts.values()}) > 1:
        got = ", ".join(f"{counts[i]} in process {i}" for i in sorted(counts))
        raise ValueError(
            f"expected the same number of devices in each process, got {got}; start all processes "
            "on identical hosts, with the same XLA_FLAGS"
        )
    return jax.local_device_count()


def platform() -> str:
    """Return the platform's name: "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


def on_cpu() -> bool:
    """Return whether jax runs on a CPU."""
    return platform() == "cpu"

"""The platform that jax runs on, asked for at this one place."""

import jax

# Settings of jax, and the values with which the model's programs can be built.
SETTINGS = {"jax_enable_x64": False, "jax_disable_jit": False}


def check_settings() -> None:
    """Raise ValueError, in one sentence, if jax has a setting with which the model cannot run."""
    for name, wanted in SETTINGS.items():
        if (value := jax.config.values[name]) != wanted:
            raise ValueError(
                f"{name}: expected {wanted!r}, got {value!r}; leave {name.upper()} unset"
            )


def platform() -> str:
    """Return its name: "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


def on_cpu() -> bool:
    """Return whether jax runs on a CPU."""
    return platform() == "cpu"

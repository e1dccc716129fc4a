"""Compile programs quickly: most of what tests check does not depend on XLA's optimizations.

Compiling takes most of the tests' time. With these options it takes less than half as long.
"""

import importlib.metadata
import os
from typing import Any

# For a program compiled in this process.
OPTIONS: dict[str, int | bool] = {"xla_cpu_parallel_codegen_split_count": 1}
if importlib.metadata.version("jaxlib") < "0.11":  # later versions have only the other emitters
    OPTIONS["xla_cpu_use_fusion_emitters"] = False
# For a process of its own.
FLAGS = " ".join(
    [
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        *(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items()),
    ]
)


def install() -> None:
    """Compile with OPTIONS in this process, while `set_quick` says so."""
    # Private, since options for all programs can otherwise only be set before jax starts.
    from jax._src import compiler

    original = compiler.get_compile_options

    def get_compile_options(*args: Any, **kwargs: Any) -> Any:
        options = original(*args, **kwargs)
        if is_quick():
            options.env_option_overrides = [*OPTIONS.items(), *options.env_option_overrides]
        return options

    compiler.get_compile_options = get_compile_options


def is_quick() -> bool:
    """Whether programs are compiled quickly."""
    import jax

    return bool(jax.config.values["jax_disable_most_optimizations"])


def set_quick(quick: bool) -> None:
    """Compile quickly or not, in this process and in those that it starts."""
    import jax

    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(quick)
    if is_quick() != quick:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", quick)

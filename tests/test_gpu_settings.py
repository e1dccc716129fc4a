"""Settings for GPUs. That XLA accepts them: planning/test_gpu_program.py compiles with them."""

import importlib.util

from grok1 import gpu_settings


def test_what_is_set_in_the_environment_wins(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "jax_cuda13_plugin")
    own = "--xla_cpu_flag=1 --xla_gpu_enable_command_buffer="
    environment = {"XLA_FLAGS": own, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    gpu_settings.prepare(environment)
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    added = environment["XLA_FLAGS"].removeprefix(own)
    assert added == (
        " --xla_gpu_disable_async_collectives=ALLREDUCE,ALLGATHER,REDUCESCATTER"
        " --xla_disable_hlo_passes=rematerialization"
    )
    empty = {}
    gpu_settings.prepare(empty)
    assert empty["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"
    assert [flag.split("=")[0] for flag in empty["XLA_FLAGS"].split()] == [
        f"--{name}" for name in gpu_settings.FLAGS
    ]


def test_without_a_plugin_for_gpus_nothing_is_set():
    environment = {}
    gpu_settings.prepare(environment)
    assert environment == {}

"""Runs of several processes, as the tests start them."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

import golden
import run
from commands import Result

MODEL = golden.DIRECTORY / "three-layers"
TIMEOUT = 4  # --peer-timeout, in seconds
SLACK = 4  # for two busy cores
# Compiled code that is slow, and soon there.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# As the background processes of a shell script are.
DEAF = ("sh", "-c", 'trap "" INT; exec "$0" "$@"')


@pytest.fixture
def address() -> str:
    """A free address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes of four virtual devices each, all of which end with the test."""
    running = []

    def call(
        *arguments: object, devices: int = 4, before: Sequence[str] = (), **variables: str
    ) -> subprocess.Popen[bytes]:
        environment = dict(os.environ) | variables
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} {QUICK}"
        environment["PYTHONFAULTHANDLER"] = "1"
        command = [*before, sys.executable, "-W", "error", *map(str, arguments)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment, cwd="/")
        running.append(process)
        return process

    yield call
    for process in running:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[bytes], limit: float = 60) -> Result:
    """Wait for the end of a process; if it does not come, fail and show where its threads are."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        said = process.communicate(timeout=60)[1].decode()
        pytest.fail(f"it has not ended within {limit} s: {process.args}\n{said}")
    return Result(process.returncode, out.decode(), err.decode())


def place(address: str, process: int, processes: int = 2, timeout: float = TIMEOUT) -> list[Any]:
    """The options of one process."""
    return [
        *("--distributed", "--coordinator", address, "--num-processes", processes),
        *("--process-id", process, "--peer-timeout", timeout, "--join-timeout", 30),
    ]


def start_pair(start: Start, address: str, *arguments: object) -> list[subprocess.Popen[bytes]]:
    """Start both processes of a run, the second one first."""
    script = pathlib.Path(run.__file__)
    pair = [start(script, *place(address, i), *arguments) for i in (1, 0)]
    return pair[::-1]

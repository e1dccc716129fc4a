"""Runs of several processes, and one process of a run without the others, for the tests."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

import compiling
import golden
import run
from commands import Result
from grok1.parallel import multihost

MODEL = golden.DIRECTORY / "three-layers"
TIMEOUT = 4  # --peer-timeout, in seconds
SLACK = 4  # additional seconds for two busy cores
# Ignores SIGINT, as the background processes of a shell script do.
IGNORE_INTERRUPT = ("sh", "-c", 'trap "" INT; exec "$0" "$@"')


@pytest.fixture
def address() -> str:
    """A free address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes of four virtual devices each; kills them at the end of the test."""
    running = []

    def call(
        *arguments: object, devices: int = 4, before: Sequence[str] = (), **variables: str
    ) -> subprocess.Popen[bytes]:
        environment = dict(os.environ) | variables
        environment["XLA_FLAGS"] = (
            f"--xla_force_host_platform_device_count={devices} {compiling.FLAGS}"
        )
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


def finish(process: subprocess.Popen[bytes], limit: float = 120) -> Result:
    """Wait for the end of a process; after the limit, fail with the stacks of its threads."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        stacks = process.communicate(timeout=60)[1].decode()
        pytest.fail(f"it has not ended within {limit} s: {process.args}\n{stacks}")
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


@pytest.fixture
def said() -> list[str]:
    """What the process has printed for the user."""
    return []


@pytest.fixture
def statuses() -> list[int]:
    """The exit statuses with which the process has ended."""
    return []


@pytest.fixture
def peers(
    said: list[str], statuses: list[int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[multihost.Peers]:
    """Process 0 of two, without the other one; the end of the process raises SystemExit."""

    def leave(status: int) -> None:
        statuses.append(status)
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    before = signal.signal(multihost.WAKE, signal.default_int_handler)
    yield multihost.Peers(multihost.Process("127.0.0.1:1", 2, 0), 0.5, 0.5, said.append)
    signal.signal(multihost.WAKE, before)


def with_jax(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """Replace functions of jax.distributed."""
    distributed = types.SimpleNamespace(**functions)
    config = types.SimpleNamespace(update=lambda *_: None)
    jax = types.SimpleNamespace(distributed=distributed, config=config)
    monkeypatch.setitem(sys.modules, "jax", jax)


def in_thread(function: Any, *arguments: Any) -> threading.Thread:
    """Call a function in a thread, in which the process may end."""

    def call() -> None:
        with contextlib.suppress(SystemExit):
            function(*arguments)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def other_process() -> Any:
    """A link to another process, without a connection; `sent` has the messages sent to it."""
    sent: list[bytes] = []
    return types.SimpleNamespace(ready=False, done=False, sent=sent, send=sent.append)

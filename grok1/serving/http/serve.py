"""Runs the server: compiles, listens, and ends at a signal."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn

from grok1.serving.http.app import Api
from grok1.serving.http.connection import IDLE_SECONDS, Connection
from grok1.serving.http.errors import closing
from grok1.serving.request import Request
from grok1.serving.scheduler import Statistics

if TYPE_CHECKING:
    from runner import InferenceRunner

MOST_CONNECTIONS = 800  # a process usually has 1,024 file descriptors
SIGNALS = signal.SIGTERM, signal.SIGINT


def compile_all(server: InferenceRunner) -> None:
    """Compile all steps that a request may need, by answering one of each kind."""
    context = server.config.sequence_len
    kinds = (
        {"prompt_logprobs": False},
        {"prompt_logprobs": True},
        {"prompt_logprobs": True, "top_logprobs": 1},
    )
    for size in server.pad_sizes:
        prompt = [server.config.eos_token] * min(size, context - 2)
        for kind in kinds:
            server.generate([Request(prompt, max_len=2, ignore_eos=True, **kind)])
    server.statistics = Statistics()


class _Server(uvicorn.Server):
    """uvicorn's server, except that signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the handlers as they are."""
        yield


async def serve(
    api: Api,
    address: socket.socket,
    grace: float,
    ready: Callable[[], object],
    tell: Callable[[str], object],
    ending: asyncio.Event,
) -> None:
    """Serve until an event is set; what runs has `grace` seconds then, or until it is set again.

    ready: called when requests are taken. tell: called with messages.
    """
    config = uvicorn.Config(
        api.app(), http=Connection, log_level="error", access_log=False, lifespan="off",
        server_header=False, timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=1,
        limit_concurrency=MOST_CONNECTIONS,
    )  # fmt: skip
    server = _Server(config)
    api.engine.start()
    serving = asyncio.create_task(server.serve([address]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    ready()
    await ending.wait()
    ending.clear()
    api.closing = True
    if api.engine.held:
        tell(f"ending; requests that have {grace:g} s to finish: {len(api.engine.held)}")
    await _until(lambda: not api.engine.held or ending.is_set(), grace)
    api.engine.end_calls(closing())
    await _until(lambda: not api.engine.held, 1.0)  # the errors are sent
    server.should_exit = True
    await serving
    await asyncio.to_thread(api.engine.stop)


async def _until(condition: Callable[[], bool], seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.02)


@contextlib.contextmanager
def in_background(
    api: Api, grace: float = 5.0, tell: Callable[[str], object] = lambda _: None
) -> Iterator[int]:
    """Serve at a free port of this machine, from a thread; yields the port."""
    address, ready = bind("127.0.0.1", 0), threading.Event()
    ends: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()

    async def run() -> None:
        ending = asyncio.Event()
        ends.put(functools.partial(asyncio.get_running_loop().call_soon_threadsafe, ending.set))
        try:
            await serve(api, address, grace, ready.set, tell, ending)
        finally:
            ready.set()  # even if it failed

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="http")
    thread.start()
    end = ends.get()
    ready.wait()
    try:
        yield address.getsockname()[1]
    finally:
        end()
        thread.join()


def bind(host: str, port: int) -> socket.socket:
    """Return a socket with this address; it does not listen yet. Raises ValueError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        return made
    except OSError as error:
        reason = error.strerror or str(error)
        what = "port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "host"
        raise ValueError(
            f"--serve {host}:{port}: expected an address of this machine and a free port, got an "
            f"error ({reason}); choose another {what}"
        ) from error


def run(
    api: Api,
    address: socket.socket,
    grace: float,
    ready: Callable[[], object],
    tell: Callable[[str], object],
) -> None:
    """Call `serve` until SIGTERM or Ctrl-C."""

    async def until_signal() -> None:
        ending = asyncio.Event()
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, ending.set)
        await serve(api, address, grace, ready, tell, ending)

    asyncio.run(until_signal())

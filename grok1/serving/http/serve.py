"""Runs the server: compiles, listens, and ends at a signal."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn

from grok1.serving.http.app import Api
from grok1.serving.request import Request

if TYPE_CHECKING:
    from runner import InferenceRunner

IDLE_SECONDS = 75  # after which an unused connection is closed
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
        api.app(), log_level="warning", access_log=False, lifespan="off", server_header=False,
        timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=1,
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
        tell(f"ending: {len(api.engine.held)} requests have {grace:g} s to finish")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(grace):
            while api.engine.held and not ending.is_set():
                await asyncio.sleep(0.02)
    server.should_exit = True
    await serving
    await asyncio.to_thread(api.engine.stop)


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
        raise ValueError(
            f"--serve {host}:{port}: expected an address of this machine and a free port, got an "
            f"error ({reason}); choose another port"
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

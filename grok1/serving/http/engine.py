"""The thread that drives the model: requests enter it through a queue, and tokens leave it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from grok1.serving.http.errors import ApiError, failed
from grok1.serving.request import Event, Request
from grok1.serving.scheduler import Handle
from grok1.serving.steps import MOST_TOKENS

if TYPE_CHECKING:
    from runner import InferenceRunner

Result = TypeVar("Result")

_log = logging.getLogger(__name__)


class Job:
    """A request in the engine. streamed: whether each token is wanted at once."""

    def __init__(self, request: Request, streamed: bool):
        self.request = request
        self.streamed = streamed
        self.handle: Handle | None = None  # in the engine's thread
        self.left = request.num_samples  # answers whose last event has not been taken yet
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[list[Event] | Exception] = asyncio.Queue()

    def put(self, events: list[Event] | Exception) -> None:
        """Hand events, or what ends the job, to the event loop; called in the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, events)

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events of all answers, up to the last one of each."""
        while self.left:
            found = await self._events.get()
            if isinstance(found, Exception):
                raise found
            for event in found:
                self.left -= event.finish_reason is not None
                yield event


class Engine:
    """Answers the requests of an event loop with a model, in a thread of its own.

    most_waiting: how many requests may wait for a slot; the next one is refused.
    """

    def __init__(self, server: InferenceRunner, most_waiting: int):
        self.server = server
        self.most_waiting = most_waiting
        self.held: set[Job] = set()  # the jobs of the event loop that have not ended
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}  # by the number of their handles
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step; unfinished jobs are cancelled."""
        self._orders.put(None)
        self._thread.join()

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot, at least."""
        return max(0, len(self.held) - self.server.num_slots)

    @contextlib.contextmanager
    def jobs(self, requests: list[Request], streamed: bool) -> Iterator[list[Job]]:
        """Begin requests, which have been checked, and cancel what is unfinished at the end.

        Yields a Job for each. Raises ApiError if too many wait.
        """
        room = self.server.num_slots + self.most_waiting
        if self.held and len(self.held) + len(requests) > room:
            message = (
                f"expected at most {self.most_waiting} waiting requests, got one more; "
                "try again later"
            )
            raise ApiError(429, message, code="rate_limit_exceeded", kind="rate_limit_error")
        made = [Job(request, streamed) for request in requests]
        self.held.update(made)
        for job in made:
            self._orders.put(functools.partial(self._begin, job))
        try:
            yield made
        finally:
            self.held.difference_update(made)
            for job in made:
                if job.left:
                    self._orders.put(functools.partial(self._cancel, job))

    async def call(self, work: Callable[[], Result]) -> Result:
        """Call a function in the engine's thread, between two steps."""
        done: concurrent.futures.Future[Result] = concurrent.futures.Future()

        def order() -> None:
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)

        self._orders.put(order)
        return await asyncio.wrap_future(done)

    # ------------------------------------------------------------------------- in its own thread

    def _run(self) -> None:
        while self._obey():
            if self._jobs:
                self._step()
        for job in list(self._jobs.values()):
            self._cancel(job)

    def _obey(self) -> bool:
        """Do what has been ordered; without a job, wait for an order. False: to end."""
        with contextlib.suppress(queue.Empty):
            order = self._orders.get(block=not self._jobs)
            while order is not None:
                order()
                order = self._orders.get_nowait()
            return False
        return True

    def _begin(self, job: Job) -> None:
        try:
            job.handle = self.server.submit(job.request)
        except Exception as error:
            job.put(error)
            return
        self._jobs[job.handle.number] = job

    def _cancel(self, job: Job) -> None:
        if job.handle is not None and job.handle.number in self._jobs:
            del self._jobs[job.handle.number]
            self.server.cancel(job.handle)

    def _forget_finished(self, number: int) -> None:
        handle = self._jobs[number].handle
        if handle is not None and handle.finished:
            del self._jobs[number]

    def _drop_if_failed(self, job: Job) -> None:
        if job.handle is not None and job.handle.finished:
            del self._jobs[job.handle.number]
            job.put(failed(job.handle.completion.error))

    def _step(self) -> None:
        """Run one step, and hand over its tokens."""
        streamed = any(job.streamed for job in self._jobs.values())
        try:
            events = self.server.step(1 if streamed else MOST_TOKENS)
        except Exception:
            _log.exception("a step failed; the requests that it worked on end with an error")
            for job in list(self._jobs.values()):
                self._drop_if_failed(job)
            return
        for number, group in itertools.groupby(events, lambda event: event.request):
            own = list(group)
            if number not in self._jobs:
                continue  # it was cancelled
            self._jobs[number].put(own)
            if any(event.finish_reason for event in own):
                self._forget_finished(number)

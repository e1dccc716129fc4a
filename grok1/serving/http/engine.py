"""The thread that drives the model: requests enter it through a queue, and tokens leave it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from grok1.serving.http.errors import ApiError, failed
from grok1.serving.request import Event, Request
from grok1.serving.scheduler import Handle
from grok1.serving.steps import MOST_TOKENS

if TYPE_CHECKING:
    from runner import InferenceRunner

RETRY_SECONDS = 1  # about as long as it takes until one of many answers ends
STEP_SECONDS = 0.1  # within which a new request is begun, if a token does not take longer
Result = TypeVar("Result")
Delivery = tuple[int, list[Event]] | Exception  # events of the request of this number in its call

_log = logging.getLogger(__name__)


class Call:
    """Requests of one client, in the order of its prompts, and their tokens as they come.

    streamed: whether each token is wanted at once. jobs: one for each request.
    """

    def __init__(self, requests: Sequence[Request], streamed: bool):
        self.streamed = streamed
        self.jobs = [Job(self, number, request) for number, request in enumerate(requests)]
        self.left = [request.num_samples for request in requests]  # answers of each, to come
        self._found: asyncio.Queue[Delivery] = asyncio.Queue()

    def put(self, found: Delivery) -> None:
        """Hand over events of a request, or what ends the call; called in the event loop."""
        self._found.put_nowait(found)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield the number of a request and its event, up to the last ones of all answers."""
        while any(self.left):
            found = await self._found.get()
            if isinstance(found, Exception):
                raise found
            number, events = found
            for event in events:
                self.left[number] -= event.finish_reason is not None
                yield number, event


@dataclasses.dataclass(eq=False)
class Job:
    """A request in the engine: the one of this number in a call. handle: once it has begun."""

    call: Call
    number: int
    request: Request
    handle: Handle | None = None


class Engine:
    """Answers the requests of an event loop with a model, in a thread of its own.

    most_waiting: how many answers may wait for a slot; a request with more is refused.
    """

    def __init__(self, server: InferenceRunner, most_waiting: int):
        self.server = server
        self.most_waiting = most_waiting
        self.held: set[Job | Future[Any]] = set()  # what clients wait for
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}  # by the number of their handles
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread. Calls come from the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step; unfinished jobs are cancelled."""
        self._orders.put(None)
        self._thread.join()

    def end_calls(self, error: ApiError) -> None:
        """End all that clients wait for with an error."""
        for one in list(self.held):
            if isinstance(one, Job):
                one.call.put(error)
            else:
                with contextlib.suppress(concurrent.futures.InvalidStateError):  # it has ended
                    one.set_exception(error)

    @property
    def answers(self) -> int:
        """How many answers clients wait for."""
        return sum(one.call.left[one.number] if isinstance(one, Job) else 1 for one in self.held)

    @property
    def waiting(self) -> int:
        """How many answers wait for a slot, at least."""
        return max(0, self.answers - self.server.num_slots)

    @contextlib.contextmanager
    def call(self, requests: Sequence[Request], streamed: bool) -> Iterator[Call]:
        """Begin requests, which have been checked, and cancel what is unfinished at the end.

        Raises ApiError if too many wait.
        """
        call = Call(requests, streamed)
        self._check_room(sum(call.left))
        self.held.update(call.jobs)
        for job in call.jobs:
            self._orders.put(functools.partial(self._begin, job))
        try:
            yield call
        finally:
            self.held.difference_update(call.jobs)
            for job in call.jobs:
                self._orders.put(functools.partial(self._cancel, job))

    async def run(self, work: Callable[[], Result]) -> Result:
        """Call a function in the engine's thread, between two steps, unless this is cancelled.

        Raises ApiError if too many wait.
        """
        self._check_room(1)
        done: Future[Result] = Future()

        def order() -> None:
            # If `end_calls` has ended it, Python raises one of these, by its version.
            with contextlib.suppress(concurrent.futures.InvalidStateError, RuntimeError):
                if not done.set_running_or_notify_cancel():
                    return
                try:
                    done.set_result(work())
                except Exception as error:
                    done.set_exception(error)

        self.held.add(done)
        self._orders.put(order)
        try:
            return await asyncio.wrap_future(done)
        finally:
            self.held.discard(done)

    def _check_room(self, answers: int) -> None:
        """Raise ApiError if these answers do not fit into the queue, unless nothing else waits."""
        if self.held and self.answers + answers > self.server.num_slots + self.most_waiting:
            message = (
                f"expected at most {self.most_waiting} waiting answers, got more; try again later"
            )
            code, kind = "rate_limit_exceeded", "rate_limit_error"
            raise ApiError(429, message, code=code, kind=kind, retry=RETRY_SECONDS)

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
                try:
                    order()
                except Exception:  # the thread has to go on for the other clients
                    _log.exception("an order to the engine failed")
                order = self._orders.get_nowait()
            return False
        return True

    def _begin(self, job: Job) -> None:
        try:
            job.handle = self.server.submit(job.request)
        except Exception as error:
            self._deliver([(job.call, error)])
            return
        self._jobs[job.handle.number] = job

    def _cancel(self, job: Job) -> None:
        """Free the slot of a job, if it has one."""
        if job.handle is not None and job.handle.number in self._jobs:
            del self._jobs[job.handle.number]
            self.server.cancel(job.handle)

    def _step(self) -> None:
        """Run one step, and hand over its tokens."""
        try:
            events = self.server.step(self._count())
        except Exception:
            _log.exception("a step failed; the requests that it worked on end with an error")
            self._end_failed()
            return
        found: list[tuple[Call, Delivery]] = []
        for number, group in itertools.groupby(events, lambda event: event.request):
            if job := self._jobs.get(number):  # otherwise it was cancelled
                found.append((job.call, (job.number, list(group))))
                if job.handle is not None and job.handle.finished:
                    del self._jobs[number]
        self._deliver(found)

    def _count(self) -> int:
        """Return how many tokens to draw: one for streams, otherwise what takes a short time."""
        done = self.server.statistics
        if any(job.call.streamed for job in self._jobs.values()):
            return 1
        most = STEP_SECONDS * done.steps / done.seconds if done.seconds else MOST_TOKENS
        return max(1, min(int(most), MOST_TOKENS))

    def _end_failed(self) -> None:
        for number, job in list(self._jobs.items()):
            if job.handle is not None and job.handle.finished:
                del self._jobs[number]
                self._deliver([(job.call, failed(job.handle.completion.error))])

    def _deliver(self, found: list[tuple[Call, Delivery]]) -> None:
        """Hand over what was found to the event loop, at once, as waking it takes time."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(_hand_over, found)


def _hand_over(found: list[tuple[Call, Delivery]]) -> None:
    for call, each in found:
        call.put(each)

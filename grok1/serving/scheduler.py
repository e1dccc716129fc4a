"""Continuous batching: assigns requests to slots and chooses the next step.

A request is queued until a slot is free and joins while the other sequences continue. One step of
`Scheduler` is at most one chunk of a prompt, and one or a few tokens for every decoding sequence,
so no sequence waits longer than one chunk. A sequence's result does not depend on the rest of the
batch: its prompt is chunked by its own length, and the compiled steps keep the slots independent.

Each answer to a request takes one slot. The first answer reads the prompt, and the others copy its
cache and logits. A prompt that begins like one that a slot still holds copies that part, and only
the rest is read. A slot is started, which makes it lose what it holds, as late as possible: when
its first chunk is read. By then, the prompts before it have been read, and can be copied.

The devices run one step ahead of the host: a step is dispatched before the tokens of the previous
one are read, except for a first token when no other sequence is decoding. The device detects the
last token of a slot itself. Only the host can detect a stop string, so the tokens drawn after one
are discarded.

Any thread may call, at any time. A lock is held while a step is dispatched and the tokens of the
previous one are delivered, each to the queue of its caller, whichever thread runs the step. Ctrl-C
waits for the end of a step.
"""

import collections
import dataclasses
import itertools
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self, TypeVar, TypeVarTuple

import jax
import numpy as np

from grok1.checks import is_integer
from grok1.interrupts import uninterrupted
from grok1.parallel.sharding import axis_size
from grok1.serving.hooked import not_finite, with_hooks
from grok1.serving.prompt_cache import CachedPrompt, PromptCache
from grok1.serving.request import Answer, CheckedRequest, Completion, Event
from grok1.serving.steps import (
    MOST_TOKENS,
    LoadedModel,
    PromptScores,
    State,
    decode,
    first_token,
    new_state,
    prefill,
    start,
    unpack,
)

# Steps of all schedulers that are dispatched and not known to be done. XLA's CPU client has a limit
# of its own; beyond it, devices that wait for each other in a collective deadlock.
MOST_IN_FLIGHT = 16
_schedulers: weakref.WeakSet["Scheduler"] = weakref.WeakSet()
HAND_OVER = 1e-4  # seconds that let a thread waiting for the lock acquire it


def chunk_lengths(prompt: int, sizes: Sequence[int]) -> list[int]:
    """Return the lengths of the chunks in which a prompt is read, taken from ascending `sizes`.

    Depends only on the prompt's length: if other prompts in the batch changed the chunks, they
    would also change the rounding.
    """
    whole, rest = divmod(prompt, sizes[-1])
    return [sizes[-1]] * whole + [size for size in sizes if size >= rest > 0][:1]


class EventQueue:
    """The events of some requests that their caller has not taken yet.

    open: the requests that have not ended. read_by_step: whether `Scheduler.step` returns them.
    """

    def __init__(self, read_by_step: bool = False) -> None:
        self.open: set[Handle] = set()
        self.read_by_step = read_by_step
        self._events: collections.deque[Event] = collections.deque()

    def __bool__(self) -> bool:
        return bool(self._events)

    def put(self, event: Event) -> None:
        """Append an event."""
        self._events.append(event)

    def put_back(self, event: Event) -> None:
        """Insert an event as the first one."""
        self._events.appendleft(event)

    def take(self) -> Event | None:
        """Remove the first event and return it; None if there is none. From any thread."""
        try:
            return self._events.popleft()
        except IndexError:
            return None


class Handle:
    """A submitted request.

    number: how many were submitted before it. completions: its num_samples answers so far; the
    finish_reason of an unfinished one is None. completion: the first answer.
    """

    def __init__(
        self, owner: object, number: int, name: int, checked: CheckedRequest, queue: EventQueue
    ):
        self.number = number
        self._owner = owner  # identifies the scheduler without keeping its memory alive
        self._name = name  # in its events
        self._checked = checked
        self._queue = queue
        self._answers: dict[int, Answer] = {0: Answer(checked)}  # others are created on demand
        self._begun = 0  # number of answers that have been given a slot
        self._told: set[int] = set()  # the answers whose last event has been put
        self._ended: tuple[str, str | None] | None = None  # how the remaining answers ended
        queue.open.add(self)

    @property
    def completions(self) -> list[Completion]:
        """The answers so far."""
        return [self._answer(i).completion for i in range(self._checked.request.num_samples)]

    @property
    def completion(self) -> Completion:
        """The first answer so far."""
        return self._answers[0].completion

    @property
    def finished(self) -> bool:
        """Whether all its answers have ended."""
        return self._ended is not None or len(self._told) == self._checked.request.num_samples

    def __copy__(self) -> Self:
        return self  # it refers to state in the scheduler

    def __deepcopy__(self, _: object) -> Self:
        return self

    def __repr__(self) -> str:
        reasons = [answer.finish_reason or "in progress" for answer in self.completions]
        return f"<request {self.number}: {', '.join(reasons)}>"

    def _answer(self, sample: int) -> Answer:
        answer = self._answers.get(sample)
        if answer is None:
            answer = Answer(self._checked, sample)
            # All answers share the lists of the one prompt.
            answer.completion.prompt_logprobs = self.completion.prompt_logprobs
            answer.completion.prompt_top_logprobs = self.completion.prompt_top_logprobs
            answer = self._answers.setdefault(sample, answer)  # another thread may also create it
        if self._ended:
            answer.end(*self._ended)
        return answer

    def _end(self, reason: str, error: str | None) -> list[int]:
        """End all unfinished answers; return those whose end has not been reported yet."""
        if self.finished:
            return []
        self._ended = reason, error
        for sample in list(self._answers):
            self._answer(sample)
        return [i for i in range(self._checked.request.num_samples) if i not in self._told]


class _Sequence:
    """One answer of a request, as served by a slot.

    prompt: its prompt, with the number of tokens that the slot's cache holds. chunks: lengths of
    the prompt chunks still to be read; none if another answer reads them. started: whether the slot
    has been made ready for it. in_flight: number of tokens that may have been drawn but are not yet
    read by the host.
    """

    def __init__(
        self,
        handle: Handle,
        answer: Answer,
        slot: int,
        prompt: CachedPrompt,
        chunks: Sequence[int],
    ):
        self.handle = handle
        self.answer = answer
        self.slot = slot
        self.prompt = prompt
        self.chunks = collections.deque(chunks)
        self.started = False
        self.begun = False  # its first token has been dispatched
        self.in_flight = 0

    @property
    def finished(self) -> bool:
        return self.answer.ended

    @property
    def decoding(self) -> bool:
        """Whether it may need more tokens than are in flight."""
        due = self.answer.count + self.in_flight
        return self.begun and not self.finished and due < self.answer.checked.limit

    def next_chunk(self) -> tuple[int, Sequence[int], Sequence[int]]:
        """Return the next chunk: its compiled length, its tokens, and the token after each."""
        size, prompt = self.chunks.popleft(), self.prompt
        first, prompt.read = prompt.read, min(prompt.read + size, len(prompt.ids))
        return size, prompt.ids[first : prompt.read], prompt.ids[first + 1 : prompt.read + 1]


class _Tokens(NamedTuple):
    """Tokens in flight: up to `most` for each of the sequences, keyed by slot.

    number: of the step that draws them. first: they are the sequences' first tokens, drawn without
    running the model.
    """

    number: int
    found: jax.Array
    most: int
    drawing: dict[int, _Sequence]
    first: bool


class _Scores(NamedTuple):
    """Prompt scores in flight; `scored` maps a row to its request and number of tokens."""

    number: int
    found: PromptScores
    scored: dict[int, tuple[Handle, int]]


@dataclasses.dataclass
class Statistics:
    """Counts and times since the statistics were last reset.

    steps: number of decode steps. tokens: number of tokens drawn in them. seconds: time spent in
    steps, except those that may have compiled. waiting: the part of `seconds` in which the host
    waited for the devices; the rest is the host's own work. prompt_tokens: number of prompt tokens
    that were read or copied, over all answers. reused_tokens: the copied ones, which had been read
    for another answer or for another prompt with the same beginning.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    prompt_tokens: int = 0
    reused_tokens: int = 0

    @property
    def slots_used(self) -> float:
        """The mean number of slots that drew a token in a decode step."""
        return self.tokens / max(1, self.steps)

    @property
    def host_share(self) -> float:
        """The fraction of the time in which the host was working."""
        return 1 - self.waiting / self.seconds if self.seconds else 0.0


Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")
Kind = tuple[int, bool, bool]  # of a prompt's chunk; see `_kind`
Phase = Callable[[str], object]  # called with "prefill" or "decode" as each begins


class Scheduler:
    """The slots, the requests in them, the queue of waiting requests, and `statistics`.

    prefix_cache: as in InferenceRunner. Raises RuntimeError in a process forked after the model was
    loaded, in which jax does not work.
    """

    def __init__(self, model: LoadedModel, prefix_cache: bool = True):
        self._params = model.params
        self._mesh = model.mesh
        self._config, self._executions = model.config, model.executions
        self._hooks, self._hook_args = model.hooks, model.hook_args
        self._rounded = model.rounded
        self._num_slots = model.num_slots
        # Parts into which the data axis divides the slots.
        self._parts = axis_size(model.mesh, model.config.model.data_axis)
        self._pad_sizes = model.pad_sizes
        self._prefix_cache = prefix_cache
        self._process = os.getpid()
        self._identity = object()
        self._lock = threading.RLock()
        self._inside: set[int] = set()  # threads that hold the lock or wait for it
        self._submitted = 0
        self._line: collections.deque[Handle] = collections.deque()  # with answers without a slot
        self._slots: list[_Sequence | None] = [None] * model.num_slots
        # A prompt stays while answers wait to copy it: they are the first in the queue for every
        # free slot, and the slot that holds it is the first that they are given.
        self._prompts = PromptCache(model.num_slots, model.pad_sizes[-1])
        self._dispatched: list[_Tokens | _Scores] = []
        self._given_up: collections.deque[Handle] = collections.deque()  # to be cancelled
        self._unread: dict[EventQueue, None] = {}  # queues with events that `step` returns
        self._state: State | None = None
        self._torn = False  # a step is running, or was interrupted and not cleaned up
        self._dispatches = self._done = 0  # number of steps dispatched, and known to be done
        self._waited = 0.0  # seconds spent waiting for the devices
        self._known: set[tuple[object, Kind | None]] = set()  # programs that have been run
        self.statistics = Statistics()
        _schedulers.add(self)

    def alone(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Call a function while holding the lock."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "this process was forked after the model was loaded, and jax does not work in it; "
                'load the model in the process that uses it, started by "spawn"'
            )
        if self._lock._is_owned():  # type: ignore[attr-defined]
            raise RuntimeError("called from inside another call of the same thread")
        thread = threading.get_ident()
        if self._inside - {thread}:
            time.sleep(HAND_OVER)  # otherwise this thread would mostly get the lock again
        try:
            self._inside.add(thread)
            with self._lock:  # Python's own lock: an interrupt leaves it neither held nor lost
                while self._given_up:
                    self._end(self._given_up[0], "cancelled")
                    self._given_up.popleft()
                return work(*arguments)
        finally:
            self._inside.discard(thread)

    @property
    def busy(self) -> bool:
        """Whether any request has not ended, or any event is left for `step` to return."""
        return self.alone(lambda: not self._idle() or any(self._unread))

    def submit(self, checked: CheckedRequest) -> Handle:
        """Queue a request."""
        return self.alone(self._submit, checked, EventQueue(read_by_step=True))

    def cancel(self, handle: Handle) -> None:
        """End a request now; answers that have ended stay unchanged. Raises ValueError."""
        self._check_own(handle)
        self.alone(self._end, handle, "cancelled")

    def step(self, tokens: int = 1) -> list[Event]:
        """Dispatch the next step and return the events of the previous one.

        tokens: how many to draw per dispatch for each decoding sequence, if no prompt is being
        read. The events are those of all submitted requests that are not streamed, including events
        of steps run by other calls in the meantime. If the step fails, the requests in the slots
        end with an error; waiting requests stay queued. Raises ValueError if `tokens` is not from
        1 to MOST_TOKENS.
        """
        self.alone(self._step, tokens)
        events: list[Event] = []
        sources: list[EventQueue] = []
        try:
            self.alone(self._take_unread, events, sources)
        except KeyboardInterrupt:  # the caller does not get them
            self.alone(self._put_back, events, sources)
            raise
        return events

    def stream(self, handle: Handle, tokens: int = 1) -> Iterator[Event]:
        """Return an iterator over the tokens of one request; all other requests also advance.

        Raises ValueError if the request belongs to another scheduler, or as `step` for `tokens`.
        """
        self._check_own(handle)
        _check_tokens(tokens)
        self.alone(self._stop_reading, handle._queue)
        return self._read(handle._queue, tokens)

    def answer(
        self, requests: Iterable[CheckedRequest], tokens: int = 1, phase: Phase = lambda _: None
    ) -> Iterator[Event]:
        """Return an iterator over the tokens of many requests; closing it cancels them.

        Requests are consumed one by one as slots become free, so many requests need no extra time
        or memory. In their events they are numbered from 0.
        """
        queue, pending = EventQueue(), enumerate(requests)

        def refill() -> None:
            # One more per slot, since all slots may become free in the next step.
            room = max(0, 2 * self._num_slots - len(queue.open))
            for name, checked in itertools.islice(pending, room):
                self._submit(checked, queue, name)

        try:
            yield from self._read(queue, tokens, phase, refill)
        finally:
            # Deferred: garbage collection may close an iterator in the middle of a step.
            self._given_up.extend(queue.open)

    def release(self) -> None:
        """Release the memory of the slots if it is unused. To be called through `alone`."""
        if self._idle():
            self._forget()

    # ------------------------------------------------------------------------------ the requests

    def _check_own(self, handle: Handle) -> None:
        if not isinstance(handle, Handle):
            raise ValueError(f"expected a handle from submit, got {handle!r}")
        if handle._owner is not self._identity:
            raise ValueError(f"{handle!r} was submitted to another server; use that server")

    def _submit(
        self, checked: CheckedRequest, queue: EventQueue, name: int | None = None
    ) -> Handle:
        name = self._submitted if name is None else name
        handle = Handle(self._identity, self._submitted, name, checked, queue)
        self._submitted += 1
        self._line.append(handle)
        return handle

    def _read(
        self,
        queue: EventQueue,
        tokens: int,
        phase: Phase = lambda _: None,
        refill: Callable[[], object] = lambda: None,
    ) -> Iterator[Event]:
        """Return an iterator over the events of a queue, running steps until its requests end.

        refill: called after each step.
        """

        def advance() -> bool:
            if not queue and queue.open:
                self._step(tokens, phase)
            refill()
            return not all(handle.finished for handle in queue.open)

        going_on = True
        while going_on:
            going_on = self.alone(advance)
            yield from iter(queue.take, None)

    def _stop_reading(self, queue: EventQueue) -> None:
        """Have `step` return no more events of a queue."""
        queue.read_by_step = False
        self._unread.pop(queue, None)

    def _take_unread(self, events: list[Event], sources: list[EventQueue]) -> None:
        """Append the events that `step` returns, and the queue of each."""
        with uninterrupted():
            for queue in self._unread:
                for event in iter(queue.take, None):
                    events.append(event)
                    sources.append(queue)
            self._unread = {}

    def _put_back(self, events: list[Event], sources: list[EventQueue]) -> None:
        """Undo `_take_unread`."""
        with uninterrupted():
            for event, queue in zip(reversed(events), reversed(sources), strict=True):
                queue.put_back(event)
                if queue.read_by_step:
                    self._unread[queue] = None

    def _first_in_line(self) -> Handle | None:
        while self._line and self._line[0].finished:
            self._line.popleft()
        return self._line[0] if self._line else None

    def _idle(self) -> bool:
        """Whether there is nothing to do; results still in flight are discarded."""
        return not self._first_in_line() and all(s is None or s.finished for s in self._slots)

    def _end(self, handle: Handle, reason: str, error: str | None = None) -> None:
        """End all unfinished answers to a request; if with an error, put events that say so."""
        with uninterrupted():
            for sample in handle._end(reason, error):
                if error:
                    self._put(handle, handle._answer(sample), None, "")
            handle._queue.open.discard(handle)

    def _put(self, handle: Handle, answer: Answer, token: int | None, text: str) -> None:
        """Put an event for a token, or for the end of the answer, in the request's queue."""
        event = Event(handle._name, token, text, answer.completion, answer.sample, answer.reason)
        handle._queue.put(event)
        if handle._queue.read_by_step:
            self._unread[handle._queue] = None
        if answer.ended:
            handle._told.add(answer.sample)
        if handle.finished:
            handle._queue.open.discard(handle)

    # ---------------------------------------------------------------------------- scheduling

    def _step(self, tokens: int, phase: Phase = lambda _: None) -> None:
        """Dispatch the next step, and deliver the tokens of the previous one."""
        _check_tokens(tokens)
        with uninterrupted():
            self._whole_step(tokens, phase)

    def _whole_step(self, tokens: int, phase: Phase) -> None:
        began, waited, known = time.perf_counter(), self._waited, len(self._known)
        if self._torn:  # by a third Ctrl-C
            self._abandon(KeyboardInterrupt())
        self._torn = True
        before, self._dispatched = self._dispatched, []
        try:
            others = any(sequence.decoding for sequence in self._slots if sequence)
            self._fill()
            self._read_prompts(phase)
            if others or before or not self._dispatched:
                self._decode(tokens, phase)
            else:
                # Nothing else is decoding: deliver the first token before decode may compile.
                before, self._dispatched = self._dispatched, []
            for found in before:
                self._deliver(found)
            self._torn = False
        except BaseException as error:
            self._abandon(error)  # memory donated to a failed step is lost
            raise
        finally:
            if len(self._known) == known:
                self.statistics.seconds += time.perf_counter() - began
                self.statistics.waiting += self._waited - waited

    def _fill(self) -> None:
        """Free the slots of finished answers, and give them to waiting ones, in order."""
        for slot, sequence in enumerate(self._slots):
            if sequence is not None and sequence.finished:
                self._slots[slot] = None
                if sequence.started:
                    self._prompts.use(slot)
        free = {slot for slot, sequence in enumerate(self._slots) if sequence is None}
        while free and (handle := self._first_in_line()):
            free.remove(self._place(handle, free))
        self._begin()

    def _place(self, handle: Handle, free: Iterable[int]) -> int:
        """Give one of the free slots to the next answer of a request; return which."""
        checked, answer = handle._checked, handle._answer(handle._begun)
        # Scores are needed of every prompt token, and come from another program than other chunks.
        shared = self._prefix_cache and not checked.request.prompt_logprobs
        prompt = CachedPrompt(handle.number, checked.ids, shared)
        chunks = () if answer.sample else chunk_lengths(len(checked.ids), self._pad_sizes)
        slot = self._prompts.choose(prompt, free)
        self._slots[slot] = _Sequence(handle, answer, slot, prompt, chunks)
        handle._begun += 1
        if handle._begun == checked.request.num_samples:
            self._line.popleft()
        return slot

    def _start(self, sequence: _Sequence) -> None:
        """Make a slot ready, with as much of the prompt as another slot, or itself, holds."""
        slot, prompt, answer = sequence.slot, sequence.prompt, sequence.answer
        source, prompt.read = self._prompts.find(prompt, slot)
        for _ in range(prompt.read // self._pad_sizes[-1] if sequence.chunks else 0):
            sequence.chunks.popleft()
        self._prompts.put(prompt, slot, source)
        self.statistics.prompt_tokens += prompt.read
        self.statistics.reused_tokens += prompt.read
        inputs = np.int32(slot), answer.checked.slot(answer.sample), np.int32(prompt.read)
        self._state = self._run(start, self._current(), *inputs, np.int32(source))
        sequence.started = True

    def _current(self) -> State:
        if self._state is None:
            self._state = new_state(
                config=self._config, batch=self._num_slots, execution=self._executions.decode
            )
            if self._mesh is None:
                # Committed to the device, as the outputs of steps are, to avoid recompilation.
                device = jax.tree.leaves(self._params)[0].sharding
                self._state = jax.device_put(self._state, device)
        return self._state

    def _read_prompts(self, phase: Phase) -> None:
        """Dispatch a chunk of the oldest prompt that is not read yet.

        Each part of the data axis reads one chunk; all chunks of a step have the same length.
        """
        reading = [s for s in self._slots if s is not None and s.chunks]
        if not reading:
            return
        phase("prefill")
        chosen = self._choose_chunks(reading)
        size, scored, top = kind = _kind(next(iter(chosen.values())))
        per_part = self._num_slots // self._parts
        tokens, following = np.zeros([2, self._parts, size], np.int32)
        length = np.zeros([self._parts], np.int32)
        places = np.arange(self._parts, dtype=np.int32) * per_part
        counts = {}
        for part, sequence in chosen.items():
            _, chunk, after = sequence.next_chunk()
            length[part], places[part] = len(chunk), sequence.slot
            tokens[part, : len(chunk)], following[part, : len(after)] = chunk, after
            counts[part] = sequence.handle, len(after)
        self.statistics.prompt_tokens += int(length.sum())
        inputs = [tokens, length, places, *([following] if scored else [])]
        state = self._current()
        scores, self._state = self._run(
            with_hooks(prefill, self._hooks), self._params, state, *inputs, kind=kind,
            top_logprobs=top, hook_args=self._hook_args,
        )  # fmt: skip
        if scores is not None:
            self._dispatched.append(_Scores(self._dispatches, scores, counts))
        self._begin()

    def _choose_chunks(self, reading: Iterable[_Sequence]) -> dict[int, _Sequence]:
        """Return the sequence whose next chunk is read by each part of the data axis, oldest first.

        All their chunks are of one kind.
        """
        per_part = self._num_slots // self._parts
        chosen: dict[int, _Sequence] = {}
        for sequence in sorted(reading, key=lambda sequence: sequence.handle.number):
            if (part := sequence.slot // per_part) in chosen:
                continue
            if not sequence.started:
                self._start(sequence)
            if not chosen or _kind(sequence) == _kind(next(iter(chosen.values()))):
                chosen[part] = sequence
        return chosen

    def _begin(self) -> None:
        """Dispatch the first token of all sequences whose prompt has been read."""
        drawing = np.zeros([self._num_slots], bool)
        waiting = [s for s in self._slots if s is not None and not s.begun and not s.chunks]
        # In the order of the queue, as a slot loses the prompt that it held.
        for sequence in sorted(waiting, key=lambda s: (s.handle.number, s.answer.sample)):
            prompt = sequence.prompt
            if not sequence.started:
                if self._prompts.find(prompt, sequence.slot)[1] < len(prompt.ids):
                    continue  # another answer is reading it
                self._start(sequence)
            drawing[sequence.slot] = True
        if not drawing.any():
            return
        found, self._state = self._run(first_token, self._current(), drawing)
        beginning = {s.slot: s for s in waiting if drawing[s.slot]}
        for sequence in beginning.values():
            sequence.begun = True
        self._note(found, 1, beginning, first=True)

    def _decode(self, tokens: int, phase: Phase) -> None:
        """Dispatch the next tokens of all decoding sequences."""
        decoding = {i: s for i, s in enumerate(self._slots) if s is not None and s.decoding}
        if not decoding:
            return
        phase("decode")
        ready = all(sequence is None or sequence.begun for sequence in self._slots)
        count = tokens if ready else 1
        running = np.zeros([self._num_slots], bool)
        running[list(decoding)] = True
        waiting = self._first_in_line() is not None
        given = running, np.int32(count), np.bool_(waiting), self._rounded
        state = self._current()
        found, self._state = self._run(
            with_hooks(decode, self._hooks), self._params, state, *given, hook_args=self._hook_args
        )
        self._note(found, count, decoding, first=False)

    def _run(
        self,
        step: Callable[..., Result],
        *inputs: object,
        kind: Kind | None = None,
        **options: object,
    ) -> Result:
        """Dispatch a step; each kind has one program, compiled when it is first run.

        kind: that of a prompt chunk; None for all other steps, which use the decode execution.

        Inputs from the host are NumPy arrays: unlike arrays on one process's device, they are valid
        on a mesh of several processes, and jax transfers them faster in the call than separately.
        """
        if self._dispatches - self._done >= max(1, MOST_IN_FLIGHT // len(_schedulers)):
            self._wait(self._state)
            self._done = self._dispatches
        self._dispatches += 1
        self._known.add((step, kind))
        how = self._executions
        execution = how.decode if kind is None else how.prefill
        return step(*inputs, config=self._config, execution=execution, **options)

    def _note(
        self, found: jax.Array, count: int, drawing: dict[int, _Sequence], *, first: bool
    ) -> None:
        for sequence in drawing.values():
            sequence.in_flight += count
        self._dispatched.append(_Tokens(self._dispatches, found, count, drawing, first))

    # ---------------------------------------------------------------------------- what comes back

    def _deliver(self, done: _Tokens | _Scores) -> None:
        """Deliver the results of a step to the sequences that have not ended in the meantime."""
        if isinstance(done, _Scores):
            self._deliver_scores(done)
            return
        for sequence in done.drawing.values():
            sequence.in_flight -= done.most
        if all(sequence.finished for sequence in done.drawing.values()):
            return
        asked = any(s.answer.checked.request.top_logprobs for s in done.drawing.values())
        found = unpack(*self._fetch(done.number, done.found))
        if not done.first:
            self.statistics.tokens += int(found.drawn.sum())
            self.statistics.steps += int(found.drawn.any(axis=1).sum())
        top = (found.top_logprob_ids, found.top_logprobs) if asked else ()
        for i, slot in np.argwhere(found.drawn).tolist():
            sequence = done.drawing[slot]
            if sequence.finished:
                continue
            token, logprob = int(found.token[i, slot]), float(found.logprob[i, slot])
            if math.isnan(logprob):
                self._fail(sequence, not_finite(self._hooks))
            else:
                first = [x[i, slot] for x in top] if asked else ([], [])
                self._take(sequence, token, logprob, *first)

    def _deliver_scores(self, done: _Scores) -> None:
        wanted = [array for array in done.found if array is not None]
        scores, *top = self._fetch(done.number, *wanted)
        for row, (handle, count) in done.scored.items():
            if np.all(np.isfinite(scores[row, :count])):
                handle._answers[0].take_prompt(*(x[row, :count] for x in (scores, *top)))
            else:
                self._end(handle, "error", not_finite(self._hooks))

    def _take(self, sequence: _Sequence, token: int, logprob: float, *first: Any) -> None:
        """Give a token to a sequence."""
        try:
            text = sequence.answer.take(token, logprob, *first)
        except Exception as error:  # from the tokenizer: must not end other sequences
            self._fail(sequence, f"token {token} could not be decoded ({error})")
            return
        self._put(sequence.handle, sequence.answer, token, text)

    def _fail(self, sequence: _Sequence, error: str) -> None:
        """End one answer with an error."""
        sequence.answer.end("error", error)
        self._put(sequence.handle, sequence.answer, None, "")

    def _fetch(self, number: int, *arrays: jax.Array) -> list[np.ndarray]:
        """Wait for arrays of a step and return them as NumPy arrays."""
        self._wait(arrays)
        self._done = max(self._done, number)
        for array in arrays:  # as jax.device_get does, in half the time
            array.copy_to_host_async()
        return [np.asarray(array) for array in arrays]

    def _wait(self, arrays: object) -> None:
        began = time.perf_counter()
        jax.block_until_ready(arrays)
        self._waited += time.perf_counter() - began

    def _abandon(self, error: BaseException) -> None:
        """End all requests in the slots with an error."""
        reason = f"{type(error).__name__}: {error}".strip(": ").splitlines()[0]
        message = f"the step that worked on it did not finish ({reason}); try again"
        # Also queued requests whose remaining answers would have copied a prompt that is now lost.
        begun = [handle for handle in self._line if handle._begun]
        for handle in [*begun, *(sequence.handle for sequence in self._slots if sequence)]:
            self._end(handle, "error", message)
        self._forget()

    def _forget(self) -> None:
        self._slots = [None] * self._num_slots
        self._dispatched, self._state = [], None
        self._prompts = PromptCache(self._num_slots, self._pad_sizes[-1])
        self._torn = False


def generate_alone(model: LoadedModel, requests: Iterable[CheckedRequest]) -> list[Event]:
    """Answer requests in a separate scheduler; return the last event of each answer."""
    own = Scheduler(model, prefix_cache=False)
    return [e for e in own.answer(requests, MOST_TOKENS) if e.finish_reason is not None]


def _check_tokens(tokens: int) -> None:
    """Raise ValueError unless a step can draw this number of tokens."""
    if not is_integer(tokens) or tokens not in range(1, MOST_TOKENS + 1):
        raise ValueError(f"tokens must be an integer from 1 to {MOST_TOKENS}, got {tokens!r}")


def _kind(sequence: _Sequence) -> Kind:
    """Return the next chunk's length, and whether its logprobs and top logprobs are needed."""
    checked = sequence.answer.checked
    return sequence.chunks[0], checked.request.prompt_logprobs, checked.prompt_top_logprobs

"""Which request is in which slot, and what the next step is: continuous batching.

A request waits in line for a free slot and takes it while the others go on. A step of `Scheduler`
is at most one chunk of a prompt and a token, or a few, for all that are decoding, so that no
sequence waits longer than a chunk. What a sequence gets depends on nothing but itself: its prompt
is cut by its own length, and the compiled steps keep the slots apart.

The answers to one request take a slot each. The first reads the prompt, and the others take over
what it has read.

The devices are a step ahead of the host: a step is dispatched before the tokens of the one before
it are read, but for the first token where no other sequence is going on. A slot knows itself when
it has drawn its last token; what only the host can see, a stop string, costs tokens that are thrown
away.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from grok1.parallel.sharding import axis_size
from grok1.serving.request import Answering, Completion, Event
from grok1.serving.steps import (
    MOST_TOKENS,
    Decoded,
    LoadedModel,
    State,
    decode,
    first_token,
    new_state,
    prefill,
    start,
)


def chunk_lengths(prompt: int, sizes: Sequence[int]) -> list[int]:
    """Return the chunks, of lengths from `sizes`, rising, in which a prompt is read.

    A function of its own length only: company must not change how a prompt is cut, or its rounding
    would depend on it.
    """
    whole, rest = divmod(prompt, sizes[-1])
    return [sizes[-1]] * whole + [size for size in sizes if size >= rest > 0][:1]


class Handle:
    """A request that was submitted.

    number: how many were submitted before it. completions: its answers so far, as many as the
    request's num_samples; the finish_reason of one that goes on is None. completion: the first.
    """

    def __init__(self, number: int, answers: Sequence[Answering], chunks: Sequence[int]):
        self.number = number
        self._sequences = [
            _Sequence(self, answering, [] if answering.sample else chunks) for answering in answers
        ]
        self._events: collections.deque[Event] = collections.deque()  # for `Scheduler.stream`

    @property
    def completions(self) -> list[Completion]:
        """The answers so far."""
        return [sequence.completion for sequence in self._sequences]

    @property
    def completion(self) -> Completion:
        """The first answer so far."""
        return self._sequences[0].completion

    @property
    def finished(self) -> bool:
        """Whether all its answers have ended."""
        return all(sequence.finished for sequence in self._sequences)

    def __repr__(self) -> str:
        reasons = [answer.finish_reason or "in progress" for answer in self.completions]
        return f"<request {self.number}: {', '.join(reasons)}>"


class _Sequence:
    """One answer of a request: what a slot serves.

    source: the slot whose prompt it answers, once that has been read. in_flight: tokens that may
    have been drawn for it and are not read yet.
    """

    def __init__(self, handle: Handle, answering: Answering, chunks: Sequence[int]):
        self.handle = handle
        self.answering = answering
        self.chunks = collections.deque(chunks)  # lengths that it still has to read
        self.read = 0  # prompt tokens that have been read
        self.source: int | None = None
        self.begun = False  # its first token is on its way
        self.in_flight = 0

    @property
    def completion(self) -> Completion:
        return self.answering.completion

    @property
    def finished(self) -> bool:
        return self.completion.finish_reason is not None

    @property
    def decoding(self) -> bool:
        """Whether it may need more tokens than are on their way."""
        due = len(self.completion.token_ids) + self.in_flight
        return self.begun and due < self.answering.limit

    def next_chunk(self) -> tuple[int, list[int], list[int]]:
        """Return a chunk: its compiled length, its tokens, and the token after each."""
        size, prompt = self.chunks.popleft(), self.completion.prompt_ids
        first, self.read = self.read, min(self.read + size, len(prompt))
        return size, prompt[first : self.read], prompt[first + 1 : self.read + 1]


class _Tokens(NamedTuple):
    """Tokens that are on their way: up to `most` for each of the sequences, by slot.

    first: they are the first ones, for which the model need not be run.
    """

    found: Decoded
    most: int
    drawing: dict[int, _Sequence]
    first: bool


class _Scores(NamedTuple):
    """Log-probabilities [R, T] of a prompt's tokens that are on their way: by row, whose."""

    found: Any
    scored: dict[int, tuple[_Sequence, int]]


@dataclasses.dataclass
class Statistics:
    """What has been done since the count began.

    steps: times that the model was run to decode. tokens: those that were drawn in these. seconds:
    that steps took, but for those that may have had to compile; waiting: of these, until the
    devices were ready, while the host had nothing to do. The rest is the host's own work.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    waiting: float = 0.0

    @property
    def slots_used(self) -> float:
        """How many slots had a token drawn in a step, in the mean."""
        return self.tokens / max(1, self.steps)

    @property
    def host_share(self) -> float:
        """The part of the time in which the host was at work."""
        return 1 - self.waiting / self.seconds if self.seconds else 0.0


class Scheduler:
    """Slots, the requests in them, and the line before them.

    The attribute `phase` is called with "prefill" and "decode" as these begin; `statistics` counts.
    """

    def __init__(self, model: LoadedModel):
        self._params = model.params
        self._mesh = model.mesh
        self._config, self._executions = model.config, model.executions
        self._num_slots = model.num_slots
        # Of the slots, over the data axis.
        self._parts = axis_size(model.mesh, model.config.model.data_axis)
        self._pad_sizes = model.pad_sizes
        self._submitted = 0
        self._waiting: collections.deque[_Sequence] = collections.deque()
        self._slots: list[_Sequence | None] = [None] * model.num_slots
        # Whose prompt is in the cache of a slot. While answers wait to take one over, it is there:
        # they are first in line for every slot that becomes free.
        self._prompts: dict[int, Handle] = {}
        self._dispatched: list[_Tokens | _Scores] = []
        self._state: State | None = None
        self._waited = 0.0  # seconds, for the devices
        self._known: set[Any] = set()  # programs that have been run
        self.phase: Callable[[str], object] = lambda _: None
        self.statistics = Statistics()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do: what the devices may still be at is thrown away."""
        return not self._waiting and not any(self._slots)

    def submit(self, answering: Answering) -> Handle:
        """Put a request in line."""
        chunks = chunk_lengths(len(answering.completion.prompt_ids), self._pad_sizes)
        handle = Handle(self._submitted, answering.samples(), chunks)
        self._submitted += 1
        self._waiting.extend(handle._sequences)
        return handle

    def cancel(self, handle: Handle) -> None:
        """End a request where it is. What has ended stays as it is."""
        for sequence in handle._sequences:
            if not sequence.finished:
                sequence.completion.finish_reason = "cancelled"
                self._free(sequence)
        if any(sequence.handle is handle for sequence in self._waiting):
            self._waiting = collections.deque(s for s in self._waiting if s.handle is not handle)

    def step(self, tokens: int = 1) -> list[Event]:
        """Let the devices do the next step; returns the tokens of the one before it.

        tokens: how many to draw at a time for all that are decoding, where none reads its prompt.
        If it fails, the requests in the slots are cancelled; those in line stay there. Raises
        ValueError if `tokens` is not from 1 to MOST_TOKENS.
        """
        if tokens not in range(1, MOST_TOKENS + 1):
            raise ValueError(f"tokens must be an integer from 1 to {MOST_TOKENS}, got {tokens!r}")
        began, waited, known = time.perf_counter(), self._waited, len(self._known)
        before, self._dispatched = self._dispatched, []
        try:
            others = any(sequence.decoding for sequence in self._slots if sequence)
            self._fill()
            self._read_prompts()
            if others or before or not self._dispatched:
                self._decode(tokens)
            else:
                # Nobody waits for the devices, which may have to compile: the first token at once.
                before, self._dispatched = self._dispatched, []
            return [event for done in before for event in self._deliver(done)]
        except BaseException:
            self._abandon()  # memory that was given to a failed step is lost
            raise
        finally:
            if len(self._known) == known:
                self.statistics.seconds += time.perf_counter() - began
                self.statistics.waiting += self._waited - waited

    def stream(self, handle: Handle, tokens: int = 1) -> Iterator[Event]:
        """Return an iterator over the tokens of one request, which lets all others go on, too."""
        while True:
            while handle._events:
                yield handle._events.popleft()
            if handle.finished:
                return
            assert not self.idle, f"{handle!r} is in no slot"
            self.step(tokens)

    def release(self) -> None:
        """Give up the memory of the slots, if nothing uses it."""
        if self.idle:
            self._forget()

    # ---------------------------------------------------------------------------- scheduling

    def _fill(self) -> None:
        """Give free slots to those that wait, in their order."""
        for slot, taken in enumerate(self._slots):
            if taken is None and self._waiting:
                sequence = self._waiting.popleft()
                self._slots[slot] = sequence
                sequence.source = self._find_prompt(sequence.handle, slot)
                if self._prompts.get(slot) is not sequence.handle:
                    self._prompts.pop(slot, None)
                row = sequence.answering.slot()
                self._state = self._run(start, self._current(), np.int32(slot), row)
        self._begin()

    def _find_prompt(self, handle: Handle, slot: int) -> int | None:
        """Return a slot that holds the prompt of a request, `slot` itself if that does."""
        holding = [place for place, owner in self._prompts.items() if owner is handle]
        return slot if slot in holding else next(iter(holding), None)

    def _current(self) -> State:
        if self._state is None:
            self._state = new_state(
                config=self._config, batch=self._num_slots, execution=self._executions.decode
            )
            if self._mesh is None:
                # Bound to the device, as what steps return is: else they are compiled again.
                device = jax.tree.leaves(self._params)[0].sharding
                self._state = jax.device_put(self._state, device)
        return self._state

    def _read_prompts(self) -> None:
        """Dispatch a chunk of the prompt that came first.

        Each part of the data axis reads one, those of the others being as long.
        """
        reading = {i: s for i, s in enumerate(self._slots) if s is not None and s.chunks}
        if not reading:
            return
        self.phase("prefill")
        order = sorted(reading, key=lambda slot: reading[slot].handle.number)
        size, scored = _kind(reading[order[0]])
        per_part = self._num_slots // self._parts
        chosen: dict[int, int] = {}  # the slot by the part of the data axis
        for slot in order:
            if _kind(reading[slot]) == (size, scored):
                chosen.setdefault(slot // per_part, slot)
        tokens, following = np.zeros([2, self._parts, size], np.int32)
        length = np.zeros([self._parts], np.int32)
        places = np.array([chosen.get(i, i * per_part) for i in range(self._parts)], np.int32)
        counts = {}
        for part, slot in chosen.items():
            _, chunk, after = reading[slot].next_chunk()
            length[part] = len(chunk)
            tokens[part, : len(chunk)], following[part, : len(after)] = chunk, after
            counts[part] = reading[slot], len(after)
        inputs = [tokens, length, places, *([following] if scored else [])]
        state = self._current()
        scores, self._state = self._run(prefill, self._params, state, *inputs, kind=(size, scored))
        if scores is not None:
            self._dispatched.append(_Scores(scores, counts))
        for slot in chosen.values():
            if not reading[slot].chunks:
                self._prompts[slot] = reading[slot].handle
        self._begin()

    def _begin(self) -> None:
        """Dispatch the first token of all whose prompt has been read."""
        beginning: dict[int, _Sequence] = {}
        source, length = np.zeros([2, self._num_slots], np.int32)
        drawing = np.zeros([self._num_slots], bool)
        for slot, sequence in enumerate(self._slots):
            if sequence is None or sequence.begun:
                continue
            if sequence.source is None:
                sequence.source = self._find_prompt(sequence.handle, slot)
            if sequence.source is not None:
                beginning[slot] = sequence
                drawing[slot], source[slot] = True, sequence.source
                length[slot] = len(sequence.completion.prompt_ids)
        if not beginning:
            return
        state = self._current()
        found, self._state = self._run(first_token, state, drawing, source, length)
        for slot, sequence in beginning.items():
            sequence.begun = True
            self._prompts[slot] = sequence.handle
        self._note(found, 1, beginning, first=True)

    def _decode(self, tokens: int) -> None:
        """Dispatch the next tokens of all that are decoding."""
        decoding = {i: s for i, s in enumerate(self._slots) if s is not None and s.decoding}
        if not decoding:
            return
        self.phase("decode")
        ready = all(sequence is None or sequence.begun for sequence in self._slots)
        count = tokens if ready else 1
        running = np.zeros([self._num_slots], bool)
        running[list(decoding)] = True
        given = running, np.int32(count), np.bool_(bool(self._waiting))
        found, self._state = self._run(decode, self._params, self._current(), *given)
        self._note(found, count, decoding, first=False)

    def _run(self, step: Callable[..., Any], *inputs: Any, kind: Any = None) -> Any:
        """Dispatch a step; of one kind there is one program, compiled when it is first run.

        What the host gives are numpy arrays: legal on the mesh of many processes, which arrays on
        the device of one are not, and sent by jax's own call in less time than by hand.
        """
        self._known.add((step, kind))
        how = self._executions
        execution = how.prefill if step is prefill else how.decode
        return step(*inputs, config=self._config, execution=execution)

    def _note(
        self, found: Decoded, count: int, drawing: dict[int, _Sequence], *, first: bool
    ) -> None:
        for sequence in drawing.values():
            sequence.in_flight += count
        self._dispatched.append(_Tokens(found, count, drawing, first))

    # ---------------------------------------------------------------------------- what comes back

    def _deliver(self, done: _Tokens | _Scores) -> Iterator[Event]:
        """Take what a step has found, for those that have not ended since it was dispatched."""
        if isinstance(done, _Scores):
            scores = self._fetch(done.found)
            for row, (sequence, count) in done.scored.items():
                for other in sequence.handle._sequences:
                    other.answering.take_prompt(scores[row, :count].tolist())
            return
        for sequence in done.drawing.values():
            sequence.in_flight -= done.most
        if all(sequence.finished for sequence in done.drawing.values()):
            return
        asked = any(s.answering.request.top_logprobs for s in done.drawing.values())
        sample = done.found.sample
        wanted: list[Any] = [sample.token_id, sample.logprob, done.found.drawn]
        if asked:
            wanted += [sample.top_logprob_ids, sample.top_logprobs]
        tokens, logprobs, drawn, *top = self._fetch(wanted)
        if not done.first:
            self.statistics.tokens += int(drawn.sum())
            self.statistics.steps += int(drawn.any(axis=1).sum())
        for i, slot in np.argwhere(drawn).tolist():
            sequence = done.drawing[slot]
            if not sequence.finished:
                first = [x[i, slot] for x in top] if asked else ([], [])
                token, logprob = int(tokens[i, slot, 0]), float(logprobs[i, slot, 0])
                yield self._take(sequence, token, logprob, *first)

    def _take(self, sequence: _Sequence, token: int, logprob: float, *first: Any) -> Event:
        """Give a token to a sequence."""
        handle, answering = sequence.handle, sequence.answering
        text = answering.take(token, logprob, *first)
        if sequence.finished:
            self._free(sequence)
        answer = sequence.completion
        event = Event(handle.number, token, text, answer, answering.sample, answer.finish_reason)
        handle._events.append(event)
        return event

    def _fetch(self, arrays: Any) -> Any:
        """Return arrays as numpy's, when the devices have them."""
        began = time.perf_counter()
        jax.block_until_ready(arrays)
        self._waited += time.perf_counter() - began
        return jax.device_get(arrays)

    def _free(self, sequence: _Sequence) -> None:
        self._slots = [None if taken is sequence else taken for taken in self._slots]

    def _abandon(self) -> None:
        """End all that is in the slots."""
        for sequence in self._slots:
            if sequence is not None:
                self.cancel(sequence.handle)
        self._forget()

    def _forget(self) -> None:
        self._dispatched, self._prompts, self._state = [], {}, None


def _kind(sequence: _Sequence) -> tuple[int, bool]:
    """Return the length of its next chunk, and whether its tokens are scored."""
    return sequence.chunks[0], sequence.answering.request.prompt_logprobs

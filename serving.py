"""Which request is in which slot, and what the next step is: continuous batching.

A request waits in line for a free slot and takes it while the others go on. A step of `Serving` is
at most one chunk of prompts and one token for all that are decoding, so that no sequence waits
longer than a chunk. What a sequence gets depends on nothing but itself: its prompt is cut by its
own length, and the compiled steps keep the slots apart.

The devices are a step ahead of the host: a step is dispatched before the tokens of the one before
it are read, but for the first token where no other sequence is going on. A slot knows itself when
it has drawn its last token; what only the host can see, a stop string, costs a token that is thrown
away.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from model import LanguageModelConfig, Memory
from request import Answering, Completion, Event
from sharding import from_host
from steps import Slots, decode_step, new_memory, new_slots, prefill, start


def chunk_lengths(prompt: int, sizes: Sequence[int]) -> list[int]:
    """Return the chunks, of lengths from `sizes`, rising, in which a prompt is read.

    A function of its own length only: company must not change how a prompt is cut, or its rounding
    would depend on it.
    """
    whole, rest = divmod(prompt, sizes[-1])
    return [sizes[-1]] * whole + [size for size in sizes if size >= rest > 0][:1]


class Handle:
    """A request that was submitted.

    number: how many were submitted before it. completion: the answer so far; its finish_reason is
    None as long as it goes on.
    """

    def __init__(self, number: int, answering: Answering, chunks: Sequence[int]):
        self.number = number
        self._answering = answering
        self._chunks = collections.deque(chunks)  # chunk lengths that its prompt still needs
        self._read = 0  # prompt tokens that have been read
        self._due = 0  # tokens that steps have been dispatched for
        self._events: collections.deque[Event] = collections.deque()  # for `Serving.stream`

    @property
    def completion(self) -> Completion:
        """The answer so far."""
        return self._answering.completion

    @property
    def finished(self) -> bool:
        """Whether the answer has ended."""
        return self.completion.finish_reason is not None

    def __repr__(self) -> str:
        return f"<request {self.number}: {self.completion.finish_reason or 'in progress'}>"


class _Dispatched(NamedTuple):
    """A step that the devices are at: what it draws, and for whom, by slot."""

    sample: Any
    drawing: dict[int, Handle]


class Serving:
    """Slots, the requests in them, and the line before them.

    params: the placed parameters. num_slots: B. pad_sizes: the chunk lengths, rising, for which
    prefill is compiled. The attribute `phase` is called with "prefill" and "decode" as these begin.
    """

    def __init__(
        self,
        params: Any,
        config: LanguageModelConfig,
        mesh: Mesh | None,
        num_slots: int,
        pad_sizes: Sequence[int],
    ):
        self._params = params
        self._where: dict[str, Any] = {"config": config, "mesh": mesh}
        self._num_slots = num_slots
        self._pad_sizes = pad_sizes
        self._submitted = 0
        self._waiting: collections.deque[Handle] = collections.deque()
        self._slots: list[Handle | None] = [None] * num_slots
        self._dispatched: list[_Dispatched] = []
        self._state: tuple[Memory, Slots] | None = None
        self.phase: Callable[[str], object] = lambda _: None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do: what the devices may still be at is thrown away."""
        return not self._waiting and not any(self._slots)

    def submit(self, answering: Answering) -> Handle:
        """Put a request in line."""
        chunks = chunk_lengths(len(answering.completion.prompt_ids), self._pad_sizes)
        handle = Handle(self._submitted, answering, chunks)
        self._submitted += 1
        self._waiting.append(handle)
        return handle

    def cancel(self, handle: Handle) -> None:
        """End a request where it is. One that has ended stays as it is."""
        if handle.finished:
            return
        handle.completion.finish_reason = "cancelled"
        if handle in self._waiting:
            self._waiting.remove(handle)
        self._free(handle)

    def step(self) -> list[Event]:
        """Let the devices do the next step; returns the tokens of the one before it.

        If it raises, the requests in the slots are cancelled; those in line stay there.
        """
        before, self._dispatched = self._dispatched, []
        try:
            self._fill()
            others = self._running().any()
            self._read_prompts()
            if others or before or not self._dispatched:
                self._decode()
            else:
                # Nobody waits for the devices, which may have to compile: the first token at once.
                before, self._dispatched = self._dispatched, []
            return [event for step in before for event in self._deliver(step)]
        except BaseException:
            self._abandon()  # memory that was given to a failed step is lost
            raise

    def stream(self, handle: Handle) -> Iterator[Event]:
        """Return an iterator over the tokens of one request, which lets all others go on, too."""
        while True:
            while handle._events:
                yield handle._events.popleft()
            if handle.finished:
                return
            assert not self.idle, f"{handle!r} is in no slot"
            self.step()

    def release(self) -> None:
        """Give up the memory of the slots, if nothing uses it."""
        if self.idle:
            self._state, self._dispatched = None, []

    # ---------------------------------------------------------------------------- scheduling

    def _fill(self) -> None:
        """Give free slots to those that wait, in their order."""
        for index, taken in enumerate(self._slots):
            if taken is None and self._waiting:
                handle = self._waiting.popleft()
                self._slots[index] = handle
                row = handle._answering.slot()
                self._state = start(*self._current(), np.int32(index), row, **self._where)

    def _current(self) -> tuple[Memory, Slots]:
        if self._state is None:
            self._state = (
                new_memory(batch=self._num_slots, **self._where),
                new_slots(batch=self._num_slots, **self._where),
            )
        return self._state

    def _read_prompts(self) -> None:
        """Dispatch a chunk of the prompt that came first, and of all that are due one as long."""
        reading = {i: h for i, h in enumerate(self._slots) if h is not None and h._chunks}
        if not reading:
            return
        self.phase("prefill")
        first = min(reading.values(), key=lambda handle: handle.number)
        size = first._chunks[0]
        tokens = np.zeros([self._num_slots, size], np.int32)
        length = np.zeros([self._num_slots], np.int32)
        last = np.zeros([self._num_slots], bool)
        for index, handle in reading.items():
            if handle._chunks[0] != size:
                continue
            chunk = handle.completion.prompt_ids[handle._read : handle._read + size]
            tokens[index, : len(chunk)], length[index] = chunk, len(chunk)
            handle._read += len(chunk)
            handle._chunks.popleft()
            last[index] = not handle._chunks
        self._dispatch(prefill, last, *self._given(tokens, length, last))

    def _running(self) -> np.ndarray:
        """Return bool [B]: whose prompt has been read, and that may need one more token."""
        running = np.zeros([self._num_slots], bool)
        for index, handle in enumerate(self._slots):
            if handle is not None:
                running[index] = not handle._chunks and handle._due < handle._answering.limit
        return running

    def _decode(self) -> None:
        """Dispatch a token for all that are running."""
        running = self._running()
        if running.any():
            self.phase("decode")
            self._dispatch(decode_step, running, *self._given(running))

    def _given(self, *arrays: np.ndarray) -> tuple[Any, ...]:
        return from_host(arrays, self._where["mesh"])

    def _dispatch(self, step: Any, drawing: np.ndarray, *inputs: Any) -> None:
        memory, slots = self._current()
        sample, *state = step(self._params, memory, slots, *inputs, **self._where)
        self._state = state[0], state[1]
        handles = {i: h for i, h in enumerate(self._slots) if h is not None and drawing[i]}
        for handle in handles.values():
            handle._due += 1
        if handles:
            self._dispatched.append(_Dispatched(sample, handles))

    def _deliver(self, step: _Dispatched) -> Iterator[Event]:
        """Take the tokens of a step, for those that have not ended since it was dispatched."""
        going_on = {i: handle for i, handle in step.drawing.items() if not handle.finished}
        if not going_on:
            return
        found = jax.device_get(step.sample)
        for index, handle in going_on.items():
            token = int(found.token_id[index, 0])
            top = found.top_logprob_ids[index], found.top_logprobs[index]
            text = handle._answering.take(token, float(found.logprob[index, 0]), *top)
            if handle.finished:
                self._free(handle)
            event = Event(handle.number, token, text, handle.completion)
            handle._events.append(event)
            yield event

    def _free(self, handle: Handle) -> None:
        self._slots = [None if taken is handle else taken for taken in self._slots]

    def _abandon(self) -> None:
        """End all that is in the slots."""
        for handle in self._slots:
            if handle is not None:
                handle.completion.finish_reason = "cancelled"
        self._slots = [None] * self._num_slots
        self._dispatched = []
        self._state = None

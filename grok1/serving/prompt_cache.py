"""Which prompts the caches of the slots hold, and which slot a request is given.

A prompt that begins like one that a slot holds takes over the beginning. Only whole chunks of the
largest length are shared: they are those in which the new prompt would be read, at the same
positions, so that the bits are those of reading it all. An answer is never shared, as decode steps
round differently.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence


@dataclasses.dataclass
class CachedPrompt:
    """A prompt, and how much of it the cache of its slot holds.

    request: the number of its request. ids: its tokens. shared: whether it may take over a part of
    other requests' prompts, and they of it. read: number of tokens in the cache. used: when a
    request last took the slot, took over a part of the prompt, or left the slot.
    """

    request: int
    ids: Sequence[int] = ()
    shared: bool = False
    read: int = 0
    used: int = 0


class PromptCache:
    """The prompt in each slot. chunk: the length of a whole chunk."""

    def __init__(self, num_slots: int, chunk: int):
        self._chunk = chunk
        self._held = [CachedPrompt(request=-1) for _ in range(num_slots)]
        self._times = itertools.count(1)

    def find(self, prompt: CachedPrompt, slot: int) -> tuple[int, int]:
        """Return where most of a prompt can be taken from, preferably `slot`, and how many tokens.

        They are all tokens, with the logits after the last, for another answer to a request whose
        prompt has been read; otherwise fewer, as these logits must be computed.
        """
        common = [self._common(held, prompt) for held in self._held]
        source = max(range(len(common)), key=lambda place: (common[place], place == slot))
        return source, common[source]

    def choose(self, prompt: CachedPrompt, free: Iterable[int]) -> int:
        """Return which of the free slots a prompt is given.

        If possible, one of which no chunk is lost that others could take over, and of these the one
        that holds most of the prompt. Otherwise, and if several do, the least recently used.
        """

        def order(slot: int) -> tuple[bool, int, int, int]:
            held = self._held[slot]
            common = self._common(held, prompt)
            lost = held.shared and held.read - common >= self._chunk
            return lost, 0 if lost else -common, held.used, slot

        return min(free, key=order)

    def put(self, prompt: CachedPrompt, slot: int, source: int) -> None:
        """Record that a slot has taken over the tokens of a prompt that `source` holds."""
        self.use(source)
        self._held[slot] = prompt
        self.use(slot)

    def use(self, slot: int) -> None:
        """Make a slot the most recently used."""
        self._held[slot].used = next(self._times)

    def _common(self, held: CachedPrompt, prompt: CachedPrompt) -> int:
        """Return how many tokens of a prompt can be taken over from a slot that holds `held`."""
        if held.request == prompt.request:
            return held.read if held.read == len(held.ids) else 0
        if not (held.shared and prompt.shared):
            return 0
        size = self._chunk
        most = min(held.read, len(prompt.ids) - 1) // size * size
        starts = range(0, most, size)
        return next((i for i in starts if held.ids[i : i + size] != prompt.ids[i : i + size]), most)

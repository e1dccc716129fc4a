"""A lock that threads get in the order in which they asked for it."""

import collections
import contextlib
import threading
from collections.abc import Iterator


class FairLock:
    """First come, first served.

    With `threading.Lock` a thread that releases the lock and asks for it again at once mostly gets
    it again: of several threads one would draw all its tokens before the others see one of theirs.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: collections.deque[int] = collections.deque()  # threads; the first one has it

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock, for `with`. RuntimeError, not a deadlock, if this thread holds it."""
        thread = threading.get_ident()
        with self._changed:
            if thread in self._line:
                raise RuntimeError("called from inside another call of the same thread")
        try:
            with self._changed:
                self._line.append(thread)
                self._changed.wait_for(lambda: self._line[0] == thread)
            yield
        finally:  # after Ctrl-C while it waited, too
            with self._changed:
                if thread in self._line:
                    self._line.remove(thread)
                self._changed.notify_all()

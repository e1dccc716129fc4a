"""Delay Ctrl-C in critical sections."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def uninterrupted(*signals: int) -> Iterator[None]:
    """Delay KeyboardInterrupt until the end of the `with` block.

    The block is not interrupted halfway, unless the same signal comes a second time. A delayed
    KeyboardInterrupt replaces an exception of the block. This works only in the main thread, where
    Python raises KeyboardInterrupt, and for those of the signals (by default SIGINT) whose handler
    is Python's own for SIGINT.
    """
    handler = signal.default_int_handler
    in_main = threading.current_thread() is threading.main_thread()
    caught = [s for s in signals or (signal.SIGINT,) if in_main and signal.getsignal(s) is handler]
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number in seen:
            restore()
            handler(number, frame)
        seen.append(number)

    def restore() -> None:
        for number in caught:
            signal.signal(number, handler)

    for number in caught:
        signal.signal(number, note)
    try:
        yield
    finally:
        restore()
        if seen:
            raise KeyboardInterrupt

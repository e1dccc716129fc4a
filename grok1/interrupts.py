"""Ctrl-C, where it must not strike."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def uninterrupted(*signals: int) -> Iterator[None]:
    """Put off a KeyboardInterrupt until the block is done, for `with`.

    What is in the midst of being done is then neither lost nor cut. The same signal once more comes
    at once. KeyboardInterrupt comes in place of an exception of the block. Only in the main thread,
    where Python raises it, and for those of the signals (Ctrl-C's if none is given) for which
    Python's own handler of Ctrl-C is set.
    """
    handler = signal.default_int_handler
    in_main = threading.current_thread() is threading.main_thread()
    caught = [s for s in signals or (signal.SIGINT,) if in_main and signal.getsignal(s) is handler]
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
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

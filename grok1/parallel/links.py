"""Connections between processes: messages that are bounded and checked, and copies of bytes.

A message is one line of JSON, an object with one key: its kind, and its content. What whoever
connects may send before it is known is small and must come soon; what may be sent later is listed
by kind and type as well. Anything else is a ValueError for the receiver.
"""

import contextlib
import errno
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

PAUSE = 0.2  # seconds, between two attempts
KEEP_ALIVE = 30  # seconds, between two signs of life that the system sends


class Expected(NamedTuple):
    """Which messages may come next.

    types: that of the content, by kind. limit: bytes in one message. seconds: for all of one
    message; None: as long as some of it comes.
    """

    types: Mapping[str, type]
    limit: int
    seconds: float | None = None


def pack(**message: Any) -> bytes:
    """Return a message as it is sent."""
    return json.dumps(message).encode() + b"\n"


def _unpack(line: bytes | bytearray, types: Mapping[str, type]) -> tuple[str, Any]:
    try:
        ((kind, content),) = json.loads(line.decode()).items()
        if isinstance(content, types[kind]):
            return kind, content
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        pass
    raise ValueError(f"not a message of this program: {bytes(line[:60])!r}")


class Link:
    """A connection that carries messages.

    Whatever waits longer than `timeout` seconds raises TimeoutError, which is an OSError. `name`,
    `phase`, `ready` and `done` are what the process at the other end has said of itself.
    """

    def __init__(self, connection: socket.socket, timeout: float):
        with contextlib.suppress(OSError):  # it may have ended already
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Those of jax say nothing for long, and networks forget what is idle for minutes.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
                if hasattr(socket, option):  # not on every platform
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), KEEP_ALIVE)
        connection.settimeout(timeout)
        self.socket = connection
        self.timeout = timeout
        self.unread = bytearray()
        self.failure: str | None = None  # why this side shut it
        self.name = ""
        self.phase = "the start"
        self.ready = False
        self.done = False
        self._sending = threading.Lock()

    def send(self, data: bytes) -> None:
        """Send a packed message. Raises OSError."""
        with self._sending:
            self._write(data)

    def beat(self) -> None:
        """Send a sign of life, unless a message is under way, which is one. Raises OSError."""
        if self._sending.acquire(blocking=False):
            try:
                self._write(pack(alive=True))
            finally:
                self._sending.release()

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:  # not sendall, whose time-out is for the whole
                rest = rest[self.socket.send(rest) :]
        except TimeoutError:
            # Nothing can follow half a message.
            self.failure = f"it has read nothing for {self.timeout:g} s"
            self.shut()
            raise

    def receive(self, expected: Expected) -> tuple[str, Any] | None:
        """Return kind and content of the next message; None if the connection was closed.

        Raises OSError, and ValueError for what is not expected.
        """
        deadline = time.monotonic() + (expected.seconds or math.inf)
        piece = bytes(self.unread)
        while b"\n" not in piece:
            if len(self.unread) > expected.limit:
                raise ValueError(f"a message of more than {expected.limit} bytes")
            left = max(deadline - time.monotonic(), 0.001)
            self.socket.settimeout(min(left, self.timeout))
            piece = self.socket.recv(min(2**16, expected.limit + 1 - len(self.unread)))
            if not piece:
                return None
            self.unread += piece
        line, _, self.unread = self.unread.partition(b"\n")
        return _unpack(line, expected.types)

    def ask(self, question: bytes, expected: Expected) -> tuple[str, Any]:
        """Send a message and return the answer, all of which must come within the time-out.

        Without one the link is closed. Raises OSError if the connection ends, ValueError for an
        answer that is not expected.
        """
        try:
            self.send(question)
            if (answer := self.receive(expected._replace(seconds=self.timeout))) is not None:
                return answer
            raise ConnectionResetError(errno.ECONNRESET, "it closed the connection")
        except TimeoutError as error:
            self.close()
            raise ValueError(f"no answer for {self.timeout:g} s") from error
        except (OSError, ValueError):
            self.close()
            raise

    def shut(self) -> None:
        """End the connection for both sides; a thread that waits for it wakes up."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Shut it and give back its file descriptor; only for the thread that receives."""
        self.shut()
        self.socket.close()


Result = TypeVar("Result")


def insist(attempt: Callable[[float], Result], timeout: float) -> Result:
    """Call with the seconds that are left until it succeeds. Raises its last OSError."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return attempt(max(deadline - time.monotonic(), 0.1))
        except OSError:
            if time.monotonic() + PAUSE > deadline:
                raise
        time.sleep(PAUSE)


def listen_everywhere(port: int) -> socket.socket:
    """Return a socket that listens on all interfaces. Raises OSError."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128
            )
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT:  # a kernel without IPv6
                raise
    return socket.create_server(("", port), backlog=128)


def accepted(listener: socket.socket) -> Iterator[socket.socket]:
    """Yield connections for ever."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # it has gone already, or too many files are open for the moment
            time.sleep(PAUSE)
        else:
            yield connection


def begins_with(connection: socket.socket, beginning: bytes, timeout: float) -> bool:
    """Whether these bytes come first, and in time; reads no more, and leaves no time-out."""
    connection.settimeout(timeout)
    found = b""
    while len(found) < len(beginning) and beginning.startswith(found):
        if not (piece := _read(connection, len(beginning) - len(found))):
            break
        found += piece
    connection.settimeout(None)
    return found == beginning


def copy_bytes(
    source: socket.socket,
    target: socket.socket,
    first: bytes = b"",
    keep: socket.socket | None = None,
) -> bool:
    """Copy `first` and all bytes until either side ends; then end both, but leave `keep` open.

    Returns whether it was `source` that ended.
    """
    ended = False
    with contextlib.suppress(OSError):
        target.sendall(first)
        while piece := _read(source):
            target.sendall(piece)
        ended = True
    if target is not keep:
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)  # whoever reads from it closes it
    if source is not keep:
        source.close()
    return ended


def _read(source: socket.socket, most: int = 2**16) -> bytes:
    """Return the next bytes, none at the end, or if none come in time."""
    try:
        return source.recv(most)
    except OSError:
        return b""

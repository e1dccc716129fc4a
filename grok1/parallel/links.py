"""Connections between processes: bounded, checked messages, and copies of bytes.

A message is one line of JSON: an object with one key, its kind, whose value is its content. The
receiver states which kinds and types it expects, their size and, before the sender is known, a
short time limit. Anything else raises ValueError in the receiver.
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
KEEP_ALIVE = 30  # seconds, between two keep-alive packets of the operating system


class Expected(NamedTuple):
    """Which messages may come next.

    types: of the content, by kind. limit: bytes in one message. seconds: the time limit for a
    complete message; None: no limit while bytes of it keep coming.
    """

    types: Mapping[str, type]
    limit: int
    seconds: float | None = None


Message = tuple[str, Any]  # kind and content, whose type `Expected` states


def pack(**message: object) -> bytes:
    """Return the bytes of a message."""
    return json.dumps(message).encode() + b"\n"


def _unpack(line: bytes | bytearray, types: Mapping[str, type]) -> Message:
    try:
        ((kind, content),) = json.loads(line.decode()).items()
        if isinstance(content, types[kind]):
            return kind, content
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        pass
    raise ValueError(f"not a message of this program: {bytes(line[:60])!r}")


class Link:
    """A connection that carries messages.

    Waiting longer than `timeout` seconds raises TimeoutError, which is an OSError. `name`, `phase`,
    `ready` and `done` are what the process at the other end has reported about itself.
    """

    def __init__(self, connection: socket.socket, timeout: float):
        with contextlib.suppress(OSError):  # it may be closed already
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # jax's connections are silent for long, and networks drop idle ones after minutes.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
                if hasattr(socket, option):  # not on every platform
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), KEEP_ALIVE)
        connection.settimeout(timeout)
        self.socket = connection
        self.timeout = timeout
        self.unread = bytearray()
        self.failure: str | None = None  # why this side shut it down
        self.name = ""
        self.phase = "the start"
        self.ready = False
        self.done = False
        self._sending = threading.Lock()

    def send(self, data: bytes) -> None:
        """Send a packed message. Raises OSError."""
        with self._sending:
            self._write(data)

    def send_heartbeat(self) -> None:
        """Send a heartbeat, unless a message is being sent, which serves as one. Raises OSError."""
        if self._sending.acquire(blocking=False):
            try:
                self._write(pack(alive=True))
            finally:
                self._sending.release()

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:  # not sendall, whose time-out is for all of the data
                rest = rest[self.socket.send(rest) :]
        except TimeoutError:
            # Nothing can be sent after half a message.
            self.failure = f"it has read nothing for {self.timeout:g} s"
            self.shut()
            raise

    def receive(self, expected: Expected) -> Message | None:
        """Return kind and content of the next message; None if the connection was closed.

        Raises OSError, and ValueError for an unexpected message.
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

    def ask(self, question: bytes, expected: Expected) -> Message:
        """Send a message and return the answer, which must be complete within the time-out.

        If it fails, the link is closed. Raises OSError if the connection ends, ValueError for an
        unexpected answer or none.
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
        """Shut down both directions; a thread that waits for the connection wakes up."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Shut it down and close its file descriptor; only for the receiving thread."""
        self.shut()
        self.socket.close()


Result = TypeVar("Result")


def retry(attempt: Callable[[float], Result], timeout: float) -> Result:
    """Call `attempt` with the remaining seconds until it succeeds. Raises its last OSError."""
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
    """Yield connections forever."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # it is closed already, or too many files are open at the moment
            time.sleep(PAUSE)
        else:
            yield connection


def begins_with(connection: socket.socket, beginning: bytes, timeout: float) -> bool:
    """Return whether these bytes come first, in time. Reads no more, and clears the time-out."""
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
    """Copy `first` and all bytes until either side ends; then end both, except `keep`.

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
            target.shutdown(socket.SHUT_RDWR)  # the thread that reads from it closes it
    if source is not keep:
        source.close()
    return ended


def _read(source: socket.socket, most: int = 2**16) -> bytes:
    """Return the next bytes; none at the end, or after the time-out."""
    try:
        return source.recv(most)
    except OSError:
        return b""

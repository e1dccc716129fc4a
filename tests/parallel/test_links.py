"""Messages between processes: checked, of limited size, read in linear time and with time-outs."""

import errno
import socket
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest

from grok1.parallel import links
from grok1.parallel.links import Expected, Link, pack

ANY = Expected({"a": object}, limit=2**20)
Pair = tuple[Link, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A link with a time-out of half a second, and the socket at its other end."""
    near, far = socket.socketpair()  # local: its buffers are small
    with near, far:
        far.settimeout(30)
        yield Link(near, 0.5), far


def test_messages_arrive_in_order_unchanged(pair: Pair) -> None:
    link, far = pair
    contents = [1, "é\n\ud800", [None, 0.1], {"b": {}}, "x" * 2**18]
    writer = threading.Thread(target=far.sendall, args=(b"".join(pack(a=c) for c in contents),))
    writer.start()
    for content in contents:
        assert link.receive(ANY) == ("a", content)
    writer.join()
    assert link.unread == b""
    far.close()
    assert link.receive(ANY) is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{}", "not a message"),
        (b"[]", "not a message"),
        (b'{"a": 1, "b": 2}', "not a message"),
        (b'{"b": 1}', "not a message"),
        (b'{"a": "1"}', "not a message"),
        (b'{"a": 1', "not a message"),
        (b'{"a": "\xff"}', "not a message"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not a message"),
        (b"[" * 5000, "not a message"),
        (b"", "not a message"),
        (b"x" * 20_000, "a message of more than 10000 bytes"),
    ],
    ids=lambda value: repr(value[:12]),
)
def test_unexpected_message_raises_value_error(pair: Pair, line: bytes, reason: str) -> None:
    link, far = pair
    far.sendall(line + (b"\n" if len(line) < 10_000 else b""))
    with pytest.raises(ValueError, match=reason) as error:
        link.receive(Expected({"a": int}, limit=10_000))
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


def test_no_more_bytes_are_read_than_the_limit(pair: Pair) -> None:
    link, far = pair
    far.setblocking(False)
    assert far.send(b"x" * 2**22) > 100
    with pytest.raises(ValueError, match="more than 100 bytes"):
        link.receive(Expected({}, limit=100))
    assert len(link.unread) == 101


def test_listener_goes_on_after_too_many_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    class Listener:
        def accept(self) -> tuple[str, str]:
            if not failures:
                return "connection", "address"
            raise failures.pop()

    failures = [OSError(errno.EMFILE, "too many open files"), ConnectionAbortedError()]
    monkeypatch.setattr(links, "PAUSE", 0)
    assert next(links.accepted(Listener())) == "connection"
    assert not failures


def test_message_in_small_pieces_takes_linear_time() -> None:
    message = pack(a="x" * 2**23)
    pieces = (message[i : i + 64] for i in range(0, len(message), 64))
    peer: Any = types.SimpleNamespace(
        recv=lambda _: next(pieces), setsockopt=lambda *_: None, settimeout=lambda _: None
    )
    began = time.process_time()
    assert Link(peer, 1).receive(ANY._replace(limit=2**24)) == ("a", "x" * 2**23)
    assert time.process_time() - began < 5  # measured: 0.5; 11 if all bytes were searched again


def test_time_limit_holds_for_the_whole_message(pair: Pair) -> None:
    link, far = pair
    over = threading.Event()

    def drip() -> None:
        while not over.wait(0.02):
            far.sendall(b"x")  # so that no single piece is late

    writer = threading.Thread(target=drip)
    writer.start()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        link.receive(ANY._replace(seconds=0.6))
    assert 0.5 < time.monotonic() - began < 2
    over.set()
    writer.join()


def test_message_may_take_longer_than_the_time_out(pair: Pair) -> None:
    """The time-out is for each piece of it."""
    link, far = pair
    message = pack(a="x" * 2**20)
    writer = threading.Thread(target=link.send, args=(message,))
    writer.start()
    began = time.monotonic()
    read = bytearray()
    while len(read) < len(message):
        read += far.recv(2**16)
        time.sleep(0.05)
    assert time.monotonic() - began > link.timeout
    writer.join()
    assert read == message


def test_heartbeat_does_not_wait_for_a_message(pair: Pair) -> None:
    link, far = pair
    with link._sending:
        link.send_heartbeat()
    link.send_heartbeat()
    assert far.recv(100) == pack(alive=True)


def test_send_to_a_process_that_does_not_read_ends(pair: Pair) -> None:
    link, far = pair
    with pytest.raises(TimeoutError):
        link.send(pack(a="x" * 2**20))
    assert link.failure == "it has read nothing for 0.5 s"
    assert link.receive(ANY) is None  # shut down, since half a message is sent
    assert far.recv(1)


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="their times cannot be set")
def test_connection_has_keep_alive_packets() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as connection,
    ):
        Link(connection, 1)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        seconds = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        assert seconds == connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 30

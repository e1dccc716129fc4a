"""Messages between processes: bounded, checked, and read in linear time."""

import errno
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from grok1.parallel import links
from grok1.parallel.links import Expected, Link, pack

ANY = Expected({"a": object}, limit=2**20)
Pair = tuple[Link, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A link with a time-out of a second, and the socket at its other end."""
    near, far = socket.socketpair()  # local: its buffers are small, and drain evenly
    with near, far:
        far.settimeout(30)
        yield Link(near, 1), far


def test_messages_arrive_one_by_one_and_unchanged(pair: Pair) -> None:
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
        (b'{"a": NaN}', "not a message"),
        (b'{"a": 1', "not a message"),
        (b'{"a": "\xff"}', "not a message"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not a message"),
        (b"[" * 5000, "not a message"),
        (b"\xff\xfe{\0", "not a message"),
        (b"", "not a message"),
        (b"x" * 20_000, "a message of more than 10000 bytes"),
    ],
    ids=lambda value: repr(value[:12]),
)
def test_what_is_not_expected_is_a_value_error(pair: Pair, line: bytes, reason: str) -> None:
    link, far = pair
    far.sendall(line + (b"\n" if len(line) < 10_000 else b""))
    with pytest.raises(ValueError, match=reason) as error:
        link.receive(Expected({"a": int}, limit=10_000))
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


def test_no_more_than_the_limit_is_kept(pair: Pair) -> None:
    link, far = pair
    far.setblocking(False)
    assert far.send(b"x" * 2**22) > 100
    with pytest.raises(ValueError, match="more than 100 bytes"):
        link.receive(Expected({}, limit=100))
    assert len(link.unread) == 101


def test_too_many_open_files_end_no_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    class Listener:
        def accept(self) -> tuple[str, str]:
            if not failures:
                return "connection", "address"
            raise failures.pop()

    failures = [OSError(errno.EMFILE, "too many open files"), ConnectionAbortedError()]
    monkeypatch.setattr(links, "PAUSE", 0)
    assert next(links.accepted(Listener())) == "connection"
    assert not failures


def test_bytes_that_come_singly_take_linear_time() -> None:
    class Socket:
        def __init__(self, data: bytes):
            self.data = iter(data)

        def recv(self, _: int) -> bytes:
            return bytes([next(self.data)])

        def setsockopt(self, *_: int) -> None: ...

        def settimeout(self, seconds: float) -> None: ...

    def seconds(count: int) -> float:
        link = Link(Socket(pack(a="x" * count)), 1)
        began = time.process_time()
        assert link.receive(ANY) == ("a", "x" * count)
        return time.process_time() - began

    assert seconds(200_000) < 3  # thousands of times as long if it were quadratic


def test_a_message_may_have_a_limit_of_time(pair: Pair) -> None:
    link, far = pair
    over = threading.Event()

    def drip() -> None:
        while not over.wait(0.02):
            far.sendall(b"x")

    writer = threading.Thread(target=drip)
    writer.start()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        link.receive(ANY._replace(seconds=1))
    assert 0.9 < time.monotonic() - began < 2
    over.set()
    writer.join()


def test_a_long_message_takes_the_time_it_needs(pair: Pair) -> None:
    """The time-out holds for each piece."""
    link, far = pair
    message = pack(a="x" * 2**20)
    writer = threading.Thread(target=link.send, args=(message,))
    writer.start()
    began = time.monotonic()
    read = bytearray()
    while len(read) < len(message):
        read += far.recv(2**16)
        time.sleep(0.1)
    assert time.monotonic() - began > link.timeout
    writer.join()
    assert read == message


def test_a_beat_does_not_wait_for_a_message_under_way(pair: Pair) -> None:
    link, far = pair
    with link._sending:
        link.send_heartbeat()
    link.send_heartbeat()
    assert far.recv(100) == pack(alive=True)


def test_a_send_to_who_does_not_read_ends(pair: Pair) -> None:
    link, far = pair
    with pytest.raises(TimeoutError):
        link.send(pack(a="x" * 2**26))
    assert link.failure == "it has read nothing for 1 s"
    assert link.receive(ANY) is None  # shut: half a message is out
    assert far.recv(1)


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="the system sends them as it likes")
def test_a_silent_connection_is_kept_alive() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as connection,
    ):
        Link(connection, 1)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        seconds = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        assert seconds == connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 30

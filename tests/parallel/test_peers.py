"""One process of a run: its connections to the others, and how it ends; tested without jax."""

import contextlib
import socket
import sys
import time
import types
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from grok1.parallel import multihost
from grok1.parallel.links import Link, pack
from grok1.parallel.multihost import Hello, Peers
from processes import in_thread, other_process

HELLO = Hello(multihost.PROTOCOL, 1, 2, "there")
WELCOME = pack(welcome={"host": "there", "token": "x"})


# Connecting to others.


@contextlib.contextmanager
def process_0(address: str, *answers: Sequence[bytes]) -> Iterator[None]:
    """Listen at an address; send the parts of one answer after the question of each connection.

    Without an answer, a connection is closed before the question is read.
    """
    host, port = address.split(":")

    def serve() -> None:
        for parts in answers:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):  # the other side may close it
                if parts:
                    connection.recv(2**12)
                for part in parts:
                    connection.sendall(part)
                    time.sleep(0.1)

    with socket.create_server((host, int(port))) as server:
        thread = in_thread(serve)
        yield
        thread.join(20)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            [b"SSH-2.0-x\r\n"],
            r"{}: expected process 0 of this program, got not a message of this program: "
            r"b'SSH-2.0-x\\r'; correct --coordinator",
        ),
        ([b" "] * 100, "{}: expected process 0 of this program, got no answer for 0.5 s; correct"),
        ([pack(end="one\nerror: two\r\n")], "one error: two$"),
        ([WELCOME + pack(end="process 2 was lost") + pack(begin=True)], "process 2 was lost$"),
        (
            [WELCOME],
            "process 0 of 2 .* was lost during the start: its connection (was closed|broke)",
        ),
        (None, r"{}: process 0 did not answer within 0.5 s \(Connection refused\); start it there"),
    ],
    ids=["another-service", "endless-line", "refused", "lost", "closed", "nobody"],
)
def test_process_that_cannot_join_says_why(
    answer: list[bytes] | None,
    sentence: str,
    peers: Peers,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "_start_jax", lambda: None)  # if it joined, it would wait for jax
    made: list[Link] = []
    monkeypatch.setattr(multihost, "Link", lambda *given: made.append(Link(*given)) or made[-1])
    peers.process = multihost.Process(address, 2, 1)
    with contextlib.nullcontext() if answer is None else process_0(address, answer):
        began = time.monotonic()
        with pytest.raises(ValueError, match="^" + sentence.format(address)):
            peers.join()
        assert time.monotonic() - began < 5  # an endless line is not read to its end
    for link in made:  # otherwise the process ends
        link.close()


def test_dropped_connection_is_made_again(peers: Peers, address: str) -> None:
    """Process 0 may drop a connection before it has read which process it is."""
    peers.process = multihost.Process(address, 2, 1)
    with process_0(address, [], [WELCOME]):
        link, kind, _ = peers._ask(pack(hello=HELLO._asdict()), multihost.WELCOME, 5)
        link.close()
    assert kind == "welcome"


def test_port_in_use_is_named(peers: Peers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        peers.process = multihost.Process(f"127.0.0.1:{port}", 2, 0)
        message = (
            rf"^127.0.0.1:{port}: process 0 cannot listen at port {port} \(Address already in "
            r"use\); end what uses it, or give all processes another --coordinator$"
        )
        with pytest.raises(ValueError, match=message):
            peers.join()


# Connections to process 0.


def answer_to(peers: Peers, greeting: bytes) -> bytes:
    """Return what process 0 answers to a new connection, before it closes it."""
    near, far = socket.socketpair()
    with near, far:
        link = Link(near, 0.2)
        peers._pending.append(link)
        far.sendall(greeting)
        peers._handle_connection(link)
        answer = far.recv(2**16)
        return answer and answer + far.recv(2**16)


@pytest.mark.parametrize(
    "greeting",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"[]\n",
        b'{"hello": "x"}\n',
        b'{"hello": {',
        b'{"jax": true}\n',
        b'{"jax": "\\ud800"}\n',
        b"x" * (multihost.GREETING.limit + 1),
    ],
    ids=lambda greeting: repr(greeting[:15]),
)
def test_connection_of_another_program_is_closed(greeting: bytes, peers: Peers) -> None:
    """A port scanner, for example; it must not reach jax's service, nor disturb the run."""
    assert answer_to(peers, greeting) == b""
    assert peers.loss is None and not peers._pending and not peers._links


@pytest.mark.parametrize(
    "changes",
    [{"process": 1.0}, {"process": True}, {"processes": None}, {"host": "two\nlines"}, {"host": 5}]
    + [{"protocol": []}],
    ids=str,
)
def test_greeting_with_invalid_fields_is_refused(changes: dict[str, Any], peers: Peers) -> None:
    assert Hello.of(HELLO._asdict()) == HELLO
    assert Hello.of(HELLO._asdict() | changes) is None
    assert answer_to(peers, pack(hello=HELLO._asdict() | changes)) == b""


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"protocol": multihost.PROTOCOL + 1, "more": 1},
            "a process on host there was started with another version of this program (protocol "
            f"{multihost.PROTOCOL + 1}, process 0 has {multihost.PROTOCOL}); install the same on "
            "all hosts",
        ),
        (
            {"processes": 3},
            "process 1 was started with --num-processes 3, process 0 with 2; start all with the "
            "same number",
        ),
        (
            {},
            "two processes were started with --process-id 1; give each its own, from 0 to 1, and "
            "each run its own --coordinator",
        ),
    ],
    ids=["version", "number", "id"],
)
def test_mismatched_process_ends_all_before_the_start(
    changes: dict[str, Any], sentence: str, complete: bool, peers: Peers
) -> None:
    """A process that comes after the start does not disturb the run."""
    peers._links[1] = other_process()
    peers._complete = complete
    told = pack(end=sentence)
    assert answer_to(peers, pack(hello=HELLO._asdict() | changes)) == told
    assert (peers.loss, peers._links[1].sent) == ((None, []) if complete else (sentence, [told]))


def test_oldest_of_many_pending_connections_is_closed(peers: Peers) -> None:
    """Idle connections must not use up the open files, nor keep a process out."""
    peers.peer_timeout = 20
    with contextlib.ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(multihost.MOST_PENDING + 1)]
        for end in sum(pairs, ()):
            stack.enter_context(end)
        rest = iter([(near, "") for near, _ in pairs])
        listener: Any = types.SimpleNamespace(accept=lambda: next(rest, None) or sys.exit())
        with pytest.raises(SystemExit):
            peers._accept(listener)
        assert pairs[0][1].recv(1) == b""
        assert len(peers._pending) == multihost.MOST_PENDING


@pytest.mark.parametrize(
    ("data", "how"),
    [
        (b'{"phase": "lo', "its connection was closed"),
        (
            b'{"value": 1}\n',
            "its connection broke (not a message of this program: b'{\"value\": 1}')",
        ),
        (b"[" * (2**16 + 1), "its connection broke (a message of more than 65536 bytes)"),
    ],
    ids=["part", "kind", "endless"],
)
def test_unexpected_message_of_a_process_ends_all(data: bytes, how: str, peers: Peers) -> None:
    """Only process 0 may send a value."""
    near, far = socket.socketpair()
    peers._links[2] = other = other_process()
    with near, far:
        link = Link(near, 5)
        link.name = "process 1 of 3"
        far.sendall(data)
        far.shutdown(socket.SHUT_WR)
        peers._listen(link)
    end = f"{link.name} was lost during the start: {how}; all processes end, start them again"
    assert peers.loss == end and other.sent == [pack(end=end)]


def test_messages_of_another_process_are_one_line(peers: Peers) -> None:
    link = other_process()
    peers._take(link, "phase", "lo\nad")
    peers._take(link, "end", "one\nerror: two\r\n")
    assert (link.phase, peers.loss) == ("lo ad", "one error: two")


def test_exception_in_a_thread_ends_all(peers: Peers) -> None:
    def fail() -> None:
        raise LookupError("on purpose")

    peers._links[1] = other_process()
    peers._start(fail)
    with peers._changed:
        assert peers._changed.wait_for(lambda: peers.loss, 20)
    told = f"{peers._name} ended: LookupError('on purpose') in its thread fail"
    assert peers.loss == told and peers._links[1].sent == [pack(end=told)]


def test_process_that_stops_reading_is_lost(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    """It still sends heartbeats. Meanwhile, the others still get those of process 0."""
    monkeypatch.setattr(multihost, "BEAT", 0.05)
    (near, far), (to_other, other) = socket.socketpair(), socket.socketpair()
    with near, far, to_other, other:
        link, second = Link(near, 0.5), Link(to_other, 0.5)
        peers._links |= {1: link, 2: second}
        in_thread(peers._send_heartbeats, Link(far, 5))
        in_thread(peers._send_heartbeats, second)
        peers._start(peers._listen, link)
        in_thread(peers.share, "x" * 2**19)
        received = bytearray()
        while b'"end"' not in received:
            received += other.recv(2**16)
    assert b"during the start: it has read nothing for 0.5 s; all" in received
    assert received.partition(b"value")[0].count(b"alive") > 4


def test_value_too_long_to_share_is_refused(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = multihost.FROM_FIRST._replace(limit=100)
    monkeypatch.setattr(multihost, "FROM_FIRST", limit)
    assert peers.share({"prompts": ["x"]}) == {"prompts": ["x"]}
    with pytest.raises(ValueError, match="expected at most 100 bytes as JSON, got 114; divide"):
        peers.share("x" * 100)

"""Clients that send what no client should: each gets an error, and the server goes on."""

import contextlib
import gc
import json
import os
import random
import socket
import string
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from grok1.serving.http import connection, serve
from grok1.serving.http import fields as known_fields
from grok1.serving.http.app import Api
from grok1.serving.http.chat import Template
from grok1.serving.http.engine import Engine
from servers import server

KEY = "key-of-the-tests"
VALID = {"prompt": "The king", "max_tokens": 3, "seed": 1, "temperature": 0.5, "logprobs": 2}
VALUES = [
    *(True, -1, 0, 1, 1.5, 1e308, 10**30, "", "a", "\x00", "ü", [], {}, [[]], [None], [1, "a"]),
    *({"a": 1}, ["a"] * 1000, {"5": "x"}, [-1], [2**31], [[5], "a"], {"type": "json_object"}),
]
PARTS = [
    "..",
    ".",
    "v1",
    "completions",
    "%2e%2e",
    "%2f",
    "%00",
    "models",
    "etc",
    "passwd",
    "~",
    "*",
]


class Line:
    """A connection to the server, and what it has said."""

    def __init__(self, port: int):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # the server has answered and closed
            self.socket.sendall(data)

    def read(self) -> tuple[int | None, bytes]:
        """Read to the end; return the status, None without an answer, and the body."""
        found = b""
        with contextlib.suppress(OSError):
            while part := self.socket.recv(1 << 16):
                found += part
        head, _, body = found.partition(b"\r\n\r\n")
        return int(head.split()[1]) if head.startswith(b"HTTP/1.1 ") else None, body

    def __enter__(self) -> "Line":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Close at once, without the usual end."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def request(
    body: bytes = b"",
    path: str | bytes = "/v1/completions",
    method: str = "POST",
    key: str = KEY,
    more: bytes = b"",
) -> bytes:
    path = path if isinstance(path, bytes) else path.encode()
    head = b"%s %s HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" % (method.encode(), path)
    head += b"Authorization: Bearer %s\r\nContent-Length: %d\r\n" % (key.encode(), len(body))
    return head + more + b"\r\n" + body


def as_json(**changes: Any) -> bytes:
    return json.dumps(VALID | changes).encode()


class Hostile:
    """The attacks: each sends something to a line, and returns the statuses that it may get."""

    def __init__(self, chance: random.Random):
        self.chance = chance
        self.attacks = [
            *(
                self.broken_json,
                self.wrong_type,
                self.huge,
                self.wrong_key,
                self.path,
                self.garbage,
            ),
            *(self.half, self.half_closed, self.gone, self.head, self.unknown_field),
        ]

    def broken_json(self, line: Line) -> set[int | None]:
        """Some bytes of a valid body are missing, doubled or others."""
        body = bytearray(as_json())
        for _ in range(self.chance.randint(1, 3)):
            place = self.chance.randrange(len(body))
            new = [[], [*body[place : place + 5]] * 2, [self.chance.randrange(256)]]
            body[place : place + 1] = self.chance.choice(new)
        line.send(request(bytes(body)))
        return {200, 400}

    def wrong_type(self, line: Line) -> set[int | None]:
        known = sorted(known_fields.COMPLETION | known_fields.REFUSED.keys())
        body = as_json(**{self.chance.choice(known): self.chance.choice(VALUES)})
        path = self.chance.choice(["/v1/completions", "/v1/chat/completions", "/tokenize"])
        line.send(request(body, path))
        return {200, 400, 404}  # many values are right for some field; 404: another model

    def unknown_field(self, line: Line) -> set[int | None]:
        name = "".join(self.chance.choices(string.printable, k=self.chance.choice([1, 10, 10**5])))
        line.send(request(as_json(**{f"x{name}": self.chance.choice(VALUES)})))
        return {400}

    def huge(self, line: Line) -> set[int | None]:
        body = self.chance.choice([
            lambda: as_json(prompt="a " * 100_000),
            lambda: as_json(prompt=[5] * 100_000),
            lambda: as_json(prompt=["a"] * 100_000),
            lambda: as_json(n=10**9),
            lambda: as_json(max_tokens=10**18),
            lambda: as_json(logprobs=10**9),
            lambda: as_json(stop=["a"] * 100_000),
            lambda: as_json(logit_bias={str(i): 1 for i in range(100_000)}),
            lambda: b"[" * 1_000_000,
            lambda: b'{"seed": ' + b"9" * 1_000_000 + b"}",
            lambda: as_json(user="a" * (9 << 20)),
        ])()  # fmt: skip
        line.send(request(body))
        return {400, 413}

    def wrong_key(self, line: Line) -> set[int | None]:
        wrong = ["", KEY[:-1], f"{KEY}x", KEY.upper(), "\xe9" * 9, "a" * 30_000]
        path = self.chance.choice(["/v1/completions", "/metrics", "/v1/models", "/inspect"])
        line.send(request(as_json(), path, key=self.chance.choice(wrong)))
        return {401, 405}  # 405: the path has another method

    def path(self, line: Line) -> set[int | None]:
        path = self.chance.choice(["/", "//"]).join(["", *self.chance.choices(PARTS, k=5)])
        if self.chance.random() < 0.3:
            path = self.chance.choice(["http://a", "\xff", "*", "?a=", "/v1/models/"]) + path
        line.send(request(path=path, method=self.chance.choice(["GET", "POST", "TRACE", "X"])))
        return {400, 404, 405}

    def garbage(self, line: Line) -> set[int | None]:
        """Bytes that are not HTTP."""
        line.send(self.chance.randbytes(self.chance.randint(1, 3000)) + b"\r\n\r\n")
        line.socket.shutdown(socket.SHUT_WR)
        return {400, None}

    def head(self, line: Line) -> set[int | None]:
        """A head that contradicts itself, or is too long."""
        more = self.chance.choice([
            b"Content-Length: 7\r\n", b"Content-Length: -1\r\n", b"Transfer-Encoding: x\r\n",
            b"A: " + b"a" * 1_000_000 + b"\r\n", b"A\x00: b\r\n", b" A: b\r\n", b"Host: b\r\n",
            b"".join(b"A%d: b\r\n" % i for i in range(100_000)),
        ])  # fmt: skip
        line.send(request(as_json(), more=more))
        return {400, 501}

    def half(self, line: Line) -> set[int | None]:
        """A request that is cut, and a client that goes away."""
        whole = request(as_json())
        line.send(whole[: self.chance.randrange(len(whole))])
        line.socket.shutdown(socket.SHUT_WR)
        return {None}

    def half_closed(self, line: Line) -> set[int | None]:
        """A client that cannot send any more, which counts as one that left."""
        line.send(request(as_json(n=3, stream=self.chance.random() < 0.5)))
        line.socket.shutdown(socket.SHUT_WR)
        return {200, None}

    def gone(self, line: Line) -> set[int | None]:
        """A client that leaves while its answer is drawn."""
        line.send(request(as_json(max_tokens=50, ignore_eos=True, stream=True)))
        if self.chance.random() < 0.5:
            line.socket.recv(10)
        line.reset()
        return {None}


@contextlib.contextmanager
def serving() -> Iterator[tuple[Api, int]]:
    api = Api(Engine(server(), most_waiting=64), "tiny", Template(), KEY)
    with serve.in_background(api) as port:
        yield api, port


def answer(port: int) -> bytes:
    """Return the choices of a request that is as it should be."""
    with Line(port) as line:
        line.send(request(as_json()))
        status, body = line.read()
    assert status == 200
    return json.dumps(json.loads(body)["choices"]).encode()


def files() -> int:
    return len(os.listdir("/proc/self/fd"))


def kept() -> list[object]:
    gc.collect()
    return gc.get_objects()


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def attack(port: int, count: int, seed: int) -> None:
    hostile = Hostile(random.Random(seed))
    for number in range(count):
        with Line(port) as line:
            chosen = hostile.attacks[number % len(hostile.attacks)]
            allowed = chosen(line)
            status, body = line.read()
            assert status in allowed, (chosen.__name__, status, body)
            assert b"Traceback" not in body and b"File " not in body
            if status is not None and status >= 400 and body.startswith(b"{"):
                assert json.loads(body)["error"]["message"]


def check(port: int, api: Api, count: int) -> None:
    """Attack from several clients at once; then nothing may be left of it."""
    before, threads, opened = answer(port), threading.active_count(), files()
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            attack(port, count // 4, seed)
        except BaseException as error:
            failures.append(error)

    clients = [threading.Thread(target=run, args=[seed]) for seed in range(4)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    if failures:
        raise failures[0]
    wait_until(lambda: not api.engine.held and not server().busy)
    assert answer(port) == before
    wait_until(lambda: files() <= opened)
    wait_until(lambda: not any(isinstance(one, connection.Connection) for one in kept()))
    assert threading.active_count() <= threads + 2  # that check requests


def test_hostile_requests_leave_nothing_behind() -> None:
    with serving() as (api, port):
        check(port, api, 44)


@pytest.mark.exhaustive
def test_a_thousand_hostile_requests_leave_nothing_behind() -> None:
    with serving() as (api, port):
        check(port, api, 1000)


def test_idle_and_slow_clients_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "IDLE_SECONDS", 0.3)
    monkeypatch.setattr("grok1.serving.http.app.MOST_SECONDS", 0.3)
    with serving() as (_, port), contextlib.ExitStack() as lines:
        silent, slow, kept, half = (lines.enter_context(Line(port)) for _ in range(4))
        slow.send(b"GET /health HT")
        kept.send(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        half.send(request(as_json())[:-5])
        assert half.read()[0] == 408
        assert silent.read() == slow.read() == (None, b"")
        assert kept.read()[0] == 200


def test_client_that_does_not_read_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    many = as_json(n=128, max_tokens=40, ignore_eos=True, stream=True, logprobs=20)
    monkeypatch.setattr(connection, "IDLE_SECONDS", 0.3)
    with serving() as (api, port), Line(port) as line:
        line.send(request(many))
        wait_until(lambda: api.engine.held)
        wait_until(lambda: not api.engine.held)


def test_connections_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "MOST_CONNECTIONS", 3)
    with serving() as (_, port):
        with Line(port), Line(port), Line(port) as line:
            line.send(request(path="/health", method="GET"))
            assert line.read()[0] == 503
        time.sleep(0.1)
        with Line(port) as line:
            line.send(request(path="/health", method="GET"))
            assert line.read()[0] == 200

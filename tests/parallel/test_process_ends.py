"""How a process of a run ends, and what it tells the others; tested without jax."""

import argparse
import contextlib
import io
import pathlib
import re
import signal
import socket
import sys
import threading
import time
import types
from typing import Any

import pytest

import run
from grok1.interrupts import uninterrupted
from grok1.parallel import links, multihost, sharding
from grok1.parallel.links import pack
from grok1.parallel.multihost import Peers
from processes import in_thread, other_process, with_jax

LOST = "process 1 was lost"

# After a loss.


def test_loss_leaves_time_to_print_results(
    peers: Peers, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    vars(peers).update(_complete=True)
    with pytest.raises(KeyboardInterrupt), uninterrupted(multihost.WAKE):
        with pytest.raises(SystemExit):
            peers._record_loss(LOST)
        assert waited == [multihost.LAST_WORDS] and said == [f"error: {LOST}"]


@pytest.mark.parametrize("name", ["end", "await_loss"])
def test_loss_does_not_interrupt_the_end(
    name: str, peers: Peers, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example after Ctrl-C, which a terminal sends to all processes."""

    def lose(*_: object) -> None:
        peers.loss = LOST
        signal.raise_signal(multihost.WAKE)

    peers._losing = True
    monkeypatch.setattr(peers._changed, "wait_for", lose)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        getattr(peers, name)(*["it was interrupted"][: name == "end"])
    assert ended.type is SystemExit and said == [f"error: {LOST}"]


def test_loss_after_an_interrupt_does_not_hide_it(
    peers: Peers, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    told: list[str] = []
    monkeypatch.setattr(peers, "end", told.append)
    monkeypatch.setattr(run, "find_peers", lambda *_: peers)
    monkeypatch.setattr(run, "serve_distributed", interrupted)
    monkeypatch.setattr(run, "end_at_next_interrupt", lambda: signal.raise_signal(multihost.WAKE))
    monkeypatch.setattr(sys, "argv", ["run.py", "--distributed"])
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        run.main()
    assert ended.type is SystemExit and told == ["it was interrupted"]
    assert capfd.readouterr().err == "interrupted\n"


def test_interrupt_while_loss_is_printed_ends_process(peers: Peers) -> None:
    """Otherwise other threads that leave would wait for this one to print the loss."""
    peers.say = lambda _: signal.raise_signal(signal.SIGINT)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        peers.leave()
    assert ended.type is SystemExit


def test_loss_that_nobody_reads_ends_the_process(
    peers: Peers, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe that is full and not read blocks the printing."""
    monkeypatch.setattr(multihost, "LAST_WORDS", 0.1)
    over = threading.Event()
    peers.say = lambda sentence: over.wait(20) or said.append(sentence)
    with pytest.raises(SystemExit):
        peers.leave()
    assert not said
    over.set()


def test_loss_that_cannot_be_sent_ends_the_process(peers: Peers, said: list[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    signal.signal(multihost.WAKE, signal.SIG_IGN)
    vars(peers).update(_send_all=fail, _complete=True)
    with pytest.raises(SystemExit):
        peers._record_loss(LOST)
    assert said == [f"error: {LOST}"]


@pytest.mark.usefixtures("peers")
def test_loss_is_printed_without_control_characters() -> None:
    """Another process may quote a file that contains some."""
    options = argparse.Namespace(
        coordinator="127.0.0.1:1", num_processes=2, process_id=0, join_timeout=1, peer_timeout=1
    )
    errors = io.StringIO()
    found = run.find_peers(options, errors)
    found.loss = "\x1b[31m: no such file"
    with pytest.raises(SystemExit):
        found.leave()
    assert errors.getvalue() == "error: \\x1b[31m: no such file\n"


# Errors.


@pytest.mark.parametrize(
    ("error", "waits", "status", "sentence"),
    [
        (RuntimeError("something broke\nmore"), True, 1, "RuntimeError: something broke"),
        (
            RuntimeError("Gloo context failed: DEADLINE_EXCEEDED\nmore"),
            True,
            1,
            "the connection between the devices failed (RuntimeError: Gloo context failed: "
            "DEADLINE_EXCEEDED); check the network between the hosts, and start all processes "
            "again",
        ),
        (
            RuntimeError("RESOURCE_EXHAUSTED: out of memory"),
            False,
            1,
            "too little memory for the model or its cache (RESOURCE_EXHAUSTED: out of memory); "
            "use more devices",
        ),
        (
            BrokenPipeError(),
            False,
            141,
            "the reader of its answers closed the pipe, as `| head` does",
        ),
    ],
    ids=["unexpected", "gloo", "memory", "reader"],
)
@pytest.mark.usefixtures("peers")
def test_error_is_sent_before_it_is_printed(
    error: Exception, waits: bool, status: int, sentence: str
) -> None:
    """Standard error may be a pipe that is not read.

    The cause of an unexpected error may be a lost process, which is noticed later.
    """
    done: list[str] = []
    errors = io.StringIO()

    def end(reason: str) -> None:
        assert not errors.getvalue()
        done.append(reason)

    peers: Any = types.SimpleNamespace(await_loss=lambda: done.append("waited"), end=end)
    with pytest.raises(SystemExit) as ended:
        run.fail(error, peers, errors)
    assert ended.value.code == status and done == ["waited"] * waits + [sentence]
    assert errors.getvalue().endswith(f"error: {sentence}\n" if status == 1 else "")
    traced = "\nmore\n" in errors.getvalue()
    assert traced == (sentence == "RuntimeError: something broke")


def test_loss_is_the_reason_of_a_failed_collective(peers: Peers, said: list[str]) -> None:
    peers.loss = LOST
    with pytest.raises(SystemExit):
        run.fail(RuntimeError("Gloo context failed"), peers, sys.stderr)
    assert said == [f"error: {LOST}"]


@pytest.mark.parametrize("process", [0, 1])
def test_failed_answer_ends_only_process_0(process: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait until it has printed the answers that did not fail."""
    done = []
    replacements = {
        "agree": lambda _, options: run.Job(options, pathlib.Path(), None, None, [0]),
        "keep_output": lambda _: None,
        "make_server": lambda *_: None,
        "connect_processes": lambda *_: None,
        "generate": lambda *_: "request 1: expected finite logits",
    }
    for name, function in replacements.items():
        monkeypatch.setattr(run, name, function)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    peers: Any = types.SimpleNamespace(
        process=multihost.Process("127.0.0.1:1", 2, process),
        join=lambda: None,
        phase=lambda _: None,
        close=lambda: done.append("closed"),
    )
    options = run.parse_arguments(["--prompt", "Hi"])
    failure = pytest.raises(ValueError, match="request 1: expected finite logits")
    with failure if process == 0 else contextlib.nullcontext():
        run.serve_distributed(run.Worker(), options, peers)
    sys.stderr.close()
    assert done == ["closed"] * process


# Steps done together.


@pytest.mark.parametrize("process", [0, 1])
def test_devices_connect_when_all_have_loaded(
    process: int, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gloo gives up 30 seconds after the first process begins."""
    link = other_process()
    peers.process, peers._links[1 - process] = peers.process._replace(process_id=process), link
    over = threading.Event()
    monkeypatch.setattr(sharding, "connect", lambda mesh: mesh.set())
    thread = in_thread(run.connect_processes, types.SimpleNamespace(mesh=over), peers)
    assert not over.wait(0.1) and len(link.sent) == process
    peers._take(link, "ready", True)
    thread.join(20)
    assert over.is_set() and link.sent == [pack(ready=True)]


def test_jax_shuts_down_when_all_are_done(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    """jax's barrier aborts all processes if one is late, since it still prints to a slow reader."""
    over = threading.Event()
    with_jax(monkeypatch, shutdown=over.set)
    peers._links[1] = link = other_process()
    thread = in_thread(peers.close)
    assert not over.wait(0.1)
    peers._take(link, "done", True)
    thread.join(20)
    assert over.is_set() and not thread.is_alive()
    assert link.sent == [pack(phase="the end"), pack(done=True)]


def test_hanging_jax_shutdown_ends_after_the_time_out(
    peers: Peers, statuses: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network may have dropped its connection; all processes are done, so the status is 0."""
    over, ended = threading.Event(), threading.Event()
    with_jax(monkeypatch, shutdown=lambda: over.wait(20))
    monkeypatch.setattr(peers, "_record_loss", lambda _: ended.set())  # by SystemExit, in a thread
    began = time.monotonic()
    thread = in_thread(peers.close)
    assert ended.wait(20) and statuses == [0] and thread.is_alive()
    assert time.monotonic() - began > 0.4
    over.set()
    thread.join(20)


def test_end_of_a_done_process_is_not_a_loss(peers: Peers, statuses: list[int]) -> None:
    """The process finishes its own part, and then does not wait for the other one."""
    near, far = socket.socketpair()
    with near:
        far.close()
        link = links.Link(near, 5)
        link.done = True
        peers._take(link, "end", "process 1 ended: it was interrupted")
        thread = in_thread(peers._listen, link)
        thread.join(0.8)  # longer than the time-out
        assert thread.is_alive() and not statuses
        with peers._changed:
            peers._closing = True
            peers._changed.notify_all()
        thread.join(20)
    assert statuses == [0] and peers.loss is None


def test_loss_while_closing_is_raised(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would interrupt Python's own shutdown."""
    with_jax(monkeypatch, shutdown=lambda: None)
    peers._losing = True
    told = {"loss": LOST}
    monkeypatch.setattr(peers._changed, "wait_for", lambda _: vars(peers).update(told))
    with pytest.raises(ValueError, match=LOST):
        peers.close()


# Jax's connections.


def test_jax_does_not_end_a_process_that_still_prints(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If another process is lost after it is done, jax must not abort this one, which is not."""
    limits: dict[str, float] = {}
    with_jax(monkeypatch, initialize=lambda *_, **given: limits.update(given))
    peers._start_jax()
    assert limits["heartbeat_timeout_seconds"] > 30 * 24 * 3600


@pytest.mark.parametrize("ended", ["far", "near", "never made", "far, at the end"])
def test_lost_connection_of_jax_is_a_loss(
    ended: str, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise jax waits for minutes, or forever. jax itself may end one, and make another."""
    (jax, near), (far, first) = socket.socketpair(), socket.socketpair()

    def ask(*_: object) -> tuple[links.Link, str, bool]:
        if ended == "never made":
            raise ValueError("no answer for 1 s")
        return links.Link(far, 1), "jax", True

    monkeypatch.setattr(peers, "_ask", ask)
    peers._links[0] = types.SimpleNamespace(name="process 0", send=lambda _: None)  # type: ignore
    peers._closing = ended == "far, at the end"
    with jax, near, far, first:
        thread = in_thread(peers._forward, near)
        jax.sendall(multihost.HTTP2 + b"question")
        if ended != "never made":
            received = first.recv(64)
            while len(received) < len(multihost.HTTP2) + 8:
                received += first.recv(64)
            assert received == multihost.HTTP2 + b"question"
            (jax if ended == "near" else first).close()
        thread.join(10)
    how = {"far": "was closed", "never made": "could not be made .no answer for 1 s."}.get(ended)
    sentence = rf"a second connection of process 0 of 2 .* to process 0 {how}; start all again"
    assert re.fullmatch(sentence, peers.loss or "") if how else peers.loss is None
    assert not thread.is_alive()


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.0\r\n\r\n", multihost.HTTP2[:9]])
def test_relay_closes_connections_of_other_programs(sent: bytes, peers: Peers) -> None:
    other, near = socket.socketpair()
    with other, near:
        other.sendall(sent)
        peers._forward(near)  # after the time-out
        assert other.recv(1) == b"" and peers.loss is None and not peers._carried

"""Several processes as one: how they meet, what they share, and how all end when one is lost.

Every process is to end with one sentence that names who was lost, and status 1; jax alone does
neither. With jax 0.10 and 0.12, whatever the time-outs of `jax.distributed.initialize` and
with `jax_enable_recoverability` as well, its coordination service aborts a process (SIGABRT, a C++
trace, no word of who was lost) when process 0 dies, at once; when a process is silent for the
heartbeat time-out; when one never comes, or its address is wrong; and some time after one has ended
by an error. Recoverable, a collective whose peer is silent waits for ever. `multihost_utils` works
by collectives, which need the devices, and how many of these there are (virtual ones, on a CPU) is
among what process 0 decides for all. What jax does well stays its own: devices and collectives, and
that all leave together (`jax.distributed.shutdown`).

So every process keeps a connection to process 0, at the coordinator's address. It carries signs of
life, with what the process is doing; process 0's options; and the sentence by which a process ends,
which all others repeat. A closed connection is noticed at once, a silent one after the time-out.
jax's service listens behind the same address, on a port of process 0's own, and each other process
reaches it through a relay in itself. When process 0 dies the relay leaves jax's side of the
connection open: jax sees a silence, for which its own time-out is far longer, and this module
speaks first. All of it uses public options of jax, but for finding the place in a job.

The network between the processes must be private, as it must be for jax itself: nothing here is
encrypted, and whoever can reach the coordinator's port can take part.
"""

import contextlib
import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TextIO

from grok1.checks import is_integer

JOIN_TIMEOUT = 120.0  # seconds
PEER_TIMEOUT = 20.0
BEAT = 0.5  # between signs of life
LONGEST_MESSAGE = 2**28  # bytes; the prompts of a run are one message
# jax's service must not end a process that this module has not: its limits are some factor longer.
SLOWER = 10
# How long the main thread gets, after a loss, to print what is finished.
LAST_WORDS = 2.0
# Wakes the main thread after a loss. Not SIGINT where there is another: a shell script's background
# processes ignore that one. Has an effect where Python raises KeyboardInterrupt for it.
WAKE = getattr(signal, "SIGUSR1", signal.SIGINT)


class Place(NamedTuple):
    """Where a process stands.

    coordinator: HOST:PORT of process 0. processes: how many there are. process: which one this is,
    from 0.
    """

    coordinator: str
    processes: int
    process: int


def host_and_port(address: str) -> tuple[str, int]:
    """Split HOST:PORT, or [IPV6]:PORT; ValueError if it is not that."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"expected HOST:PORT such as 10.0.0.1:1234, got {address!r}")
    return host, int(port)


def find_place(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = JOIN_TIMEOUT,
) -> Place:
    """Return this process's place; what is None is found as jax finds it: SLURM, GKE, MPI, TPU.

    Raises ValueError if that finds nothing, or what it finds is no place.
    """
    found: Any = (coordinator, num_processes, process_id)
    try:
        if None in found:
            # Private: jax offers its detection only as a part of jax.distributed.initialize, which
            # would start its service at the very address at which the processes are to meet here.
            from jax._src.clusters import ClusterEnv

            coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
            found = ClusterEnv.auto_detect_unset_distributed_params(
                coordinator, num_processes, process_id, None, None, int(timeout)
            )
    except Exception as error:  # whatever a half-set environment leads to
        raise ValueError(
            f"the job's environment does not say where this process stands ({error!r}); give "
            "--coordinator HOST:PORT --num-processes N --process-id I"
        ) from error
    address, count, index = found[:3]
    if None in (address, count, index):
        raise ValueError(
            "expected a job of SLURM, GKE or MPI, which says where this process stands, found "
            "none; give --coordinator HOST:PORT --num-processes N --process-id I"
        )
    host_and_port(address)
    if not 0 <= index < count:
        raise ValueError(f"expected a process id from 0 to {count - 1}, got {index}")
    return Place(address, count, index)


# ----------------------------------------------------------------------------------- connections


class Link:
    """A connection that carries JSON objects, one a line.

    Whatever waits longer than `timeout` seconds raises TimeoutError, which is an OSError.
    """

    def __init__(self, connection: socket.socket, timeout: float):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(timeout)
        self.socket = connection
        self.unread = b""
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Send one object. Raises OSError."""
        with self._sending:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def beat(self, phase: str) -> None:
        """Send a sign of life, unless a message is under way, which is one. Raises OSError."""
        if self._sending.acquire(blocking=False):
            try:
                self.socket.sendall(json.dumps({"phase": phase}).encode() + b"\n")
            finally:
                self._sending.release()

    def receive(self) -> dict[str, Any] | None:
        """Return the next object; None if the connection was closed. Raises OSError, ValueError."""
        pieces = [self.unread]
        while b"\n" not in pieces[-1]:
            pieces.append(self.socket.recv(2**20))
            if not pieces[-1]:
                return None
            if sum(map(len, pieces)) > LONGEST_MESSAGE:
                raise ValueError("a message without an end")
        line, _, self.unread = b"".join(pieces).partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("a message that is not an object")
        return message


def _pump(source: socket.socket, target: socket.socket, keep: socket.socket | None = None) -> None:
    """Copy bytes until either side ends; then end both, but leave `keep` open and silent."""
    with contextlib.suppress(OSError):
        while piece := source.recv(2**16):
            target.sendall(piece)
    if target is not keep:
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)  # whoever reads from it closes it
    if source is not keep:
        source.close()


def _start(target: Callable[..., object], *arguments: Any) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()


def _connect(address: tuple[str, int], timeout: float) -> socket.socket:
    """Connect, trying again until `timeout` seconds are over. Raises the last OSError."""
    deadline = time.monotonic() + timeout
    while True:
        left = max(deadline - time.monotonic(), 0.1)
        try:
            return socket.create_connection(address, timeout=left)
        except OSError:
            if time.monotonic() + 0.2 > deadline:
                raise
        time.sleep(0.2)


def _listen_everywhere(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128
            )
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT:  # a kernel without IPv6
                raise
    return socket.create_server(("", port), backlog=128)


# --------------------------------------------------------------------------------- the processes


class Peers:
    """All processes of a run, as one of them sees them.

    place: where this one stands. join_timeout: how many seconds it waits for all to come.
    peer_timeout: after how many seconds without a sign of life a process counts as lost. errors:
    where this process says what ended it. note: called now and then with what is waited for.

    From `join` on threads watch the others. If one is lost, or ends by an error, they interrupt
    the main thread as Ctrl-C does, so that it can print what is finished; it must then call `end`
    or `leave`. After two seconds they end the process themselves, with status 1. `loss` is the
    sentence that names what was lost.
    """

    def __init__(
        self,
        place: Place,
        join_timeout: float = JOIN_TIMEOUT,
        peer_timeout: float = PEER_TIMEOUT,
        errors: TextIO = sys.stderr,
        note: Callable[[str], object] | None = None,
    ):
        self.place = place
        self.join_timeout = join_timeout
        self.peer_timeout = peer_timeout
        self.errors = errors
        self.note = note
        self.loss: str | None = None
        self._changed = threading.Condition()  # guards all that follows, and `loss`
        self._links: dict[int, Link] = {}  # on process 0 to all others, on these to process 0
        self._hosts = {place.process: socket.gethostname()}
        self._phases: dict[int, str] = {}
        self._phase = "the start"
        self._values: list[Any] = []
        self._done: set[int] = set()
        self._complete = False  # all have come
        self._losing = False  # there is a loss, but perhaps not all know yet
        self._ending = False
        self._jax_port = 0
        self._leaving = threading.Lock()

    # ------------------------------------------------------------------------------- for all

    def join(self) -> None:
        """Meet the others and start jax.distributed; jax must not have touched a device yet.

        Raises ValueError that names the processes that did not come, or why this one cannot join.
        """
        if self.place.process == 0:
            self._gather()
        else:
            self._report()
        self._start_jax()

    def share(self, value: Any) -> Any:
        """Return process 0's value on every process, as it comes out of JSON; call it on all."""
        if self.place.process == 0:
            self._send_all(value=value)
            return json.loads(json.dumps(value))
        with self._changed:
            self._changed.wait_for(lambda: self._values or self.loss)
            if self._values:
                return self._values.pop(0)
        raise ValueError(self.loss)

    def phase(self, name: str) -> None:
        """Say what this process does from now on; the others name it if it is lost."""
        with self._changed:
            self._phase = name
        self._beat()

    def end(self, reason: str) -> None:
        """Tell the others why this process ends now. If they ended before, `leave` with that."""
        sentence = f"{self._name(self.place.process)} ended: {reason}"
        with self._changed:
            self._ending = True
            if self._losing:
                self._changed.wait_for(lambda: self.loss)
                self.leave()
        self._send_all(end=sentence)

    def leave(self) -> NoReturn:
        """Say what was lost and end this process, whatever its other threads do: status 1."""
        self._leaving.acquire()  # for ever: it is said once
        with contextlib.suppress(OSError, ValueError):
            print(f"error: {self.loss}", file=self.errors, flush=True)
        os._exit(1)

    def await_loss(self) -> None:
        """Wait, up to the time-out, for the loss that may have caused an error in a collective.

        If there is one this process ends with it.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.loss, self.peer_timeout + LAST_WORDS)
            if self.loss is not None:
                self.leave()

    def close(self) -> None:
        """End in good order: jax waits until all have called it."""
        import jax

        self.phase("the end")
        self._send_all(done=True)  # what is closed from now on is no loss
        jax.distributed.shutdown()
        with self._changed:
            if self.loss:
                raise ValueError(self.loss)
            self._ending = True

    # ------------------------------------------------------------------------------ coming together

    def _gather(self) -> None:
        """On process 0: wait for all others."""
        host, port = host_and_port(self.place.coordinator)
        try:
            listener = _listen_everywhere(port)
        except OSError as error:
            raise ValueError(
                f"{self.place.coordinator}: process 0 cannot listen at port {port} "
                f"({os.strerror(error.errno or 0)}); end what uses it, or give all processes "
                "another --coordinator"
            ) from error
        _start(self._accept, listener)
        _start(self._keep_beating)
        deadline = time.monotonic() + self.join_timeout
        with self._changed:
            while len(self._links) < self.place.processes - 1 and self.loss is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                if not self._changed.wait(min(left, 10)) and self.note and left > 10:
                    self.note(f"waiting for {self._missing()} at {self.place.coordinator}")
            all_there = len(self._links) == self.place.processes - 1
            self._complete = all_there and not self._losing
        if not all_there:
            self._lose(
                f"{self._missing()} never came to {self.place.coordinator} within "
                f"{self.join_timeout:g} s; start all {self.place.processes} processes, process 0 "
                f"on {host}, with the same --coordinator, and check that they reach it"
            )
        if not self._complete:
            with self._changed:
                self._changed.wait_for(lambda: self.loss)
            raise ValueError(self.loss)
        self._send_all(hosts=self._hosts, complete=True)

    def _report(self) -> None:
        """On the others: come to process 0, and wait until all are there."""
        address = self.place.coordinator
        try:
            connection = _connect(host_and_port(address), self.join_timeout)
        except OSError as error:
            raise ValueError(
                f"{address}: process 0 did not answer within {self.join_timeout:g} s "
                f"({error.strerror or error}); start it there, or correct --coordinator"
            ) from error
        link = Link(connection, self.peer_timeout)
        with self._changed:
            self._links[0] = link
        with contextlib.suppress(OSError):
            host = self._hosts[self.place.process]
            link.send(hello=self.place.process, count=self.place.processes, host=host)
        _start(self._listen, 0, link)
        _start(self._keep_beating)
        with self._changed:
            # Process 0 says who did not come: it is given the time for it.
            limit = self.join_timeout + self.peer_timeout
            self._changed.wait_for(lambda: self._complete or self.loss, limit)
            if not self._complete:
                raise ValueError(self.loss or f"{address}: process 0 began nothing in {limit:g} s")

    def _missing(self) -> str:
        wanted = set(range(1, self.place.processes)) - self._links.keys()
        few = ", ".join(map(str, sorted(wanted)[:8])) + (", ..." if len(wanted) > 8 else "")
        return f"process{'es' if len(wanted) > 1 else ''} {few} of {self.place.processes}"

    def _accept(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            _start(self._greet, Link(connection, self.peer_timeout))

    def _greet(self, link: Link) -> None:
        """Take what comes to the coordinator's port: a process, or the relay of one."""
        try:
            message = link.receive() or {}
        except (OSError, ValueError):
            message = {}
        if message.get("jax"):
            self._serve_jax(link)
            return
        index, count = message.get("hello"), message.get("count")
        if not is_integer(index) or not is_integer(count):
            link.socket.close()  # a stranger
            return
        with self._changed:
            refusal = self._refusal(index, count)
            gathering = not self._complete
            if refusal is None:
                self._links[index] = link
                self._hosts[index] = str(message.get("host"))
                self._changed.notify_all()
        if refusal is None:
            with contextlib.suppress(OSError):
                link.send(hosts={0: self._hosts[0]})
            self._listen(index, link)
            return
        with contextlib.suppress(OSError):
            link.send(end=refusal)
        if gathering:
            self._lose(refusal)
        link.socket.close()

    def _refusal(self, index: int, count: int) -> str | None:
        if count != self.place.processes:
            return (
                f"process {index} was started with --num-processes {count}, process 0 with "
                f"{self.place.processes}; start all with the same number"
            )
        if not 0 < index < count or index in self._links:
            return (
                f"two processes were started with --process-id {index}; give each its own, from "
                f"0 to {count - 1}, and each run its own --coordinator"
            )
        return None

    # --------------------------------------------------------------------------- watching

    def _keep_beating(self) -> None:
        while True:
            self._beat()
            time.sleep(BEAT)

    def _beat(self) -> None:
        with self._changed:
            links, phase = list(self._links.values()), self._phase
        for link in links:
            with contextlib.suppress(OSError):
                link.beat(phase)

    def _listen(self, index: int, link: Link) -> None:
        """Take what one process says, until it is lost or has nothing more to say."""
        try:
            while (message := link.receive()) is not None:
                self._take(index, message)
            how = "its connection was closed"
        except TimeoutError:
            how = f"no sign of life for {self.peer_timeout:g} s"
        except (OSError, ValueError) as error:
            how = f"its connection broke ({error})"
        with self._changed:
            done, phase = index in self._done, self._phases.get(index, "the start")
        if done:
            self._finish_alone()
            return
        self._lose(
            f"{self._name(index)} was lost during {phase}: {how}; all processes end, start them "
            "again"
        )

    def _finish_alone(self) -> None:
        """End in good order, in the time-out, if one is lost while jax shuts down: all is done."""
        time.sleep(self.peer_timeout)
        if not self._ending:
            os._exit(0)

    def _take(self, index: int, message: dict[str, Any]) -> None:
        if "end" in message:
            self._lose(str(message["end"]))
        with self._changed:
            if "phase" in message:
                self._phases[index] = str(message["phase"])
            if "value" in message:
                self._values.append(message["value"])
            if "hosts" in message:
                self._hosts |= {int(i): str(name) for i, name in message["hosts"].items()}
            if "complete" in message:
                self._complete = True
            if "done" in message:
                self._done.add(index)
            self._changed.notify_all()

    def _name(self, index: int) -> str:
        host = f" (host {self._hosts[index]})" if index in self._hosts else ""
        return f"process {index} of {self.place.processes}{host}"

    def _lose(self, sentence: str) -> None:
        """Take note of a loss, the first one only; process 0 tells it to the others."""
        with self._changed:
            if self._losing or self._ending:
                return
            self._losing, complete = True, self._complete
        if self.place.process == 0:
            self._send_all(end=sentence)
        # Only now may this process end: the others would name it as the one that was lost.
        with self._changed:
            self.loss = sentence
            self._changed.notify_all()
        if not complete:
            return  # `join` waits, and raises it
        if signal.getsignal(WAKE) is signal.default_int_handler:
            os.kill(os.getpid(), WAKE)
            time.sleep(LAST_WORDS)
        self.leave()

    def _send_all(self, **message: Any) -> None:
        # A connection that fails is found by the thread that listens to it.
        for link in list(self._links.values()):
            with contextlib.suppress(OSError):
                link.send(**message)

    # --------------------------------------------------------------------------------- jax

    def _start_jax(self) -> None:
        """Start jax.distributed behind the relays."""
        import jax

        # gRPC would go to the loopback interface through a proxy, too, and jax warns of one.
        os.environ.update(no_grpc_proxy="127.0.0.1")
        jax.config.update("jax_check_proxy_envs", False)
        # It would catch SIGTERM, and the process would live on.
        jax.config.update("jax_enable_preemption_service", False)
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        if self.place.process == 0:
            listener.close()  # it was only to find a free port
            with self._changed:
                self._jax_port = port
                self._changed.notify_all()
        else:
            _start(self._relay, listener)
        slow = SLOWER * int(max(self.peer_timeout, 10))
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            self.place.processes,
            self.place.process,
            initialization_timeout=int(self.join_timeout) + slow,
            heartbeat_timeout_seconds=slow,
            shutdown_timeout_seconds=slow,
            coordinator_bind_address=f"127.0.0.1:{port}",
        )

    def _relay(self, listener: socket.socket) -> None:
        """On the others: carry jax's connections to process 0."""
        kept = []  # open when process 0 dies: see the top of this file
        while True:
            connection, _ = listener.accept()
            kept.append(connection)
            with contextlib.suppress(OSError):
                far = _connect(host_and_port(self.place.coordinator), self.peer_timeout)
                Link(far, self.peer_timeout).send(jax=True)
                far.settimeout(None)
                _start(_pump, connection, far, connection)
                _start(_pump, far, connection, connection)

    def _serve_jax(self, link: Link) -> None:
        """On process 0: carry one relay's connection to jax's service, once it is there."""
        with self._changed:
            self._changed.wait_for(lambda: self._jax_port, self.join_timeout)
        try:
            near = _connect(("127.0.0.1", self._jax_port), self.join_timeout)
            near.sendall(link.unread)
        except OSError:
            link.socket.close()
            return
        for one in (near, link.socket):
            one.settimeout(None)
        _start(_pump, near, link.socket)
        _pump(link.socket, near)

"""Run several processes as one: how they connect, what they share, and how a lost process ends all.

If a process is lost, every other one must end with status 1 and a sentence that names it. jax alone
does neither. With jax 0.10 and 0.12, for any time-outs of `jax.distributed.initialize` and also
with `jax_enable_recoverability`, its coordination service aborts a process with SIGABRT and a C++
trace that does not name the lost process: at once when process 0 dies; when a process is silent for
the heartbeat time-out; when one never connects, or its address is wrong; and some time after one
has ended with an error. With recoverability, a collective whose peer is silent waits forever.
`multihost_utils` is based on collectives, which need the devices, but process 0 decides how many
devices there are (virtual ones, on a CPU). jax is still used for devices and collectives, and for
shutting down together (`jax.distributed.shutdown`).

So every process keeps a connection to process 0, at the coordinator's address. It carries
heartbeats, the process's current phase, process 0's options, and the sentence with which a process
ends, which all others repeat. A closed connection is noticed at once, a silent one after the
time-out. jax's service listens on a local port of process 0, and is reached through the same
address: each other process runs a relay to it. When process 0 dies, the relay keeps jax's side of
the connection open. jax then only sees silence, for which its time-out is far longer, so this
module reports the loss first. Only public options of jax are used, except to detect the job.

The network between the processes must be private, as jax itself requires: nothing here is
encrypted, and anyone who can reach the coordinator's port and knows the protocol can take part.
Other connections cost little: a port scan does not disturb a run.
"""

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, Self, TypeVarTuple

from grok1.checks import is_integer
from grok1.parallel.links import (
    Expected,
    Link,
    Message,
    accepted,
    begins_with,
    copy_bytes,
    listen_everywhere,
    pack,
    retry,
)

Arguments = TypeVarTuple("Arguments")

JOIN_TIMEOUT = 120.0  # seconds
PEER_TIMEOUT = 20.0
BEAT = 0.5  # between heartbeats
# A process with another protocol version is refused. Increase it when a message changes.
PROTOCOL = 2
MOST_PENDING = 32  # connections that have not identified themselves yet
LONGEST_SENTENCE = 4000  # characters; up to 12 bytes each in JSON
GREETING = Expected({"hello": dict, "jax": str}, limit=2**10, seconds=5)
WELCOME = Expected({"welcome": dict, "end": str}, limit=2**16)
RELAYED = Expected({"jax": bool}, limit=2**10)
FROM_OTHERS = Expected(
    {"alive": bool, "phase": str, "ready": bool, "done": bool, "end": str}, limit=2**16
)
# All prompts of a run are sent in one message.
FROM_FIRST = Expected({**FROM_OTHERS.types, "begin": bool, "value": object}, limit=2**28)
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # how each of jax's connections begins (RFC 9113, 3.4)
# This module must detect a loss before jax's service: jax's limits are longer by this factor.
SLOWER = 10
# jax must not end a process that still prints after another has finished: some months, in seconds.
UNWATCHED = 10**7
# After a loss, the seconds that the main thread has to print finished results, then the loss.
LAST_WORDS = 2.0
# Wakes the main thread after a loss, if Python raises KeyboardInterrupt for it. Preferably not
# SIGINT, which the background processes of a shell script ignore.
WAKE = getattr(signal, "SIGUSR1", signal.SIGINT)


class Process(NamedTuple):
    """A process of a run, as in `jax.distributed.initialize`.

    coordinator: HOST:PORT of process 0. process_id: from 0.
    """

    coordinator: str
    num_processes: int
    process_id: int


class Hello(NamedTuple):
    """How a process introduces itself to process 0; all versions have `protocol` and `host`."""

    protocol: int
    process: int
    processes: int
    host: str

    @classmethod
    def of(cls, fields: dict[str, object]) -> Self | None:
        """Return the Hello with the received fields, or None if they are invalid."""
        protocol, process, processes, host = (fields.get(name) for name in cls._fields)
        if not (is_integer(protocol) and is_integer(process) and is_integer(processes)):
            return None
        if not isinstance(host, str) or not host.isprintable():
            return None
        return cls(protocol, process, processes, host)


def host_and_port(address: str) -> tuple[str, int]:
    """Split HOST:PORT, or [IPV6]:PORT. Raises ValueError for anything else."""
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    known = re.fullmatch(r"[^][\s]+", host)
    try:
        host.encode("idna")  # as in the name lookup
    except UnicodeError:
        known = None
    if not known or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise ValueError(f"expected HOST:PORT such as 10.0.0.1:1234, got {address!r}")
    return host, int(port)


def find_process(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = JOIN_TIMEOUT,
) -> Process:
    """Return this process; jax detects what is None (SLURM, GKE, MPI, TPU).

    Raises ValueError if nothing is detected, or it is not valid.
    """
    found: Any = (coordinator, num_processes, process_id)
    try:
        if None in found:
            # Private API: jax's detection is public only as part of jax.distributed.initialize,
            # which would start its service at the address that this module listens on.
            from jax._src.clusters import ClusterEnv

            coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
            found = ClusterEnv.auto_detect_unset_distributed_params(
                coordinator, num_processes, process_id, None, None, int(timeout)
            )
    except Exception as error:  # an incomplete environment can raise anything
        raise ValueError(
            f"the id of this process in its job could not be detected ({error!r}); give "
            "--coordinator HOST:PORT --num-processes N --process-id I"
        ) from error
    address, count, index = found[:3]
    if None in (address, count, index):
        raise ValueError(
            "expected a job of SLURM, GKE or MPI, found none; give "
            "--coordinator HOST:PORT --num-processes N --process-id I"
        )
    host_and_port(address)
    if not 0 <= index < count:
        raise ValueError(f"expected a process id from 0 to {count - 1}, got {index}")
    return Process(address, count, index)


class Peers:
    """All processes of a run, as seen by one of them.

    process: this one. join_timeout: how many seconds it waits for all to connect.
    peer_timeout: after how many seconds without a heartbeat a process counts as lost. say: prints a
    line for the user, which may quote another process: what this one waits for, and why it ends.

    From `join` on, threads watch the other processes. If one is lost, or ends with an error, they
    interrupt the main thread as Ctrl-C does, so that it can print finished results; it must then
    call `end`, which they do not interrupt. After two seconds they end the process themselves, with
    status 1. `loss` is the sentence that names what was lost.
    """

    def __init__(
        self,
        process: Process,
        join_timeout: float,
        peer_timeout: float,
        say: Callable[[str], object],
    ):
        self.process = process
        self.join_timeout = join_timeout
        self.peer_timeout = peer_timeout
        self.say = say
        self.loss: str | None = None
        self._changed = threading.Condition()  # guards all that follows, and `loss`
        self._links: dict[int, Link] = {}  # on process 0, to all others; on these, to process 0
        self._pending: list[Link] = []  # oldest first
        self._host = socket.gethostname()
        self._name = self._name_of(process.process_id, self._host)
        self._phase = "the start"
        self._values: list[Any] = []
        self._complete = False  # all have connected
        self._losing = False  # there is a loss, which the others may not know yet
        self._closing = False  # this process has finished its part
        self._ending = False
        self._jax_port = 0
        self._token = secrets.token_hex(16)  # identifies the others' relays to process 0
        self._leaving = threading.Lock()
        # Kept open when process 0 dies: see the module docstring.
        self._carried: list[socket.socket] = []

    # ------------------------------------------------------------------------------- for all

    def join(self) -> None:
        """Connect to the others and start jax.distributed, before jax has used a device.

        Raises ValueError that names the processes that did not connect, or why this one cannot.
        """
        if self.process.process_id == 0:
            self._wait_for_others()
        else:
            self._connect()
        self._start_jax()

    def share(self, value: object) -> Any:
        """Return process 0's value, as decoded from JSON, on every process; call it on all."""
        if self.process.process_id == 0:
            data = pack(value=value)
            if len(data) > FROM_FIRST.limit:
                raise ValueError(
                    f"the prompts and options of a run: expected at most {FROM_FIRST.limit} bytes "
                    f"as JSON, got {len(data)}; divide the prompts among several runs"
                )
            self._send_all(data)
            return json.loads(data)["value"]
        with self._changed:
            self._changed.wait_for(lambda: self._values or self.loss)
            if self._values:
                return self._values.pop(0)
        raise ValueError(self.loss)

    def phase(self, name: str) -> None:
        """Tell the others the current phase of this process, which they name if it is lost."""
        if name != self._phase:
            self._phase = name
            self._send_all(pack(phase=name))

    def end(self, reason: str) -> None:
        """Tell the others why this process ends now; after an earlier loss, `leave` with that."""
        signal.signal(WAKE, signal.SIG_IGN)
        with self._changed:
            self._ending = True
            if self._losing:
                self._changed.wait_for(lambda: self.loss)
                self.leave()
        self._send_all(_end_message(f"{self._name} ended: {reason}"))

    def leave(self) -> NoReturn:
        """Print what was lost and end this process with status 1, whatever other threads do."""
        try:
            self._leaving.acquire()  # never released: the loss is printed once
            sentence = f"error: {self.loss}"
            # In a thread: writing to a pipe that is not read would block.
            saying = threading.Thread(target=self.say, args=(sentence,), daemon=True)
            saying.start()
            saying.join(LAST_WORDS)
        finally:
            os._exit(1)

    def await_loss(self) -> None:
        """Wait, up to the time-out, for a loss that may have caused an error in a collective.

        If there is one, end this process with it.
        """
        signal.signal(WAKE, signal.SIG_IGN)
        with self._changed:
            self._changed.wait_for(lambda: self.loss, self.peer_timeout + LAST_WORDS)
            if self.loss is not None:
                self.leave()

    def wait_for_all(self) -> None:
        """Wait, without a time limit, for all processes to call it; ValueError if one is lost."""
        first = self.process.process_id == 0
        if not first:
            self._send_all(pack(ready=True))
        with self._changed:
            self._wait_for_all("ready")
        if first:
            self._send_all(pack(ready=True))

    def close(self) -> None:
        """Shut down in good order, after all have called it."""
        import jax

        self.phase("the end")
        self._send_all(pack(done=True))  # from now on, a closed connection is not a loss
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            # Not in jax's own barrier, which aborts all if one is late: it may still be printing.
            self._wait_for_all("done")
        self._start(self._finish_alone)  # in case jax waits for one whose connection is lost
        jax.distributed.shutdown()
        with self._changed:
            self._raise_loss()
            self._ending = True

    def _wait_for_all(self, said: str) -> None:
        """Wait until all links are "ready" or "done"; self._changed is held.

        Raises ValueError for a loss.
        """
        links = self._links.values()
        self._changed.wait_for(lambda: self._losing or all(getattr(x, said) for x in links))
        self._raise_loss()

    def _raise_loss(self) -> None:
        """Raise ValueError if there is a loss, once it is known; self._changed is held."""
        if self._losing:
            self._changed.wait_for(lambda: self.loss)
            raise ValueError(self.loss)

    # ------------------------------------------------------------------------------ connecting

    def _wait_for_others(self) -> None:
        """On process 0: wait until all others have connected."""
        host, port = host_and_port(self.process.coordinator)
        try:
            listener = listen_everywhere(port)
        except OSError as error:
            raise ValueError(
                f"{self.process.coordinator}: process 0 cannot listen at port {port} "
                f"({os.strerror(error.errno or 0)}); end what uses it, or give all processes "
                "another --coordinator"
            ) from error
        self._start(self._accept, listener)
        deadline = time.monotonic() + self.join_timeout
        with self._changed:
            while len(self._links) < self.process.num_processes - 1 and self.loss is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                if not self._changed.wait(min(left, 10)) and left > 10:
                    self.say(f"waiting for {self._missing()} at {self.process.coordinator}")
            all_there = len(self._links) == self.process.num_processes - 1
            self._complete = all_there and not self._losing
        if not all_there:
            self._record_loss(
                f"{self._missing()} did not connect to {self.process.coordinator} within "
                f"{self.join_timeout:g} s; start all {self.process.num_processes} processes, "
                f"process 0 on {host}, with the same --coordinator, and check that they reach it"
            )
        if not self._complete:
            with self._changed:
                self._changed.wait_for(lambda: self.loss)
            raise ValueError(self.loss)
        self._send_all(pack(begin=True))

    def _connect(self) -> None:
        """On the others: connect to process 0, and wait until all have."""
        address = self.process.coordinator
        hello = Hello(PROTOCOL, self.process.process_id, self.process.num_processes, self._host)
        try:
            question = pack(hello=hello._asdict())
            link, kind, content = self._ask(question, WELCOME, self.join_timeout)
        except OSError as error:
            raise ValueError(
                f"{address}: process 0 did not answer within {self.join_timeout:g} s "
                f"({error.strerror or error}); start it there, or correct --coordinator"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"{address}: expected process 0 of this program, got {error}; correct --coordinator"
            ) from error
        if kind == "end":
            raise ValueError(_one_line(content))
        link.name = self._name_of(0, content.get("host"))
        self._token = content.get("token")
        with self._changed:
            self._links[0] = link
        self._start(self._send_heartbeats, link)
        self._start(self._listen, link)
        with self._changed:
            # Long enough for process 0 to report which processes did not connect.
            limit = self.join_timeout + self.peer_timeout
            self._changed.wait_for(lambda: self._complete or self.loss, limit)
            # A loss may be reported before the run begins.
            if self.loss or not self._complete:
                raise ValueError(self.loss or f"{address}: no run began within {limit:g} s")

    def _missing(self) -> str:
        wanted = set(range(1, self.process.num_processes)) - self._links.keys()
        few = ", ".join(map(str, sorted(wanted)[:8])) + (", ..." if len(wanted) > 8 else "")
        return f"process{'es' if len(wanted) > 1 else ''} {few} of {self.process.num_processes}"

    def _ask(self, question: bytes, expected: Expected, timeout: float) -> tuple[Link, *Message]:
        """Ask process 0; retry if it does not listen yet or has dropped the connection."""
        address = host_and_port(self.process.coordinator)

        def attempt(left: float) -> tuple[Link, *Message]:
            link = Link(socket.create_connection(address, left), self.peer_timeout)
            return link, *link.ask(question, expected)

        return retry(attempt, timeout)

    def _accept(self, listener: socket.socket) -> None:
        """On process 0: accept connections; if too many are pending, drop the oldest of them."""
        for connection in accepted(listener):
            link = Link(connection, self.peer_timeout)
            with self._changed:
                if len(self._pending) == MOST_PENDING:
                    self._pending[0].shut()
                    self._changed.wait_for(lambda: len(self._pending) < MOST_PENDING)
                self._pending.append(link)
            self._start(self._handle_connection, link)

    def _handle_connection(self, link: Link) -> None:
        """Handle a connection to the coordinator's port: a process, or the relay of one."""
        try:
            message = link.receive(GREETING)
        except (OSError, ValueError):
            message = None
        with self._changed:
            self._pending.remove(link)
            self._changed.notify_all()
        match message:
            case ("jax", self._token):
                self._serve_jax(link)
            case ("hello", fields) if (hello := Hello.of(fields)) and self._admit(link, hello):
                self._listen(link)
            case _:
                link.close()

    def _admit(self, link: Link, hello: Hello) -> bool:
        """Admit a process and return True; otherwise tell it why not and return False."""
        with self._changed:
            gathering = not self._complete
            refusal = self._refusal(hello)
            if refusal is None:
                answer = pack(welcome={"host": self._host, "token": self._token})
            else:
                answer = _end_message(refusal)
            try:
                link.send(answer)  # before other threads can: it must be the first message
            except OSError:
                return False
            if refusal is None:
                link.name = self._name_of(hello.process, hello.host)
                self._links[hello.process] = link
                self._start(self._send_heartbeats, link)
                self._changed.notify_all()
        if refusal is not None and gathering:
            self._record_loss(refusal)
        return refusal is None

    def _refusal(self, hello: Hello) -> str | None:
        """Return why a process cannot take part, or None; self._changed is held."""
        if self._losing:
            self._changed.wait_for(lambda: self.loss)
            return self.loss
        protocol, index, count, host = hello
        if protocol != PROTOCOL:
            return (
                f"a process on host {host} was started with another version of this program "
                f"(protocol {protocol}, process 0 has {PROTOCOL}); install the same on all hosts"
            )
        if count != self.process.num_processes:
            return (
                f"process {index} was started with --num-processes {count}, process 0 with "
                f"{self.process.num_processes}; start all with the same number"
            )
        if not 0 < index < count or index in self._links:
            return (
                f"two processes were started with --process-id {index}; give each its own, from "
                f"0 to {count - 1}, and each run its own --coordinator"
            )
        return None

    # --------------------------------------------------------------------------- watching

    def _start(self, function: Callable[[*Arguments], object], *arguments: *Arguments) -> None:
        """Call a function in a new thread; an exception there ends the run."""

        def call() -> None:
            try:
                function(*arguments)
            except BaseException as error:
                self._record_loss(
                    f"{self._name} ended: {error!r} in its thread {function.__name__}"
                )

        threading.Thread(target=call, name=function.__name__, daemon=True).start()

    def _send_heartbeats(self, link: Link) -> None:
        with contextlib.suppress(OSError):  # handled by the thread that listens
            while True:
                link.send_heartbeat()
                time.sleep(BEAT)

    def _listen(self, link: Link) -> None:
        """Receive the messages of one process, until it is lost or done."""
        expected = FROM_OTHERS if self.process.process_id == 0 else FROM_FIRST
        try:
            while (message := link.receive(expected)) is not None:
                self._take(link, *message)
            how = "its connection was closed"
        except TimeoutError:
            how = f"no sign of life for {self.peer_timeout:g} s"
        except (OSError, ValueError) as error:
            how = f"its connection broke ({error})"
        if link.done:
            self._finish_alone()
            return
        self._record_loss(
            f"{link.name} was lost during {link.phase}: {link.failure or how}; all processes end, "
            "start them again"
        )

    def _finish_alone(self) -> None:
        """End with status 0 if jax has not shut down within the time-out: all work is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing)
        time.sleep(self.peer_timeout)
        if not self._ending:
            os._exit(0)

    def _take(self, link: Link, kind: str, content: Any) -> None:
        if kind == "end" and not link.done:  # the end of a process that is done is not a loss
            self._record_loss(_one_line(content))
        with self._changed:
            if kind == "phase":
                link.phase = _one_line(content)
            elif kind == "value":
                self._values.append(content)
            elif kind == "begin":
                self._complete = True
            elif kind == "ready":
                link.ready = True
            elif kind == "done":
                link.done = True
            self._changed.notify_all()

    def _name_of(self, index: int, host: str) -> str:
        return f"process {index} of {self.process.num_processes} (host {host})"

    def _record_loss(self, sentence: str) -> None:
        """Record a loss, if it is the first one, and report it to the others."""
        with self._changed:
            if self._losing or self._ending:
                return
            self._losing, complete = True, self._complete
        try:
            self._send_all(_end_message(sentence))
        finally:
            # Only now may this process end; before, the others would report it as lost.
            with self._changed:
                self.loss = sentence
                self._changed.notify_all()
            if complete:  # otherwise `join` waits for it, and raises it
                self._leave_soon()

    def _leave_soon(self) -> NoReturn:
        """Wake the main thread, let it print finished results for a short time, and leave."""
        if callable(signal.getsignal(WAKE)):  # `default_int_handler`, or one that defers it
            os.kill(os.getpid(), WAKE)
            time.sleep(LAST_WORDS)
        self.leave()

    def _send_all(self, data: bytes) -> None:
        # A connection that fails is handled by the thread that listens to it.
        for link in list(self._links.values()):
            with contextlib.suppress(OSError):
                link.send(data)

    # --------------------------------------------------------------------------------- jax

    def _start_jax(self) -> None:
        """Start jax.distributed behind the relays."""
        import jax

        # gRPC would use a proxy even for the loopback interface, and jax warns about a proxy.
        os.environ.update(no_grpc_proxy="127.0.0.1")
        jax.config.update("jax_check_proxy_envs", False)
        # It would catch SIGTERM, and the process would not end.
        jax.config.update("jax_enable_preemption_service", False)
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        if self.process.process_id == 0:
            listener.close()  # it was only to find a free port
            with self._changed:
                self._jax_port = port
                self._changed.notify_all()
        else:
            self._start(self._relay, listener)
        slow = SLOWER * int(max(self.peer_timeout, 10))
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            self.process.num_processes,
            self.process.process_id,
            initialization_timeout=int(self.join_timeout) + slow,
            heartbeat_timeout_seconds=UNWATCHED,
            shutdown_timeout_seconds=slow,
            coordinator_bind_address=f"127.0.0.1:{port}",
        )

    def _relay(self, listener: socket.socket) -> None:
        """On the others: forward jax's connections to process 0."""
        for near in accepted(listener):
            self._start(self._forward, near)

    def _forward(self, near: socket.socket) -> None:
        """On the others: forward one of jax's connections; if it is lost, process 0 is lost."""
        if not begins_with(near, HTTP2, self.peer_timeout):  # another program's
            near.close()
            return
        self._carried.append(near)
        given_up = threading.Event()

        def send_on(far: socket.socket) -> None:
            if copy_bytes(near, far, HTTP2, near):  # jax itself has ended it
                given_up.set()

        try:
            link, _, _ = self._ask(pack(jax=self._token), RELAYED, self.peer_timeout)
        except (OSError, ValueError) as error:
            how = f"could not be made ({error})"
        else:
            link.socket.settimeout(None)
            self._start(send_on, link.socket)
            copy_bytes(link.socket, near, bytes(link.unread), near)
            how = "was closed"
        with self._changed:
            # If process 0 has ended, or reports a loss, the thread that listens learns it at once.
            over = self._changed.wait_for(
                lambda: self._closing or self._losing or self._ending, self.peer_timeout
            )
        if not over and not given_up.is_set():
            name = self._links[0].name
            self._record_loss(
                f"a second connection of {self._name} to {name} {how}; start all again"
            )

    def _serve_jax(self, link: Link) -> None:
        """On process 0: forward a relay's connection to jax's service, once that has started."""
        try:
            link.send(pack(jax=True))
            with self._changed:
                self._changed.wait_for(lambda: self._jax_port, self.join_timeout)
            address = "127.0.0.1", self._jax_port
            near = retry(lambda left: socket.create_connection(address, left), self.join_timeout)
        except OSError:
            link.close()
            return
        for one in (near, link.socket):
            one.settimeout(None)
        self._start(copy_bytes, near, link.socket)
        copy_bytes(link.socket, near, bytes(link.unread))


def _one_line(text: str) -> str:
    """Return another process's text on one line."""
    return " ".join(text.splitlines())


def _end_message(sentence: str) -> bytes:
    """Return the message that tells the other processes why all end."""
    return pack(end=sentence[:LONGEST_SENTENCE])

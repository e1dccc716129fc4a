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
life; what the process is doing; process 0's options; and the sentence by which a process ends,
which all others repeat. A closed connection is noticed at once, a silent one after the time-out.
jax's service listens behind the same address, on a port of process 0's own, and each other process
reaches it through a relay in itself. When process 0 dies the relay leaves jax's side of the
connection open: jax sees a silence, for which its own time-out is far longer, and this module
speaks first. All of it uses public options of jax, but for finding the place in a job.

The network between the processes must be private, as it must be for jax itself: nothing here is
encrypted, and whoever can reach the coordinator's port and says what a process says can take part.
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
from typing import Any, NamedTuple, NoReturn, Self

from grok1.checks import is_integer
from grok1.parallel.links import (
    Expected,
    Link,
    accepted,
    begins_with,
    copy_bytes,
    insist,
    listen_everywhere,
    pack,
)

JOIN_TIMEOUT = 120.0  # seconds
PEER_TIMEOUT = 20.0
BEAT = 0.5  # between signs of life
# A process that was started with another version is refused; to be raised when a message changes.
PROTOCOL = 2
MOST_PENDING = 32  # connections that have not said yet what they are
LONGEST_SENTENCE = 4000  # characters; up to 12 bytes each in JSON
GREETING = Expected({"hello": dict, "jax": str}, limit=2**10, seconds=5)
WELCOME = Expected({"welcome": dict, "end": str}, limit=2**16)
RELAYED = Expected({"jax": bool}, limit=2**10)
FROM_OTHERS = Expected(
    {"alive": bool, "phase": str, "ready": bool, "done": bool, "end": str}, limit=2**16
)
# The prompts of a run are one message.
FROM_FIRST = Expected({**FROM_OTHERS.types, "begin": bool, "value": object}, limit=2**28)
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # how each of jax's connections begins (RFC 9113, 3.4)
# jax's service must not end a process that this module has not: its limits are some factor longer.
SLOWER = 10
# Nor one that still prints when another is lost that had done its part: seconds, some months.
UNWATCHED = 10**7
# How long the main thread gets, after a loss, to print what is finished; then the loss itself.
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


class Hello(NamedTuple):
    """What a process says of itself to process 0; all versions have `protocol` and `host`."""

    protocol: int
    process: int
    processes: int
    host: str

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Self | None:
        """Return it as it was received, None if it is none."""
        protocol, process, processes, host = (fields.get(name) for name in cls._fields)
        if not (is_integer(protocol) and is_integer(process) and is_integer(processes)):
            return None
        if not isinstance(host, str) or not host.isprintable():
            return None
        return cls(protocol, process, processes, host)


def host_and_port(address: str) -> tuple[str, int]:
    """Split HOST:PORT, or [IPV6]:PORT; ValueError if it is not that."""
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    known = re.fullmatch(r"[^][\s]+", host)
    try:
        host.encode("idna")  # as it is when it is looked up
    except UnicodeError:
        known = None
    if not known or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
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


class Peers:
    """All processes of a run, as one of them sees them.

    place: where this one stands. join_timeout: how many seconds it waits for all to come.
    peer_timeout: after how many seconds without a sign of life a process counts as lost. say:
    prints a line for the person, which may quote what another process sent: what is waited for, and
    what ended this one.

    From `join` on threads watch the others. If one is lost, or ends by an error, they interrupt
    the main thread as Ctrl-C does, so that it can print what is finished; it must then call `end`,
    which no signal of theirs interrupts. After two seconds they end the process themselves, with
    status 1. `loss` is the sentence that names what was lost.
    """

    def __init__(
        self,
        place: Place,
        join_timeout: float,
        peer_timeout: float,
        say: Callable[[str], object],
    ):
        self.place = place
        self.join_timeout = join_timeout
        self.peer_timeout = peer_timeout
        self.say = say
        self.loss: str | None = None
        self._changed = threading.Condition()  # guards all that follows, and `loss`
        self._links: dict[int, Link] = {}  # on process 0 to all others, on these to process 0
        self._pending: list[Link] = []  # the oldest first
        self._host = socket.gethostname()
        self._name = self._name_of(place.process, self._host)
        self._phase = "the start"
        self._values: list[Any] = []
        self._complete = False  # all have come
        self._losing = False  # there is a loss, but perhaps not all know yet
        self._closing = False  # this process has done its part
        self._ending = False
        self._jax_port = 0
        self._token = secrets.token_hex(16)  # by which process 0 knows the others' relays
        self._leaving = threading.Lock()
        # Open when process 0 dies: see the top of this file.
        self._carried: list[socket.socket] = []

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
        """Say what this process does from now on; the others name it if it is lost."""
        if name != self._phase:
            self._phase = name
            self._send_all(pack(phase=name))

    def end(self, reason: str) -> None:
        """Tell the others why this process ends now. If they ended before, `leave` with that."""
        signal.signal(WAKE, signal.SIG_IGN)
        with self._changed:
            self._ending = True
            if self._losing:
                self._changed.wait_for(lambda: self.loss)
                self.leave()
        self._send_all(_farewell(f"{self._name} ended: {reason}"))

    def leave(self) -> NoReturn:
        """Say what was lost and end this process, whatever its other threads do: status 1."""
        try:
            self._leaving.acquire()  # for ever: it is said once
            sentence = f"error: {self.loss}"
            # In a thread: a pipe that nobody reads would keep this process.
            saying = threading.Thread(target=self.say, args=(sentence,), daemon=True)
            saying.start()
            saying.join(LAST_WORDS)
        finally:
            os._exit(1)

    def await_loss(self) -> None:
        """Wait, up to the time-out, for the loss that may have caused an error in a collective.

        If there is one this process ends with it.
        """
        signal.signal(WAKE, signal.SIG_IGN)
        with self._changed:
            self._changed.wait_for(lambda: self.loss, self.peer_timeout + LAST_WORDS)
            if self.loss is not None:
                self.leave()

    def meet(self) -> None:
        """Wait until all have called it, however late they are. Raises ValueError for a loss."""
        first = self.place.process == 0
        if not first:
            self._send_all(pack(ready=True))
        with self._changed:
            self._wait_for_all("ready")
        if first:
            self._send_all(pack(ready=True))

    def close(self) -> None:
        """End in good order, when all have called it."""
        import jax

        self.phase("the end")
        self._send_all(pack(done=True))  # what is closed from now on is no loss
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            # Not in jax's own barrier, which aborts all where one is late: it may still print.
            self._wait_for_all("done")
        self._start(self._finish_alone)  # should jax wait for one whose connection is lost
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

    # ------------------------------------------------------------------------------ coming together

    def _gather(self) -> None:
        """On process 0: wait for all others."""
        host, port = host_and_port(self.place.coordinator)
        try:
            listener = listen_everywhere(port)
        except OSError as error:
            raise ValueError(
                f"{self.place.coordinator}: process 0 cannot listen at port {port} "
                f"({os.strerror(error.errno or 0)}); end what uses it, or give all processes "
                "another --coordinator"
            ) from error
        self._start(self._accept, listener)
        deadline = time.monotonic() + self.join_timeout
        with self._changed:
            while len(self._links) < self.place.processes - 1 and self.loss is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                if not self._changed.wait(min(left, 10)) and left > 10:
                    self.say(f"waiting for {self._missing()} at {self.place.coordinator}")
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
        self._send_all(pack(begin=True))

    def _report(self) -> None:
        """On the others: come to process 0, and wait until all are there."""
        address = self.place.coordinator
        hello = Hello(PROTOCOL, self.place.process, self.place.processes, self._host)
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
        self._start(self._keep_beating, link)
        self._start(self._listen, link)
        with self._changed:
            # Process 0 says who did not come: it is given the time for it.
            limit = self.join_timeout + self.peer_timeout
            self._changed.wait_for(lambda: self._complete or self.loss, limit)
            # A loss may be told before the beginning.
            if self.loss or not self._complete:
                raise ValueError(self.loss or f"{address}: process 0 began nothing in {limit:g} s")

    def _missing(self) -> str:
        wanted = set(range(1, self.place.processes)) - self._links.keys()
        few = ", ".join(map(str, sorted(wanted)[:8])) + (", ..." if len(wanted) > 8 else "")
        return f"process{'es' if len(wanted) > 1 else ''} {few} of {self.place.processes}"

    def _ask(self, question: bytes, expected: Expected, timeout: float) -> tuple[Link, str, Any]:
        """Ask process 0, again where it is not there yet or has dropped the connection."""
        address = host_and_port(self.place.coordinator)

        def attempt(left: float) -> tuple[Link, str, Any]:
            link = Link(socket.create_connection(address, left), self.peer_timeout)
            return link, *link.ask(question, expected)

        return insist(attempt, timeout)

    def _accept(self, listener: socket.socket) -> None:
        """On process 0: take connections; where too many say nothing, drop the oldest of them."""
        for connection in accepted(listener):
            link = Link(connection, self.peer_timeout)
            with self._changed:
                if len(self._pending) == MOST_PENDING:
                    self._pending[0].shut()
                    self._changed.wait_for(lambda: len(self._pending) < MOST_PENDING)
                self._pending.append(link)
            self._start(self._greet, link)

    def _greet(self, link: Link) -> None:
        """Take what comes to the coordinator's port: a process, or the relay of one."""
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
        """Take in a process and return True, or tell it why not."""
        with self._changed:
            gathering = not self._complete
            refusal = self._refusal(hello)
            if refusal is None:
                answer = pack(welcome={"host": self._host, "token": self._token})
            else:
                answer = _farewell(refusal)
            try:
                link.send(answer)  # before others may send: the first message is this one
            except OSError:
                return False
            if refusal is None:
                link.name = self._name_of(hello.process, hello.host)
                self._links[hello.process] = link
                self._start(self._keep_beating, link)
                self._changed.notify_all()
        if refusal is not None and gathering:
            self._lose(refusal)
        return refusal is None

    def _refusal(self, hello: Hello) -> str | None:
        """Return why a process cannot take part; self._changed is held."""
        if self._losing:
            self._changed.wait_for(lambda: self.loss)
            return self.loss
        protocol, index, count, host = hello
        if protocol != PROTOCOL:
            return (
                f"a process on host {host} was started with another version of this program "
                f"(protocol {protocol}, process 0 has {PROTOCOL}); install the same on all hosts"
            )
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

    def _start(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call in a thread of its own; an exception there ends the run."""

        def call() -> None:
            try:
                function(*arguments)
            except BaseException as error:
                self._lose(f"{self._name} ended: {error!r} in its thread {function.__name__}")

        threading.Thread(target=call, name=function.__name__, daemon=True).start()

    def _keep_beating(self, link: Link) -> None:
        with contextlib.suppress(OSError):  # found by the thread that listens
            while True:
                link.beat()
                time.sleep(BEAT)

    def _listen(self, link: Link) -> None:
        """Take what one process says, until it is lost or has nothing more to say."""
        expected = FROM_OTHERS if self.place.process == 0 else FROM_FIRST
        try:
            while (message := link.receive(expected)) is not None:
                self._take(link, *message)
            how = link.failure or "its connection was closed"
        except TimeoutError:
            how = f"no sign of life for {self.peer_timeout:g} s"
        except (OSError, ValueError) as error:
            how = f"its connection broke ({error})"
        if link.done:
            self._finish_alone()
            return
        self._lose(
            f"{link.name} was lost during {link.phase}: {how}; all processes end, start them again"
        )

    def _finish_alone(self) -> None:
        """End in good order when jax has not shut down in the time-out: all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing)
        time.sleep(self.peer_timeout)
        if not self._ending:
            os._exit(0)

    def _take(self, link: Link, kind: str, content: Any) -> None:
        if kind == "end" and not link.done:  # what is done is no loss
            self._lose(_one_line(content))
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
        return f"process {index} of {self.place.processes} (host {host})"

    def _lose(self, sentence: str) -> None:
        """Take note of a loss, the first one only, and tell it to the others."""
        with self._changed:
            if self._losing or self._ending:
                return
            self._losing, complete = True, self._complete
        try:
            self._send_all(_farewell(sentence))
        finally:
            # Only now may this process end: the others would name it as the one that was lost.
            with self._changed:
                self.loss = sentence
                self._changed.notify_all()
            if complete:  # else `join` waits, and raises it
                self._leave_soon()

    def _leave_soon(self) -> NoReturn:
        """Wake the main thread, which has a little time to print what is finished; then leave."""
        if callable(signal.getsignal(WAKE)):  # `default_int_handler`, or who puts it off
            os.kill(os.getpid(), WAKE)
            time.sleep(LAST_WORDS)
        self.leave()

    def _send_all(self, data: bytes) -> None:
        # A connection that fails is found by the thread that listens to it.
        for link in list(self._links.values()):
            with contextlib.suppress(OSError):
                link.send(data)

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
            self._start(self._relay, listener)
        slow = SLOWER * int(max(self.peer_timeout, 10))
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            self.place.processes,
            self.place.process,
            initialization_timeout=int(self.join_timeout) + slow,
            heartbeat_timeout_seconds=UNWATCHED,
            shutdown_timeout_seconds=slow,
            coordinator_bind_address=f"127.0.0.1:{port}",
        )

    def _relay(self, listener: socket.socket) -> None:
        """On the others: carry jax's connections to process 0."""
        for near in accepted(listener):
            self._start(self._carry, near)

    def _carry(self, near: socket.socket) -> None:
        """On the others: carry one of jax's connections, whose loss is that of process 0."""
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
            # If process 0 has ended, or says why all do, the thread that listens knows at once.
            over = self._changed.wait_for(
                lambda: self._closing or self._losing or self._ending, self.peer_timeout
            )
        if not over and not given_up.is_set():
            name = self._links[0].name
            self._lose(f"a second connection of {self._name} to {name} {how}; start all again")

    def _serve_jax(self, link: Link) -> None:
        """On process 0: carry one relay's connection to jax's service, once it is there."""
        try:
            link.send(pack(jax=True))
            with self._changed:
                self._changed.wait_for(lambda: self._jax_port, self.join_timeout)
            address = "127.0.0.1", self._jax_port
            near = insist(lambda left: socket.create_connection(address, left), self.join_timeout)
        except OSError:
            link.close()
            return
        for one in (near, link.socket):
            one.settimeout(None)
        self._start(copy_bytes, near, link.socket)
        copy_bytes(link.socket, near, bytes(link.unread))


def _one_line(text: str) -> str:
    """Return what another process says as it is shown."""
    return " ".join(text.splitlines())


def _farewell(sentence: str) -> bytes:
    """Return the message by which a process says why all end."""
    return pack(end=sentence[:LONGEST_SENTENCE])

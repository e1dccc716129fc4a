"""Several processes as one run: the same answers, and an end in one sentence when one is lost."""

import argparse
import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import golden
import run
from commands import COUNTED, Result
from grok1.interrupts import uninterrupted
from grok1.parallel import links, multihost, sharding
from grok1.parallel.sharding import split_over_hosts
from paths import ROOT
from processes import DEAF, MODEL, SLACK, TIMEOUT, Start, finish, place, start_pair
from runner import Request, load_server

WORKER = ROOT / "tests/parallel/multihost_worker.py"
HOST = re.escape(socket.gethostname())
ASK = ("--checkpoint", MODEL, "--prompt-ids", "5 6 7", "--temperature", 0, "--mesh", "1,8")


def wait_for(*files: pathlib.Path) -> None:
    """Wait until all files are there."""
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"never saw {files}"
        time.sleep(0.02)


def without_progress(err: str) -> str:
    """What process 0 says, but for how it is getting on."""
    return re.sub(r"(?m)^(loaded|loading:|waiting for) [^\n]*\n", "", err)


def start_stalled(
    start: Start,
    address: str,
    directory: pathlib.Path,
    victim: int,
    where: str,
    before: Sequence[str] = (),
) -> list[subprocess.Popen[bytes]]:
    """Start a run of which the victim stands still at a place, and the other one waits for it."""
    pair = [
        start(
            WORKER, "run", directory, f"{victim}:{where}", *place(address, i), *ASK, before=before
        )
        for i in (0, 1)
    ]
    wait_for(directory / "stalled", directory / "waiting")
    return pair


def assert_lost(survivor: Result, victim: int, where: str, how: str) -> None:
    """The survivor failed, and said in one sentence which process was lost, where and how."""
    assert survivor.status == 1
    sentence = (
        rf"error: process {victim} of 2 \(host {HOST}\) was lost during {where}: {how}; "
        r"all processes end, start them again\n"
    )
    assert re.fullmatch(sentence, without_progress(survivor.err)), survivor.err


# Answers.


@pytest.mark.parametrize("mesh", ["1,8", "2,4"])
def test_two_processes_answer_as_one(
    mesh: str,
    start: Start,
    address: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second process is started with other options: those of the first one hold.

    gloo prints to stdout from C++: nothing of it may stand among the answers.
    """
    more = [*ASK, "--prompt-ids", "9 8 7 6", "--max-len", 6, "--json", "--mesh", mesh]
    script = pathlib.Path(run.__file__)
    second = start(script, *place(address, 1), "--prompt-ids", "1", "--no-kernels")
    first = finish(start(script, *place(address, 0), *more))
    assert finish(second) == (0, "", "")
    assert first.status == 0
    loaded = r"loaded [^\n]+ in [\d.]+ s: 3 layers, float32 activations, mesh \d,\d on cpu\n"
    assert re.fullmatch(loaded + COUNTED, first.err), first.err
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, more)])
    assert run.main() == 0
    alone = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(first.answers) == len(alone) == 2
    for answer, expected in zip(first.answers, alone, strict=True):
        assert answer["token_ids"] == expected["token_ids"]
        assert answer["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-5)


def test_settings_of_jax_are_those_of_the_first_process(start: Start, address: str) -> None:
    """With other random bits each would draw, and go on with, tokens of its own."""
    drawn = [*ASK[:-4], "--temperature", 1.5, "--max-len", 6, "--json", "--mesh", "1,2"]
    second = start(run.__file__, *place(address, 1), devices=1, JAX_DEFAULT_PRNG_IMPL="rbg")
    first = finish(start(run.__file__, *place(address, 0), *drawn, devices=1))
    assert (finish(second).status, first.status) == (0, 0)
    (answer,) = first.answers
    server = load_server(MODEL)
    request = Request(answer["prompt_ids"], temperature=1.5, max_len=6)
    (alone,) = server.generate([request])
    assert answer["token_ids"] == alone.token_ids
    assert answer["logprobs"] == pytest.approx(alone.logprobs, abs=1e-4)


def test_processes_with_other_numbers_of_devices_are_refused(start: Start, address: str) -> None:
    pair = [
        start(run.__file__, *place(address, i), *ASK[:-1], "1,3", devices=1 + i) for i in (0, 1)
    ]
    for result in map(finish, pair):
        assert result.status == 1
        sentence = (
            "expected the same number of devices in each process, got 1 in process 0, "
            "2 in process 1; "
        )
        assert sentence in result.err, result.err


def read(
    start: Start, address: str, out: pathlib.Path, processes: int, devices: int, *what: str
) -> dict[str, np.ndarray]:
    """Return the logits, scores and greedy tokens that a run of some processes finds."""
    running = [
        start(WORKER, "read", out, address, processes, i, *what, devices=devices // processes)
        for i in range(processes)
    ]
    for process in running:
        result = finish(process, 240)
        assert result.status == 0, result.err
    with np.load(out) as file:
        return dict(file)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("devices", "model", "meshes"),
    [
        (8, "three-layers", ("1,8",)),
        (8, "twelve-layers", ("1,8",)),
        (8, "three-layers", ("2,4", "4,2", "8,1")),
        (16, "three-layers", ("1,16", "2,8")),
    ],
)
def test_two_processes_compute_what_one_does(
    devices: int,
    model: str,
    meshes: tuple[str, ...],
    start: Start,
    address: str,
    tmp_path: pathlib.Path,
) -> None:
    one = read(start, address, tmp_path / "one.npz", 1, devices, model, *meshes)
    two = read(start, address, tmp_path / "two.npz", 2, devices, model, *meshes)
    assert one.keys() == two.keys() and len(one) == 3 * len(meshes)
    for name, expected in one.items():
        if name.startswith("logits"):
            assert golden.relative_error(two[name], expected).max() <= 1e-5
        elif name.startswith("greedy"):
            assert two[name].tolist() == expected.tolist() and len(expected) > 40
        else:
            np.testing.assert_allclose(two[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "hosts", "per_host", "local", "between"),
    [
        ((1, 8), 2, 4, (1, 4), (1, 2)),
        ((2, 4), 2, 4, (1, 4), (2, 1)),
        ((4, 2), 2, 4, (2, 2), (2, 1)),
        ((8, 1), 2, 4, (4, 1), (2, 1)),
        ((3, 4), 2, 6, (3, 2), (1, 2)),
        ((1, 2), 1, 8, (1, 2), (1, 1)),  # one host may have devices to spare
    ],
)
def test_the_model_axis_stays_within_a_host(
    mesh: tuple[int, int],
    hosts: int,
    per_host: int,
    local: tuple[int, int],
    between: tuple[int, int],
) -> None:
    assert split_over_hosts(*mesh, hosts, per_host) == (local, between)


def test_a_mesh_that_does_not_use_all_hosts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a mesh of 1,4 has 4 devices, but 2 processes of 4"):
        split_over_hosts(1, 4, 2, 4)


# Losses.


@pytest.mark.parametrize(
    ("victim", "where"),
    [
        (1, "load"),
        (0, "load"),
        (1, "prefill"),
        (1, "decode"),
        pytest.param(0, "prefill", marks=pytest.mark.exhaustive),
        pytest.param(0, "decode", marks=pytest.mark.exhaustive),
    ],
)
def test_a_killed_process_ends_the_other(
    victim: int, where: str, start: Start, address: str, tmp_path: pathlib.Path
) -> None:
    """In prefill and decode the survivor waits in a collective, which would wait for ever."""
    pair = start_stalled(start, address, tmp_path, victim, where, DEAF)
    pair[victim].kill()
    began = time.monotonic()
    survivor = finish(pair[1 - victim], TIMEOUT + SLACK)
    assert time.monotonic() - began < SLACK  # a closed connection needs no time-out
    assert survivor.status == 1
    if where == "decode" and victim == 1:
        # What it has is kept.
        assert survivor.out.count(" ") in (2, 3) and survivor.out.endswith("\n")
    assert_lost(survivor, victim, where, r"its connection (was closed|broke [^\n]*)")


def test_jax_does_not_abort_before_a_loss_is_told(
    start: Start, address: str, tmp_path: pathlib.Path
) -> None:
    """Its coordination service dies with process 0; jax alone aborts within milliseconds."""
    pair = start_stalled(start, address, tmp_path, 0, "late")
    pair[0].kill()
    survivor = finish(pair[1], 2 + SLACK)
    assert survivor.status == 1
    assert re.fullmatch(r"error: process 0 of 2 [^\n]* was lost [^\n]*\n", survivor.err)


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_silent_process_ends_the_other_in_time(
    victim: int, start: Start, address: str, tmp_path: pathlib.Path
) -> None:
    pair = start_stalled(start, address, tmp_path, victim, "load")
    pair[victim].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    survivor = finish(pair[1 - victim], TIMEOUT + SLACK)
    assert TIMEOUT - 1 < time.monotonic() - began < TIMEOUT + SLACK
    assert survivor.status == 1
    assert_lost(survivor, victim, "load", f"no sign of life for {TIMEOUT} s")


def test_an_error_of_one_process_ends_the_other(
    start: Start, address: str, tmp_path: pathlib.Path
) -> None:
    """A file is missing on one host only; jax would have it wait for the others until they end."""
    (tmp_path / "ckpt-0").mkdir()
    (tmp_path / "config.json").write_bytes((MODEL / "config.json").read_bytes())
    first = start(run.__file__, *place(address, 0), *ASK)
    second = finish(start(run.__file__, *place(address, 1), "--checkpoint", tmp_path))
    assert second.status == 1
    assert re.fullmatch(rf"error: {tmp_path}/ckpt-0/tensor\S+ [^\n]*missing[^\n]*\n", second.err)
    reason = second.err.removeprefix("error: ")
    result = finish(first)
    assert (result.status, result.out) == (1, "")
    told = f"error: process 1 of 2 (host {socket.gethostname()}) ended: {reason}"
    assert without_progress(result.err) == told


def test_token_ids_need_no_tokenizer_anywhere(start: Start, address: str) -> None:
    second = start(run.__file__, *place(address, 1), "--tokenizer", ROOT / "tokenizer.model")
    first = finish(start(run.__file__, *place(address, 0), *ASK, "--max-len", 2))
    assert (first.status, finish(second)) == (0, (0, "", ""))


@pytest.mark.parametrize("different", ["config.json", "tokenizer"])
def test_a_process_with_other_files_is_refused(
    different: str, start: Start, address: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "ckpt-0").symlink_to(MODEL / "ckpt-0")
    config = (MODEL / "config.json").read_text()
    (tmp_path / "config.json").write_text(config + "\n" * (different == "config.json"))
    (tmp_path / "tokenizer.model").write_bytes(b"another")
    extra = [*ASK, "--tokenizer", pathlib.Path(run.__file__).parent / "tokenizer.model"]
    first = start(run.__file__, *place(address, 0), *(ASK if different == "config.json" else extra))
    own = ["--checkpoint", tmp_path, "--tokenizer", tmp_path / "tokenizer.model"]
    own = own[: 2 if different == "config.json" else 4]
    second = finish(start(run.__file__, *place(address, 1), *own))
    assert second.status == 1 and second.err.count("\n") == 1
    assert f"error: {tmp_path}" in second.err and f"the same {different} as on" in second.err
    assert second.err.removeprefix("error: ") in finish(first).err


def test_a_process_with_other_weights_is_refused(
    start: Start, address: str, tmp_path: pathlib.Path
) -> None:
    """It would give other tokens than any of the two models, and no error."""
    other = shutil.copytree(MODEL, tmp_path / "other")
    largest = max((other / "ckpt-0").iterdir(), key=lambda file: file.stat().st_size)
    values = bytearray(largest.read_bytes())
    for i in range(len(values) // 16, len(values) // 2):
        values[i] ^= 0x80
    largest.write_bytes(values)
    first = start(run.__file__, *place(address, 0), *ASK)
    second = finish(start(run.__file__, *place(address, 1), "--checkpoint", other))
    file = f"ckpt-0/{largest.name}"
    told = f"{other}: expected the same {file} as on process 0, got something else"
    assert second.status == 1 and second.err.startswith(f"error: {told}; give all")
    assert told in finish(first).err


def test_a_process_of_another_program_is_refused(
    start: Start, address: str, tmp_path: pathlib.Path
) -> None:
    for name in ("run.py", "runner.py", "model.py", "checkpoint.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "grok1", tmp_path / "grok1")
    with (tmp_path / "grok1" / "ops" / "layers.py").open("a") as file:
        file.write("# changed\n")
    first = start(run.__file__, *place(address, 0), *ASK)
    second = finish(start(tmp_path / "run.py", *place(address, 1)))
    told = f"{tmp_path}: expected the same program as on process 0, got another version"
    assert second.status == 1 and second.err.startswith(f"error: {told}; install the same")
    assert told in finish(first).err


def test_a_process_that_never_comes_is_named(start: Start, address: str) -> None:
    """Three are expected; jax would end the two that came with a trace that names none."""
    options = ["--peer-timeout", 2, "--join-timeout", 5]
    running = [start(run.__file__, *place(address, i, 3), *options, *ASK) for i in (0, 1)]
    for process in running:
        result = finish(process, 5 + 2 + SLACK)
        assert (result.status, result.out) == (1, "")
        assert re.fullmatch(
            rf"error: process 2 of 3 did not connect to {address} within 5 s; start all 3 [^\n]*\n",
            result.err,
        ), result.err


@pytest.mark.parametrize(
    ("name", "victim", "told"),
    [
        ("SIGINT", 0, "process 0 of 3 .* ended: it was interrupted"),
        (
            "SIGKILL",
            0,
            "process 0 of 3 .* was lost during the start: its connection (was closed|broke)",
        ),
        (
            "SIGKILL",
            1,
            "process 1 of 3 .* was lost during the start: its connection (was closed|broke)",
        ),
    ],
)
def test_a_loss_before_all_have_come_ends_all(
    name: str, victim: int, told: str, start: Start, address: str, tmp_path: pathlib.Path
) -> None:
    hooks = [WORKER, "run", tmp_path, f"{victim}:start"]
    pair = [start(*hooks, *place(address, i, 3), *ASK) for i in (0, 1)]
    wait_for(tmp_path / "stalled", tmp_path / "waiting")
    pair[victim].send_signal(getattr(signal, name))
    other = finish(pair[1 - victim], SLACK)
    assert other.status == 1
    assert re.match(f"error: {told}", other.err) and other.err.count("\n") == 1, other.err


def test_a_coordinator_that_does_not_answer_is_named(start: Start, address: str) -> None:
    process = start(run.__file__, *place(address, 1), "--join-timeout", 2, *ASK)
    result = finish(process, 2 + SLACK)
    assert result.status == 1
    assert result.err == (
        f"error: {address}: process 0 did not answer within 2 s (Connection refused); start it "
        "there, or correct --coordinator\n"
    )


def test_a_port_that_is_in_use_is_named(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = finish(start(run.__file__, *place(f"127.0.0.1:{port}", 0), *ASK), SLACK)
    assert result.status == 1
    assert re.fullmatch(
        rf"error: 127.0.0.1:{port}: process 0 cannot listen at port {port} \(Address already in "
        r"use\); end what uses it, or give all processes another --coordinator\n",
        result.err,
    ), result.err


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        ([(1, 2)], "process 1 was started with --num-processes 2, process 0 with 3"),
        ([(1, 3), (1, 3)], "two processes were started with --process-id 1"),
    ],
)
def test_places_that_do_not_fit_end_all_processes(
    others: list[tuple[int, int]], sentence: str, start: Start, address: str
) -> None:
    for process in [
        start(run.__file__, *place(address, *other), *ASK) for other in [(0, 3), *others]
    ]:
        result = finish(process)
        assert result.status == 1 and result.err.count("\n") == 1
        assert sentence in result.err


def test_a_stranger_at_the_port_does_no_harm(start: Start, address: str) -> None:
    """Port scanners say nothing, or something else, or leave at once."""
    first = start(run.__file__, *place(address, 0), *ASK, "--max-len", 1)
    host, port = address.split(":")
    deadline, strangers = time.monotonic() + 30, []
    for greeting in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"hello": "x"}\n', b"[]\n", b"\xff\n"):
        while True:
            try:
                strangers.append(socket.create_connection((host, int(port))))
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        strangers[-1].sendall(greeting)
    second = finish(start(run.__file__, *place(address, 1)))
    assert (finish(first).status, second) == (0, (0, "", ""))
    for stranger in strangers:
        stranger.close()


# Connections of processes that only meet, without jax, and of others.


def meet(
    start: Start,
    address: str,
    place: tuple[int, int],
    *what: object,
    timeout: float = TIMEOUT,
    before: Sequence[str] = (),
) -> Any:
    """Start the process PLACE[0] of PLACE[1], which does something when all have met."""
    process, processes = place
    return start(WORKER, "meet", address, processes, process, timeout, *what, before=before)


def connect(address: str) -> socket.socket:
    """Connect to process 0 as soon as it listens."""
    host, port = address.split(":")
    return links.retry(lambda left: socket.create_connection((host, int(port)), left), 20)


def is_closed(connection: socket.socket) -> bool:
    """Whether process 0 closes a connection within seconds, whatever it says before."""
    connection.settimeout(2 * SLACK)
    try:
        while connection.recv(2**16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


@pytest.mark.parametrize(
    "said",
    [
        b'{"hosts":5}\n',
        b"[",
        b'{"phase":NaN}\n',
        b'{"end":5}\n',
        b'{"value":1}\n',
        b'{"done":true,"phase":"load"}\n',
        b'\xff\xfe{"phase":"load"}\n',
        b"1" * 5000 + b"\n",
        b"[" * 5000 + b"\n",
        b'{"phase":"lo',
    ],
    ids=lambda said: repr(said[:12]),
)
def test_a_wrong_message_of_a_process_ends_all(start: Start, address: str, said: bytes) -> None:
    count = 200_000 if len(said) == 1 else 1
    first, other = (meet(start, address, (i, 3), "stay") for i in (0, 2))
    meet(start, address, (1, 3), "say", said.hex(), count)
    for process in (first, other):
        result = finish(process)
        assert result.status == 1
        assert re.fullmatch(
            rf"error: process 1 of 3 \(host {HOST}\) was lost during the start: its connection "
            r"(was closed|broke \([^\n]*\)); all processes end, start them again\n",
            result.err,
        ), result.err


def test_a_loss_before_the_beginning_ends_all(start: Start, address: str) -> None:
    """Process 0 may tell of one while it still tells others to begin."""
    host, port = address.split(":")
    with socket.create_server((host, int(port))) as server:
        second = meet(start, address, (1, 2), "stay")
        connection, _ = server.accept()
        with connection:
            connection.makefile().readline()
            welcome = links.pack(welcome={"host": "there", "token": "x"})
            end, begin = links.pack(end="process 2 was lost"), links.pack(begin=True)
            connection.sendall(welcome + end + begin)
            result = finish(second)
    assert result.status == 1 and result.err == "error: process 2 was lost\n"


def test_the_sentence_of_another_process_is_one_line(start: Start, address: str) -> None:
    first = meet(start, address, (0, 2), "stay")
    meet(start, address, (1, 2), "say", b'{"end":"one\\nerror: two\\r\\n"}\n'.hex(), 1)
    assert finish(first) == (1, "met\n", "error: one error: two\n")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_thread_that_fails_ends_all(start: Start, address: str, victim: int) -> None:
    pair = [meet(start, address, (i, 2), "fail" if i == victim else "stay") for i in (0, 1)]
    sentence = f"error: process {victim} of 2 (host {socket.gethostname()}) ended: LookupError('on"
    for process in pair:
        result = finish(process)
        assert result.status == 1
        assert result.err.startswith(sentence) and result.err.count("\n") == 1, result.err


def test_a_process_that_stops_reading_is_lost(start: Start, address: str) -> None:
    """Its own signs of life go on, and those to the others do as well while one is waited for."""
    first = meet(start, address, (0, 3), "share", 2**26, timeout=2)
    # Which would else miss the others, too, and end as soon.
    meet(start, address, (1, 3), "deaf", timeout=20)
    other = meet(start, address, (2, 3), "stay", timeout=2)
    for process in (first, other):
        result = finish(process)
        assert result.status == 1
        assert re.fullmatch(
            r"error: process 1 of 3 [^\n]* it has read nothing for 2 s; [^\n]*\n", result.err
        ), result.err


def test_idle_connections_do_not_lock_processes_out(start: Start, address: str) -> None:
    few = ("sh", "-c", 'ulimit -n 64; exec "$0" "$@"')
    first = meet(start, address, (0, 2), "stay", before=few)
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(connect(address)) for _ in range(100)]
        second = meet(start, address, (1, 2), "stay")
        for process in (first, second):
            assert process.stdout.read(4) == b"met\n"
        assert is_closed(strangers[0])


def test_what_is_not_a_process_is_cut_off(start: Start, address: str) -> None:
    """It cannot have memory, nor reach jax's service; and it stays for a short time only."""
    meet(start, address, (0, 2), "stay", timeout=1)
    for greeting in (b"x" * 2**17, b'{"jax": true}\n', b'{"jax": "\\ud800"}\n', b'{"hello": {'):
        with connect(address) as stranger:
            stranger.sendall(greeting)
            assert is_closed(stranger), greeting[:20]
    second = meet(start, address, (1, 2), "stay")
    assert second.stdout.read(4) == b"met\n"


@pytest.mark.parametrize(
    "changes",
    [
        {"process": 1.0},
        {"process": True},
        {"process": float("nan")},
        {"process": "1"},
        {"processes": None},
        {"host": "two\nlines"},
        {"host": 5},
        {"protocol": []},
    ],
    ids=str,
)
def test_a_greeting_of_other_types_is_refused(changes: dict[str, Any]) -> None:
    hello = multihost.Hello(multihost.PROTOCOL, 1, 2, "here")
    assert multihost.Hello.of(hello._asdict()) == hello
    assert multihost.Hello.of(hello._asdict() | changes) is None


def test_a_process_of_another_version_is_refused(start: Start, address: str) -> None:
    first = meet(start, address, (0, 2), "stay")
    hello = multihost.Hello(multihost.PROTOCOL + 1, 1, 2, "there")._asdict()
    with connect(address) as other:
        other.sendall(links.pack(hello=hello | {"more": 1}))
        told = json.loads(other.makefile().readline())["end"]
    assert told == (
        f"a process on host there was started with another version of this program (protocol "
        f"{multihost.PROTOCOL + 1}, process 0 has {multihost.PROTOCOL}); install the same on all "
        "hosts"
    )
    assert finish(first, SLACK).err == f"error: {told}\n"


@pytest.mark.parametrize(
    ("said", "got"),
    [
        (b"SSH-2.0-x\r\n", r"not a message of this program: b'SSH-2.0-x\r'"),
        (b"", "no answer for 1 s"),
    ],
)
def test_another_service_at_the_address_is_named(
    start: Start, address: str, said: bytes, got: str
) -> None:
    host, port = address.split(":")
    with socket.create_server((host, int(port))) as server:
        process = meet(start, address, (1, 2), "stay", timeout=1)
        connection, _ = server.accept()
        with connection:
            connection.sendall(said)
            result = finish(process)
    assert result.status == 1
    assert result.err == (
        f"error: {address}: expected process 0 of this program, got {got}; correct --coordinator\n"
    )


def test_a_service_that_never_ends_a_line_is_not_waited_for(start: Start, address: str) -> None:
    host, port = address.split(":")
    with socket.create_server((host, int(port))) as server:
        process = meet(start, address, (1, 2), "stay", timeout=1)
        connection, _ = server.accept()
        deadline = time.monotonic() + 20
        with connection, contextlib.suppress(OSError):  # it leaves
            while time.monotonic() < deadline:
                connection.sendall(b" ")
                time.sleep(0.3)
    result = finish(process, SLACK)
    assert result.status == 1 and "got no answer for 1 s; correct --coordinator\n" in result.err


@pytest.mark.parametrize(("what", "status"), [("stay", None), ("close", 0)])
def test_a_loss_of_what_is_done_cuts_nothing_short(
    start: Start, address: str, what: str, status: int | None
) -> None:
    """Who has done its own part as well does not wait for it; who has not goes on."""
    first = meet(start, address, (0, 2), what, timeout=1)
    meet(start, address, (1, 2), "say", links.pack(done=True).hex(), 1, timeout=1)
    assert first.stdout.read(4) == b"met\n"
    time.sleep(2.5)
    assert first.poll() == status


def test_a_shutdown_of_jax_that_hangs_is_not_waited_for(start: Start, address: str) -> None:
    """As where the network has forgotten its connection: all is done."""
    pair = [meet(start, address, (index, 2), "close", timeout=1) for index in (0, 1)]
    assert [finish(process, SLACK).status for process in pair] == [0, 0]


def test_a_dropped_process_comes_again(start: Start, address: str) -> None:
    """Process 0 may drop a connection before it has read what it is."""
    host, port = address.split(":")
    with socket.create_server((host, int(port))) as server:
        second = meet(start, address, (1, 2), "stay")
        server.accept()[0].close()
    first = meet(start, address, (0, 2), "stay")
    for process in (first, second):
        assert process.stdout.read(4) == b"met\n"


@pytest.fixture
def said() -> list[str]:
    """What `alone` has said."""
    return []


@pytest.fixture
def alone(said: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[multihost.Peers]:
    """Process 0 of two, without the other; the end of the process is SystemExit."""

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    before = signal.signal(multihost.WAKE, signal.default_int_handler)
    yield multihost.Peers(multihost.Process("127.0.0.1:1", 2, 0), 1, 1, said.append)
    signal.signal(multihost.WAKE, before)


def test_what_is_too_long_to_share_is_refused(
    alone: multihost.Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = multihost.FROM_FIRST._replace(limit=100)
    monkeypatch.setattr(multihost, "FROM_FIRST", limit)
    assert alone.share({"prompts": ["x"]}) == {"prompts": ["x"]}
    with pytest.raises(ValueError, match="expected at most 100 bytes as JSON, got 114; divide"):
        alone.share("x" * 100)


@pytest.mark.parametrize("name", ["end", "await_loss"])
def test_a_loss_interrupts_no_end(
    name: str, alone: multihost.Peers, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after Ctrl-C, which on a terminal all processes get."""

    def lose(*_: object) -> None:
        alone.loss = "process 1 was lost"
        signal.raise_signal(multihost.WAKE)

    alone._losing = True
    monkeypatch.setattr(alone._changed, "wait_for", lose)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        getattr(alone, name)(*["it was interrupted"][: name == "end"])
    assert ended.type is SystemExit and said == ["error: process 1 was lost"]


def test_a_loss_leaves_time_for_what_is_being_printed(
    alone: multihost.Peers, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    vars(alone).update(_complete=True)
    with pytest.raises(KeyboardInterrupt), uninterrupted(multihost.WAKE):
        with pytest.raises(SystemExit):
            alone._record_loss("process 1 was lost")
        assert waited == [multihost.LAST_WORDS] and said == ["error: process 1 was lost"]


@pytest.mark.parametrize("process", [0, 1])
def test_process_0_alone_ends_by_a_failed_answer(
    process: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait until it has printed what did not fail."""
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


def test_a_loss_just_after_an_interrupt_silences_nothing(
    alone: multihost.Peers, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    told: list[str] = []
    monkeypatch.setattr(alone, "end", told.append)
    monkeypatch.setattr(run, "find_peers", lambda *_: alone)
    monkeypatch.setattr(run, "serve_distributed", interrupted)
    monkeypatch.setattr(run, "end_at_next_interrupt", lambda: signal.raise_signal(multihost.WAKE))
    monkeypatch.setattr(sys, "argv", ["run.py", "--distributed"])
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        run.main()
    assert ended.type is SystemExit and told == ["it was interrupted"]
    assert capfd.readouterr().err == "interrupted\n"


def test_jax_shuts_down_when_all_are_done(
    alone: multihost.Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its barrier aborts all processes where one is late, as who prints to a slow reader is."""
    over = threading.Event()
    jax = types.SimpleNamespace(distributed=types.SimpleNamespace(shutdown=over.set))
    monkeypatch.setitem(sys.modules, "jax", jax)
    link: Any = types.SimpleNamespace(done=False, send=lambda _: None)
    alone._links[1] = link
    thread = threading.Thread(target=alone.close, daemon=True)
    thread.start()
    assert not over.wait(0.3)
    alone._take(link, "done", True)
    thread.join(20)
    assert over.is_set() and not thread.is_alive()


@pytest.mark.parametrize("ended", ["far", "near", "never made", "far, at the end"])
def test_a_lost_connection_of_jax_is_a_loss(
    ended: str, alone: multihost.Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else jax waits for minutes, or for ever; it may itself end one, and make another."""
    (jax, near), (far, first) = socket.socketpair(), socket.socketpair()

    def ask(*_: object) -> tuple[links.Link, str, bool]:
        if ended == "never made":
            raise ValueError("no answer for 1 s")
        return links.Link(far, 1), "jax", True

    monkeypatch.setattr(alone, "_ask", ask)
    alone._links[0] = types.SimpleNamespace(name="process 0", send=lambda _: None)  # type: ignore
    alone._closing = ended == "far, at the end"
    carrying = threading.Thread(target=alone._forward, args=(near,), daemon=True)
    with jax, near, far, first:
        carrying.start()
        jax.sendall(multihost.HTTP2 + b"question")
        if ended != "never made":
            received = first.recv(64)
            while len(received) < len(multihost.HTTP2) + 8:
                received += first.recv(64)
            assert received == multihost.HTTP2 + b"question"
            (jax if ended == "near" else first).close()
        carrying.join(10)
    how = {"far": "was closed", "never made": "could not be made .no answer for 1 s."}.get(ended)
    sentence = rf"a second connection of process 0 of 2 .* to process 0 {how}; start all again"
    assert re.fullmatch(sentence, alone.loss or "") if how else alone.loss is None
    assert not carrying.is_alive()


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.0\r\n\r\n", multihost.HTTP2[:9]])
def test_a_stranger_at_a_relay_is_dropped(sent: bytes, alone: multihost.Peers) -> None:
    other, near = socket.socketpair()
    with other, near:
        other.sendall(sent)
        alone._forward(near)  # after the time-out
        assert other.recv(1) == b"" and alone.loss is None and not alone._carried


def test_a_failed_collective_is_one_sentence(
    alone: multihost.Peers, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    error = RuntimeError("Gloo context failed: DEADLINE_EXCEEDED\nmore")
    with pytest.raises(SystemExit):
        run.fail(error, alone, sys.stderr)
    assert re.fullmatch(
        r"error: the connection between the devices failed \(RuntimeError: Gloo "
        r"context failed: DEADLINE_EXCEEDED\); check the network [^\n]*\n",
        capsys.readouterr().err,
    )
    alone.loss = "process 1 was lost"  # the cause, which is said in its place
    with pytest.raises(SystemExit):
        run.fail(error, alone, sys.stderr)
    assert said == ["error: process 1 was lost"]


def test_who_is_done_may_be_interrupted(alone: multihost.Peers) -> None:
    """As it may be killed: process 0 prints what there is."""
    link: Any = types.SimpleNamespace(done=False)
    alone._take(link, "done", True)
    alone._take(link, "end", "process 1 ended: it was interrupted")
    assert alone.loss is None
    link.done = False
    alone._take(link, "end", "process 1 ended: it was interrupted")
    assert alone.loss == "process 1 ended: it was interrupted"


@pytest.mark.parametrize("process", [0, 1])
def test_processes_connect_when_all_have_loaded(
    process: int, alone: multihost.Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gloo takes 30 seconds and no more from the first to the last."""
    sent: list[bytes] = []
    link: Any = types.SimpleNamespace(ready=False, send=sent.append)
    alone.process, alone._links[1 - process] = alone.process._replace(process_id=process), link
    over = threading.Event()
    monkeypatch.setattr(sharding, "connect", lambda mesh: mesh.set())
    server = types.SimpleNamespace(mesh=over)
    thread = threading.Thread(target=run.connect_processes, args=(server, alone), daemon=True)
    thread.start()
    assert not over.wait(0.3) and len(sent) == process
    alone._take(link, "ready", True)
    thread.join(20)
    assert over.is_set() and sent == [links.pack(ready=True)]


def test_jax_ends_no_process_that_prints(
    alone: multihost.Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another may be lost that had done its part: jax would abort this one, which has not."""
    limits: dict[str, float] = {}
    distributed = types.SimpleNamespace(initialize=lambda *_, **given: limits.update(given))
    config = types.SimpleNamespace(update=lambda *_: None)
    jax = types.SimpleNamespace(distributed=distributed, config=config)
    monkeypatch.setitem(sys.modules, "jax", jax)
    alone._start_jax()
    assert limits["heartbeat_timeout_seconds"] > 30 * 24 * 3600


def test_an_interrupt_ends_who_leaves(alone: multihost.Peers) -> None:
    """Else the others that leave would wait for the one that was to say why."""
    alone.say = lambda _: signal.raise_signal(signal.SIGINT)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        alone.leave()
    assert ended.type is SystemExit


def test_a_loss_that_nobody_reads_ends_the_process(
    alone: multihost.Peers, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multihost, "LAST_WORDS", 0.1)
    over = threading.Event()
    alone.say = lambda sentence: over.wait(20) or said.append(sentence)
    with pytest.raises(SystemExit):
        alone.leave()
    assert not said
    over.set()


@pytest.mark.usefixtures("alone")
def test_a_loss_sends_no_control_characters() -> None:
    """Another process may quote a file that holds some."""
    options = argparse.Namespace(
        coordinator="127.0.0.1:1", num_processes=2, process_id=0, join_timeout=1, peer_timeout=1
    )
    errors = io.StringIO()
    peers = run.find_peers(options, errors)
    peers.loss = "\x1b[31m: no such file"
    with pytest.raises(SystemExit):
        peers.leave()
    assert errors.getvalue() == "error: \\x1b[31m: no such file\n"


def test_a_loss_that_cannot_be_told_ends_the_process(
    alone: multihost.Peers, said: list[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    signal.signal(multihost.WAKE, signal.SIG_IGN)
    vars(alone).update(_send_all=fail, _complete=True)
    with pytest.raises(SystemExit):
        alone._record_loss("process 1 was lost")
    assert said == ["error: process 1 was lost"]


def test_a_loss_is_waited_for_at_the_end(
    alone: multihost.Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would strike while Python ends."""
    jax = types.SimpleNamespace(distributed=types.SimpleNamespace(shutdown=lambda: None))
    monkeypatch.setitem(sys.modules, "jax", jax)
    alone._losing = True
    told = {"loss": "process 1 was lost"}
    monkeypatch.setattr(alone._changed, "wait_for", lambda _: vars(alone).update(told))
    with pytest.raises(ValueError, match="process 1 was lost"):
        alone.close()


def test_an_unexpected_error_waits_for_its_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A collective may fail before the watch has noticed that its peer is gone."""
    told, errors = [], io.StringIO()

    class Peers:
        def await_loss(self) -> None:
            told.append("waited")

        def end(self, reason: str) -> None:
            assert not errors.getvalue()  # which may be a pipe that nobody reads
            told.append(reason)

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as exit_:
        run.fail(RuntimeError("something broke\nmore"), Peers(), errors)
    assert exit_.value.code == 1
    assert told == ["waited", "RuntimeError: something broke"]
    assert errors.getvalue().endswith("error: RuntimeError: something broke\n")
    told.clear()
    errors.truncate(0)
    with pytest.raises(SystemExit):
        run.fail(RuntimeError("RESOURCE_EXHAUSTED: out of memory"), Peers(), errors)
    assert len(told) == 1 and told[0].startswith("too little memory")


# Ends that a person brings about.


@pytest.mark.parametrize(
    ("name", "victim", "status", "said", "told"),
    [
        ("SIGINT", 0, 130, "interrupted\n", "ended: it was interrupted"),
        ("SIGINT", 1, 130, "interrupted\n", "ended: it was interrupted"),
        (
            "SIGTERM",
            1,
            -signal.SIGTERM,
            "",
            "was lost during load: its connection (was closed|broke)",
        ),
    ],
)
def test_a_signal_to_one_process_ends_all(
    name: str,
    victim: int,
    status: int,
    said: str,
    told: str,
    start: Start,
    address: str,
    tmp_path: pathlib.Path,
) -> None:
    """jax's preemption service would catch SIGTERM, and the process would live on."""
    pair = start_stalled(start, address, tmp_path, victim, "load")
    pair[victim].send_signal(getattr(signal, name))
    ended, other = (finish(pair[i], SLACK) for i in (victim, 1 - victim))
    assert (ended.status, without_progress(ended.err)) == (status, said)
    assert other.status == 1
    sentence = rf"error: process {victim} of 2 \(host {HOST}\) {told}[^\n]*\n"
    assert re.fullmatch(sentence, without_progress(other.err)), other.err


@pytest.mark.slow
def test_when_the_reader_of_the_answers_goes_all_end(start: Start, address: str) -> None:
    first, second = start_pair(start, address, *ASK)
    assert first.stdout is not None
    assert first.stdout.read(2)
    first.stdout.close()
    first.stdout = None
    assert first.wait(60) == 141
    result = finish(second, SLACK)
    assert result.status == 1
    assert "process 0 of 2" in result.err and "its answers closed the pipe" in result.err


# Standard output, which gloo prints to from C++.


@pytest.mark.parametrize("where", ["/dev/stdout", "/proc/self/fd/1", None])
def test_standard_output_holds_the_answers_alone(
    where: str | None, start: Start, address: str
) -> None:
    output = ["--json"] if where is None else ["--output", where]
    result = finish(start(WORKER, "print", *place(address, 0, 1), *ASK, *output))
    assert (result.status, result.err) == (0, "loaded\n")
    assert [answer["token_ids"] for answer in result.answers] == [[5]]


def test_a_closed_output_is_told_before_loading(start: Start, address: str) -> None:
    closed = ("sh", "-c", 'exec "$0" "$@" >&-')
    result = finish(start(WORKER, "print", *place(address, 0, 1), *ASK, before=closed))
    sentence = "standard output is closed; send it to a file or a program that takes it"
    assert (result.status, result.err) == (1, f"error: {sentence}\n")


# The command line.


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--coordinator", "a:1"], "--coordinator needs --distributed"),
        (["--num-processes", 2], "--num-processes needs --distributed"),
        (["--process-id", 0], "--process-id needs --distributed"),
        (
            ["--distributed", "--coordinator", "a:1"],
            "--coordinator needs --num-processes and --process-id; give all of them or none",
        ),
        (["--distributed", "--process-id", 0], "--process-id needs --coordinator and"),
        (
            ["--distributed", *("--coordinator", "a:1", "--num-processes", 2, "--process-id", 2)],
            "--process-id: expected an integer from 0 to 1, as there are 2 processes, got 2",
        ),
        (["--distributed", "--coordinator", "here"], "expected HOST:PORT such as 10.0.0.1:1234"),
        (["--distributed", "--coordinator", "here:70000"], "expected HOST:PORT"),
        (["--distributed", "--coordinator", ":1"], "expected HOST:PORT"),
        (["--distributed", "--coordinator", "a..b:1"], "expected HOST:PORT"),
        (["--distributed", "--coordinator", "here:" + "1" * 5000], "expected HOST:PORT"),
        (["--distributed", "--coordinator", "\xe9" * 63 + ":1"], "expected HOST:PORT"),
        (["--distributed", "--coordinator", "[::1]]:1"], "expected HOST:PORT"),
        (["--distributed", "--coordinator", "[a:1"], "expected HOST:PORT"),
        (["--distributed", "--num-processes", 0], "expected an integer from 1 to 1048576, got '0'"),
        (["--peer-timeout", 1], "expected a number from 2 to 1000000 (seconds), got '1'"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(
    arguments: list[object], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run.parse_arguments([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (exit_.value.code, out) == (2, "")
    assert sentence in err and err.count("\n") == 1 and err.startswith("error: ")


def test_without_a_place_or_a_job_the_run_ends(start: Start) -> None:
    result = finish(start(run.__file__, "--distributed", *ASK))
    assert result.status == 1
    assert result.err == (
        "error: expected a job of SLURM, GKE or MPI, found none; give "
        "--coordinator HOST:PORT --num-processes N --process-id I\n"
    )


SLURM = {
    "SLURM_JOB_ID": "61441",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
}


@pytest.mark.slow
def test_a_job_of_slurm_places_its_processes(start: Start) -> None:
    """As jax finds it; an Open MPI job likewise. The port is a function of the job's number."""
    running = [
        start(
            run.__file__,
            *("--distributed", *ASK, "--max-len", 2, "--join-timeout", 20),
            **SLURM,
            SLURM_PROCID=str(i),
            SLURM_LOCALID="0",
        )
        for i in (0, 1)
    ]
    first, second = (finish(process) for process in running)
    assert (first.status, second) == (0, (0, "", "")), first.err
    assert "2 tokens" in first.err


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("a:1", ("a", 1)),
        ("a.b.:1", ("a.b.", 1)),
        ("10.0.0.1:65535", ("10.0.0.1", 65535)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_addresses_are_split(address: str, expected: tuple[str, int]) -> None:
    assert multihost.host_and_port(address) == expected

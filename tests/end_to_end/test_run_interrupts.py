"""Ctrl-C, and a reader that closes the pipe, at any moment of run.py and checkpoint.py."""

import array
import fcntl
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import termios
import threading
import time
import tomllib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import run
from commands import LOADED, PROMPT, Command, Result, changed, finish, start
from grok1.cli import console
from paths import DATA, ROOT
from runner import Completion, Event


def interrupt(process: subprocess.Popen[bytes], seen: bytes = b"") -> Result:
    """Send Ctrl-C; the process must end within two seconds."""
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    pressed = time.perf_counter()
    result = finish(process, seen)
    assert time.perf_counter() - pressed < 2
    assert result.status == 130
    return result


def run_program(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a Python process of its own."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


class Server:
    """Yields an answer to each request whose line is longer than a pipe of one page."""

    config = SimpleNamespace(model=SimpleNamespace(num_experts=8))

    def generate_events(self, requests: list[Any], *_: Any) -> Iterator[Event]:
        for index, request in enumerate(requests):
            text = "a" * 9999
            answer = Completion(None, request.prompt, [5], [-1.0], text, "eos")
            yield Event(index, 5, text, answer, 0, "eos")


@pytest.mark.skipif(sys.platform != "linux", reason="sets the size of a pipe")
def test_ctrl_c_cuts_no_answer_while_the_pipe_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    size = fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    waiting, lines = array.array("i", [0]), []

    def press_and_read() -> None:
        while waiting[0] < size:  # until the main thread waits in the middle of a line
            time.sleep(0.01)
            fcntl.ioctl(reader, termios.FIONREAD, waiting)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.1)
        with open(reader) as file:
            lines.extend(file)

    options = run.parse_arguments(["--json", *(f"--prompt-ids={i}" for i in range(9))])
    thread = threading.Thread(target=press_and_read)
    thread.start()
    with open(writer, "w") as stream, pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(sys, "stdout", stream)
        run.generate(run.Worker(), Server(), run.Job(options, pathlib.Path(), None, None, range(9)))
    thread.join()
    assert [json.loads(line)["index"] for line in lines] == [*range(len(lines))]
    assert 0 < len(lines) < 9


def test_closed_pipe_ends_the_command_without_message(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(status: int) -> None:
        raise SystemExit(status)

    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(run, "make_server", lambda *_: Server())
    monkeypatch.setattr(os, "_exit", leave)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        result = command("--checkpoint", DATA / "golden/three-layers", "--prompt-ids", 5)
    assert result == Result(141, "", "")


def test_ctrl_c_leaves_the_text_so_far(tiny: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Text is streamed: the first part is read long before the end of the answer."""
    model = changed(tiny, tmp_path / "model", sequence_len=16384)
    process = start("--checkpoint", model, "--prompt", PROMPT, "--max-len", 16000, "--top-k", 50)
    assert process.stdout is not None
    seen = b""
    while len(seen) < len(PROMPT) + 30:
        piece = os.read(process.stdout.fileno(), 4096)
        assert piece
        seen += piece
    result = interrupt(process, seen)
    assert result.out.startswith(PROMPT) and result.out.endswith("\n")
    assert re.fullmatch(LOADED + "interrupted\n", result.err), result.err


@pytest.mark.skipif(sys.platform != "linux", reason="sees by /proc what a process has imported")
def test_ctrl_c_ends_an_import_of_jax_at_once(tiny: pathlib.Path) -> None:
    process = start("--checkpoint", tiny, "--prompt", PROMPT)
    maps = pathlib.Path(f"/proc/{process.pid}/maps")
    while "jaxlib" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    assert interrupt(process) == Result(130, "", "interrupted\n")


def test_ctrl_c_ends_a_compilation_at_once(tiny: pathlib.Path) -> None:
    """It is handled in the main thread, and compilation runs in another one."""
    process = start("--checkpoint", tiny, "--prompt", PROMPT, "--no-compile-cache")
    assert process.stderr is not None
    loaded = process.stderr.readline().decode()
    time.sleep(0.5)  # the steps take seconds to compile
    result = interrupt(process)
    assert result.out == f"{PROMPT}\n"
    assert re.fullmatch(LOADED + "interrupted\n", loaded + result.err), result.err


@pytest.mark.parametrize("script", ["run.py", "checkpoint.py"])
@pytest.mark.parametrize(("handler", "status"), [("default_int_handler", 130), ("SIG_IGN", 0)])
def test_ctrl_c_at_exit_shows_no_traceback(handler: str, status: int, script: str) -> None:
    """If it is ignored, as in the background of a shell script, it stays ignored."""
    done = run_program(f"""
import atexit, runpy, signal, sys
signal.signal(signal.SIGINT, signal.{handler})
atexit.register(signal.raise_signal, signal.SIGINT)
sys.argv[1:] = ["--help"]
runpy.run_path({script!r}, run_name="__main__")
""")
    assert (done.returncode, done.stderr) == (status, "") and "options:" in done.stdout


@pytest.mark.parametrize("moment", ["in-main", "after-main"])
def test_ctrl_c_around_main_shows_no_traceback(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    def leave(status: int) -> None:
        raise SystemExit(status)

    main, end = (interrupted, int) if moment == "in-main" else (int, interrupted)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(console, "end_at_next_interrupt", end)
    with pytest.raises(SystemExit) as ended:
        console.run_command(main)
    assert ended.value.code == 130


SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize(
    "begin",
    [
        f"runpy.run_path({run.__file__!r}, run_name='__main__')",
        f"__import__({SCRIPTS['grok-1'].partition(':')[0]!r})",
    ],
    ids=["script", "installed"],
)
@pytest.mark.parametrize(("handler", "status"), [("default_int_handler", 130), ("SIG_IGN", 1)])
def test_ctrl_c_in_an_import_shows_no_traceback(
    handler: str, status: int, begin: str, tmp_path: pathlib.Path
) -> None:
    """If it is ignored, the import continues, and fails with the error of this module."""
    (tmp_path / "socket.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise OSError"
    )
    done = run_program(f"""
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.{handler})
sys.path[:0] = [sys.path[0], {str(tmp_path)!r}]  # the first one is that of the script
{begin}
""")
    assert (done.returncode, "KeyboardInterrupt" in done.stderr) == (status, False)

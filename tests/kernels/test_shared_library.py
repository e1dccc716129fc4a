"""The library of CPU kernels: compilation, caching, and failures of compilers."""

import functools
import hashlib
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time

import pytest

import compiling
from grok1.cache_directory import cache_directory
from grok1.kernels import cpu, dispatch, shared_library
from grok1.kernels.error import KernelError
from paths import ROOT

NAMES = cpu.HANDLERS.values()
ANSWERS = 'for argument; do [ "$argument" = --version ] && exit; done\n'
TO_OUTPUT = ANSWERS + 'while [ "$1" != -o ]; do shift; done\n'
REAL = shutil.which("c++") or "g++"


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache directory, and no memory of what was loaded.

    The kernels stay registered with jax, which takes no second library with the same names.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "load", functools.cache(cpu.load.__wrapped__))
    monkeypatch.setattr(dispatch, "available", functools.cache(dispatch.available.__wrapped__))
    return tmp_path


def script(path, text):
    """Write an executable shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A copy of the compiled library."""
    shared_library.load(NAMES)
    kept = shared_library._kept_file(shared_library._compiler())
    path = tmp_path_factory.mktemp("library") / "whole.so"
    path.write_bytes(kept.read_bytes()[: -shared_library.DIGEST_SIZE])
    return path


@pytest.fixture
def quick(whole, fresh, monkeypatch):
    """The compiler in use, a script that copies the library."""
    text = f'{TO_OUTPUT}echo >>"{fresh}/calls"\ncp "{whole}" "$2"'
    compiler = script(fresh / "quick", text)
    monkeypatch.setenv("CXX", str(compiler))
    return compiler


def kept_libraries():
    """The files in the cache directory of the kernels."""
    return sorted(cache_directory("kernels").iterdir())


def calls(quick):
    """How often the quick compiler has compiled."""
    return len(quick.with_name("calls").read_text())


# ------------------------------------------------------------------------------------ the cache


def test_library_is_compiled_once_and_cached(quick, monkeypatch):
    for _ in range(2):
        shared_library.load(NAMES)
        (kept,) = kept_libraries()
        assert calls(quick) == 1 and stat.S_IMODE(kept.stat().st_mode) == 0o600
    # Other flags make another library.
    monkeypatch.setattr(shared_library, "FLAGS", (*shared_library.FLAGS, "-g"))
    shared_library.load(NAMES)
    assert calls(quick) == 2 and len(kept_libraries()) == 2


@pytest.mark.parametrize("damage", ["truncated", "not a library", "link"])
def test_damaged_library_is_compiled_again(quick, damage):
    """Loading a damaged one may end the process by a signal."""
    shared_library.load(NAMES)
    (kept,) = kept_libraries()
    content = kept.read_bytes()
    if damage == "link":
        kept.rename(quick.with_name("elsewhere"))
        kept.symlink_to(quick.with_name("elsewhere"))
    elif damage == "truncated":
        kept.write_bytes(content[: len(content) // 2])
    else:
        kept.write_bytes(b"other" + hashlib.sha256(b"other").digest())
    shared_library.load(NAMES)
    assert kept.read_bytes() == content and not kept.is_symlink()
    assert calls(quick) == 2


def test_library_that_others_could_write_is_not_loaded(quick, caplog):
    shared_library.load(NAMES)
    (kept,) = kept_libraries()
    other = quick.with_name("other.so")
    functions = "".join(f"void {name}() {{}}\n" for name in (*NAMES, "planted"))
    command = [REAL, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(other)]
    subprocess.run(command, input=f'extern "C" {{\n{functions}}}', text=True, check=True)
    content = other.read_bytes()
    kept.write_bytes(content + hashlib.sha256(content).digest())
    assert hasattr(shared_library.load(NAMES), "planted")
    kept.parent.chmod(0o770)
    assert not hasattr(shared_library.load(NAMES), "planted")
    (note,) = caplog.messages
    assert f"at every start ({kept.parent} has mode 0770" in note
    assert kept.read_bytes().startswith(content) and calls(quick) == 2


def test_every_start_compiles_library_without_a_cache(quick, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(quick))
    monkeypatch.setenv("CXX", f"{quick} -DNOTHING -D\udcff")  # options may hold any bytes
    for count in (1, 2):
        shared_library.load(NAMES)
        assert calls(quick) == len(caplog.messages) == count
    note = "note: the CPU kernels are compiled at every start"
    assert caplog.messages[0] == f"{note} ({quick} is not a directory)"


@pytest.mark.parametrize("missing", [True, False], ids=["missing", "unsafe"])
def test_cache_is_used_without_a_temporary_directory(quick, monkeypatch, missing):
    shared = quick.with_name("shared")
    shared.mkdir()
    shared.chmod(0o777)  # others could replace what is compiled there

    def directory():
        if missing:
            raise FileNotFoundError("No usable temporary directory found")
        return str(shared)

    monkeypatch.setattr(tempfile, "gettempdir", directory)
    shared_library.load(NAMES)
    assert calls(quick) == 1 and len(kept_libraries()) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(quick))
    with pytest.raises(KernelError, match="there is no temporary directory to compile in: "):
        shared_library.load(NAMES)


# --------------------------------------------------------------------------- compilers that fail


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        (None, "no C++ compiler was found: CXX={path}"),
        ("exit 3", "CXX={path} failed: it ended with status 3"),
        (f'{ANSWERS}echo "cpu.cc:1: error: no." >&2; exit 1', "CXX={path} failed: cpu.cc:1: erro"),
        (f"{ANSWERS}echo warning >&2; echo 1>&2 no; exit 1", "CXX={path} failed: no"),
        (f"{ANSWERS}kill -9 $$", "CXX={path} failed: it was ended by the signal SIGKILL"),
        ("exit", "CXX={path} made no library"),
        (f'{TO_OUTPUT}mkfifo "$2"', "CXX={path} made no library"),
        (f'{TO_OUTPUT}truncate -s 300M "$2"', "CXX={path} made no library"),
        (f'{TO_OUTPUT}echo nonsense >"$2"', "CXX={path} made a library that cannot be loaded: "),
        (f'{TO_OUTPUT}head -c 50000 "{{whole}}" >"$2"', "it was ended by the signal SIGBUS"),
        (f'{TO_OUTPUT}{REAL} -shared -x c /dev/null -o "$2"', "undefined symbol: GroupedProduct"),
    ],
    ids=range(11),
)
def test_one_note_says_why_there_are_no_kernels(
    compiler, said, whole, fresh, monkeypatch, caplog
):  # fmt: skip
    path = fresh / "compiler"
    if compiler is not None:
        script(path, compiler.format(whole=whole))
    monkeypatch.setenv("CXX", str(path))
    assert not dispatch.available() and not dispatch.available()
    (line,) = caplog.messages
    assert line.startswith("note: running without the CPU kernels")
    assert said.format(path=path) in line and "\n" not in line
    assert not list(fresh.rglob("*.so"))


def test_failed_compilation_is_not_cached(quick):
    working = quick.read_text()
    script(quick, f'{TO_OUTPUT}echo nonsense >"$2"')
    with pytest.raises(KernelError, match="cannot be loaded"):
        shared_library.load(NAMES)
    quick.write_text(working)
    shared_library.load(NAMES)
    assert calls(quick) == 1


def test_invalid_compiler_command_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(KernelError, match=r"^CXX=g.*: expected a command, got one with No closing"):
        shared_library.load(NAMES)


def test_command_works_without_a_compiler():
    done = subprocess.run(
        [sys.executable, "run.py", "--prompt-ids", "5 6", "--max-len", "1"],
        cwd=ROOT, env=os.environ | {"CXX": "no-such-compiler", "XLA_FLAGS": compiling.FLAGS},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    note = "note: running without the CPU kernels, which is slower: no C++ compiler was found"
    assert done.stdout.strip() and done.stderr.count(note) == 1


# ---------------------------------------------------------------------------- compilers that hang

# The script and its child process ignore the signals of a terminal.
HANGS = (
    'trap "" INT TERM HUP\nsleep 1000 &\necho $$ $! >"{pids}.new"\nmv "{pids}.new" "{pids}"\nwait'
)


def alive(pid):
    """Return whether a process is running."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids):
    """Fail unless the processes end within five seconds."""
    running = [int(pid) for pid in pids.read_text().split()]
    end = time.monotonic() + 5
    while any(map(alive, running)) and time.monotonic() < end:
        time.sleep(0.02)
    left = [pid for pid in running if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.mark.parametrize("limit", ["ANSWER_LIMIT", "COMPILE_LIMIT"])
def test_compiler_that_hangs_is_killed(limit, fresh, monkeypatch):
    answer = ANSWERS if limit == "COMPILE_LIMIT" else ""
    compiler = script(fresh / "hangs", answer + HANGS.format(pids=fresh / "pids"))
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(shared_library, limit, 0.5)
    with pytest.raises(KernelError, match=f"CXX={compiler} failed: it has not ended within 0.5 s"):
        shared_library.load(NAMES)
    wait_until_gone(fresh / "pids")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ('extern "C" int pause();\nint result = pause();\n', "it has not ended within 1 s"),
        ("#include <cstdlib>\nint result = (_Exit(0), 0);\n", "it ends the process that loads"),
    ],
    ids=["hangs", "ends"],
)
def test_library_that_hangs_or_exits_is_not_loaded(program, said, fresh, monkeypatch):
    (fresh / "bad.cc").write_text(program)
    text = f'{TO_OUTPUT}{REAL} -shared -fPIC "{fresh}/bad.cc" -o "$2"'
    monkeypatch.setenv("CXX", str(script(fresh / "compiler", text)))
    monkeypatch.setattr(shared_library, "ANSWER_LIMIT", 1)
    monkeypatch.setattr(shared_library, "open_library", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(KernelError, match=f"cannot be loaded: {said}"):
        shared_library.load(NAMES)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_compiler_is_killed_when_the_command_ends(number, fresh):
    pids = fresh / "pids"
    compiler = script(fresh / "hangs", ANSWERS + HANGS.format(pids=pids))
    process = subprocess.Popen(
        [sys.executable, "run.py", "--prompt-ids", "5 6", "--max-len", "2"],
        cwd=ROOT, env=os.environ | {"CXX": str(compiler)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not pids.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    wait_until_gone(pids)
    if number == signal.SIGINT:
        assert (process.returncode, out) == (130, "") and err.endswith("\ninterrupted\n")

"""The library of the CPU's kernels: when it is compiled, when it is kept, and what is run."""

import functools
import hashlib
import os
import pathlib
import signal
import stat
import subprocess
import sys
import tempfile
import time

import pytest

from grok1.cache_directory import cache_directory
from grok1.kernels import cpu, dispatch, shared_library
from grok1.kernels.error import KernelError
from paths import ROOT

NAMES = cpu.HANDLERS.values()
ANSWERS = 'for argument; do [ "$argument" = --version ] && exit; done\n'
TO_OUTPUT = ANSWERS + 'while [ "$1" != -o ]; do shift; done\n'


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """An empty cache, and nothing loaded in this process; what is loaded stays registered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # What this process has loaded stays so: jax takes no second library of the same names.
    monkeypatch.setattr(cpu, "load", functools.cache(cpu.load.__wrapped__))
    monkeypatch.setattr(dispatch, "available", functools.cache(dispatch.available.__wrapped__))
    return tmp_path


def script(path: pathlib.Path, text: str) -> pathlib.Path:
    """Write an executable shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The library which is there already."""
    shared_library.load(NAMES)
    kept = shared_library._kept_file(shared_library._compiler())
    path = tmp_path_factory.mktemp("library") / "whole.so"
    path.write_bytes(kept.read_bytes()[: -shared_library.DIGEST_SIZE])
    return path


@pytest.fixture
def quick(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A compiler that copies the library; it takes the same arguments."""
    text = f'{TO_OUTPUT}echo >>"{tmp_path}/calls"\ncp "{whole}" "$2"'
    return script(tmp_path / "quick", text)


def kept_libraries() -> list[pathlib.Path]:
    """What is in the kernels' directory."""
    return sorted(cache_directory("kernels").iterdir())


def calls(fresh: pathlib.Path) -> int:
    """How often the quick compiler has compiled."""
    return len((fresh / "calls").read_text())


def test_it_is_compiled_once_and_kept(
    quick: pathlib.Path, fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(quick))
    for _ in range(2):
        shared_library.load(NAMES)
        (kept,) = kept_libraries()
        assert calls(fresh) == 1 and stat.S_IMODE(kept.stat().st_mode) == 0o600
    # Other flags are another library.
    monkeypatch.setattr(shared_library, "FLAGS", (*shared_library.FLAGS, "-g"))
    shared_library.load(NAMES)
    assert calls(fresh) == 2 and len(kept_libraries()) == 2


@pytest.mark.parametrize("damage", ["cut", "other", "empty", "no library", "link"])
def test_a_damaged_library_is_compiled_anew(
    quick: pathlib.Path, fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """To load one may end the process, by a signal."""
    monkeypatch.setenv("CXX", str(quick))
    shared_library.load(NAMES)
    (kept,) = kept_libraries()
    content = kept.read_bytes()
    if damage == "link":
        kept.rename(fresh / "elsewhere")
        kept.symlink_to(fresh / "elsewhere")
    else:
        other = b"other" * 999
        signed = other + hashlib.sha256(other).digest()
        damaged = {"cut": content[: len(content) // 2], "other": other, "empty": b""}
        kept.write_bytes(damaged.get(damage, signed))
    for _ in range(2):
        shared_library.load(NAMES)
        assert kept.read_bytes() == content and not kept.is_symlink()
        assert calls(fresh) == 2


# -------------------------------------------------------------------------- where nothing is kept


def test_an_unusable_cache_is_no_reason_to_do_without(
    quick: pathlib.Path, fresh: pathlib.Path
) -> None:
    (fresh / "file").write_text("")
    # A command with options is a compiler, too.
    where = {"XDG_CACHE_HOME": str(fresh / "file"), "CXX": f"{quick} -DNOTHING"}
    program = "from grok1.kernels import dispatch; assert dispatch.available()"
    for count in (1, 2):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT, env=os.environ | where, capture_output=True, text=True, check=True,
        )  # fmt: skip
        note = "note: the CPU kernels are compiled at every start"
        assert done.stderr == f"{note} ({fresh}/file is not a directory)\n"
        assert calls(fresh) == count


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Another library, as it would be kept."""
    path = tmp_path_factory.mktemp("planted") / "planted.so"
    functions = "\n".join(f"void {name}() {{}}" for name in (*NAMES, "planted"))
    subprocess.run(
        [*shared_library._compiler(), "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)],
        input=f'extern "C" {{\n{functions}\n}}', text=True, check=True,
    )  # fmt: skip
    content = path.read_bytes()
    return content + hashlib.sha256(content).digest()


@pytest.mark.parametrize("level", [None, *range(4)])
def test_what_others_can_write_is_not_loaded(
    quick: pathlib.Path, fresh: pathlib.Path, planted: bytes, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, level: int | None,
) -> None:  # fmt: skip
    monkeypatch.setenv("CXX", str(quick))
    shared_library.load(NAMES)
    (kept,) = kept_libraries()
    kept.write_bytes(planted)
    if level is None:
        assert hasattr(shared_library.load(NAMES), "planted")
        return
    path = kept.parents[level]
    path.chmod(0o770)
    assert not hasattr(shared_library.load(NAMES), "planted")
    (note,) = caplog.messages
    assert f"at every start ({path} has mode 0770" in note
    assert kept.read_bytes() == planted and calls(fresh) == 2


@pytest.mark.parametrize("missing", [True, False], ids=["missing", "unsafe"])
def test_without_a_temporary_directory_it_is_compiled(
    quick: pathlib.Path, fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch, missing: bool
) -> None:
    """In a directory beside what is kept."""
    monkeypatch.setenv("CXX", str(quick))
    (fresh / "shared").mkdir()
    (fresh / "shared").chmod(0o777)  # others could replace what is compiled there

    def directory() -> str:
        if missing:
            raise FileNotFoundError("No usable temporary directory found")
        return str(fresh / "shared")

    monkeypatch.setattr(tempfile, "gettempdir", directory)
    for _ in range(2):
        shared_library.load(NAMES)
        assert calls(fresh) == 1 and len(kept_libraries()) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "calls"))
    with pytest.raises(KernelError, match="there is no temporary directory to compile in: "):
        shared_library.load(NAMES)


# ------------------------------------------------------------------------------------ compilers


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
        (f'{TO_OUTPUT}ln -s /dev/zero "$2"', "CXX={path} made no library"),
        (f'{TO_OUTPUT}mkdir "$2"', "CXX={path} made no library"),
        (f'{TO_OUTPUT}truncate -s 300M "$2"', "CXX={path} made no library"),
        # Compile what cannot be loaded.
        (f'{TO_OUTPUT}:>"$2"', "CXX={path} made a library that cannot be loaded: "),
        (f'{TO_OUTPUT}echo nonsense >"$2"', "CXX={path} made a library that cannot be loaded: "),
        (
            f'{TO_OUTPUT}head -c 50000 "{{whole}}" >"$2"',
            "loaded: it was ended by the signal SIGBUS",
        ),
        (f'{TO_OUTPUT}{{real}} -shared -x c /dev/null -o "$2"', "undefined symbol: GroupedProduct"),
    ],
    ids=range(14),
)
def test_without_a_compiler_one_sentence_says_so(
    whole: pathlib.Path, fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, compiler: str | None, said: str,
) -> None:  # fmt: skip
    path = fresh / "compiler"
    real = shared_library._compiler()[0]
    if compiler is not None:
        script(path, compiler.format(whole=whole, real=real))
    monkeypatch.setenv("CXX", str(path))
    assert not dispatch.available() and not dispatch.available()
    lines = caplog.messages
    assert len(lines) == 1 and lines[0].startswith("note: running without the CPU kernels")
    assert said.format(path=path) in lines[0] and "\n" not in lines[0]
    assert not list(fresh.rglob("*.so"))


def test_a_mended_compiler_is_used_at_once(
    quick: pathlib.Path, fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mended = quick.read_text()
    monkeypatch.setenv("CXX", str(script(quick, f'{TO_OUTPUT}echo nonsense >"$2"')))
    with pytest.raises(KernelError, match="cannot be loaded"):
        shared_library.load(NAMES)
    quick.write_text(mended)
    shared_library.load(NAMES)
    assert calls(fresh) == 1


@pytest.mark.parametrize("value", ["g++ '", "g++ \\", '"'])
def test_a_command_that_cannot_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("CXX", value)
    with pytest.raises(KernelError, match=r"^CXX=.*: expected a command, got one with No "):
        shared_library.load(NAMES)


def test_a_command_may_hold_any_bytes(
    quick: pathlib.Path, fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", f"{quick} -D\udcff")
    shared_library.load(NAMES)
    assert calls(fresh) == 1


# ------------------------------------------------------------- compilers that do not come to an end

# It and what it starts ignore what a terminal sends.
HANGS = (
    'trap "" INT TERM HUP\nsleep 1000 &\necho $$ $! >"{pids}.new"\nmv "{pids}.new" "{pids}"\nwait'
)


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: pathlib.Path) -> None:
    """Fail if the processes do not end soon."""
    running = [int(pid) for pid in pids.read_text().split()]
    end = time.monotonic() + 5
    while any(map(alive, running)) and time.monotonic() < end:
        time.sleep(0.02)
    left = [pid for pid in running if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.mark.parametrize("when", ["asked", "compiling"])
def test_a_compiler_that_hangs_is_ended(
    fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    hangs = HANGS.format(pids=fresh / "pids")
    compiler = script(fresh / "hangs", hangs if when == "asked" else ANSWERS + hangs)
    monkeypatch.setenv("CXX", str(compiler))
    limit = {"asked": "ANSWER_LIMIT", "compiling": "COMPILE_LIMIT"}[when]
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
def test_a_library_that_does_not_return_is_not_loaded(
    fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch, program: str, said: str
) -> None:
    real = shared_library._compiler()[0]
    (fresh / "bad.cc").write_text(program)
    compiler = script(
        fresh / "compiler", f'{TO_OUTPUT}{real} -shared -fPIC "{fresh}/bad.cc" -o "$2"'
    )
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(shared_library, "ANSWER_LIMIT", 1)
    monkeypatch.setattr(shared_library, "open_library", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(KernelError, match=f"cannot be loaded: {said}"):
        shared_library.load(NAMES)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_compiler_outlives_the_command(fresh: pathlib.Path, number: int) -> None:
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


@pytest.mark.parametrize("options", [(), ("--no-kernels",)], ids=str)
def test_the_command_goes_on_without_a_compiler(options: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "run.py", "--prompt-ids", "5 6", "--max-len", "2", *options],
        cwd=ROOT, env=os.environ | {"CXX": "no-such-compiler"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0 and len(done.stdout.split()) == 2
    note = "note: running without the CPU kernels, which is slower: no C++ compiler was found"
    assert done.stderr.count(note) == (0 if options else 1)

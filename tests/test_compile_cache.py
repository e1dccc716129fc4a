"""Compiled programs are kept for the next start, and a failure to keep them ends no run."""

import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator

import jax
import pytest

from commands import COUNTED, LOADED, PROMPT, finish, start_program
from grok1 import compile_cache
from grok1.cache_directory import cache_directory
from grok1.compile_cache import CHECKED, remove_cut_entries
from paths import ROOT

# Runs the command, and prints how often jax looked for a program, found it and compiled it.
COUNTING = """
import collections, json, sys
import jax.monitoring
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event.split("/")[-1]]))
import run
status = run.main()
names = "compile_requests_use_cache", "cache_hits", "cache_misses"
print(json.dumps([seen[name] for name in names]), file=sys.stderr)
sys.exit(status)
"""


def entries(home: pathlib.Path) -> dict[pathlib.Path, int]:
    """Return the time at which each entry of a cache was written."""
    return {path: path.stat().st_mtime_ns for path in home.glob("grok-1-jax/*/programs/*-cache")}


def counted(home: pathlib.Path, *arguments: object, **variables: str) -> tuple[list[int], str, str]:
    """Run the command -> [looked for, found, compiled], standard output, standard error."""
    process = start_program(
        "-c", COUNTING, *arguments, XDG_CACHE_HOME=str(home), PYTHONPATH=str(ROOT),
        JAX_ENABLE_COMPILATION_CACHE="true", **variables,
    )  # fmt: skip
    result = finish(process)
    assert result.status == 0, result.err
    *said, counts = result.err.splitlines(keepends=True)
    return json.loads(counts), result.out, "".join(said)


def test_a_second_start_compiles_nothing(tiny: pathlib.Path, tmp_path: pathlib.Path) -> None:
    # Without kernels, which would be compiled for the new cache directory.
    arguments = ("--checkpoint", tiny, "--prompt", PROMPT, "--max-len", 3, "--no-kernels")
    (asked, found, compiled), out, err = counted(tmp_path, *arguments)
    there = entries(tmp_path)
    assert len(there) == compiled > 3 and asked == found + compiled
    assert re.fullmatch(LOADED + COUNTED, err), err
    (again, found, compiled), second_out, err = counted(tmp_path, *arguments)
    assert (again, found, compiled) == (asked, asked, 0)
    assert second_out == out and entries(tmp_path) == there
    assert re.fullmatch(LOADED + COUNTED, err), err


@pytest.mark.exhaustive
def test_no_compile_cache_option_keeps_nothing(tiny: pathlib.Path, tmp_path: pathlib.Path) -> None:
    arguments = ("--checkpoint", tiny, "--prompt", PROMPT, "--max-len", 3)
    assert counted(tmp_path, "--no-compile-cache", *arguments)[0] == [0, 0, 0]
    assert not entries(tmp_path)


@pytest.mark.exhaustive
def test_a_run_without_a_cache_directory_succeeds(
    tiny: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    home = tmp_path / "file"
    home.touch()
    arguments = ("--checkpoint", tiny, "--prompt", PROMPT, "--max-len", 3)
    counts, _, err = counted(home, *arguments)
    assert counts[1:] == [0, 0]
    reason = r"\([^\n]* is not a directory\)\n"
    notes = f"compiled programs cannot be kept {reason}note: the CPU kernels are [^\n]* {reason}"
    assert re.fullmatch(f"{notes}{LOADED}{COUNTED}", err), err


# -------------------------------------------------------------------------------- in this process


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The home directory of caches, with jax's compilation cache enabled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_enable_compilation_cache", True)
    yield tmp_path
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_compilation_cache_dir", before)


def used() -> str | None:
    """Return the directory in which jax keeps programs."""
    return jax.config.values["jax_compilation_cache_dir"]


def truncated(path: pathlib.Path) -> pathlib.Path:
    """Write half an entry."""
    path.write_bytes(zlib.compress(os.urandom(1000))[:500])
    return path


def test_enable_removes_truncated_entries(home: pathlib.Path) -> None:
    directory = cache_directory("programs")
    assert directory.is_relative_to(home)
    entry = truncated(directory / "jit_step-cache")
    assert compile_cache.enable() is None and used() == str(directory)
    assert not entry.exists()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda home, _: (home / "grok-1-jax").touch(), ".*/grok-1-jax is not a directory"),
        (lambda *_: cache_directory("programs").chmod(0o770), ".*/programs has mode 0770"),
        (
            lambda home, patch: patch.setenv("XDG_CACHE_HOME", str(home / "m\udcfcller")),
            ".*/m\udcfcller/.* is not a path in UTF-8",
        ),
    ],
    ids=["file", "writable by others", "not UTF-8"],
)
def test_enable_returns_why_programs_cannot_be_kept(
    home: pathlib.Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[..., None], reason: str
) -> None:
    damage(home, monkeypatch)
    said = compile_cache.enable() or ""
    assert re.match(rf"compiled programs cannot be kept \({reason}", said), said
    assert used() is None


def test_enable_keeps_the_directory_of_the_user(home: pathlib.Path) -> None:
    own = str(home / "own")
    jax.config.update("jax_compilation_cache_dir", own)
    assert compile_cache.enable() is None and used() == own
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    assert compile_cache.enable() is None and used() is None
    assert not list(home.iterdir())


def test_enable_does_nothing_where_xla_prints_errors(
    home: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 1))
    assert compile_cache.enable() is None and not list(home.iterdir())


def test_only_new_truncated_entries_are_removed(tmp_path: pathlib.Path) -> None:
    """An entry may be removed meanwhile, by another start or by jax."""
    whole, cut, old, gone = (tmp_path / f"{name}-cache" for name in ("whole", "cut", "old", "gone"))
    gone.symlink_to("nowhere")
    os.utime(truncated(old), (1, 1))
    (tmp_path / CHECKED).touch()
    whole.write_bytes(zlib.compress(os.urandom(1000)))
    truncated(cut)
    remove_cut_entries(tmp_path)
    assert whole.exists() and old.exists() and not cut.exists()


def test_a_pipe_among_the_entries_is_not_read(tmp_path: pathlib.Path) -> None:
    """To open it would wait for a writer."""
    os.mkfifo(tmp_path / "x-cache")
    with pytest.raises(OSError, match="it is not a regular file"):
        remove_cut_entries(tmp_path)

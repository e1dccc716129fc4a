"""Compiled programs are kept: the second start compiles nothing, and no trouble ends a run."""

import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterator

import jax
import pytest

from commands import COUNTED, LOADED, PROMPT, finish, start_program
from grok1 import compile_cache
from grok1.cache_directory import cache_directory
from paths import ROOT

# The command, and on its standard error how often jax asked for a program and found it.
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
    """When each entry of a cache was written."""
    return {path: path.stat().st_mtime_ns for path in home.glob("grok-1-jax/*/programs/*-cache")}


def counted(home: pathlib.Path, *arguments: object, **variables: str) -> tuple[list[int], str, str]:
    """What a start asks for, finds and compiles, and what it prints."""
    process = start_program(
        "-c", COUNTING, *arguments, XDG_CACHE_HOME=str(home), PYTHONPATH=str(ROOT),
        JAX_ENABLE_COMPILATION_CACHE="true", **variables,
    )  # fmt: skip
    result = finish(process)
    assert result.status == 0, result.err
    *said, counts = result.err.splitlines(keepends=True)
    return json.loads(counts), result.out, "".join(said)


def test_the_second_start_compiles_nothing_and_the_third_what_was_cut(
    tiny: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    arguments = ("--checkpoint", tiny, "--prompt", PROMPT, "--max-len", 3)
    (asked, found, compiled), out, err = counted(tmp_path, *arguments)
    there = entries(tmp_path)
    assert len(there) == compiled > 3 and asked == found + compiled
    assert re.fullmatch(LOADED + COUNTED, err), err
    (again, found, compiled), second_out, err = counted(tmp_path, *arguments)
    assert (again, found, compiled) == (asked, asked, 0)
    assert second_out == out and entries(tmp_path) == there
    assert re.fullmatch(LOADED + COUNTED, err), err
    largest = max(there, key=lambda path: path.stat().st_size)
    os.truncate(largest, 1000)
    (_, found, compiled), third_out, err = counted(tmp_path, *arguments)
    assert (found, compiled) == (asked - 1, 1) and largest.stat().st_size > 1000
    assert third_out == out and re.fullmatch(LOADED + COUNTED, err), err


@pytest.mark.exhaustive
def test_the_cache_can_be_switched_off_and_put_elsewhere(
    tiny: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    arguments = ("--checkpoint", tiny, "--prompt", PROMPT, "--max-len", 3)
    own = tmp_path / "own"
    variables = {
        "JAX_COMPILATION_CACHE_DIR": str(own),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    assert counted(tmp_path, "--no-compile-cache", *arguments, **variables)[0] == [0, 0, 0]
    assert not entries(tmp_path)
    counts = counted(tmp_path, *arguments, **variables)[0]
    assert counts[2] == len(list(own.glob("*-cache"))) > 3 and not entries(tmp_path)


@pytest.mark.exhaustive
def test_a_run_goes_on_without_a_directory_for_the_cache(
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


@pytest.fixture
def enabled(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A cache of jax that is switched on, and where its home is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_enable_compilation_cache", True)
    yield tmp_path
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_directory_that_cannot_be_made_is_no_error(enabled: pathlib.Path) -> None:
    (enabled / "grok-1-jax").touch()
    assert "cannot be kept" in (compile_cache.enable() or "")
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_a_path_that_is_not_text_is_no_error(
    enabled: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(enabled / "m\udcfcller"))
    reason = compile_cache.enable() or ""
    assert re.fullmatch(r"compiled .* kept \(.*m\udcfcller.* is not a path in UTF-8\)", reason)
    assert jax.config.values["jax_compilation_cache_dir"] is None


@pytest.mark.parametrize("level", range(4))
def test_programs_that_others_can_write_are_not_run(enabled: pathlib.Path, level: int) -> None:
    directory = cache_directory("programs")
    assert directory.parents[2] == enabled
    path = [directory, *directory.parents][level]
    path.chmod(0o770)
    said = f"compiled programs cannot be kept ({path} has mode 0770"
    assert (compile_cache.enable() or "").startswith(said)
    assert jax.config.values["jax_compilation_cache_dir"] is None
    path.chmod(0o700)
    assert compile_cache.enable() is None
    assert jax.config.values["jax_compilation_cache_dir"] == str(directory)


def test_no_cache_where_xla_would_print_an_error_for_each_program(
    enabled: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 1))
    assert compile_cache.enable() is None and not list(enabled.iterdir())


def test_a_cut_entry_is_found_the_first_time_it_is_looked_at(tmp_path: pathlib.Path) -> None:
    whole, cut, old = (tmp_path / f"jit_{name}-cache" for name in ("whole", "cut", "old"))
    packed = zlib.compress(os.urandom(1000))
    old.write_bytes(b"")
    os.utime(old, (1, 1))
    (tmp_path / compile_cache.CHECKED).touch()
    whole.write_bytes(packed)
    cut.write_bytes(packed[:500])
    compile_cache.remove_cut_entries(tmp_path)
    assert whole.exists() and old.exists() and not cut.exists()


def test_a_pipe_among_the_entries_stops_no_start(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "x-cache")
    with pytest.raises(OSError, match="it is not a regular file"):
        compile_cache.remove_cut_entries(tmp_path)


def test_an_entry_may_go_while_others_are_looked_at(tmp_path: pathlib.Path) -> None:
    """Another start removes it, or jax does."""
    gone, cut = tmp_path / "jit_gone-cache", tmp_path / "jit_cut-cache"
    gone.symlink_to("nowhere")
    cut.write_bytes(zlib.compress(os.urandom(1000))[:500])
    compile_cache.remove_cut_entries(tmp_path)
    assert not cut.exists()

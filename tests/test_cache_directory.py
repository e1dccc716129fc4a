"""Compiled code is kept only in directories where no other user can replace it."""

import os
import pathlib
import stat

import pytest

from grok1.cache_directory import CacheError, cache_directory, machine, private_directory, read

OTHER = os.geteuid() + 1  # a user


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """An empty home directory of caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir(mode=0o755)
    return tmp_path / "home"


def give_away(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the owner of a path, or what lstat says of it, as only root can change an owner."""
    if os.geteuid() == 0:
        os.chown(path, OTHER, -1, follow_symlinks=False)
        return
    lstat = pathlib.Path.lstat

    def of_another(self: pathlib.Path) -> os.stat_result:
        info = lstat(self)
        fields = [*info]
        fields[stat.ST_UID] = OTHER
        return os.stat_result(fields) if self == path else info

    monkeypatch.setattr(pathlib.Path, "lstat", of_another)


def levels() -> list[pathlib.Path]:
    """Make a cache -> its directories, the innermost first."""
    directory = cache_directory("kernels")
    return [directory, *directory.parents[:3]]


def test_cache_directory_follows_xdg_cache_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        found = cache_directory("programs")
        assert found == tmp_path / ".cache/grok-1-jax" / machine() / "programs"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_directory("kernels").parents[1] == tmp_path / "cache/grok-1-jax"


@pytest.mark.parametrize("umask", [0, 0o777])
def test_new_directories_have_mode_0700_for_any_umask(home: pathlib.Path, umask: int) -> None:
    home.rmdir()
    before = os.umask(umask)
    try:
        found = levels()
    finally:
        os.umask(before)
    assert found[-1] == home
    assert [stat.S_IMODE(level.stat().st_mode) for level in found] == [0o700] * 4


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_directory_that_others_can_write_is_refused(level: int, mode: int) -> None:
    path = levels()[level]
    path.chmod(mode)
    with pytest.raises(CacheError, match=f"{path} has mode {mode:04o}.* run: chmod 07[05]0 {path}"):
        cache_directory("kernels")
    path.chmod(0o700)
    cache_directory("kernels")


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("level", range(4))
def test_a_directory_of_another_user_is_refused(
    monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    path = levels()[level]
    give_away(path, monkeypatch)
    with pytest.raises(CacheError, match=f"{path} belongs to user {OTHER}, expected "):
        cache_directory("kernels")


@pytest.mark.usefixtures("home")
def test_a_directory_that_others_can_list_is_refused() -> None:
    """Its files may be writable by a group, depending on the umask."""
    levels()[0].chmod(0o755)
    with pytest.raises(CacheError, match="run: chmod 0700"):
        cache_directory("kernels")


@pytest.mark.usefixtures("home")
def test_a_file_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = cache_directory("programs") / "below" / "jit_step-cache"
    entry.parent.mkdir()
    entry.touch()
    assert cache_directory("programs") == entry.parents[1]
    give_away(entry, monkeypatch)
    with pytest.raises(CacheError, match=f"{entry} belongs to user"):
        cache_directory("programs")


def test_other_owner_in_a_sticky_directory_is_refused(
    home: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.chmod(0o1777)
    found = levels()
    give_away(found[2], monkeypatch)
    with pytest.raises(CacheError, match="belongs to user"):
        cache_directory("kernels")


def test_symbolic_link_is_followed_unless_of_others(
    home: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = home.parent / "real"
    real.mkdir(mode=0o700)
    (home / "inner").symlink_to("../real")
    (home / "outer").symlink_to(home / "inner")
    assert private_directory(home / "outer" / ".." / "real" / "new") == real / "new"
    assert private_directory(home / "outer" / "new") == real / "new"
    real.chmod(0o777)
    with pytest.raises(CacheError, match=f"{real} has mode 0777"):
        private_directory(home / "outer" / "new")
    real.chmod(0o700)
    give_away(home / "inner", monkeypatch)
    with pytest.raises(CacheError, match="inner belongs to user"):
        private_directory(home / "outer" / "new")


@pytest.mark.parametrize("target", ["nowhere", "grok-1-jax"])
def test_a_dangling_or_circular_link_is_refused(home: pathlib.Path, target: str) -> None:
    (home / "grok-1-jax").symlink_to(target)
    with pytest.raises(CacheError, match="grok-1-jax"):
        cache_directory("kernels")
    assert not (home / "nowhere").exists()


def test_a_file_in_place_of_a_directory_is_refused(home: pathlib.Path) -> None:
    path = levels()[1]
    path.rename(home / "before")
    path.touch(mode=0o600)
    with pytest.raises(CacheError, match=f"{path} is not a directory"):
        cache_directory("kernels")


def test_read_refuses_links_and_waits_for_no_pipe(home: pathlib.Path) -> None:
    file, link, pipe = (home / name for name in ("file", "link", "pipe"))
    file.write_bytes(b"content")
    file.chmod(0o600)
    link.symlink_to(file)
    os.mkfifo(pipe, 0o600)
    assert read(file) == b"content" and read(pipe) == b""
    with pytest.raises(OSError, match="symbolic link"):
        read(link)
    file.chmod(0o666)
    with pytest.raises(CacheError, match="has mode 0666"):
        read(file)

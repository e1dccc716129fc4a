"""The memory that a process can use: the least that its host and its control groups leave."""

import pathlib

import pytest

from grok1 import host_memory


@pytest.fixture
def machine(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A host with 8 MB of available memory, and no control groups yet."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    monkeypatch.setattr(host_memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host_memory, "GROUPS", tmp_path / "groups")
    return tmp_path


def make_group(path: pathlib.Path, **files: object) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(f"{content}\n")


def test_without_groups_it_is_that_of_the_host(machine: pathlib.Path) -> None:
    assert host_memory.available_memory() == 8000 * 1024
    (machine / "proc/meminfo").unlink()
    assert host_memory.available_memory() is None


def test_pages_of_files_are_available_in_a_group(machine: pathlib.Path) -> None:
    (machine / "proc/self/cgroup").write_text("0::/user/job\n")
    stat = "anon 1\nfile 500\nshmem 100"
    make_group(
        machine / "groups/user/job", memory__max=5000, memory__current=2000, memory__stat=stat
    )
    assert host_memory.available_memory() == 5000 - 2000 + 400


def test_the_strictest_of_nested_groups_counts(machine: pathlib.Path) -> None:
    (machine / "proc/self/cgroup").write_text("0::/user/job\n")
    own = {"memory__current": 100, "memory__stat": "file 0"}
    make_group(machine / "groups/user/job", memory__max="max", **own)
    make_group(machine / "groups/user", memory__max=3000, **own)
    assert host_memory.available_memory() == 2900
    make_group(machine / "groups", memory__max=50, **own)  # in a container; more is in use
    assert host_memory.available_memory() == 0


def test_a_group_of_the_first_version_is_read(machine: pathlib.Path) -> None:
    (machine / "proc/self/cgroup").write_text("9:name=systemd:/\n4:cpu,memory:/docker/few\n")
    own = {
        "memory__limit_in_bytes": 7000,
        "memory__usage_in_bytes": 1000,
        "memory__stat": "cache 1\ntotal_cache 300\ntotal_shmem 200",
    }
    make_group(machine / "groups/memory", **own)  # a container sees its group as the root
    assert host_memory.available_memory() == 6100

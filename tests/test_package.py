"""The wheel: what it holds, and that the command works wherever it is installed."""

import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from paths import ROOT

MODULES = {"checkpoint.py", "model.py", "run.py", "runner.py"}
ASK = ("--prompt", "Once upon a time", "--max-len", "8", "--seed", "1")


def tracked() -> list[str]:
    """All files of the repository."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A wheel built from the repository's own files."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for file in tracked():
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, source / file, follow_symlinks=False)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", target, source],
        check=True,
    )
    (found,) = target.iterdir()
    return found


def test_the_wheel_holds_the_modules_and_grok1_only(wheel: pathlib.Path) -> None:
    package = {file for file in tracked() if file.startswith("grok1/")}
    demo = {file for file in tracked() if file.startswith("checkpoints/demo/")}
    demo = {file.replace("checkpoints/", "grok1/") for file in demo}
    assert {"grok1/kernels/cpu.cc", "grok1/demo/tokenizer.model"} <= package | demo
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        tokenizer = archive.read("grok1/demo/tokenizer.model")
    assert held == MODULES | package | demo
    assert tokenizer == (ROOT / "tokenizer.model").read_bytes()
    assert wheel.stat().st_size < 18e6


@pytest.fixture(scope="module")
def installed(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The programs of an environment in which the wheel is installed.

    What it depends on is taken from the environment of the tests.
    """
    directory = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    python = directory / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel],
        check=True,
    )
    (packages,) = directory.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return directory / "bin"


@pytest.fixture
def elsewhere(tmp_path: pathlib.Path) -> pathlib.Path:
    """A directory whose files have names of ours, or of what we need, and another content."""
    for name in ("model", "text", "request", "runner", "checkpoint", "kernels", "haiku"):
        (tmp_path / f"{name}.py").write_text('raise SystemExit("the wrong file was imported")')
    return tmp_path


def output(*command: object, where: pathlib.Path) -> str:
    """What a program prints, which must succeed."""
    done = subprocess.run(
        [*map(str, command)], cwd=where, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installed_command_works_in_any_directory(
    installed: pathlib.Path, elsewhere: pathlib.Path
) -> None:
    expected = output(sys.executable, ROOT / "run.py", *ASK, where=elsewhere)
    assert expected.startswith("Once upon a time") and len(expected) > 30
    assert output(installed / "grok-1", *ASK, where=elsewhere) == expected
    assert output(installed / "python", "-m", "grok1", *ASK, where=elsewhere) == expected
    assert output(installed / "python", "-P", "-m", "grok1", "--help", where=elsewhere)


def test_a_clone_runs_as_a_package_too() -> None:
    expected = output(sys.executable, "run.py", *ASK, where=ROOT)
    assert output(sys.executable, "-m", "grok1", *ASK, where=ROOT) == expected


@pytest.mark.slow
def test_the_wheel_brings_what_it_needs(
    wheel: pathlib.Path, elsewhere: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Into an empty environment, with all dependencies from the package index."""
    directory = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    subprocess.run([directory / "bin/pip", "install", "--quiet", wheel], check=True)
    assert output(directory / "bin/grok-1", *ASK, where=elsewhere).startswith("Once upon a time")

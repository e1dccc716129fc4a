"""The wheel: what it holds, and that the command works wherever it is installed."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

import compiling
from paths import ROOT

MODULES = {"checkpoint.py", "model.py", "run.py", "runner.py"}
ASK = ("--prompt", "Once upon a time", "--max-len", "1")
ANSWER = "Once upon a time.+\n"


def tracked():
    """All files of the repository."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
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


def test_wheel_holds_only_the_modules_and_grok1(wheel):
    package = {file for file in tracked() if file.startswith("grok1/")}
    demo = {file for file in tracked() if file.startswith("checkpoints/demo/")}
    demo = {file.replace("checkpoints/", "grok1/") for file in demo}
    assert {"grok1/kernels/cpu.cc", "grok1/demo/tokenizer.model"} <= package | demo
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert held == MODULES | package | demo
        for name in held:
            source = ROOT / name.replace("grok1/demo/", "checkpoints/demo/")
            assert archive.read(name) == source.read_bytes(), name
    assert wheel.stat().st_size < 18e6


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The programs of an environment with the wheel, and the dependencies of this environment."""
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
def elsewhere(tmp_path):
    """A directory whose files have the names of modules that the command imports."""
    for name in ("model", "text", "request", "runner", "checkpoint", "kernels", "haiku"):
        (tmp_path / f"{name}.py").write_text('raise SystemExit("the wrong file was imported")')
    return tmp_path


def output(*command, where):
    """What a program prints, which must succeed."""
    quick = os.environ | {"XLA_FLAGS": compiling.FLAGS}
    done = subprocess.run(command, cwd=where, env=quick, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_installed_command_works_in_any_directory(installed, elsewhere):
    assert re.fullmatch(ANSWER, output(installed / "grok-1", *ASK, where=elsewhere))
    assert output(installed / "python", "-P", "-m", "grok1", "--help", where=elsewhere)


@pytest.mark.parametrize("place", ["clone", "installed"])
def test_module_imports_its_own_files(place, installed, elsewhere):
    """The request is refused when all modules have been imported, before weights are loaded."""
    python = installed / "python" if place == "installed" else sys.executable
    (elsewhere / "path").mkdir()
    shutil.copy(elsewhere / "model.py", elsewhere / "path")
    done = subprocess.run(
        [python, "-m", "grok1", "--prompt-ids", "5 -1"],
        cwd=elsewhere if place == "installed" else ROOT,
        env=os.environ | {"PYTHONPATH": str(elsewhere / "path")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.endswith("error: request 1: expected token ids from 0 to 4095, got -1\n")


@pytest.mark.exhaustive
def test_wheel_brings_its_dependencies(wheel, elsewhere, tmp_path_factory):
    """Into an empty environment, from the package index."""
    directory = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    subprocess.run([directory / "bin/pip", "install", "--quiet", wheel], check=True)
    assert re.fullmatch(ANSWER, output(directory / "bin/grok-1", *ASK, where=elsewhere))


def test_the_adapter_without_its_harness_names_the_requirements():
    code = "import sys; sys.modules['lm_eval'] = None; import lm_eval_grok"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tools", capture_output=True, text=True
    )
    said = r"error: lm_eval[\w.]* is not installed; run: pip install -r requirements-eval.txt\n"
    assert done.returncode == 1 and re.fullmatch(said, done.stderr)

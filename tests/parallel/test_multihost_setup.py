"""How processes find their place in a run, and agree on options and files."""

import json
import pathlib
import shutil
import types
from collections.abc import Callable
from typing import Any

import pytest

from grok1.cli import job
from grok1.cli.parsing import parse_arguments
from grok1.parallel import multihost
from paths import ROOT
from processes import MODEL

# Place.


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("a.b.:1", ("a.b.", 1)),
        ("10.0.0.1:65535", ("10.0.0.1", 65535)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_address_is_split_into_host_and_port(address: str, expected: tuple[str, int]) -> None:
    assert multihost.host_and_port(address) == expected


@pytest.mark.parametrize(
    "address",
    ["here", "here:0", "here:70000", ":1", "a..b:1", "\xe9" * 63 + ":1", "[::1]]:1", "[a:1"]
    + ["here:" + "1" * 5000],
    ids=lambda address: address[:9],
)
def test_invalid_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="^expected HOST:PORT such as 10.0.0.1:1234, got "):
        multihost.host_and_port(address)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--coordinator a:1", "--coordinator needs --distributed"),
        ("--num-processes 2", "--num-processes needs --distributed"),
        ("--process-id 0", "--process-id needs --distributed"),
        (
            "--distributed --coordinator a:1",
            "--coordinator needs --num-processes and --process-id; give all of them or none",
        ),
        ("--distributed --process-id 0", "--process-id needs --coordinator and"),
        (
            "--distributed --coordinator a:1 --num-processes 2 --process-id 2",
            "--process-id: expected an integer from 0 to 1, as there are 2 processes, got 2",
        ),
        ("--distributed --coordinator here", "expected HOST:PORT such as 10.0.0.1:1234"),
        ("--distributed --num-processes 0", "expected an integer from 1 to 1048576, got '0'"),
        ("--peer-timeout 1", "expected a number from 2 to 1000000 (seconds), got '1'"),
    ],
)
def test_invalid_options_are_one_sentence(
    arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_arguments(arguments.split())
    out, err = capsys.readouterr()
    assert (exit_.value.code, out) == (2, "")
    assert sentence in err and err.count("\n") == 1 and err.startswith("error: ")


def test_place_is_taken_from_a_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """As jax detects it; the port depends on the job's number."""
    slurm = {"JOB_ID": "61441", "STEP_NODELIST": "localhost", "NTASKS": "2", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    addresses = set()
    for process in (0, 1):
        monkeypatch.setenv("SLURM_PROCID", str(process))
        found = multihost.find_process()
        assert found[1:] == (2, process)
        addresses.add(found.coordinator)
    assert len(addresses) == 1 and addresses.pop().startswith("localhost:")


def test_run_without_place_or_job_is_refused() -> None:
    with pytest.raises(
        ValueError, match="expected a job of SLURM, GKE or MPI, found none; give --"
    ):
        multihost.find_process()


# Agreement.


def offer(*arguments: object) -> Any:
    """Return what process 0 with these arguments sends to the others."""
    sent: list[str] = []
    process = types.SimpleNamespace(process_id=0)
    peers: Any = types.SimpleNamespace(process=process, share=lambda x: sent.append(json.dumps(x)))
    job.agree(peers, parse_arguments([*map(str, arguments)]))
    return json.loads(sent[0])


def accept(shared: Any, *arguments: object) -> job.Job:
    """Return the job of process 1 with these arguments."""
    process = types.SimpleNamespace(process_id=1)
    peers: Any = types.SimpleNamespace(process=process, share=lambda _: shared)
    return job.agree(peers, parse_arguments([*map(str, arguments)]))


ASK = ("--checkpoint", MODEL, "--prompt-ids", "5 6 7")


def test_options_and_files_are_those_of_process_0() -> None:
    """A run of token ids needs no tokenizer in any process."""
    own = ["--prompt-ids", "1", "--no-kernels", "--tokenizer", ROOT / "tokenizer.model"]
    found = accept(offer(*ASK, "--mesh", "1,2", "--max-len", 6), *own)
    assert [line.prompt for line in found.options.lines] == [[5, 6, 7]]
    assert (found.options.mesh, found.options.max_len, found.options.kernels) == ((1, 2), 6, True)
    assert (found.directory, found.tokenizer, found.left) == (MODEL, None, [0])


@pytest.mark.parametrize(
    ("file", "name", "edit"),
    [
        ("config.json", "config.json", lambda data: data + b"\n"),
        ("tokenizer.model", "tokenizer", lambda _: b"another"),
        ("ckpt-0/tensor00001_000", "ckpt-0/tensor00001_000", lambda data: data[::-1]),
    ],
)
def test_process_with_different_files_is_refused(
    file: str, name: str, edit: Callable[[bytes], bytes], tmp_path: pathlib.Path
) -> None:
    """The tokens would be those of neither model, without any error."""
    other = shutil.copytree(MODEL, tmp_path / "other")
    shutil.copy(ROOT / "tokenizer.model", other)
    shared = offer(*ASK, "--tokenizer", ROOT / "tokenizer.model")
    own = ["--checkpoint", other, "--tokenizer", other / "tokenizer.model"]
    assert accept(shared, *own)[1:3] == (other, other / "tokenizer.model")
    (other / file).write_bytes(edit((other / file).read_bytes()))
    message = f"^{other}\\S*: expected the same {name} as on process 0, got something else; give"
    with pytest.raises(ValueError, match=message):
        accept(shared, *own)


def test_process_of_another_program_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = offer(*ASK)
    for name in ("run.py", "runner.py", "model.py", "checkpoint.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "grok1", tmp_path / "grok1")
    monkeypatch.setattr(job, "ROOT", tmp_path)
    assert accept(shared).left == [0]
    with (tmp_path / "grok1" / "ops" / "layers.py").open("a") as file:
        file.write("# changed\n")
    message = f"^{tmp_path}: expected the same program as on process 0, got another version; inst"
    with pytest.raises(ValueError, match=message):
        accept(shared)

"""Each mistake of the user of run.py is answered with one sentence on standard error."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import jax
import pytest

import checkpoint
import run
from commands import PROMPT, Command, Result, assert_one_sentence, changed, finish, start
from grok1 import backend
from paths import DATA, ROOT

# The options, in the syntax of a shell; the exit status; a part of the sentence.
MISTAKES = [
    (
        "--mesh 8",
        2,
        "--mesh: expected two integers from 1 to 2147483647, DATA,MODEL such as 1,8, got '8'",
    ),
    (f"--mesh 1,{2**31}", 2, "such as 1,8, got '1,2147483648'"),
    ("--mesh 0,8", 2, "such as 1,8, got '0,8'"),
    (
        "--mesh 1,3",
        1,
        "a model axis of 3 does not divide num_kv_heads = 8; use one of [1, 2, 4, 8]",
    ),
    (
        "--mesh 4,8",
        1,
        "a mesh of 4,8 needs 32 devices, but this machine has 16, on which the model can use the "
        "meshes 16,1 8,2 4,4 2,8;",
    ),
    ("--batch 0", 2, "--batch/--slots: expected an integer from 1 to 2147483647, got '0'"),
    ("--context 65", 1, "context: expected 1 to 64 tokens, the model's own"),
    (
        "--device-memory 80",
        2,
        "--device-memory: expected a number and a unit such as 80GiB (units: B, kB, MB, GB, TB, "
        "KiB, MiB, GiB, TiB), less than 1e+18 bytes, got '80'",
    ),
    ("--bandwidth 3TB", 2, "a unit such as 3.35TB/s (units: B/s"),
    ("--plan --distributed", 2, "--plan and --distributed do not go together: a plan is made by"),
    ("--plan --prompt Hi", 2, "--plan and --prompt do not go together"),
    ("--plan --prompts-file -", 2, "--plan and --prompts-file do not go together"),
    ("--plan --output out", 2, "--plan and --output do not go together"),
    ("-", 2, "to read prompts from standard input, use --prompts-file -"),
    ("--prompts-file ''", 2, "--prompts-file: expected a path, got an empty string"),
    ("--output ''", 2, "--output: expected a path, got an empty string"),
    ("--output -", 2, "--output -: without --output answers are printed"),
    ("--temperature -0.1", 2, "--temp: expected a number from 0 to 1000000 ("),
    ("--top-p 0", 2, "--nucleus-p: expected a number above 0, up to 1, got '0'"),
    ("--top-k -1", 2, "--top-k: expected an integer from 0 to 2147483647 (0: "),
    ("--min-p 2", 2, "--min-p: expected a number from 0 to 1, got '2'"),
    ("--repetition-penalty 0", 2, "from 1e-06 to 1000000, got '0'"),
    ("--presence-penalty nan", 2, "to 1000000000, got 'nan'"),
    ("--max-len 0", 2, "--max-len: expected an integer from 1 to 2147483647, got '0'"),
    ("--max-len 1.5", 2, "from 1 to 2147483647, got '1.5'"),
    ("--seed -1", 2, "to 4294967295 (--seed $RANDOM: a new one each time), got '-1'"),
    ("--dtype int8", 2, "--dtype: invalid choice: 'int8'"),
    ("--stop ''", 1, "request 1: stop must contain non-empty strings, got ''"),
    ("--prompt Hi --prompt ''", 1, "request 2: the prompt is empty; give at least one token"),
    (
        f"--prompt '{'so ' * 80}'",
        1,
        "request 1: the prompt has 81 tokens, and the context of 64 must hold at least one more; "
        "shorten it",
    ),
    ("--prompt \udcff", 1, "request 1: the prompt is not text in UTF-8"),
    ("--prompt-ids five", 2, "expected token ids such as '5 6 7', got 'five'"),
    ("--prompt-ids 5,4096", 1, "request 1: expected token ids from 0 to 4095, got 4096"),
    (
        "--tokenizer /no/such.model",
        1,
        "/no/such.model: expected a tokenizer, found no such file; fetch the",
    ),
    (
        f"--tokenizer {__file__}",
        1,
        "test_run_errors.py: expected a SentencePiece model, got another kind of file",
    ),
]


@pytest.mark.parametrize(
    ("options", "status", "part"), MISTAKES, ids=[ascii(row[0])[1:40] for row in MISTAKES]
)
def test_wrong_options_are_refused_before_loading(
    options: str,
    status: int,
    part: str,
    tiny: pathlib.Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint, "load", None)
    assert_one_sentence(command("--checkpoint", tiny, *shlex.split(options)), status, part)


Damage = Callable[[pathlib.Path], object]

# What is done to the checkpoint, and a part of the sentence: one row for each module that reads it.
# fmt: off
DAMAGED: dict[str, tuple[Damage, str]] = {
    "no-directory": (shutil.rmtree,
                     "expected a directory that holds ckpt-0, model.safetensors.index.json or "
                     "model.mapped.index.json, got no such directory; name the right one with "
                     "--checkpoint"),
    "missing-file": (lambda d: (d / "ckpt-0/tensor00005_000").unlink(),
                     "tensor00005_000 (transformer/decoder_layer_0/multi_head_attention/key/w): "
                     "the file is missing: expected 26 tensor files, got 25; download it again"),
    "no-config": (lambda d: (d / "config.json").unlink(),
                  "expected 770 tensor files (64 layers), got 26"),
    "broken-config": (lambda d: (d / "config.json").write_text("{"),
                      "config.json: expected valid JSON"),
    "tokenizer": (lambda d: (d / "tokenizer.model").write_bytes(b"\0" * 1000),
                  "tokenizer.model: expected a SentencePiece model, got another kind of file"),
}
# fmt: on


@pytest.mark.parametrize(("damage", "part"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_checkpoint_is_refused(
    damage: Damage, part: str, tiny: pathlib.Path, command: Command, tmp_path: pathlib.Path
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(tiny, directory)
    damage(directory)
    result = command("--checkpoint", directory, "--prompt", PROMPT)
    assert_one_sentence(result, 1, str(directory), part)


def test_a_tokenizer_of_another_model_is_refused(command: Command) -> None:
    result = command("--checkpoint", DATA / "golden" / "three-layers", "--prompt", PROMPT)
    assert_one_sentence(
        result,
        1,
        "tokenizer.model: expected the 512 pieces of the checkpoint's vocabulary, got 4096; fetch "
        "the tokenizer.model that belongs to the checkpoint (Grok-1's is in the xai-org/grok-1 "
        "repository on GitHub) and put it next to ckpt-0, or name it with --tokenizer",
    )


def test_a_missing_checkpoint_is_reported_before_jax() -> None:
    """Before its import, which takes seconds, and before a missing tokenizer."""
    arguments = ["--checkpoint", "no/such", "--tokenizer", "no/such.model"]
    program = (
        f"import sys, run; sys.argv[1:] = {arguments}; status = run.main(); "
        "assert 'jax' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    result = Result(done.returncode, done.stdout, done.stderr)
    assert_one_sentence(result, 1, "no/such: expected a directory that holds")


def test_too_little_memory_is_reported(
    tiny: pathlib.Path, command: Command, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before weights are loaded if the amount is known, otherwise when it is exhausted."""
    directory = changed(tiny, tmp_path / "endless", sequence_len=1 << 24)
    asked = "--checkpoint", directory, "--prompt-ids", "5", "--json", "--batch", 20_000
    sentence = "weights and cache take 320", " GiB here, and ", "run.py --plan shows what fits"
    assert_one_sentence(command(*asked), 1, *sentence)
    monkeypatch.setattr("grok1.serving.memory_budget.available_memory", lambda: None)
    result = command(*asked)
    assert_one_sentence(result, 1, "too little memory for the model or its cache", "; use more dev")


def test_an_unknown_platform_is_reported(tiny: pathlib.Path) -> None:
    result = finish(start("--checkpoint", tiny, "--prompt-ids", 5, JAX_PLATFORMS="nonsense"))
    sentence = "JAX_PLATFORMS=nonsense: expected platforms with available devices, got none"
    assert_one_sentence(result, 1, sentence, "correct it or leave it unset")


@pytest.mark.parametrize(
    ("error", "platforms", "sentence"),
    [
        (RuntimeError("no topology\nmore"), None, "jax found no devices (no topology)"),
        (AssertionError(), None, "jax found no devices (no driver found)"),
        (RuntimeError("no GPU"), "cuda", "JAX_PLATFORMS=cuda: expected platforms with available"),
    ],
)
def test_missing_devices_are_reported(
    error: Exception, platforms: str | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    config = SimpleNamespace(values={"jax_platforms": platforms})
    monkeypatch.setattr(backend, "jax", SimpleNamespace(devices=fail, config=config))
    with pytest.raises(ValueError) as refused:
        backend.require_devices()
    assert str(refused.value).startswith(sentence)


def test_the_number_of_virtual_devices_is_limited(
    tiny: pathlib.Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XLA would exhaust the threads and memory of the machine, or crash."""
    assert len(jax.devices()) == 16  # XLA reads its flags now, and never again
    monkeypatch.setenv("XLA_FLAGS", "")
    result = command("--checkpoint", tiny, "--prompt-ids", 5, "--mesh", f"{2**31 - 1},1")
    assert_one_sentence(result, 1, f"a mesh of {2**31 - 1},1 needs")
    assert os.environ["XLA_FLAGS"].strip() == "--xla_force_host_platform_device_count=128"


@pytest.mark.parametrize("script", ["run.py", "checkpoint.py"])
def test_python_without_assertions_is_refused(script: str) -> None:
    """Before dm-haiku is imported, which would fail."""
    done = subprocess.run([sys.executable, "-O", ROOT / script], capture_output=True, text=True)
    assert_one_sentence(Result(done.returncode, done.stdout, done.stderr), 1, "python -O removes")


def test_a_full_temporary_directory_is_reported() -> None:
    """Before dm-haiku is imported, which would fail."""
    full = ["bash", "-c", 'ulimit -f 0; exec "$@"', "-", sys.executable, ROOT / "run.py"]
    done = subprocess.run(full, capture_output=True, text=True)
    result = Result(done.returncode, done.stdout, done.stderr)
    assert_one_sentence(result, 1, "No usable temporary directory found in", "or set TMPDIR to a")


def test_a_directory_that_jax_cannot_name_is_refused(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ROOT", pathlib.Path("/m\udcfcller"))
    assert_one_sentence(command(), 1, "ller: expected a path in UTF-8; move this program")

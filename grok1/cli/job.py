"""The job of a run: its prompts, files and output, and the prompts still to be answered."""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grok1 import default_files
from grok1.cli import prompts
from grok1.cli.console import check_output, say
from grok1.cli.options import Line, Options
from grok1.cli.output import AnswerFile, fingerprint
from grok1.default_files import ROOT
from grok1.formats import atomic, forms
from grok1.parallel.multihost import Peers

# Options that process 0 sets for all; file paths may differ between hosts.
SHARED = (
    "lines", "max_len", "temperature", "top_k", "nucleus_p", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "stop", "truncate", "seed", "mesh", "dtype", "batch",
    "context", "num_samples", "streamed", "kernels", "chunk", "prefix_cache", "logit_bias",
    "min_len", "top_logprobs",
)  # fmt: skip


class Job(NamedTuple):
    """The job of a run.

    options: including the prompts of --prompts-file. directory: of the checkpoint. tokenizer: None
    if the run has no text. answers: the file of --output, if any. left: indices of the prompts that
    do not have all their answers yet.
    """

    options: Options
    directory: Path
    tokenizer: Path | None
    answers: AnswerFile | None
    left: Sequence[int]


def prepare(options: Options) -> Job:
    """Find the prompts and the files, and open --output. Raises ValueError, or OSError."""
    if options.output is None:
        check_output()
    options = prompts.with_file(options)
    directory, tokenizer = choose_files(options)
    answers = open_answers(options, directory, tokenizer)
    done = answers.done if answers else set()
    keys = prompts.answer_keys(options)
    left = sorted({index for index, sample in keys if (index, sample) not in done})
    return Job(options, directory, tokenizer, answers, left)


def agree(peers: Peers, options: Options) -> Job:
    """Return the job of process 0 with this process's files, which must have equal contents."""
    from grok1 import backend  # Takes seconds.

    job = prepare(options) if peers.process.process_id == 0 else None
    shared = peers.share(_to_json(job) if job else None)
    if job:
        return job
    if _program() != shared["program"]:
        raise ValueError(
            f"{ROOT}: expected the same program as on process 0, got another version; install "
            "the same on all hosts"
        )
    backend.use_numerics(shared["numerics"])
    own = _with_files(_merged(options, shared["options"]), *shared["files"])
    directory, tokenizer = choose_files(own)
    for name, found in (_contents(directory, tokenizer) | _weights(directory)).items():
        # Weights that are missing, or in the other form, cannot be compared.
        if found != shared["contents"].get(name, found):
            raise ValueError(
                f"{tokenizer if name == 'tokenizer' else directory}: expected the same {name} as "
                "on process 0, got something else; give all processes the same files"
            )
    return Job(own, directory, tokenizer, None, shared["left"])


def _to_json(job: Job) -> dict[str, object]:
    """Return the data that process 0 sends to the others, as JSON."""
    from grok1 import backend

    files = job.directory, job.tokenizer
    return {
        "options": {name: getattr(job.options, name) for name in SHARED},
        "files": [None if file is None else str(file.absolute()) for file in files],
        "program": _program(),
        "numerics": backend.numerics(),
        "contents": _contents(*files) | _weights(job.directory),
        "left": job.left,
    }


def _merged(options: Options, shared: dict[str, Any]) -> Options:
    """Return a process's own options, updated with those set by process 0."""
    lines = tuple(Line(*line) for line in shared["lines"])
    mesh = shared["mesh"] and tuple(shared["mesh"])
    return dataclasses.replace(options, **(shared | {"lines": lines, "mesh": mesh}))


def _with_files(options: Options, directory: str, tokenizer: str | None) -> Options:
    """Return options with the files of process 0, unless they name other files."""
    if tokenizer is None:
        options = dataclasses.replace(options, tokenizer=None)  # the run has no text
    if options.checkpoint is not None:
        return options
    options = dataclasses.replace(options, checkpoint=Path(directory))
    if options.tokenizer is None and tokenizer is not None:
        options = dataclasses.replace(options, tokenizer=Path(tokenizer))
    return options


# -------------------------------------------------------------------------------------- the files


def choose_files(options: Options) -> tuple[Path, Path | None]:
    """Return the checkpoint directory, and the tokenizer if the run needs one."""
    directory = options.checkpoint
    if directory is None:
        directory = default_files.default_checkpoint()
        if directory == default_files.DEMO:
            cloned = default_files.RELEASED.is_dir()
            why = "checkpoints/ckpt-0 is not there" if cloned else "no --checkpoint given"
            say(f"{why}: using the small bundled demo model")
    forms.require_form(directory, "name the right one with --checkpoint")
    tokenizer = options.tokenizer
    if tokenizer is None and _needs_words(options):
        tokenizer = default_files.default_tokenizer(directory)
    return directory, tokenizer


def _needs_words(options: Options) -> bool:
    """Whether the run has text, and so needs a tokenizer."""
    words = any(isinstance(line.prompt, str) for line in options.lines)
    stops = options.stop or any(line.settings.get("stop") for line in options.lines)
    return bool(options.interactive or words or stops)


def open_answers(options: Options, directory: Path, tokenizer: Path | None) -> AnswerFile | None:
    """Open the file of --output, if given. Raises ValueError."""
    if options.output is None:
        return None
    how = {"dtype": options.dtype, "context": options.context, "kernels": options.kernels}
    how["chunk"] = options.chunk
    # If no prompt needs a tokenizer, the default one still decodes the answers.
    model = _contents(directory, tokenizer or default_files.default_tokenizer(directory)) | how
    ids = [line.id for line in options.lines]
    fingerprints = [
        fingerprint(request=prompts.fields_of(options, index), id=name, model=model)
        for index, name in enumerate(ids)
    ]
    keys = prompts.answer_keys(options)
    return AnswerFile(options.output, keys, fingerprints, ids, options.resume)


def _contents(directory: Path, tokenizer: Path | None) -> dict[str, str]:
    """Return fingerprints of the files that must be the same in all processes.

    The fingerprint of an unreadable file is empty; loading it reports the error.
    """
    files = {"config.json": directory / "config.json", "tokenizer": tokenizer}
    found = dict.fromkeys(files, "")
    for name, file in files.items():
        with contextlib.suppress(OSError), atomic.open_regular(str(file or os.devnull)) as opened:
            # Loading rejects larger files.
            text = opened.read(forms.MAX_TOKENIZER_BYTES)
            found[name] = hashlib.sha256(text).hexdigest()
    return found


def _weights(directory: Path) -> dict[str, str]:
    """Return fingerprints of the weight files; none if they cannot be read."""
    with contextlib.suppress(OSError):  # loading reports the error
        return forms.samples(directory)
    return {}


def _program() -> str:
    """Return a fingerprint of this program's own files."""
    found = hashlib.sha256()
    for name in ("model.py", "runner.py", "checkpoint.py", "run.py", "grok1/**/*"):
        for file in sorted(ROOT.glob(name)):
            if file.suffix in (".py", ".cc", ".h"):
                found.update(file.read_bytes())
    return found.hexdigest()

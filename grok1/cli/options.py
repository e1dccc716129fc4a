"""The options of the command line."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Fields = dict[str, Any]  # of a Request: JSON values


class Line(NamedTuple):
    """A prompt from a line of a file or from the command line.

    prompt: text or token ids. id: the user's name for it, or None. settings: fields of a Request
    set for this prompt only. place: file and line, or its number on the command line.
    """

    prompt: str | Sequence[int]
    id: str | int | None
    settings: Fields
    place: str


@dataclasses.dataclass(frozen=True)
class Options:
    """The options as --help describes them; None if a default depends on other options.

    lines: the prompts. logit_bias: by token id, a string as in JSON. streamed: print answers token
    by token.
    """

    # The model.
    checkpoint: Path | None
    tokenizer: Path | None
    dtype: str | None
    # Prompts.
    lines: tuple[Line, ...]
    prompts_file: str | None
    prompts_format: str | None
    truncate: str | None
    interactive: bool
    # Sampling.
    max_len: int | None
    min_len: int
    stop: tuple[str, ...]
    seed: int | None
    num_samples: int
    temperature: float
    top_k: int
    nucleus_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[str, float] | None
    # Output.
    json: bool
    top_logprobs: int
    output: Path | None
    resume: bool
    stats: bool
    show_routing: bool
    streamed: bool
    # The machine.
    mesh: tuple[int, int] | None
    batch: int | None
    context: int | None
    chunk: int | None
    prefix_cache: bool
    compile_cache: bool
    kernels: bool
    # A server.
    serve: tuple[str, int] | None
    api_key: str | None
    most_waiting: int
    grace: float
    chat_template: Path | None
    cors: tuple[str, ...]
    # A plan.
    plan: bool
    accelerator: str | None
    device_memory: float | None
    bandwidth: float | None
    shard_activations: bool
    experts: str | None
    mapped: bool
    save_programs: Path | None
    # Several processes.
    distributed: bool
    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    peer_timeout: float
    join_timeout: float

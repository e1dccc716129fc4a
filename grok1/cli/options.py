"""What the command line asks for."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Line(NamedTuple):
    """A prompt, as it stands in a line of a file or on the command line.

    prompt: text or token ids. id: the person's own name for it, or None. settings: fields of a
    Request that are its own. place: file and line, or which one of the command line's it is.
    """

    prompt: Any
    id: str | int | None
    settings: dict[str, Any]
    place: str


@dataclasses.dataclass(frozen=True)
class Options:
    """A field for each option, which --help describes; None where a default depends on others.

    lines: the prompts. logit_bias: by token id, a text as in JSON. streamed: the answers are
    printed token by token.
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
    compile_cache: bool
    kernels: bool
    # A plan.
    plan: bool
    device_memory: float
    bandwidth: float
    # Several processes.
    distributed: bool
    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    peer_timeout: float
    join_timeout: float

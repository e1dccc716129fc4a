"""A conversion of a checkpoint: its source, what it writes, and how far it has come.

During a conversion, DST/.converting holds the files that are being written and `state.json`, which
records the source and what is finished.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from grok1.formats import atomic, forms, pickle_file, safetensors
from grok1.formats.forms import TensorFile
from grok1.formats.mapped import Stack
from grok1.formats.pickle_file import Array, StoredLeaf
from grok1.strict_json import read_json

STATE = "state.json"
_MAX_STATE_BYTES = 16 << 20  # Grok-1's has 0.4 MB
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Output:
    """One file to write, or those of all layers of a parameter in the mapped form.

    files: their paths in DST. members: the parameters in them, by layer. size: an upper bound in
    bytes. stacks: the contents of each file in the mapped form.
    """

    files: list[str]
    members: list[TensorFile]
    size: int
    stacks: Sequence[Stack] = ()

    @property
    def tensors(self) -> dict[str, Array]:
        """The tensors in them, by name."""
        found = {name: array for stack in self.stacks for name, array in stack.tensors.items()}
        for record in self.members:
            found |= safetensors.tensors(record)
        return found

    @property
    def nbytes(self) -> int:
        """The bytes of their values."""
        return sum(map(pickle_file.nbytes, self.tensors.values()))


@dataclasses.dataclass(frozen=True)
class Job:
    """A conversion whose source has been checked.

    records: what is written. stored: the parameters of the source, by name. located: the location
    of each tensor in the source. checksums: those that the source states, if any. identity: changes
    if a source file changes. group: of the experts' scales, in 4 bits; None: experts stay as they
    are. overwrite: a checkpoint may be replaced.
    """

    source: str
    target: str
    form: str
    overwrite: bool
    records: list[TensorFile]
    stored: Mapping[str, StoredLeaf]
    located: Mapping[str, pickle_file.Located]
    checksums: Mapping[str, str]
    outputs: list[Output]
    identity: str
    group: int | None

    def sources(self, members: Sequence[TensorFile]) -> list[str]:
        """Return the names of the tensors of the source from which parameters are made."""
        leaves = ((record, self.stored[record.name]) for record in members)
        return [name for pair in leaves for name in safetensors.tensors(*pair)]

    @property
    def total(self) -> int:
        """The bytes of all tensors."""
        return sum(map(pickle_file.nbytes, self.located.values()))


@dataclasses.dataclass
class State:
    """The contents of DST/.converting/state.json: the progress of a conversion.

    files: {file: [size, modification time in ns]} of the finished files.
    checksums: {tensor: checksum} of the tensors that are finished, also in the unfinished files of
    the mapped form. state.json adds a digest of all three.
    """

    identity: str
    files: dict[str, list[int]]
    checksums: dict[str, str]


def read_state(job: Job) -> State | None:
    """Return the state of an earlier call with the same source, or None."""
    try:
        state = _load_state(job)
    except FileNotFoundError:
        return None
    except (TypeError, ValueError):
        path = os.path.join(job.target, forms.WORK, STATE)
        _log.warning("%s is damaged: starting over", path)
        return None
    if state.identity != job.identity:
        _log.warning("%s is made from another source, or otherwise: starting over", job.target)
        return None
    return state


def _load_state(job: Job) -> State:
    """Return the state in DST. Raises OSError, TypeError or ValueError."""
    fields = fields_of_state(job)
    if fields.pop("digest", None) != digest(fields):
        raise ValueError("expected another digest")
    return State(**fields)


def fields_of_state(job: Job) -> dict[str, Any]:
    """Return the fields of the state in DST, unchecked. Raises OSError, TypeError, ValueError."""
    with atomic.open_regular(os.path.join(job.target, forms.WORK, STATE)) as file:
        # A longer file is cut here, and is then not valid JSON.
        fields: Any = read_json(file.read(_MAX_STATE_BYTES))
    return dict(fields)


def write_state(work: str, state: State) -> None:
    """Write DST/.converting/state.json."""
    fields = dataclasses.asdict(state)
    text = json.dumps(fields | {"digest": digest(fields)})
    atomic.write(os.path.join(work, STATE), [text.encode()])


def digest(value: object) -> str:
    """Return a digest of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def stamp(path: str) -> list[int]:
    """Return the size of a file and its modification time in ns."""
    status = os.lstat(path)
    return [status.st_size, status.st_mtime_ns]


def finished(job: Job, state: State, output: Output) -> bool:
    """Return whether an output exists, unchanged since this conversion finished it."""
    known = state.checksums.keys() >= output.tensors.keys()
    return known and all(file_finished(job, state, file) for file in output.files)


def file_finished(job: Job, state: State, file: str) -> bool:
    """Return whether a file of DST is unchanged since this conversion finished it."""
    path = os.path.join(job.target, file)
    return os.path.isfile(path) and stamp(path) == state.files.get(file)

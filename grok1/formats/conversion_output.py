"""Write the files of a converted checkpoint.

A file of the mapped form may have 100 GB: it is written layer by layer, and each finished layer is
recorded, so that the next call continues after it.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import jax
import numpy as np

from grok1.formats import atomic, forms, mapped, pickle_file, safetensors, values
from grok1.formats.conversion_job import (
    Job,
    Output,
    State,
    file_finished,
    finished,
    stamp,
    write_state,
)
from grok1.formats.forms import TensorFile, error
from grok1.formats.loading import Counter, Progress
from grok1.formats.mapped import Stack
from grok1.formats.quantizing import in_4_bits
from grok1.ops.quantization import QuantizedWeight4bit
from grok1.ops.rounded_table import BLOCK, round_table
from grok1.parameters import EMBEDDINGS

_THREADS = 4  # that compute checksums


def write_outputs(job: Job, state: State, work: str, progress: Progress | None) -> None:
    """Write the unfinished files, and record each in the state when it is finished."""
    counter = Counter(job.total, progress)
    with ThreadPoolExecutor(_THREADS) as pool:
        for output in job.outputs:
            if finished(job, state, output):
                counter.add(_source_bytes(job, output.members))
            elif job.form == forms.MAPPED:
                _write_stacks(job, output, state, work, pool, counter)
            else:
                (file,) = output.files
                path = os.path.join(job.target, file)
                if job.form == forms.RELEASED:
                    atomic.make_folder(os.path.dirname(path))
                state.checksums |= _write_file(job, output, path, work, pool, counter)
                state.files[file] = stamp(path)
                write_state(work, state)


def _source_bytes(job: Job, members: Sequence[TensorFile]) -> int:
    return sum(pickle_file.nbytes(job.located[name]) for name in job.sources(members))


class _Values(NamedTuple):
    """The values of tensors in pieces, and a function that returns their checksums by name."""

    pieces: Mapping[str, Iterable[np.ndarray]]
    checksums: Callable[[], dict[str, str]]


def _convert(
    job: Job, members: Sequence[TensorFile], pool: ThreadPoolExecutor, counter: Counter
) -> _Values:
    """Return the values of some parameters as they are written.

    The checksums of the source are computed meanwhile: both read the same pages while they are in
    memory. Their function raises CheckpointError if they are not those that the source states.
    """
    futures = {
        name: pool.submit(safetensors.checksum, job.located[name], name, counter.add)
        for name in job.sources(members)
    }
    made: dict[str, np.ndarray] = {}
    for record in members:
        made |= _make_4_bits(job, record)
    names = [name for record in members for name in safetensors.tensors(record)]

    def checksums() -> dict[str, str]:
        found = {name: future.result() for name, future in futures.items()}
        for name, checksum in found.items():
            if job.checksums.get(name, checksum) != checksum:
                raise mismatch(name, job.located[name], job.checksums[name], checksum)
        found |= {name: safetensors.checksum_of([array]) for name, array in made.items()}
        return {name: found[name] for name in names}

    pieces = {
        name: [made[name]] if name in made else values.read_pieces(job.located[name], name)
        for name in names
    }
    return _Values(pieces, checksums)


def _make_4_bits(job: Job, record: TensorFile) -> dict[str, np.ndarray]:
    """Return the tensors of a parameter that is rounded to 4 bits, or none if it is not."""
    leaf = job.stored[record.name]
    if not isinstance(record.leaf, QuantizedWeight4bit) or isinstance(leaf, QuantizedWeight4bit):
        return {}
    assert job.group is not None
    names = safetensors.tensors(record)
    return dict(zip(names, in_4_bits(leaf, record.name, job.group), strict=True))


def mismatch(
    name: str, array: pickle_file.Located, expected: str, got: str
) -> forms.CheckpointError:
    """Return the error for a tensor with another checksum than expected."""
    remedy = "the values have changed since they were written: convert or download them again"
    return error(f"{array.path} ({name})", expected, got, remedy)


def _write_file(
    job: Job, output: Output, path: str, work: str, pool: ThreadPoolExecutor, counter: Counter
) -> dict[str, str]:
    """Write one file; return the checksums of its tensors."""
    converted = _convert(job, output.members, pool, counter)
    temporary = os.path.join(work, os.path.basename(path))
    if job.form == forms.SAFETENSORS:
        atomic.fill(temporary, safetensors.contents(output.tensors, converted.pieces))
    else:
        (record,) = output.members
        atomic.fill(temporary, pickle_file.join(record.leaf, converted.pieces.values()))
    checksums = converted.checksums()
    atomic.place(temporary, path)
    return checksums


# --------------------------------------------------------------------------------- the mapped form


def _write_stacks(
    job: Job, output: Output, state: State, work: str, pool: ThreadPoolExecutor, counter: Counter
) -> None:
    """Write the files of a parameter layer by layer, and record each layer in the state."""
    missing = output.tensors.keys() - state.checksums.keys()
    stacks = [s for s in output.stacks if missing or not file_finished(job, state, s.file)]
    done = min(_finished_layers(work, stack, state) for stack in stacks)
    layers = [[record] for record in output.members] or [[]]
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(_open(work, stack)) for stack in stacks]
        for i, members in enumerate(layers):
            if i < done:
                counter.add(_source_bytes(job, members))
                continue
            made = _convert(job, members, pool, counter) if members else _round(job)
            for stack, file in zip(stacks, files, strict=True):
                name, array = [*stack.tensors.items()][i]
                file.seek(mapped.HEADER + i * pickle_file.nbytes(array))
                for piece in made.pieces[name]:
                    file.write(piece.reshape(-1).view(np.uint8).data)
                file.flush()
                os.fsync(file.fileno())
            state.checksums |= made.checksums()
            write_state(work, state)
    for stack in stacks:
        path = os.path.join(job.target, stack.file)
        atomic.place(os.path.join(work, stack.file), path)
        state.files[stack.file] = stamp(path)
        write_state(work, state)


def _finished_layers(work: str, stack: Stack, state: State) -> int:
    """Return how many layers an unfinished file has, according to the state."""
    path = os.path.join(work, stack.file)
    end = os.path.getsize(path) if os.path.lexists(path) else 0
    count = 0
    for name, array in stack.tensors.items():
        needed = mapped.HEADER + (count + 1) * pickle_file.nbytes(array)
        if name not in state.checksums or end < needed:
            break
        count += 1
    return count


def _open(work: str, stack: Stack) -> BinaryIO:
    """Open an unfinished file, or a new one with a header."""
    path = os.path.join(work, stack.file)
    atomic.require_plain(path)
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b")
    file.write(safetensors.header({stack.name: stack.array}, mapped.HEADER))
    return file


def _round(job: Job) -> _Values:
    """Return the rounded embedding table."""
    (name,) = (record.name for record in job.records if record.name == "/".join(EMBEDDINGS))
    table = job.located[name]
    rows, width = table.shape
    shapes = jax.eval_shape(round_table, jax.ShapeDtypeStruct(table.shape, np.float32))
    rounded = {field: np.empty(x.shape, x.dtype) for field, x in shapes._asdict().items()}
    with values.open_values(table, name) as file:
        for first in range(0, rows, BLOCK):
            own = slice(first, min(first + BLOCK, rows))
            block = np.empty((own.stop - own.start, width), np.float32)
            values.read_box(file, table, (own, slice(0, width)), block)
            for field, array in round_table(block)._asdict().items():
                rounded[field][own] = array
    arrays = {f"{mapped.ROUNDED}/{field}": array for field, array in rounded.items()}
    return _Values(
        {name: [array] for name, array in arrays.items()},
        lambda: {name: safetensors.checksum_of([array]) for name, array in arrays.items()},
    )

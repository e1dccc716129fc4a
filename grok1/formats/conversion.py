"""Convert a checkpoint between its two forms, and verify checksums.

During a conversion, DST/.converting holds the files that are being written and `state.json`, which
records the source and the finished files. Each finished file is renamed to its final path. If the
command is interrupted, even by a power cut, the same command continues after the last of them.

DST itself may be a link to a directory. A link in DST in place of an output file or directory is
refused: its target does not belong to DST. SRC may contain links, as download caches do.
"""

import contextlib
import dataclasses
import filecmp
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np

from grok1.formats import atomic, forms, layout, pickle_file, safetensors, values
from grok1.formats.forms import Directory, TensorFile, error
from grok1.formats.loading import Counter, Progress
from grok1.formats.pickle_file import StoredLeaf
from grok1.formats.quantizing import in_4_bits
from grok1.ops.quantization import QuantizedWeight4bit
from grok1.ops.quantize_4bit import shape_in_4_bits
from grok1.strict_json import read_json

EXPERTS = "/moe/"  # in the names of their parameters
GROUPS = 32, 64, 128  # rows that share a scale, as recommended
_COPIED = ("config.json", "tokenizer.model")
_STATE = "state.json"
_MAX_STATE_BYTES = 16 << 20  # Grok-1's has 0.4 MB
_log = logging.getLogger(__name__)
_THREADS = 4  # that compute checksums
_HEADER = 256  # bytes, about, of a tensor in a safetensors header

# ---------------------------------------------------------------------------------------- convert


@dataclasses.dataclass(frozen=True)
class Output:
    """One file to write.

    file: its path in DST. members: the parameters in it. size: an upper bound in bytes.
    """

    file: str
    members: list[TensorFile]
    size: int

    @property
    def names(self) -> list[str]:
        """The tensors in it."""
        return [name for record in self.members for name in safetensors.tensors(record)]

    @property
    def nbytes(self) -> int:
        """The bytes of their values."""
        arrays = (safetensors.tensors(record).values() for record in self.members)
        return sum(pickle_file.nbytes(array) for own in arrays for array in own)


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

    def sources(self, output: Output) -> list[str]:
        """Return the names of the tensors of the source from which a file is made."""
        leaves = ((record, self.stored[record.name]) for record in output.members)
        return [name for pair in leaves for name in safetensors.tensors(*pair)]

    @property
    def total(self) -> int:
        """The bytes of all tensors."""
        return sum(map(pickle_file.nbytes, self.located.values()))


@dataclasses.dataclass
class State:
    """The contents of DST/.converting/state.json: the progress of a conversion.

    files: {file: [size, modification time in ns]} of the finished files.
    checksums: {tensor: checksum} of the tensors in them. state.json adds a digest of all three.
    """

    identity: str
    files: dict[str, list[int]]
    checksums: dict[str, str]


def convert(
    source: Directory,
    target: Directory,
    form: str,
    shapes: layout.LeafTree,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    group: int | None = None,
) -> Job:
    """Write the checkpoint in `source` to `target` in another form: "safetensors" or "released".

    group: round the experts to 4 bits, with a scale for so many rows of a column; only for
    safetensors, from either form.

    shapes: what the files of `source` must hold, as in `layout.files`.

    Arrays are streamed from file to file. Files that an earlier, interrupted call has finished are
    kept if the source is unchanged. The source's checksums are verified if it has any. config.json
    and tokenizer.model are copied. overwrite: replace an existing checkpoint in `target`
    completely.

    progress: called as progress(bytes_done, bytes_total). Raises CheckpointError (a ValueError)
    with a one-sentence message; finished files are kept, and the same call continues after them.
    """
    job = _plan(os.fspath(source), os.fspath(target), form, shapes, overwrite, group)
    with _writing(job.target), _working(job) as work:
        state = _read_state(job)
        _check_space(job, state)
        if state is None:
            state = _begin(job, work)
        for name in _COPIED:
            _copy(job, work, name)
        _write_outputs(job, state, work, progress)
        _require_unchanged(job)
        if form == forms.SAFETENSORS:
            text = safetensors.write_index(job.records, state.checksums)
            _put(job, work, forms.INDEX, [text])
    return job


def _require_unchanged(job: Job) -> None:
    """Raise CheckpointError if a file of the source has changed since it was checked."""
    stamps = {array.path: array.stamp for array in job.located.values()}
    same = all(atomic.stamp(path) == stamp for path, stamp in stamps.items())
    if not same or _identity(job.source, job.form, job.located, job.group) != job.identity:
        got, remedy = "some that changed", "start the same command again when nothing writes there"
        raise error(job.source, "files that do not change", got, remedy)


def _plan(
    source: str,
    target: str,
    form: str,
    shapes: layout.LeafTree,
    overwrite: bool,
    group: int | None,
) -> Job:
    """Check everything that can be checked before the first byte is written."""
    if forms.form(source) == form and group is None:
        remedy = f"name another form than {form} with --to"
        raise error(source, "a checkpoint in another form", f"one that is {form} already", remedy)
    _check_types(source, form, shapes, group)
    records = layout.files(shapes)
    stored = layout.check_files(source, records)
    located = _tensors(records, stored)
    names = [record.name for record in records]
    if group is not None:
        records = [_in_4_bits(record, group) for record in records]
    stated = forms.form(source) == forms.SAFETENSORS
    checksums = safetensors.read_index(source).checksums if stated else {}
    if form == forms.SAFETENSORS:
        outputs = [_safe_output(*item) for item in safetensors.layout(records).items()]
    else:
        outputs = [Output(f"{forms.FOLDER}/{r.file}", [r], r.size) for r in records]
    with _writing(target):
        for name in _COPIED:  # before anything in DST is changed
            with (
                contextlib.suppress(FileNotFoundError),
                atomic.open_regular(os.path.join(source, name)),
            ):
                pass
        identity = _identity(source, form, located, group)
        leaves = dict(zip(names, stored, strict=True))
        job = Job(
            source, target, form, overwrite, records, leaves, located, checksums, outputs, identity,
            group,
        )  # fmt: skip
        _check_target(job)
    return job


def _check_types(source: str, form: str, shapes: layout.LeafTree, group: int | None) -> None:
    """Raise CheckpointError unless the form can hold the experts, and groups fit them."""
    experts = [
        leaf for name, leaves in shapes.items() if EXPERTS in name for leaf in leaves.values()
    ]
    small = any(isinstance(leaf, QuantizedWeight4bit) for leaf in experts)
    if small and form == forms.RELEASED:
        got, remedy = "experts of 4 bits", "convert the checkpoint that they were made from"
        raise error(source, "int8 or floats, as the released form can hold", got, remedy)
    if group is None:
        return
    if not experts:
        got, remedy = "a model without a mixture", "leave out --experts"
        raise error(source, "experts to round to 4 bits", got, remedy)
    if small:
        remedy = "convert the checkpoint that they were made from"
        raise error(source, "experts of 8 bits or floats", "experts of 4 bits", remedy)
    rows = {leaf.shape[-2] for leaf in experts}
    if group < 2 or group % 2 or any(n % group for n in rows):
        common = math.gcd(*rows)
        fitting = [n for n in GROUPS if common % n == 0] or [
            n for n in (2, 4, 8, 16) if common % n == 0
        ]
        expected = f"an even group that divides {' and '.join(map(str, sorted(rows)))} rows"
        raise error(source, expected, f"{group}", f"give --group one of {fitting}")


def _in_4_bits(record: TensorFile, group: int) -> TensorFile:
    """Return a parameter as it is written; only those of experts change."""
    if EXPERTS not in f"{record.module}/":
        return record
    shape = record.leaf.shape
    leaf = shape_in_4_bits(shape, shape[-2] // group)
    assert leaf is not None
    return dataclasses.replace(record, leaf=leaf, size=0)


def _locate(directory: Directory, records: list[TensorFile]) -> dict[str, pickle_file.Located]:
    """Return the location of each tensor in a checkpoint of either form; checks all headers."""
    return _tensors(records, layout.check_files(directory, records))


def _tensors(records: list[TensorFile], leaves: list[StoredLeaf]) -> dict[str, pickle_file.Located]:
    """Return the location of each tensor of these parameters."""
    located: dict[str, pickle_file.Located] = {}
    for record, leaf in zip(records, leaves, strict=True):
        located |= safetensors.tensors(record, leaf)
    return located


def _safe_output(file: str, members: list[TensorFile]) -> Output:
    arrays = [array for record in members for array in safetensors.tensors(record).values()]
    size = sum(map(pickle_file.nbytes, arrays)) + _HEADER * len(arrays)
    return Output(file, members, size)


def _identity(
    source: str, form: str, located: Mapping[str, pickle_file.Located], group: int | None
) -> str:
    """Return a digest of the source: names, sizes, times and samples of all files.

    Sizes and times of the tensors' files are those from when their headers were checked.
    """
    stamps = {array.path: array.stamp for array in located.values()}
    paths = stamps.keys() | {os.path.join(source, name) for name in (*_COPIED, forms.INDEX)}
    seen: list[object] = [form, group, layout.read_config(source), forms.samples(source)]
    for path in sorted(paths):
        with contextlib.suppress(FileNotFoundError):
            # Without the device number, which may differ after a reboot.
            name, stamp = os.path.relpath(path, source), stamps.get(path) or atomic.stamp(path)
            seen.append([name, stamp.size, stamp.changed])
    return _digest(seen)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _check_target(job: Job) -> None:
    """Raise CheckpointError if DST is unsuitable or holds files that would be left over."""
    target, source = os.path.realpath(job.target), os.path.realpath(job.source)
    files = os.path.realpath(os.path.join(source, forms.FOLDER))
    if target == source or os.path.commonpath([target, files]) == files:
        got = "the source itself" if target == source else "a part of the source"
        raise error(job.target, "another directory than the source", got, "name another one")
    work = os.path.join(target, forms.WORK)
    if any(os.path.commonpath([work, path]) == work for path in (source, files)):
        remedy = f"move it out of {forms.WORK}, which is removed at the end"
        raise error(job.source, "a source outside of the target's own files", work, remedy)
    if os.path.lexists(job.target) and not os.path.isdir(job.target):
        remedy = "name a directory, which need not exist"
        raise error(job.target, "a directory to write to", "something else", remedy)
    for folder in (forms.WORK, forms.FOLDER):
        atomic.require_plain(os.path.join(job.target, folder), folder=True)
    state = os.path.join(forms.WORK, _STATE)
    for file in (*(output.file for output in job.outputs), forms.INDEX, *_COPIED, state):
        atomic.require_plain(os.path.join(job.target, file))
    _check_index(job)
    other = forms.FOLDER if job.form == forms.SAFETENSORS else forms.INDEX
    left = [
        name for name in (other, forms.SAVING) if os.path.lexists(os.path.join(job.target, name))
    ]
    with contextlib.suppress(FileNotFoundError):
        left += sorted(_tensor_files(job) - {output.file for output in job.outputs})
    for name in _COPIED:
        own, others = (os.path.join(folder, name) for folder in (job.source, job.target))
        if os.path.lexists(others) and not os.path.lexists(own):
            left.append(name)
    if left:
        got = f"{len(left)} of another one that would be left over"
        remedy = "remove what is there, or name another directory"
        where = os.path.join(job.target, left[0])
        raise error(where, "only files that the new checkpoint replaces", got, remedy)
    _check_replaced(job)


def _check_replaced(job: Job) -> None:
    """Raise CheckpointError if another program's file, or a checkpoint unasked, is replaced."""
    if _is_ours(job):
        under_way = os.path.lexists(os.path.join(job.target, forms.WORK))
        if not (job.overwrite or under_way):
            remedy = "name another directory, or give --overwrite to replace it"
            raise error(job.target, "a directory without a checkpoint", "one that has one", remedy)
        return
    for name in (*(output.file for output in job.outputs), *_COPIED):
        own, others = (os.path.join(folder, name) for folder in (job.source, job.target))
        same = name in _COPIED and os.path.lexists(own) and os.path.lexists(others)
        if os.path.lexists(others) and not (same and filecmp.cmp(own, others, shallow=False)):
            remedy = "move it elsewhere, or name another directory"
            raise error(others, "no file, or the source's own", "another program's", remedy)


def _is_ours(job: Job) -> bool:
    """Return whether DST holds a checkpoint, or a part of one, which is replaced completely."""
    if os.path.lexists(os.path.join(job.target, forms.INDEX)):
        return True
    with contextlib.suppress(OSError, TypeError, ValueError):
        if _fields_of_state(job).keys() >= {"identity", "files", "checksums"}:
            return True
    first = os.path.join(job.target, forms.FOLDER, "tensor00000_000")
    with contextlib.suppress(OSError, pickle_file.LayoutError), atomic.open_regular(first) as file:
        pickle_file.read_header(file, os.fstat(file.fileno()).st_size)
        return True
    return False


def _check_index(job: Job) -> None:
    """Raise CheckpointError if DST has an index that another program wrote."""
    path = os.path.join(job.target, forms.INDEX)
    if os.path.lexists(path) and not safetensors.is_own_index(job.target):
        remedy = "name another directory, or remove it"
        raise error(path, "no index, or one of this program", "another program's", remedy)


def _tensor_files(job: Job) -> set[str]:
    """Return the tensor files in DST that are of the output's form."""
    if job.form == forms.SAFETENSORS:
        return {name for name in os.listdir(job.target) if name.endswith(".safetensors")}
    folder = os.path.join(job.target, forms.FOLDER)
    return {f"{forms.FOLDER}/{name}" for name in layout.tensor_names(folder)}


def _check_space(job: Job, state: State | None) -> None:
    """Raise CheckpointError if the disk has too little space for the remaining files."""
    needed = largest = 0
    for name in _COPIED:
        with contextlib.suppress(FileNotFoundError):
            needed += os.stat(os.path.join(job.source, name)).st_size
    for output in job.outputs:
        if state is None or not _finished(job, state, output):
            with contextlib.suppress(FileNotFoundError):
                old = os.stat(os.path.join(job.target, output.file)).st_size
                needed, largest = needed - old, max(largest, old)
            needed += output.size
    free = shutil.disk_usage(job.target).free
    if needed + largest > free:
        raise error(
            job.target,
            f"{needed + largest:,} bytes of free disk space",
            f"{free:,} bytes",
            "free some space, or name a directory on another disk",
        )


@contextlib.contextmanager
def _writing(target: str) -> Iterator[None]:
    """Turn an OSError into a CheckpointError of one sentence."""
    try:
        yield
    except OSError as problem:
        got = f"an error ({problem.strerror or problem})"
        remedy = "fix that and start the same command again: it continues from there"
        where = os.fspath(problem.filename or target)
        raise error(where, "files that can be read and written", got, remedy) from problem


@contextlib.contextmanager
def _working(job: Job) -> Iterator[str]:
    """Make and lock DST/.converting; after an error it is kept if it has a state."""
    work = os.path.join(job.target, forms.WORK)
    state = os.path.join(work, _STATE)
    os.makedirs(job.target, exist_ok=True)
    with forms.only_writer(job.target):
        _check_target(job)  # again: another program may have added something
        atomic.make_folder(work)
        _check_work(job, work)
        _clean(job, work)
        try:
            yield work
        except BaseException:
            _clean(job, work)
            if not os.path.lexists(state):
                with contextlib.suppress(OSError):
                    os.rmdir(work)
            raise
        atomic.remove(state)
        os.rmdir(work)


def _temporary_names(job: Job) -> set[str]:
    """Return the names that files have in DST/.converting while they are being written."""
    outputs = {os.path.basename(output.file) for output in job.outputs}
    return outputs | {*_COPIED, forms.INDEX, os.path.basename(atomic.partial(_STATE))}


def _check_work(job: Job, work: str) -> None:
    """Raise CheckpointError if DST/.converting holds files that this conversion does not write."""
    others = sorted(set(os.listdir(work)) - _temporary_names(job) - {_STATE})
    if others:
        got = f"{len(others)} of another name"
        remedy = "move what is there elsewhere, or name another directory"
        where = os.path.join(work, others[0])
        raise error(where, "only files of an unfinished conversion", got, remedy)


def _clean(job: Job, work: str) -> None:
    """Remove unfinished files, perhaps of a process that was killed."""
    for name in _temporary_names(job):
        path = os.path.join(work, name)
        atomic.require_plain(path)
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def _read_state(job: Job) -> State | None:
    """Return the state of an earlier call with the same source, or None."""
    try:
        state = _load_state(job)
    except FileNotFoundError:
        return None
    except (TypeError, ValueError):
        path = os.path.join(job.target, forms.WORK, _STATE)
        _log.warning("%s is damaged: starting over", path)
        return None
    if state.identity != job.identity:
        _log.warning("%s is not the source of %s: starting over", job.source, job.target)
        return None
    return state


def _load_state(job: Job) -> State:
    """Return the state in DST. Raises OSError, TypeError or ValueError."""
    fields = _fields_of_state(job)
    if fields.pop("digest", None) != _digest(fields):
        raise ValueError("expected another digest")
    return State(**fields)


def _fields_of_state(job: Job) -> dict[str, Any]:
    with atomic.open_regular(os.path.join(job.target, forms.WORK, _STATE)) as file:
        # A longer file is cut here, and is then not valid JSON.
        fields: Any = read_json(file.read(_MAX_STATE_BYTES))
    return dict(fields)


def _begin(job: Job, work: str) -> State:
    """Start a new state, discarding that of an earlier conversion."""
    state = State(job.identity, {}, {})
    _write_state(work, state)
    atomic.remove(os.path.join(job.target, forms.INDEX))
    return state


def _write_state(work: str, state: State) -> None:
    fields = dataclasses.asdict(state)
    text = json.dumps(fields | {"digest": _digest(fields)})
    atomic.write(os.path.join(work, _STATE), [text.encode()])


def _put(job: Job, work: str, name: str, contents: Iterable[bytes]) -> None:
    """Write a small file of DST."""
    temporary = os.path.join(work, name)
    atomic.write(os.path.join(job.target, name), contents, temporary)


def _copy(job: Job, work: str, name: str) -> None:
    path = os.path.join(job.source, name)
    if os.path.lexists(path):
        with atomic.open_regular(path) as file:
            text = file.read(forms.MAX_TOKENIZER_BYTES + 1)
        if len(text) > forms.MAX_TOKENIZER_BYTES:
            remedy = "take the file that came with the checkpoint"
            raise error(path, f"at most {forms.MAX_TOKENIZER_BYTES} bytes", "more", remedy)
        _put(job, work, name, [text])


def _stamp(path: str) -> list[int]:
    status = os.lstat(path)
    return [status.st_size, status.st_mtime_ns]


def _finished(job: Job, state: State, output: Output) -> bool:
    """Return whether an output exists, unchanged since this conversion finished it."""
    path = os.path.join(job.target, output.file)
    stamp = state.files.get(output.file)
    known = stamp is not None and state.checksums.keys() >= set(output.names)
    return known and os.path.isfile(path) and _stamp(path) == stamp


def _write_outputs(job: Job, state: State, work: str, progress: Progress | None) -> None:
    """Write the unfinished files, and record each in the state when it is finished."""
    counter = Counter(job.total, progress)
    with ThreadPoolExecutor(_THREADS) as pool:
        for output in job.outputs:
            if _finished(job, state, output):
                done = (pickle_file.nbytes(job.located[name]) for name in job.sources(output))
                counter.add(sum(done))
                continue
            path = os.path.join(job.target, output.file)
            if job.form == forms.RELEASED:
                atomic.make_folder(os.path.dirname(path))
            state.checksums |= _write_output(job, output, path, work, pool, counter)
            state.files[output.file] = _stamp(path)
            _write_state(work, state)


def _write_output(
    job: Job, output: Output, path: str, work: str, pool: ThreadPoolExecutor, counter: Counter
) -> dict[str, str]:
    """Write one file; return the checksums of its tensors, computed from the source."""
    futures = {
        # While writing: both read the same pages of the source while they are in memory.
        name: pool.submit(safetensors.checksum, job.located[name], name, counter.add)
        for name in job.sources(output)
    }
    made = {
        name: array
        for record in output.members
        if isinstance(record.leaf, QuantizedWeight4bit)
        for name, array in _make_4_bits(job, record).items()
    }
    pieces = {
        name: [made[name]] if name in made else values.read_pieces(job.located[name], name)
        for name in output.names
    }
    temporary = os.path.join(work, os.path.basename(path))
    if job.form == forms.SAFETENSORS:
        arrays = {name: made[name] if name in made else job.located[name] for name in output.names}
        atomic.fill(temporary, safetensors.contents(arrays, pieces))
    else:
        (record,) = output.members
        atomic.fill(temporary, pickle_file.join(record.leaf, pieces.values()))
    checksums = {name: future.result() for name, future in futures.items()}
    for name, found in checksums.items():
        if job.checksums.get(name, found) != found:
            raise _mismatch(name, job.located[name], job.checksums[name], found)
    atomic.place(temporary, path)
    checksums |= {name: safetensors.checksum_of([array]) for name, array in made.items()}
    return {name: checksums[name] for name in output.names}


def _make_4_bits(job: Job, record: TensorFile) -> dict[str, np.ndarray]:
    """Return the tensors of a parameter that is rounded to 4 bits, or none if it is stored so."""
    leaf = job.stored[record.name]
    if isinstance(leaf, QuantizedWeight4bit):
        return {}
    assert job.group is not None
    names = safetensors.tensors(record)
    return dict(zip(names, in_4_bits(leaf, record.name, job.group), strict=True))


def _mismatch(
    name: str, array: pickle_file.Located, expected: str, got: str
) -> forms.CheckpointError:
    remedy = "the values have changed since they were written: convert or download them again"
    return error(f"{array.path} ({name})", expected, got, remedy)


# ----------------------------------------------------------------------------------------- verify


def verify(
    directory: Directory, shapes: layout.LeafTree, progress: Progress | None = None
) -> tuple[str, list[str]]:
    """Check a checkpoint's headers, that its floats are finite, and its checksums if any.

    shapes: what the files must hold, as in `layout.files`.

    Returns a sentence that says what was checked, and one for each tensor that has changed or has
    values that are not finite. Raises CheckpointError (a ValueError) if the files are not those of
    a checkpoint.
    """
    records = layout.files(shapes)
    located = _locate(directory, records)
    if forms.form(directory) == forms.RELEASED:
        floats = {name: array for name, array in located.items() if values.is_float(array)}
        problems = _verify_tensors(floats, {}, progress)
        return (
            f"{directory}: the names, sizes and headers of {len(records)} files with "
            f"{sum(record.size for record in records):,} bytes are right, and "
            f"{len(floats) - len(problems)} of {len(floats)} float tensors are finite; this form "
            f"holds no checksums of the values: python checkpoint.py convert {directory} DST --to "
            "safetensors writes one that does"
        ), problems
    checksums = safetensors.read_index(directory).checksums
    problems = _verify_tensors(located, checksums, progress)
    files = len({array.path for array in located.values()})
    size = sum(map(pickle_file.nbytes, located.values()))
    right = len(located) - len(problems)
    counts = f"{right} of {len(located)} tensors in {files} files with {size:,} bytes"
    return f"{directory}: {counts} have the checksums of the index", problems


def _verify_tensors(
    located: Mapping[str, pickle_file.Located],
    checksums: Mapping[str, str],
    progress: Progress | None,
) -> list[str]:
    """Return a sentence for each tensor that is not finite or has a wrong checksum."""
    counter = Counter(sum(map(pickle_file.nbytes, located.values())), progress)
    problems = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        futures = {
            pool.submit(safetensors.checksum, array, name, counter.add): name
            for name, array in located.items()
        }
        for future in as_completed(futures):
            name = futures[future]
            try:
                found = future.result()
            except forms.CheckpointError as problem:
                problems[name] = str(problem)
            except OSError as problem:
                where, got = f"{located[name].path} ({name})", f"an error ({problem.strerror})"
                remedy = "check its permissions, or download it again"
                problems[name] = str(error(where, "values that can be read", got, remedy))
            else:
                expected = checksums.get(name, found)
                if found != expected:
                    problems[name] = str(_mismatch(name, located[name], expected, found))
    return [problems[name] for name in located if name in problems]

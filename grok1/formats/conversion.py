"""Convert a checkpoint between its forms, and verify checksums.

During a conversion, DST/.converting holds the files that are being written and `state.json`, which
records the source and what is finished. Each finished file is renamed to its final path. If the
command is interrupted, even by a power cut, the same command continues after the last of them.

DST itself may be a link to a directory. A link in DST in place of an output file or directory is
refused: its target does not belong to DST. SRC may contain links, as download caches do.
"""

import contextlib
import dataclasses
import filecmp
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed

from grok1.formats import atomic, forms, layout, mapped, pickle_file, safetensors, values
from grok1.formats.conversion_job import (
    STATE,
    Job,
    Output,
    State,
    digest,
    fields_of_state,
    finished,
    read_state,
    write_state,
)
from grok1.formats.conversion_output import mismatch, write_outputs
from grok1.formats.forms import Directory, TensorFile, error
from grok1.formats.loading import Counter, Progress
from grok1.formats.mapped import EXPERTS
from grok1.formats.pickle_file import StoredLeaf
from grok1.ops.quantization import QuantizedWeight4bit
from grok1.ops.quantize_4bit import shape_in_4_bits

GROUPS = 32, 64, 128  # rows that share a scale, as recommended
_COPIED = ("config.json", "tokenizer.model")
_THREADS = 4  # that compute checksums
_HEADER = 256  # bytes, about, of a tensor in a safetensors header

# ---------------------------------------------------------------------------------------- convert


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
    """Write the checkpoint in `source` to `target` in another form of `forms.FORMS`.

    group: round the experts to 4 bits, with a scale for so many rows of a column; not for the
    released form.

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
        state = read_state(job)
        _check_space(job, state)
        if state is None:
            state = _begin(job, work)
        for name in _COPIED:
            _copy(job, work, name)
        write_outputs(job, state, work, progress)
        _require_unchanged(job)
        if form != forms.RELEASED:
            module = mapped if form == forms.MAPPED else safetensors
            text = module.index_text(job.records, state.checksums)
            _put(job, work, forms.INDEXES[form], [text])
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
    checksums = _stated_checksums(source)
    outputs = _outputs(form, records)
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


def _stated_checksums(directory: Directory) -> Mapping[str, str]:
    """Return the checksums in the index of a checkpoint; none in the released form."""
    form = forms.form(directory)
    return safetensors.read_index(directory, form).checksums if form in forms.INDEXES else {}


def _outputs(form: str, records: list[TensorFile]) -> list[Output]:
    """Return the files of a checkpoint in some form."""
    if form == forms.RELEASED:
        return [Output([f"{forms.FOLDER}/{r.file}"], [r], r.size) for r in records]
    outputs = []
    if form == forms.SAFETENSORS:
        files = safetensors.layout(records)
        outputs = [Output([file], members, 0) for file, members in files.items()]
    else:
        for parameter, stacks in mapped.stacks(records).items():
            members = [r for r in records if f"{r.module}/{r.param}" == parameter]
            members.sort(key=lambda record: record.layer or 0)
            outputs.append(Output([stack.file for stack in stacks], members, 0, stacks))
    header = mapped.HEADER if form == forms.MAPPED else _HEADER
    return [
        dataclasses.replace(output, size=output.nbytes + header * len(output.tensors))
        for output in outputs
    ]


def _identity(
    source: str, form: str, located: Mapping[str, pickle_file.Located], group: int | None
) -> str:
    """Return a digest of the source: names, sizes, times and samples of all files.

    Sizes and times of the tensors' files are those from when their headers were checked.
    """
    stamps = {array.path: array.stamp for array in located.values()}
    names = (*_COPIED, *forms.INDEXES.values())
    paths = stamps.keys() | {os.path.join(source, name) for name in names}
    seen: list[object] = [form, group, layout.read_config(source), forms.samples(source)]
    for path in sorted(paths):
        with contextlib.suppress(FileNotFoundError):
            # Without the device number, which may differ after a reboot.
            name, stamp = os.path.relpath(path, source), stamps.get(path) or atomic.stamp(path)
            seen.append([name, stamp.size, stamp.changed])
    return digest(seen)


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
    state = os.path.join(forms.WORK, STATE)
    for file in (*_output_files(job), *forms.INDEXES.values(), *_COPIED, state):
        atomic.require_plain(os.path.join(job.target, file))
    _check_index(job)
    marks = {forms.RELEASED: forms.FOLDER, **forms.INDEXES}
    unwanted = [mark for form, mark in marks.items() if form != job.form] + [forms.SAVING]
    left = [name for name in unwanted if os.path.lexists(os.path.join(job.target, name))]
    with contextlib.suppress(FileNotFoundError):
        left += sorted(_tensor_files(job) - {*_output_files(job)})
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
    for name in (*_output_files(job), *_COPIED):
        own, others = (os.path.join(folder, name) for folder in (job.source, job.target))
        same = name in _COPIED and os.path.lexists(own) and os.path.lexists(others)
        if os.path.lexists(others) and not (same and filecmp.cmp(own, others, shallow=False)):
            remedy = "move it elsewhere, or name another directory"
            raise error(others, "no file, or the source's own", "another program's", remedy)


def _is_ours(job: Job) -> bool:
    """Return whether DST holds a checkpoint, or a part of one, which is replaced completely."""
    if any(os.path.lexists(os.path.join(job.target, index)) for index in forms.INDEXES.values()):
        return True
    with contextlib.suppress(OSError, TypeError, ValueError):
        if fields_of_state(job).keys() >= {"identity", "files", "checksums"}:
            return True
    first = os.path.join(job.target, forms.FOLDER, "tensor00000_000")
    with contextlib.suppress(OSError, pickle_file.LayoutError), atomic.open_regular(first) as file:
        pickle_file.read_header(file, os.fstat(file.fileno()).st_size)
        return True
    return False


def _check_index(job: Job) -> None:
    """Raise CheckpointError if DST has an index that another program wrote."""
    for index in forms.INDEXES.values():
        path = os.path.join(job.target, index)
        if os.path.lexists(path) and not safetensors.is_own_index(path):
            remedy = "name another directory, or remove it"
            raise error(path, "no index, or one of this program", "another program's", remedy)


def _output_files(job: Job) -> list[str]:
    return [file for output in job.outputs for file in output.files]


def _tensor_files(job: Job) -> set[str]:
    """Return the tensor files in DST that are of the output's form."""
    if job.form != forms.RELEASED:
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
        if state is None or not finished(job, state, output):
            needed += output.size
            for file in output.files:
                with contextlib.suppress(FileNotFoundError):
                    old = os.stat(os.path.join(job.target, file)).st_size
                    needed, largest = needed - old, max(largest, old)
                if output.stacks:
                    with contextlib.suppress(FileNotFoundError):
                        needed -= os.stat(os.path.join(job.target, forms.WORK, file)).st_size
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
    state = os.path.join(work, STATE)
    os.makedirs(job.target, exist_ok=True)
    with forms.only_writer(job.target):
        _check_target(job)  # again: another program may have added something
        atomic.make_folder(work)
        _check_work(job, work)
        _remove(work, _unusable(job, work))
        try:
            yield work
        except BaseException:
            _remove(work, _unusable(job, work))
            if not os.path.lexists(state):
                with contextlib.suppress(OSError):
                    os.rmdir(work)
            raise
        atomic.remove(state)
        os.rmdir(work)


def _temporary_names(job: Job) -> set[str]:
    """Return the names that files have in DST/.converting while they are being written."""
    outputs = {os.path.basename(file) for file in _output_files(job)}
    partial = os.path.basename(atomic.partial(STATE))
    return outputs | {*_COPIED, *forms.INDEXES.values(), partial}


def _check_work(job: Job, work: str) -> None:
    """Raise CheckpointError if DST/.converting holds files that this conversion does not write."""
    others = sorted(set(os.listdir(work)) - _temporary_names(job) - {STATE})
    if others:
        got = f"{len(others)} of another name"
        remedy = "move what is there elsewhere, or name another directory"
        where = os.path.join(work, others[0])
        raise error(where, "only files of an unfinished conversion", got, remedy)


def _unusable(job: Job, work: str) -> set[str]:
    """Return the names of unfinished files from which a conversion cannot continue."""
    names = _temporary_names(job)
    if job.form == forms.MAPPED and os.path.lexists(os.path.join(work, STATE)):
        names -= {*_output_files(job)}
    return names


def _remove(work: str, names: set[str]) -> None:
    """Remove unfinished files, perhaps of a process that was killed."""
    for name in names:
        path = os.path.join(work, name)
        atomic.require_plain(path)
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def _begin(job: Job, work: str) -> State:
    """Start a new state, discarding that of an earlier conversion."""
    _remove(work, _temporary_names(job))
    state = State(job.identity, {}, {})
    write_state(work, state)
    for index in forms.INDEXES.values():
        atomic.remove(os.path.join(job.target, index))
    return state


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
    form = forms.form(directory)
    if form == forms.RELEASED:
        floats = {name: array for name, array in located.items() if values.is_float(array)}
        problems = _verify_tensors(floats, {}, progress)
        return (
            f"{directory}: the names, sizes and headers of {len(records)} files with "
            f"{sum(record.size for record in records):,} bytes are right, and "
            f"{len(floats) - len(problems)} of {len(floats)} float tensors are finite; this form "
            f"holds no checksums of the values: python checkpoint.py convert {directory} DST --to "
            "safetensors writes one that does"
        ), problems
    if form == forms.MAPPED:
        located |= mapped.rounded_table(directory, records)
    checksums = _stated_checksums(directory)
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
                    problems[name] = str(mismatch(name, located[name], expected, found))
    return [problems[name] for name in located if name in problems]

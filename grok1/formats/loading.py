"""Load arrays from files onto devices: in parallel, and with little additional memory.

A slice of an array that is the same on several devices is a `_Part`, and is read once. Parts are
filled piece by piece, the layers of a stacked array in any order. On a CPU, a part is filled in the
host memory where it stays. For other devices, each of a few threads has one small buffer, through
which it copies a piece from the file into an array that is already on the device. No device or
process waits for another: each process reads what its own devices hold. Parts that are columns of
the same rows are filled together: complete rows are read, once.
"""

import contextlib
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from grok1.formats import values
from grok1.formats.pickle_file import Located
from grok1.formats.values import Index

WORKERS = 4
# Of a transfer to a device: a buffer that stays in the processor's cache is read from there.
PIECE_BYTES = 16 << 20
# Norms, routers and scales of all layers: many small transfers would cost more than one.
SMALL_BYTES = 16 << 20

Progress = Callable[[int, int], object]
Key = tuple[str, str, int]  # of an array: module, parameter, and place in the leaf


class Source(NamedTuple):
    """A stored array and its destination.

    array: the key of the array to fill. layer: the layer of it that is stored; None: all of it.
    located: its file, offset, shape and dtype. name: its name in error messages.
    """

    array: Key
    layer: int | None
    located: Located
    name: str


def fill_arrays(
    sources: Sequence[Source],
    wanted: Mapping[Key, jax.ShapeDtypeStruct],
    shardings: Mapping[Key, jax.sharding.Sharding],
    progress: Progress | None = None,
) -> dict[Key, jax.Array]:
    """Read arrays onto devices; each process reads the rows of which its own devices hold a part.

    sources: all layers of all arrays. wanted: the shape [L, ...] or [...] and dtype of each array;
    stored numbers are cast to the dtype. shardings: of each array; none splits a layer axis.
    progress: called as progress(bytes_done, bytes_total), counting what this process reads.

    Raises forms.CheckpointError if a file has changed since its header was read, or holds values
    that are not finite.
    """
    parts = {key: _make_parts(wanted[key], shardings[key]) for key in wanted}
    jobs = [(source, group) for source in sources for group in _groups(parts[source.array])]
    count = Counter(sum(_stored_bytes(*job) for job in jobs), progress)
    _run(functools.partial(_read, count), jobs)
    return {
        key: jax.make_array_from_single_device_arrays(
            wanted[key].shape, shardings[key], [a for part in parts[key] for a in part.finish()]
        )
        for key in wanted
    }


class Counter:
    """A counter of the bytes that several threads have processed, for a Progress."""

    def __init__(self, total: int, progress: Progress | None):
        self.total = total
        self.progress = progress
        self.done = 0
        self.lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """Add to the count."""
        with self.lock:
            self.done += nbytes
            if self.progress is not None:
                self.progress(self.done, self.total)


class _Stopped(Exception):
    """Another thread has failed, or the caller was interrupted."""


def _run(
    work: Callable[[threading.Event, Source, Sequence["_Part"]], None],
    jobs: Iterable[tuple[Source, Sequence["_Part"]]],
) -> None:
    """Call `work(stop, *job)` for all jobs in a few threads; the first failure ends them all."""
    stop = threading.Event()
    executor = ThreadPoolExecutor(WORKERS, thread_name_prefix="loading")
    try:
        for future in as_completed([executor.submit(work, stop, *job) for job in jobs]):
            future.result()
    except BaseException:
        # Running jobs stop at their next piece; the first exception is the one that is raised.
        stop.set()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------- parts


class _Part:
    """One slice of an array, the same on all of `devices`.

    index: the slice; it covers the complete layer axis.
    """

    def __init__(self, index: Index, devices: Sequence[jax.Device], dtype: np.dtype):
        self.index = index
        self.devices = devices
        self.dtype = dtype

    def room(self, box: Index, dtype: np.dtype) -> np.ndarray | None:
        """Return a C-contiguous view to read this box and dtype into directly, or None."""
        del box, dtype
        return None

    def write(self, piece: np.ndarray, box: Index) -> None:
        """Write values to a box of the slice."""
        raise NotImplementedError

    def finish(self) -> list[jax.Array]:
        """Return the slice, on each of the devices."""
        raise NotImplementedError


class _HostPart(_Part):
    """A part that is filled on the host, and then transferred to its devices at once."""

    def __init__(
        self, index: Index, devices: Sequence[jax.Device], shape: tuple[int, ...], dtype: np.dtype
    ):
        super().__init__(index, devices, dtype)
        self.values = aligned_empty(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    def room(self, box: Index, dtype: np.dtype) -> np.ndarray | None:
        found = self.values[box + (...,)]
        return found if found.flags.c_contiguous and found.dtype == dtype else None

    def write(self, piece: np.ndarray, box: Index) -> None:
        self.values[box + (...,)] = piece

    def finish(self) -> list[jax.Array]:
        # A CPU device uses aligned memory without a copy.
        return [jax.device_put(self.values, device) for device in self.devices]


class _DevicePart(_Part):
    """A part that is allocated on its devices, and filled there."""

    def __init__(
        self, index: Index, devices: Sequence[jax.Device], shape: tuple[int, ...], dtype: np.dtype
    ):
        super().__init__(index, devices, dtype)
        self.lock = threading.Lock()
        self.values = [jnp.zeros(shape, dtype, device=device) for device in devices]

    def write(self, piece: np.ndarray, box: Index) -> None:
        piece = np.asarray(piece, order="C")
        where = np.array([own.start for own in box], np.int32)
        with self.lock:
            self.values = [
                _set_piece(value, jax.device_put(piece, device), where)
                for value, device in zip(self.values, self.devices, strict=True)
            ]
            # After this the buffer can be reused; at most one piece per thread is in transfer.
            jax.block_until_ready(self.values)

    def finish(self) -> list[jax.Array]:
        return self.values


@functools.partial(jax.jit, donate_argnums=0)
def _set_piece(values: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    """Write the piece into `values` at `start`, in place."""
    return lax.dynamic_update_slice(values, piece, tuple(start))


_local = threading.local()


def _buffer() -> np.ndarray:
    """Return this thread's own buffer of PIECE_BYTES."""
    if not hasattr(_local, "buffer"):
        _local.buffer = aligned_empty(PIECE_BYTES)
    return _local.buffer


def aligned_empty(nbytes: int) -> np.ndarray:
    """Return an uninitialized uint8 array of `nbytes` bytes, aligned as XLA requires."""
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes]


def on_large_pages(array: jax.Array) -> jax.Array:
    """Copy an array of a CPU to memory that is read faster: NumPy asks for large pages."""
    memory = aligned_empty(array.nbytes).view(array.dtype).reshape(array.shape)
    memory[...] = array
    return jax.device_put(memory, array.sharding)


def _make_parts(array: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> list[_Part]:
    """Return the parts of an array that this process's devices hold."""
    groups: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(array.shape).items():
        slices = zip(index or (), array.shape, strict=True)
        bounds = tuple(where.indices(size)[:2] for where, size in slices)
        groups.setdefault(bounds, []).append(device)
    shape, dtype = sharding.shard_shape(array.shape), np.dtype(array.dtype)
    small = math.prod(shape) * dtype.itemsize <= SMALL_BYTES
    return [
        (_HostPart if small or _on_host(devices) else _DevicePart)(
            tuple(slice(*bound) for bound in bounds), devices, shape, dtype
        )
        for bounds, devices in groups.items()
    ]


def _on_host(devices: Sequence[jax.Device]) -> bool:
    return all(device.platform == "cpu" for device in devices)


# ----------------------------------------------------------------------------------------- reading


def _groups(parts: Sequence[_Part]) -> list[list[_Part]]:
    """Group parts that differ only in the last axis of their slice."""
    groups: dict[str, list[_Part]] = {}
    for part in parts:
        groups.setdefault(str(part.index[:-1]), []).append(part)
    return list(groups.values())


def _read(count: Counter, stop: threading.Event, source: Source, group: Sequence[_Part]) -> None:
    """Read one source's share of a group of parts, piece by piece.

    Raises forms.CheckpointError if the file has changed since its header was read, or holds values
    that are not finite.
    """
    with contextlib.ExitStack() as opened:
        with _unchanged(source):
            file = opened.enter_context(values.open_values(source.located, source.name))
        for box in _boxes(source, group):
            if stop.is_set():
                raise _Stopped
            _read_piece(file, source, group, box, count)


@contextlib.contextmanager
def _unchanged(source: Source) -> Iterator[None]:
    """Turn an OSError into a CheckpointError: a file whose header was read has changed."""
    try:
        yield
    except OSError as error:
        raise values.changed(source.located, source.name, error.strerror) from error


def _read_piece(
    file: BinaryIO, source: Source, group: Sequence[_Part], box: Index, count: Counter
) -> None:
    """Read a box of a stored array, and write its share to each part of a group."""
    layer = () if source.layer is None else (slice(source.layer, source.layer + 1),)
    shares = []
    for part in group:
        index = _own(source, part)
        share = tuple(map(_overlap, box, index))
        if all(where.start < where.stop for where in share):
            shares.append((part, share, (*layer, *_within(share, index))))
    if not shares:
        return
    part, share, place = shares[0]
    dtype, shape = jnp.dtype(source.located.dtype), _sizes(box)
    # Read directly into the part if possible, otherwise through a buffer.
    room = part.room(place, dtype) if len(shares) == 1 and share == box else None
    if room is None:
        read = _buffer()[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
    else:
        read = room.reshape(shape)
    with _unchanged(source):
        values.read_box(file, source.located, box, read)
    values.require_finite(read, source.located, source.name)
    for part, share, place in shares:
        piece = read[_within(share, box)]
        if room is None:
            part.write(_cast(piece, part.dtype, source)[(None,) * len(layer)], place)
        count.add(piece.nbytes)


def _cast(piece: np.ndarray, dtype: np.dtype, source: Source) -> np.ndarray:
    """Cast values to the wanted dtype, in which they must be finite, too."""
    if piece.dtype == dtype:
        return piece
    with np.errstate(over="ignore"):
        cast = piece.astype(dtype)
    values.require_finite(cast, source.located, source.name)
    return cast


def _boxes(source: Source, group: Sequence[_Part]) -> Iterator[Index]:
    """Yield the complete rows of a stored array that a group's parts share, in pieces."""
    shape, index = source.located.shape, _own(source, group[0])
    rows = (*index[:-1], slice(0, shape[-1])) if shape else ()
    for piece in _pieces(_sizes(rows), jnp.dtype(source.located.dtype).itemsize):
        yield tuple(
            slice(row.start + where.start, row.start + where.stop)
            for row, where in zip(rows, piece, strict=True)
        )


def _own(source: Source, part: _Part) -> Index:
    """Return the box of a stored array that a part holds: its slice without the layer axis."""
    return part.index[len(part.index) - len(source.located.shape) :]


def _sizes(box: Index) -> tuple[int, ...]:
    return tuple(where.stop - where.start for where in box)


def _overlap(one: slice, other: slice) -> slice:
    return slice(max(one.start, other.start), min(one.stop, other.stop))


def _within(box: Index, outer: Index) -> Index:
    """Return a box relative to an outer one."""
    pairs = zip(box, outer, strict=True)
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in pairs)


def _stored_bytes(source: Source, group: Sequence[_Part]) -> int:
    """Return how many bytes of a group of parts come from this source."""
    itemsize = jnp.dtype(source.located.dtype).itemsize
    return sum(math.prod(_sizes(_own(source, part))) * itemsize for part in group)


def _pieces(shape: tuple[int, ...], itemsize: int) -> Iterable[Index]:
    """Cut an array into pieces of at most PIECE_BYTES, in memory order.

    They have about equal sizes, so that one or two compiled programs write them all.
    """
    cuts: list[list[slice]] = []
    for axis, size in enumerate(shape):
        row = math.prod(shape[axis + 1 :]) * itemsize
        # This axis is cut only if the previous axis was cut into single rows.
        whole = not cuts or len(cuts[-1]) == shape[axis - 1]
        most = max(1, PIECE_BYTES // row) if whole else size
        step = math.ceil(size / math.ceil(size / most))
        cuts.append([slice(i, min(i + step, size)) for i in range(0, size, step)])
    return itertools.product(*cuts)

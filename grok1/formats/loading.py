"""From mapped files to devices: in parallel, and with little memory beside the parameters.

What lies alike on several devices is a `_Part` of an array: one slice, read once. Parts are filled
piece by piece, the layers of a stacked array in any order. A CPU's memory is the host's, so there a
part is filled where it stays. For any other device each of a few threads has one small buffer, and
a piece goes from the file through it into its place in an array that is already on the device. No
device waits for another, and no process for another: each reads what its own devices hold.
"""

import functools
import itertools
import math
import mmap
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from grok1.formats import atomic, forms
from grok1.formats.pickle_file import Located

WORKERS = 4
# On the way to a device; a buffer that stays in the processor's cache is read back from there.
PIECE_BYTES = 16 << 20
# The norms, routers and scales of all layers: as many small transfers would cost more than one.
SMALL_BYTES = 16 << 20

Progress = Callable[[int, int], object]
Index = tuple[slice, ...]


class Source(NamedTuple):
    """Where one stored array comes from and goes to.

    array: the key of the array that it is, or is a layer of. layer: which, None if it is all of it.
    located: its file, offset, shape and dtype. name: what errors call it.
    """

    array: Any
    layer: int | None
    located: Located
    name: str


def fill_arrays(
    sources: Sequence[Source],
    wanted: Mapping[Any, jax.ShapeDtypeStruct],
    shardings: Mapping[Any, jax.sharding.Sharding],
    progress: Progress | None = None,
) -> dict[Any, jax.Array]:
    """Read arrays onto devices; each process reads only what its own devices hold.

    sources: all layers of all arrays. wanted: the shape [L, ...] or [...] and dtype of each, the
    stored numbers being cast to it. shardings: where each lies; none splits a layer axis.
    progress: called as progress(bytes_done, bytes_total), of those that this process reads.

    Raises forms.CheckpointError if a file has changed since its header was read.
    """
    parts = {key: _make_parts(wanted[key], shardings[key]) for key in wanted}
    jobs = [(source, part) for source in sources for part in parts[source.array]]
    count = Counter(sum(_stored_bytes(source, part) for source, part in jobs), progress)
    _run(functools.partial(_read, count), jobs)
    return {
        key: jax.make_array_from_single_device_arrays(
            wanted[key].shape, shardings[key], [a for part in parts[key] for a in part.finish()]
        )
        for key in wanted
    }


class Counter:
    """Adds up the bytes that several threads have done, for a Progress."""

    def __init__(self, total: int, progress: Progress | None):
        self.total = total
        self.progress = progress
        self.done = 0
        self.lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """Count so many bytes more."""
        with self.lock:
            self.done += nbytes
            if self.progress is not None:
                self.progress(self.done, self.total)


class _Stopped(Exception):
    """Another thread has failed, or the caller was interrupted."""


def _run(work: Callable[..., None], jobs: Iterable[tuple[Any, ...]]) -> None:
    """Call `work(stop, *job)` for all jobs in a few threads; the first failure ends them all."""
    stop = threading.Event()
    executor = ThreadPoolExecutor(WORKERS, thread_name_prefix="loading")
    try:
        for future in [executor.submit(work, stop, *job) for job in jobs]:
            future.result()
    except BaseException:
        # Those that run end at their next piece, and the first exception is the one to tell.
        stop.set()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------- parts


class _Part:
    """One slice of an array, alike on all of `devices`.

    index: the slice, without the layer axis.
    """

    def __init__(self, index: Index, devices: Sequence[jax.Device]):
        self.index = index
        self.devices = devices


class _HostPart(_Part):
    """A part that is filled on the host, and handed to its devices as a whole."""

    def __init__(self, index: Index, devices: Sequence[jax.Device], shape: Any, dtype: Any):
        super().__init__(index, devices)
        self.values = aligned_empty(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    def write(self, stored: np.ndarray, start: tuple[int, ...]) -> None:
        where = tuple(slice(a, a + n) for a, n in zip(start, stored.shape, strict=True))
        np.copyto(self.values[where], stored, casting="unsafe")

    def finish(self) -> list[jax.Array]:
        # A CPU takes aligned memory as it is, without a copy.
        return [jax.device_put(self.values, device) for device in self.devices]


class _DevicePart(_Part):
    """A part that lies on its devices from the start, and is filled there."""

    def __init__(self, index: Index, devices: Sequence[jax.Device], shape: Any, dtype: Any):
        super().__init__(index, devices)
        self.dtype = dtype
        self.lock = threading.Lock()
        self.values = [jnp.zeros(shape, dtype, device=device) for device in devices]

    def write(self, stored: np.ndarray, start: tuple[int, ...]) -> None:
        piece = _buffer()[: stored.size * self.dtype.itemsize]
        piece = piece.view(self.dtype).reshape(stored.shape)
        np.copyto(piece, stored, casting="unsafe")
        where = np.array(start, np.int32)
        with self.lock:
            self.values = [
                _set_piece(value, jax.device_put(piece, device), where)
                for value, device in zip(self.values, self.devices, strict=True)
            ]
            # The buffer is free again, and no more than one piece a thread is on its way.
            jax.block_until_ready(self.values)

    def finish(self) -> list[jax.Array]:
        return self.values


@functools.partial(jax.jit, donate_argnums=0)
def _set_piece(values: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    """Replace what lies at `start` by the piece, in place."""
    return lax.dynamic_update_slice(values, piece, tuple(start))


_local = threading.local()


def _buffer() -> np.ndarray:
    """Return this thread's own buffer of PIECE_BYTES."""
    if not hasattr(_local, "buffer"):
        _local.buffer = aligned_empty(PIECE_BYTES)
    return _local.buffer


def aligned_empty(nbytes: int) -> np.ndarray:
    """Return so many bytes, aligned as XLA wants them, uint8."""
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes]


def _make_parts(array: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> list[Any]:
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


def _read(count: Counter, stop: threading.Event, source: Source, part: Any) -> None:
    """Read one source's share of a part, piece by piece."""
    stored = map_array(source.located, source.name)
    first: tuple[int, ...] = () if source.layer is None else (source.layer,)
    stored = stored[part.index[len(first) :]]
    for start in _pieces(stored.shape, stored.dtype.itemsize):
        if stop.is_set():
            raise _Stopped
        piece = stored[start]
        at = tuple(where.start for where in start)
        part.write(piece[(None,) * len(first)], (*first, *at))
        count.add(piece.nbytes)


def _stored_bytes(source: Source, part: Any) -> int:
    """Return the bytes of a part that come from this source."""
    shape = source.located.shape
    index = part.index[len(part.index) - len(shape) :]
    numbers = math.prod(len(range(n)[where]) for n, where in zip(shape, index, strict=True))
    return numbers * jnp.dtype(source.located.dtype).itemsize


def map_array(located: Located, name: str) -> np.ndarray:
    """Return a stored array as it lies in its file; `name` is what errors call it.

    Raises forms.CheckpointError if the file has changed since its header was read.
    """
    try:
        with atomic.open_regular(located.path) as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        memory.madvise(mmap.MADV_SEQUENTIAL)
        numbers = math.prod(located.shape)
        flat = np.frombuffer(memory, jnp.dtype(located.dtype), numbers, located.offset)
    except (OSError, ValueError) as error:
        where, got = f"{located.path} ({name})", f"one that changed ({error})"
        remedy = "start again when nothing else writes to it"
        raise forms.error(where, "the file that was checked", got, remedy) from error
    return flat.reshape(located.shape)


def _pieces(shape: tuple[int, ...], itemsize: int) -> Iterable[Index]:
    """Cut an array into pieces of at most PIECE_BYTES, in the order of memory.

    Of about equal size, so that one or two compiled programs place them all.
    """
    cuts: list[list[slice]] = []
    for axis, size in enumerate(shape):
        row = math.prod(shape[axis + 1 :]) * itemsize
        # Rows of the axes before this one are cut one by one if they are too large.
        whole = not cuts or len(cuts[-1]) == shape[axis - 1]
        most = max(1, PIECE_BYTES // row) if whole else size
        step = math.ceil(size / math.ceil(size / most))
        cuts.append([slice(i, min(i + step, size)) for i in range(0, size, step)])
    return itertools.product(*cuts)

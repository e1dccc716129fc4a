"""Read the values of stored arrays from their files, a box or a piece at a time.

Uses read calls, not a memory map: if another program truncated a mapped file, the process would be
killed.
"""

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator
from typing import BinaryIO

import ml_dtypes
import numpy as np

from grok1.formats import atomic, forms
from grok1.formats.pickle_file import Array, Located, nbytes

Index = tuple[slice, ...]

_PIECE_BYTES = 4 << 20


@contextlib.contextmanager
def open_values(array: Located, name: str) -> Iterator[BinaryIO]:
    """Open the file of an array for sequential reading.

    Raises OSError if it cannot be opened. Raises CheckpointError, in which the array is called
    `name`, if the file has changed since its header was read, also if it has when the block ends.
    """
    with atomic.open_regular(array.path) as file:
        require_unchanged(file, array, name)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), array.offset, nbytes(array), os.POSIX_FADV_SEQUENTIAL)
        yield file
        require_unchanged(file, array, name)


def require_unchanged(file: BinaryIO, array: Located, name: str) -> None:
    """Raise CheckpointError if the file of an array has changed since its header was read."""
    if atomic.stamp(file.fileno()) != array.stamp:
        raise changed(array, name)


def changed(array: Located, name: str, how: str | None = None) -> forms.CheckpointError:
    """Return the error for an array's file that was changed; `how`: details, if known."""
    got = f"one that changed ({how})" if how else "one that changed"
    remedy = "start again when nothing else writes to it"
    return forms.error(f"{array.path} ({name})", "the file that was checked", got, remedy)


def read_box(file: BinaryIO, array: Located, box: Index, out: np.ndarray) -> None:
    """Read a box of an array, of the shape of `out`, into `out`, which is in C order.

    Raises OSError if the file ends too early, for example if it was truncated after the check.
    """
    shape, itemsize = array.shape, out.itemsize
    whole = len(shape)  # the axes from here on are read completely
    while whole and (box[whole - 1].start, box[whole - 1].stop) == (0, shape[whole - 1]):
        whole -= 1
    leading = box[: max(0, whole - 1)]
    rows = [math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape))]
    first = sum(where.start * row for where, row in zip(box, rows, strict=True))
    steps = [range(0, (w.stop - w.start) * row, row) for w, row in zip(leading, rows, strict=False)]
    target = out.reshape(-1).view(np.uint8).data
    length = len(target) // max(1, math.prod(map(len, steps)))
    for number, step in enumerate(itertools.product(*steps)):
        file.seek(array.offset + first + sum(step))
        got = file.readinto(target[number * length : (number + 1) * length])  # type: ignore[attr-defined]
        if got != length:
            raise OSError(None, f"it ends {length - got} bytes too early", array.path)


def read_pieces(array: Located, name: str) -> Iterator[np.ndarray]:
    """Yield all values of an array, flat, in pieces; the next piece overwrites the previous one.

    Raises OSError if the file cannot be read to the array's end. Raises CheckpointError, in which
    the array is called `name`, if it has changed since its header was read, or is not finite.
    """
    dtype = np.dtype(array.dtype)
    flat = dataclasses.replace(array, shape=(math.prod(array.shape),))
    most = _PIECE_BYTES // dtype.itemsize
    buffer = np.empty(min(most, flat.shape[0]), dtype)
    with open_values(array, name) as file:
        for start in range(0, flat.shape[0], most):
            stop = min(start + most, flat.shape[0])
            piece = buffer[: stop - start]
            read_box(file, flat, (slice(start, stop),), piece)
            require_finite(piece, array, name)
            yield piece


def require_finite(values: np.ndarray, array: Located, name: str) -> None:
    """Raise CheckpointError if values of an array, perhaps cast, are not all finite."""
    if not _all_finite(values):
        with np.errstate(invalid="ignore"):  # which a bfloat16 NaN would set
            bad = values[~np.isfinite(values)].flat[0]
        expected = "finite numbers"
        if values.dtype != array.dtype:
            expected += f" in {values.dtype}"
        remedy = "the model cannot compute with that: download the file again, or save it again"
        raise forms.error(f"{array.path} ({name})", expected, str(bad), remedy)


def is_float(array: Array) -> bool:
    """Return whether an array's dtype can hold values that are not finite."""
    dtype = np.dtype(array.dtype)
    return dtype == ml_dtypes.bfloat16 or dtype.kind == "f"


def _all_finite(values: np.ndarray) -> bool:
    if values.dtype == ml_dtypes.bfloat16:
        # np.isfinite takes ten times as long for bfloat16.
        return bool(np.max(values.view(np.uint16) & 0x7FFF, initial=0) < 0x7F80)
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())

"""Read the values of stored arrays from their files, a box or a piece at a time.

With read calls, never a memory map: a mapped file that another program cuts ends the process.
"""

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from grok1.formats import atomic, forms
from grok1.formats.pickle_file import Located, nbytes

Index = tuple[slice, ...]

_PIECE_BYTES = 4 << 20


@contextlib.contextmanager
def open_values(array: Located, name: str) -> Iterator[BinaryIO]:
    """Open the file of an array, to be read from its beginning to its end.

    Raises OSError if it cannot be opened, CheckpointError, which calls the array `name`, if it is
    not the file whose header was read, or is another one when the block ends.
    """
    with atomic.open_regular(array.path) as file:
        _require_unchanged(file, array, name)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), array.offset, nbytes(array), os.POSIX_FADV_SEQUENTIAL)
        yield file
        _require_unchanged(file, array, name)


def _require_unchanged(file: BinaryIO, array: Located, name: str) -> None:
    if atomic.stamp(file.fileno()) != array.stamp:
        raise changed(array, name)


def changed(array: Located, name: str, how: str | None = None) -> forms.CheckpointError:
    """Return the error that says that the file of an array was changed, perhaps `how`."""
    got = f"one that changed ({how})" if how else "one that changed"
    remedy = "start again when nothing else writes to it"
    return forms.error(f"{array.path} ({name})", "the file that was checked", got, remedy)


def read_box(file: BinaryIO, array: Located, box: Index, out: np.ndarray) -> None:
    """Read a box of an array, of the shape of `out`, into `out`, which is in C order.

    Raises OSError if the file ends too early, as one does that was cut since it was checked.
    """
    shape, itemsize = array.shape, out.itemsize
    whole = len(shape)  # the axes from here on are read as a whole
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
    """Yield all values of an array, flat, piece by piece; each is gone when the next is read.

    Raises OSError if the file cannot be read to the array's end, CheckpointError, which calls it
    `name`, if it has changed since its header was read, or a value is not finite.
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
    """Raise CheckpointError if values that were read from an array, and perhaps cast, aren't."""
    if not _all_finite(values):
        with np.errstate(invalid="ignore"):  # which bfloat16 has of a NaN
            bad = values[~np.isfinite(values)].flat[0]
        expected = "finite numbers"
        if values.dtype != array.dtype:
            expected += f" in {values.dtype}"
        remedy = "the model cannot compute with that: download the file again, or save it anew"
        raise forms.error(f"{array.path} ({name})", expected, str(bad), remedy)


def is_float(array: Any) -> bool:
    """Return whether an array's values could be other than finite."""
    dtype = np.dtype(array.dtype)
    return dtype == ml_dtypes.bfloat16 or dtype.kind == "f"


def _all_finite(values: np.ndarray) -> bool:
    if values.dtype == ml_dtypes.bfloat16:
        # For it np.isfinite takes ten times as long as this.
        return bool(np.max(values.view(np.uint16) & 0x7FFF, initial=0) < 0x7F80)
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())

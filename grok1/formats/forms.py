"""What both forms of a checkpoint share: their records, their errors, and files that stay whole.

A checkpoint DIR comes in one of two forms: RELEASED, with one pickle a parameter and layer in
DIR/ckpt-0 (pickle_file.py), or SAFETENSORS, with one file a layer and the index DIR/INDEX
(safetensors.py). DIR/WORK marks a conversion that has not come to its end (conversion.py).
"""

import dataclasses
import errno
import os
import stat
from collections.abc import Iterable
from typing import Any, BinaryIO

RELEASED, SAFETENSORS = "released", "safetensors"
FOLDER = "ckpt-0"
INDEX = "model.safetensors.index.json"
WORK = ".converting"

Directory = str | os.PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint is not what was asked for: one sentence says where, how, and what to do."""


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """One file of a released checkpoint, as the layout demands it.

    file: its name in ckpt-0, "tensor00003_000".
    name: the parameter that it holds, "transformer/decoder_layer_0/moe/linear_1/w".
    module, param, layer: where that lies in the stacked parameters; layer None if not stacked.
    leaf: the stored array(s): jax.ShapeDtypeStruct, or a QuantizedWeight8bit of two.
    size: its exact length in bytes, as `save` writes it.
    """

    file: str
    name: str
    module: str
    param: str
    layer: int | None
    leaf: Any
    size: int


def error(where: str, expected: str, got: str, remedy: str) -> CheckpointError:
    """Return the error whose sentence says all four."""
    return CheckpointError(f"{where}: expected {expected}, got {got}; {remedy}")


def form(directory: Directory) -> str | None:
    """Return RELEASED or SAFETENSORS, as DIR holds a checkpoint, or None; of both, RELEASED."""
    if os.path.isdir(os.path.join(directory, FOLDER)):
        return RELEASED
    return SAFETENSORS if os.path.isfile(os.path.join(directory, INDEX)) else None


def require_form(directory: Directory, remedy: str) -> str:
    """Return the form of the checkpoint in DIR; raises CheckpointError if there is none."""
    found = form(directory)
    if found is None:
        got = "one with neither" if os.path.isdir(directory) else "no such directory"
        raise error(str(directory), f"a directory that holds {FOLDER} or {INDEX}", got, remedy)
    return found


def open_regular(path: str) -> BinaryIO:
    """Open a regular file. Anything else is an OSError: opening a pipe would wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    return open(path, "rb")


def write(path: str, contents: Iterable[Any], temporary: str | None = None) -> None:
    """Write a file so that it appears whole or not at all.

    temporary: the name until it is whole, on the same disk; by default one beside it. Raises
    OSError, with the temporary file gone and an older file of that name as it was.
    """
    folder, name = os.path.split(path)
    temporary = temporary or os.path.join(folder, f".{name}.partial")
    try:
        fill(temporary, contents)
        place(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def fill(path: str, contents: Iterable[Any]) -> None:
    """Write a file, of which `place` can then make a lasting one."""
    with open(path, "wb") as file:
        for piece in contents:
            file.write(piece)


def place(temporary: str, path: str) -> None:
    """Rename a finished file, once it is safely stored; then its name is, too."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(os.path.dirname(path) or ".")


def remove(path: str) -> None:
    """Remove a file, if it is there, so that it stays removed."""
    if os.path.lexists(path):
        os.remove(path)
        _sync(os.path.dirname(path) or ".")


def _sync(path: str) -> None:
    """Wait until a file, or the names in a directory, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The forms of a checkpoint: how to tell them apart, their records and their errors.

A checkpoint DIR has one of three forms: RELEASED, with one pickle per parameter and layer in
DIR/ckpt-0 (pickle_file.py); SAFETENSORS, with one file per layer and an index (safetensors.py); or
MAPPED, with one file per array of the model and an index (mapped.py). DIR/WORK marks an unfinished
conversion (conversion.py), and DIR/SAVING an unfinished `checkpoint.save`, which may leave files of
two models.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from grok1.formats import atomic

if TYPE_CHECKING:
    from grok1.formats.pickle_file import Leaf

RELEASED, SAFETENSORS, MAPPED = FORMS = "released", "safetensors", "mapped"
FOLDER = "ckpt-0"
INDEX, MAPPED_INDEX = "model.safetensors.index.json", "model.mapped.index.json"
INDEXES = {SAFETENSORS: INDEX, MAPPED: MAPPED_INDEX}
OTHER_CONFIG = "check that config.json is that of this checkpoint; without one, it is Grok-1's"
WORK = ".converting"
SAVING = ".saving"
TENSORS = r"tensor[0-9]+_[0-9]+|.+\.safetensors"  # names of tensor files
SAMPLES, SAMPLE_BYTES = 4, 4096  # that `samples` reads of each tensor file
MAX_TOKENIZER_BYTES = 64 << 20  # Grok-1's has 2.2 MB

Directory = str | os.PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint is not as expected; the message says where, how, and what to do."""


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """One file of a released checkpoint, as the layout requires it.

    file: its name in ckpt-0, "tensor00003_000".
    name: the parameter that it holds, "transformer/decoder_layer_0/moe/linear_1/w".
    module, param, layer: its place in the stacked parameters; layer None if not stacked.
    leaf: the stored array(s): jax.ShapeDtypeStruct, or a QuantizedWeight8bit of two.
    size: its exact length in bytes, as `save` writes it.
    """

    file: str
    name: str
    module: str
    param: str
    layer: int | None
    leaf: "Leaf"
    size: int


@contextlib.contextmanager
def only_writer(directory: Directory) -> Iterator[None]:
    """Lock the existing directory DIR against other saves and conversions within the block.

    Raises CheckpointError if another one is in progress.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not atomic.lock(descriptor):
            expected, got = "one save or conversion at a time", "another in progress"
            raise error(str(directory), expected, got, "wait until it ends")
        yield
    finally:
        os.close(descriptor)


def error(where: str, expected: str, got: str, remedy: str) -> CheckpointError:
    """Return an error whose message is one line with all four arguments."""
    sentence = f"{where}: expected {expected}, got {got}; {remedy}"
    return CheckpointError("".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence))


def form(directory: Directory) -> str | None:
    """Return the form of the checkpoint in DIR, or None; RELEASED if it holds several."""
    if os.path.isdir(os.path.join(directory, FOLDER)):
        return RELEASED
    paths = {form: os.path.join(directory, index) for form, index in INDEXES.items()}
    return next((form for form, path in paths.items() if os.path.isfile(path)), None)


def require_whole(directory: Directory) -> None:
    """Raise CheckpointError if a conversion or a save into DIR is unfinished."""
    if os.path.lexists(os.path.join(directory, WORK)):
        got = "an unfinished conversion"
        remedy = f"start the same conversion again, or remove {WORK} and what it made"
    elif os.path.lexists(os.path.join(directory, SAVING)):
        got = f"an incomplete one ({SAVING} is there)"
        remedy = "save it again: files of the previous model may be among the new ones"
    else:
        return
    raise error(str(directory), "a complete checkpoint", got, remedy)


def require_form(directory: Directory, remedy: str) -> str:
    """Return the form of the checkpoint in DIR. Raises CheckpointError unless it is complete."""
    require_whole(directory)
    found = form(directory)
    if found is None:
        if os.path.isfile(directory):
            got = "a file"
        elif not os.path.isdir(directory):
            got = "no such directory"
        elif not os.access(directory, os.R_OK | os.X_OK):
            got = "one that may not be read"
        else:
            got = "one with none of these"
        expected = f"a directory that holds {FOLDER}, {' or '.join(INDEXES.values())}"
        raise error(str(directory), expected, got, remedy)
    return found


def samples(directory: Directory) -> dict[str, str]:
    """Return {file: digest} of the size and a few blocks of each tensor file.

    Other weights give other digests, unless they differ in a few places only: reading all of
    Grok-1's weights takes minutes. Raises OSError.
    """
    folder = FOLDER if form(directory) == RELEASED else ""
    names = os.listdir(os.path.join(directory, folder))
    files = sorted(os.path.join(folder, name) for name in names if re.fullmatch(TENSORS, name))
    paths = [os.path.join(directory, file) for file in files]
    with ThreadPoolExecutor(16) as pool:  # a network file system has a high latency
        return dict(zip(files, pool.map(_sample, paths), strict=True))


def _sample(path: str) -> str:
    with atomic.open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        sample = hashlib.sha256(str(size).encode())
        for block in range(SAMPLES):
            file.seek((2 * block + 1) * size // (2 * SAMPLES))
            sample.update(file.read(SAMPLE_BYTES))
    return sample.hexdigest()

"""The safetensors form of a checkpoint: its names, its index, its headers and its checksums.

DIR holds one file per layer, starting with `layer-00.safetensors`; `outer.safetensors` with the
parameters outside the layers; and the index `model.safetensors.index.json`:

    {"metadata": {"format": "grok-1-jax/1", "total_size": bytes of all tensors},
     "weight_map": {tensor: file},
     "checksums": {tensor: "sha256:" and 64 hexadecimal digits}}

A tensor is named like the released parameter, `transformer/decoder_layer_0/rms_norm/scale`; an int8
matrix is two tensors, `.../w/weight` and `.../w/scales`. A matrix of 4 bits has `.../w/int4` in
place of the first, in bytes as in a QuantizedWeight4bit. Other values are stored as released. A
file consists of the header's length in eight bytes, little-endian; the header, in JSON; and the
values of its tensors, without gap or overlap. Files are read with read calls, not with the
safetensors library, which maps them: if a mapped file is truncated, the process is killed.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import overload

import jax
import ml_dtypes  # numpy learns the name "bfloat16"
import numpy as np

from grok1.formats import atomic, forms, pickle_file
from grok1.formats.forms import Directory, TensorFile, error
from grok1.formats.pickle_file import Array, Leaf, Located, StoredLeaf
from grok1.formats.values import read_pieces
from grok1.ops.quantization import QuantizedWeight, QuantizedWeight4bit
from grok1.strict_json import Json, read_json

OUTER = "outer.safetensors"
INT4, SCALES = "int4", "scales"  # tensors of a matrix
_FORMATS = {forms.SAFETENSORS: "grok-1-jax/1", forms.MAPPED: "grok-1-jax-mapped/1"}
# Grok-1's index has 0.4 MB and its headers 3 kB. The limits are for hostile files.
_MAX_INDEX_BYTES = 4 << 20
_MAX_HEADER_BYTES = 1 << 18

# In the order in which the library stores them in a file.
_DTYPES = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": np.dtype(ml_dtypes.bfloat16).name,
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MOST_SHOWN = 120  # characters of what is in a file
DAMAGED = "convert or download it again"


@dataclasses.dataclass(frozen=True)
class Index:
    """The contents of the index: each tensor's file and checksum, and the bytes of all tensors."""

    files: Mapping[str, str]
    checksums: Mapping[str, str]
    total_size: int


# Names.


@overload
def tensors(record: TensorFile) -> dict[str, Array]: ...


@overload
def tensors(record: TensorFile, leaf: StoredLeaf) -> dict[str, Located]: ...


def tensors(record: TensorFile, leaf: Leaf | None = None) -> Mapping[str, Array]:
    """Return {name: array} for a parameter's leaf; by default `record.leaf`."""
    leaf = record.leaf if leaf is None else leaf
    if not isinstance(leaf, QuantizedWeight):
        return {record.name: leaf}
    kind = INT4 if isinstance(leaf, QuantizedWeight4bit) else "weight"
    return {f"{record.name}/{kind}": leaf.weight, f"{record.name}/{SCALES}": leaf.scales}


def layout(records: Iterable[TensorFile]) -> dict[str, list[TensorFile]]:
    """Return {file: its parameters}: first those outside the layers, then the layers."""
    groups: dict[int, list[TensorFile]] = {}
    for record in records:
        groups.setdefault(-1 if record.layer is None else record.layer, []).append(record)
    digits = max(2, len(str(max(groups))))  # so that they sort
    return {
        OUTER if layer < 0 else f"layer-{layer:0{digits}d}.safetensors": groups[layer]
        for layer in sorted(groups)
    }


# Writing.


def index_text(records: Iterable[TensorFile], checksums: Mapping[str, str]) -> bytes:
    """Return the bytes of the index; they depend only on the arguments."""
    weight_map, size = {}, 0
    for file, members in layout(records).items():
        for record in members:
            for name, array in tensors(record).items():
                weight_map[name] = file
                size += pickle_file.nbytes(array)
    checksums = {name: checksums[name] for name in weight_map}
    return write_index(forms.SAFETENSORS, Index(weight_map, checksums, size))


def write_index(form: str, index: Index) -> bytes:
    """Return the bytes of an index."""
    fields = {
        "metadata": {"format": _FORMATS[form], "total_size": index.total_size},
        "weight_map": index.files,
        "checksums": index.checksums,
    }
    return (json.dumps(fields, indent=2) + "\n").encode()


def contents(
    arrays: Mapping[str, Array], values: Mapping[str, Iterable[np.ndarray]]
) -> Iterator[atomic.Piece]:
    """Yield the bytes of a safetensors file, as the library writes it.

    arrays: the shape and dtype of each tensor. values: the values of each, in pieces, in C order. A
    piece is requested only when the previous one is no longer needed.
    """
    codes = {name: _CODES[np.dtype(array.dtype).name] for name, array in arrays.items()}
    names = sorted(arrays, key=lambda name: ([*_DTYPES].index(codes[name]), name))
    yield header({name: arrays[name] for name in names})
    for name in names:
        for piece in values[name]:
            yield piece.reshape(-1).view(np.uint8)


def header(arrays: Mapping[str, Array], multiple: int = 8) -> bytes:
    """Return the header of a file with these tensors, in this order; its length is a multiple."""
    fields: dict[str, Json] = {"__metadata__": {"format": "np"}}
    begin = 0
    for name, array in arrays.items():
        end = begin + pickle_file.nbytes(array)
        code, shape = _CODES[np.dtype(array.dtype).name], list(array.shape)
        fields[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % multiple)
    return len(text).to_bytes(8, "little") + text


# Checksums.


def checksum(array: Located, name: str, count: Callable[[int], object] | None = None) -> str:
    """Return the checksum of an array's bytes, in the format of the index.

    count: called with the number of bytes of each piece. Raises the errors of `values.read_pieces`.
    """

    def counted() -> Iterator[np.ndarray]:
        for piece in read_pieces(array, name):
            yield piece
            if count is not None:
                count(piece.nbytes)

    return checksum_of(counted())


def checksum_of(pieces: Iterable[np.ndarray]) -> str:
    """Return the checksum of an array that is given in pieces."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.reshape(-1).view(np.uint8).data)
    return f"sha256:{digest.hexdigest()}"


# Reading and checking.


def check_files(directory: Directory, records: list[TensorFile]) -> list[StoredLeaf]:
    """Check the index, and the sizes and headers of all files of DIR.

    Returns the location of each parameter's arrays, in the order of `records`: a
    Located, or a QuantizedWeight of two. Raises CheckpointError.
    """
    files = layout(records)
    _check_index(os.path.join(directory, forms.INDEX), read_index(directory), files)
    leaves: dict[str, StoredLeaf] = {}
    for file, members in files.items():
        leaves |= _check_file(os.path.join(directory, file), members)
    return [leaves[record.name] for record in records]


def arrays_in(path: str) -> dict[str, Located]:
    """Return the dtypes and shapes of a file's tensors by name, from its header, unchecked.

    Raises CheckpointError if it has no header.
    """
    found = {}
    for name, entry in read_header(path)[0].items():
        match entry:
            case {"dtype": str(code), "shape": list(shape)} if code in _DTYPES:
                found[name] = Located(tuple(shape), _DTYPES[code], 0, path)
    return found


def read_index(directory: Directory, form: str = forms.SAFETENSORS) -> Index:
    """Return the index of DIR. Raises CheckpointError if it is malformed."""
    path, wanted = os.path.join(directory, forms.INDEXES[form]), _FORMATS[form]
    try:
        with atomic.open_regular(path) as opened:
            text = opened.read(_MAX_INDEX_BYTES + 1)
    except OSError as problem:
        got = f"an error ({problem.strerror})"
        raise error(path, "a readable file", got, "check its permissions") from problem
    if len(text) > _MAX_INDEX_BYTES:
        raise error(path, f"at most {_MAX_INDEX_BYTES} bytes of JSON", "more", DAMAGED)
    match _parse(path, text):
        case {
            "metadata": {"format": str(kind), "total_size": int(size)},
            "weight_map": dict(files),
            "checksums": dict(checksums),
        }:
            pass
        case _:
            expected, got = "metadata, weight_map and checksums", "something else"
            remedy = "an index by another program is not accepted: convert the released files"
            raise error(path, expected, got, remedy)
    if kind != wanted:
        raise error(path, f"the format {wanted}", short(kind), "convert the released files")
    for name, file in files.items():
        if not isinstance(file, str):
            raise error(f"{path} ({short(name)})", "a file's name", short(file), DAMAGED)
    for name, value in checksums.items():
        if not isinstance(value, str) or not re.fullmatch("sha256:[0-9a-f]{64}", value):
            where = f"{path} ({short(name)})"
            raise error(where, "a checksum like sha256:00ff", short(value), DAMAGED)
    return Index(files, checksums, size)


def is_own_index(path: str) -> bool:
    """Return whether this program wrote an index, which may be damaged."""
    with atomic.open_regular(path) as file:
        text = file.read(_MAX_INDEX_BYTES + 1)
    try:
        fields = read_json(text)
    except ValueError:
        return any(name.encode() in text[:200] for name in _FORMATS.values())  # damaged
    match fields:
        case {"metadata": {"format": str(kind)}}:
            return kind.startswith(tuple(name.partition("/")[0] for name in _FORMATS.values()))
    return False


def _check_index(path: str, index: Index, files: Mapping[str, list[TensorFile]]) -> None:
    """Raise CheckpointError unless the index lists exactly the tensors of `files` in its files."""
    for name in index.files.keys() ^ index.checksums.keys():
        raise error(path, "a file and a checksum for each tensor", short(name), DAMAGED)
    arrays = {
        file: [item for record in members for item in tensors(record).items()]
        for file, members in files.items()
    }
    expected = {name: file for file, items in arrays.items() for name, _ in items}
    depth = len(files.keys() - {OUTER})
    layers = {file for file in index.files.values() if file != OUTER}
    if len(layers) != depth:
        remedy = "correct the number of layers in the configuration, or convert again"
        raise error(path, f"files of {depth} layers", f"{len(layers)}", remedy)
    for name in sorted(expected.keys() ^ index.files.keys()):
        got = "none" if name in expected else f"one more, {short(name)}"
        where = f"{path} ({name})" if name in expected else path
        remedy = forms.OTHER_CONFIG
        raise error(where, f"the {len(expected)} tensors of the model", got, remedy)
    for name, file in expected.items():
        if index.files[name] != file:
            raise error(f"{path} ({name})", file, short(index.files[name]), DAMAGED)
    size = sum(pickle_file.nbytes(array) for items in arrays.values() for _, array in items)
    if index.total_size != size:
        raise error(path, f"a total_size of {size}", short(index.total_size), DAMAGED)


def _check_file(path: str, members: list[TensorFile]) -> dict[str, StoredLeaf]:
    """Return {parameter: leaf with the locations of its arrays} of one file."""
    entries, begin, stamp = read_header(path)
    expected = {name: array for record in members for name, array in tensors(record).items()}
    for name in sorted(expected.keys() ^ entries.keys()):
        got = f"none of the name {name}" if name in expected else f"one more, {short(name)}"
        raise error(path, f"{len(expected)} tensors", got, DAMAGED)
    found = {
        name: Located(
            array.shape,
            str(array.dtype),
            begin + place(path, name, array, entries[name]),
            path,
            stamp,
        )
        for name, array in expected.items()
    }
    end = begin
    for name, array in sorted(found.items(), key=lambda item: item[1].offset):
        if array.offset != end:
            raise damaged(f"{path} ({name})", "its values do not follow those of another tensor")
        end += pickle_file.nbytes(array)
    if end != stamp.size:
        raise damaged(path, f"it should have {end} bytes, and has {stamp.size}")
    return {
        record.name: jax.tree.unflatten(
            jax.tree.structure(record.leaf), [found[name] for name in tensors(record)]
        )
        for record in members
    }


def read_header(path: str) -> tuple[dict[str, object], int, atomic.FileVersion]:
    """Return the tensors' entries in a file's header, the offset of the values, and its stamp."""
    try:
        with atomic.open_regular(path) as file:
            stamp = atomic.stamp(file.fileno())
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                limit = f"a header of at most {_MAX_HEADER_BYTES} bytes"
                raise error(path, limit, f"one of {length}", DAMAGED)
            text = file.read(length)
    except OSError as problem:
        got = f"an error ({problem.strerror or problem})"
        remedy = f"check that it exists and is readable, or {DAMAGED}"
        raise error(path, "a readable safetensors file", got, remedy) from problem
    if len(text) < length or not text.startswith(b"{"):
        raise damaged(path, "its header is incomplete")
    entries = _parse(path, text)
    match entries.pop("__metadata__", {}):
        case dict(metadata) if all(isinstance(value, str) for value in metadata.values()):
            return entries, 8 + length, stamp
    raise damaged(path, "its metadata are not strings")


def place(path: str, name: str, array: Array, entry: object) -> int:
    """Return the offset of a tensor's values from the end of the header.

    Raises CheckpointError unless its entry in the header has the dtype and shape of `array`, and
    the corresponding number of bytes.
    """
    where = f"{path} ({name})"
    match entry:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [begin, end]} if all(
            type(number) is int for number in (*shape, begin, end)
        ):
            pass
        case _:
            raise damaged(where, "its entry is not dtype, shape and data_offsets")
    wanted, got = pickle_file.describe(array), f"{_DTYPES.get(code, code)} {shape}"
    if got != wanted:
        remedy = forms.OTHER_CONFIG
        raise error(where, wanted, ascii(got)[1:-1][:_MOST_SHOWN], remedy)
    if end - begin != pickle_file.nbytes(array):
        raise damaged(where, f"it has {short(end - begin)} bytes for its {got}")
    return begin


def damaged(where: str, how: str) -> forms.CheckpointError:
    """Return the error for a damaged file."""
    return error(where, "a complete safetensors file", f"a damaged one ({how})", DAMAGED)


def _parse(path: str, text: bytes) -> dict[str, object]:
    try:
        fields: object = read_json(text)
    except ValueError as problem:
        raise error(path, "valid JSON", f"an error ({problem})", DAMAGED) from problem
    if not isinstance(fields, dict):
        raise error(path, "a JSON object", f"a {type(fields).__name__}", DAMAGED)
    return fields


def short(value: object) -> str:
    """Return a value of a file for an error message: on one line, and shortened."""
    return ascii(value if not isinstance(value, (dict, list)) else type(value).__name__)[
        :_MOST_SHOWN
    ]

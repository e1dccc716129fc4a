"""The files of a checkpoint and their order, and checks that a directory holds them.

The released form is `DIR/ckpt-0/tensorNNNNN_000`, one file per parameter and layer, and perhaps
`DIR/config.json`. Parameters are `{module: {param: leaf}}`; every leaf of a module under
`transformer/decoder_layer/` is stacked, with a leading layer axis [L, ...]. The files are not:
layer `i` of such a module is stored as `transformer/decoder_layer_{i}/...`, and the file numbers
follow the sorted names, so layers run 0, 1, 10, 11, ..., 2, 20, ... The format of one file is
defined in pickle_file.py. A checkpoint in the safetensors form is checked in the same way.
"""

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Mapping

import jax
import numpy as np

from grok1.formats import atomic, forms, mapped, pickle_file, safetensors
from grok1.formats.forms import CheckpointError, Directory, TensorFile
from grok1.formats.pickle_file import Leaf, StoredLeaf
from grok1.ops.quantization import (
    ParameterShape,
    QuantizedWeight,
    QuantizedWeight4bit,
    Shapes,
)
from grok1.ops.quantize_4bit import shape_in_4_bits
from grok1.strict_json import Json, read_json

STACKED = "transformer/decoder_layer/"
FLOATS = "float32", "bfloat16", "float16"  # the stored dtypes of parameters that are not int8

_MAX_CONFIG_BYTES = 1 << 20

LeafKey = tuple[str, str]  # module and parameter
LeafTree = Mapping[str, Mapping[str, Leaf]]  # {module: {param: leaf}}


def read_config(directory: Directory) -> dict[str, Json] | None:
    """Return DIR/config.json as a dict, or None if there is no such file.

    Raises CheckpointError if it cannot be read or is not a JSON object.
    """
    path = os.path.join(directory, "config.json")
    remedy = "correct it, or take the file that came with the checkpoint"
    try:
        with atomic.open_regular(path) as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise forms.error(
            path, "a readable file", f"an error ({error.strerror})", remedy
        ) from error
    if len(text) > _MAX_CONFIG_BYTES:
        raise forms.error(path, f"at most {_MAX_CONFIG_BYTES} bytes of JSON", "more", remedy)
    try:
        config = read_json(text)
    except ValueError as error:
        raise forms.error(path, "valid JSON", f"an error ({error})", remedy) from error
    if not isinstance(config, dict):
        raise forms.error(path, "a JSON object", f"a {type(config).__name__}", remedy)
    return config


def files(shapes: LeafTree) -> list[TensorFile]:
    """List the files of a checkpoint in the order of their numbers.

    shapes: {module: {param: leaf}}, a leaf being a jax.ShapeDtypeStruct or a QuantizedWeight of
        two (int8 weight, bfloat16 scales); stacked [L, ...] under `transformer/decoder_layer/`.

    Raises ValueError if the stacked leaves differ in L, or the layout does not support a leaf.
    """
    entries: list[tuple[str, str, str, int | None, Leaf, int]] = []
    depths = set()
    for module, params in shapes.items():
        for param, leaf in params.items():
            pickle_file.check(f"{module}/{param}", leaf)
            if not module.startswith(STACKED):
                size = pickle_file.file_size(leaf)
                entries.append((module, param, module, None, leaf, size))
                continue
            layers = {array.shape[0] for array in jax.tree.leaves(leaf)}
            depths |= layers
            own = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), leaf)
            size = pickle_file.file_size(own)
            for layer in range(max(layers)):
                name = f"{STACKED[:-1]}_{layer}/{module.removeprefix(STACKED)}"
                entries.append((name, param, module, layer, own, size))
    if len(depths) > 1:
        raise ValueError(
            f"stacked parameters: expected the same number of layers in each, got {sorted(depths)}"
        )
    entries.sort(key=lambda entry: entry[:2])
    return [
        TensorFile(
            file=f"tensor{index:05d}_000",
            name=f"{name}/{param}",
            module=module,
            param=param,
            layer=layer,
            leaf=leaf,
            size=size,
        )
        for index, (name, param, module, layer, leaf, size) in enumerate(entries)
    ]


def check_files(directory: Directory, records: list[TensorFile]) -> list[StoredLeaf]:
    """Check the names, sizes and headers of all files of DIR; puts nothing on a device.

    If DIR holds both forms, DIR/ckpt-0 is checked and the safetensors files are ignored.

    Returns the locations of each parameter's arrays, in the order of `records`, which come from
    `files`. Raises CheckpointError.
    """
    forms.require_whole(directory)
    form = forms.form(directory)
    if form in forms.INDEXES:
        module = mapped if form == forms.MAPPED else safetensors
        found = module.check_files(directory, records)
    else:
        folder = os.path.join(directory, forms.FOLDER)
        _check_names(folder, records)
        found = [_read_header(folder, record) for record in records]
    forms.require_whole(directory)  # from now on, a replaced file is detected by its stamp
    return found


def shapes_in(directory: Directory, shapes: Shapes) -> Shapes:
    """Return `shapes` with the types that parameters have in DIR: integers with scales, or floats.

    Reads one file of each parameter. An invalid file is ignored here; `check_files` reports it.
    """
    first: dict[LeafKey, TensorFile] = {}
    for record in files(shapes):
        first.setdefault((record.module, record.param), record)
    find = _find_tensors if forms.form(directory) in forms.INDEXES else _find_released
    types = find(directory, list(first.values()))
    return {
        module: {
            param: _retyped(leaf, types.get((module, param))) for param, leaf in leaves.items()
        }
        for module, leaves in shapes.items()
    }


def _find_released(directory: Directory, records: list[TensorFile]) -> dict[LeafKey, StoredLeaf]:
    """Return {(module, param): leaf} of what the files of these records hold."""
    found: dict[LeafKey, StoredLeaf] = {}
    for record in records:
        path = os.path.join(directory, forms.FOLDER, record.file)
        with (
            contextlib.suppress(OSError, pickle_file.LayoutError),
            atomic.open_regular(path) as file,
        ):
            leaf = pickle_file.read_header(file, os.fstat(file.fileno()).st_size)
            found[record.module, record.param] = leaf
    return found


def _find_tensors(directory: Directory, records: list[TensorFile]) -> dict[LeafKey, StoredLeaf]:
    """Return {(module, param): leaf} of the records that are stored as floats, or with 4 bits."""
    in_place = forms.form(directory) == forms.MAPPED
    arrays: dict[str, pickle_file.Located] = {}
    names = mapped.files(records) if in_place else safetensors.layout(records)
    for file in names:
        with contextlib.suppress(CheckpointError):
            arrays |= safetensors.arrays_in(os.path.join(directory, file))
    found: dict[LeafKey, StoredLeaf] = {}
    for record in records:
        key = record.module, record.param
        name = "/".join(key) if in_place else record.name
        pair = [arrays.get(f"{name}/{kind}") for kind in (safetensors.INT4, safetensors.SCALES)]
        if name in arrays:
            found[key] = arrays[name]
        elif all(pair):
            found[key] = QuantizedWeight4bit(*pair)
    return found


def _retyped(leaf: ParameterShape, stored: StoredLeaf | None) -> ParameterShape:
    """Return a leaf [L, ...] or [...] of the type of a stored one, if that is 4 bits or floats."""
    if isinstance(stored, QuantizedWeight4bit):
        groups = stored.scales.shape[-2] if len(stored.scales.shape) > 1 else 0
        return shape_in_4_bits(leaf.shape, groups) or leaf
    if not isinstance(stored, pickle_file.Located) or stored.dtype not in FLOATS:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, np.dtype(stored.dtype))


def tensor_names(folder: str) -> set[str]:
    """Return the names of the tensor files in a folder. Raises OSError."""
    return {name for name in os.listdir(folder) if re.fullmatch("tensor[0-9]+_[0-9]+", name)}


def _check_names(folder: str, records: list[TensorFile]) -> None:
    """Raise CheckpointError unless the folder's tensor files are exactly those of `records`."""
    try:
        found = tensor_names(folder)
    except OSError as error:
        raise forms.error(
            folder,
            f"a directory of {len(records)} tensor files",
            f"an error ({error.strerror})",
            "give the directory that contains ckpt-0",
        ) from error
    expected = {record.file: record for record in records}
    missing, extra = sorted(expected.keys() - found), sorted(found - expected.keys())
    if not missing and not extra:
        return
    counts = f"{len(records)} tensor files", str(len(found))
    outer = sum(record.layer is None for record in records)
    layers = len({record.layer for record in records} - {None})
    numbered = found == {f"tensor{index:05d}_000" for index in range(len(found))}
    if layers and numbered and len(found) > outer:
        depth, remainder = divmod(len(found) - outer, (len(records) - outer) // layers)
        if not remainder:
            raise forms.error(
                folder,
                f"{counts[0]} ({layers} layers)",
                f"{counts[1]} ({depth} layers)",
                "correct the number of layers in the configuration, or download what is missing",
            )
    if missing:
        where = f"{os.path.join(folder, missing[0])} ({expected[missing[0]].name})"
        raise forms.error(f"{where}: the file is missing", *counts, "download it again")
    where = f"{os.path.join(folder, extra[0])}: the file belongs to no parameter of the model"
    raise forms.error(where, *counts, "remove it, or correct the configuration")


def _read_header(folder: str, record: TensorFile) -> StoredLeaf:
    """Return the locations of a file's arrays, as `pickle_file.read_header` does.

    Raises CheckpointError unless the file holds what `record` says. Its length is then right, too:
    its arrays are complete, have the expected number of bytes, and nothing follows them.
    """
    path = os.path.join(folder, record.file)
    where = f"{path} ({record.name})"
    size = f"{record.size} bytes"
    try:
        with atomic.open_regular(path) as file:
            stamp = atomic.stamp(file.fileno())
            leaf = pickle_file.read_header(file, stamp.size)
    except OSError as error:
        got = f"an error ({error.strerror})"
        remedy = "check its permissions, or download it again"
        raise forms.error(where, f"a readable file of {size}", got, remedy) from error
    except pickle_file.LayoutError as error:
        problem: object = error
        if error.ended and stamp.size < record.size:
            problem = f"is cut: expected {size}, got {stamp.size}"
        raise CheckpointError(f"{where}: the file {problem}; download it again") from error
    expected, got = pickle_file.describe(record.leaf), pickle_file.describe(leaf)
    if got == expected:
        place = functools.partial(dataclasses.replace, path=path, stamp=stamp)
        return jax.tree.map(place, leaf)
    int8 = isinstance(record.leaf, QuantizedWeight)
    if int8 and not isinstance(leaf, QuantizedWeight) and "float" in leaf.dtype:
        remedy = "it is not quantized: save all files in one type, or load what shapes_in finds"
    elif isinstance(leaf, QuantizedWeight) and not int8:
        remedy = "it is quantized: save all files in one type, or load what shapes_in finds"
    elif "-" in got:
        remedy = "save it again, little-endian and in C order"
    else:
        remedy = forms.OTHER_CONFIG
    raise forms.error(where, expected, got, remedy)

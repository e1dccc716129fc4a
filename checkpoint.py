"""The released checkpoint files <-> parameters: checked whole, then read shard by shard.

A checkpoint is `DIR/ckpt-0/tensorNNNNN_000`, one file per parameter and layer, and perhaps
`DIR/config.json`. The parameters are `{module: {param: leaf}}`; every leaf of a module under
`transformer/decoder_layer/` is stacked, with a leading layer axis [L, ...]. The files are not:
layer `i` of such a module is stored as `transformer/decoder_layer_{i}/...`, and the file numbers
follow the sorted names, so layers run 0, 1, 10, 11, ..., 2, 20, ... What is inside of one file is
pickle_file.py's to know; here, its arrays are mapped into memory from where they lie. A checkpoint
may also have the form that safetensors.py knows; it is loaded just so.

python checkpoint.py --help says how to convert one form into the other, and to verify them.
"""

import dataclasses
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

if __name__ == "__main__":
    # jax takes a second to import: Ctrl-C ends it without showing where it struck.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from grok1.formats import atomic, forms, loading, pickle_file, safetensors
from grok1.formats.atomic import open_regular as _open
from grok1.formats.forms import CheckpointError, Directory, TensorFile
from grok1.formats.forms import error as _error
from grok1.ops.quantization import QuantizedWeight8bit

STACKED = "transformer/decoder_layer/"

_MAX_CONFIG_BYTES = 1 << 20

Params = Mapping[str, Mapping[str, Any]]  # {module: {param: leaf}}


def read_config(directory: Directory) -> dict[str, Any] | None:
    """Return DIR/config.json as a dict, or None if there is no such file.

    Raises CheckpointError if it cannot be read or is not one JSON object.
    """
    path = os.path.join(directory, "config.json")
    remedy = "correct it, or take the file that came with the checkpoint"
    try:
        with _open(path) as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _error(path, "a readable file", f"an error ({error.strerror})", remedy) from error
    if len(text) > _MAX_CONFIG_BYTES:
        raise _error(path, f"at most {_MAX_CONFIG_BYTES} bytes of JSON", "more", remedy)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _error(path, "valid JSON", f"an error ({error})", remedy) from error
    if not isinstance(config, dict):
        raise _error(path, "a JSON object", f"a {type(config).__name__}", remedy)
    return config


def files(shapes: Params) -> list[TensorFile]:
    """List the files of a checkpoint in the order of their numbers.

    shapes: {module: {param: leaf}}, a leaf being a jax.ShapeDtypeStruct or a QuantizedWeight8bit
        of two (int8 weight, bfloat16 scales); stacked [L, ...] under `transformer/decoder_layer/`.

    Raises ValueError if the stacked leaves differ in L, or the layout has no place for a leaf.
    """
    entries: list[tuple[str, str, str, int | None, Any, int]] = []
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
        raise ValueError(f"stacked parameters: expected one number of layers, got {sorted(depths)}")
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


def check_files(directory: Directory, shapes: Params) -> list[Any]:
    """Check the names, sizes and headers of all files of DIR; puts nothing on a device.

    If DIR has both, DIR/ckpt-0 counts, and not the safetensors files.

    Returns where the arrays of each parameter lie, in the order of `files`. Raises CheckpointError.
    """
    return _check_files(directory, files(shapes))


def _check_files(directory: Directory, records: list[TensorFile]) -> list[Any]:
    if os.path.lexists(os.path.join(directory, forms.WORK)):
        remedy = f"start the same conversion again, or remove {forms.WORK} and what it made"
        raise _error(str(directory), "a whole checkpoint", "a conversion's unfinished one", remedy)
    if forms.form(directory) == forms.SAFETENSORS:
        return safetensors.check_files(directory, records)
    folder = os.path.join(directory, forms.FOLDER)
    _check_names(folder, records)
    return [_read_header(folder, record) for record in records]


def load(
    directory: Directory,
    shapes: Params,
    shardings: Params | None = None,
    dtypes: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, dict[str, Any]]:
    """Load the checkpoint in DIR onto devices, each device reading only its own slices.

    All names, sizes and headers are checked before anything is put on a device. Stacked parameters
    are allocated once and filled in place, so that beside the parameters there is little data on
    the host and on the devices (see loading.py), and never a whole file's.

    shapes: what the files must hold, as in `files`.
    shardings: a jax.sharding.Sharding for each array of `shapes`, in the same structure, that does
        not split the layer axis. None: everything on the default device.
    dtypes: {"module/param": dtype}: float parameters to cast on the way to the device.
    progress: called as progress(bytes_done, bytes_total), of the bytes that this process reads.

    Returns {module: {param: leaf}} of jax.Array, structured like `shapes`.
    Raises CheckpointError if the files are not those of `shapes`, ValueError if the other arguments
    do not fit `shapes`.
    """
    records = files(shapes)
    wanted = _cast(shapes, dtypes or {})
    if shardings is not None:
        jax.tree_util.tree_map_with_path(_check_sharding, wanted, shardings)
    headers = _check_files(directory, records)
    if shardings is None:
        default = jnp.zeros(()).sharding
        shardings = jax.tree.map(lambda _: default, shapes)

    sources = [
        loading.Source((record.module, record.param, i), record.layer, located, record.name)
        for record, header in zip(records, headers, strict=True)
        for i, located in enumerate(jax.tree.leaves(header))
    ]
    arrays = loading.fill_arrays(sources, _by_key(wanted), _by_key(shardings), progress)
    return {
        module: {
            param: jax.tree.unflatten(
                jax.tree.structure(leaf),
                [arrays[module, param, i] for i in range(len(jax.tree.leaves(leaf)))],
            )
            for param, leaf in leaves.items()
        }
        for module, leaves in wanted.items()
    }


def _by_key(tree: Params) -> dict[tuple[str, str, int], Any]:
    """Return the arrays of a parameter tree by module, parameter, and place in the leaf."""
    return {
        (module, param, i): array
        for module, leaves in tree.items()
        for param, leaf in leaves.items()
        for i, array in enumerate(jax.tree.leaves(leaf))
    }


def _cast(shapes: Params, dtypes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return `shapes` with the dtypes that the loaded parameters are to have."""
    wanted = {module: dict(leaves) for module, leaves in shapes.items()}
    for name, dtype in dtypes.items():
        module, _, param = name.rpartition("/")
        leaf = wanted.get(module, {}).get(param)
        if leaf is None or isinstance(leaf, QuantizedWeight8bit):
            raise ValueError(f"dtypes: expected names of float parameters, got {name!r}")
        wanted[module][param] = jax.ShapeDtypeStruct(leaf.shape, dtype)
    return wanted


def _check_sharding(path: Any, array: Any, sharding: jax.sharding.Sharding) -> None:
    """Raise ValueError if a sharding does not fit an array, or splits the layer axis."""
    shard = sharding.shard_shape(array.shape)
    if path[0].key.startswith(STACKED) and shard[0] != array.shape[0]:
        raise ValueError(
            f"{path[0].key}: expected a sharding that leaves all {array.shape[0]} layers on each "
            f"device, got one that leaves {shard[0]}"
        )


def tensor_names(folder: str) -> set[str]:
    """Return the names in a folder that are those of tensor files. Raises OSError."""
    return {name for name in os.listdir(folder) if re.fullmatch("tensor[0-9]+_[0-9]+", name)}


def _check_names(folder: str, records: list[TensorFile]) -> None:
    """Raise CheckpointError unless the folder's tensor files are exactly those of `records`."""
    try:
        found = tensor_names(folder)
    except OSError as error:
        raise _error(
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
            raise _error(
                folder,
                f"{counts[0]} ({layers} layers)",
                f"{counts[1]} ({depth} layers)",
                "correct the number of layers in the configuration, or download what is missing",
            )
    if missing:
        where = f"{os.path.join(folder, missing[0])} ({expected[missing[0]].name})"
        raise _error(f"{where}: the file is missing", *counts, "download it again")
    where = f"{os.path.join(folder, extra[0])}: the file belongs to no parameter of the model"
    raise _error(where, *counts, "remove it, or correct the configuration")


def _read_header(folder: str, record: TensorFile) -> Any:
    """Return where the arrays of a file lie, as `pickle_file.read_header` does.

    Raises CheckpointError unless the file holds what `record` says; then it has the right length
    too, since its arrays have the expected number of bytes, all there, and nothing follows them.
    """
    path = os.path.join(folder, record.file)
    where = f"{path} ({record.name})"
    size = f"{record.size} bytes"
    try:
        with _open(path) as file:
            length = os.fstat(file.fileno()).st_size
            leaf = pickle_file.read_header(file, length)
    except OSError as error:
        got = f"an error ({error.strerror})"
        remedy = "check its permissions, or download it again"
        raise _error(where, f"a readable file of {size}", got, remedy) from error
    except pickle_file.LayoutError as error:
        problem: object = error
        if error.ended and length < record.size:
            problem = f"is cut: expected {size}, got {length}"
        raise CheckpointError(f"{where}: the file {problem}; download it again") from error
    expected, got = pickle_file.describe(record.leaf), pickle_file.describe(leaf)
    if got == expected:
        return jax.tree.map(lambda array: dataclasses.replace(array, path=path), leaf)
    kinds = (isinstance(record.leaf, QuantizedWeight8bit), isinstance(leaf, QuantizedWeight8bit))
    if kinds == (True, False) and "float" in leaf.dtype:
        remedy = "this checkpoint is not quantised: load it as float, or quantise and save it first"
    elif kinds == (False, True):
        remedy = "this checkpoint is quantised: load it as int8 with scales"
    elif "-" in got:
        remedy = "save it again, little-endian and in C order"
    else:
        remedy = "check that the configuration is that of this checkpoint"
    raise _error(where, expected, got, remedy)


@jax.jit
def _get_layer(stack: jax.Array, index: jax.Array) -> jax.Array:
    """Return layer `index` [...] of [L, ...]; one compiled program takes any layer."""
    return lax.dynamic_index_in_dim(stack, index, axis=0, keepdims=False)


def save(directory: Directory, params: Params, config: dict[str, Any] | None = None) -> None:
    """Write parameters as DIR/ckpt-0, and `config` as DIR/config.json if it is given.

    params: {module: {param: leaf}} of jax or numpy arrays, structured as in `files`; fetched one
        layer at a time. Float parameters are written in the dtype that they have.

    Each file appears whole or not at all: it is written under another name and then renamed.
    Raises CheckpointError if ckpt-0 holds tensor files that this would not replace, ValueError if
    the layout has no place for the parameters, OSError if writing fails.
    """
    records = files(jax.tree.map(_native, params))
    text = None if config is None else json.dumps(config, indent=2).encode()
    folder = os.path.join(directory, forms.FOLDER)
    os.makedirs(folder, exist_ok=True)
    stale = sorted(tensor_names(folder) - {record.file for record in records})
    if stale:
        raise _error(
            os.path.join(folder, stale[0]),
            f"only tensor files that the {len(records)} new ones replace",
            f"{len(stale)} that would be left over",
            "remove them, or save to another directory",
        )
    for record in records:
        arrays = _fetch(record, params[record.module][record.param])
        path = os.path.join(folder, record.file)
        atomic.write(path, pickle_file.contents(record.leaf, arrays))
    if text is not None:
        atomic.write(os.path.join(directory, "config.json"), [text])


def _native(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, np.dtype(array.dtype).newbyteorder("="))


def _fetch(record: TensorFile, leaf: Any) -> Iterator[Any]:
    """Yield the arrays of one file, each fetched when it is asked for."""
    for array in jax.tree.leaves(leaf):
        if record.layer is not None:
            on_device = isinstance(array, jax.Array)
            array = _get_layer(array, record.layer) if on_device else array[record.layer]
        yield array


if __name__ == "__main__":
    # This module is `__main__` now. The classes are those of the module `checkpoint`: one copy.
    from grok1.formats.conversion import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())

"""The mapped form of a checkpoint: files that a CPU uses in place, as its memory.

DIR holds one file per array of the model, with the values of all layers as they are on a device,
and an index, DIR/model.mapped.index.json:

    {"metadata": {"format": "grok-1-jax-mapped/1", "total_size": bytes of all arrays},
     "weight_map": {array: file},
     "checksums": {tensor: "sha256:" and 64 hexadecimal digits}}

An array is named like the parameter on a device, `transformer/decoder_layer/rms_norm/scale`, with
`/weight`, `/int4` or `/scales` for the arrays of a quantized matrix. Its file is a safetensors file
with this one tensor, whose values [L, ...] begin at HEADER. Each layer has its own checksum, with
the name that its tensor has in the safetensors form.

A large float32 embedding table is stored a second time, rounded: see grok1/ops/rounded_table.py.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from grok1.formats import atomic, forms, pickle_file, safetensors, values
from grok1.formats.forms import Directory, TensorFile, error
from grok1.formats.loading import Key, Source
from grok1.formats.pickle_file import Array, Located, StoredLeaf
from grok1.host_memory import available_memory
from grok1.kernels import mapped_files
from grok1.ops.rounded_table import LEAST_BYTES, round_table
from grok1.parameters import EMBEDDINGS

EXPERTS = "/moe/"  # in the names of their parameters
HEADER = 4096  # bytes: a page, so that the values begin at a page
ROUNDED = "rounded_table"
USED_SHARE = 0.9  # of the available memory that may hold files; the rest is for caches of tokens


class Stack(NamedTuple):
    """One file: the array `name`, and the tensors in it, one for each layer, by name."""

    name: str
    tensors: Mapping[str, Array]
    stacked: bool

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.name.replace('/', '.')}.safetensors"

    @property
    def array(self) -> jax.ShapeDtypeStruct:
        """The shape [L, ...] or [...] and the dtype of the array."""
        one = next(iter(self.tensors.values()))
        lead = (len(self.tensors),) if self.stacked else ()
        return jax.ShapeDtypeStruct((*lead, *one.shape), np.dtype(one.dtype))


def stacks(records: Iterable[TensorFile]) -> dict[str, list[Stack]]:
    """Return {parameter: the stacks of its arrays}, and those of ROUNDED if there are any."""
    members: dict[str, list[TensorFile]] = {}
    for record in records:
        members.setdefault(f"{record.module}/{record.param}", []).append(record)
    found = {}
    for parameter, own in members.items():
        own.sort(key=lambda record: record.layer or 0)
        names = zip(*(safetensors.tensors(record).items() for record in own), strict=True)
        found[parameter] = [
            Stack(
                parameter + items[0][0].removeprefix(own[0].name),
                dict(items),
                own[0].layer is not None,
            )
            for items in names
        ]
    table = found.get("/".join(EMBEDDINGS))
    return found | ({ROUNDED: rounded_stacks(table[0].array)} if table else {})


def rounded_stacks(table: jax.ShapeDtypeStruct) -> list[Stack]:
    """Return the stacks of a rounded table [V, D]; none if it is not worth rounding."""
    if table.dtype != np.float32 or pickle_file.nbytes(table) < LEAST_BYTES:
        return []
    rounded = jax.eval_shape(round_table, table)
    arrays = {f"{ROUNDED}/{field}": array for field, array in rounded._asdict().items()}
    return [Stack(name, {name: array}, False) for name, array in arrays.items()]


def index_text(records: Iterable[TensorFile], checksums: Mapping[str, str]) -> bytes:
    """Return the bytes of the index; they depend only on the arguments."""
    every = [stack for own in stacks(records).values() for stack in own]
    size = sum(pickle_file.nbytes(stack.array) for stack in every)
    known = {name: checksums[name] for stack in every for name in stack.tensors}
    files = {stack.name: stack.file for stack in every}
    return safetensors.write_index(forms.MAPPED, safetensors.Index(files, known, size))


def check_files(directory: Directory, records: list[TensorFile]) -> list[StoredLeaf]:
    """Check the index, and the sizes and headers of all files of DIR.

    Returns the location of each parameter's arrays, in the order of `records`. Raises
    CheckpointError.
    """
    located = _locate(directory, records)
    return [
        jax.tree.unflatten(
            jax.tree.structure(record.leaf), [located[name] for name in safetensors.tensors(record)]
        )
        for record in records
    ]


def rounded_table(directory: Directory, records: list[TensorFile]) -> dict[str, Located]:
    """Return the location of each array of the rounded table in DIR, if there is one, by name."""
    located = _locate(directory, records)
    return {name: array for name, array in located.items() if name.startswith(f"{ROUNDED}/")}


def _locate(directory: Directory, records: list[TensorFile]) -> dict[str, Located]:
    """Return the location of each tensor by name. Raises CheckpointError."""
    every = [stack for own in stacks(records).values() for stack in own]
    _check_index(directory, every)
    found = {}
    for stack in every:
        whole = _check_file(os.path.join(directory, stack.file), stack)
        for i, (name, array) in enumerate(stack.tensors.items()):
            offset = whole.offset + i * pickle_file.nbytes(array)
            found[name] = Located(array.shape, whole.dtype, offset, whole.path, whole.stamp)
    return found


def _check_index(directory: Directory, every: list[Stack]) -> None:
    """Raise CheckpointError unless the index lists exactly these arrays, files and tensors."""
    path = os.path.join(directory, forms.MAPPED_INDEX)
    index = safetensors.read_index(directory, forms.MAPPED)
    remedy = forms.OTHER_CONFIG
    for kind, wanted, found in (
        ("arrays", {stack.name for stack in every}, index.files.keys()),
        ("tensors", {name for stack in every for name in stack.tensors}, index.checksums.keys()),
    ):
        for name in sorted(wanted ^ found):
            where = f"{path} ({safetensors.short(name)})"
            got = "none" if name in wanted else "one more"
            raise error(where, f"the {len(wanted)} {kind} of the model", got, remedy)
    for stack in every:
        if (got := index.files[stack.name]) != stack.file:
            where = f"{path} ({stack.name})"
            raise error(where, stack.file, safetensors.short(got), safetensors.DAMAGED)
    size = sum(pickle_file.nbytes(stack.array) for stack in every)
    if index.total_size != size:
        got = safetensors.short(index.total_size)
        raise error(path, f"a total_size of {size}", got, safetensors.DAMAGED)


def _check_file(path: str, stack: Stack) -> Located:
    """Return the location of a stack's array. Raises CheckpointError."""
    entries, begin, stamp = safetensors.read_header(path)
    if entries.keys() != {stack.name}:
        got = ", ".join(map(safetensors.short, sorted(entries))) or "none"
        raise error(path, f"one tensor {stack.name}", got, safetensors.DAMAGED)
    array = stack.array
    place = safetensors.place(path, stack.name, array, entries[stack.name])
    if begin != HEADER or place != 0:
        got = f"them at byte {begin + place}"
        raise error(path, f"values from byte {HEADER} on", got, safetensors.DAMAGED)
    if (size := HEADER + pickle_file.nbytes(array)) != stamp.size:
        raise safetensors.damaged(path, f"it should have {size} bytes, and has {stamp.size}")
    return Located(array.shape, str(array.dtype), begin, path, stamp)


def files(records: Iterable[TensorFile]) -> list[str]:
    """Return the names of all files that parameters may have, of any type."""
    kinds = "", "/weight", f"/{safetensors.INT4}", f"/{safetensors.SCALES}"
    names = {f"{record.module}/{record.param}" for record in records}
    return [Stack(name + kind, {}, False).file for name in sorted(names) for kind in kinds]


def map_arrays(
    sources: Iterable[Source],
    wanted: Mapping[Key, jax.ShapeDtypeStruct],
    shardings: Mapping[Key, jax.sharding.Sharding],
    chosen: float,
) -> dict[Key, jax.Array]:
    """Return the arrays that a CPU can use in place, as `loading.fill_arrays` returns all.

    Those are the ones that are stored in the wanted dtype and have one device, a CPU. The others
    have to be copied. chosen: the share of the experts that a token uses. Raises CheckpointError if
    a file has changed since its header was read.
    """
    found, share = {}, _kept_share(wanted, chosen)
    for source in sources:
        key, stored = source.array, source.located
        devices: list[jax.Device] = [*shardings[key].device_set]
        one_cpu = len(devices) == 1 and devices[0].platform == "cpu"
        if not one_cpu or np.dtype(stored.dtype) != wanted[key].dtype:
            continue
        if source.layer in (None, 0):  # the others follow it
            whole = dataclasses.replace(stored, shape=wanted[key].shape)
            layers = 0 if source.layer is None else wanted[key].shape[0]
            always = not _of_experts(key)
            kept = layers if always else int(share * layers)
            values = map_values(whole, source.name, layers, kept, always)
            found[key] = jax.device_put(values, shardings[key])
    return found


def _kept_share(wanted: Mapping[Key, jax.ShapeDtypeStruct], chosen: float) -> float:
    """Return the share of the experts' layers that stay in memory after use: all, or what fits.

    If memory holds what a token uses, some of it is there for the next one, as Linux frees first
    what was used longest ago. If not, that would always be what is needed next.
    """
    sizes = {key: pickle_file.nbytes(array) for key, array in wanted.items()}
    table = (*EMBEDDINGS, 0)
    if table in wanted and (rounded := rounded_stacks(wanted[table])):  # read instead of it
        sizes[table] = sum(pickle_file.nbytes(stack.array) for stack in rounded)
    experts = sum(size for key, size in sizes.items() if _of_experts(key))
    others = sum(sizes.values()) - experts
    memory = available_memory()
    room = math.inf if memory is None else USED_SHARE * memory
    return 1.0 if room >= others + chosen * experts else max(0.0, room - others) / experts


def _of_experts(key: Key) -> bool:
    return EXPERTS in f"{key[0]}/"


def map_values(
    array: Located, name: str, layers: int = 0, kept: int = 0, always: bool = True
) -> np.ndarray:
    """Return an array that is its file: read-only memory, whose pages are read when used.

    layers, kept, always: as in a MappedArray. Values are not checked. Raises CheckpointError, in
    which the array is called `name`, if the file has changed since its header was read, or cannot
    be mapped.
    """
    try:
        with atomic.open_regular(array.path) as file:
            values.require_unchanged(file, array, name)
            place = array.path, file.fileno(), array.offset, array.shape, np.dtype(array.dtype)
            return mapped_files.map_array(*place, layers, kept, always)
    except OSError as problem:
        got = f"an error ({problem.strerror})"
        remedy = "convert it to the safetensors form, if this file system cannot map files"
        raise error(array.path, "a file that can be mapped", got, remedy) from problem

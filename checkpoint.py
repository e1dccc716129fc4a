"""The released checkpoint files <-> parameters: read without running a pickle, shard by shard.

A checkpoint is `DIR/ckpt-0/tensorNNNNN_000`, one file per parameter and layer, and perhaps
`DIR/config.json`. The parameters are `{module: {param: leaf}}`; every leaf of a module under
`transformer/decoder_layer/` is stacked, with a leading layer axis [L, ...]. The files are not:
layer `i` of such a module is stored as `transformer/decoder_layer_{i}/...`, and the file numbers
follow the sorted names, so layers run 0, 1, 10, 11, ..., 2, 20, ...

Each file is a pickle of protocol 4 that holds a numpy array or a QuantizedWeight8bit. Loading a
pickle runs whatever program it holds, so these are never loaded. `_Reader` walks the opcodes and
builds a description: it knows only the opcodes and globals of the layout, writes down calls instead
of making them, and steps over array bytes. What comes out is where in the file each array lies;
from there it is mapped into memory. `_Writer` turns such a description back into the same bytes
that Python's own pickler makes.
"""

import dataclasses
import enum
import errno
import functools
import json
import math
import os
import pickletools
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from quantization import QuantizedWeight8bit

STACKED = "transformer/decoder_layer/"

# A file of the layout has at most 131 opcodes. The limit bounds the time and memory that a hostile
# one can take: an opcode reads at most 255 bytes and makes at most one value.
_MAX_OPCODES = 256
_MAX_CONFIG_BYTES = 1 << 20
# Python's pickler closes a frame that has grown to this size, and keeps larger bytes out of frames.
_FRAME_TARGET = 64 * 1024

_NAMES = {op.code.encode("latin-1"): op.name for op in pickletools.opcodes}
_CODES = {name: code for code, name in _NAMES.items()}
_PROTOCOL_4 = _CODES["PROTO"] + b"\x04"
# Bytes of the little-endian number that follows an opcode.
_WIDTHS = {"BININT1": 1, "BININT2": 2, "BININT": 4}
_WIDTHS |= {"SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8}
_TUPLES = ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")

Params = Mapping[str, Mapping[str, Any]]  # {module: {param: leaf}}
Directory = str | os.PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint is not what was asked for: one sentence says where, how, and what to do."""


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """One file of a checkpoint, as the layout demands it.

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


class _Global(enum.Enum):
    """Every global that a tensor file may name. None is ever imported or called."""

    QUANTIZED = ("__main__", "QuantizedWeight8bit")
    RECONSTRUCT = ("numpy.core.multiarray", "_reconstruct")
    NDARRAY = ("numpy", "ndarray")
    DTYPE = ("numpy", "dtype")
    BFLOAT16 = ("ml_dtypes", "bfloat16")


# How a pickled dtype spells its type: "f4" for float32, but bfloat16 by a global.
_DTYPES: dict[Any, np.dtype] = {np.dtype(t).str[1:]: np.dtype(t) for t in "?bhiqBHIQefd"}
_DTYPES[_Global.BFLOAT16] = np.dtype(ml_dtypes.bfloat16)


# The description of a pickle: None, bool, int, str and tuple stand for themselves, these for more.


@dataclasses.dataclass(eq=False)
class _Object:
    """What `function(*arguments)` returns, with its state; or a dict, if `function` is None.

    The state of a dict is a tuple, (key, value, key, value, ...).
    """

    function: Any = None
    arguments: Any = None
    state: Any = None


@dataclasses.dataclass(eq=False)
class _Bytes:
    """A bytes object at `offset`. `head` is its first byte, b"" if not known (yet)."""

    offset: int
    length: int
    head: bytes = b""


_MARK = object()
_KIND = _Bytes(0, 1, b"b")  # An argument of every `_reconstruct`.


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array in a file. `dtype` is prefixed if its bytes are in no usual order."""

    shape: tuple[int, ...]
    dtype: str
    offset: int


class _Refused(Exception):
    """A file is outside the layout, perhaps because it `ended` too early."""

    def __init__(self, expected: str, got: str, problem: str = "is no tensor file"):
        super().__init__(expected, got, problem)
        self.expected, self.got, self.problem = expected, got, problem
        self.ended = problem == "ends too early"


class _Reader:
    """A pickle machine that writes a description. Its `step` is the list of allowed opcodes."""

    def __init__(self, file: BinaryIO, size: int):
        self.file = file
        self.size = size
        self.position = 0
        self.frame_end = 0
        self.stack: list[Any] = []
        self.memo: list[Any] = []

    def read(self) -> Any:
        """Return the description of the one value in the file."""
        start = self.take(2)
        if start != _PROTOCOL_4:
            raise _Refused(f"{_PROTOCOL_4!r} at its start", repr(start))
        for _ in range(_MAX_OPCODES):
            code = self.take(1)
            opcode = _NAMES.get(code, repr(code))
            if opcode != "STOP":
                self.step(opcode)
                continue
            value = self.pop()
            if self.stack:
                raise _Refused("one value", f"{len(self.stack) + 1}")
            if self.position != self.size:
                raise _Refused(f"{self.position} bytes", f"{self.size}", "is too long")
            if self.frame_end > self.size:
                raise _Refused(f"frames within {self.size} bytes", f"one to {self.frame_end}")
            return value
        raise _Refused(f"at most {_MAX_OPCODES} opcodes", "more")

    def step(self, opcode: str) -> None:
        """Carry out one opcode."""
        match opcode:
            case "FRAME":
                length = int.from_bytes(self.take(8), "little")
                self.frame_end = max(self.frame_end, self.position + length)
                return
            case "MARK":
                value = _MARK
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                value = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode]
            case "BININT1" | "BININT2" | "BININT":
                value = self.number(opcode)
            case "SHORT_BINUNICODE":
                # Text that is not UTF-8 becomes text that is not in the layout.
                value = self.take(self.take(1)[0]).decode(errors="backslashreplace")
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                value = self.skip(self.number(opcode))
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                value = tuple([self.pop() for _ in range(_TUPLES.index(opcode))][::-1])
            case "TUPLE":
                value = self.pop_to_mark()
            case "EMPTY_DICT":
                value = _Object()
            case "NEWOBJ" | "REDUCE":
                arguments, function = self.pop(), self.pop()
                if not isinstance(function, _Global):
                    raise self.misused(opcode)
                value = _Object(function, arguments)
            case "BUILD" | "SETITEMS":
                state = self.pop() if opcode == "BUILD" else self.pop_to_mark()
                value = self.pop()
                if not isinstance(value, _Object) or value.state is not None:
                    raise self.misused(opcode)
                if (value.function is None) != (opcode == "SETITEMS"):
                    raise self.misused(opcode)
                value.state = state
            case "MEMOIZE":
                value = self.pop()
                self.memo.append(value)
            case "BINGET":
                index = self.take(1)[0]
                if index >= len(self.memo):
                    raise self.misused(opcode)
                value = self.memo[index]
            case "STACK_GLOBAL":
                value = self.name_global()
            case _:
                got = f"{opcode} at byte {self.position - 1}"
                raise _Refused("only the pickle opcodes of an array", got)
        self.stack.append(value)

    def reach(self, count: int) -> None:
        if count > self.size - self.position:
            expected = f"{count} more bytes after byte {self.position}"
            raise _Refused(expected, f"{self.size - self.position}", "ends too early")

    def take(self, count: int) -> bytes:
        self.reach(count)
        self.position += count
        data = self.file.read(count)
        if len(data) != count:
            raise _Refused(f"{self.size} bytes", "fewer while it was read", "ends too early")
        return data

    def skip(self, count: int) -> _Bytes:
        """Step over the bytes of an array: however many they are, one is read."""
        self.reach(count)
        offset = self.position
        head = self.take(1) if count else b""
        self.position = offset + count
        self.file.seek(self.position)
        return _Bytes(offset, count, head)

    def number(self, opcode: str) -> int:
        return int.from_bytes(self.take(_WIDTHS[opcode]), "little", signed=opcode == "BININT")

    def misused(self, opcode: str) -> _Refused:
        return _Refused(
            f"{opcode} as an array needs it", f"another use before byte {self.position}"
        )

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise _Refused("a value", f"none before byte {self.position}")
        return self.stack.pop()

    def pop_to_mark(self) -> tuple[Any, ...]:
        if _MARK not in self.stack:
            raise self.misused("MARK")
        start = len(self.stack) - 1 - self.stack[::-1].index(_MARK)
        values = tuple(self.stack[start + 1 :])
        del self.stack[start:]
        return values

    def name_global(self) -> _Global:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise self.misused("STACK_GLOBAL")
        # numpy 2 moved the module; it is the same function.
        place = "numpy.core.multiarray" if module == "numpy._core.multiarray" else module
        try:
            return _Global((place, name))
        except ValueError:
            allowed = ", ".join(".".join(known.value) for known in _Global)
            raise _Refused(f"only the globals {allowed}", repr(f"{module}.{name}")) from None


def _parse(value: Any) -> Any:
    """Return the _Array, or QuantizedWeight8bit of two, that a description stands for.

    A hostile description can be deep, cyclic, or small and endless to print: nothing here looks
    further into it than the patterns do, or prints more of it than single strings.
    """
    match value:
        case _Object(
            _Global.QUANTIZED, (), _Object(None, None, ("weight", weight, "scales", scales))
        ):
            return QuantizedWeight8bit(_parse_array(weight), _parse_array(scales))
    return _parse_array(value)


def _parse_array(value: Any) -> _Array:
    match value:
        # The size, alignment and flags of a dtype add nothing to its name.
        case _Object(
            _Global.RECONSTRUCT,
            (_Global.NDARRAY, (0,), _Bytes(_, 1, b"b")),
            (
                1,
                tuple(shape),
                _Object(
                    _Global.DTYPE,
                    (str() | _Global.BFLOAT16 as code, False, True),
                    (3, str(order), None, None, None, int(), int(), int()),
                ),
                bool(fortran),
                _Bytes() as data,
            ),
        ) if all(type(n) is int and n >= 0 for n in shape):
            pass
        case _:
            raise _Refused("one array or one QuantizedWeight8bit", "something else")
    if code not in _DTYPES:
        raise _Refused("a plain number type, like 'i1' or 'f4'", repr(code))
    dtype = _DTYPES[code]
    size = math.prod(shape) * dtype.itemsize
    if size != data.length:
        expected = f"{size} bytes for its {dtype} {list(shape)}"
        raise _Refused(expected, f"{data.length}", "contradicts itself")
    prefix = "Fortran-ordered " if fortran else ""
    if order != ("|" if dtype.itemsize == 1 else "<"):
        prefix += "big-endian " if order == ">" else f"{order!r}-endian "
    return _Array(shape, f"{prefix}{dtype}", data.offset)


def _describe(leaf: Any) -> _Object:
    """Return the description of the pickle of a leaf: the inverse of `_parse`."""
    if isinstance(leaf, QuantizedWeight8bit):
        items = ("weight", _describe(leaf.weight), "scales", _describe(leaf.scales))
        return _Object(_Global.QUANTIZED, (), _Object(state=items))
    dtype = np.dtype(leaf.dtype)
    code = next(code for code in _DTYPES if _DTYPES[code] == dtype)
    layout = (2, 2, 64) if code is _Global.BFLOAT16 else (-1, -1, 0)
    order = "|" if dtype.itemsize == 1 else "<"
    kind = _Object(_Global.DTYPE, (code, False, True), (3, order, None, None, None, *layout))
    state = (1, tuple(leaf.shape), kind, False, _Bytes(0, _nbytes(leaf)))
    return _Object(_Global.RECONSTRUCT, (_Global.NDARRAY, (0,), _KIND), state)


class _Writer:
    """Pickles a description as Python does in protocol 4.

    pieces: header bytes, with None where the bytes of the next array belong.
    """

    def __init__(self, value: _Object):
        self.pieces: list[bytes | None] = [_PROTOCOL_4]
        self.frame: list[bytes | None] = []
        self.frame_size = 0
        self.memo: dict[Any, int] = {}
        self.put(value)
        self.emit("STOP")
        self.close_frame()

    def emit(self, opcode: str, argument: bytes = b"") -> None:
        self.frame.append(_CODES[opcode] + argument)
        self.frame_size += 1 + len(argument)

    def close_frame(self) -> None:
        self.pieces += [_CODES["FRAME"] + self.frame_size.to_bytes(8, "little"), *self.frame]
        self.frame, self.frame_size = [], 0

    def memoize(self, key: Any) -> None:
        self.memo[key] = len(self.memo)
        self.emit("MEMOIZE")

    def put(self, value: Any) -> None:
        """Write one value and what it is made of, storing and recalling as the pickler does."""
        if self.frame_size >= _FRAME_TARGET:
            self.close_frame()
        # Equal tuples are distinct objects in these files: stored, never recalled.
        key = object() if isinstance(value, tuple) else value
        if key in self.memo:
            self.emit("BINGET", bytes([self.memo[key]]))
            return
        match value:
            case None | True | False:
                self.emit({None: "NONE", True: "NEWTRUE", False: "NEWFALSE"}[value])
                return
            case int():
                short = 0 <= value < 1 << 16
                opcode = ("BININT1" if value < 1 << 8 else "BININT2") if short else "BININT"
                self.emit(opcode, value.to_bytes(_WIDTHS[opcode], "little", signed=not short))
                return
            case ():
                self.emit("EMPTY_TUPLE")
                return
            case _Object():
                self.put_object(value)
                return
            case str():
                self.emit("SHORT_BINUNICODE", bytes([len(value)]) + value.encode())
            case _Bytes():
                self.put_bytes(value)
            case _Global():
                self.put(value.value[0])
                self.put(value.value[1])
                self.emit("STACK_GLOBAL")
            case tuple():
                if len(value) >= len(_TUPLES):
                    self.emit("MARK")
                for item in value:
                    self.put(item)
                self.emit(_TUPLES[len(value)] if len(value) < len(_TUPLES) else "TUPLE")
        self.memoize(key)

    def put_object(self, value: _Object) -> None:
        if value.function is None:
            self.emit("EMPTY_DICT")
            self.memoize(value)
            self.emit("MARK")
            for item in value.state:
                self.put(item)
            self.emit("SETITEMS")
            return
        self.put(value.function)
        self.put(value.arguments)
        self.emit("REDUCE" if value.arguments else "NEWOBJ")
        self.memoize(value)
        self.put(value.state)
        self.emit("BUILD")

    def put_bytes(self, value: _Bytes) -> None:
        """Write a bytes object, leaving room for what is not known yet."""
        large = "BINBYTES" if value.length < 1 << 32 else "BINBYTES8"
        opcode = "SHORT_BINBYTES" if value.length < 1 << 8 else large
        length = value.length.to_bytes(_WIDTHS[opcode], "little")
        if value.length >= _FRAME_TARGET:
            self.close_frame()
            self.pieces += [_CODES[opcode] + length, None]
        else:
            self.emit(opcode, length)
            self.frame.append(value.head or None)
            self.frame_size += value.length


def _nbytes(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def _size(leaf: Any) -> int:
    header = sum(len(piece) for piece in _Writer(_describe(leaf)).pieces if piece is not None)
    return header + sum(map(_nbytes, jax.tree.leaves(leaf)))


def _text(leaf: Any) -> str:
    """Return what errors call a leaf, "float32 [6144, 8]": equal texts are equal leaves."""
    if isinstance(leaf, QuantizedWeight8bit):
        return f"quantised {_text(leaf.weight)} with scales {_text(leaf.scales)}"
    return f"{leaf.dtype} {list(leaf.shape)}"


def _error(where: str, expected: str, got: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{where}: expected {expected}, got {got}; {remedy}")


def _open(path: str) -> BinaryIO:
    """Open a regular file. Anything else is an OSError: opening a pipe would wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    return open(path, "rb")


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
    entries: list[tuple[str, str, str, int | None, Any]] = []
    depths = set()
    for module, params in shapes.items():
        for param, leaf in params.items():
            _check_leaf(f"{module}/{param}", leaf)
            if not module.startswith(STACKED):
                entries.append((module, param, module, None, leaf))
                continue
            layers = {array.shape[0] for array in jax.tree.leaves(leaf)}
            depths |= layers
            own = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), leaf)
            for layer in range(max(layers)):
                name = f"{STACKED[:-1]}_{layer}/{module.removeprefix(STACKED)}"
                entries.append((name, param, module, layer, own))
    if len(depths) > 1:
        raise ValueError(f"stacked parameters: expected one number of layers, got {sorted(depths)}")
    entries.sort(key=lambda entry: entry[:2])
    return [
        TensorFile(f"tensor{i:05d}_000", f"{name}/{param}", module, param, layer, leaf, _size(leaf))
        for i, (name, param, module, layer, leaf) in enumerate(entries)
    ]


def _check_leaf(name: str, leaf: Any) -> None:
    """Raise ValueError if the layout has no place for a leaf."""
    arrays = jax.tree.leaves(leaf)
    dtypes = [np.dtype(array.dtype) for array in arrays]
    if isinstance(leaf, QuantizedWeight8bit):
        known = dtypes == [np.dtype(np.int8), np.dtype(ml_dtypes.bfloat16)]
    else:
        known = dtypes[0] in _DTYPES.values()
    if not known or any(size >= 1 << 31 for array in arrays for size in array.shape):
        raise ValueError(
            f"{name}: expected numbers, or int8 with bfloat16 scales, and axes shorter than 2**31, "
            f"got {_text(leaf)}"
        )


def load(
    directory: Directory,
    shapes: Params,
    shardings: Params | None = None,
    dtypes: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, dict[str, Any]]:
    """Load DIR/ckpt-0 onto devices, each device reading only its own slices.

    All names, sizes and headers are checked before anything is put on a device. Stacked parameters
    are allocated once and filled in place layer by layer, so beside the parameters there is never
    more than one file's worth of data, on the host or on the devices.

    shapes: what the files must hold, as in `files`.
    shardings: a jax.sharding.Sharding for each array of `shapes`, in the same structure, that does
        not split the layer axis. None: everything on the default device.
    dtypes: {"module/param": dtype}: float parameters to cast on the way to the device.
    progress: called as progress(bytes_done, bytes_total) after each file.

    Returns {module: {param: leaf}} of jax.Array, structured like `shapes`.
    Raises CheckpointError if the files are not those of `shapes`, ValueError if the other arguments
    do not fit `shapes`.
    """
    records = files(shapes)
    wanted = _cast(shapes, dtypes or {})
    if shardings is not None:
        jax.tree_util.tree_map_with_path(_check_sharding, wanted, shardings)
    folder = os.path.join(directory, "ckpt-0")
    _check_names(folder, records)
    headers = [_read_header(folder, record) for record in records]
    if shardings is None:
        default = jnp.zeros(()).sharding
        shardings = jax.tree.map(lambda _: default, shapes)

    params = {
        module: jax.tree.map(_allocate, leaves, shardings[module])
        if module.startswith(STACKED)
        else dict(leaves)
        for module, leaves in wanted.items()
    }
    done, total = 0, sum(record.size for record in records)
    for record, header in zip(records, headers, strict=True):
        leaves = params[record.module]
        leaf = jax.tree.map(
            functools.partial(_load_array, folder, record),
            header,
            record.leaf,
            leaves[record.param],
            shardings[record.module][record.param],
        )
        # Transfers run in the background: waiting keeps the host at one file's worth of data.
        leaves[record.param] = jax.block_until_ready(leaf)
        done += record.size
        if progress is not None:
            progress(done, total)
    return params


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


def _tensor_names(folder: str) -> set[str]:
    return {name for name in os.listdir(folder) if re.fullmatch("tensor[0-9]+_[0-9]+", name)}


def _check_names(folder: str, records: list[TensorFile]) -> None:
    """Raise CheckpointError unless the folder's tensor files are exactly those of `records`."""
    try:
        found = _tensor_names(folder)
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
    """Return the _Array, or QuantizedWeight8bit of two, of a file that is what `record` says.

    A file that passes has the right length too: its arrays have the expected number of bytes, all
    there, and nothing follows them.
    """
    where = f"{os.path.join(folder, record.file)} ({record.name})"
    size = f"{record.size} bytes"
    try:
        with _open(os.path.join(folder, record.file)) as file:
            length = os.fstat(file.fileno()).st_size
            leaf = _parse(_Reader(file, length).read())
    except OSError as error:
        got = f"an error ({error.strerror})"
        remedy = "check its permissions, or download it again"
        raise _error(where, f"a readable file of {size}", got, remedy) from error
    except _Refused as refusal:
        remedy = "download it again"
        if refusal.ended and length < record.size:
            raise _error(f"{where}: the file is cut", size, f"{length}", remedy) from refusal
        where = f"{where}: the file {refusal.problem}"
        raise _error(where, refusal.expected, refusal.got, remedy) from refusal
    if _text(leaf) == _text(record.leaf):
        return leaf
    kinds = (isinstance(record.leaf, QuantizedWeight8bit), isinstance(leaf, QuantizedWeight8bit))
    if kinds == (True, False) and "float" in leaf.dtype:
        remedy = "this checkpoint is not quantised: load it as float, or quantise and save it first"
    elif kinds == (False, True):
        remedy = "this checkpoint is quantised: load it as int8 with scales"
    elif "-" in _text(leaf):
        remedy = "save it again, little-endian and in C order"
    else:
        remedy = "check that the configuration is that of this checkpoint"
    raise _error(where, _text(record.leaf), _text(leaf), remedy)


def _allocate(array: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
    zeros = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)
    return zeros(array.shape, array.dtype)


def _load_array(
    folder: str,
    record: TensorFile,
    stored: _Array,
    part: jax.ShapeDtypeStruct,
    target: Any,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """Put one array of a checked file on the devices: by itself, or as a layer of `target`.

    part: what is stored. target: what is wanted; a stack [L, ...] is donated and comes back filled.
    """
    path = os.path.join(folder, record.file)
    try:
        view: np.ndarray = np.memmap(
            path, part.dtype, mode="r", offset=stored.offset, shape=part.shape
        )
    except (OSError, ValueError) as error:
        where, got = f"{path} ({record.name})", f"one that changed after the check ({error})"
        remedy = "load it again when nothing else writes to it"
        raise _error(where, f"a file of {record.size} bytes", got, remedy) from error
    if record.layer is not None:
        # With an axis of one layer, it can take the sharding of the whole stack.
        view = view[None]

    def read(index: Any) -> np.ndarray:
        # A copy: on a CPU, the array could otherwise go on living in the mapped file.
        return np.array(view[index], dtype=target.dtype, order="C")

    array = jax.make_array_from_callback(view.shape, sharding, read)
    if record.layer is None:
        return array
    return jax.jit(_set_layer, donate_argnums=0, out_shardings=sharding)(
        target, array, record.layer
    )


def _set_layer(stack: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    """Replace layer `index` of [L, ...] by [1, ...]."""
    return lax.dynamic_update_index_in_dim(stack, layer, index, axis=0)


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
    folder = os.path.join(directory, "ckpt-0")
    os.makedirs(folder, exist_ok=True)
    stale = sorted(_tensor_names(folder) - {record.file for record in records})
    if stale:
        raise _error(
            os.path.join(folder, stale[0]),
            f"only tensor files that the {len(records)} new ones replace",
            f"{len(stale)} that would be left over",
            "remove them, or save to another directory",
        )
    for record in records:
        leaf = params[record.module][record.param]
        _write(os.path.join(folder, record.file), _contents(record, leaf))
    if text is not None:
        _write(os.path.join(directory, "config.json"), [text])


def _native(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, np.dtype(array.dtype).newbyteorder("="))


def _contents(record: TensorFile, leaf: Any) -> Iterator[Any]:
    """Yield the bytes of one file."""
    arrays = zip(jax.tree.leaves(leaf), jax.tree.leaves(record.leaf), strict=True)
    for piece in _Writer(_describe(record.leaf)).pieces:
        if piece is not None:
            yield piece
            continue
        array, part = next(arrays)
        if record.layer is not None:
            on_device = isinstance(array, jax.Array)
            array = _get_layer(array, record.layer) if on_device else array[record.layer]
        own = np.asarray(array, dtype=part.dtype, order="C")
        yield own.reshape(-1).view(np.uint8)  # The buffer protocol does not know bfloat16.


def _write(path: str, contents: Iterable[Any]) -> None:
    """Write a file under a temporary name beside it, and rename it when it is safely stored."""
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.partial")
    try:
        with open(temporary, "wb") as file:
            for piece in contents:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise

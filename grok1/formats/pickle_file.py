"""The format of one checkpoint file: a numpy array or a QuantizedWeight8bit, as a pickle.

Loading a pickle can run arbitrary code, so these are never loaded. `_Reader` walks the opcodes and
builds a description: it accepts only the opcodes and globals of the layout, records calls instead
of making them, and skips array bytes. The result is the offset of each array in the file. `_Writer`
turns such a description back into the bytes that Python's own pickler writes.

A leaf is what a file holds: an array, or a QuantizedWeight8bit of two. An array is anything with a
`shape` and a `dtype`, like jax.ShapeDtypeStruct; only `contents` needs the values.
"""

import dataclasses
import enum
import math
import pickletools
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import jax
import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike

from grok1.formats.atomic import FileVersion, Piece
from grok1.ops.quantization import QuantizedWeight, QuantizedWeight4bit, QuantizedWeight8bit

# A file of the layout has at most 131 opcodes. The limit bounds the time and memory that a hostile
# file can take: an opcode reads at most 255 bytes and makes at most one value.
_MAX_OPCODES = 256
_MAX_AXES = 8  # of an array; stored ones have up to three. Bounds their product, which is printed.
# Python's pickler closes a frame that has grown to this size, and keeps larger bytes out of frames.
_FRAME_TARGET = 64 * 1024

_NAMES = {op.code.encode("latin-1"): op.name for op in pickletools.opcodes}
_CODES = {name: code for code, name in _NAMES.items()}
_PROTOCOL_4 = _CODES["PROTO"] + b"\x04"
# Bytes of the little-endian number that follows an opcode.
_WIDTHS = {"BININT1": 1, "BININT2": 2, "BININT": 4}
_WIDTHS |= {"SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8}
_TUPLES = ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")


class LayoutError(ValueError):
    """A file does not follow the layout. `ended`: because it ends too early."""

    def __init__(self, expected: str, got: str, problem: str = "is not a tensor file"):
        super().__init__(f"{problem}: expected {expected}, got {got}")
        self.ended = problem == "ends too early"


@dataclasses.dataclass(frozen=True)
class Located:
    """An array whose bytes begin at `offset`; `dtype` names an unusual byte or memory order.

    path, stamp: of the file that holds it, if known.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: int
    path: str = ""
    stamp: FileVersion | None = None


# What has a shape and a dtype; what a file holds, and where it holds it.
Array = Located | jax.ShapeDtypeStruct | jax.Array | np.ndarray
Leaf = Array | QuantizedWeight
StoredLeaf = Located | QuantizedWeight


def read_header(file: BinaryIO, size: int) -> StoredLeaf:
    """Return the Located, or QuantizedWeight8bit of two, that an open file of `size` bytes holds.

    Raises LayoutError if their bytes are incomplete, something follows them, or the file is not of
    the layout.
    """
    return _parse(_Reader(file, size).read())


def contents(leaf: Leaf, arrays: Iterable[ArrayLike]) -> Iterator[Piece]:
    """Yield the file of a leaf in pieces of bytes; `arrays` are its arrays' values."""
    pairs = zip(_arrays(leaf), arrays, strict=True)
    return join(leaf, ([np.asarray(v, dtype=array.dtype, order="C")] for array, v in pairs))


def join(leaf: Leaf, arrays: Iterable[Iterable[np.ndarray]]) -> Iterator[Piece]:
    """Yield the file of a leaf in pieces of bytes; `arrays` are its arrays, in pieces, in C order.

    A piece is requested only when the previous one is no longer needed.
    """
    remaining = iter(arrays)
    for piece in _header(leaf):
        if piece is not None:
            yield piece
            continue
        for values in next(remaining):
            yield values.reshape(-1).view(np.uint8)  # The buffer protocol does not know bfloat16.


def file_size(leaf: Leaf) -> int:
    """Return the exact length in bytes of the file of a leaf, as `contents` writes it.

    It is 0 for a matrix of 4 bits, which only the safetensors form can hold.
    """
    if isinstance(leaf, QuantizedWeight4bit):
        return 0
    header = sum(len(piece) for piece in _header(leaf) if piece is not None)
    return header + sum(map(nbytes, _arrays(leaf)))


def describe(leaf: Leaf) -> str:
    """Describe a leaf for errors, "float32 [6144, 8]"; equal leaves have equal descriptions."""
    if isinstance(leaf, QuantizedWeight4bit):
        return f"4-bit {list(leaf.shape)} with scales {describe(leaf.scales)}"
    if isinstance(leaf, QuantizedWeight8bit):
        return f"quantized {describe(leaf.weight)} with scales {describe(leaf.scales)}"
    return f"{leaf.dtype} {list(leaf.shape)}"


def nbytes(array: Array) -> int:
    """Return how many bytes an array's values take."""
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def check(name: str, leaf: Leaf) -> None:
    """Raise ValueError, with the name, if the layout does not support a leaf."""
    arrays = _arrays(leaf)
    dtypes = [np.dtype(array.dtype) for array in arrays]
    if isinstance(leaf, QuantizedWeight):
        known = dtypes == [np.dtype(np.int8), np.dtype(ml_dtypes.bfloat16)]
    else:
        known = dtypes[0] in _DTYPES.values()
    if not known or not all(0 < size < 1 << 31 for array in arrays for size in array.shape):
        raise ValueError(
            f"{name}: expected numbers, or int8 with bfloat16 scales, and axes of 1 to 2**31 - 1, "
            f"got {describe(leaf)}"
        )


def _arrays(leaf: Leaf) -> list[Array]:
    return [leaf.weight, leaf.scales] if isinstance(leaf, QuantizedWeight) else [leaf]


def _header(leaf: Leaf) -> list[bytes | None]:
    """Return the bytes of the file of a leaf, with None in place of those of each array."""
    return _Writer().write(_unparse(leaf))


# The description of a pickle consists of None, bool, int, str, tuple and the classes below.


class _Global(enum.Enum):
    """Every global that a tensor file may name. They are never imported or called."""

    QUANTIZED = ("__main__", "QuantizedWeight8bit")
    RECONSTRUCT = ("numpy.core.multiarray", "_reconstruct")
    NDARRAY = ("numpy", "ndarray")
    DTYPE = ("numpy", "dtype")
    BFLOAT16 = ("ml_dtypes", "bfloat16")


@dataclasses.dataclass(eq=False)
class _Object:
    """The result of `function(*arguments)`, with its state; or a dict, if `function` is None.

    The state of a dict is a tuple, (key, value, key, value, ...).
    """

    function: object = None
    arguments: object = None
    state: Any = None


@dataclasses.dataclass(eq=False)
class _Bytes:
    """A bytes object at `offset`. `head` is its first byte, b"" if unknown."""

    offset: int
    length: int
    head: bytes = b""


_KIND = _Bytes(0, 1, b"b")  # An argument of every `_reconstruct`.

# The type code in a pickled dtype: "f4" for float32, but a global for bfloat16.
_DTYPES: dict[str | _Global, np.dtype] = {np.dtype(t).str[1:]: np.dtype(t) for t in "?bhiqBHIQefd"}
_DTYPES[_Global.BFLOAT16] = np.dtype(ml_dtypes.bfloat16)


def _parse(value: object) -> StoredLeaf:
    """Return the Located, or QuantizedWeight8bit of two, that a description stands for.

    A hostile description can be deep or cyclic, or small but endless to print. So it is inspected
    only as deep as the patterns go, and only single strings of it are printed.
    """
    match value:
        case _Object(
            _Global.QUANTIZED, (), _Object(None, None, ("weight", weight, "scales", scales))
        ):
            leaf = QuantizedWeight8bit(_parse_array(weight), _parse_array(scales))
            # A pickle can refer to the same bytes twice, but not to a part of them.
            if leaf.weight.offset == leaf.scales.offset:
                expected, got = "bytes of their own for weight and scales", "the same for both"
                raise LayoutError(expected, got, "contradicts itself")
            return leaf
    return _parse_array(value)


def _parse_array(value: object) -> Located:
    match value:
        # The size, alignment and flags of a dtype follow from its name.
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
        ) if len(shape) <= _MAX_AXES and all(type(n) is int and n >= 0 for n in shape):
            pass
        case _:
            raise LayoutError("one array or one QuantizedWeight8bit", "something else")
    if code not in _DTYPES:
        raise LayoutError("a plain number type, like 'i1' or 'f4'", repr(code))
    dtype = _DTYPES[code]
    size = math.prod(shape) * dtype.itemsize
    if size != data.length:
        expected = f"{size} bytes for its {dtype} {list(shape)}"
        raise LayoutError(expected, f"{data.length}", "contradicts itself")
    prefix = "Fortran-ordered " if fortran else ""
    if order != ("|" if dtype.itemsize == 1 else "<"):
        prefix += "big-endian " if order == ">" else f"{order!r}-endian "
    return Located(shape, f"{prefix}{dtype}", data.offset)


def _unparse(leaf: Leaf) -> _Object:
    """Return the description of the pickle of a leaf: the inverse of `_parse`."""
    if isinstance(leaf, QuantizedWeight8bit):
        items = ("weight", _unparse(leaf.weight), "scales", _unparse(leaf.scales))
        return _Object(_Global.QUANTIZED, (), _Object(state=items))
    assert not isinstance(leaf, QuantizedWeight4bit)
    dtype = np.dtype(leaf.dtype)
    code = next(code for code in _DTYPES if _DTYPES[code] == dtype)
    layout = (2, 2, 64) if code is _Global.BFLOAT16 else (-1, -1, 0)
    order = "|" if dtype.itemsize == 1 else "<"
    kind = _Object(_Global.DTYPE, (code, False, True), (3, order, None, None, None, *layout))
    state = (1, tuple(leaf.shape), kind, False, _Bytes(0, nbytes(leaf)))
    return _Object(_Global.RECONSTRUCT, (_Global.NDARRAY, (0,), _KIND), state)


# Bytes <-> description.

_MARK = object()


class _Reader:
    """A pickle machine that builds a description. `step` defines the allowed opcodes."""

    def __init__(self, file: BinaryIO, size: int):
        self.file = file
        self.size = size
        self.position = 0
        self.frame_end = 0
        self.stack: list[object] = []
        self.memo: list[object] = []

    def read(self) -> object:
        """Return the description of the one value in the file."""
        start = self.take(2)
        if start != _PROTOCOL_4:
            raise LayoutError(f"{_PROTOCOL_4!r} at its start", repr(start))
        for _ in range(_MAX_OPCODES):
            code = self.take(1)
            opcode = _NAMES.get(code, repr(code))
            if opcode == "STOP":
                return self.stop()
            self.step(opcode)
        raise LayoutError(f"at most {_MAX_OPCODES} opcodes", "more")

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
                # Invalid UTF-8 becomes a string that is not in the layout.
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
                raise LayoutError("only the pickle opcodes of an array", got)
        self.stack.append(value)

    def stop(self) -> object:
        """Return the only value on the stack. Raises LayoutError unless the file ends here."""
        value = self.pop()
        if self.stack:
            raise LayoutError("one value", f"{len(self.stack) + 1}")
        if self.position != self.size:
            raise LayoutError(f"{self.position} bytes", f"{self.size}", "is too long")
        if self.frame_end > self.size:
            raise LayoutError(f"frames within {self.size} bytes", f"one to {self.frame_end}")
        return value

    def reach(self, count: int) -> None:
        if count > self.size - self.position:
            expected = f"{count} more bytes after byte {self.position}"
            raise LayoutError(expected, f"{self.size - self.position}", "ends too early")

    def take(self, count: int) -> bytes:
        self.reach(count)
        self.position += count
        data = self.file.read(count)
        if len(data) != count:
            raise LayoutError(f"{self.size} bytes", "fewer while it was read", "ends too early")
        return data

    def skip(self, count: int) -> _Bytes:
        """Skip the bytes of an array, reading only the first byte."""
        self.reach(count)
        offset = self.position
        head = self.take(1) if count else b""
        self.position = offset + count
        self.file.seek(self.position)
        return _Bytes(offset, count, head)

    def number(self, opcode: str) -> int:
        return int.from_bytes(self.take(_WIDTHS[opcode]), "little", signed=opcode == "BININT")

    def misused(self, opcode: str) -> LayoutError:
        return LayoutError(
            f"{opcode} as used for an array", f"another use before byte {self.position}"
        )

    def pop(self) -> object:
        if not self.stack or self.stack[-1] is _MARK:
            raise LayoutError("a value", f"none before byte {self.position}")
        return self.stack.pop()

    def pop_to_mark(self) -> tuple[object, ...]:
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
        # NumPy 2 renamed the module of this function.
        place = "numpy.core.multiarray" if module == "numpy._core.multiarray" else module
        try:
            return _Global((place, name))
        except ValueError:
            allowed = ", ".join(".".join(known.value) for known in _Global)
            raise LayoutError(f"only the globals {allowed}", repr(f"{module}.{name}")) from None


class _Writer:
    """Writes a pickle of protocol 4, as Python does, without the bytes of arrays."""

    def __init__(self) -> None:
        self.pieces: list[bytes | None] = [_PROTOCOL_4]
        self.frame: list[bytes | None] = []
        self.frame_size = 0
        self.memo: dict[object, int] = {}

    def write(self, value: _Object) -> list[bytes | None]:
        """Return the bytes of the file that holds the value, with None for those of each array."""
        self.put(value)
        self.emit("STOP")
        self.close_frame()
        return self.pieces

    def put(self, value: Any) -> None:
        """Write a value and its parts, memoizing them as Python's pickler does."""
        if self.frame_size >= _FRAME_TARGET:
            self.close_frame()
        # Equal tuples are distinct objects in these files: memoized, but never recalled.
        key = object() if isinstance(value, tuple) else value
        if key in self.memo:
            self.emit("BINGET", bytes([self.memo[key]]))
            return
        match value:
            case None | True | False | ():
                names = {None: "NONE", True: "NEWTRUE", False: "NEWFALSE", (): "EMPTY_TUPLE"}
                self.emit(names[value])
                return
            case int():
                short = 0 <= value < 1 << 16
                opcode = ("BININT1" if value < 1 << 8 else "BININT2") if short else "BININT"
                self.emit(opcode, value.to_bytes(_WIDTHS[opcode], "little", signed=not short))
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

    def emit(self, opcode: str, argument: bytes = b"") -> None:
        self.frame.append(_CODES[opcode] + argument)
        self.frame_size += 1 + len(argument)

    def memoize(self, key: object) -> None:
        self.memo[key] = len(self.memo)
        self.emit("MEMOIZE")

    def close_frame(self) -> None:
        self.pieces += [_CODES["FRAME"] + self.frame_size.to_bytes(8, "little"), *self.frame]
        self.frame, self.frame_size = [], 0

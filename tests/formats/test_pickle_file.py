"""Tensor files are read and written as pickle reads and writes them, and no pickle is run."""

import builtins
import io
import math
import os
import pathlib
import pickle
import pickletools
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from grok1.formats import pickle_file
from grok1.formats.pickle_file import LayoutError, Located
from grok1.ops.quantization import QuantizedWeight8bit
from paths import DATA


class StandIn:
    """What pickle knows as `__main__.QuantizedWeight8bit`."""

    __module__, __qualname__ = "__main__", "QuantizedWeight8bit"

    def __init__(self, weight: Any, scales: Any):
        self.weight = weight
        self.scales = scales


@pytest.fixture
def dumps(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], bytes]:
    """pickle.dumps, protocol 4, that names the class and numpy's function as the layout does."""
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "QuantizedWeight8bit", StandIn, raising=False)
    function = np.zeros(0).__reduce__()[0]
    monkeypatch.setattr(function, "__module__", "numpy.core.multiarray")
    return lambda value: pickle.dumps(value, protocol=4)


def arrays_of(leaf: Any) -> list[Any]:
    """The array of a leaf, or its weight and scales."""
    return [leaf.weight, leaf.scales] if hasattr(leaf, "weight") else [leaf]


def written(leaf: Any) -> bytes:
    """The file of a leaf of numpy arrays."""
    return b"".join(pickle_file.contents(leaf, arrays_of(leaf)))


def read(data: bytes) -> Any:
    return pickle_file.read_header(io.BytesIO(data), len(data))


def bytes_at(data: bytes, place: Located) -> bytes:
    """The bytes of an array that was found."""
    item_size = np.dtype(place.dtype.split()[-1]).itemsize
    end = place.offset + math.prod(place.shape) * item_size
    assert end <= len(data)
    return data[place.offset : end]


def floats(dtype: Any = np.float32, shape: tuple[int, ...] = (8, 2)) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


# Reading and writing.

ODD_SHAPES = [
    (), (1,), (5,), (0,), (255,), (256,), (3, 4), (2, 3, 4), (2, 1, 2, 1), (1,) * 6, (70_000,),
    (300, 2), (16_320,), (16_350,), (16_383,), (16_384,), (16_385,),
]  # fmt: skip
ODD_PAIRS = [  # Pickle ends frames at 64 KiB: weights and scales of about that size.
    (weight, scales)
    for weight in ((3, 4), (1, 65_000), (1, 65_352), (1, 65_400), (1, 65_535), (1, 65_536))
    for scales in ((1, 4), (1, 128), (1, 32_600), (1, 32_700), (1, 32_767), (1, 32_768))
]


def odd_leaves() -> Iterator[Any]:
    """Arrays of all dtypes, and of shapes near the limits of opcodes and frames."""
    rng = np.random.default_rng(0)
    for shape in ODD_SHAPES:
        yield np.asarray(rng.normal(size=shape)).astype(np.float32)
    for dtype in (np.int8, np.uint8, np.uint16, np.int64, np.float16, np.float64, np.bool_):
        yield rng.integers(0, 2, size=(3, 5)).astype(dtype)
    yield rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16)
    for weight, scales in ODD_PAIRS:
        yield QuantizedWeight8bit(
            rng.integers(-128, 128, size=weight).astype(np.int8),
            rng.normal(size=scales).astype(ml_dtypes.bfloat16),
        )


def test_files_equal_pickles_and_arrays_are_located(
    dumps: Callable[[Any], bytes],
) -> None:
    for leaf in odd_leaves():
        data, text = written(leaf), pickle_file.describe(leaf)
        whole = StandIn(leaf.weight, leaf.scales) if hasattr(leaf, "weight") else leaf
        assert data == dumps(whole), text
        assert pickle_file.file_size(leaf) == len(data), text
        header = read(data)
        assert pickle_file.describe(header) == text
        for place, array in zip(arrays_of(header), arrays_of(leaf), strict=True):
            assert bytes_at(data, place) == array.tobytes(), text


def test_unusual_byte_and_memory_orders_are_named(
    dumps: Callable[[Any], bytes],
) -> None:
    ints, scales = np.ones((4, 3), np.int8), np.ones((1, 3), ml_dtypes.bfloat16)
    for value, text in (
        (np.asfortranarray(floats()), "Fortran-ordered float32 [8, 2]"),
        (floats(">f4"), "big-endian float32 [8, 2]"),
        (np.asfortranarray(floats(">f8")), "Fortran-ordered big-endian float64 [8, 2]"),
        (
            StandIn(np.asfortranarray(ints), scales),
            "quantized Fortran-ordered int8 [4, 3] with scales bfloat16 [1, 3]",
        ),
    ):
        data = dumps(value)
        header = read(data)
        assert pickle_file.describe(header) == text
        for place, array in zip(arrays_of(header), arrays_of(value), strict=True):
            assert bytes_at(data, place) == array.tobytes(order="A")
    data = written(floats()).replace(b"\x8c\x01<", b"\x8c\x01=")
    assert pickle_file.describe(read(data)) == "'='-endian float32 [8, 2]"


def test_arrays_over_4_gib_are_located_but_not_read(tmp_path: pathlib.Path) -> None:
    """Their length takes eight bytes. Neither the zeros nor the hole in the file use space."""
    above, below = (np.zeros((rows, 1 << 16), np.int8) for rows in (0x10000, 0xFFFF))
    size = pickle_file.file_size(above)
    # Beside the eight-byte length, the row count no longer fits two bytes.
    assert size - above.nbytes == pickle_file.file_size(below) - below.nbytes + 4 + 2
    with open(tmp_path / "large", "wb") as file:
        for piece in pickle_file.contents(above, [above]):
            if len(piece) == above.nbytes:
                file.seek(above.nbytes, os.SEEK_CUR)
            else:
                file.write(piece)
    assert (tmp_path / "large").stat().st_size == size
    started = time.perf_counter()
    with open(tmp_path / "large", "rb") as file:
        header = pickle_file.read_header(file, size)
    assert time.perf_counter() - started < 1
    assert header.shape == above.shape and header.offset + above.nbytes < size


def test_files_of_numpy_2_are_read(
    dumps: Callable[[Any], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    function = np.zeros(0).__reduce__()[0]
    monkeypatch.setattr(function, "__module__", "numpy._core.multiarray")
    data = dumps(floats())
    assert b"numpy._core.multiarray" in data
    assert bytes_at(data, read(data)) == floats().tobytes()


# Damaged and hostile files.


class Evil:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any):
        self.function = function
        self.arguments = arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def raw(opcodes: bytes) -> bytes:
    """A pickle of these opcodes, followed by enough bytes that it does not end too early."""
    return b"\x80\x04" + opcodes + bytes(300)


def changed(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


def pair(weight: Any = None, **state: Any) -> StandIn:
    """A QuantizedWeight8bit, valid but for the arguments."""
    value = StandIn(INTS.weight if weight is None else weight, INTS.scales)
    value.__dict__.update(state)
    return value


def doubled(start: int, count: int) -> bytes:
    """Opcodes for 2**count values: each tuple holds the previous one twice, from memo `start`."""
    return b"".join(b"h" + bytes([start + i]) + b"\x86\x94" for i in range(count))


def sharing() -> bytes:
    """A file whose weight and scales are the same bytes."""
    shapes = (jax.ShapeDtypeStruct((4, 2), np.int8), jax.ShapeDtypeStruct((2, 2), jnp.bfloat16))
    value = pickle_file._unparse(QuantizedWeight8bit(*shapes))
    _, weight, _, scales = value.state.state
    scales.state = (*scales.state[:-1], weight.state[-1])
    return b"".join(piece or bytes(8) for piece in pickle_file._Writer().write(value))


# fmt: off
FLOATS = floats()
INTS = QuantizedWeight8bit(np.ones((2, 16, 8), np.int8), np.ones((2, 8, 8), ml_dtypes.bfloat16))
FLOAT_FILE, INT_FILE = written(FLOATS), written(INTS)
HARM = "import builtins; builtins.harmed = True"
OPEN = "is not a tensor file: expected only the pickle opcodes of an array, got"
ONLY = "expected only the globals __main__.QuantizedWeight8bit, numpy.core.multiarray._reconstruct"
NOTHING = "is not a tensor file: expected one array or one QuantizedWeight8bit, got something else"
SHAPE = b"K\x08K\x02\x86"  # (8, 2)

# id -> (the file, or an object to pickle; parts of the message)
CASES: dict[str, tuple[Any, ...]] = {
    # Files that are incomplete or of another format.
    "empty": (b"", "ends too early: expected 2 more bytes after byte 0, got 0"),
    "cut-in-weight": (INT_FILE[:300], "ends too early: expected 256 more bytes"),
    "cut-by-a-byte": (INT_FILE[:-1], "ends too early: expected 1 more bytes after byte 813, got 0"),
    "long-by-a-byte": (INT_FILE + b"\0", "is too long: expected 814 bytes, got 815"),
    "html": (b"<html>404</html>", r"expected b'\x80\x04' at its start, got b'<h'"),
    "protocol-5": (pickle.dumps(FLOATS, protocol=5), r"at its start, got b'\x80\x05'"),
    "protocol-again": (FLOAT_FILE[:2] + FLOAT_FILE, f"{OPEN} PROTO at byte 2"),
    # Other values.
    "complex": (floats(np.complex64), "plain number type", "got 'c8'"),
    "records": (np.zeros(2, "i4,f4"), NOTHING),
    "number": (1, NOTHING),
    "dict": ({}, NOTHING),
    "tuple": ((FLOATS, FLOATS), NOTHING),
    "array-without-state": (FLOAT_FILE[:2] + FLOAT_FILE[11:83] + b".", NOTHING),
    "extra-state": (pair(bias=FLOATS), NOTHING),
    "nested": (pair(StandIn(FLOATS, FLOATS)), NOTHING),
    "shared-bytes": (sharing(), "contradicts itself: expected bytes of their own for weight"),
    "nine-axes": (changed(FLOAT_FILE, SHAPE, b"(" + b"K\x01" * 9 + b"t"), NOTHING),
    # Wrong sizes.
    "negative-axis": (changed(FLOAT_FILE, SHAPE, b"K\x08J\xff\xff\xff\xff\x86"), NOTHING),
    "short-data": (changed(FLOAT_FILE, SHAPE, b"K\x09K\x02\x86"),
                   "contradicts itself: expected 72 bytes for its float32 [9, 2], got 64"),
    "long-data": (changed(FLOAT_FILE, SHAPE, b"K\x07K\x02\x86"),
                  "contradicts itself: expected 56 bytes for its float32 [7, 2], got 64"),
    "huge-data": (changed(FLOAT_FILE, b"C\x40", b"\x8e" + b"\xff" * 7 + b"\x7f"),
                  "ends too early: expected 9223372036854775807 more bytes after byte", "got 69"),
    "huge-frame": (FLOAT_FILE[:3] + b"\xff" * 8 + FLOAT_FILE[11:],
                   "expected frames within 213 bytes, got one to 18446744073709551626"),
    # Opcodes in a wrong order.
    "stop-at-once": (raw(b"."), "expected a value, got none before byte 3"),
    "two-values": (raw(b"NN."), "expected one value, got 2"),
    "pop-mark": (raw(b"(\x85."), "expected a value, got none before byte 4"),
    "no-mark": (raw(b"Nt."), "expected MARK as used for an array, got another use"),
    "recall-nothing": (raw(b"h\xc8."), "expected BINGET as used for an array"),
    "call-nothing": (raw(b"NNR."), "expected REDUCE as used for an array"),
    "build-nothing": (raw(b"NNb."), "expected BUILD as used for an array"),
    "build-dict": (raw(b"}Nb."), "expected BUILD as used for an array"),
    "fill-itself": (b"\x80\x04}\x94(h\0h\0u.", NOTHING),
    "nameless": (raw(b"NN\x93."), "expected STACK_GLOBAL as used for an array"),
    "unknown-opcode": (raw(b"\xff"), rf"{OPEN} b'\xff' at byte 2"),
    # Values that take time or memory to build or print.
    "deep": (raw(b")" + b"\x85" * 10**6 + b"."), "at most 256 opcodes, got more"),
    "doubled": (b"\x80\x04)\x94" + doubled(0, 50) + b".", NOTHING),
    "doubled-dtype": (changed(FLOAT_FILE, b"\x8c\x02f4\x94", b")\x94" + doubled(13, 40)), NOTHING),
    "doubled-axes": (changed(FLOAT_FILE, SHAPE, b")\x94" + doubled(10, 40)), NOTHING),
    # Globals that the layout does not have.
    "system": (Evil(os.system, "true"), ONLY, f"got '{os.name}.system'"),
    "exec": (Evil(exec, HARM), ONLY, "got 'builtins.exec'"),
    "exec-in-state": (pair(bias=Evil(exec, HARM)), ONLY, "got 'builtins.exec'"),
    "method": (raw(b"\x8c\x05numpy\x8c\x12ndarray.__reduce__\x93."),
               ONLY, "got 'numpy.ndarray.__reduce__'"),
    "model-class": (changed(INT_FILE, b"\x8c\x08__main__", b"\x8c\x05model"),
                    ONLY, "got 'model.QuantizedWeight8bit'"),
    "class-called": (changed(INT_FILE, b")\x81", b"\x8c\x01x\x85R"), NOTHING),
    "ndarray-called": (b"\x80\x04\x8c\x05numpy\x8c\x07ndarray\x93K\xff\x85R.", NOTHING),
    "not-utf-8": (raw(b"\x8c\x02\xff\xfe\x8c\x01x\x93."), ONLY, r"got '\\xff\\xfe.x'"),
    "escapes": (raw(b"\x8c\x05\n\x1b[2J\x8c\x01x\x93."), ONLY, r"got '\n\x1b[2J.x'"),
}
# fmt: on


def refusal(data: bytes) -> str:
    """The message of the LayoutError that reading a file raises, within a second."""
    started = time.perf_counter()
    with pytest.raises(LayoutError) as caught:
        read(data)
    assert time.perf_counter() - started < 1
    message = str(caught.value)
    problems = "is not a tensor file|ends too early|is too long|contradicts itself"
    assert re.fullmatch(rf"({problems}): expected [^\n]+, got [^\n]+", message), message
    assert caught.value.ended == message.startswith("ends too early")
    return message


@pytest.mark.parametrize(("made", "parts"), [(c[0], c[1:]) for c in CASES.values()], ids=CASES)
def test_damaged_and_hostile_files_are_refused_not_run(
    made: Any, parts: tuple[str, ...], dumps: Callable[[Any], bytes]
) -> None:
    message = refusal(made if isinstance(made, bytes) else dumps(made))
    for part in parts:
        assert part in message
    assert not hasattr(builtins, "harmed")


def test_unpickling_a_hostile_file_would_run_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtins, "harmed", False, raising=False)
    pickle.loads(pickle.dumps(Evil(exec, HARM)))
    assert builtins.harmed  # type: ignore[attr-defined]


def test_all_other_opcodes_are_refused() -> None:
    files = (DATA / "golden/three-layers/ckpt-0").glob("tensor0000[0-9]_000")
    used = {op.name for path in files for op, _, _ in pickletools.genops(path.read_bytes())}
    others = [op for op in pickletools.opcodes if op.name not in used | {"BINBYTES8"}]
    assert len(others) > 40
    for opcode in others:
        data = raw(b"N" + opcode.code.encode("latin-1"))
        assert f"{OPEN} {opcode.name} at" in refusal(data)


def test_a_file_that_shrinks_while_read_is_refused() -> None:
    with pytest.raises(
        LayoutError, match="too early: expected 213 bytes, got fewer while"
    ) as caught:
        pickle_file.read_header(io.BytesIO(FLOAT_FILE[:150]), len(FLOAT_FILE))
    assert caught.value.ended

"""A file's arrays are found as pickle finds them, and written as pickle writes them; never run."""

import dataclasses
import io
import math
import os
import pathlib
import pickle
import pickletools
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import reference
from grok1.formats import pickle_file
from grok1.formats.pickle_file import LayoutError, Located
from grok1.ops.quantization import QuantizedWeight8bit
from paths import DATA

GOLDEN = DATA / "golden"
GOLDEN_FILES = sorted(GOLDEN.glob("*/ckpt-0/tensor*"))


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


def test_golden_files_are_read_as_pickle_reads_them_and_written_as_they_were() -> None:
    assert len(GOLDEN_FILES) == 184
    for path in GOLDEN_FILES:
        data, arrays = path.read_bytes(), reference.load_arrays(path)
        leaf = QuantizedWeight8bit(*arrays) if len(arrays) == 2 else arrays[0]
        header = read(data)
        assert pickle_file.describe(header) == pickle_file.describe(leaf), path
        for place, array in zip(arrays_of(header), arrays, strict=True):
            assert bytes_at(data, place) == array.tobytes(), path
        assert written(leaf) == data, path
        assert pickle_file.file_size(leaf) == len(data), path


ODD_SHAPES = [
    (), (1,), (5,), (0,), (255,), (256,), (3, 4), (2, 3, 4), (2, 1, 2, 1), (1,) * 6, (70_000,),
    (300, 2), (16_320,), (16_350,), (16_383,), (16_384,), (16_385,),
]  # fmt: skip
ODD_PAIRS = [  # Frames end at 64 KiB: weights and scales just around it, in every combination.
    (weight, scales)
    for weight in ((3, 4), (1, 65_000), (1, 65_352), (1, 65_400), (1, 65_535), (1, 65_536))
    for scales in ((1, 4), (1, 128), (1, 32_600), (1, 32_700), (1, 32_767), (1, 32_768))
]


def odd_leaves() -> Iterator[Any]:
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


def test_odd_arrays_are_written_as_pickle_writes_them_and_found_again(
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


def test_values_are_written_in_c_order_and_little_endian_from_any_array() -> None:
    array = floats()
    for strange in (array.astype(">f4"), np.asfortranarray(array), np.repeat(array, 2, 0)[::2]):
        assert b"".join(pickle_file.contents(array, [strange])) == written(array)


def test_an_array_in_no_usual_order_is_found_and_called_so(dumps: Callable[[Any], bytes]) -> None:
    ints, scales = np.ones((4, 3), np.int8), np.ones((1, 3), ml_dtypes.bfloat16)
    for value, text in (
        (np.asfortranarray(floats()), "Fortran-ordered float32 [8, 2]"),
        (floats(">f4"), "big-endian float32 [8, 2]"),
        (np.asfortranarray(floats(">f8")), "Fortran-ordered big-endian float64 [8, 2]"),
        (
            StandIn(np.asfortranarray(ints), scales),
            "quantised Fortran-ordered int8 [4, 3] with scales bfloat16 [1, 3]",
        ),
    ):
        data = dumps(value)
        header = read(data)
        assert pickle_file.describe(header) == text
        for place, array in zip(arrays_of(header), arrays_of(value), strict=True):
            assert bytes_at(data, place) == array.tobytes(order="A")
    data = written(floats()).replace(b"\x8c\x01<", b"\x8c\x01=")
    assert pickle_file.describe(read(data)) == "'='-endian float32 [8, 2]"


def test_arrays_over_4_gib_have_a_longer_length_and_are_not_read(tmp_path: pathlib.Path) -> None:
    # Memory that was never written to takes no room; nor does the hole that it leaves in the file.
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


def test_files_that_newer_numpy_wrote_are_read(
    dumps: Callable[[Any], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    function = np.zeros(0).__reduce__()[0]
    monkeypatch.setattr(function, "__module__", "numpy._core.multiarray")
    data = dumps(floats())
    assert b"numpy._core.multiarray" in data
    assert bytes_at(data, read(data)) == floats().tobytes()


# Damaged and hostile files.


@dataclasses.dataclass
class Scene:
    """What a case may use to make its file."""

    good: bytes  # of FLOATS or INTS
    sentinel: pathlib.Path
    dumps: Callable[[Any], bytes]


class Evil:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any):
        self.function = function
        self.arguments = arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def evil(name: str, scene: Scene) -> Evil:
    """An object that makes the sentinel file when it is unpickled."""
    path = str(scene.sentinel)
    code = f"open({path!r}, 'w').close()"
    return {
        "system": Evil(os.system, f"touch {path}"),
        "eval": Evil(eval, code),
        "exec": Evil(exec, code),
        "open": Evil(open, path, "w"),
        "Popen": Evil(subprocess.Popen, ["touch", path]),
    }[name]


def laughs(start: int, count: int) -> bytes:
    """Opcodes that pair the value on the stack with itself, stored as `start`, again and again."""
    return b"".join(b"h" + bytes([start + i]) + b"\x86\x94" for i in range(count))


def made(value: Any) -> Callable[[Scene], bytes]:
    return lambda scene: scene.dumps(value)


def hostile(name: str) -> Callable[[Scene], bytes]:
    return lambda scene: scene.dumps(evil(name, scene))


def raw(opcodes: bytes) -> Callable[[Scene], bytes]:
    """A pickle of these opcodes, with enough behind them that it does not end too early."""
    return lambda _: b"\x80\x04" + opcodes + bytes(300)


def patch(old: bytes, new: bytes) -> Callable[[Scene], bytes]:
    def change(scene: Scene) -> bytes:
        assert scene.good.count(old) == 1
        return scene.good.replace(old, new)

    return change


def pair(weight: Any = None, scales: Any = None, **state: Any) -> Callable[[Scene], bytes]:
    """A QuantizedWeight8bit, right but for the arguments."""
    value = StandIn(
        np.ones((2, 16, 8), np.int8) if weight is None else weight,
        np.ones((2, 8, 8), ml_dtypes.bfloat16) if scales is None else scales,
    )
    value.__dict__.update(state)
    return made(value)


def sharing(_: Scene) -> bytes:
    """A weight and scales with one and the same bytes."""
    shapes = (jax.ShapeDtypeStruct((4, 2), np.int8), jax.ShapeDtypeStruct((2, 2), jnp.bfloat16))
    value = pickle_file._unparse(QuantizedWeight8bit(*shapes))
    _, weight, _, scales = value.state.state
    scales.state = (*scales.state[:-1], weight.state[-1])
    return b"".join(piece or bytes(8) for piece in pickle_file._Writer().write(value))


# fmt: off
FLOATS = floats()
INTS = QuantizedWeight8bit(np.ones((2, 16, 8), np.int8), np.ones((2, 8, 8), ml_dtypes.bfloat16))
OPEN = "is no tensor file: expected only the pickle opcodes of an array, got"
ONLY = "expected only the globals __main__.QuantizedWeight8bit, numpy.core.multiarray._reconstruct"
NOTHING = "is no tensor file: expected one array or one QuantizedWeight8bit, got something else"
OPENED = f"got '{open.__module__}.open'"  # The module is not the same in every Python.
SHAPE = b"K\x08K\x02\x86"  # (8, 2)
INT = b"J\xff\xff\xff\x7f"

# id -> (file, what becomes of it, what the error must say)
CASES: dict[str, tuple[Any, Callable[[Scene], bytes], list[str]]] = {
    # Not whole.
    "empty": (INTS, lambda _: b"", ["ends too early: expected 2 more bytes after byte 0, got 0"]),
    "one-byte": (INTS, lambda s: s.good[:1], ["ends too early: expected 2 more bytes", "got 1"]),
    "cut-in-header": (INTS, lambda s: s.good[:100], ["ends too early: expected "]),
    "cut-in-weight": (INTS, lambda s: s.good[:300], ["ends too early: expected 256 more bytes"]),
    "cut-in-scales": (INTS, lambda s: s.good[:700], ["ends too early: expected 256 more bytes"]),
    "cut-by-a-byte": (INTS, lambda s: s.good[:-1],
                      ["ends too early: expected 1 more bytes after byte 813, got 0"]),
    "long-by-a-byte": (INTS, lambda s: s.good + b"\0", ["too long: expected 814 bytes, got 815"]),
    "two-pickles": (INTS, lambda s: s.good * 2, ["too long: expected 814 bytes, got 1628"]),
    "zeros": (INTS, lambda _: bytes(814), [r"expected b'\x80\x04' at its start, got b'\x00\x00'"]),
    "html": (INTS, lambda _: b"<html>404</html>", ["at its start, got b'<h'"]),
    "lfs": (INTS, lambda _: b"version https://git-lfs.github.com/spec/v1", ["got b've'"]),
    "numpy-file": (INTS, lambda _: b"\x93NUMPY" + bytes(99), [r"got b'\x93N'"]),
    # Another value.
    "complex": (FLOATS, made(floats(np.complex64)), ["plain number type", "got 'c8'"]),
    "text": (FLOATS, made(np.array(["a", "b"])), ["plain number type", "got 'U1'"]),
    "objects": (FLOATS, made(np.array([None, {}])), [OPEN, "EMPTY_LIST at byte"]),
    "records": (FLOATS, made(np.zeros(2, "i4,f4")), [NOTHING]),
    "scalar": (FLOATS, made(np.float32(1)), [ONLY, "got 'numpy", ".scalar'"]),
    "number": (FLOATS, made(1), [NOTHING]),
    "dict": (FLOATS, made({}), [NOTHING]),
    "tuple": (FLOATS, made((floats(), floats())), [NOTHING]),
    "list": (FLOATS, made([floats()]), [f"{OPEN} EMPTY_LIST at byte 11"]),
    "array-without-state": (FLOATS, lambda s: s.good[:2] + s.good[11:83] + b".", [NOTHING]),
    "extra-state": (INTS, pair(bias=floats()), [NOTHING]),
    "nested": (INTS, pair(StandIn(floats(), floats())), [NOTHING]),
    "shared-bytes": (INTS, sharing, ["contradicts itself: expected bytes of their own for weight"]),
    "nine-axes": (FLOATS, patch(SHAPE, b"(" + INT * 9 + b"t"), [NOTHING]),
    # Numbers that lie.
    "negative-axis": (FLOATS, patch(SHAPE, b"K\x08J\xff\xff\xff\xff\x86"), [NOTHING]),
    "huge-axes": (FLOATS, patch(SHAPE, INT + INT + b"\x86"),
                  ["contradicts itself: expected 18446744056529682436 bytes for its float32"]),
    "many-axes": (FLOATS, patch(SHAPE, b"(" + b"K\xff" * 200 + b"t"), ["at most 256 opcodes, got"]),
    "short-data": (FLOATS, patch(SHAPE, b"K\x09K\x02\x86"),
                   ["contradicts itself: expected 72 bytes for its float32 [9, 2], got 64"]),
    "huge-data": (FLOATS, patch(b"C\x40", b"\x8e" + b"\xff" * 7 + b"\x7f"),
                  ["ends too early: expected 9223372036854775807 more bytes after byte", "got 69"]),
    "huge-frame": (FLOATS, lambda s: s.good[:3] + b"\xff" * 8 + s.good[11:],
                   ["expected frames within 213 bytes, got one to 18446744073709551626"]),
    # Not a pickle of an array.
    "protocol-0": (FLOATS, lambda _: pickle.dumps(floats(), protocol=0), ["got b'cn'"]),
    "protocol-2": (FLOATS, lambda _: pickle.dumps(floats(), protocol=2), [r"got b'\x80\x02'"]),
    "protocol-5": (FLOATS, lambda _: pickle.dumps(floats(), protocol=5), [r"got b'\x80\x05'"]),
    "second-protocol": (FLOATS, lambda s: s.good[:2] + s.good, [f"{OPEN} PROTO at byte 2"]),
    "stop-at-once": (FLOATS, raw(b"."), ["expected a value, got none before byte 3"]),
    "two-values": (FLOATS, raw(b"NN."), ["expected one value, got 2"]),
    "empty-stack": (FLOATS, raw(b"R."), ["expected a value, got none before byte 3"]),
    "pop-mark": (FLOATS, raw(b"(\x85."), ["expected a value, got none before byte 4"]),
    "store-mark": (FLOATS, raw(b"(\x94."), ["expected a value, got none before byte 4"]),
    "no-mark": (FLOATS, raw(b"Nt."), ["expected MARK as an array needs it, got another use"]),
    "recall-nothing": (FLOATS, raw(b"h\xc8."), ["expected BINGET as an array needs it"]),
    "call-nothing": (FLOATS, raw(b"NNR."), ["expected REDUCE as an array needs it"]),
    "build-nothing": (FLOATS, raw(b"NNb."), ["expected BUILD as an array needs it"]),
    "build-dict": (FLOATS, raw(b"}Nb."), ["expected BUILD as an array needs it"]),
    "fill-nothing": (FLOATS, raw(b"N(u."), ["expected SETITEMS as an array needs it"]),
    "fill-itself": (FLOATS, lambda _: b"\x80\x04}\x94(h\0h\0u.", [NOTHING]),
    "nameless": (FLOATS, raw(b"NN\x93."), ["expected STACK_GLOBAL as an array needs it"]),
    "not-utf-8": (FLOATS, raw(b"\x8c\x02\xff\xfe\x8c\x01x\x93."), [ONLY, r"got '\\xff\\xfe.x'"]),
    "escapes": (FLOATS, raw(b"\x8c\x05\n\x1b[2J\x8c\x01x\x93."), [ONLY, r"got '\n\x1b[2J.x'"]),
    "deep": (FLOATS, raw(b")" + b"\x85" * 10**6 + b"."), ["at most 256 opcodes, got more"]),
    "marks": (FLOATS, raw(b"(" * 10**6), ["at most 256 opcodes, got more"]),
    # A tuple that holds the one before twice, and so on: 2**50 values, if one were to print it.
    "laughs": (FLOATS, lambda _: b"\x80\x04)\x94" + laughs(0, 50) + b".", [NOTHING]),
    "laughing-dtype": (FLOATS, patch(b"\x8c\x02f4\x94", b")\x94" + laughs(13, 40)), [NOTHING]),
    "laughing-axes": (FLOATS, patch(SHAPE, b")\x94" + laughs(10, 40)), [NOTHING]),
    # Opcodes that the layout does not have.
    "global-call": (FLOATS, lambda s: b"\x80\x04cos\nsystem\n(S'touch %b'\ntR." % bytes(s.sentinel),
                    [f"{OPEN} GLOBAL at byte 2"]),
    "inst-call": (FLOATS, raw(b"(\x8c\x01xios\nsystem\n."), [f"{OPEN} INST at byte 6"]),
    "unknown-opcode": (FLOATS, raw(b"\xff"), [rf"{OPEN} b'\xff' at byte 2"]),
    # Globals that the layout does not have.
    "evil-in-state": (INTS, lambda s: pair(bias=evil("open", s))(s), [ONLY, OPENED]),
    "evil-as-scales": (INTS, lambda s: pair(scales=evil("open", s))(s), [ONLY, OPENED]),
    "evil-after-the-end": (FLOATS, lambda s: s.good + s.dumps(evil("open", s)), ["is too long"]),
    "evil-before": (FLOATS, lambda s: s.dumps((evil("open", s), floats())), [OPENED]),
    "evil-method": (FLOATS, raw(b"\x8c\x05numpy\x8c\x12ndarray.__reduce__\x93."),
                    [ONLY, "got 'numpy.ndarray.__reduce__'"]),
    "model-class": (INTS, patch(b"\x8c\x08__main__", b"\x8c\x05model"),
                    [ONLY, "got 'model.QuantizedWeight8bit'"]),
    "class-called": (INTS, patch(b")\x81", b"\x8c\x01x\x85R"), [NOTHING]),
    "other-function": (FLOATS, patch(b"\x8c\x0c_reconstruct", b"\x8c\x06scalar"),
                       [ONLY, "got 'numpy.core.multiarray.scalar'"]),
    "ndarray-called": (FLOATS, lambda _: b"\x80\x04\x8c\x05numpy\x8c\x07ndarray\x93K\xff\x85R.",
                       [NOTHING]),
}
LAYOUT_OPCODES = {"BINBYTES8"}.union(*(
    {opcode.name for opcode, _, _ in pickletools.genops(path.read_bytes())}
    for path in (GOLDEN / "three-layers/ckpt-0").glob("tensor0000[0-9]_000")))
CASES |= {
    opcode.name: (FLOATS, raw(b"N" + opcode.code.encode("latin-1")), [f"{OPEN} {opcode.name} at"])
    for opcode in pickletools.opcodes if opcode.name not in LAYOUT_OPCODES
}
CASES |= {
    name: (FLOATS, hostile(name), [ONLY, f"got '{got}'"])
    for name, got in {"system": "posix.system", "eval": "builtins.eval", "exec": "builtins.exec",
                      "open": f"{open.__module__}.open", "Popen": "subprocess.Popen"}.items()
}
# fmt: on


@pytest.mark.parametrize(("leaf", "make", "parts"), CASES.values(), ids=CASES.keys())
def test_damaged_and_hostile_files_are_refused_and_not_run(
    leaf: Any,
    make: Callable[[Scene], bytes],
    parts: list[str],
    tmp_path: pathlib.Path,
    dumps: Callable[[Any], bytes],
) -> None:
    scene = Scene(written(leaf), tmp_path / "sentinel", dumps)
    data = make(scene)
    assert data != scene.good
    started = time.perf_counter()
    with pytest.raises(LayoutError) as caught:
        read(data)
    assert time.perf_counter() - started < 1
    message = str(caught.value)
    problems = "is no tensor file|ends too early|is too long|contradicts itself"
    assert re.fullmatch(rf"({problems}): expected [^\n]+, got [^\n]+", message), message
    assert caught.value.ended == message.startswith("ends too early")
    for part in parts:
        assert part in message
    assert not scene.sentinel.exists()


def test_the_hostile_files_would_do_harm_if_they_were_unpickled(tmp_path: pathlib.Path) -> None:
    scene = Scene(b"", tmp_path / "sentinel", pickle.dumps)
    pickle.loads(pickle.dumps(evil("open", scene), protocol=4)).close()
    assert scene.sentinel.exists()


def test_a_file_that_shrinks_while_it_is_read_is_refused() -> None:
    data = written(FLOATS)
    with pytest.raises(
        LayoutError, match="too early: expected 213 bytes, got fewer while"
    ) as caught:
        pickle_file.read_header(io.BytesIO(data[:150]), len(data))
    assert caught.value.ended


def mutated(good: bytes, rng: random.Random) -> bytes:
    data = bytearray(good)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place] = rng.choice(b"().NRbhtuKMJCB}\x80\x81\x85\x8e\x93\x94\x95\xff\0")
            case 2:
                del data[place : place + rng.randint(1, 9)]
            case 3:
                data[place:place] = data[place : place + rng.randint(1, 9)]
            case 4:
                del data[place + 1 :]
    return bytes(data)


def test_a_mutated_file_is_refused_or_holds_the_arrays_that_are_found() -> None:
    """Cheap fuzzing with a fixed seed: nothing but LayoutError may ever come out.

    Pickle cannot be the judge here: numpy lets some of these change its own types.
    """
    rng = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(2000):
        data = mutated(written(rng.choice((INTS, FLOATS))), rng)
        try:
            header = read(data)
        except LayoutError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            for place in arrays_of(header):
                bytes_at(data, place)
            outcomes["read"] += 1
    assert outcomes["read"] > 60 and outcomes["refused"] > 1000, outcomes

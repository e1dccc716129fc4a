"""Files from strangers: thousands of damaged ones load as the original or end in one sentence."""

import collections
import json
import pathlib
import pickle
import shutil
import signal
import tracemalloc
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import checkpoint
from grok1.formats import forms, pickle_file
from grok1.formats.forms import CheckpointError
from grok1.ops.quantization import QuantizedWeight8bit
from model import LanguageModelConfig, TransformerConfig

MUTATIONS = 1000
MOST_SECONDS = 5.0
MOST_BYTES = 16 << 20  # that a load may take at once

Rng = np.random.Generator


def make_config() -> LanguageModelConfig:
    """One layer of all that Grok-1 has, with matrices of different shapes."""
    model = TransformerConfig(
        emb_size=16,
        key_size=4,
        num_q_heads=4,
        num_kv_heads=2,
        num_layers=1,
        num_experts=3,
        num_selected_experts=2,
    )
    return LanguageModelConfig(model, vocab_size=24, sequence_len=32)


class Checkpoint:
    """A checkpoint on disk, its files as they were, and what it loads as."""

    def __init__(self, directory: pathlib.Path, pattern: str):
        self.directory = directory
        self.shapes = make_config().param_shapes()
        self.original = {path: path.read_bytes() for path in sorted(directory.glob(pattern))}
        self.touched: list[pathlib.Path] = []
        self.params = jax.tree.map(np.asarray, checkpoint.load(directory, self.shapes))
        self.data = {path: array_bytes(directory, self.shapes, path) for path in self.original}

    def load(self) -> str:
        """Load; returns "loaded" or "refused". Fails on anything else that could happen."""
        try:
            params = checkpoint.load(self.directory, self.shapes)
        except CheckpointError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
            assert str(self.directory) in str(error)
            return "refused"
        for got, expected in zip(
            jax.tree.leaves(params), jax.tree.leaves(self.params), strict=True
        ):
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(np.asarray(got), expected)
        return "loaded"

    def restore(self) -> None:
        """Undo all damage."""
        for extra in set(self.directory.glob("ckpt-0/*")) - set(self.original):
            extra.unlink()
        for path in self.touched:
            path.write_bytes(self.original[path])
        self.touched.clear()

    def pick(self, rng: "Rng") -> pathlib.Path:
        """Choose a file to damage."""
        paths = list(self.original)
        self.touched.append(paths[rng.integers(len(paths))])
        return self.touched[-1]


def array_bytes(directory: pathlib.Path, shapes: Any, path: pathlib.Path) -> set[int]:
    """Return the places in a file that hold values, where a flipped bit may go unnoticed."""
    places: set[int] = set()
    for leaf in checkpoint.check_files(directory, shapes):
        for array in jax.tree.leaves(leaf):
            if array.path == str(path):
                size = np.prod(array.shape, dtype=int) * np.dtype(array.dtype).itemsize
                places |= set(range(array.offset, array.offset + size))
    return places


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("released")
    config = make_config()
    rng = np.random.default_rng(0)

    def draw(shape: Any) -> np.ndarray:
        return np.asarray(rng.integers(-128, 128, size=shape.shape)).astype(shape.dtype)

    params = jax.tree.map(draw, config.param_shapes())
    checkpoint.save(directory, params, config.to_dict())
    return Checkpoint(directory, "ckpt-0/*")


@pytest.fixture(scope="module")
def safetensors(released: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("safetensors")
    checkpoint.convert(released.directory, directory, forms.SAFETENSORS)
    return Checkpoint(directory, "*.safetensors*")


# ---------------------------------------------------------------------------------------- mutations


def flip_header_bits(found: Checkpoint, rng: Rng) -> None:
    path = found.pick(rng)
    content = bytearray(found.original[path])
    header = [i for i in range(len(content)) if i not in found.data[path]]
    for place in rng.choice(header, size=rng.integers(1, 4)):
        content[place] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def replace_header_bytes(found: Checkpoint, rng: Rng) -> None:
    path = found.pick(rng)
    content = bytearray(found.original[path])
    header = [i for i in range(len(content)) if i not in found.data[path]]
    start = header[rng.integers(len(header))]
    length = int(rng.integers(1, 9))
    if not found.data[path] & set(range(start, start + length)):
        content[start : start + length] = rng.bytes(length)
    path.write_bytes(content)


def cut(found: Checkpoint, rng: Rng) -> None:
    path = found.pick(rng)
    path.write_bytes(found.original[path][: rng.integers(len(found.original[path]))])


def append(found: Checkpoint, rng: Rng) -> None:
    path = found.pick(rng)
    extra = [b"\0", b".", rng.bytes(int(rng.integers(1, 100))), found.original[path]]
    path.write_bytes(found.original[path] + extra[rng.integers(len(extra))])


def insert_or_remove(found: Checkpoint, rng: Rng) -> None:
    path = found.pick(rng)
    content, place = found.original[path], int(rng.integers(100))
    extra = rng.bytes(int(rng.integers(1, 9))) if rng.integers(2) else b""
    path.write_bytes(content[:place] + extra + content[place + (not extra) :])


def swap(found: Checkpoint, rng: Rng) -> None:
    """Swap two files whose headers differ."""
    first, second = found.pick(rng), found.pick(rng)

    def header(path: pathlib.Path) -> bytes:
        return bytes(b for i, b in enumerate(found.original[path]) if i not in found.data[path])

    if header(first) != header(second):
        first.write_bytes(found.original[second])
        second.write_bytes(found.original[first])


def lose_or_add(found: Checkpoint, rng: Rng) -> None:
    path = found.pick(rng)
    if rng.integers(2):
        path.unlink()
    else:
        path.with_name(f"tensor{rng.integers(10**5):05d}_000").write_bytes(found.original[path])


def other_array(found: Checkpoint, rng: Rng) -> None:
    """Write a well-formed file of another dtype, shape, order or kind."""
    path = found.pick(rng)
    dtype = rng.choice(["f4", "f8", "i1", "u1", "i2", "?", ">f4", "<i8", "e"])
    shape = tuple(int(n) for n in rng.integers(0, 20, size=rng.integers(0, 4)))
    array = np.zeros(shape, dtype)
    if rng.integers(2):
        array = np.asfortranarray(array)
    kinds: list[Any] = [
        array,
        {"weight": array, "scales": array},
        [array, array],
        np.ma.masked_array(array),
        Stranger(array, array),
    ]
    path.write_bytes(pickle.dumps(kinds[rng.integers(len(kinds))], protocol=4))


class Stranger(QuantizedWeight8bit):
    """A class that no loader may import."""


def lie_about_shape(found: Checkpoint, rng: Rng) -> None:
    """Describe an array larger than the file, or larger than memory."""
    path = found.pick(rng)
    size = [2**31 - 1, 2**20, 10**9, 3][rng.integers(4)]
    shape = jax.ShapeDtypeStruct((size,) * int(rng.integers(1, 3)), np.int8)
    header = [piece for piece in pickle_file._header(shape) if piece is not None]
    path.write_bytes(b"".join(header))


def nest(found: Checkpoint, rng: Rng) -> None:
    """Nest reductions, tuples and marks, endlessly or nearly so; refer in circles."""
    path = found.pick(rng)
    depth = int(rng.integers(1, 5000))
    reduce = b"cnumpy\nndarray\n" if rng.integers(2) else b"\x8c\x05numpy\x8c\x07ndarray\x93"
    bodies = [
        reduce * depth + b")R" * depth,
        b"(" * depth + b"t" * depth,
        b")\x85" * depth,
        b"}\x94(" + b"h\x00" * depth + b"u",
        b"]\x94h\x00a" * depth,
        reduce + b")R\x94" + b"h\x00b" * depth,
        b"\x8e" + (2**63 - 1).to_bytes(8, "little"),
        b"\x95" + (2**64 - 1).to_bytes(8, "little"),
    ]
    body = bodies[rng.integers(len(bodies))]
    content = found.original[path]
    place = int(rng.integers(2, 60)) if rng.integers(2) else 2
    path.write_bytes(content[:place] + body + content[place:])


def mix_opcodes(found: Checkpoint, rng: Rng) -> None:
    """Write opcodes of the layout in no order."""
    path = found.pick(rng)
    codes = list(pickle_file._CODES.values())
    body = b"".join(
        codes[rng.integers(len(codes))] + rng.bytes(int(rng.integers(3)))
        for _ in range(rng.integers(200))
    )
    path.write_bytes(found.original[path][: rng.integers(80)] + body)


def edit_json(found: Checkpoint, rng: Rng) -> None:
    """Change a value somewhere in the index or in a header, and keep it JSON."""
    path = found.pick(rng)
    content = found.original[path]
    start, end = 0, len(content)
    if path.suffix == ".safetensors":
        start, end = 8, 8 + int.from_bytes(content[:8], "little")
    tree = json.loads(content[start:end])
    values = [None, -1, 2**64, 0.5, "", "../../etc/passwd", "a" * 10**5, [], {}, [[[]]], True]
    holder: Any = tree
    while True:
        key = list(holder)[rng.integers(len(holder))] if isinstance(holder, dict) else 0
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner or rng.integers(4) == 0:
            break
        holder = inner
    holder[key] = values[rng.integers(len(values))]
    text = json.dumps(tree).encode()
    if start:
        text = len(text).to_bytes(8, "little") + text
    path.write_bytes(text + content[end:])


SHARED: list[Callable[[Checkpoint, Rng], None]] = [
    flip_header_bits,
    flip_header_bits,
    replace_header_bytes,
    cut,
    append,
    insert_or_remove,
    swap,
    lose_or_add,
]
FORMS = {
    "released": [*SHARED, other_array, lie_about_shape, nest, mix_opcodes],
    "safetensors": [*SHARED, edit_json, edit_json],
}


def too_long(*_: Any) -> None:
    raise AssertionError(f"a load took more than {MOST_SECONDS} s")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_damaged_files_load_as_they_were_or_are_refused_in_one_sentence(
    form: str, request: pytest.FixtureRequest
) -> None:
    found: Checkpoint = request.getfixturevalue(form)
    rng = np.random.default_rng(20240317)
    ends: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    signal.signal(signal.SIGALRM, too_long)
    tracemalloc.start()
    try:
        for trial in range(MUTATIONS if form == "released" else MUTATIONS // 2):
            mutate = FORMS[form][trial % len(FORMS[form])]
            mutate(found, rng)
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
            ends[mutate.__name__][found.load()] += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < MOST_BYTES, f"{mutate.__name__}: {peak - before} bytes"
            found.restore()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        tracemalloc.stop()
    # Every kind of damage does damage; only some files cannot be swapped, and some do not belong.
    for name, count in ends.items():
        assert count["refused"] > count["loaded"] or name in ("swap", "lose_or_add"), (name, count)
        assert count["refused"] > 10, (name, count)
    assert found.load() == "loaded"


def hostile_config(rng: Rng) -> str:
    """A configuration with one or two wrong values, some of them repeated."""
    fields = make_config().to_dict()
    holders = [fields, fields["model"]]
    for _ in range(rng.integers(1, 3)):
        holder = holders[rng.integers(2)]
        name = [*holder][rng.integers(len(holder))]
        size = 10 ** int(rng.exponential(20))
        values = [size, -size, 2 ** int(rng.integers(70)), 0.0, 1 / size, float("inf"), None, "a"]
        holder[name] = [*values, [[]], {}, True][rng.integers(len(values) + 3)]
    text = json.dumps(fields)
    return text.replace("{", '{"vocab_size": 24, ', 1) if rng.integers(8) == 0 else text


def test_random_configs_are_read_or_refused_at_once(released: Checkpoint) -> None:
    rng = np.random.default_rng(0)
    path = released.directory / "config.json"
    good = path.read_bytes()
    ends: collections.Counter[str] = collections.Counter()
    signal.signal(signal.SIGALRM, too_long)
    try:
        for _ in range(400):
            path.write_text(hostile_config(rng))
            signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
            try:
                checkpoint.verify(released.directory)
                ends["read"] += 1
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) < 1500
                assert str(released.directory) in str(error)
                ends["refused"] += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        path.write_bytes(good)
    assert ends["read"] > 3 and ends["refused"] > 300, ends


def test_a_flipped_weight_is_found_by_verify_if_not_by_load(
    safetensors: Checkpoint, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(safetensors.directory, tmp_path / "copy")
    rng = np.random.default_rng(1)
    for _ in range(20):
        path = safetensors.pick(rng)
        if not safetensors.data[path]:
            continue
        copy = tmp_path / "copy" / path.name
        content = bytearray(safetensors.original[path])
        place = rng.choice(sorted(safetensors.data[path]))
        content[place] ^= 1 << rng.integers(8)
        copy.write_bytes(content)
        checkpoint.load(tmp_path / "copy", safetensors.shapes)
        _, problems = checkpoint.verify(tmp_path / "copy")
        assert len(problems) == 1 and str(copy) in problems[0]
        copy.write_bytes(safetensors.original[path])

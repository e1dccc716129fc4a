"""Files from strangers: damaged at random, they load as the original or end in one sentence."""

import collections
import json
import pathlib
import signal
import tracemalloc
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import checkpoint
from grok1.formats import conversion, forms, layout, pickle_file
from small import assert_same, config_of, random_params, save_layers, tiny_shapes

MOST_SECONDS = 5.0  # of a load
MOST_BYTES = 16 << 20

Rng = np.random.Generator


class Checkpoint:
    """A checkpoint on disk, its files as they were, and what it loads as."""

    def __init__(self, directory: pathlib.Path, pattern: str, shapes: Any):
        self.directory = directory
        self.shapes = shapes
        paths = sorted(directory.glob(pattern))
        self.original = {p: p.read_bytes() for p in (*paths, directory / "config.json")}
        self.params = jax.tree.map(np.array, checkpoint.load(directory, self.shapes))  # copied
        self.headers = {path: self.header_places(path) for path in paths}

    def header_places(self, path: pathlib.Path) -> list[int]:
        """The indices of a file's bytes that are not values, whose change may go unnoticed."""
        places = set(range(len(self.original[path])))
        for array in jax.tree.leaves(checkpoint.check_files(self.directory, self.shapes)):
            if array.path == str(path):
                places -= set(range(array.offset, array.offset + pickle_file.nbytes(array)))
        return sorted(places)

    def load(self, with_config: bool = False) -> str:
        """Load the checkpoint; return "loaded" or "refused", and fail for any other outcome."""
        try:
            if with_config:
                checkpoint.verify(self.directory)
            params = checkpoint.load(self.directory, self.shapes)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
            assert str(self.directory) in str(error)
            return "refused"
        assert_same(params, self.params)
        return "loaded"

    def restore(self) -> None:
        """Undo all damage."""
        for path, content in self.original.items():
            if path.read_bytes() != content:
                path.write_bytes(content)

    def pick(self, rng: Rng) -> tuple[pathlib.Path, bytes]:
        """Choose a tensor file or the index."""
        paths = list(self.headers)
        path = paths[rng.integers(len(paths))]
        return path, self.original[path]


@pytest.fixture
def found(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Checkpoint:
    """A checkpoint whose configuration, released files or safetensors are to be damaged."""
    source, target, shapes = tmp_path / "source", tmp_path / "target", tiny_shapes(layers=1)
    if request.param == "config":
        return Checkpoint(save_layers(source, 1), "ckpt-0/*", config_of(1).param_shapes())
    checkpoint.write(source, random_params(shapes), {})
    if request.param == forms.RELEASED:
        return Checkpoint(source, "ckpt-0/*", shapes)
    group = 4 if request.param == "int4" else None
    form = forms.MAPPED if request.param == forms.MAPPED else forms.SAFETENSORS
    conversion.convert(source, target, form, shapes, group=group)
    return Checkpoint(target, "*.[sm]*", layout.shapes_in(target, shapes))


# ---------------------------------------------------------------------------------------- mutations


def flip_header_bits(found: Checkpoint, rng: Rng) -> None:
    path, good = found.pick(rng)
    content = bytearray(good)
    for place in rng.choice(found.headers[path], size=rng.integers(1, 4)):
        content[place] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def cut(found: Checkpoint, rng: Rng) -> None:
    path, good = found.pick(rng)
    path.write_bytes(good[: rng.integers(len(good))])


def insert_or_remove(found: Checkpoint, rng: Rng) -> None:
    path, good = found.pick(rng)
    place = int(rng.integers(100))
    extra = rng.bytes(int(rng.integers(1, 9))) if rng.integers(2) else b""
    path.write_bytes(good[:place] + extra + good[place + (not extra) :])


def nest(found: Checkpoint, rng: Rng) -> None:
    """Nest calls, tuples and marks in thousands of levels, or refer in circles."""
    path, good = found.pick(rng)
    depth = int(rng.integers(1, 5000))
    reduce = b"cnumpy\nndarray\n" if rng.integers(2) else b"\x8c\x05numpy\x8c\x07ndarray\x93"
    bodies = [
        reduce * depth + b")R" * depth,
        b"(" * depth + b"t" * depth,
        b"}\x94(" + b"h\x00" * depth + b"u",
        b"]\x94h\x00a" * depth,
        reduce + b")R\x94" + b"h\x00b" * depth,
        b"\x8e" + (2**63 - 1).to_bytes(8, "little"),
    ]
    place = int(rng.integers(2, 60)) if rng.integers(2) else 2
    path.write_bytes(good[:place] + bodies[rng.integers(len(bodies))] + good[place:])


def mix_opcodes(found: Checkpoint, rng: Rng) -> None:
    """Write opcodes of the layout in random order."""
    path, good = found.pick(rng)
    codes = list(pickle_file._CODES.values())
    body = b"".join(
        codes[rng.integers(len(codes))] + rng.bytes(int(rng.integers(3)))
        for _ in range(rng.integers(200))
    )
    path.write_bytes(good[: rng.integers(80)] + body)


def edit_json(found: Checkpoint, rng: Rng) -> None:
    """Change a value somewhere in the index or in a header, and keep it JSON."""
    path, good = found.pick(rng)
    start, end = 0, len(good)
    if path.suffix == ".safetensors":
        start, end = 8, 8 + int.from_bytes(good[:8], "little")
    tree = json.loads(good[start:end])
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
    length = len(text).to_bytes(8, "little") if start else b""
    path.write_bytes(length + text + good[end:])


def edit_config(found: Checkpoint, rng: Rng) -> None:
    """Give one or two fields of the configuration other values, or repeat one."""
    fields = config_of(1).to_dict()
    holders = [fields, fields["model"]]
    for _ in range(rng.integers(1, 3)):
        holder = holders[rng.integers(2)]
        name = [*holder][rng.integers(len(holder))]
        size = 10 ** int(rng.exponential(20))
        values = [size, -size, 2 ** int(rng.integers(70)), 0.0, 1 / size, float("inf"), None, "a"]
        holder[name] = [*values, [[]], {}, True][rng.integers(len(values) + 3)]
    text = json.dumps(fields)
    text = text.replace("{", '{"vocab_size": 32, ', 1) if rng.integers(8) == 0 else text
    (found.directory / "config.json").write_text(text)


SHARED: list[Callable[[Checkpoint, Rng], None]] = [flip_header_bits, cut, insert_or_remove]
RELEASED = [*SHARED, nest, mix_opcodes]


def too_long(*_: Any) -> None:
    raise AssertionError(f"a load took more than {MOST_SECONDS} s")


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    ("found", "mutations"),
    [
        (forms.RELEASED, RELEASED),
        (forms.SAFETENSORS, [*SHARED, edit_json]),
        ("int4", [*SHARED, edit_json]),
        (forms.MAPPED, [*SHARED, edit_json]),
        ("config", [edit_config]),
    ],
    ids=["released", "safetensors", "int4", "mapped", "config"],
    indirect=["found"],
)
def test_damaged_files_load_as_original_or_are_refused(
    found: Checkpoint, mutations: list[Callable[[Checkpoint, Rng], None]], count: int
) -> None:
    rng = np.random.default_rng(20240317)
    signal.signal(signal.SIGALRM, too_long)
    tracemalloc.start()
    try:
        for mutate in mutations:
            ends: collections.Counter[str] = collections.Counter()
            for _ in range(count):
                mutate(found, rng)
                tracemalloc.reset_peak()
                before, _ = tracemalloc.get_traced_memory()
                signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
                ends[found.load(with_config=mutate is edit_config)] += 1
                signal.setitimer(signal.ITIMER_REAL, 0)
                _, peak = tracemalloc.get_traced_memory()
                assert peak - before < MOST_BYTES, f"{mutate.__name__}: {peak - before} bytes"
                found.restore()
            assert ends["refused"] > count // 4, (mutate.__name__, ends)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        tracemalloc.stop()
    assert found.load() == "loaded"

"""Checkpoints are read to the last bit and written as they were; anything else is refused."""

import dataclasses
import io
import json
import os
import pathlib
import pickle
import pickletools
import random
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import checkpoint
from checkpoint import CheckpointError
from quantization import QuantizedWeight8bit

DATA = pathlib.Path(__file__).parent / "data"
GOLDEN = DATA / "golden"
GOLDEN_NAMES = ("three-layers", "twelve-layers")
LAYER = "transformer/decoder_layer/"
EMBED = "language_model/in_out_embed"


# The models that the tests read and write.


def stacked(layers: int, *shape: int, groups: int = 0) -> Any:
    """Shapes of a stacked parameter: float32, or int8 with so many scale groups."""
    if not groups:
        return jax.ShapeDtypeStruct((layers, *shape), jnp.float32)
    scales = (layers, *shape[:-2], groups, shape[-1])
    return QuantizedWeight8bit(
        jax.ShapeDtypeStruct((layers, *shape), jnp.int8),
        jax.ShapeDtypeStruct(scales, jnp.bfloat16),
    )


def model_shapes(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Shapes of all parameters of a quantised model, written out independently of the model."""
    model = config["model"]
    layers, width, experts = model["num_layers"], model["emb_size"], model["num_experts"]
    hidden = -(-(int(model["widening_factor"] * width) * 2 // 3) // 8) * 8
    queries = model["num_q_heads"] * model["key_size"]
    keys = model["num_kv_heads"] * model["key_size"]
    attention = LAYER + "multi_head_attention/"
    shapes = {
        EMBED: {"embeddings": jax.ShapeDtypeStruct((config["vocab_size"], width), jnp.float32)},
        "language_model/rms_norm": {"scale": jax.ShapeDtypeStruct((width,), jnp.float32)},
        LAYER + "moe/linear": {"w": stacked(layers, experts, width, hidden, groups=1)},
        LAYER + "moe/linear_v": {"w": stacked(layers, experts, width, hidden, groups=1)},
        LAYER + "moe/linear_1": {"w": stacked(layers, experts, hidden, width, groups=8)},
        attention + "query": {"w": stacked(layers, width, queries, groups=1)},
        attention + "key": {"w": stacked(layers, width, keys, groups=1)},
        attention + "value": {"w": stacked(layers, width, keys, groups=1)},
        attention + "linear": {"w": stacked(layers, queries, width, groups=8)},
        LAYER + "router": {"w": stacked(layers, width, experts)},
    }
    for norm in ("rms_norm", "rms_norm_1", "rms_norm_2", "rms_norm_3"):
        shapes[LAYER + norm] = {"scale": stacked(layers, width)}
    return shapes


def full_shapes() -> dict[str, dict[str, Any]]:
    """Shapes of Grok-1's parameters."""
    model = {
        "emb_size": 48 * 128, "widening_factor": 8, "key_size": 128, "num_q_heads": 48,
        "num_kv_heads": 8, "num_layers": 64, "num_experts": 8,
    }  # fmt: skip
    return model_shapes({"vocab_size": 128 * 1024, "model": model})


def golden_shapes(name: str) -> dict[str, dict[str, Any]]:
    return model_shapes(json.loads((GOLDEN / name / "config.json").read_text()))


def tiny_shapes(layers: int = 2) -> dict[str, dict[str, Any]]:
    """Shapes of a model with one parameter of each kind: eight files for two layers."""
    return {
        EMBED: {"embeddings": jax.ShapeDtypeStruct((16, 8), jnp.float32)},
        "language_model/rms_norm": {"scale": jax.ShapeDtypeStruct((8,), jnp.float32)},
        LAYER + "moe/linear_1": {"w": stacked(layers, 2, 16, 8, groups=8)},
        LAYER + "rms_norm": {"scale": stacked(layers, 8)},
        LAYER + "router": {"w": stacked(layers, 8, 2)},
    }


def random_params(shapes: Any, seed: int = 0) -> Any:
    """Numpy parameters with these shapes."""
    rng = np.random.default_rng(seed)

    def draw(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.asarray(rng.integers(-128, 128, size=shape.shape)).astype(shape.dtype)

    return jax.tree.map(draw, shapes)


def assert_same(got: Any, expected: Any) -> None:
    """Both trees have one structure, and leaves equal in dtype, shape and every value."""
    paths = jax.tree_util.tree_leaves_with_path
    for (path, one), (other_path, other) in zip(paths(got), paths(expected), strict=True):
        assert path == other_path
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


# Pickle's own view of the files, to compare with. Only for files that the tests made, or brought.


class StandIn:
    """What pickle knows as `__main__.QuantizedWeight8bit`."""

    __module__, __qualname__ = "__main__", "QuantizedWeight8bit"

    def __init__(self, weight: np.ndarray, scales: np.ndarray):
        self.weight = weight
        self.scales = scales


class TrustingUnpickler(pickle.Unpickler):
    """Loads the golden files, which are ours, as the released loader would."""

    def find_class(self, module: str, name: str) -> Any:
        return StandIn if module == "__main__" else super().find_class(module, name)


def unpickle(path: pathlib.Path) -> list[np.ndarray]:
    value = TrustingUnpickler(io.BytesIO(path.read_bytes())).load()
    return [value.weight, value.scales] if isinstance(value, StandIn) else [value]


@pytest.fixture
def dumps(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], bytes]:
    """pickle.dumps, protocol 4, that names the class and numpy's function as the layout does."""
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "QuantizedWeight8bit", StandIn, raising=False)
    function = np.zeros(0).__reduce__()[0]
    monkeypatch.setattr(function, "__module__", "numpy.core.multiarray")
    return lambda value: pickle.dumps(value, protocol=4)


# Reading and writing.


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_models_load_as_pickle_reads_them(name: str) -> None:
    shapes = golden_shapes(name)
    params = checkpoint.load(GOLDEN / name, shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    paths = sorted((GOLDEN / name / "ckpt-0").iterdir())
    records = checkpoint.files(shapes)
    assert [record.file for record in records] == [path.name for path in paths]
    for record, path in zip(records, paths, strict=True):
        arrays = jax.tree.leaves(params[record.module][record.param])
        assert record.size == path.stat().st_size
        for array, stored in zip(arrays, unpickle(path), strict=True):
            own = array if record.layer is None else array[record.layer]
            assert own.dtype == stored.dtype
            np.testing.assert_array_equal(np.asarray(own), stored)


def test_layers_are_read_in_lexicographic_order() -> None:
    """File 26 begins layer 10, not layer 2: in numeric order, all loads and nothing makes sense."""
    params = checkpoint.load(GOLDEN / "twelve-layers", golden_shapes("twelve-layers"))
    for index, layer in ((2, 0), (14, 1), (26, 10), (38, 11), (50, 2), (134, 9)):
        weight, _ = unpickle(GOLDEN / f"twelve-layers/ckpt-0/tensor{index:05d}_000")
        (norm,) = unpickle(GOLDEN / f"twelve-layers/ckpt-0/tensor{index + 7:05d}_000")
        np.testing.assert_array_equal(params[LAYER + "moe/linear"]["w"].weight[layer], weight)
        np.testing.assert_array_equal(params[LAYER + "rms_norm"]["scale"][layer], norm)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_saving_a_golden_model_gives_back_its_bytes(name: str, tmp_path: pathlib.Path) -> None:
    params = checkpoint.load(GOLDEN / name, golden_shapes(name))
    checkpoint.save(tmp_path, params, checkpoint.read_config(GOLDEN / name))
    expected = {path.name: path for path in (GOLDEN / name / "ckpt-0").iterdir()}
    assert {path.name for path in (tmp_path / "ckpt-0").iterdir()} == set(expected)
    for file, path in expected.items():
        assert (tmp_path / "ckpt-0" / file).read_bytes() == path.read_bytes(), file
    config = (GOLDEN / name / "config.json").read_bytes()
    assert (tmp_path / "config.json").read_bytes() == config


def test_all_files_of_grok_1_are_as_released() -> None:
    rows = (DATA / "grok1_tensors.tsv").read_text().splitlines()[1:]
    records = checkpoint.files(full_shapes())
    assert len(records) == len(rows) == 770
    for record, row in zip(records, rows, strict=True):
        weight, *scales = jax.tree.leaves(record.leaf)
        texts = ["x".join(map(str, array.shape)) for array in (weight, *scales)]
        assert all(array.dtype == jnp.bfloat16 for array in scales)
        assert row.split("\t") == [
            record.file, record.name, weight.dtype.name, texts[0], *(texts[1:] or ["-"]),
            str(record.size),
        ]  # fmt: skip
    assert sum(record.size for record in records) == 318_239_886_140


ODD_SHAPES = [
    (), (1,), (5,), (0,), (255,), (256,), (3, 4), (2, 3, 4), (2, 1, 2, 1), (1,) * 6, (70_000,),
    (300, 2), (16_320,), (16_350,), (16_383,), (16_384,), (16_385,),
]  # fmt: skip
ODD_PAIRS = [  # Frames end at 64 KiB: weights and scales just around it, in every combination.
    (weight, scales)
    for weight in ((3, 4), (1, 65_000), (1, 65_352), (1, 65_400), (1, 65_535), (1, 65_536))
    for scales in ((1, 4), (1, 128), (1, 32_600), (1, 32_700), (1, 32_767), (1, 32_768))
]


def test_odd_arrays_are_written_as_pickle_writes_them(
    dumps: Callable[[Any], bytes], tmp_path: pathlib.Path
) -> None:
    rng = np.random.default_rng(0)
    leaves: list[Any] = [rng.normal(size=shape).astype(np.float32) for shape in ODD_SHAPES]
    for dtype in (np.int8, np.uint16, np.float64, np.bool_, ml_dtypes.bfloat16):
        leaves.append(rng.integers(0, 2, size=(3, 5)).astype(dtype))
    for weight, scales in ODD_PAIRS:
        leaves.append(
            QuantizedWeight8bit(
                rng.integers(-128, 128, size=weight).astype(np.int8),
                rng.normal(size=scales).astype(ml_dtypes.bfloat16),
            )
        )
    params = {"m": {f"{index:03d}": leaf for index, leaf in enumerate(leaves)}}
    checkpoint.save(tmp_path, params)
    for record, leaf in zip(checkpoint.files(params), leaves, strict=True):
        written = (tmp_path / "ckpt-0" / record.file).read_bytes()
        if isinstance(leaf, QuantizedWeight8bit):
            leaf = StandIn(leaf.weight, leaf.scales)
        assert written == dumps(leaf), record
        assert len(written) == record.size


def test_what_is_saved_can_be_unpickled_by_a_program_with_the_class(tmp_path: pathlib.Path) -> None:
    params = random_params(tiny_shapes())
    checkpoint.save(tmp_path, params)
    program = """
import dataclasses, glob, pickle, sys
@dataclasses.dataclass
class QuantizedWeight8bit:
    weight: object
    scales: object
for path in sorted(glob.glob(sys.argv[1] + "/ckpt-0/*")):
    with open(path, "rb") as file:
        value = pickle.loads(file.read())
    both = isinstance(value, QuantizedWeight8bit)
    for array in (value.weight, value.scales) if both else (value,):
        total = float(array.astype("float64").sum())
        print(array.dtype, array.shape, total, array.flags.c_contiguous)
"""
    printed = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    expected = []
    for record in checkpoint.files(tiny_shapes()):
        for array in jax.tree.leaves(params[record.module][record.param]):
            own = array if record.layer is None else array[record.layer]
            expected.append(f"{own.dtype} {own.shape} {own.astype(np.float64).sum()} True")
    assert printed == expected


def test_arrays_over_4_gib_have_a_longer_length_and_are_not_read(tmp_path: pathlib.Path) -> None:
    below, above = (
        checkpoint.files({"m": {"p": jax.ShapeDtypeStruct((rows, 1 << 16), jnp.int8)}})[0]
        for rows in (0xFFFF, 0x10000)
    )
    # Beside the eight-byte length, the row count no longer fits two bytes.
    assert above.size - (1 << 32) == below.size - (0xFFFF << 16) + 4 + 2
    pieces = checkpoint._Writer(checkpoint._describe(above.leaf)).pieces
    hole = max(index for index, piece in enumerate(pieces) if piece is None)
    with open(tmp_path / above.file, "wb") as file:
        file.write(b"".join(piece for piece in pieces[:hole] if piece is not None))
        file.seek(1 << 32, os.SEEK_CUR)
        file.write(b"".join(piece for piece in pieces[hole + 1 :] if piece is not None))
    assert (tmp_path / above.file).stat().st_size == above.size
    start_time = time.perf_counter()
    header = checkpoint._read_header(str(tmp_path), above)
    assert time.perf_counter() - start_time < 1
    assert header.shape == (0x10000, 1 << 16)


def test_files_that_newer_numpy_wrote_are_read(
    dumps: Callable[[Any], bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    params = random_params(tiny_shapes())
    checkpoint.save(tmp_path, params)
    function = np.zeros(0).__reduce__()[0]
    monkeypatch.setattr(function, "__module__", "numpy._core.multiarray")
    router = params[LAYER + "router"]["w"][0]
    (tmp_path / "ckpt-0/tensor00004_000").write_bytes(dumps(router))
    assert b"numpy._core.multiarray" in (tmp_path / "ckpt-0/tensor00004_000").read_bytes()
    assert_same(checkpoint.load(tmp_path, tiny_shapes()), params)


def test_params_are_saved_alike_from_anywhere_and_in_any_order(tmp_path: pathlib.Path) -> None:
    params = random_params(tiny_shapes())

    def strange(array: np.ndarray) -> np.ndarray:
        return np.asfortranarray(array.astype(array.dtype.newbyteorder(">")))

    for name, variant in (
        ("plain", params),
        ("device", jax.tree.map(jnp.asarray, params)),
        ("strange", jax.tree.map(strange, params)),
        ("sharded", jax.device_put(params, shardings_of(mesh_of(1, 2), params))),
    ):
        checkpoint.save(tmp_path / name, variant)
        for path in (tmp_path / "plain/ckpt-0").iterdir():
            written = (tmp_path / name / "ckpt-0" / path.name).read_bytes()
            assert written == path.read_bytes(), (name, path.name)


def test_saving_replaces_a_checkpoint_but_leaves_nothing_over(tmp_path: pathlib.Path) -> None:
    checkpoint.save(tmp_path, random_params(tiny_shapes(layers=3), seed=1))
    before = {path: path.read_bytes() for path in (tmp_path / "ckpt-0").iterdir()}
    smaller = random_params(tiny_shapes(layers=2), seed=2)
    with pytest.raises(CheckpointError, match="tensor00008_000: expected only .* got 3 that would"):
        checkpoint.save(tmp_path, smaller)
    assert {path: path.read_bytes() for path in (tmp_path / "ckpt-0").iterdir()} == before
    (tmp_path / "ckpt-0/README.md").write_text("not a tensor")
    again = random_params(tiny_shapes(layers=3), seed=3)
    checkpoint.save(tmp_path, again)
    assert_same(checkpoint.load(tmp_path, tiny_shapes(layers=3)), again)


def test_a_save_that_fails_leaves_the_old_file_whole(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, random_params(tiny_shapes(), seed=1))
    before = {path: path.read_bytes() for path in (tmp_path / "ckpt-0").iterdir()}

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, random_params(tiny_shapes(), seed=2))
    assert {path: path.read_bytes() for path in (tmp_path / "ckpt-0").iterdir()} == before


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"m": {"p": jax.ShapeDtypeStruct((2,), jnp.complex64)}}, "m/p: expected numbers"),
        ({"m": {"p": jax.ShapeDtypeStruct((1 << 31,), jnp.int8)}}, "shorter than 2"),
        (
            {"m": {"p": jax.tree.map(lambda _: jax.ShapeDtypeStruct((2, 2), jnp.int8),
                                     stacked(1, 2, 2, groups=1))}},
            "m/p: expected numbers, or int8 with bfloat16 scales",
        ),
        (
            {LAYER + "a": {"p": stacked(2, 4)}, LAYER + "b": {"p": stacked(3, 4)}},
            r"expected one number of layers, got \[2, 3\]",
        ),
    ],
    ids=["complex", "too-long", "scales-of-int8", "layers-differ"],
)  # fmt: skip
def test_shapes_that_the_layout_has_no_place_for(shapes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.files(shapes)


# Devices.


def mesh_of(data: int, model: int) -> Mesh:
    devices = np.array(jax.devices()[: data * model]).reshape(data, model)
    return Mesh(devices, ("data", "model"))


def shardings_of(mesh: Mesh, shapes: Any) -> Any:
    """Shardings by the table of GROK-1's own mesh: which axis lies over `model`."""
    columns = PartitionSpec(None, "model")
    rows = PartitionSpec("model", None)
    specs = {
        EMBED: rows, "moe/linear": columns, "moe/linear_v": columns, "moe/linear_1": rows,
        "multi_head_attention/linear": rows, "multi_head_attention/query": columns,
        "multi_head_attention/key": columns, "multi_head_attention/value": columns,
    }  # fmt: skip

    def place(path: Any, array: Any) -> NamedSharding:
        spec = specs.get(path[0].key.removeprefix(LAYER), PartitionSpec())
        lead = (None,) * (array.ndim - len(spec)) if spec else ()
        axes = [axis if size > 1 else None for axis, size in
                zip((*lead, *spec), array.shape[: len(lead) + len(spec)], strict=True)]  # fmt: skip
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(place, shapes)


@pytest.mark.parametrize(("data", "model"), [(1, 8), (2, 4)])
def test_each_device_reads_its_own_slice_and_nothing_else(
    data: int, model: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert jax.device_count() == 8
    shapes = golden_shapes("three-layers")
    shardings = shardings_of(mesh_of(data, model), shapes)
    make = jax.make_array_from_callback

    def checked_make(shape: Any, sharding: Any, callback: Any) -> jax.Array:
        def read(index: Any) -> np.ndarray:
            array = callback(index)
            assert type(array) is np.ndarray
            assert array.shape == sharding.shard_shape(shape)
            return array

        return make(shape, sharding, read)

    monkeypatch.setattr(jax, "make_array_from_callback", checked_make)
    name = f"{EMBED}/embeddings"
    params = checkpoint.load(GOLDEN / "three-layers", shapes, shardings, {name: jnp.bfloat16})
    monkeypatch.undo()
    whole = checkpoint.load(GOLDEN / "three-layers", shapes)
    whole[EMBED]["embeddings"] = np.asarray(whole[EMBED]["embeddings"]).astype(ml_dtypes.bfloat16)
    assert_same(params, whole)
    for array, expected, sharding in zip(
        *map(jax.tree.leaves, (params, whole, shardings)), strict=True
    ):
        assert array.sharding == sharding
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(expected)[shard.index])
    linear_1 = params[LAYER + "moe/linear_1"]["w"].weight
    assert linear_1.addressable_shards[0].data.shape == (3, 8, 688 // model, 128)


@pytest.mark.parametrize("sharded", [False, True], ids=["one-device", "eight-devices"])
def test_layers_are_filled_into_one_buffer_that_stays_in_place(
    sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = golden_shapes("three-layers")
    shardings = shardings_of(mesh_of(1, 8), shapes) if sharded else None
    load_array, set_layer = checkpoint._load_array, checkpoint._set_layer
    fills, traces = [], []

    def pointers(array: jax.Array) -> list[int]:
        return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]

    def watched(folder: Any, record: Any, stored: Any, part: Any, target: Any, *rest: Any) -> Any:
        before = pointers(target) if record.layer is not None else None
        array = load_array(folder, record, stored, part, target, *rest)
        if before is not None:
            assert pointers(array) == before
            assert target.is_deleted()
            fills.append(record.name)
        return array

    def traced(stack: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
        traces.append(stack.shape)
        return set_layer(stack, layer, index)

    monkeypatch.setattr(checkpoint, "_load_array", watched)
    monkeypatch.setattr(checkpoint, "_set_layer", traced)
    checkpoint.load(GOLDEN / "three-layers", shapes, shardings)
    # Seven matrices in two parts and five float parameters, three layers each.
    assert len(fills) == (7 * 2 + 5) * 3
    assert len(traces) <= 7 * 2 + 5


def test_filling_the_largest_stack_of_grok_1_takes_no_memory_beside_it() -> None:
    mesh = mesh_of(1, 8)
    stack = full_shapes()[LAYER + "moe/linear"]["w"].weight
    sharding = NamedSharding(mesh, PartitionSpec(None, None, None, "model"))
    layer = jax.ShapeDtypeStruct((1, *stack.shape[1:]), jnp.int8, sharding=sharding)
    stack = jax.ShapeDtypeStruct(stack.shape, jnp.int8, sharding=sharding)
    fill = jax.jit(checkpoint._set_layer, donate_argnums=0, out_shardings=sharding)
    memory = fill.lower(stack, layer, 63).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == memory.output_size_in_bytes == 64 * 6144 * 32768
    assert memory.temp_size_in_bytes < 1 << 20


def test_the_host_never_holds_a_stacked_parameter(tmp_path: pathlib.Path) -> None:
    shapes = {LAYER + "a": {"w": stacked(24, 512, 512, groups=8)}}
    checkpoint.save(tmp_path, random_params(shapes))
    checkpoint.load(tmp_path, shapes)
    tracemalloc.start()
    checkpoint.load(tmp_path, shapes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    one_file = checkpoint.files(shapes)[0].size
    assert one_file < peak < 3 * one_file


def test_progress_counts_every_byte_once(tmp_path: pathlib.Path) -> None:
    checkpoint.save(tmp_path, random_params(tiny_shapes()))
    calls: list[tuple[int, int]] = []
    checkpoint.load(
        tmp_path, tiny_shapes(), progress=lambda done, total: calls.append((done, total))
    )
    sizes = [path.stat().st_size for path in sorted((tmp_path / "ckpt-0").iterdir())]
    assert calls == [(sum(sizes[: i + 1]), sum(sizes)) for i in range(len(sizes))]


def test_arguments_that_do_not_fit_the_shapes_are_refused_at_once(tmp_path: pathlib.Path) -> None:
    shapes = tiny_shapes()
    for name in ("no/such", f"{LAYER}moe/linear_1/w"):
        with pytest.raises(ValueError, match=f"float parameters, got '{name}'"):
            checkpoint.load(tmp_path, shapes, dtypes={name: jnp.bfloat16})
    split = NamedSharding(mesh_of(1, 2), PartitionSpec("model"))
    with pytest.raises(ValueError, match="leaves all 2 layers on each device, got one .* 1"):
        checkpoint.load(tmp_path, shapes, jax.tree.map(lambda _: split, shapes))


def test_importing_touches_no_device() -> None:
    program = (
        "import jax; before = dict(jax.config.values); import checkpoint\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "assert dict(jax.config.values) == before\n"
    )
    root = pathlib.Path(checkpoint.__file__).parent
    subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=root, check=True)


# Damaged and hostile files.


@dataclasses.dataclass
class Scene:
    """What a damaging function may use: it returns the file's new bytes, or acts by itself."""

    good: bytes
    path: pathlib.Path
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


def router(dtype: Any = np.float32, shape: tuple[int, ...] = (8, 2)) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def laughs(start: int, count: int) -> bytes:
    """Opcodes that pair the value on the stack with itself, stored as `start`, again and again."""
    return b"".join(b"h" + bytes([start + i]) + b"\x86\x94" for i in range(count))


def replaced_by(make: Callable[[pathlib.Path], object]) -> Callable[[Scene], None]:
    def damage(scene: Scene) -> None:
        scene.path.unlink()
        make(scene.path)

    return damage


def made(value: Any) -> Callable[[Scene], bytes]:
    return lambda scene: scene.dumps(value)


def raw(opcodes: bytes) -> Callable[[Scene], bytes]:
    """A pickle of these opcodes, with enough behind them that it does not end too early."""
    return lambda _: b"\x80\x04" + opcodes + bytes(300)


def hostile(name: str) -> Callable[[Scene], bytes]:
    return lambda scene: scene.dumps(evil(name, scene))


def patch(old: bytes, new: bytes) -> Callable[[Scene], bytes]:
    def damage(scene: Scene) -> bytes:
        assert scene.good.count(old) == 1
        return scene.good.replace(old, new)

    return damage


def pair(weight: Any = None, scales: Any = None, **state: Any) -> Callable[[Scene], bytes]:
    """A QuantizedWeight8bit, right but for the arguments."""
    value = StandIn(
        np.ones((2, 16, 8), np.int8) if weight is None else weight,
        np.ones((2, 8, 8), ml_dtypes.bfloat16) if scales is None else scales,
    )
    value.__dict__.update(state)
    return made(value)


def link_to(target: str) -> Callable[[Scene], None]:
    return replaced_by(lambda path: path.symlink_to(target))


# fmt: off
FLOATS, INTS = 4, 2  # The files of a float parameter, and of an int8 one.
OPEN = "expected only the pickle opcodes of an array, got"
ONLY = "expected only the globals __main__.QuantizedWeight8bit, numpy.core.multiarray._reconstruct"
NOTHING = "expected one array or one QuantizedWeight8bit, got something else"
SHAPE = b"K\x08K\x02\x86"  # (8, 2)
INT = b"J\xff\xff\xff\x7f"
DAMAGE = Callable[[Scene], bytes | None]

# id -> (file, damage, what the sentence must say)
FILE_CASES: dict[str, tuple[int, DAMAGE, list[str]]] = {
    # Not whole.
    "empty": (INTS, lambda _: b"", ["is cut: expected 814 bytes, got 0; download it again"]),
    "one-byte": (INTS, lambda s: s.good[:1], ["is cut: expected 814 bytes, got 1;"]),
    "cut-in-header": (INTS, lambda s: s.good[:100], ["is cut: expected 814 bytes, got 100;"]),
    "cut-in-weight": (INTS, lambda s: s.good[:300], ["is cut: expected 814 bytes, got 300;"]),
    "cut-in-scales": (INTS, lambda s: s.good[:700], ["is cut: expected 814 bytes, got 700;"]),
    "cut-by-a-byte": (INTS, lambda s: s.good[:-1], ["is cut: expected 814 bytes, got 813;"]),
    "long-by-a-byte": (INTS, lambda s: s.good + b"\0", ["too long: expected 814 bytes, got 815;"]),
    "two-pickles": (INTS, lambda s: s.good * 2, ["too long: expected 814 bytes, got 1628;"]),
    "zeros": (INTS, lambda _: bytes(814), [r"expected b'\x80\x04' at its start, got b'\x00\x00'"]),
    "html": (INTS, lambda _: b"<html>404</html>", ["at its start, got b'<h'"]),
    "lfs": (INTS, lambda _: b"version https://git-lfs.github.com/spec/v1", ["got b've'"]),
    "numpy-file": (INTS, lambda _: b"\x93NUMPY" + bytes(99), [r"got b'\x93N'"]),
    # Not a file.
    "directory": (INTS, replaced_by(pathlib.Path.mkdir), ["it is not a regular file"]),
    "pipe": (INTS, replaced_by(os.mkfifo), ["it is not a regular file"]),
    "dangling-link": (INTS, link_to("gone"), ["got an error (No such file or directory)"]),
    "link-to-directory": (INTS, link_to("."), ["it is not a regular file"]),
    "link-to-itself": (INTS, link_to("tensor00002_000"), ["Too many levels of symbolic links"]),
    # Another array.
    "float64": (FLOATS, made(router(np.float64)),
                ["expected float32 [8, 2], got float64 [8, 2]; check that the configuration"]),
    "float16": (FLOATS, made(router(np.float16)), ["got float16 [8, 2]"]),
    "bfloat16": (FLOATS, made(router(ml_dtypes.bfloat16)), ["got bfloat16 [8, 2]"]),
    "int8-alone": (INTS, made(np.ones((2, 16, 8), np.int8)),
                   ["expected quantised int8 [2, 16, 8] with scales bfloat16 [2, 8, 8], got int8"]),
    "float-for-int8": (INTS, made(np.ones((2, 16, 8), np.float32)),
                       ["got float32 [2, 16, 8]; this checkpoint is not quantised: load it as"]),
    "int8-for-float": (FLOATS, pair(),
                       ["expected float32 [8, 2], got quantised", "this checkpoint is quantised"]),
    "transposed": (FLOATS, made(router(shape=(2, 8))), ["got float32 [2, 8]"]),
    "flat": (FLOATS, made(router(shape=(16,))), ["got float32 [16]"]),
    "more-rows": (FLOATS, made(router(shape=(9, 2))), ["got float32 [9, 2]"]),
    "uint8-weight": (INTS, pair(np.ones((2, 16, 8), np.uint8)), ["got quantised uint8"]),
    "one-group": (INTS, pair(scales=np.ones((2, 1, 8), ml_dtypes.bfloat16)),
                  ["got quantised int8 [2, 16, 8] with scales bfloat16 [2, 1, 8]"]),
    "float32-scales": (INTS, pair(scales=np.ones((2, 8, 8), np.float32)),
                       ["with scales float32 [2, 8, 8]"]),
    "fortran": (FLOATS, made(np.asfortranarray(router())),
                ["got Fortran-ordered float32 [8, 2]; save it again, little-endian and in C"]),
    "fortran-weight": (INTS, pair(np.asfortranarray(np.ones((2, 16, 8), np.int8))),
                       ["got quantised Fortran-ordered int8 [2, 16, 8]", "save it again"]),
    "big-endian": (FLOATS, made(router(">f4")),
                   ["got big-endian float32 [8, 2]; save it again, little-endian and in C order"]),
    "odd-endian": (FLOATS, patch(b"\x8c\x01<", b"\x8c\x01="), ["'='-endian"]),
    "complex": (FLOATS, made(router(np.complex64)), ["plain number type", "got 'c8'"]),
    "text": (FLOATS, made(np.array(["a", "b"])), ["plain number type", "got 'U1'"]),
    "objects": (FLOATS, made(np.array([None, {}])), [OPEN, "EMPTY_LIST at byte"]),
    "records": (FLOATS, made(np.zeros(2, "i4,f4")), [NOTHING]),
    "scalar": (FLOATS, made(np.float32(1)), [ONLY, "got 'numpy", ".scalar'"]),
    "number": (FLOATS, made(1), [NOTHING]),
    "dict": (FLOATS, made({}), [NOTHING]),
    "tuple": (FLOATS, made((router(), router())), [NOTHING]),
    "list": (FLOATS, made([router()]), [f"{OPEN} EMPTY_LIST at byte 11"]),
    "array-without-state": (FLOATS, lambda s: s.good[:2] + s.good[11:83] + b".", [NOTHING]),
    "extra-state": (INTS, pair(bias=router()), [NOTHING]),
    "nested": (INTS, pair(StandIn(router(), router())), [NOTHING]),
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
    "protocol-0": (FLOATS, lambda _: pickle.dumps(router(), protocol=0), ["got b'cn'"]),
    "protocol-2": (FLOATS, lambda _: pickle.dumps(router(), protocol=2), [r"got b'\x80\x02'"]),
    "protocol-5": (FLOATS, lambda _: pickle.dumps(router(), protocol=5), [r"got b'\x80\x05'"]),
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
    "evil-in-state": (INTS, lambda s: pair(bias=evil("open", s))(s), [ONLY, "got 'io.open'"]),
    "evil-as-scales": (INTS, lambda s: pair(scales=evil("open", s))(s), [ONLY, "got 'io.open'"]),
    "evil-after-the-end": (FLOATS, lambda s: s.good + s.dumps(evil("open", s)), ["is too long"]),
    "evil-before": (FLOATS, lambda s: s.dumps((evil("open", s), router())), ["got 'io.open'"]),
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
FILE_CASES |= {
    opcode.name: (FLOATS, raw(b"N" + opcode.code.encode("latin-1")), [f"{OPEN} {opcode.name} at"])
    for opcode in pickletools.opcodes if opcode.name not in LAYOUT_OPCODES
}
FILE_CASES |= {
    name: (FLOATS, hostile(name), [ONLY, f"got '{got}'"])
    for name, got in {"system": "posix.system", "eval": "builtins.eval", "exec": "builtins.exec",
                      "open": "io.open", "Popen": "subprocess.Popen"}.items()
}
# fmt: on


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("tiny")
    checkpoint.save(directory, random_params(tiny_shapes()))
    return directory


def refusal(directory: pathlib.Path, shapes: Any = None) -> str:
    """The sentence of the CheckpointError that loading raises, with no device memory taken."""
    before = len(jax.live_arrays())
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(directory, shapes or tiny_shapes())
    assert len(jax.live_arrays()) == before
    message = str(caught.value)
    assert re.fullmatch(r"[^\n]+: expected [^\n]+, got [^\n]+; [^\n]+[^.\n]", message), message
    return message


@pytest.mark.parametrize(("index", "damage", "parts"), FILE_CASES.values(), ids=FILE_CASES.keys())
def test_damaged_and_hostile_files_are_refused_in_one_sentence(
    index: int,
    damage: DAMAGE,
    parts: list[str],
    tiny_checkpoint: pathlib.Path,
    tmp_path: pathlib.Path,
    dumps: Callable[[Any], bytes],
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, directory)
    path = directory / f"ckpt-0/tensor{index:05d}_000"
    scene = Scene(path.read_bytes(), path, tmp_path / "sentinel", dumps)
    content = damage(scene)
    if content is not None:
        assert content != scene.good
        path.write_bytes(content)
    started = time.perf_counter()
    message = refusal(directory)
    assert time.perf_counter() - started < 2
    name = {FLOATS: "router/w", INTS: "moe/linear_1/w"}[index]
    assert message.startswith(f"{path} (transformer/decoder_layer_0/{name}): ")
    for part in parts:
        assert part in message
    assert not scene.sentinel.exists()


def test_the_hostile_files_would_do_harm_if_they_were_unpickled(tmp_path: pathlib.Path) -> None:
    scene = Scene(b"", tmp_path, tmp_path / "sentinel", pickle.dumps)
    pickle.loads(pickle.dumps(evil("open", scene), protocol=4)).close()
    assert scene.sentinel.exists()


def test_loading_runs_no_pickle(
    tiny_checkpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was run")

    for name in ("load", "loads", "Unpickler", "dump", "dumps", "Pickler"):
        monkeypatch.setattr(pickle, name, run)
    assert_same(checkpoint.load(tiny_checkpoint, tiny_shapes()), random_params(tiny_shapes()))


def test_a_file_without_permission_is_named(
    tiny_checkpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, mode: str) -> Any:
        if path.endswith("tensor00003_000"):
            raise PermissionError(13, "Permission denied")
        return open(path, mode)

    monkeypatch.setattr(checkpoint, "open", refuse, raising=False)  # Root may open everything.
    message = refusal(tiny_checkpoint)
    assert "tensor00003_000 (transformer/decoder_layer_0/rms_norm/scale): expected a rea" in message
    assert "got an error (Permission denied); check its permissions" in message


def test_a_file_that_is_cut_while_loading_is_named(
    tiny_checkpoint: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "ckpt-0/tensor00007_000"
    before = len(jax.live_arrays())
    with pytest.raises(CheckpointError, match=r"decoder_layer_1/router/w\): expected a file of 2"):
        checkpoint.load(tmp_path, tiny_shapes(), progress=lambda *_: os.truncate(path, 20))
    assert len(jax.live_arrays()) == before


def remove(*names: str) -> Callable[[pathlib.Path], None]:
    def damage(directory: pathlib.Path) -> None:
        for name in names:
            (directory / "ckpt-0" / name).unlink()

    return damage


def add(*names: str) -> Callable[[pathlib.Path], None]:
    def damage(directory: pathlib.Path) -> None:
        for name in names:
            (directory / "ckpt-0" / name).touch()

    return damage


def as_file(directory: pathlib.Path) -> None:
    shutil.rmtree(directory / "ckpt-0")
    (directory / "ckpt-0").write_text("a file")


# fmt: off
DIRECTORY_CASES: dict[str, tuple[Callable[[pathlib.Path], Any], list[str]]] = {
    "no-directory": (shutil.rmtree,
     ["ckpt-0: expected a directory of 8 tensor files, got an error (No such file or directory)",
      "give the directory that contains ckpt-0"]),
    "no-ckpt-0": (lambda d: shutil.rmtree(d / "ckpt-0"), ["ckpt-0: expected a directory of 8"]),
    "ckpt-0-is-a-file": (as_file, ["expected a directory of 8 tensor files", "Not a directory"]),
    "nothing": (remove(*(f"tensor0000{i}_000" for i in range(8))),
     ["tensor00000_000 (language_model/in_out_embed/embeddings): the file is missing: "
      "expected 8 tensor files, got 0; download it again"]),
    "one-missing": (remove("tensor00003_000"),
     ["tensor00003_000 (transformer/decoder_layer_0/rms_norm/scale): the file is missing: "
      "expected 8 tensor files, got 7; download it again"]),
    "three-missing": (remove("tensor00002_000", "tensor00003_000", "tensor00004_000"),
     ["tensor00002_000 (transformer/decoder_layer_0/moe/linear_1/w): the file is missing"]),
    "one-extra": (add("tensor00008_000"),
     ["tensor00008_000: the file belongs to no parameter of the model: expected 8 tensor files, "
      "got 9; remove it, or correct the configuration"]),
    "second-shard": (add("tensor00003_001"), ["tensor00003_001: the file belongs to no parameter"]),
    "renamed": (lambda d: (d / "ckpt-0/tensor00003_000").rename(d / "ckpt-0/tensor3_000"),
     ["tensor00003_000", "the file is missing: expected 8 tensor files, got 8"]),
    "fewer-layers": (remove(*(f"tensor0000{i}_000" for i in (5, 6, 7))),
     ["ckpt-0: expected 8 tensor files (2 layers), got 5 (1 layers); correct the number of"]),
    "more-layers": (add("tensor00008_000", "tensor00009_000", "tensor00010_000"),
     ["ckpt-0: expected 8 tensor files (2 layers), got 11 (3 layers); correct the number of"]),
}
# fmt: on


@pytest.mark.parametrize(("damage", "parts"), DIRECTORY_CASES.values(), ids=DIRECTORY_CASES.keys())
def test_directories_with_other_files_are_refused_in_one_sentence(
    damage: Callable[[pathlib.Path], Any],
    parts: list[str],
    tiny_checkpoint: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, directory)
    damage(directory)
    message = refusal(directory)
    assert message.startswith(str(directory))
    for part in parts:
        assert part in message


def test_other_files_beside_the_tensors_are_no_matter(
    tiny_checkpoint: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
    add("README.md", ".gitattributes", "tensor00001_000.incomplete")(tmp_path)
    path = tmp_path / "ckpt-0/tensor00002_000"
    path.rename(tmp_path / "blob")  # As download caches store it.
    path.symlink_to(tmp_path / "blob")
    assert_same(checkpoint.load(tmp_path, tiny_shapes()), random_params(tiny_shapes()))


def test_mutated_headers_give_the_layout_or_a_refusal(
    tiny_checkpoint: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Cheap fuzzing with a fixed seed: nothing but CheckpointError may ever come out."""
    rng = random.Random(0)
    records = checkpoint.files(tiny_shapes())
    outcomes = {"read": 0, "refused": 0}
    for _ in range(600):
        record = records[rng.choice((INTS, FLOATS))]
        good = (tiny_checkpoint / "ckpt-0" / record.file).read_bytes()
        expected = checkpoint._read_header(str(tiny_checkpoint / "ckpt-0"), record)
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
        (tmp_path / record.file).write_bytes(data)
        try:
            header = checkpoint._read_header(str(tmp_path), record)
        except CheckpointError as error:
            assert record.file in str(error) and record.name in str(error)
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            assert header == expected
            outcomes["read"] += 1
    assert outcomes["read"] > 20 and outcomes["refused"] > 300


# The configuration.


def test_config_is_a_dict_or_none(tmp_path: pathlib.Path) -> None:
    assert checkpoint.read_config(tmp_path) is None
    checkpoint.save(tmp_path, random_params(tiny_shapes()), {"model": {"num_layers": 2}})
    assert checkpoint.read_config(tmp_path) == {"model": {"num_layers": 2}}
    config = checkpoint.read_config(GOLDEN / "three-layers")
    assert config is not None and config["model"]["num_layers"] == 3


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "expected valid JSON"),
        (b"{'a': 1}", "expected valid JSON"),
        (b'{"a": 1', "expected valid JSON"),
        (b'{"a": "\xff"}', "expected valid JSON"),
        (b"[" * 200_000, "expected valid JSON"),
        (b"[1, 2]", "expected a JSON object, got a list"),
        (b'"{}"', "expected a JSON object, got a str"),
        (b'{"a": "' + b"x" * (1 << 20) + b'"}', "at most 1048576 bytes of JSON, got more"),
        (None, "got an error (it is not a regular file)"),
    ],
    ids=["empty", "quotes", "cut", "latin-1", "deep", "list", "text", "huge", "directory"],
)
def test_broken_configs_are_refused_in_one_sentence(
    content: bytes | None, part: str, tmp_path: pathlib.Path
) -> None:
    if content is None:
        (tmp_path / "config.json").mkdir()
    else:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read_config(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: expected ")
    assert part in message and "\n" not in message

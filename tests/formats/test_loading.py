"""Arrays come from files onto devices whole, in parallel, and with little memory beside them."""

import functools
import itertools
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import checkpoint
import golden
from checkpoint import CheckpointError
from grok1.formats import atomic, layout, loading, pickle_file, values
from grok1.parallel.sharding import make_mesh, named_shardings, parameter_specs
from model import grok_1
from paths import ROOT

LAYER = "transformer/decoder_layer/"
EMBED = "language_model/in_out_embed"
THREE_LAYERS = golden.DIRECTORY / "three-layers"


@pytest.fixture(params=["host", "device"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Parts are filled on the host, as for a CPU; or on their devices, as for any other."""
    if request.param == "device":
        monkeypatch.setattr(loading, "_on_host", lambda _: False)
        monkeypatch.setattr(loading, "SMALL_BYTES", 20_000)
        monkeypatch.setattr(loading, "PIECE_BYTES", 30_000)
    return request.param


@functools.cache
def shapes() -> Any:
    return golden.config("three-layers", "float32").param_shapes()


def shardings_of(sizes: tuple[int, int]) -> Any:
    """The model's own shardings."""
    config = golden.config("three-layers", "float32")
    mesh = make_mesh(sizes, num_kv_heads=config.model.num_kv_heads)
    return named_shardings(parameter_specs(shapes(), config.partition_rules(mesh), mesh), mesh)


def one_array(path: pathlib.Path, layers: int, *shape: int, dtype: Any = jnp.int8) -> Any:
    """Save a checkpoint of one stacked array of random numbers; returns its shapes and values."""
    rng = np.random.default_rng(0)
    full = (layers, *shape)
    values: Any = rng.integers(-128, 128, full, dtype=np.int8).astype(dtype)
    tree: Any = {LAYER + "a": {"w": jax.ShapeDtypeStruct(full, dtype)}}
    checkpoint.write(path, {LAYER + "a": {"w": values}})
    return tree, values


# ------------------------------------------------------------------------------------ what arrives


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("sizes", [(1, 1), (1, 8), (2, 4), (4, 1)])
def test_each_device_gets_its_own_slice(sizes: tuple[int, int]) -> None:
    shardings = shardings_of(sizes)
    dtypes = {f"{EMBED}/embeddings": jnp.bfloat16}
    params = checkpoint.load(THREE_LAYERS, shapes(), shardings, dtypes)
    whole = jax.tree.map(np.asarray, golden.runner("three-layers").params)
    whole[EMBED]["embeddings"] = whole[EMBED]["embeddings"].astype(ml_dtypes.bfloat16)
    trees = (params, whole, shardings)
    for array, expected, sharding in zip(*map(jax.tree.leaves, trees), strict=True):
        assert array.sharding == sharding and array.dtype == expected.dtype
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])
    linear_1 = params[LAYER + "moe/linear_1"]["w"].weight
    assert linear_1.addressable_shards[0].data.shape == (3, 8, 688 // sizes[1], 128)


def test_both_ways_are_taken(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would say nothing of devices if all parts were small enough for the host."""
    filled: set[str] = set()
    monkeypatch.setattr(
        loading,
        "_set_piece",
        lambda values, piece, _: filled.add(str(piece.shape)) or values,
    )
    checkpoint.load(THREE_LAYERS, shapes(), shardings_of((1, 8)))
    assert bool(filled) == (way == "device")


@pytest.mark.parametrize("piece", [1, 7, 64, 10**9])
def test_pieces_cover_an_array_once_and_few_shapes_are_compiled(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "PIECE_BYTES", piece)
    for shape in [(), (1,), (13,), (64,), (3, 5), (4, 1, 6), (2, 3, 4, 5), (1, 1, 97)]:
        for itemsize in (1, 4):
            seen = np.zeros(shape, int)
            sizes = set()
            for where in loading._pieces(shape, itemsize):
                seen[where] += 1
                sizes.add(seen[where].shape)
                assert seen[where].size * itemsize <= max(piece, itemsize)
            assert (seen == 1).all()
            assert len(sizes) <= 2


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_are_rounded_to_the_dtype_asked_for(dtype: str, tmp_path: pathlib.Path) -> None:
    tree = {"a": {"w": jax.ShapeDtypeStruct((300, 50), jnp.float32)}}
    values = np.random.default_rng(0).standard_normal((300, 50), np.float32)
    checkpoint.write(tmp_path, {"a": {"w": values}})
    params = checkpoint.load(tmp_path, tree, dtypes={"a/w": jnp.dtype(dtype)})
    np.testing.assert_array_equal(np.asarray(params["a"]["w"]), values.astype(jnp.dtype(dtype)))


@pytest.mark.usefixtures("way")
def test_numbers_too_large_for_the_dtype_are_refused(tmp_path: pathlib.Path) -> None:
    tree = {"a": {"w": jax.ShapeDtypeStruct((300, 50), jnp.float32)}}
    values = np.ones((300, 50), np.float32)
    values[299, 49] = 3.4e38
    checkpoint.write(tmp_path, {"a": {"w": values}})
    checkpoint.load(tmp_path, tree)
    message = r"tensor00000_000 \(a/w\): expected finite numbers in bfloat16, got inf; the model"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path, tree, dtypes={"a/w": jnp.dtype(jnp.bfloat16)})


@pytest.mark.parametrize("bits", [0x7F81, 0x7FC0, 0xFFC0])
def test_nan_in_bfloat16_gives_no_warning(bits: int, tmp_path: pathlib.Path) -> None:
    nan = np.full((2, 3), bits, np.uint16).view(ml_dtypes.bfloat16)
    checkpoint.write(tmp_path, {"a": {"w": nan}})
    tree = {"a": {"w": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match="expected finite numbers, got nan"):
            checkpoint.load(tmp_path, tree)


# ----------------------------------------------------------------------------- memory and progress


def test_a_cpu_takes_the_filled_memory_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy would double the memory; jax makes one when memory is not aligned."""
    made = []
    plain = loading.aligned_empty

    def aligned(nbytes: int) -> np.ndarray:
        made.append(plain(nbytes))
        return made[-1]

    monkeypatch.setattr(loading, "aligned_empty", aligned)
    params = checkpoint.load(THREE_LAYERS, shapes(), shardings_of((2, 4)))
    ours = {memory.ctypes.data for memory in made}
    for array in jax.tree.leaves(params):
        theirs = {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}
        assert theirs <= ours


def test_a_device_is_filled_in_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(loading, "_on_host", lambda _: False)
    monkeypatch.setattr(loading, "SMALL_BYTES", 0)
    monkeypatch.setattr(loading, "PIECE_BYTES", 1000)
    tree, values = one_array(tmp_path, 3, 64, 50)
    plain, pointers = loading._set_piece, set()

    def watched(target: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
        before = target.unsafe_buffer_pointer()
        after = plain(target, piece, start)
        assert target.is_deleted() and after.unsafe_buffer_pointer() == before
        pointers.add(before)
        return after

    monkeypatch.setattr(loading, "_set_piece", watched)
    params = checkpoint.load(tmp_path, tree)
    assert len(pointers) == 1
    np.testing.assert_array_equal(np.asarray(params[LAYER + "a"]["w"]), values)


def test_the_largest_part_of_grok_1_is_filled_with_no_memory_beside_it() -> None:
    part = jax.ShapeDtypeStruct((64, 8, 6144, 4096), jnp.int8)
    where = next(iter(loading._pieces(part.shape[1:], 1)))
    sizes = [n.stop - n.start for n in where]
    piece = jax.ShapeDtypeStruct((1, *sizes), jnp.int8)
    start = jax.ShapeDtypeStruct((4,), jnp.int32)
    memory = loading._set_piece.lower(part, piece, start).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == memory.output_size_in_bytes == math.prod(part.shape)
    assert memory.temp_size_in_bytes < 1 << 20
    assert math.prod(sizes) <= loading.PIECE_BYTES


def test_the_host_holds_the_parts_that_stay_there_and_nothing_else(
    way: str, tmp_path: pathlib.Path
) -> None:
    """On a device: one buffer a thread. On a CPU: the parameters, and not a file more."""
    tree, values = one_array(tmp_path, 24, 512, 512)
    checkpoint.load(tmp_path, tree)
    tracemalloc.start()  # sees numpy's memory, not that of jax's devices
    checkpoint.load(tmp_path, tree)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    slack = 200_000
    if way == "host":
        assert values.nbytes <= peak < values.nbytes + slack
    else:
        assert peak < loading.WORKERS * loading.PIECE_BYTES + slack < values.nbytes / 8


def test_small_parts_of_grok_1_stay_small_together() -> None:
    """What waits on the host for its last layer, on all eight devices of a host."""
    config = grok_1()
    mesh = make_mesh((1, 8))
    tree = config.param_shapes()
    specs = parameter_specs(tree, config.partition_rules(mesh), mesh)
    waiting = 0
    arrays = zip(jax.tree.leaves(tree), jax.tree.leaves(named_shardings(specs, mesh)), strict=True)
    for array, sharding in arrays:
        size = math.prod(sharding.shard_shape(array.shape)) * array.dtype.itemsize
        if size <= loading.SMALL_BYTES:
            parts = len({str(i) for i in sharding.devices_indices_map(array.shape).values()})
            waiting += parts * size
    assert waiting + loading.WORKERS * loading.PIECE_BYTES < 256 << 20


@pytest.mark.usefixtures("way")
def test_progress_counts_every_byte_that_is_read_once() -> None:
    calls: list[tuple[int, int]] = []
    for sizes in [(1, 1), (2, 4)]:
        calls.clear()
        checkpoint.load(
            THREE_LAYERS,
            shapes(),
            shardings_of(sizes),
            progress=lambda done, total: calls.append((done, total)),
        )
        # Copies for the data axis are read once; what is whole everywhere too.
        expected = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(shapes()))
        assert {total for _, total in calls} == {expected}
        done = [done for done, _ in calls]
        assert done == sorted(done) and done[-1] == expected and len(done) > 30


def test_a_process_reads_only_what_its_own_devices_hold(tmp_path: pathlib.Path) -> None:
    """As one of two processes sees a mesh: half of the devices are its own."""
    tree, values = one_array(tmp_path, 3, 64, 32)
    shape = tree[LAYER + "a"]["w"]
    mesh = make_mesh((1, 8))
    sharding = NamedSharding(mesh, PartitionSpec(None, None, "model"))

    class Half:
        shard_shape = sharding.shard_shape

        def addressable_devices_indices_map(self, shape: Any) -> Any:
            places = sharding.devices_indices_map(shape)
            return {device: places[device] for device in jax.devices()[4:8]}

    parts = loading._make_parts(shape, Half())  # type: ignore[arg-type]
    assert [part.index[2] for part in parts] == [slice(n, n + 4) for n in (16, 20, 24, 28)]
    seen: list[tuple[int, int]] = []
    headers = checkpoint.check_files(tmp_path, tree)
    sources = [loading.Source("w", layer, located, "w") for layer, located in enumerate(headers)]
    jobs = [(source, group) for source in sources for group in loading._groups(parts)]
    total = sum(loading._stored_bytes(*job) for job in jobs)
    count = loading.Counter(total, lambda *calls: seen.append(calls))
    loading._run(functools.partial(loading._read, count), jobs)
    assert seen[-1] == (total, total) and total == values.nbytes // 2
    for part in parts:
        np.testing.assert_array_equal(part.values, values[:, :, part.index[2]])


# ------------------------------------------------------------------------------- when it goes wrong


def test_no_byte_is_moved_before_the_last_header_is_checked(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, _ = one_array(tmp_path, 3, 64)
    (tmp_path / "ckpt-0" / "tensor00002_000").write_bytes(b"not a tensor")
    monkeypatch.setattr(loading, "_make_parts", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(CheckpointError, match="tensor00002_000"):
        checkpoint.load(tmp_path, tree)


@pytest.mark.usefixtures("way")
def test_a_file_that_changes_after_the_check_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, _ = one_array(tmp_path, 3, 64, 50)
    path = tmp_path / "ckpt-0" / "tensor00001_000"
    check = layout.check_files

    def then_cut(*arguments: Any) -> Any:
        headers = check(*arguments)
        os.truncate(path, 100)
        return headers

    monkeypatch.setattr(layout, "check_files", then_cut)
    with pytest.raises(CheckpointError, match=f"{path} .*: expected the file that was checked"):
        checkpoint.load(tmp_path, tree)
    assert not loading_threads()


def written(path: pathlib.Path) -> None:
    """Change the last bytes of a file."""
    with path.open("r+b") as file:
        file.seek(-500, os.SEEK_END)
        file.write(b"x" * 400)
    os.utime(path, ns=(1, 1))  # a clock may be too coarse to show that it was written at once


def replaced(path: pathlib.Path) -> None:
    """Put a longer file in its place, which holds other values where its own were."""
    path.with_name("new").write_bytes(b"x" * 64 + path.read_bytes())
    path.with_name("new").rename(path)


@pytest.mark.parametrize(("layers", "change"), [(1, written), (8, written), (8, replaced)])
@pytest.mark.usefixtures("way")
def test_a_file_of_other_values_is_not_loaded(
    layers: int,
    change: Callable[[pathlib.Path], None],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While it is read, or before; it is long enough, and all of its numbers are finite."""
    monkeypatch.setattr(loading, "PIECE_BYTES", 1000)
    monkeypatch.setattr(loading, "WORKERS", 1)
    tree, _ = one_array(tmp_path, layers, 64, 50)
    path = max((tmp_path / "ckpt-0").iterdir())
    changes = iter([change])

    def progress(*_: int) -> None:
        next(changes, lambda _: None)(path)

    with pytest.raises(CheckpointError, match=f"{path} .*: expected the file that was checked"):
        checkpoint.load(tmp_path, tree, progress=progress)
    assert not loading_threads()


@pytest.mark.parametrize("use", ["load", "save as safetensors", "save as released"])
def test_a_file_that_is_cut_while_read_is_named(use: str, tmp_path: pathlib.Path) -> None:
    """A mapped file would end the process, without a word."""
    program = f"""
import os, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
import checkpoint, golden, reference
from grok1.formats import atomic, loading, values
source, target = sys.argv[1:]
shapes = golden.config("three-layers", "float32").param_shapes()
loading.PIECE_BYTES = values._PIECE_BYTES = 10_000
loading.WORKERS = 1
def cut(*_):
    for name in os.listdir(source):
        if name[0] in "tlo":  # tensor, layer, outer
            os.truncate(os.path.join(source, name), 300)
fill = atomic.fill
atomic.fill = lambda *arguments: [fill(*arguments), cut()]
try:
    if {use!r} == "load":
        checkpoint.load(os.path.dirname(source), shapes, progress=cut)
    else:
        checkpoint.convert(sys.argv[1].removesuffix("/ckpt-0"), target, {use.split()[-1]!r}, cut)
except checkpoint.CheckpointError as error:
    print(error)
"""
    source = tmp_path / "source"
    if use.endswith("released"):
        checkpoint.convert(THREE_LAYERS, source, "safetensors")
    else:
        shutil.copytree(THREE_LAYERS, source)
        source = source / "ckpt-0"
    command = [sys.executable, "-c", program, source, tmp_path / "target"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout.startswith(f"{source}/") and done.stdout.count("\n") == 1
    assert re.search(r"got one that changed|the file is cut", done.stdout), done.stdout


BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("sizes", [(1, 1), (1, 8)])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (f"{EMBED}/embeddings", np.float32),
        ("language_model/rms_norm/scale", np.float32),
        (f"{LAYER}router/w", np.float32),
        (f"{LAYER}moe/linear_1/w", ml_dtypes.bfloat16),
        (f"{LAYER}multi_head_attention/query/w", ml_dtypes.bfloat16),
    ],
)
@pytest.mark.usefixtures("way")
def test_values_that_are_not_finite_are_not_loaded(
    name: str, dtype: Any, sizes: tuple[int, int], tmp_path: pathlib.Path
) -> None:
    params = jax.tree.map(np.array, golden.runner("three-layers").params)
    params[EMBED]["embeddings"] = params[EMBED]["embeddings"].astype(np.float32)
    module, _, param = name.rpartition("/")
    leaf = params[module][param]
    floats = leaf if dtype == np.float32 else leaf.scales
    floats[..., -1].flat[-1] = bad = BAD[len(name) % 3]
    checkpoint.write(tmp_path, params)
    tensor = name.replace("decoder_layer", "decoder_layer_2") + "/scales" * (floats is not leaf)
    message = rf"/ckpt-0/tensor\d+_000 \({tensor}\): expected finite numbers, got {bad}; the model"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path, shapes(), shardings_of(sizes))
    assert not loading_threads()


@pytest.mark.usefixtures("way")
def test_single_numbers_are_loaded(tmp_path: pathlib.Path) -> None:
    tree = {"a": {"w": jax.ShapeDtypeStruct((), jnp.float32)}}
    checkpoint.write(tmp_path, {"a": {"w": np.float32(2.5)}})
    assert checkpoint.load(tmp_path, tree)["a"]["w"] == 2.5


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (2, 1, 3, 4)])
def test_any_box_is_read_as_numpy_slices_it(shape: tuple[int, ...], tmp_path: pathlib.Path) -> None:
    array = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    (tmp_path / "file").write_bytes(b"before" + array.tobytes() + b"after")
    path = str(tmp_path / "file")
    located = pickle_file.Located(shape, "int32", 6, path, atomic.stamp(path))
    spans = [[slice(a, b) for a in range(n) for b in range(a + 1, n + 1)] for n in shape]
    with values.open_values(located, "x") as file:
        for box in itertools.product(*spans):
            out = np.empty([where.stop - where.start for where in box], np.int32)
            values.read_box(file, located, box, out)
            np.testing.assert_array_equal(out, array[box])


def loading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loading")]


def test_ctrl_c_ends_at_the_next_piece(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, _ = one_array(tmp_path, 8, 100, 100)
    monkeypatch.setattr(loading, "PIECE_BYTES", 100)  # 800 pieces
    calls = itertools.count()

    def slow(*_: int) -> None:
        if next(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        checkpoint.load(tmp_path, tree, progress=slow)
    assert not loading_threads()
    assert next(calls) < 100


def test_a_failure_ends_the_other_threads_too(tmp_path: pathlib.Path) -> None:
    tree, _ = one_array(tmp_path, 100, 100)
    calls = itertools.count()

    def fail(*_: int) -> None:
        if next(calls) == 3:
            raise OSError("the terminal is gone")
        time.sleep(0.001)

    with pytest.raises(OSError, match="the terminal is gone"):
        checkpoint.load(tmp_path, tree, progress=fail)
    assert not loading_threads()
    assert next(calls) < 50

"""Arrays are read from files onto devices: in parallel, and with little memory on the host."""

import functools
import itertools
import math
import os
import pathlib
import signal
import threading
import time
import tracemalloc
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
from small import EMBED, LAYER, random_params, tiny_shapes

THREE_LAYERS = golden.DIRECTORY / "three-layers"


@pytest.fixture(params=["host", "device"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Fill arrays on the host, as for a CPU, or on their devices, as for all others."""
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
    """Save a checkpoint of one stacked array of random numbers; return its shapes and values."""
    rng = np.random.default_rng(0)
    full = (layers, *shape)
    values: Any = rng.integers(-128, 128, full, dtype=np.int8).astype(dtype)
    tree: Any = {LAYER + "a": {"w": jax.ShapeDtypeStruct(full, dtype)}}
    checkpoint.write(path, {LAYER + "a": {"w": values}})
    return tree, values


def loading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loading")]


# ---------------------------------------------------------------------------- values and progress


def test_devices_get_slices_and_bytes_are_read_once(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_piece, pieces, calls = loading._set_piece, [], []
    monkeypatch.setattr(
        loading, "_set_piece", lambda *args: pieces.append(args[1].shape) or set_piece(*args)
    )
    read_box, read = values.read_box, []
    monkeypatch.setattr(
        values, "read_box", lambda *args: read.append(args[3].nbytes) or read_box(*args)
    )
    shardings, dtypes = shardings_of((2, 4)), {f"{EMBED}/embeddings": jnp.bfloat16}
    params = checkpoint.load(
        THREE_LAYERS, shapes(), shardings, dtypes, lambda *call: calls.append(call)
    )
    assert bool(pieces) == (way == "device")
    read_bytes = sum(read)
    whole = jax.tree.map(np.asarray, golden.runner("three-layers").params)
    whole[EMBED]["embeddings"] = whole[EMBED]["embeddings"].astype(ml_dtypes.bfloat16)
    trees = (params, whole, shardings)
    for array, expected, sharding in zip(*map(jax.tree.leaves, trees), strict=True):
        assert array.sharding == sharding and array.dtype == expected.dtype
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])
    linear_1 = params[LAYER + "moe/linear_1"]["w"].weight
    assert linear_1.addressable_shards[0].data.shape == (3, 8, 688 // 4, 128)
    # A slice that several devices hold counts once.
    total = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(shapes()))
    done = [done for done, _ in calls]
    assert {total for _, total in calls} == {total}
    assert done == sorted(done) and done[-1] == total == read_bytes and len(done) > 30


def test_a_process_reads_only_what_its_devices_hold(tmp_path: pathlib.Path) -> None:
    """One of two processes: half of the devices of the mesh are its own."""
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


@pytest.mark.parametrize("piece", [1, 7, 64, 10**9])
def test_pieces_cover_array_once_in_at_most_two_shapes(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program is compiled for each shape."""
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


def test_single_numbers_are_loaded(tmp_path: pathlib.Path) -> None:
    tree = {"a": {"w": jax.ShapeDtypeStruct((), jnp.float32)}}
    checkpoint.write(tmp_path, {"a": {"w": np.float32(2.5)}})
    assert checkpoint.load(tmp_path, tree)["a"]["w"] == 2.5


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (2, 1, 3, 4)])
def test_a_box_is_read_as_numpy_slices_it(shape: tuple[int, ...], tmp_path: pathlib.Path) -> None:
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


def test_a_file_that_ends_too_early_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    path = str(tmp_path / "file")
    located = pickle_file.Located((25,), "int32", 0, path, atomic.stamp(path))
    with open(path, "rb") as file:
        os.truncate(path, 94)
        with pytest.raises(OSError, match="it ends 6 bytes too early"):
            values.read_box(file, located, (slice(0, 25),), np.empty(25, np.int32))


# --------------------------------------------------------------------------------------- memory


def test_a_cpu_uses_the_filled_memory_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """jax copies memory that is not aligned."""
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


def test_a_device_is_filled_in_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
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


def test_host_holds_its_arrays_and_one_buffer_a_thread(way: str, tmp_path: pathlib.Path) -> None:
    tree, values = one_array(tmp_path, 8, 1024, 1024)
    checkpoint.load(tmp_path, tree)
    tracemalloc.start()  # counts the memory of Python and numpy, not of jax's devices
    checkpoint.load(tmp_path, tree)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    slack = 700_000  # Python's own objects; a file has 1 MiB
    if way == "host":
        assert values.nbytes <= peak < values.nbytes + slack
    else:
        assert peak < loading.WORKERS * loading.PIECE_BYTES + slack < 1 << 20


def test_small_arrays_of_grok_1_fit_on_the_host() -> None:
    """They stay there until their last layer is read, on a host with eight devices."""
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


# --------------------------------------------------------------------------------------- errors


def test_no_memory_is_taken_before_headers_are_checked(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, _ = one_array(tmp_path, 3, 64)
    (tmp_path / "ckpt-0" / "tensor00002_000").write_bytes(b"not a tensor")
    monkeypatch.setattr(loading, "_make_parts", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(CheckpointError, match="tensor00002_000"):
        checkpoint.load(tmp_path, tree)


def overwritten(path: pathlib.Path) -> None:
    """Change the last bytes of a file."""
    with path.open("r+b") as file:
        file.seek(-500, os.SEEK_END)
        file.write(b"x" * 400)
    os.utime(path, ns=(1, 1))  # a clock may be too coarse for the write to change the time


def replaced(path: pathlib.Path) -> None:
    """Replace a file by a longer one, with other values in place of its own."""
    path.with_name("new").write_bytes(b"x" * 64 + path.read_bytes())
    path.with_name("new").rename(path)


def cut(path: pathlib.Path) -> None:
    os.truncate(path, 100)


@pytest.mark.parametrize(
    ("change", "when"),
    [(overwritten, "while"), (cut, "while"), (cut, "before"), (replaced, "before")],
)
def test_a_file_changed_after_the_check_is_not_loaded(
    change: Callable[[pathlib.Path], None],
    when: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reading a mapped file that is cut would end the process with SIGBUS."""
    monkeypatch.setattr(loading, "PIECE_BYTES", 1000)
    tree, _ = one_array(tmp_path, 1, 640, 50)
    path = tmp_path / "ckpt-0" / "tensor00000_000"
    check, changes = layout.check_files, iter([change])

    def checked(*arguments: Any) -> Any:
        headers = check(*arguments)
        if when == "before":
            next(changes)(path)
        return headers

    monkeypatch.setattr(layout, "check_files", checked)
    with pytest.raises(CheckpointError, match=f"{path} .*: expected the file that was checked"):
        checkpoint.load(tmp_path, tree, progress=lambda *_: next(changes, lambda _: None)(path))
    assert not loading_threads()


def test_a_changed_file_is_not_opened(tmp_path: pathlib.Path) -> None:
    tree, _ = one_array(tmp_path, 1, 64)
    (located,) = checkpoint.check_files(tmp_path, tree)
    cut(pathlib.Path(located.path))
    with (
        pytest.raises(CheckpointError, match="the file that was checked, got one that changed;"),
        values.open_values(located, "x"),
    ):
        pytest.fail("it was opened")


BFLOAT16_NAN = np.array(0x7F81, np.uint16).view(ml_dtypes.bfloat16)  # signalling: numpy may warn


@pytest.mark.parametrize(
    ("name", "bad", "text"),
    [
        (f"{EMBED}/embeddings", np.nan, "nan"),
        (f"{LAYER}router/w", -np.inf, "-inf"),
        (f"{LAYER}moe/linear_1/w", BFLOAT16_NAN, "nan"),
        (f"{LAYER}moe/linear_1/w", np.inf, "inf"),
    ],
)
def test_values_that_are_not_finite_are_not_loaded(
    name: str,
    bad: Any,
    text: str,
    way: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if way == "device":
        monkeypatch.setattr(loading, "SMALL_BYTES", 0)
    params = random_params(tiny_shapes())
    module, _, param = name.rpartition("/")
    leaf = params[module][param]
    array = getattr(leaf, "scales", leaf)
    array[..., -1].flat[-1] = bad
    checkpoint.write(tmp_path, params)
    tensor = name.replace("decoder_layer", "decoder_layer_1") + "/scales" * (array is not leaf)
    message = rf"/ckpt-0/tensor\d+_000 \({tensor}\): expected finite numbers, got {text}; the model"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path, tiny_shapes())
    assert not loading_threads()


def test_numbers_too_large_for_the_dtype_are_refused(tmp_path: pathlib.Path) -> None:
    tree = {"a": {"w": jax.ShapeDtypeStruct((300, 50), jnp.float32)}}
    values = np.ones((300, 50), np.float32)
    values[299, 49] = 3.4e38
    checkpoint.write(tmp_path, {"a": {"w": values}})
    message = r"tensor00000_000 \(a/w\): expected finite numbers in bfloat16, got inf; the model"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path, tree, dtypes={"a/w": jnp.dtype(jnp.bfloat16)})


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def fail() -> None:
    raise OSError("the terminal is gone")


@pytest.mark.parametrize(
    ("end", "error", "shape", "most"),
    [
        (interrupt, KeyboardInterrupt, (8, 100, 100), 400),  # four threads with 100 pieces each
        (fail, OSError, (100, 100), 100),
    ],
)
def test_an_interrupt_or_a_failure_ends_all_threads(
    end: Callable[[], None],
    error: type[BaseException],
    shape: tuple[int, ...],
    most: int,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree, _ = one_array(tmp_path, *shape)
    monkeypatch.setattr(loading, "PIECE_BYTES", 100)
    calls = itertools.count()

    def progress(*_: int) -> None:
        if next(calls) == 5:
            end()
        time.sleep(0.01)

    with pytest.raises(error):
        checkpoint.load(tmp_path, tree, progress=progress)
    assert not loading_threads()
    assert next(calls) < most


def test_a_failure_ends_a_job_that_began_before() -> None:
    def work(stop: threading.Event, number: int) -> None:
        if number == 1:
            raise OSError("damaged")
        assert stop.wait(10)

    with pytest.raises(OSError, match="damaged"):
        loading._run(work, [(0,), (1,)])  # type: ignore[arg-type,list-item]

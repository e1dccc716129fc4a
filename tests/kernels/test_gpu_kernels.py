"""The GPU kernels, interpreted on a CPU: results, memory traffic and lowering to Triton.

Dimension letters as in `grok1/kernels/gpu.py`. No GPU is needed.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh
from test_cpu_kernels import exact_product, plain_product, random_rows, random_weight

from grok1.execution import Execution
from grok1.kernels import dispatch as kernels
from grok1.kernels import gpu
from grok1.kernels.error import KernelError
from grok1.ops import cache
from grok1.ops.quantization import QuantizedWeight8bit
from grok1.serving import steps
from model import LanguageModelConfig, TransformerConfig
from small import exact_attention

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)


def interpreted_product():
    """Return the interpreted kernel, traced anew."""
    call = jax.jit(lambda *arrays: gpu.grouped_product(*arrays, interpret=True))
    return lambda x, weight, starts, layer: np.asarray(call(x, weight, starts, jnp.int32(layer)))


def multiply(x, weight, starts, layer):
    """Return the product by the interpreted kernel."""
    return interpreted_product()(x, weight, starts, layer)


@dataclasses.dataclass(frozen=True)
class Product:
    """The shapes of a product; `before` and `after`: rows of no group."""

    counts: tuple[int, ...]
    inputs: int = 40
    outputs: int = 24
    scale_groups: int = 1
    before: int = 0
    after: int = 0

    def arrays(self, dtype):
        """Return x, weight and starts."""
        groups = len(self.counts)
        weight = random_weight(groups, self.inputs, self.outputs, self.scale_groups)
        x, starts = random_rows([self.before, *self.counts], self.inputs, spare=self.after)
        return x.astype(dtype), weight, starts[1:]


PRODUCTS = {
    "one row, a contracted axis in equal pieces": Product((1,), inputs=768, outputs=32),
    "odd shapes": Product((3, 4, 2), inputs=77, outputs=67, scale_groups=7),
    "scale groups in pieces": Product((4,), inputs=2 * 450, outputs=128, scale_groups=2),
    # Of one shape, so that they are compiled once.
    "empty groups": Product((0, 3, 0, 2), before=3, after=32),
    "no row in any group": Product((0, 0, 0, 0), after=40),
    "groups of several tiles": Product((0, 33, 0, 7)),
    "groups that end within a tile": Product((17, 0, 18, 0), after=5),
}


@pytest.fixture(scope="module")
def product_kernel():
    """Return the interpreted kernel, compiled once for each shape."""
    return interpreted_product()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, jnp.bfloat16) for case in PRODUCTS.values()),
        # Without tensor cores, so seldom used.
        pytest.param(PRODUCTS["odd shapes"], jnp.float32, marks=pytest.mark.exhaustive),
    ],
    ids=[*PRODUCTS, "odd shapes in float32"],
)
def test_each_row_is_multiplied_by_matrix_of_its_group(case, dtype, product_kernel):
    x, weight, starts = case.arrays(dtype)
    y = product_kernel(x, weight, starts, 1)
    exact = exact_product(x, weight, starts, 1)
    assert y.dtype == np.float32 and y.shape == exact.shape
    assert np.all(y[: starts[0]] == 0) and np.all(y[starts[-1] :] == 0)
    error, scale = np.linalg.norm(y - exact), np.linalg.norm(exact)
    plain = np.linalg.norm(plain_product(x, weight, starts, 1) - exact)
    assert error <= 1e-6 * scale
    assert error <= 2 * plain + 1e-8 * scale


def test_products_of_many_rows_are_not_split(monkeypatch):
    monkeypatch.setattr(gpu, "PROCESSORS", 2)  # few enough for these shapes to occupy
    for rows, tile in ((100, 64), (150, 128)):
        x, weight, starts = Product((rows,), 800, 16, scale_groups=2).arrays(jnp.bfloat16)
        launch = gpu.plan_product(x, weight)
        assert launch.row_tile == tile and launch.pieces == 4 and not launch.split
    exact = exact_product(x, weight, starts, 0)
    error = np.linalg.norm(multiply(x, weight, starts, 0) - exact)
    assert error <= 1e-6 * np.linalg.norm(exact)


def test_row_does_not_depend_on_other_rows():
    x, weight, starts = Product((5, 3, 20), inputs=400, before=1, after=3).arrays(jnp.bfloat16)
    multiply = interpreted_product()
    y = multiply(x, weight, starts, 1)
    for own in (1, 8, 20):  # of each group
        others = np.arange(len(x)) != own
        changed = x.copy()
        changed[others] = np.nan
        z = multiply(changed, weight, starts, 1)
        assert np.array_equal(z[own], y[own]) and np.all(np.isnan(z[1:29][others[1:29]]))
        assert np.all(z[0] == 0) and np.all(z[29:] == 0)


def test_pieces_of_a_sum_are_independent_of_row_count():
    for groups, inputs, outputs, scale_groups in (
        (8, 6144, 4096, 1), (8, 32768, 6144, 8), (1, 6144, 768, 1), (1, 768, 6144, 1)
    ):  # fmt: skip
        _, weight = product_shapes(1, groups, inputs, outputs, scale_groups)
        launches = [
            gpu.plan_product(jax.ShapeDtypeStruct((rows, inputs), jnp.bfloat16), weight)
            for rows in (1, 2, 16, 32, 500, 2048, 16384)
        ]
        assert len({(launch.piece, launch.pieces) for launch in launches}) == 1


def test_single_row_occupies_all_processors():
    for shapes in ((8, 6144, 4096), (8, 4096, 6144), (1, 6144, 768), (1, 768, 6144)):
        visits, columns, pieces = gpu.plan_product(*product_shapes(1, *shapes)).grid
        assert visits == 1 and columns * pieces >= gpu.PROCESSORS


def test_product_shapes_that_do_not_fit_are_rejected():
    x, weight, starts = Product((2, 1)).arrays(jnp.bfloat16)
    for match, wrong in (
        ("x must be", (x[:, :8], weight, starts)),
        ("x must be", (x[:0], weight, starts)),
        ("x must be bfloat16", (x.astype(np.float16), weight, starts)),
        ("starts must be", (x, weight, starts[:-1])),
        ("scales of shape", (x, QuantizedWeight8bit(weight.weight, weight.scales[:1]), starts)),
    ):
        with pytest.raises(ValueError, match=match):
            multiply(*wrong, 0)
    x, weight = product_shapes(1, 8, 32768, 6144, 8, layers=2)  # 3.2e9 elements of one byte
    with pytest.raises(ValueError, match="between"):
        jax.eval_shape(gpu.grouped_product, x, weight, *indices(8))


# ------------------------------------------------------------------------------------ attention


@dataclasses.dataclass(frozen=True)
class Attention:
    """The shapes of an attention; heads have 16 columns for keys and 24 for values."""

    filled: tuple[int, ...]
    queries: int = 1
    group: int = 3
    positions: int = 150
    sequence: tuple[int, ...] | None = None
    mask: str = "random"

    def arrays(self, dtype):
        """Return query, keys, values, mask, layer, filled and sequence; NaN where not filled."""
        rng = np.random.default_rng(2)
        batch, kv_heads = len(self.filled), 2
        stored = batch if self.sequence is None else max(self.sequence) + 2
        query = rng.standard_normal((batch, self.queries, kv_heads, self.group, 16))
        keys, values = (
            rng.standard_normal((3, stored, self.positions, kv_heads, width)) for width in (16, 24)
        )
        own = range(batch) if self.sequence is None else self.sequence
        unused = np.ones(keys.shape[:3], bool)
        for s, filled in zip(own, self.filled, strict=True):
            unused[2, s, :filled] = False
        keys[unused] = values[unused] = np.nan
        shape = (batch, self.queries, self.positions)
        position = np.arange(self.positions)
        ago = np.arange(self.queries)[::-1, None] + 1
        last = np.array(self.filled)[:, None, None] - ago  # the position of each query
        mask = {
            "random": rng.uniform(size=shape) < 0.6,
            "causal": position <= last,
            "one sequence's": rng.uniform(size=(1, *shape[1:])) < 0.6,
            "one query's": rng.uniform(size=(batch, 1, self.positions)) < 0.6,
            "none": np.ones((batch, 1, 1), bool),
            "nothing visible": position[None, None] >= np.array([[[self.positions]]] * batch),
        }[self.mask]
        sequence = None if self.sequence is None else np.array(self.sequence, np.int32)
        floats = (array.astype(dtype) for array in (query, keys, values))
        return *floats, mask, np.int32(2), np.array(self.filled, np.int32), sequence


ATTENTIONS = {
    "one query and a mask with holes": Attention((150, 70, 0)),
    "blocks that are filled in part": Attention((1, 63, 64, 65, 129), mask="none"),
    "nothing visible": Attention((90,), mask="nothing visible"),
    "several queries of selected sequences": Attention((20, 140), queries=5, sequence=(2, 0)),
    "more blocks than parts": Attention((1300,), positions=1400),
    "several tiles of queries": Attention((150, 60, 0), queries=30, mask="causal"),
    "one mask for all sequences": Attention((150, 60), queries=3, mask="one sequence's"),
    "one mask for all queries": Attention((150, 60), queries=3, mask="one query's"),
}
MULTIPLIER = 0.9  # scores of several, which the soft cap changes


def interpreted_attention():
    """Return the interpreted kernel, traced anew."""

    @jax.jit
    def call(query, keys, values, mask, *where):
        return gpu.attend_cached(query, keys, values, mask, MULTIPLIER, *where, interpret=True)

    return lambda *arrays: np.asarray(call(*arrays))


def attend(*arrays):
    """Return attention by the interpreted kernel."""
    return interpreted_attention()(*arrays)


def exact(query, keys, values, mask, layer, filled, sequence=None):
    """Return attention in float64; what is not filled may be NaN."""
    own = np.arange(len(query)) if sequence is None else sequence
    keys, values = (np.nan_to_num(c[layer, own].astype(np.float64)) for c in (keys, values))
    there = np.arange(keys.shape[1]) < filled[:, None, None]
    return exact_attention(query, keys, values, mask & there, MULTIPLIER)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, jnp.bfloat16) for case in ATTENTIONS.values()),
        pytest.param(Attention((150, 0), queries=3), jnp.float32, marks=pytest.mark.exhaustive),
    ],
    ids=[*ATTENTIONS, "float32"],
)
def test_attention_equals_the_plain_form(case, dtype):
    arrays = case.arrays(dtype)
    out, expected = attend(*arrays), exact(*arrays)
    # The plain form multiplies what is not filled by zero, which would keep NaN.
    plain = [jnp.nan_to_num(a) if a is not None and a.dtype == dtype else a for a in arrays]
    plain = cache.attend_cached(*plain[:4], MULTIPLIER, *plain[4:])
    assert out.dtype == np.float32 and out.shape == plain.shape
    assert np.all(out[np.all(expected == 0, axis=-1)] == 0)
    scale = np.linalg.norm(expected)
    assert np.linalg.norm(out - plain) <= (1e-6 if dtype == jnp.float32 else 1e-3) * scale
    error, plain_error = (np.linalg.norm(y - expected) for y in (out, plain))
    assert error <= 2 * plain_error


def test_nan_key_gives_nan():
    query, keys, values, mask, layer, filled, _ = Attention((20, 20)).arrays(jnp.float32)
    seen = int(np.argmax(mask[0, 0]))
    keys = jnp.asarray(keys).at[layer, 0, seen].set(jnp.nan)
    found = attend(query, keys, values, mask, layer, filled)
    assert np.all(np.isnan(found[0])) and np.all(np.isfinite(found[1]))


def test_sequence_alone_equals_sequence_in_a_batch():
    query, keys, values, mask, layer, filled, _ = Attention((150, 3, 77)).arrays(jnp.bfloat16)
    attend = interpreted_attention()
    together = attend(query, keys, values, mask, layer, filled)
    for b in range(3):
        own = slice(b, b + 1)
        alone = attend(query[own], keys[:, own], values[:, own], mask[own], layer, filled[own])
        assert np.array_equal(alone, together[own])


def test_attention_shapes_that_do_not_fit_are_rejected():
    query, keys, values, mask, *where = Attention((50,)).arrays(jnp.bfloat16)
    for match, wrong in (
        ("do not fit", (query[..., :8], keys, values, mask)),
        ("do not fit", (query, keys[:, :, :, :1], values, mask)),
        ("do not fit", (query, keys, values[:, :, :9], mask)),
        ("all bfloat16 or all float32", (query, keys.view(np.uint16), values, mask)),
    ):
        with pytest.raises(ValueError, match=match):
            attend(*wrong, *where)


# ----------------------------------------------------------------------------- memory traffic


@pytest.fixture
def moved(monkeypatch):
    """Bytes that interpreted programs move: (load or store, shape of an array) -> sum."""
    counter = collections.Counter()

    def counted(way, function, ref, *args, mask=None, **options):
        array = getattr(ref, "ref", ref)  # `ref` may be a part of it
        number = np.int32(np.prod(ref.shape, dtype=int)) if mask is None else jnp.sum(mask)

        def note(number, key=(way, array.shape), size=array.dtype.itemsize):
            counter[key] += int(number) * size

        jax.debug.callback(note, number)
        return function(ref, *args, mask=mask, **options)

    for way in ("load", "store"):
        function = functools.partial(counted, way, getattr(gpu.plgpu, way))
        monkeypatch.setattr(gpu.plgpu, way, function)
    return counter


@pytest.mark.parametrize(
    ("case", "split"),
    [
        (PRODUCTS["scale groups in pieces"], True),
        (PRODUCTS["empty groups"], False),
        (Product((65, 0, 130), inputs=400, outputs=300, scale_groups=2), False),
    ],
    ids=["split", "empty groups", "many rows"],
)
def test_product_moves_the_bytes_of_its_launch(case, split, moved, monkeypatch):
    monkeypatch.setattr(gpu, "PROCESSORS", 132 if split else 2)
    x, weight, starts = case.arrays(jnp.bfloat16)
    launch = gpu.plan_product(x, weight)
    jax.block_until_ready(multiply(x, weight, starts, 1))
    jax.effects_barrier()
    said = launch.bytes_moved(case.counts)
    assert moved["load", weight.weight.shape] == said["weight"]
    assert moved["load", weight.scales.shape] == said["scales"]
    assert moved["load", x.shape] == said["x"]
    assert moved["load", ()] + moved["load", starts.shape] == said["index"]
    assert moved["store", (launch.partials, launch.rows, launch.outputs)] == said["written"]
    assert len(moved) == 6
    assert launch.split == split == (said["added"] > 0)


@pytest.mark.parametrize(
    "name",
    ["one query and a mask with holes", "several tiles of queries", "one mask for all queries"],
)
def test_attention_moves_the_bytes_of_its_launch(name, moved):
    arrays = query, keys, values, mask, _, filled, _ = ATTENTIONS[name].arrays(jnp.bfloat16)
    mask = np.broadcast_to(mask, (*mask.shape[:-1], keys.shape[2]))
    launch = gpu.plan_attention(query, keys, values, mask)
    reach = np.asarray(gpu._visible_lengths(launch, jnp.asarray(mask), jnp.asarray(filled)))
    jax.block_until_ready(attend(*arrays))
    jax.effects_barrier()
    said = launch.bytes_moved(reach.tolist())
    heads = (launch.batch, launch.kv_heads)
    sums = (launch.parts, *heads, launch.rows)
    assert moved.pop(("load", (*heads, launch.rows, launch.width))) == said["query"]
    assert moved.pop(("load", keys.shape)) == said["keys"]
    assert moved.pop(("load", values.shape)) == said["values"]
    assert moved.pop(("load", mask.shape), 0) == said["mask"]
    stored = [moved.pop(("store", shape)) for shape in ((*sums, launch.value_width), sums)]
    assert sum(stored) == said["written"]
    assert sum(moved.values()) == said["index"]


def test_tile_reads_up_to_its_last_visible_position():
    query, keys, values, mask, *_ = Attention((150, 60), queries=30, mask="causal").arrays(
        jnp.bfloat16
    )
    launch = gpu.plan_attention(query, keys, values, mask)
    reach = gpu._visible_lengths(launch, jnp.asarray(mask), jnp.array([150, 60]))
    # 90 rows, three a query, in tiles of 64: queries 0 to 21, and 21 to 29.
    assert reach.tolist() == [[142, 150], [52, 60]]


def test_decode_step_moves_little_more_than_weights():
    """For one device of eight, batch 1 and 1,024 filled positions."""
    layers, width, hidden, filled, table = 64, 6144, 4096, 1024, 16384 * 6144 * 2
    moved = needed = 0
    for groups, inputs, outputs, times in (
        (8, width, hidden, 2), (8, hidden, width, 1),
        (1, width, 768, 1), (1, width, 128, 2), (1, 768, width, 1),
    ):  # fmt: skip
        chosen = min(groups, 2)  # the experts of one token, or the one matrix of all
        launch = gpu.plan_product(*product_shapes(chosen, groups, inputs, outputs))
        counts = [1] * chosen + [0] * (groups - chosen)
        moved += times * sum(launch.bytes_moved(counts).values())
        needed += times * chosen * (inputs * outputs + outputs * 2)
    launch = gpu.plan_attention(*attention_shapes(1, 1))
    moved += sum(launch.bytes_moved([[filled]]).values())
    needed += filled * 2 * 128 * 2
    ratio = (layers * moved + table) / (layers * needed + table)
    assert 1 < ratio <= 1.15


# -------------------------------------------------------------------------------- lowering


def product_shapes(rows, groups, inputs, outputs, scale_groups=1, dtype=jnp.bfloat16, layers=64):
    """Return x and a weight as shapes."""
    shape = jax.ShapeDtypeStruct
    weight = QuantizedWeight8bit(
        shape((layers, groups, inputs, outputs), jnp.int8),
        shape((layers, groups, scale_groups, outputs), jnp.bfloat16),
    )
    return shape((rows, inputs), dtype), weight


def attention_shapes(batch, queries, kv_heads=1, dtype=jnp.bfloat16, stored=None):
    """Return query, keys, values and mask as shapes, over 8,192 positions."""
    shape = jax.ShapeDtypeStruct
    cache = shape((64, stored or batch, 8192, kv_heads, 128), dtype)
    query = shape((batch, queries, kv_heads, 6, 128), dtype)
    return query, cache, cache, shape((batch, queries, 8192), jnp.bool_)


def indices(groups):
    """Return starts and layer as shapes."""
    return jax.ShapeDtypeStruct((groups + 1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)


def lower(function, *shapes):
    """Return the text that jax passes to the compiler of an H100."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("model",), abstract_device=device)):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "shapes",
    [
        (2, 8, 6144, 4096), (2048, 8, 6144, 4096), (2, 8, 32768, 6144, 8), (16, 1, 6144, 128),
        (3, 5, 77, 67, 7), (2, 8, 6144, 4096, 1, jnp.float32),
    ],
    ids=str,
)  # fmt: skip
def test_products_of_the_full_model_lower_for_cuda(shapes):
    text = lower(gpu.grouped_product, *product_shapes(*shapes), *indices(shapes[1]))
    assert text.count("xla.gpu.triton") == 1


@pytest.mark.parametrize(
    "shapes",
    [(1, 1), (1, 8192), (4, 256, 8), (2, 16, 1, jnp.bfloat16, 16), (1, 64, 1, jnp.float32)],
    ids=str,
)
def test_attention_of_the_full_model_lowers_for_cuda(shapes):
    def call(query, keys, values, mask, *where):
        return gpu.attend_cached(query, keys, values, mask, 128**-0.5, *where)

    numbers = jax.ShapeDtypeStruct((shapes[0],), jnp.int32)
    where = (indices(1)[1], numbers, numbers)
    text = lower(call, *attention_shapes(*shapes), *where)
    assert text.count("xla.gpu.triton") == 1


def test_scan_over_layers_passes_the_whole_stack():
    """Slicing a layer out first would copy eight experts, of which two are read."""
    x, weight = product_shapes(2, 8, 6144, 6144)

    def step(x, weight, starts):
        def body(x, layer):
            return gpu.grouped_product(x, weight, starts, layer).astype(x.dtype), None

        return lax.scan(body, x, jnp.arange(64))[0]

    text = lower(step, x, weight, indices(8)[0])
    made = [line for line in text.splitlines() if "=" in line and "xi8>" in line.split("->")[-1]]
    copies = [line for line in made if "slice" in line or "gather" in line]
    assert "xla.gpu.triton" in text and not copies


def test_prefill_makes_no_queries_by_positions_array():
    query, keys, values, mask = attention_shapes(1, 8192)
    launch = gpu.plan_attention(query, keys, values, mask)
    assert launch.parts == 1
    shapes = (query, keys, values, mask, *indices(1)[1:], jax.ShapeDtypeStruct((1,), jnp.int32))

    def call(query, keys, values, mask, *where):
        return gpu.attend_cached(query, keys, values, mask, 1.0, *where)

    made = [v.aval for e in jax.make_jaxpr(call)(*shapes).jaxpr.eqns for v in e.outvars]
    floats = [aval.size for aval in made if aval.dtype in (jnp.float32, jnp.bfloat16)]
    assert max(floats) == 8192 * 6 * 128


# --------------------------------------------------------------------------------- in a model


def interpret(monkeypatch):
    """Use the GPU kernels on this platform, interpreted."""
    for name in ("grouped_product", "attend_cached"):
        kernel = functools.partial(getattr(gpu, name), interpret=True)
        monkeypatch.setattr(gpu, name, kernel)
    operations = gpu.OPERATIONS._replace(attend_cached=gpu.attend_cached)
    monkeypatch.setattr(gpu, "OPERATIONS", operations)
    monkeypatch.setattr(kernels, "fastest", lambda **_: "gpu")
    gpu.load.cache_clear()


def test_model_with_gpu_kernels_equals_the_plain_one(monkeypatch):
    model = TransformerConfig(
        emb_size=64, key_size=16, num_q_heads=4, num_kv_heads=2, num_layers=2, num_experts=4,
        num_selected_experts=2,
    )  # fmt: skip
    config = LanguageModelConfig(model, vocab_size=32, sequence_len=16)
    params = config.init_params(0, quantized=True)
    interpret(monkeypatch)
    tokens = np.random.default_rng(0).integers(1, 32, (1, 6)).astype(np.int32)
    outputs = []
    for name in ("gpu", "plain"):
        execution = Execution(kernels=name)
        read = jax.jit(functools.partial(steps.apply_model, config, execution))
        used = str(read.trace(params, tokens[:, :3], None).jaxpr).count("pallas_call")
        assert (used > 0) == (name == "gpu")
        # In two chunks, of which the second attends to the first.
        memory = config.model.init_memory(1, 16, jnp.bfloat16)
        first = read(params, tokens[:, :3], memory)
        second = read(params, tokens[:, 3:], first.model_state)
        outputs.append(np.concatenate([first.logits, second.logits], axis=1))
    error = np.linalg.norm(outputs[0] - outputs[1]) / np.linalg.norm(outputs[1])
    assert error < 0.02


def test_kernels_that_compute_wrongly_are_rejected(monkeypatch):
    interpret(monkeypatch)
    kernels.load()
    gpu.load.cache_clear()
    right = gpu.grouped_product
    monkeypatch.setattr(gpu, "grouped_product", lambda *arrays: 1.1 * right(*arrays))
    with pytest.raises(KernelError, match="wrong by 10%"):
        kernels.load()

    def refuse(*_):
        raise RuntimeError("unknown device\nand more")

    monkeypatch.setattr(gpu, "grouped_product", refuse)
    with pytest.raises(KernelError, match="^unknown device$"):
        kernels.load()
    gpu.load.cache_clear()

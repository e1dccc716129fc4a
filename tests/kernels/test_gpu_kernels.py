"""The GPU kernels, interpreted on a CPU: results, memory traffic and lowering to Triton.

Dimension letters as in `grok1/kernels/gpu`. No GPU is needed.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jax.sharding import AbstractDevice, AbstractMesh
from test_cpu_kernels import exact_product, plain_product, random_rows, random_weight

from grok1.execution import Execution
from grok1.kernels import dispatch as kernels
from grok1.kernels.error import KernelError
from grok1.kernels.gpu import attention, product
from grok1.kernels.gpu import operations as gpu
from grok1.kernels.gpu.product import (
    FEW_ROWS,
    Groups,
    added,
    grouped_product,
    groups_of,
    plan_product,
)
from grok1.ops import cache
from grok1.ops.mixture import chosen_experts
from grok1.ops.quantization import QuantizedWeight8bit, dequantize
from grok1.serving import steps
from model import LanguageModelConfig, TransformerConfig
from small import exact_attention

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)


def interpreted_product():
    """Return the interpreted kernel, traced anew."""

    @functools.partial(jax.jit, static_argnums=3)
    def call(x, weight, group, count):
        groups = groups_of(group, count)
        return added(grouped_product(x, [weight], jnp.int32(1), groups, interpret=True))

    return lambda x, weight, group: np.asarray(call(x, weight, group, weight.shape[1]))


@dataclasses.dataclass(frozen=True)
class Product:
    """The shapes of a product: how many rows each group has, and how many are in no group."""

    counts: tuple[int, ...]
    inputs: int = 40
    outputs: int = 24
    scale_groups: int = 1
    none: int = 0

    def arrays(self, dtype):
        """Return x, weight, and the group of each row, in random order."""
        groups = len(self.counts)
        weight = random_weight(groups, self.inputs, self.outputs, self.scale_groups)
        x, _ = random_rows(self.counts, self.inputs, spare=self.none)
        group = np.repeat(np.arange(groups + 1), (*self.counts, self.none)).astype(np.int32)
        return x.astype(dtype), weight, np.random.default_rng(3).permutation(group)


PRODUCTS = {
    "one row, a contracted axis in equal pieces": Product((1,), inputs=768, outputs=32),
    "odd shapes": Product((3, 4, 2), inputs=77, outputs=67, scale_groups=7),
    "scale groups in pieces": Product((4,), inputs=2 * 450, outputs=128, scale_groups=2),
    "a few rows, some in no group": Product((0, 3, 0, 2), none=3),
    # Of one shape, so that they are compiled once.
    "empty groups": Product((0, 3, 0, 2), none=65),
    "no row in any group": Product((0, 0, 0, 0), none=70),
    "groups of several tiles": Product((0, 33, 0, 37)),
    "groups that end within a tile": Product((17, 0, 18, 0), none=35),
}


@pytest.fixture(scope="module")
def product_kernel():
    """Return the interpreted kernel, compiled once for each shape."""
    return interpreted_product()


def assert_exact(y, x, weight, group):
    """The rows of all groups are those in float64, and no less exact than the plain form's."""
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(weight.shape[1] + 1)).astype(np.int32)
    exact, plain = (f(x[order], weight, starts, 1) for f in (exact_product, plain_product))
    assert y.dtype == np.float32 and y.shape == exact.shape
    error = np.linalg.norm((y[order] - exact)[: starts[-1]])
    assert error <= 1e-6 * np.linalg.norm(exact)
    assert error <= 2 * np.linalg.norm(plain - exact) + 1e-8 * np.linalg.norm(exact)


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
    x, weight, group = case.arrays(dtype)
    y = product_kernel(x, weight, group)
    assert_exact(y, x, weight, group)
    if len(case.counts) == 1:  # which is the same without groups
        one = added(grouped_product(x, [weight], jnp.int32(1), interpret=True))
        assert np.array_equal(one, y)


def test_one_group_may_have_several_tiles():
    x, weight, group = Product((150,)).arrays(jnp.bfloat16)
    y = added(grouped_product(x, [weight], jnp.int32(1), interpret=True))
    assert_exact(np.asarray(y), x, weight, group)


@pytest.mark.parametrize("counts", [(3, 0, 4), (40, 0, 43)], ids=["few", "sorted"])
def test_gated_products_are_those_of_an_expert(counts):
    """`gelu(x @ gate) * (x @ value)`, two results of each row of x."""
    x, gate, group = Product(counts, 77, 67, scale_groups=7).arrays(jnp.bfloat16)
    value = jax.tree.map(lambda w: w[:, ::-1], gate)
    group = np.stack([group, (group + 1) % 3], axis=1).reshape(-1)
    (y,) = grouped_product(
        x, [gate, value], jnp.int32(1), groups_of(jnp.asarray(group), 3), interpret=True
    )
    assert y.shape == (2 * len(x), 67) and y.dtype == jnp.bfloat16
    matrices = (np.asarray(dequantize(w), np.float64)[1, group] for w in (gate, value))
    a, b = (np.einsum("ri,rio->ro", np.repeat(x, 2, 0).astype(np.float64), w) for w in matrices)
    exact = a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))) / 2 * b
    assert np.linalg.norm(np.asarray(y, np.float64) - exact) <= 2.5e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize("few", [FEW_ROWS, 0])
def test_the_mixture_equals_the_plain_one(few, monkeypatch):
    """With a masked token, whose rows are not written; without and with sorting."""
    rng, widths = np.random.default_rng(4), {"linear": (32, 48), "linear_v": (32, 48)}
    shapes = {**widths, "linear_1": (48, 32)}
    weights = {name: random_weight(4, *shape, 1) for name, shape in shapes.items()}
    params = {name: {"w": jax.tree.map(lambda w: w[1], w)} for name, w in weights.items()}
    x = jnp.asarray(rng.standard_normal((2, 3, 32)), jnp.bfloat16)
    index = np.argsort(rng.uniform(size=(2, 3, 4)))[..., :2].astype(np.int32)
    gates = rng.uniform(size=index.shape).astype(np.float32)
    gates[1, 2], index[1, 2] = 0, 4
    monkeypatch.setattr(gpu, "grouped_product", functools.partial(grouped_product, interpret=True))
    monkeypatch.setattr(product, "FEW_ROWS", few)
    found = gpu.OPERATIONS.mixture(params, x, gates, index)
    plain = chosen_experts(params, x, gates, index)
    assert found.dtype == jnp.float32 and np.all(found[1, 2] == 0) and np.all(plain[0, 0] != 0)
    assert np.linalg.norm(found - plain) <= 2e-3 * np.linalg.norm(plain)


def test_products_of_many_rows_are_not_split(monkeypatch):
    monkeypatch.setattr(product, "PROCESSORS", 2)  # few enough for these shapes to occupy
    for rows, tile in ((100, 64), (150, 128)):
        x, weight, group = Product((rows,), 800, 16, scale_groups=2).arrays(jnp.bfloat16)
        launch = plan_product(x, [weight], rows)
        assert launch.row_tile == tile and launch.pieces == 4 and not launch.split
    assert_exact(interpreted_product()(x, weight, group), x, weight, group)


@pytest.mark.parametrize(
    "case", [Product((6, 13, 11), 400, none=3), Product((25, 13, 20), 400, none=9)], ids=str
)
def test_row_does_not_depend_on_other_rows(case):
    x, weight, group = case.arrays(jnp.bfloat16)
    multiply = interpreted_product()
    y = multiply(x, weight, group)
    for own in (np.argmax(group == g) for g in range(3)):
        others = np.arange(len(x)) != own
        changed = x.copy()
        changed[others] = np.nan
        z = multiply(changed, weight, group)
        assert np.array_equal(z[own], y[own])
        assert np.all(np.isnan(z[others & (group < 3)]))


def test_pieces_of_a_sum_are_independent_of_row_count():
    for groups, inputs, outputs, scale_groups in (
        (8, 6144, 4096, 1), (8, 32768, 6144, 8), (1, 6144, 768, 1), (1, 768, 6144, 1)
    ):  # fmt: skip
        launches = [
            plan_product(
                *product_shapes(rows, groups, inputs, outputs, scale_groups),
                rows,
            )
            for rows in (1, 2, 16, 32, 500, 2048, 16384)
        ]
        assert len({(launch.piece, launch.pieces) for launch in launches}) == 1


def test_single_token_occupies_all_processors():
    for groups, *widths in ((8, 6144, 4096), (8, 4096, 6144), (1, 6144, 768), (1, 768, 6144)):
        for matrices in (1, 2) if groups > 1 else (1,):
            x, [weight] = product_shapes(2, groups, *widths)
            _, columns, pieces = plan_product(x, [weight] * matrices, 2).grid
            # Two experts of eight.
            assert min(groups, 2) * columns * pieces >= 0.95 * product.PROCESSORS


def test_product_shapes_that_do_not_fit_are_rejected():
    x, weight, group = Product((2, 1)).arrays(jnp.bfloat16)
    scales = QuantizedWeight8bit(weight.weight, weight.scales[:1])
    groups = groups_of(group, 2)
    for match, x_given, weight_given, given in (
        ("x must be", x[:, :8], weight, groups),
        ("x must be", x[:0], weight, groups),
        ("x must be bfloat16", x.astype(np.float16), weight, groups),
        ("must be a multiple of 3, got 2", x, weight, Groups(group[:2])),
        ("must be given for 2 matrices", x, weight, None),
        ("scales of shape", x, scales, groups),
    ):
        with pytest.raises(ValueError, match=match):
            grouped_product(x_given, [weight_given], jnp.int32(0), given)
    x, weights = product_shapes(1, 8, 32768, 6144, 8, layers=2)  # 3.2e9 elements of one byte
    layer, group = indices(1)
    with pytest.raises(ValueError, match="between"):
        jax.eval_shape(grouped_product, x, weights, layer, Groups(group))


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
        function = functools.partial(counted, way, getattr(plgpu, way))
        monkeypatch.setattr(plgpu, way, function)
    return counter


@pytest.mark.parametrize("counts", [(0, 3, 0, 2), (65, 0, 130)], ids=["few", "sorted"])
def test_a_product_reads_the_matrices_in_use(counts, moved):
    """Once for each tile of their rows, and no row twice for one tile of columns."""
    x, weight, group = Product(counts, 400, 300, scale_groups=2).arrays(jnp.bfloat16)
    groups = groups_of(jnp.asarray(group), len(counts))
    jax.block_until_ready(grouped_product(x, [weight], jnp.int32(1), groups, interpret=True))
    jax.effects_barrier()
    launch = plan_product(x, [weight], len(x))
    tiles = sum(-(-count // launch.row_tile) for count in counts)
    assert launch.few == (tiles == 2)
    assert moved["load", weight.weight.shape] == tiles * 400 * 300
    assert moved["load", weight.scales.shape] == tiles * launch.pieces * 300 * 2
    assert moved["load", x.shape] == launch.columns * x.nbytes
    assert moved["store", (launch.partials, len(x), 300)] == launch.partials * len(x) * 300 * 4


@pytest.mark.parametrize(
    "name",
    ["one query and a mask with holes", "several tiles of queries", "one mask for all sequences"],
)
def test_attention_reads_the_filled_positions(name, moved):
    arrays = query, keys, values, mask, _, filled, _ = ATTENTIONS[name].arrays(jnp.bfloat16)
    mask = np.broadcast_to(mask, (*mask.shape[:-1], keys.shape[2]))
    launch = attention.plan_attention(query, keys, values, mask)
    reach = attention._visible_lengths(launch, jnp.asarray(mask), jnp.asarray(filled))
    jax.block_until_ready(attend(*arrays))
    jax.effects_barrier()
    rows = launch.batch, launch.kv_heads, launch.rows
    assert moved["load", (*rows, launch.width)] == launch.parts * query.nbytes
    seen = int(np.sum(reach)) * launch.kv_heads * 2
    assert moved["load", keys.shape] == seen * launch.width
    assert moved["load", values.shape] == seen * launch.value_width


def test_tile_reads_up_to_its_last_visible_position():
    query, keys, values, mask, *_ = Attention((150, 60), queries=30, mask="causal").arrays(
        jnp.bfloat16
    )
    launch = attention.plan_attention(query, keys, values, mask)
    reach = attention._visible_lengths(launch, jnp.asarray(mask), jnp.array([150, 60]))
    # 90 rows, three a query, in tiles of 64: queries 0 to 21, and 21 to 29.
    assert reach.tolist() == [[142, 150], [52, 60]]


# -------------------------------------------------------------------------------- lowering


def product_shapes(rows, groups, inputs, outputs, scale_groups=1, dtype=jnp.bfloat16, layers=64):
    """Return x and a list of one weight as shapes."""
    shape = jax.ShapeDtypeStruct
    weight = QuantizedWeight8bit(
        shape((layers, groups, inputs, outputs), jnp.int8),
        shape((layers, groups, scale_groups, outputs), jnp.bfloat16),
    )
    return shape((rows, inputs), dtype), [weight]


def attention_shapes(batch, queries, kv_heads=1, dtype=jnp.bfloat16, stored=None):
    """Return query, keys, values and mask as shapes, over 8,192 positions."""
    shape = jax.ShapeDtypeStruct
    cache = shape((64, stored or batch, 8192, kv_heads, 128), dtype)
    query = shape((batch, queries, kv_heads, 6, 128), dtype)
    return query, cache, cache, shape((batch, queries, 8192), jnp.bool_)


def indices(count):
    """Return a layer and an index of `count` elements as shapes."""
    return jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((count,), jnp.int32)


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
    x, weights = product_shapes(*shapes)
    layer, group = indices(shapes[0])

    def call(x, weights, layer, group):
        return grouped_product(x, weights, layer, groups_of(group, shapes[1]))

    for count in (1, 2):
        assert lower(call, x, weights * count, layer, group).count("xla.gpu.triton") == 1


@pytest.mark.parametrize(
    "shapes",
    [(1, 1), (1, 8192), (4, 256, 8), (2, 16, 1, jnp.bfloat16, 16), (1, 64, 1, jnp.float32)],
    ids=str,
)
def test_attention_of_the_full_model_lowers_for_cuda(shapes):
    def call(query, keys, values, mask, *where):
        return gpu.attend_cached(query, keys, values, mask, 128**-0.5, *where)

    numbers = jax.ShapeDtypeStruct((shapes[0],), jnp.int32)
    where = (indices(1)[0], numbers, numbers)
    text = lower(call, *attention_shapes(*shapes), *where)
    assert text.count("xla.gpu.triton") == 1


def test_scan_over_layers_passes_the_whole_stack():
    """Slicing a layer out first would copy eight experts, of which two are read."""
    x, weights = product_shapes(2, 8, 6144, 6144)

    def step(x, weights, group):
        def body(x, layer):
            y = added(grouped_product(x, weights, layer, Groups(group)))
            return y.astype(x.dtype), None

        return lax.scan(body, x, jnp.arange(64))[0]

    text = lower(step, x, weights, indices(2)[1])
    made = [line for line in text.splitlines() if "=" in line and "xi8>" in line.split("->")[-1]]
    copies = [line for line in made if "slice" in line or "gather" in line]
    assert "xla.gpu.triton" in text and not copies


def test_prefill_makes_no_queries_by_positions_array():
    query, keys, values, mask = attention_shapes(1, 8192)
    launch = attention.plan_attention(query, keys, values, mask)
    assert launch.parts == 1
    shapes = (query, keys, values, mask, *indices(1))

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
    right = gpu.multiply
    monkeypatch.setattr(gpu, "multiply", lambda *arrays: 1.1 * right(*arrays))
    with pytest.raises(KernelError, match="wrong by 10%"):
        kernels.load()

    def refuse(*_):
        raise RuntimeError("unknown device\nand more")

    monkeypatch.setattr(gpu, "multiply", refuse)
    with pytest.raises(KernelError, match="^unknown device$"):
        kernels.load()
    gpu.load.cache_clear()

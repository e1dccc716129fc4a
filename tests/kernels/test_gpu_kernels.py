"""The GPU kernels, interpreted on a CPU: results, memory traffic and lowering to Triton.

Dimension letters as in `grok1/kernels/gpu`. No GPU is needed.
"""

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

import four_bits
import golden
from grok1.execution import Execution
from grok1.kernels import dispatch as kernels
from grok1.kernels.error import KernelError
from grok1.kernels.gpu import operations as gpu
from grok1.kernels.gpu.products import mix, side_by_side
from grok1.kernels.gpu.tiles import PROCESSORS, interpreted_kernels
from grok1.ops import cache
from grok1.ops.quantization import QuantizedWeight8bit
from grok1.ops.quantize_4bit import quantize_4bit, shape_in_4_bits
from grok1.parallel.sharding import auto
from grok1.serving import steps
from model import LanguageModelConfig, TransformerConfig
from small import choices, dense_gates, exact_attention, exact_weight, normal, random_weight

LAYER = jnp.int32(1)

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)


def interpreted(kernel, *static):
    """Return a kernel, interpreted and compiled; `static`: the positions of what is no array."""
    return jax.jit(interpreted_kernels()(kernel), static_argnums=static)


def exact_mix(x, weights, gates, index):
    """Return the sum of the experts' outputs in float64, of layer 1."""
    gates = dense_gates(gates, index, weights[0].shape[1])
    gate, value, out = (exact_weight(w)[1] for w in weights)
    a, b = (np.einsum("mi,eio->emo", x.astype(np.float64), w) for w in (gate, value))
    hidden = a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))) / 2 * b
    return np.einsum("me,emi,eio->mo", gates, hidden, out)


def relative_error(found, exact):
    """The norm of the difference over the norm of the exact values."""
    return np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "groups"),
    [(1, 768, 32, 1), (3, 77, 67, 7), (70, 154, 67, 7), (150, 600, 40, 2)],
    ids=str,
)
def test_products_of_few_and_many_rows_are_exact(rows, inputs, outputs, groups, dtype):
    weight = random_weight((2,), inputs, outputs, groups)
    x = normal(rows, inputs).astype(dtype)
    y = interpreted(side_by_side)(x, [weight], LAYER)
    assert y.shape == (rows, outputs) and y.dtype == jnp.float32
    assert relative_error(y, x.astype(np.float64) @ exact_weight(weight)[1]) < 1e-6


def assert_mixture_is_exact(weights, x):
    """In float32 and bfloat16; the last two tokens have chosen no expert."""
    chosen = choices(len(x), 4, masked=2)
    y = interpreted(mix)(x, weights, LAYER, *chosen)
    assert y.shape == x.shape and y.dtype == jnp.float32 and np.all(y[-2:] == 0)
    assert relative_error(y, exact_mix(x, weights, *chosen)) < 1e-6
    y = interpreted(mix)(x.astype(jnp.bfloat16), weights, LAYER, *chosen)
    assert relative_error(y, exact_mix(x.astype(jnp.bfloat16), weights, *chosen)) < 5e-3


@pytest.mark.parametrize("tokens", [7, 70])
@pytest.mark.parametrize("groups", [1, 7])
def test_mixture_of_few_and_many_tokens_is_exact(tokens, groups):
    """With an expert that nobody has chosen, and tokens that have chosen none."""
    weights = [random_weight((2, 4), 77, 70, 7, seed=n) for n in range(2)]
    weights.append(random_weight((2, 4), 70, 77, groups, seed=2))
    assert_mixture_is_exact(weights, normal(tokens, 77))


@pytest.mark.parametrize("tokens", [7, 70])
@pytest.mark.parametrize("group", [16, 64])
def test_mixture_of_4_bits_is_exact(tokens, group):
    """In groups of fewer rows than are multiplied at a time, and of as many."""
    weights = [quantize_4bit(normal(2, 4, 192, 64, seed=n), group) for n in range(2)]
    weights.append(quantize_4bit(normal(2, 4, 64, 192, seed=2), group))
    assert_mixture_is_exact(weights, normal(tokens, 192))


def test_all_tokens_may_choose_the_same_expert():
    weights = [random_weight((2, 4), 80, 80, 1, seed=n) for n in range(3)]
    x, index = normal(140, 80), np.full((140, 1), 2, np.int32)
    gates = np.linspace(0.1, 1, 140, dtype=np.float32)[:, None]
    y = interpreted(mix)(x, weights, LAYER, gates, index)
    assert relative_error(y, exact_mix(x, weights, gates, index)) < 1e-6


@pytest.mark.parametrize("tokens", [6, 80])
def test_token_does_not_depend_on_other_tokens(tokens):
    weights = [random_weight((2, 3), 80, 80, 1, seed=n) for n in range(3)]
    x, chosen = normal(tokens, 80).astype(jnp.bfloat16), choices(tokens, 3)
    run = interpreted(mix)
    y = run(x, weights, LAYER, *chosen)
    for own in (0, tokens - 1):
        changed = np.where(np.arange(tokens)[:, None] == own, x, np.nan).astype(x.dtype)
        z = run(changed, weights, LAYER, *chosen)
        assert np.array_equal(z[own], y[own])
        assert np.all(np.isnan(np.delete(z, own, axis=0)))


def test_product_shapes_that_do_not_fit_are_rejected():
    weight = random_weight((2,), 80, 72, 1)
    for shape in ((0, 80), (3, 81)):
        with pytest.raises(ValueError, match=r"x must be \[\.\.\., M, 80\] with M > 0, got"):
            side_by_side(np.zeros(shape, np.float32), [weight], LAYER)
    with pytest.raises(ValueError, match="x must be bfloat16 or float32, got float16"):
        side_by_side(np.zeros((3, 80), np.float16), [weight], LAYER)
    with pytest.raises(ValueError, match="3 scale groups must be of whole bytes of 80 inputs"):
        side_by_side(np.zeros((3, 80), np.float32), [random_weight((2,), 80, 72, 3)], LAYER)
    x, weights, *chosen = mixture_shapes(1, layers=2, devices=1)  # 3.2e9 elements of one byte
    with pytest.raises(ValueError, match="between"):
        jax.eval_shape(mix, x, weights, LAYER, *chosen)


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
    "many blocks": Attention((1300,), positions=1400),
    "several tiles of queries": Attention((150, 60, 0), queries=30, mask="causal"),
    "one mask for all sequences": Attention((150, 60), queries=3, mask="one sequence's"),
    "one mask for all queries": Attention((150, 60), queries=3, mask="one query's"),
}
MULTIPLIER = 0.9  # scores of several, which the soft cap changes


def interpreted_attention():
    """Return the interpreted kernel, traced anew."""

    @jax.jit
    def call(query, keys, values, mask, *where):
        with interpreted_kernels():
            return gpu.attend_cached(query, keys, values, mask, MULTIPLIER, *where)

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
        ("mask must be", (query, keys, values, mask[0])),
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


@pytest.mark.parametrize("tokens", [5, 80])
def test_a_mixture_reads_the_matrices_in_use(tokens, moved):
    """Once for each tile of their tokens; those of the second expert not at all."""
    weights = [
        random_weight((2, 4), 48 + 16 * (n > 1), 64 - 16 * (n > 1), 1, seed=n) for n in range(3)
    ]
    gates, index = choices(tokens, 4)
    x = normal(tokens, 48).astype(jnp.bfloat16)
    with interpreted_kernels():
        jax.block_until_ready(mix(x, weights, LAYER, gates, index))
    jax.effects_barrier()
    counts = np.sum(dense_gates(gates, index, 4) > 0, axis=0)
    tiles = 3 if tokens <= 64 else sum(-(-int(count) // 64) for count in counts)
    assert counts.min() == 0 < tiles
    assert moved["load", weights[0].weight.shape] == 2 * tiles * 48 * 64
    assert moved["load", weights[2].weight.shape] == tiles * 64 * 48


@pytest.mark.parametrize(
    "name",
    ["one query and a mask with holes", "several tiles of queries", "one mask for all sequences"],
)
def test_attention_reads_the_visible_positions(name, moved):
    """Of each tile of 64 queries, up to the last that one of them sees."""
    case = ATTENTIONS[name]
    arrays = query, keys, values, mask, _, filled, _ = case.arrays(jnp.bfloat16)
    jax.block_until_ready(attend(*arrays))
    jax.effects_barrier()
    batch, queries, kv_heads, group, width = query.shape
    mask = np.broadcast_to(mask, (batch, queries, keys.shape[2]))
    last = np.max(np.where(mask, np.arange(1, keys.shape[2] + 1), 0), axis=2)
    last = np.repeat(last, group, axis=1)  # [B, T * G]
    tiles = [np.max(last[:, i : i + 64], axis=1) for i in range(0, last.shape[1], 64)]
    seen = int(sum(np.minimum(tile, filled).sum() for tile in tiles)) * kv_heads * 2
    assert moved["load", (batch, queries * kv_heads * group, width)] == query.nbytes
    assert moved["load", keys.shape] == seen * width
    assert moved["load", values.shape] == seen * values.shape[-1]


# -------------------------------------------------------------------------------- lowering


def weight_shapes(*shape, scale_groups=1):
    """Return an int8 weight [..., I, O] as shapes."""
    scales = (*shape[:-2], scale_groups, shape[-1])
    return QuantizedWeight8bit(
        jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct(scales, jnp.bfloat16)
    )


def mixture_shapes(tokens, dtype=jnp.bfloat16, layers=64, devices=8, bits=8):
    """Return x, the weights of experts, gates and index of the full model, on one of `devices`."""
    hidden = 32768 // devices
    gate = weight_shapes(layers, 8, 6144, hidden)
    out = weight_shapes(layers, 8, hidden, 6144, scale_groups=8 // devices)
    if bits == 4:
        gate, out = (shape_in_4_bits(w.shape, w.shape[-2] // 64) for w in (gate, out))
    gates, index = (jax.ShapeDtypeStruct((tokens, 2), each) for each in (jnp.float32, jnp.int32))
    return jax.ShapeDtypeStruct((tokens, 6144), dtype), (gate, gate, out), gates, index


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
    axes = ["model"]
    mesh = AbstractMesh((1,), tuple(axes), axis_types=auto(axes), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("tokens", [1, 33, 1024])
@pytest.mark.parametrize(
    ("dtype", "bits"), [(jnp.bfloat16, 8), (jnp.float32, 8), (jnp.bfloat16, 4)], ids=str
)
def test_mixtures_of_the_full_model_lower_for_cuda(tokens, dtype, bits):
    def call(x, weights, gates, index):
        return mix(x, weights, LAYER, gates, index)

    shapes = mixture_shapes(tokens, dtype, bits=bits)
    assert lower(call, *shapes).count("xla.gpu.triton") == 2


def test_single_token_occupies_all_processors(monkeypatch):
    """Of the programs of a gated product, two experts of eight have work."""
    grids = {}
    original = pl.pallas_call

    def note(*arguments, grid, name, **options):
        grids[name] = grid
        return original(*arguments, grid=grid, name=name, **options)

    monkeypatch.setattr(pl, "pallas_call", note)
    x, weights, *chosen = mixture_shapes(1)
    jax.eval_shape(mix, x, weights, LAYER, *chosen)
    attention = [weight_shapes(64, 6144, width) for width in (768, 128, 128)]
    jax.eval_shape(lambda *arrays: side_by_side(*arrays, LAYER), x, attention)
    columns, experts = grids["gated"]
    least = 0.95 * PROCESSORS
    assert experts == 8 and 2 * columns >= least
    assert math.prod(grids["expert_sum"]) >= least and math.prod(grids["side_by_side"]) >= least


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

    def step(x, weights, gates, index):
        def body(x, layer):
            return mix(x, weights, layer, gates, index).astype(x.dtype), None

        return lax.scan(body, x, jnp.arange(64))[0]

    text = lower(step, *mixture_shapes(1))
    made = [line for line in text.splitlines() if "=" in line and "xi8>" in line.split("->")[-1]]
    copies = [line for line in made if "slice" in line or "gather" in line]
    assert "xla.gpu.triton" in text and not copies


def test_prefill_makes_no_queries_by_positions_array():
    query, keys, values, mask = attention_shapes(1, 8192)
    shapes = (query, keys, values, mask, *indices(1))

    def call(query, keys, values, mask, *where):
        return gpu.attend_cached(query, keys, values, mask, 1.0, *where)

    made = [v.aval for e in jax.make_jaxpr(call)(*shapes).jaxpr.eqns for v in e.outvars]
    floats = [aval.size for aval in made if aval.dtype in (jnp.float32, jnp.bfloat16)]
    assert max(floats) == 8192 * 6 * 128


# --------------------------------------------------------------------------------- in a model


def interpret(monkeypatch):
    """Use the GPU kernels on this platform, interpreted."""
    for name in ("side_by_side", "mix", "attend_cached", "write_and_attend", "fused_layer"):
        monkeypatch.setattr(gpu, name, interpreted_kernels()(getattr(gpu, name)))
    operations = gpu.OPERATIONS._replace(
        attend_cached=gpu.attend_cached, fused_layer=gpu.fused_layer
    )
    monkeypatch.setattr(gpu, "OPERATIONS", operations)
    monkeypatch.setattr(kernels, "fastest", lambda **_: "gpu")
    gpu.load.cache_clear()


@pytest.mark.parametrize(
    "capture",
    [pytest.param((), marks=pytest.mark.exhaustive), ("hidden_states",)],
    ids=["fused layer", "modules"],
)
def test_model_with_gpu_kernels_equals_the_plain_one(capture, monkeypatch):
    """In chunks of many tokens and of few, which attend to the first, and a token."""
    model = TransformerConfig(
        emb_size=64, key_size=16, num_q_heads=4, num_kv_heads=2, num_layers=2, num_experts=4,
        num_selected_experts=2,
    )  # fmt: skip
    config = LanguageModelConfig(model, vocab_size=32, sequence_len=96)
    params = config.init_params(0, quantized=True)
    interpret(monkeypatch)
    tokens = np.random.default_rng(0).integers(1, 32, (2, 45)).astype(np.int32)
    outputs = []
    for name in ("gpu", "plain"):
        execution = Execution(kernels=name)
        read = jax.jit(functools.partial(steps.apply_model, config, execution, capture=capture))
        memory, logits = config.model.init_memory(2, 96, jnp.bfloat16), []
        used = str(read.trace(params, tokens[:, :40], memory).jaxpr)
        assert ("pallas_call" in used) == (name == "gpu")
        assert ("name=grouped_product" in used) == (name == "gpu")
        assert ("name=route" in used) == (name == "gpu" and not capture)
        for chunk in np.split(tokens, [40, 44], axis=1):
            found = read(params, chunk, memory)
            memory = found.model_state
            logits.append(found.logits)
        outputs.append(np.concatenate(logits, axis=1))
    error = np.linalg.norm(outputs[0] - outputs[1]) / np.linalg.norm(outputs[1])
    assert error < 0.02


@pytest.mark.parametrize(
    ("name", "dtype", "allowed"),
    [
        pytest.param("three-layers", "float32", 1e-5, marks=pytest.mark.slow),
        *(
            pytest.param(*row, marks=pytest.mark.exhaustive)
            for row in (
                ("three-layers", "bfloat16", 0.013),
                ("twelve-layers", "float32", 1e-5),
                ("twelve-layers", "bfloat16", 0.03),
            )
        ),
    ],
)
def test_golden_logits_are_exact_with_the_fused_layer(name, dtype, allowed, monkeypatch):
    """In a chunk of many tokens and of few, and a token: the errors that the README states."""
    files, server = golden.recorded(name), golden.runner(name, dtype)
    interpret(monkeypatch)
    config = server.config
    read = jax.jit(functools.partial(steps.apply_model, config, Execution(kernels="gpu")))
    memory, logits = config.model.init_memory(3, 48, config.fprop_dtype), []
    for chunk in np.split(files.tokens, [40, 47], axis=1):
        found = read(server.params, chunk, memory)
        memory = found.model_state
        logits.append(found.logits)
    error = golden.relative_error(np.concatenate(logits, axis=1), files.exact)
    if dtype == "float32":
        assert error[files.real & (files.margin > 1e-4)].max() <= allowed
    else:
        assert 1e-3 < np.median(error[files.real]) <= allowed


@pytest.mark.exhaustive
@pytest.mark.parametrize("sizes", [None, (1, 8), (2, 4)], ids=str)
@pytest.mark.parametrize("name", four_bits.NAMES)
def test_logits_with_4_bits_and_the_fused_layer(name, sizes, monkeypatch):
    """In a chunk of many tokens and of few, and a token."""
    model = four_bits.model(name)  # before the platform seems to be a GPU
    interpret(monkeypatch)
    model.check(sizes, "gpu", cuts=[20, 23])


def test_kernels_that_compute_wrongly_are_rejected(monkeypatch):
    interpret(monkeypatch)
    kernels.load()
    gpu.load.cache_clear()
    product, attention = gpu.side_by_side, gpu.write_and_attend
    monkeypatch.setattr(gpu, "side_by_side", lambda *arrays: 1.1 * product(*arrays))
    with pytest.raises(KernelError, match="^a test product is wrong by 10.0%$"):
        kernels.load()
    monkeypatch.setattr(gpu, "side_by_side", product)
    monkeypatch.setattr(gpu, "write_and_attend", lambda *arrays: (0.8 * attention(*arrays)[0],))
    with pytest.raises(KernelError, match="^test attention is wrong by 20.0%$"):
        kernels.load()

    for error, said in (
        (RuntimeError("unknown device\nand more"), "unknown device"),
        (NotImplementedError(), r"NotImplementedError\(\)"),
    ):

        def refuse(*_, error=error):
            raise error

        monkeypatch.setattr(gpu, "side_by_side", refuse)
        with pytest.raises(KernelError, match=f"^{said}$"):
            kernels.load()
    gpu.load.cache_clear()

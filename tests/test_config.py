"""The configuration: its fields, its checks, and the parameters that it describes."""

import copy
import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from model import LanguageModelConfig, QuantizedWeight8bit, TransformerConfig, ffn_size, grok_1
from paths import DATA

TRANSFORMER = {
    "emb_size": 64, "key_size": 4, "num_q_heads": 16, "num_kv_heads": 8, "num_layers": 2,
    "widening_factor": 3, "num_experts": 4, "num_selected_experts": 2,
}  # fmt: skip
MIXTURE = LanguageModelConfig(
    model=TransformerConfig(**TRANSFORMER), vocab_size=256, embedding_init_scale=0.5
)
DENSE = dataclasses.replace(
    MIXTURE, model=TransformerConfig(**TRANSFORMER | {"num_experts": 1, "num_selected_experts": 1})
)


def changed(**fields):
    """Return MIXTURE with other fields; those of the transformer are found by their name."""
    inner = {name: value for name, value in fields.items() if hasattr(MIXTURE.model, name)}
    outer = {name: value for name, value in fields.items() if name not in inner}
    return LanguageModelConfig(
        **{"model": TransformerConfig(**TRANSFORMER | inner), "vocab_size": 256} | outer
    )


# Fields.


def test_published_call_is_grok_1():
    published = LanguageModelConfig(
        vocab_size=128 * 1024, pad_token=0, eos_token=2, sequence_len=8192,
        embedding_init_scale=1.0, output_multiplier_scale=0.5773502691896257,
        embedding_multiplier_scale=78.38367176906169,
        model=TransformerConfig(
            emb_size=48 * 128, widening_factor=8, key_size=128, num_q_heads=48, num_kv_heads=8,
            num_layers=64, attn_output_multiplier=0.08838834764831845, shard_activations=True,
            num_experts=8, num_selected_experts=2, data_axis="data", model_axis="model",
        ),
    )  # fmt: skip
    assert published == grok_1()
    assert hash(published) == hash(grok_1())  # a static argument of compiled functions
    assert published.model.ffn_size == 32768
    assert published.fprop_dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("emb_size", "widening_factor", "expected"),
    [(6144, 8, 32768), (128, 8, 688), (64, 8, 344), (16, 3, 32), (24, 1, 16), (10, 0.25, 8)],
)
def test_ffn_size_is_two_thirds_rounded_up_to_eights(emb_size, widening_factor, expected):
    assert ffn_size(emb_size, widening_factor) == expected


NOT_A_SIZE = (0, -1, 8.0, True, "8", None)
NOT_A_NUMBER = (0, -1.0, float("nan"), float("inf"), "1", True, None)
SIZES = (
    "emb_size", "key_size", "num_q_heads", "num_kv_heads", "num_layers", "num_selected_experts",
    "vocab_size", "sequence_len",
)  # fmt: skip
NUMBERS = (
    "widening_factor", "attn_output_multiplier", "embedding_init_scale",
    "output_multiplier_scale", "embedding_multiplier_scale",
)  # fmt: skip
COUNTS = ("key_size", "num_q_heads", "num_kv_heads", "num_experts")
WIDTHS = ("emb_size", "vocab_size", "sequence_len")
TOKENS = ("pad_token", "eos_token")
AXIS = "the name of a mesh axis, not 'replica'"
REFUSED = [
    *(("emb_size", value, "an integer >= 1") for value in NOT_A_SIZE),
    *((field, 8.0, "an integer >= 1") for field in SIZES),
    *(("widening_factor", value, "a positive number") for value in NOT_A_NUMBER),
    *((field, 0, "a positive number") for field in NUMBERS),
    *((field, 8.0, "an integer >= 0") for field in ("num_experts", *TOKENS)),
    *((field, -1, "an integer >= 0") for field in ("num_experts", *TOKENS)),
    *((field, 1 << 31, "an integer <= 4096") for field in COUNTS),
    *((field, 1 << 63, "an integer <= 16777216") for field in WIDTHS),
    *((field, value, "a number from 1e-06 to 1e+06") for field in NUMBERS for value in (1e-9, 1e9)),
    ("num_layers", 10**9, "an integer <= 512"),
    ("num_selected_experts", 65, "an integer <= 64"),
    ("widening_factor", 0.01, "one that makes an expert 8 to 16777216 numbers wide"),
    ("widening_factor", 500_000, "one that makes an expert 8 to 16777216 numbers wide"),
    *((field, 256, "a token below vocab_size = 256") for field in TOKENS),
    ("key_size", 5, "an even head width"),
    ("num_q_heads", 12, "a multiple of num_kv_heads = 8"),
    ("num_selected_experts", 5, "at most num_experts = 4"),
    ("shard_activations", 0, "true or false"),
    *((field, value, AXIS) for field in ("data_axis", "model_axis") for value in (5, "")),
    *((field, "a" * 65, "at most 64 letters") for field in ("data_axis", "model_axis")),
    ("data_axis", "replica", AXIS),
    ("model_axis", "data", "a name other than data_axis"),
    *(("fprop_dtype", value, "bfloat16 or float32") for value in (jnp.float16, "nonsense", None)),
    ("model", {"emb_size": 64}, "a TransformerConfig"),
]


@pytest.mark.parametrize(("field", "value", "expected"), REFUSED)
def test_invalid_field_is_named_with_expected_values(field, value, expected):
    with pytest.raises(ValueError) as error:
        changed(**{field: value})
    assert str(error.value) == f"{field}: expected {expected}, got {value!r}"


def test_long_values_and_names_are_cut_in_errors():
    for field in ("emb_size", "widening_factor", "num_experts", "pad_token"):
        for value in (10**400, -(10**400), 10**5000):
            with pytest.raises(ValueError, match=f"^{field}: .* an integer of more than 40 digits"):
                changed(**{field: value})
    for bad in (
        {"vocab_size": "9" * 10**6},
        {"model": ["x"] * 10**6},
        {"x" * 10**6: 1},
        {"two\nlines": 1},
    ):
        with pytest.raises(ValueError) as error:
            LanguageModelConfig.from_dict(MIXTURE.to_dict() | bad)
        assert len(str(error.value)) < 800 and "\n" not in str(error.value)


def test_sizes_that_are_too_large_together_are_refused():
    """Each is allowed alone; XLA ends the process if an array's size overflows 64 bits."""
    large = {"num_layers": 512, "num_experts": 4096, "emb_size": 1 << 18}
    with pytest.raises(ValueError, match="emb_size: expected a model with at most 11258999068426"):
        changed(**large)
    memory = {"num_layers": 512, "key_size": 4096, "sequence_len": 1 << 24}
    with pytest.raises(ValueError, match="sequence_len: expected one that makes at most 109951162"):
        changed(**memory)


def test_scale_groups_must_divide_the_heads():
    """In the attention's output projection, of an int8 model only."""
    narrow = changed(key_size=2, num_q_heads=6, num_kv_heads=2)
    narrow.param_shapes(quantized=False)
    with pytest.raises(ValueError, match="^num_q_heads . key_size: .* multiple of 8, got 12"):
        narrow.param_shapes()


def test_dense_model_has_zero_or_one_expert():
    for experts in (0, 1):
        assert changed(num_experts=experts, num_selected_experts=1).model.num_experts == experts
        with pytest.raises(ValueError, match="num_selected_experts: expected at most .* = 1, got"):
            changed(num_experts=experts, num_selected_experts=2)


def test_activation_dtype_may_be_a_type_or_a_dtype():
    for dtype in (jnp.bfloat16, jnp.float32, np.dtype("float32")):
        assert changed(fprop_dtype=dtype).fprop_dtype == dtype


# Plain fields.


def test_config_json_of_a_checkpoint_is_reproduced():
    fields = json.loads((DATA / "golden" / "three-layers" / "config.json").read_text())
    config = LanguageModelConfig.from_dict(fields)
    assert config.model.emb_size == fields["model"]["emb_size"]
    assert config.to_dict() == fields


def test_plain_fields_omit_the_activation_dtype():
    for config in (grok_1(), MIXTURE, DENSE):
        fields = json.loads(json.dumps(config.to_dict()))
        assert LanguageModelConfig.from_dict(fields) == config
    assert changed(fprop_dtype=jnp.float32).to_dict() == changed().to_dict()


@pytest.mark.parametrize("field", ["expert_dispatch", "scan_unroll", "kernels", "router"])
def test_moved_fields_are_refused_with_their_new_place(field):
    message = rf"^{field}: expected a field of the model, .*grok1.execution.Execution\({field}="
    fields = grok_1().to_dict()
    fields["model"][field] = None
    for make in (
        lambda: TransformerConfig(8, 4, 2, 1, 1, **{field: None}),
        lambda: dataclasses.replace(grok_1().model, **{field: None}),
        lambda: LanguageModelConfig.from_dict(fields),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_configurations_are_copied_and_pickled():
    for config in (grok_1(), grok_1().model):
        assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("emb_sise",), 64, r"emb_sise: expected one of \[.*'vocab_size'\], got 'emb_sise'"),
        (("model", "heads"), 64, r"heads: expected one of \[.*'widening_factor'\], got 'heads'"),
        (("model", "emb_size"), None, "emb_size: expected a value in the configuration, got None"),
        (("model",), None, "model: expected an object of the transformer's fields, got None"),
        (("model",), [], r"model: expected an object of the transformer's fields, got \[\]"),
        (("model", "num_layers"), "2", "num_layers: expected an integer >= 1, got '2'"),
        (("eos_token",), 1.5, "eos_token: expected an integer >= 0, got 1.5"),
    ],
)
def test_from_dict_names_unknown_missing_or_bad_field(path, value, message):
    """None stands for a missing field."""
    fields = MIXTURE.to_dict()
    *outer, last = path
    inner = fields[outer[0]] if outer else fields
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    with pytest.raises(ValueError, match=f"^{message}$"):
        LanguageModelConfig.from_dict(fields)


# Parameters.


def expected_shapes(config):
    """The released names, `decoder_layer` for `decoder_layer_0` ..., with a leading layer axis."""
    model, layers = config.model, config.model.num_layers
    width, hidden, experts = model.emb_size, model.ffn_size, model.num_experts
    queries, keys = (n * model.key_size for n in (model.num_q_heads, model.num_kv_heads))
    one_layer = {
        "multi_head_attention/key/w": (width, keys),
        "multi_head_attention/linear/w": (queries, width),
        "multi_head_attention/query/w": (width, queries),
        "multi_head_attention/value/w": (width, keys),
        **{f"rms_norm{number}/scale": (width,) for number in ("", "_1", "_2", "_3")},
    }
    block = {"linear/w": (width, hidden), "linear_v/w": (width, hidden)}
    block["linear_1/w"] = (hidden, width)
    if experts > 1:
        one_layer |= {f"moe/{name}": (experts, *shape) for name, shape in block.items()}
        one_layer["router/w"] = (width, experts)
    else:
        one_layer |= block
    return {
        "language_model/in_out_embed/embeddings": (config.vocab_size, width),
        "language_model/rms_norm/scale": (width,),
        **{
            f"transformer/decoder_layer/{name}": (layers, *shape)
            for name, shape in one_layer.items()
        },
    }


def flat(params):
    """Return {"module/name": leaf}."""
    return {f"{m}/{name}": leaf for m, leaves in params.items() for name, leaf in leaves.items()}


@pytest.mark.parametrize("config", [grok_1(), MIXTURE, DENSE], ids=["grok-1", "mixture", "dense"])
def test_parameters_have_released_names_and_layer_axis(config):
    """Nothing is computed: all float32 parameters of Grok-1 would take 1.3 TB."""
    expected = expected_shapes(config)
    assert len(expected) == (14 if config.model.num_experts > 1 else 13)
    for quantized in (False, True):
        params = config.param_shapes(quantized=quantized)
        assert {name: leaf.shape for name, leaf in flat(params).items()} == expected
        leaves = jax.tree.leaves(params)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
        assert quantized or {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def test_grok_1_has_316_billion_parameters():
    values = sum(np.prod(shape) for shape in expected_shapes(grok_1()).values())
    assert round(values / 1e9, 2) == 315.68


@pytest.fixture(scope="module")
def initial():
    """Random float parameters of MIXTURE."""
    return flat(MIXTURE.init_params(0))


def test_initial_matrices_keep_the_scale_of_input(initial):
    """Each expert and layer is drawn with its own fan-in, and differs from the others."""
    cut = 0.8796  # the deviation of a normal distribution truncated at two deviations
    for name, leaf in initial.items():
        if name.endswith("/w"):
            fan_in = leaf.shape[-2]
            assert np.std(leaf) * np.sqrt(fan_in) == pytest.approx(cut, rel=0.06), name
            assert abs(np.mean(leaf)) < 5 * np.std(leaf) / np.sqrt(leaf.size), name
            assert np.max(np.abs(leaf)) <= 2 / np.sqrt(fan_in) * 1.001, name
            copies = np.asarray(leaf).reshape(-1, *leaf.shape[-2:])
            assert len(np.unique(copies[:, 0, 0])) == len(copies), name
        elif name.endswith("/scale"):
            assert np.array_equal(leaf, np.ones(leaf.shape)), name
    table = initial["language_model/in_out_embed/embeddings"]
    expected = MIXTURE.embedding_init_scale / np.sqrt(MIXTURE.model.emb_size)
    assert np.std(table) == pytest.approx(expected, rel=0.03)


def test_parameters_depend_on_the_seed(initial):
    other = flat(MIXTURE.init_params(1))
    for name, leaf in initial.items():
        assert np.array_equal(leaf, other[name]) == name.endswith("scale"), name


def test_quantized_parameters_are_rounded_float_ones(initial):
    """In the released groups; both calls draw the same numbers."""
    row_parallel = ("moe/linear_1/w", "multi_head_attention/linear/w")
    quantized = flat(MIXTURE.init_params(0, quantized=True))
    assert quantized.keys() == initial.keys()
    for name, leaf in quantized.items():
        if not name.endswith("/w") or "router" in name:
            assert leaf.dtype == jnp.float32, name
            assert np.array_equal(leaf, initial[name]), name
            continue
        groups = 8 if name.endswith(row_parallel) else 1
        assert isinstance(leaf, QuantizedWeight8bit), name
        assert leaf.weight.dtype == jnp.int8 and leaf.scales.dtype == jnp.bfloat16, name
        *lead, rows, columns = leaf.shape
        assert leaf.scales.shape == (*lead, groups, columns), name
        values = reference.dequantize(np.asarray(leaf.weight), np.asarray(leaf.scales))
        one_step = np.repeat(np.asarray(leaf.scales, np.float64), rows // groups, axis=-2)
        assert np.all(np.abs(values - initial[name]) <= 0.501 * one_step), name

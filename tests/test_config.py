"""The configuration: the published call, what it refuses, and the parameters that it describes."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from model import LanguageModelConfig, QuantizedWeight8bit, TransformerConfig, ffn_size, grok_1
from paths import DATA, ROOT

GOLDEN = DATA / "golden"

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


# ------------------------------------------------------------------------------------ the fields


def test_the_published_call_is_grok_1():
    published = LanguageModelConfig(
        vocab_size=128 * 1024,
        pad_token=0,
        eos_token=2,
        sequence_len=8192,
        embedding_init_scale=1.0,
        output_multiplier_scale=0.5773502691896257,
        embedding_multiplier_scale=78.38367176906169,
        model=TransformerConfig(
            emb_size=48 * 128,
            widening_factor=8,
            key_size=128,
            num_q_heads=48,
            num_kv_heads=8,
            num_layers=64,
            attn_output_multiplier=0.08838834764831845,
            shard_activations=True,
            # MoE.
            num_experts=8,
            num_selected_experts=2,
            # Activation sharding.
            data_axis="data",
            model_axis="model",
        ),
    )
    assert published == grok_1()
    assert hash(published) == hash(grok_1())  # a static argument of compiled functions
    assert published.model.ffn_size == 32768
    assert published.fprop_dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("emb_size", "widening_factor", "expected"),
    [(6144, 8, 32768), (128, 8, 688), (64, 8, 344), (16, 3, 32), (24, 1, 16), (10, 0.25, 8)],
)
def test_ffn_size_is_two_thirds_of_the_widened_width_up_to_eights(
    emb_size, widening_factor, expected
):
    assert ffn_size(emb_size, widening_factor) == expected


def test_a_configuration_cannot_be_changed():
    for config, field in ((MIXTURE, "vocab_size"), (MIXTURE.model, "num_layers")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field, 8)


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
FACTORS = "a number from 1e-06 to 1e+06"
REFUSED = [
    *((field, value, "an integer >= 1") for field in SIZES for value in NOT_A_SIZE),
    *((field, value, "a positive number") for field in NUMBERS for value in NOT_A_NUMBER),
    *(("num_experts", value, "an integer >= 0") for value in (-1, 8.0, True, None)),
    *(("pad_token", value, "an integer >= 0") for value in (-1, 0.0, False, None)),
    *(("eos_token", value, "an integer >= 0") for value in (-1, 2.0, True, None)),
    *((field, 1 << 31, "an integer <= 4096") for field in COUNTS),
    *((field, 1 << 63, "an integer <= 16777216") for field in WIDTHS),
    *((field, value, FACTORS) for field in NUMBERS for value in (1e-9, 1e9, 1e308)),
    ("num_layers", 10**9, "an integer <= 512"),
    ("num_selected_experts", 65, "an integer <= 64"),
    ("widening_factor", 0.01, "one that makes an expert 8 to 16777216 numbers wide"),
    ("widening_factor", 500_000, "one that makes an expert 8 to 16777216 numbers wide"),
    ("pad_token", 256, "a token below vocab_size = 256"),
    ("eos_token", 256, "a token below vocab_size = 256"),
    ("key_size", 5, "an even head width"),
    ("num_q_heads", 12, "a multiple of num_kv_heads = 8"),
    ("num_selected_experts", 5, "at most num_experts = 4"),
    ("shard_activations", "false", "true or false"),
    ("shard_activations", 0, "true or false"),
    ("data_axis", 5, "the name of a mesh axis, not 'replica'"),
    ("model_axis", None, "the name of a mesh axis, not 'replica'"),
    ("data_axis", "a" * 65, "at most 64 letters"),
    ("model_axis", "a" * 65, "at most 64 letters"),
    ("data_axis", "", "the name of a mesh axis, not 'replica'"),
    ("model_axis", "", "the name of a mesh axis, not 'replica'"),
    ("data_axis", "replica", "the name of a mesh axis, not 'replica'"),
    ("model_axis", "data", "a name other than data_axis"),
    ("fprop_dtype", jnp.float16, "bfloat16 or float32"),
    ("fprop_dtype", jnp.int8, "bfloat16 or float32"),
    ("fprop_dtype", "nonsense", "bfloat16 or float32"),
    ("fprop_dtype", None, "bfloat16 or float32"),
    ("model", {"emb_size": 64}, "a TransformerConfig"),
]


@pytest.mark.parametrize(("field", "value", "expected"), REFUSED)
def test_a_wrong_field_is_refused_by_its_name_with_what_was_expected(field, value, expected):
    with pytest.raises(ValueError) as error:
        changed(**{field: value})
    assert str(error.value) == f"{field}: expected {expected}, got {value!r}"


@pytest.mark.parametrize("field", [*SIZES, *NUMBERS, "num_experts", "pad_token", "eos_token"])
def test_endless_numbers_are_not_printed(field):
    for value in (10**400, -(10**400), 10**5000):
        with pytest.raises(ValueError, match=f"^{field}: .* got an integer of more than 40 digits"):
            changed(**{field: value})


def test_long_values_and_names_are_cut_in_errors():
    fields = MIXTURE.to_dict()
    for bad in (
        {"vocab_size": "9" * 10**6},
        {"model": ["x"] * 10**6},
        {"x" * 10**6: 1},
        {"two\nlines": 1},
    ):
        with pytest.raises(ValueError) as error:
            LanguageModelConfig.from_dict(fields | bad)
        assert len(str(error.value)) < 800 and "\n" not in str(error.value)


def test_sizes_that_are_too_large_together_are_refused():
    """Each is allowed alone; XLA ends the process if an array's size overflows 64 bits."""
    large = {"num_layers": 512, "num_experts": 4096, "emb_size": 1 << 18}
    with pytest.raises(ValueError, match="emb_size: expected a model with at most 11258999068426"):
        changed(**large)
    memory = {"num_layers": 512, "key_size": 4096, "sequence_len": 1 << 24}
    with pytest.raises(ValueError, match="sequence_len: expected one that makes at most 109951162"):
        changed(**memory)


def test_heads_that_scale_groups_do_not_divide_are_named():
    """Those of the attention's output; a model of floats may have them."""
    narrow = changed(key_size=2, num_q_heads=6, num_kv_heads=2)
    narrow.param_shapes(quantized=False)
    with pytest.raises(ValueError, match="^num_q_heads . key_size: .* multiple of 8, got 12"):
        narrow.param_shapes()


def test_a_dense_model_chooses_one_expert_of_none():
    for experts in (0, 1):
        assert changed(num_experts=experts, num_selected_experts=1).model.num_experts == experts
        with pytest.raises(ValueError, match="num_selected_experts: expected at most .* = 1, got"):
            changed(num_experts=experts, num_selected_experts=2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, np.dtype("float32")])
def test_either_activation_type_is_accepted_however_it_is_written(dtype):
    assert changed(fprop_dtype=dtype).fprop_dtype == dtype


# ------------------------------------------------------------------------------- plain fields


@pytest.mark.parametrize("name", ["three-layers", "twelve-layers"])
def test_a_released_config_json_comes_back_as_it_was(name):
    fields = json.loads((GOLDEN / name / "config.json").read_text())
    config = LanguageModelConfig.from_dict(fields)
    assert config.model.emb_size == fields["model"]["emb_size"]
    assert config.to_dict() == fields


def test_plain_fields_say_what_the_model_is_and_not_how_to_run_it():
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


def test_from_dict_leaves_its_argument_alone():
    fields = grok_1().to_dict()
    LanguageModelConfig.from_dict(fields)
    assert fields == grok_1().to_dict()


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
def test_from_dict_names_the_unknown_missing_or_wrong_field(path, value, message):
    """None stands for a field that is not there."""
    fields = MIXTURE.to_dict()
    *outer, last = path
    inner = fields[outer[0]] if outer else fields
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    with pytest.raises(ValueError, match=f"^{message}$"):
        LanguageModelConfig.from_dict(fields)


# -------------------------------------------------------------------------------- parameters


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
        "rms_norm/scale": (width,),
        "rms_norm_1/scale": (width,),
        "rms_norm_2/scale": (width,),
        "rms_norm_3/scale": (width,),
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
def test_parameters_have_the_released_names_and_a_leading_layer_axis(config):
    expected = expected_shapes(config)
    assert len(expected) == (14 if config.model.num_experts > 1 else 13)
    for quantized in (False, True):
        leaves = flat(config.param_shapes(quantized=quantized))
        assert {name: leaf.shape for name, leaf in leaves.items()} == expected


def test_grok_1_stores_316_billion_values():
    leaves = flat(grok_1().param_shapes()).values()
    assert round(sum(np.prod(leaf.shape) for leaf in leaves) / 1e9, 2) == 315.68


@pytest.fixture(scope="module")
def initial():
    """Random float parameters of MIXTURE."""
    return flat(MIXTURE.init_params(0))


def test_initial_parameters_are_what_param_shapes_says(initial):
    shapes = flat(MIXTURE.param_shapes(quantized=False))
    assert {name: (x.shape, x.dtype) for name, x in initial.items()} == {
        name: (x.shape, x.dtype) for name, x in shapes.items()
    }


def test_initial_matrices_keep_the_scale_of_their_input(initial):
    """Each expert and layer is drawn for itself, with its fan-in; not [L, E] as one wide matrix."""
    cut = 0.8796  # the deviation of a normal cut at two deviations
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


def test_the_seed_decides_the_parameters(initial):
    other = flat(MIXTURE.init_params(1))
    for name, leaf in initial.items():
        assert np.array_equal(leaf, other[name]) == name.endswith("scale"), name


def test_quantized_initial_parameters_are_the_float_ones_in_the_released_groups(initial):
    """Both calls draw the same numbers: the seed is all that the parameters depend on."""
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


def test_param_shapes_computes_nothing():
    """All leaves of the full model would need 1.3 TB as float32."""
    for leaf in jax.tree.leaves(grok_1().param_shapes(quantized=False)):
        assert isinstance(leaf, jax.ShapeDtypeStruct)


# ------------------------------------------------------------------------ what an import does


def test_importing_the_model_starts_no_device_and_changes_nothing_that_is_global():
    """An option set, or a class put in `__main__`, would change every program that imports it."""
    program = """
import sys
import haiku, jax
from jax._src import xla_bridge
options, modules = dict(jax.config.values), dict(sys.modules)
import model
assert not xla_bridge.backends_are_initialized(), "a device was started"
assert dict(jax.config.values) == options, "an option was set"
assert {name: sys.modules[name] for name in modules} == modules, "a module was replaced"
new = set(sys.modules) - set(modules)
mine = {name for name in new if name == "grok1" or name.startswith("grok1.")}
assert new == {"model", *mine}, new
layers = {name.split(".")[1] for name in mine - {"grok1"}}
assert not layers & {"cli", "formats", "serving", "plan"}, layers
assert all(sys.modules[name].__name__ == name for name in new), new
assert "QuantizedWeight8bit" not in globals(), "a class was put in __main__"
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

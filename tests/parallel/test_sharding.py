"""Where parameters lie: meshes that exist, one intended rule a parameter, errors that help."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grok1.ops.quantization import QuantizedWeight8bit
from grok1.parallel.sharding import (
    axis_size,
    constrain,
    make_mesh,
    match_rule,
    named_shardings,
    parameter_specs,
)
from model import LanguageModelConfig, TransformerConfig, grok_1

TINY = LanguageModelConfig(
    model=TransformerConfig(
        emb_size=16, key_size=4, num_q_heads=16, num_kv_heads=8, num_layers=2, widening_factor=3,
        num_experts=4, num_selected_experts=2,
    ),
    vocab_size=64,
)  # fmt: skip
DENSE = dataclasses.replace(
    TINY, model=dataclasses.replace(TINY.model, num_experts=1, num_selected_experts=1)
)


# ---------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize("sizes", [(1, 1), (1, 8), (2, 4), (8, 1), (1, 3), (2, 2)])
def test_a_mesh_has_the_sizes_asked_for_and_takes_the_first_devices(sizes):
    mesh = make_mesh(sizes)
    assert dict(mesh.shape) == dict(zip(("data", "model"), sizes, strict=True))
    assert mesh.axis_names == ("data", "model")
    assert mesh.devices.ravel().tolist() == jax.devices()[: np.prod(sizes)]
    assert [axis_size(mesh, axis) for axis in ("data", "model")] == list(sizes)


def test_one_device_is_the_default():
    assert make_mesh().devices.tolist() == [[jax.devices()[0]]]
    assert axis_size(None, "model") == 1


@pytest.mark.parametrize(
    ("local", "between", "message"),
    [
        ((4, 8), (1, 1), "a mesh of 4,8 needs 32 devices, but this machine has 16; .*count=32"),
        ((1, 17), (1, 1), "a mesh of 1,17 needs 17 devices, but this machine has 16; .*count=17"),
        ((0, 8), (1, 1), r"a mesh has two positive axes .*, got \(0, 8\) on a host and \(1, 1\) "),
        ((2, -4), (1, 1), r"a mesh has two positive axes .*, got \(2, -4\) on a host"),
        ((1, 8), (1, 0), r"a mesh has two positive axes .*, got .* and \(1, 0\) between hosts"),
        ((8,), (1, 1), r"a mesh has two positive axes .*, got \(8,\) on a host"),
        ((1, 8), (1, 2), r"between_hosts_config \(1, 2\) means 2 hosts, but 1 are running"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_in_one_sentence(local, between, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        make_mesh(local, between)
    text = str(error.value)
    assert "\n" not in text and ". " not in text and len(text) < 250


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """Another host's device, as far as the layout of a mesh is concerned."""

    id: int
    process_index: int


@pytest.fixture
def two_hosts(monkeypatch):
    """jax.devices() as two hosts of four devices see them, the second host's first."""
    devices = [FakeDevice(10 * host + n, host) for host in (1, 0) for n in range(4)]
    monkeypatch.setattr("grok1.parallel.sharding.jax.devices", lambda: devices)
    monkeypatch.setattr("grok1.parallel.sharding.Mesh", lambda grid, names: (grid, names))


@pytest.mark.parametrize(
    ("local", "between", "expected"),
    [
        ((1, 4), (2, 1), [[0, 1, 2, 3], [10, 11, 12, 13]]),
        ((1, 4), (1, 2), [[0, 1, 2, 3, 10, 11, 12, 13]]),
        ((2, 2), (1, 2), [[0, 1, 10, 11], [2, 3, 12, 13]]),
        ((2, 2), (2, 1), [[0, 1], [2, 3], [10, 11], [12, 13]]),
    ],
)
@pytest.mark.usefixtures("two_hosts")
def test_each_host_holds_one_block_of_the_mesh(local, between, expected):
    """Rows of devices dealt out across hosts would send every layer's sum over the network."""
    grid, names = make_mesh(local, between)
    assert np.vectorize(lambda device: device.id)(grid).tolist() == expected
    assert names == ("data", "model")


@pytest.mark.usefixtures("two_hosts")
def test_devices_of_one_host_share_a_key_value_head():
    """Four heads on eight devices: what the two have in common stays within a host."""
    grid, names = make_mesh((1, 4), (1, 2), num_kv_heads=4)
    assert names == ("data", "model", "replica")
    ids = np.vectorize(lambda device: device.id)(grid).tolist()
    assert ids == [[[0, 1], [2, 3], [10, 11], [12, 13]]]
    for heads in (8, 16, None):
        assert make_mesh((1, 4), (1, 2), num_kv_heads=heads)[1] == ("data", "model")


@pytest.mark.usefixtures("two_hosts")
def test_between_hosts_every_device_takes_part():
    with pytest.raises(ValueError, match="a mesh of 1,2 needs 2 devices, but this machine has 4"):
        make_mesh((1, 2), (1, 2))
    with pytest.raises(ValueError, match=r"between_hosts_config \(1, 1\) means 1 hosts, but 2"):
        make_mesh((1, 4), (1, 1))


# --------------------------------------------------------------------------------------- the table

COLUMNS, ROWS = P(None, "model"), P("model", None)
LAYER = "transformer/decoder_layer"
INTENDED = {
    "language_model/in_out_embed/embeddings": P("model", None),
    "language_model/rms_norm/scale": P(),
    f"{LAYER}/multi_head_attention/query/w": COLUMNS,
    f"{LAYER}/multi_head_attention/key/w": COLUMNS,
    f"{LAYER}/multi_head_attention/value/w": COLUMNS,
    f"{LAYER}/multi_head_attention/linear/w": ROWS,
    f"{LAYER}/rms_norm/scale": P(),
    f"{LAYER}/rms_norm_1/scale": P(),
    f"{LAYER}/rms_norm_2/scale": P(),
    f"{LAYER}/rms_norm_3/scale": P(),
}
MIXTURE_ONLY = {
    f"{LAYER}/moe/linear/w": P(None, None, "model"),
    f"{LAYER}/moe/linear_v/w": P(None, None, "model"),
    f"{LAYER}/moe/linear_1/w": P(None, "model", None),
    f"{LAYER}/router/w": P(),
}
DENSE_ONLY = {
    f"{LAYER}/linear/w": COLUMNS,
    f"{LAYER}/linear_v/w": COLUMNS,
    f"{LAYER}/linear_1/w": ROWS,
}


@pytest.mark.parametrize(
    ("config", "intended"),
    [(grok_1(), INTENDED | MIXTURE_ONLY), (DENSE, INTENDED | DENSE_ONLY)],
    ids=["grok-1", "dense"],
)
def test_each_parameter_matches_one_rule_and_the_intended_one(config, intended):
    """Were there two, their order would decide, and a rule could be shadowed without a sign."""
    rules = config.partition_rules()
    shapes = config.param_shapes()
    names = [f"{module}/{name}" for module, leaves in shapes.items() for name in leaves]
    assert set(names) == set(intended)
    for name in names:
        matching = [spec for pattern, spec in rules if re.search(pattern, name)]
        assert matching == [intended[name]], name
        assert match_rule(rules, name) == intended[name]


def test_every_rule_is_for_some_parameter():
    rules = grok_1().partition_rules()
    names = [*INTENDED, *MIXTURE_ONLY, *DENSE_ONLY]
    for pattern, _ in rules:
        assert any(re.search(pattern, name) for name in names), pattern


def test_the_rules_use_the_axis_names_of_the_configuration():
    model = dataclasses.replace(TINY.model, data_axis="rows", model_axis="columns")
    specs = [spec for _, spec in dataclasses.replace(TINY, model=model).partition_rules()]
    used = {axis for spec in specs for axis in spec}
    assert used == {None, "columns"}


@pytest.mark.parametrize(
    "name",
    [
        "transformer/decoder_layer/moe/linear_2/w",
        "transformer/decoder_layer/multi_head_attention/query/b",
        "transformer/decoder_layer/rms_norm_10/scale",
        "language_model/in_out_embed/embeddings_2",
    ],
)
def test_a_parameter_without_a_rule_is_an_error(name):
    """Replicated by oversight, one new weight could fill every device."""
    with pytest.raises(ValueError, match=f"no partition rule matches the parameter '{name}'"):
        match_rule(grok_1().partition_rules(), name)
    module, _, last = name.rpartition("/")
    with pytest.raises(ValueError, match=f"no partition rule matches the parameter '{name}'"):
        parameter_specs({module: {last: np.zeros(3)}}, grok_1().partition_rules())


# ----------------------------------------------------------------------------- specs of parameters


def test_stacked_parameters_keep_their_layer_axis_whole_and_scales_follow_their_weight():
    config = grok_1()
    specs = parameter_specs(config.param_shapes(), config.partition_rules())
    assert specs == {
        "language_model/in_out_embed": {"embeddings": P("model", None)},
        "language_model/rms_norm": {"scale": P(None)},
        f"{LAYER}/moe/linear": {"w": int8(P(None, None, None, "model"))},
        f"{LAYER}/moe/linear_v": {"w": int8(P(None, None, None, "model"))},
        f"{LAYER}/moe/linear_1": {"w": int8(P(None, None, "model", None))},
        f"{LAYER}/multi_head_attention/query": {"w": int8(P(None, None, "model"))},
        f"{LAYER}/multi_head_attention/key": {"w": int8(P(None, None, "model"))},
        f"{LAYER}/multi_head_attention/value": {"w": int8(P(None, None, "model"))},
        f"{LAYER}/multi_head_attention/linear": {"w": int8(P(None, "model", None))},
        **{f"{LAYER}/rms_norm{n}": {"scale": P(None, None)} for n in ("", "_1", "_2", "_3")},
        f"{LAYER}/router": {"w": P(None, None, None)},
    }


def int8(weight, scales=None):
    """Return the specs of an int8 weight, those of its scales the same by default."""
    return QuantizedWeight8bit(weight, weight if scales is None else scales)


def test_scales_are_whole_along_an_axis_of_size_one():
    """One group for all rows cannot be split, whatever the weight's own spec says."""
    rules = [("w$", P("model", None))]
    one_group = QuantizedWeight8bit(np.zeros((16, 3), np.int8), np.zeros((1, 3)))
    many = QuantizedWeight8bit(np.zeros((16, 3), np.int8), np.zeros((4, 3)))
    specs = parameter_specs({"a": {"w": one_group}, "b": {"w": many}}, rules)
    assert specs == {
        "a": {"w": int8(P("model", None), P(None, None))},
        "b": {"w": int8(P("model", None), P("model", None))},
    }


def test_over_a_replica_axis_only_keys_values_and_few_groups_are_whole_on_several():
    mesh = make_mesh((1, 16), num_kv_heads=8)
    config = grok_1()
    specs = parameter_specs(config.param_shapes(), config.partition_rules(mesh), mesh)
    both = ("model", "replica")
    attention = f"{LAYER}/multi_head_attention"
    assert specs["language_model/in_out_embed"]["embeddings"] == P(both, None)
    assert specs[f"{attention}/key"]["w"] == int8(P(None, None, "model"))
    assert specs[f"{attention}/value"]["w"] == int8(P(None, None, "model"))
    assert specs[f"{attention}/query"]["w"] == int8(P(None, None, both))
    rows = P(None, both, None), P(None, "model", None)
    assert specs[f"{attention}/linear"]["w"] == int8(*rows)
    experts = P(None, None, both, None), P(None, None, "model", None)
    assert specs[f"{LAYER}/moe/linear_1"]["w"] == int8(*experts)
    assert specs[f"{LAYER}/moe/linear"]["w"] == int8(P(None, None, None, both))


@pytest.mark.parametrize("config", [grok_1(), TINY, DENSE], ids=["grok-1", "tiny", "dense"])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 8), (2, 4), (8, 1)])
def test_every_device_holds_an_equal_part(config, sizes):
    mesh = make_mesh(sizes)
    config.check_mesh(mesh)
    shapes = config.param_shapes()
    shardings = named_shardings(parameter_specs(shapes, config.partition_rules()), mesh)
    split = whole = 0
    for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True):
        assert isinstance(sharding, NamedSharding)
        part = sharding.shard_shape(leaf.shape)  # raises where an axis is not divided
        parts = np.prod(leaf.shape) / np.prod(part)
        assert parts in (1, sizes[1])
        split += np.prod(part) * leaf.dtype.itemsize
        whole += np.prod(leaf.shape) * leaf.dtype.itemsize
    if config == grok_1():
        assert whole / sizes[1] <= split < 1.002 * whole / sizes[1]


# ------------------------------------------------------------------------------- models on meshes


def with_model(config=TINY, **fields):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (TINY, (1, 3), r"mesh: a model axis of 3 does not divide num_kv_heads = 8; "
                       r"use one of \[1, 2, 4, 8, 16\]"),
        (with_model(num_kv_heads=4), (1, 12), r"mesh: a model axis of 12 does not divide "
                       r"num_q_heads = 16; use one of \[1, 2, 4, 8, 16\]"),
        (with_model(num_q_heads=24, num_kv_heads=24), (1, 3), r"mesh: a model axis of 3 does not "
                       r"divide the expert width = 32; use one of \[1, 2, 4, 8\]"),
        (with_model(emb_size=18, shard_activations=True), (1, 4), r"mesh: a model axis of 4 does "
                       r"not divide emb_size = 18; use one of \[1, 2\]"),
        (dataclasses.replace(TINY, vocab_size=66), (1, 4),
                       r"mesh: a model axis of 4 does not divide vocab_size = 66; "
                       r"use one of \[1, 2\]"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_a_mesh_says_which_would(config, sizes, message):
    """The sizes that it names divide every width, not only the one that failed."""
    heads = config.model.num_kv_heads
    mesh = make_mesh(sizes, num_kv_heads=heads)
    for refuse in (config.check_mesh, config.make):
        with pytest.raises(ValueError, match=f"^{message}$"):
            refuse(mesh)
    for size in re.findall(r"\d+", message.partition("use one of")[2]):
        config.check_mesh(make_mesh((1, int(size)), num_kv_heads=heads))


def test_widths_that_are_not_split_need_not_divide():
    with_model(emb_size=18).check_mesh(make_mesh((1, 4)))
    with_model(TINY, num_layers=3).check_mesh(make_mesh((8, 1)))


def test_an_axis_longer_than_the_key_value_heads_must_be_split():
    """Sixteen devices cannot have eight heads of the cache among them in equal parts."""
    TINY.check_mesh(make_mesh((1, 16), num_kv_heads=8))
    with pytest.raises(ValueError, match=r"model axis of 8, one key/value head each, .*replica"):
        TINY.check_mesh(make_mesh((1, 16)))
    for sizes in ((1, 4, 2), (1, 2, 8)):
        devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
        with pytest.raises(ValueError, match="as from make_mesh"):
            TINY.check_mesh(Mesh(devices, ("data", "model", "replica")))


def test_a_mesh_without_the_axes_of_the_configuration_is_refused():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("rows", "columns"))
    with pytest.raises(ValueError, match=r"mesh: expected an axis named 'data', got \('rows'"):
        TINY.check_mesh(mesh)
    with_model(data_axis="rows", model_axis="columns").check_mesh(mesh)


# --------------------------------------------------------------------------------------- constrain


def test_constrain_lays_a_value_out_and_changes_nothing_else():
    x = jnp.arange(32.0).reshape(4, 8)
    assert constrain(x, None, "data", "model") is x
    mesh = make_mesh((2, 4))
    y = jax.jit(lambda x: constrain(x, mesh, "data", "model"))(x)
    assert y.sharding.shard_shape(y.shape) == (2, 2)
    assert np.array_equal(x, y)

"""Device meshes, the partition rules of parameters, and which models fit a mesh."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from grok1 import backend
from grok1.ops.quantization import QuantizedWeight8bit
from grok1.parallel.sharding import (
    auto,
    axis_size,
    constrain,
    make_mesh,
    match_rule,
    parameter_specs,
    split_over_hosts,
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


@pytest.mark.parametrize("sizes", [(2, 4), (1, 3)])
def test_mesh_has_the_given_sizes_and_first_devices(sizes):
    mesh = make_mesh(sizes)
    assert dict(mesh.shape) == dict(zip(("data", "model"), sizes, strict=True))
    assert mesh.axis_names == ("data", "model")
    assert mesh.devices.ravel().tolist() == jax.devices()[: np.prod(sizes)]
    assert [axis_size(mesh, axis) for axis in ("data", "model")] == list(sizes)


def test_default_mesh_has_one_device():
    assert make_mesh().devices.tolist() == [[jax.devices()[0]]]
    assert axis_size(None, "model") == 1


@pytest.mark.parametrize(
    ("local", "between", "message"),
    [
        ((4, 8), (1, 1), "a mesh of 4,8 needs 32 devices, but this machine has 16; .*count=32"),
        ((0, 8), (1, 1), r"a mesh has two positive axes .*, got \(0, 8\) on a host and \(1, 1\) "),
        ((1, 8), (1, 0), r"a mesh has two positive axes .*, got .* and \(1, 0\) between hosts"),
        ((8,), (1, 1), r"a mesh has two positive axes .*, got \(8,\) on a host"),
        ((1, 8), (1, 2), r"between_hosts_config \(1, 2\) means 2 hosts, but 1 are running"),
    ],
)
def test_invalid_mesh_is_refused_in_one_sentence(local, between, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        make_mesh(local, between)
    text = str(error.value)
    assert "\n" not in text and ". " not in text and len(text) < 250


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """A device of another host, with what the layout of a mesh depends on."""

    id: int
    process_index: int


@pytest.fixture
def two_hosts(monkeypatch):
    """Two hosts of four devices each; jax.devices() lists those of the second host first."""
    devices = [FakeDevice(10 * host + n, host) for host in (1, 0) for n in range(4)]
    monkeypatch.setattr("grok1.parallel.sharding.jax.devices", lambda: devices)
    monkeypatch.setattr("grok1.parallel.sharding.Mesh", lambda grid, names, **_: (grid, names))


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
def test_each_host_has_one_block_of_the_mesh(local, between, expected):
    """If a row of the mesh lay on several hosts, each layer would sum over the network."""
    grid, names = make_mesh(local, between)
    assert np.vectorize(lambda device: device.id)(grid).tolist() == expected
    assert names == ("data", "model")


@pytest.mark.usefixtures("two_hosts")
def test_devices_of_one_key_value_head_are_on_one_host():
    """Four heads on eight devices."""
    grid, names = make_mesh((1, 4), (1, 2), num_kv_heads=4)
    assert names == ("data", "model", "replica")
    ids = np.vectorize(lambda device: device.id)(grid).tolist()
    assert ids == [[[0, 1], [2, 3], [10, 11], [12, 13]]]
    for heads in (8, 16, None):
        assert make_mesh((1, 4), (1, 2), num_kv_heads=heads)[1] == ("data", "model")


@pytest.mark.usefixtures("two_hosts")
def test_mesh_over_hosts_must_use_all_devices():
    with pytest.raises(ValueError, match="a mesh of 1,2 needs 2 devices, but this machine has 4"):
        make_mesh((1, 2), (1, 2))
    with pytest.raises(ValueError, match=r"between_hosts_config \(1, 1\) means 1 hosts, but 2"):
        make_mesh((1, 4), (1, 1))


@pytest.mark.parametrize(
    ("mesh", "hosts", "per_host", "local", "between"),
    [
        ((1, 8), 2, 4, (1, 4), (1, 2)),
        ((2, 4), 2, 4, (1, 4), (2, 1)),
        ((8, 1), 2, 4, (4, 1), (2, 1)),
        ((3, 4), 2, 6, (3, 2), (1, 2)),
        ((1, 2), 1, 8, (1, 2), (1, 1)),  # one host may have more devices than the mesh
    ],
)
def test_model_axis_stays_within_a_host_if_possible(mesh, hosts, per_host, local, between):
    assert split_over_hosts(*mesh, hosts, per_host) == (local, between)


def test_mesh_must_have_the_devices_of_all_processes():
    with pytest.raises(ValueError, match=r"a mesh of 1,4 has 4 devices, but 2 processes of 4"):
        split_over_hosts(1, 4, 2, 4)


def test_processes_must_have_equal_numbers_of_devices(monkeypatch):
    devices = [FakeDevice(0, 0), FakeDevice(1, 1), FakeDevice(2, 1)]
    monkeypatch.setattr("grok1.backend.jax.devices", lambda: devices)
    message = (
        "^expected the same number of devices in each process, got 1 in process 0, 2 in process 1; "
    )
    with pytest.raises(ValueError, match=message):
        backend.devices_of_each_process()


# ------------------------------------------------------------------------------------------- rules

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
def test_each_parameter_matches_only_its_own_rule(config, intended):
    """If two rules matched, their order would decide, and one could hide the other."""
    rules = config.partition_rules()
    shapes = config.param_shapes()
    names = [f"{module}/{name}" for module, leaves in shapes.items() for name in leaves]
    assert set(names) == set(intended)
    for name in names:
        matching = [spec for pattern, spec in rules if re.search(pattern, name)]
        assert matching == [intended[name]], name
        assert match_rule(rules, name) == intended[name]


def test_each_rule_matches_a_parameter():
    rules = grok_1().partition_rules()
    names = [*INTENDED, *MIXTURE_ONLY, *DENSE_ONLY]
    for pattern, _ in rules:
        assert any(re.search(pattern, name) for name in names), pattern


def test_rules_use_the_axis_names_of_the_configuration():
    model = dataclasses.replace(TINY.model, data_axis="rows", model_axis="columns")
    specs = [spec for _, spec in dataclasses.replace(TINY, model=model).partition_rules()]
    used = {axis for spec in specs for axis in spec}
    assert used == {None, "columns"}


@pytest.mark.parametrize(
    "name",
    [
        "transformer/decoder_layer/moe/linear_2/w",
        "transformer/decoder_layer/rms_norm_10/scale",
        "language_model/in_out_embed/embeddings_2",
    ],
)
def test_parameter_without_a_rule_is_an_error(name):
    """A new weight that is replicated by mistake could fill every device."""
    module, _, last = name.rpartition("/")
    with pytest.raises(ValueError, match=f"no partition rule matches the parameter '{name}'"):
        parameter_specs({module: {last: np.zeros(3)}}, grok_1().partition_rules())


# ----------------------------------------------------------------------------- specs of parameters


def test_scales_split_like_weights_never_by_layer_axis():
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


def test_one_group_of_scales_is_not_split():
    """The spec of the weight may split its rows."""
    rules = [("w$", P("model", None))]
    one_group = QuantizedWeight8bit(np.zeros((16, 3), np.int8), np.zeros((1, 3)))
    many = QuantizedWeight8bit(np.zeros((16, 3), np.int8), np.zeros((4, 3)))
    specs = parameter_specs({"a": {"w": one_group}, "b": {"w": many}}, rules)
    assert specs == {
        "a": {"w": int8(P("model", None), P(None, None))},
        "b": {"w": int8(P("model", None), P("model", None))},
    }


def test_replica_axis_splits_all_but_kv_and_few_scales():
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
def test_mesh_that_does_not_fit_names_those_that_do(config, sizes, message):
    """The named sizes divide every width, not only the one that failed."""
    heads = config.model.num_kv_heads
    mesh = make_mesh(sizes, num_kv_heads=heads)
    for refuse in (config.check_mesh, config.make):
        with pytest.raises(ValueError, match=f"^{message}$"):
            refuse(mesh)
    for size in re.findall(r"\d+", message.partition("use one of")[2]):
        config.check_mesh(make_mesh((1, int(size)), num_kv_heads=heads))


def test_axis_need_not_divide_unsplit_widths():
    with_model(emb_size=18).check_mesh(make_mesh((1, 4)))
    with_model(TINY, num_layers=3).check_mesh(make_mesh((8, 1)))


def test_model_axis_beyond_kv_heads_needs_replica_axis():
    """Eight heads of the cache cannot be divided among sixteen devices."""
    TINY.check_mesh(make_mesh((1, 16), num_kv_heads=8))
    with pytest.raises(ValueError, match=r"model axis of 8, one key/value head each, .*replica"):
        TINY.check_mesh(make_mesh((1, 16)))
    for sizes in ((1, 4, 2), (1, 2, 8)):
        devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
        with pytest.raises(ValueError, match="as from make_mesh"):
            TINY.check_mesh(Mesh(devices, ("data", "model", "replica"), axis_types=auto("123")))


def test_mesh_without_the_configured_axes_is_refused():
    mesh = Mesh(
        np.array(jax.devices()[:8]).reshape(2, 4), ("rows", "columns"), axis_types=auto("12")
    )
    with pytest.raises(ValueError, match=r"mesh: expected an axis named 'data', got \('rows'"):
        TINY.check_mesh(mesh)
    with_model(data_axis="rows", model_axis="columns").check_mesh(mesh)


# --------------------------------------------------------------------------------------- constrain


def test_constrain_sets_sharding_and_keeps_values():
    x = jnp.arange(32.0).reshape(4, 8)
    assert constrain(x, None, "data", "model") is x
    mesh = make_mesh((2, 4))
    y = jax.jit(lambda x: constrain(x, mesh, "data", "model"))(x)
    assert y.sharding.shard_shape(y.shape) == (2, 2)
    assert np.array_equal(x, y)

"""The reference of the tests: grok1/reference.py in float64, and a reader of the golden files.

The files are not read by checkpoint.py, so that it can be tested against this reader. Results are
NumPy arrays. `config` is a dict with the fields of config.json.
"""

import collections
import functools
import pathlib
import pickle
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import grok1.reference

SIZE = 96  # positions of every cache, as each size is compiled separately

# One layer's files, in the order in which they are stored.
LAYER_WEIGHTS = (
    "moe/linear",  # [E, D, F]
    "moe/linear_1",  # [E, F, D]
    "moe/linear_v",  # [E, D, F]
    "multi_head_attention/key",  # [D, K * H]
    "multi_head_attention/linear",  # [N * H, D]
    "multi_head_attention/query",  # [D, N * H]
    "multi_head_attention/value",  # [D, K * H]
    "rms_norm",  # [D]
    "rms_norm_1",
    "rms_norm_2",
    "rms_norm_3",
    "router",  # [D, E]
)


class StoredWeight8bit:
    """Replaces the class that the files name `__main__.QuantizedWeight8bit`."""

    weight: np.ndarray
    scales: np.ndarray


class _TrustedUnpickler(pickle.Unpickler):
    """Only for the golden files of this repository: the allowed globals can still be misused."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("__main__", "QuantizedWeight8bit"): StoredWeight8bit,
            ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("ml_dtypes", "bfloat16"): ml_dtypes.bfloat16,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"unexpected global {module}.{name}")
        return allowed[module, name]


def dequantize(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """int8 weight [..., I, O] times its scales [..., J, O], one for each I / J rows, as float64."""
    rows_per_group = weight.shape[-2] // scales.shape[-2]
    return weight.astype(np.float64) * np.repeat(scales.astype(np.float64), rows_per_group, axis=-2)


def load_arrays(path: pathlib.Path) -> list[np.ndarray]:
    """Return the content of one checkpoint file: an array, or a weight and its scales."""
    with path.open("rb") as file:
        stored = _TrustedUnpickler(file).load()
    return [stored.weight, stored.scales] if isinstance(stored, StoredWeight8bit) else [stored]


def load_tensor(path: pathlib.Path) -> np.ndarray:
    """Read one checkpoint file as float64."""
    array, *scales = load_arrays(path)
    return dequantize(array, *scales) if scales else array.astype(np.float64)


def load_weights(directory: str | pathlib.Path) -> dict[str, Any]:
    """Read a checkpoint in the released layout (`ckpt-0`), every weight as float64."""
    paths = sorted(pathlib.Path(directory).glob("tensor*_000"))
    tensors = [load_tensor(path) for path in paths]
    num_layers = (len(tensors) - 2) // len(LAYER_WEIGHTS)
    # The files hold the layers in the order of their names: 0, 1, 10, 11, ..., 2, ...
    stored_order = sorted(range(num_layers), key=str)
    layers: dict[str, list] = {name: [None] * num_layers for name in LAYER_WEIGHTS}
    rest = iter(tensors[2:])
    for layer in stored_order:
        for name in LAYER_WEIGHTS:
            layers[name][layer] = next(rest)
    return {
        "embeddings": tensors[0],
        "rms_norm": tensors[1],
        "layers": {name: np.stack(arrays) for name, arrays in layers.items()},
    }


def _exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function in float64, with NumPy arrays as arguments and results."""
    compiled = jax.jit(function)

    def call(*arrays: Any) -> Any:
        with jax.enable_x64(True):
            given = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
            return jax.tree.map(np.asarray, compiled(*given))

    return call


softmax = _exactly(functools.partial(jax.nn.softmax, axis=-1))
rotate = _exactly(grok1.reference.rotate)
expert = _exactly(lambda x, *matrices: grok1.reference.expert(x, matrices, jnp.float64))


def mixture(x: Any, layer: Mapping[str, Any], sizes: Mapping[str, int], real: Any) -> np.ndarray:
    """The mixture of experts of x [B, T, D], [B, T, D]; `real` bool [B, T], False for a pad."""
    config = _fields(sizes)

    def mix(x: jax.Array, layer: Any) -> jax.Array:
        nowhere = jnp.zeros([0])
        call = grok1.reference.Call(
            config, nowhere, nowhere, jnp.asarray(real), jnp.float64, grok1.reference.unchanged
        )
        return grok1.reference.mixture(x, layer, call)

    return _exactly(mix)(x, layer)


def _fields(fields: Mapping[str, Any]) -> Any:
    """Return the values of a dict as attributes, hashable, as compiled functions take them."""
    values = (_fields(v) if isinstance(v, Mapping) else v for v in fields.values())
    return _kind(tuple(fields))(*values)


@functools.cache
def _kind(names: tuple[str, ...]) -> Any:
    return collections.namedtuple("Fields", names)


class Result(NamedTuple):
    """The result of `run`.

    logits: [B, T, V].
    router_probs: [L, B, T, E]; None for a dense model.
    attention: [L, B, N, T, S], the weights after the softmax.
    memory: the reference's cache, for a call with the next tokens.
    sites: the arrays that inspection.py can capture, by name.
    """

    logits: np.ndarray
    router_probs: np.ndarray | None
    attention: np.ndarray
    memory: Any
    sites: dict[str, np.ndarray]


@functools.partial(jax.jit, static_argnames=("config", "hooks"))
def _forward(
    weights: Any, tokens: Any, cache: Any, hook_args: Any, *, config: Any, hooks: Any
) -> Any:
    """The reference's logits and cache, and the arrays of its sites."""
    found: dict[str, list[jax.Array]] = {"hidden_states": []}
    changes = dict(hooks)

    def at(site: str, array: jax.Array) -> jax.Array:
        layer = -1 if site == "embeddings" else len(found["hidden_states"])
        array = changes[site](layer, array, *hook_args) if site in changes else array
        found.setdefault(site, []).append(array)
        return array

    logits, cache = grok1.reference.forward(weights, config, tokens, cache, at)
    (embeddings,) = found.pop("embeddings")
    sites = {site: jnp.stack(arrays) for site, arrays in found.items()}
    return logits, cache, {"embeddings": embeddings, **sites}


def _placed(weights: dict) -> dict:
    """The weights as jax arrays in float64."""
    with jax.enable_x64(True):
        return jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), weights)


def run(
    weights: dict,
    config: dict,
    tokens: Any,
    memory: Any = None,
    hooks: Mapping[str, Callable[..., jax.Array]] | None = None,
    hook_args: tuple[Any, ...] = (),
) -> Result:
    """The forward pass of tokens [B, T] that follow those in `memory`.

    hooks: by site, (layer, array, *hook_args) -> the array to continue with. hook_args: arrays;
    other values of the same shapes are not compiled again.
    """
    fields, tokens = _fields(config), np.asarray(tokens)
    weights = _placed(weights)
    with jax.enable_x64(True):
        if memory is None:
            memory = grok1.reference.empty_cache(fields, len(tokens), SIZE, jnp.float64)
        filled = int(memory.filled[0]) + tokens.shape[1]
        assert filled <= SIZE
        options = {"config": fields, "hooks": tuple((hooks or {}).items())}
        found = _forward(weights, tokens, memory, hook_args, **options)
        logits, memory, sites = found[0], found[1], jax.tree.map(np.asarray, found[2])
    sites["attention_weights"] = sites["attention_weights"][..., :filled]
    return Result(
        logits=np.asarray(logits),
        router_probs=sites.get("router_probs"),
        attention=sites["attention_weights"],
        memory=memory,
        sites=sites,
    )


def forward(weights: dict, config: dict, tokens: Any) -> np.ndarray:
    """Logits [B, T, V] of tokens [B, T]."""
    return run(weights, config, tokens).logits


def router_margin(router_probs: np.ndarray, num_selected_experts: int) -> np.ndarray:
    """The probability of the last chosen expert less that of the next one, least over layers.

    router_probs: [L, B, T, E] -> [B, T].
    """
    ranked = np.sort(router_probs, axis=-1)[..., ::-1]
    gaps = ranked[..., num_selected_experts - 1] - ranked[..., num_selected_experts]
    return gaps.min(axis=0)

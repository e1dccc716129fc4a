"""The Grok-1 forward pass in plain NumPy float64: the yardstick for the tests, written to be read.

Dimension letters: `B` batch, `T` query positions, `S` key positions, `D` model width, `N` query
heads, `K` key/value heads, `H` head width, `E` experts, `A` experts used per token, `F` expert
hidden width, `V` vocabulary, `L` layers.

`config` is a dict with the fields of `LanguageModelConfig`, those of `TransformerConfig` under
`"model"`. `weights` is `{"embeddings": [V, D], "rms_norm": [D], "layers": {name: [L, ...]}}` with
the names of `LAYER_WEIGHTS` (a stacked array or a list, one entry a layer). A dense model, whose
`num_experts` is at most 1, has `dense_block/...` [D, F] in place of `moe/...` and no router.
"""

import pathlib
import pickle
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

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
    """Stands in for the class that the files name `__main__.QuantizedWeight8bit`."""

    weight: np.ndarray
    scales: np.ndarray


class _TrustedUnpickler(pickle.Unpickler):
    """Only for the repository's own golden files: a listed global can still be misused."""

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
    """Return what one checkpoint file holds, as it is: an array, or a weight and its scales."""
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


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def rms_norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Root-mean-square norm over the last axis: no offset, not `1 + scale`."""
    return scale * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def rotate(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rotary embedding of x [B, T, heads, H] at positions [T], in the half form."""
    width = x.shape[-1]
    frequencies = 10000.0 ** (-np.arange(0, width, 2) / width)  # [H / 2]
    phase = positions[:, None] * np.concatenate([frequencies, frequencies])  # [T, H]
    phase = phase[None, :, None, :]
    first, second = x[..., : width // 2], x[..., width // 2 :]
    rotated = np.concatenate([-second, first], axis=-1)
    return x * np.cos(phase) + rotated * np.sin(phase)


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh approximation."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def expert(
    x: np.ndarray, linear: np.ndarray, linear_v: np.ndarray, linear_1: np.ndarray
) -> np.ndarray:
    """One gated feed-forward block, x [..., D]."""
    return (gelu(x @ linear) * (x @ linear_v)) @ linear_1


def unchanged(_site: str, array: np.ndarray) -> np.ndarray:
    """Hand an array of a site on as it is."""
    return array


def attention(
    x: np.ndarray,
    layer: dict,
    model: dict,
    mask: np.ndarray,
    past: tuple | None,
    at: Callable[[str, np.ndarray], np.ndarray] = unchanged,
) -> tuple[np.ndarray, tuple]:
    """Attend from x [B, T, D] to the past (keys, values) and to x itself; mask [B, T, S].

    Returns the output [B, T, D] and (keys, values), each [B, S, K, H].
    """
    batch, length, _ = x.shape
    heads, kv_heads, width = model["num_q_heads"], model["num_kv_heads"], model["key_size"]
    query = (x @ layer["multi_head_attention/query"]).reshape(batch, length, heads, width)
    key = (x @ layer["multi_head_attention/key"]).reshape(batch, length, kv_heads, width)
    value = (x @ layer["multi_head_attention/value"]).reshape(batch, length, kv_heads, width)
    positions = np.arange(mask.shape[-1] - length, mask.shape[-1])
    query, key = rotate(query, positions), rotate(key, positions)
    if past is not None:
        key = np.concatenate([past[0], key], axis=1)
        value = np.concatenate([past[1], value], axis=1)

    sees_a_key = np.any(mask, axis=-1, keepdims=True)  # [B, T, 1]
    weights = np.zeros((batch, heads, length, mask.shape[-1]))
    output = np.zeros((batch, length, heads, width))
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        scores = np.einsum("bth,bsh->bts", query[:, :, head], key[:, :, kv_head])
        scores = 30 * np.tanh(scores * model["attn_output_multiplier"] / 30)
        weights[:, head] = softmax(np.where(mask, scores, -1e30)) * sees_a_key
    weights = at("attention_weights", weights)
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        output[:, :, head] = np.einsum("bts,bsh->bth", weights[:, head], value[:, :, kv_head])
    output = at("head_outputs", output).reshape(batch, length, heads * width)
    return output @ layer["multi_head_attention/linear"], (key, value)


def mixture(
    x: np.ndarray,
    layer: dict,
    model: dict,
    real: np.ndarray,
    at: Callable[[str, np.ndarray], np.ndarray] = unchanged,
) -> tuple[np.ndarray, np.ndarray]:
    """Mixture of experts of x [B, T, D]; tokens outside `real` [B, T] go to no expert.

    That only shows in the logits of the padding itself, where the golden files' exact logits,
    whose padding went to experts too, differ and do not count.

    Returns the output [B, T, D] and the router's probabilities [B, T, E].
    """
    probabilities = at("router_probs", softmax(at("router_logits", x @ layer["router"])))
    # Largest first; equal probabilities go to the lower expert.
    order = np.argsort(-probabilities, axis=-1, kind="stable")
    chosen = order[..., : model["num_selected_experts"]]  # [B, T, A]
    # As they are: not renormalised over the chosen.
    gates = np.take_along_axis(probabilities, chosen, axis=-1)
    gates = at("expert_gates", np.where(real[..., None], gates, 0))
    chosen = at("expert_index", np.where(real[..., None], chosen, model["num_experts"]))
    output = np.zeros_like(x)
    for index in range(model["num_experts"]):
        weights = (layer[f"moe/{name}"][index] for name in ("linear", "linear_v", "linear_1"))
        takes = (chosen == index).any(axis=-1)  # [B, T]
        gate = np.where(chosen == index, gates, 0).sum(axis=-1)[takes]
        output[takes] += gate[:, None] * expert(x[takes], *weights)
    return output, probabilities


class Result(NamedTuple):
    """What `run` computes.

    logits: [B, T, V].
    router_probs: [L, B, T, E]; None for a dense model.
    attention: [L, B, N, T, S], the weights after the softmax.
    memory: the keys, values and valid slots, for a call with the tokens that follow.
    sites: what inspection.py can capture, by name.
    """

    logits: np.ndarray
    router_probs: np.ndarray | None
    attention: np.ndarray
    memory: dict[str, Any]
    sites: dict[str, np.ndarray]


def run(
    weights: dict,
    config: dict,
    tokens: Any,
    memory: dict | None = None,
    hooks: Mapping[str, Callable[[int, np.ndarray], np.ndarray]] | None = None,
) -> Result:
    """The forward pass of tokens [B, T] that follow those which `memory` remembers.

    hooks: by site, (layer, array) -> the array to go on with.
    """
    found: dict[str, list[np.ndarray]] = {}
    index = -1

    def at(site: str, array: np.ndarray) -> np.ndarray:
        array = hooks[site](index, array) if hooks and site in hooks else array
        found.setdefault(site, []).append(array)
        return array

    model = config["model"]
    tokens = np.asarray(tokens)
    batch, length = tokens.shape
    real = tokens > config["pad_token"]
    valid = real if memory is None else np.concatenate([memory["valid"], real], axis=1)  # [B, S]
    total = valid.shape[1]
    causal = np.arange(total) <= np.arange(total - length, total)[:, None]  # [T, S]
    mask = causal & valid[:, None, :]

    h = at("embeddings", weights["embeddings"][tokens] * config["embedding_multiplier_scale"])
    kept = []
    for index in range(model["num_layers"]):
        layer = {name: arrays[index] for name, arrays in weights["layers"].items()}
        past = None if memory is None else memory["layers"][index]
        x = rms_norm(h, layer["rms_norm"])
        x, keys_values = attention(x, layer, model, mask, past, at)
        h = h + at("attention_output", rms_norm(x, layer["rms_norm_1"]))
        x = rms_norm(h, layer["rms_norm_2"])
        if model["num_experts"] > 1:
            x, _ = mixture(x, layer, model, real, at)
        else:
            x = expert(x, *(layer[f"dense_block/{w}"] for w in ("linear", "linear_v", "linear_1")))
        h = h + at("feed_forward_output", rms_norm(x, layer["rms_norm_3"]))
        h = at("hidden_states", h)
        kept.append(keys_values)
    logits = rms_norm(h, weights["rms_norm"]) @ weights["embeddings"].T
    (embeddings,) = found.pop("embeddings")
    sites = {"embeddings": embeddings, **{site: np.stack(all_) for site, all_ in found.items()}}
    return Result(
        logits=logits * config["output_multiplier_scale"],
        router_probs=sites.get("router_probs"),
        attention=sites["attention_weights"],
        memory={"layers": kept, "valid": valid},
        sites=sites,
    )


def forward(weights: dict, config: dict, tokens: Any) -> np.ndarray:
    """Logits [B, T, V] of tokens [B, T]."""
    return run(weights, config, tokens).logits


def router_margin(router_probs: np.ndarray, num_selected_experts: int) -> np.ndarray:
    """How near each token came to other experts: [L, B, T, E] -> [B, T], the least over layers.

    The gap between the probabilities of the last expert chosen and the first one not chosen.
    """
    ranked = np.sort(router_probs, axis=-1)[..., ::-1]
    gaps = ranked[..., num_selected_experts - 1] - ranked[..., num_selected_experts]
    return gaps.min(axis=0)


def greedy(
    weights: dict, config: dict, prompt: list[int], steps: int
) -> tuple[list[int], list[float]]:
    """Continue a prompt by `steps` tokens, each the likeliest; ties go to the lower id.

    Returns the tokens, and for each the gap between the largest and second-largest logit.
    """
    tokens, margins = [], []
    result = run(weights, config, [prompt])
    for _ in range(steps):
        logits = result.logits[0, -1]
        second, first = np.sort(logits)[-2:]
        tokens.append(int(np.argmax(logits)))
        margins.append(float(first - second))
        result = run(weights, config, [tokens[-1:]], result.memory)
    return tokens, margins

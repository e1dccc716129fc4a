"""What a decoder layer reads when it is one function, as `Operations.fused_layer` is.

Dimension letters as in model.py.
"""

from typing import Any, NamedTuple

import jax

from grok1.ops.cache import CacheIndex
from grok1.ops.quantization import QuantizedWeight4bit, QuantizedWeight8bit, Weights


class LayerWeights(NamedTuple):
    """The parameters of all decoder layers, each a stack; or something of each, such as its spec.

    The norms [L, D] and the router [L, D, E] are float32; the others are int8 [L, I, O], those of
    the experts int8 or of 4 bits, [L, E, I, O].
    """

    rms_norm: Any
    rms_norm_1: Any
    rms_norm_2: Any
    rms_norm_3: Any
    query: Any
    key: Any
    value: Any
    linear: Any
    router: Any
    expert_gate: Any
    expert_value: Any
    expert_out: Any

    @property
    def quantized(self) -> bool:
        """Whether the matrices of attention are int8, and those of the experts all 8 or 4 bits."""
        attention, experts = ({type(weight) for weight in own} for own in (self[4:8], self[9:]))
        kinds = {QuantizedWeight8bit}, {QuantizedWeight4bit}
        return attention == kinds[0] and experts in kinds


LAYER_NAMES = LayerWeights(
    rms_norm="rms_norm/scale",
    rms_norm_1="rms_norm_1/scale",
    rms_norm_2="rms_norm_2/scale",
    rms_norm_3="rms_norm_3/scale",
    query="multi_head_attention/query/w",
    key="multi_head_attention/key/w",
    value="multi_head_attention/value/w",
    linear="multi_head_attention/linear/w",
    router="router/w",
    expert_gate="moe/linear/w",
    expert_value="moe/linear_v/w",
    expert_out="moe/linear_1/w",
)


def layer_weights(params: Weights) -> LayerWeights | None:
    """Return the parameters of a layer, or None if they are not those of a layer with experts."""
    named = {
        f"/{module}/{name}": leaf for module, own in params.items() for name, leaf in own.items()
    }
    found = [
        [leaf for path, leaf in named.items() if path.endswith(f"/{end}")] for end in LAYER_NAMES
    ]
    if len(named) != len(found) or not all(found):
        return None
    return LayerWeights(*(leaf for (leaf,) in found))


class LayerStep(NamedTuple):
    """What a layer has to know of a step, in addition to its weights.

    memory_index: where each sequence's new tokens go; nothing in it is None. mask: bool [B, T, S],
    the positions that a token sees. last: int32 [B, T], how many there are up to the last of them.
    valid: bool [B, T], False for a token that no expert processes.
    """

    memory_index: CacheIndex
    mask: jax.Array
    last: jax.Array
    valid: jax.Array

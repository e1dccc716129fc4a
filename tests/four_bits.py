"""Models with experts of 4 bits, and their exact logits."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import golden
import reference
from grok1.execution import Execution
from grok1.ops.quantization import Params
from grok1.parallel.sharding import make_mesh, named_shardings, parameter_specs
from grok1.parameters import dequantize_params, quantize_experts
from grok1.reference import weights_of
from grok1.serving.steps import apply_model
from model import LanguageModelConfig, TransformerConfig
from runner import load_model

DEMO = pathlib.Path(__file__).parent.parent / "checkpoints/demo"
NAMES = "random", "other random", "demo"


class Model(NamedTuple):
    """A model, tokens [2, 24], their exact logits, and whether routers chose clearly, [2, 24]."""

    config: LanguageModelConfig
    params: Params
    tokens: np.ndarray
    logits: np.ndarray
    clear: np.ndarray

    def check(self, sizes: tuple[int, int] | None, kernels: str, cuts: Sequence[int] = ()) -> None:
        """Check float32 logits on a mesh, away from router ties; tokens are read in chunks."""
        params, mesh = self.params, None
        if sizes is not None:
            mesh = make_mesh(sizes, num_kv_heads=8)
            specs = parameter_specs(params, self.config.partition_rules(mesh), mesh)
            params = jax.device_put(params, named_shardings(specs, mesh))
        execution = Execution(mesh, kernels=kernels)
        read = jax.jit(functools.partial(apply_model, self.config, execution))
        memory, logits = self.config.model.init_memory(2, 48, self.config.fprop_dtype), []
        for chunk in np.split(self.tokens, cuts, axis=1):
            output = read(params, chunk, memory)
            memory = output.model_state
            logits.append(output.logits)
        error = golden.relative_error(np.concatenate(logits, axis=1), self.logits)
        assert self.clear.sum() > 24
        assert error[self.clear].max() <= 1e-5


@functools.cache
def model(name: str) -> Model:
    """Return the model of one of `NAMES`, with logits by the reference in float64."""
    if name == "demo":
        server = load_model(DEMO, dtype="float32", kernels=False)
        config, params = server.config, quantize_experts(server.params)
    else:
        layers, seed, group = (2, 0, 64) if name == "random" else (3, 1, 128)
        config = random_config(layers)
        params = quantize_experts(config.init_params(seed, quantized=True), group)
    weights = jax.tree.map(np.asarray, weights_of(dequantize_params(params)))
    tokens = np.random.default_rng(2).integers(1, config.vocab_size, (2, 24))
    fields = dataclasses.asdict(config) | {"model": dataclasses.asdict(config.model)}
    result = reference.run(weights, fields, tokens)
    margin = np.sort(result.router_probs, axis=-1)
    clear = np.min(margin[..., -2] - margin[..., -3], axis=0) > 1e-4
    return Model(config, params, tokens, result.logits, clear)


def random_config(layers: int) -> LanguageModelConfig:
    return LanguageModelConfig(
        TransformerConfig(
            emb_size=128, widening_factor=12, key_size=16, num_q_heads=16, num_kv_heads=8,
            num_layers=layers, num_experts=8, num_selected_experts=2, attn_output_multiplier=0.3,
        ),
        vocab_size=512, sequence_len=96, output_multiplier_scale=0.6,
        embedding_multiplier_scale=11.0, fprop_dtype=jnp.float32,
    )  # fmt: skip

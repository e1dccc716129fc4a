"""A loaded model as a pure function, for jax.grad, jax.jvp, jax.vmap and jax.jit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from grok1.checks import require
from grok1.execution import Execution
from grok1.inspection import HookArgs, SiteHooks, check_hooks
from grok1.ops.quantization import Params
from grok1.serving.hooked import as_hooks, bind
from grok1.serving.steps import apply_model

if TYPE_CHECKING:
    from model import LanguageModelConfig, LanguageModelOutput


def pure_function(
    config: LanguageModelConfig, execution: Execution
) -> Callable[..., LanguageModelOutput]:
    """Return (params, tokens, ...) -> LanguageModelOutput; see `InferenceRunner.model`."""

    def model(
        params: Params,
        tokens: jax.Array,
        *,
        embeddings: jax.Array | None = None,
        hooks: SiteHooks | None = None,
        hook_args: HookArgs = (),
        **options: Any,
    ) -> LanguageModelOutput:
        shape = tuple(getattr(tokens, "shape", ()))
        require(len(shape) == 2, "tokens", "an int32 array [B, T]", shape or type(tokens))
        hooks = bind(as_hooks(check_hooks(hooks, config.model)), hook_args)
        if embeddings is not None:
            wanted = (*shape, config.model.emb_size)
            got = getattr(embeddings, "shape", None), getattr(embeddings, "dtype", None)
            right = got == (wanted, jnp.float32)
            require(right, "embeddings", f"a float32 array {[*wanted]}", got)
            change = hooks.get("embeddings", lambda _, h: h)
            hooks["embeddings"] = lambda layer, _: change(layer, embeddings)
        return apply_model(config, execution, params, tokens, hooks=hooks, **options)

    return model

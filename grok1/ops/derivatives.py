"""Errors for operations without derivatives, which name the differentiable ones."""

from collections.abc import Callable
from typing import NoReturn, TypeVar

import jax
from jax.custom_batching import custom_vmap
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Result = TypeVar("Result")

INSTEAD = (
    "use server.model(differentiable=True), or a model made with "
    'Execution(kernels="plain", expert_dispatch="static")'
)


def forward_only(kernel: Callable[..., Result]) -> Callable[..., Result]:
    """Return a kernel of arrays that raises ValueError under jax.grad, jax.jvp or jax.vmap."""

    @jax.custom_jvp
    def call(*arrays: jax.Array) -> Result:
        return kernel(*arrays)

    @call.defjvp
    def _(*_: object) -> NoReturn:
        raise ValueError(f"compiled kernels have no derivatives; {INSTEAD}")

    batched = custom_vmap(call)

    @batched.def_vmap
    def _(*_: object) -> NoReturn:
        raise ValueError(f"compiled kernels cannot be mapped by jax.vmap; {INSTEAD}")

    return batched


def _refuse(*_: object) -> NoReturn:
    raise ValueError(f"loops of unknown length have no gradient; {INSTEAD}")


_no_reverse = Primitive("no_reverse")
_no_reverse.def_impl(lambda x: x)
_no_reverse.def_abstract_eval(lambda x: x)
ad.deflinear(_no_reverse, _refuse)
batching.defvectorized(_no_reverse)
mlir.register_lowering(_no_reverse, mlir.lower_fun(lambda x: x, multiple_results=False))


def no_reverse(x: jax.Array) -> jax.Array:
    """Return x, such that its gradient raises ValueError, while jax.jvp and jax.vmap work."""
    return _no_reverse.bind(x)

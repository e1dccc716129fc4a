"""The mixture of experts: no row depends on the others, with all optimizations of XLA.

Dimension letters as in mixture.py.
"""

import functools

import jax
import numpy as np
import pytest
from test_mixture import FORMS, expert_weights, masked, mix, random_tokens


@functools.partial(jax.jit, static_argnames="form")
def serve(params, tokens, *, form):
    return mix(FORMS[form], params, tokens)


@pytest.mark.parametrize(
    ("form", "tokens", "experts", "chosen"),
    [("chosen", 128, 8, 2), ("xla_cpu", 128, 8, 2), ("xla_cpu", 37, 4, 1), ("cpu", 37, 4, 1)],
)
def test_row_is_bitwise_independent_of_other_rows(form, tokens, experts, chosen):
    """A request's answer must not depend on the other requests in its batch.

    The other rows decide in which block and at which place of it a row is, and how many blocks
    there are.
    """
    params = jax.device_put(expert_weights((experts,), "int8"))
    mine = random_tokens(1, experts, chosen, seed=9)
    rng = np.random.default_rng(4)
    seen, blocks = set(), set()
    for trial in range(12):
        others = random_tokens(tokens, experts, chosen, seed=100 + trial)
        others = others._replace(x=others.x * np.float32(10.0 ** rng.integers(-3, 4)))
        if trial % 3 == 1:  # all choose the experts of this row
            others.index[:] = mine.index
        if trial % 3 == 2:
            others = masked(others, rng.random(tokens) < rng.random(), experts)
        row = int(rng.integers(tokens))
        for theirs, own in zip(others, mine, strict=True):
            theirs[row] = own[0]
        seen.add(np.asarray(serve(params, others, form=form))[row].tobytes())
        blocks.add(int(np.sum(np.asarray(others.index)[:row] == mine.index[0, 0])))
    assert len(blocks) > 3  # the row was at different places
    assert len(seen) == 1

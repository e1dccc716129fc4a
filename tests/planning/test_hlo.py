"""Reading the text of compiled programs: loops, collectives and fusions."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from grok1.parallel.sharding import make_mesh
from grok1.planning import hlo


def text_of(function, *shapes):
    return jax.jit(function).lower(*shapes).compile().as_text()


def float32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def sines(text):
    """Return how often sine operations run."""
    return sum(each.times for each in hlo.operations(text) if each.opcode == "sine")


def test_trip_counts_of_nested_loops_multiply():
    def program(x):
        def outer(x, _):
            inner, _ = lax.scan(lambda y, _: (jnp.sin(y @ y), None), x, None, length=5)
            return inner, None

        return lax.scan(outer, x, None, length=7)[0] @ x

    assert sines(text_of(program, float32(8, 8))) == 35


def test_loop_of_unknown_length_counts_once():
    def program(x, n):
        return lax.fori_loop(0, n, lambda _, x: jnp.sin(x), x)

    assert sines(text_of(program, float32(8), jax.ShapeDtypeStruct((), jnp.int32))) == 1


def test_collectives_have_shapes_and_device_counts():
    def local(x):
        def layer(x, _):
            return x + lax.psum(jnp.sin(x), "model"), None

        x, _ = lax.scan(layer, x, None, length=3)
        y = lax.all_gather(x, "model", axis=0, tiled=True)
        z = lax.psum_scatter(y, "model", scatter_dimension=0, tiled=True)
        return lax.ppermute(z, "data", [(0, 1), (1, 0)])

    program = jax.shard_map(
        local, mesh=make_mesh((2, 4)), in_specs=P("model"), out_specs=P("model"), check_vma=False
    )
    text = text_of(program, float32(16, 4))
    got = {(o.opcode, o.outputs, o.times, o.devices) for o in hlo.collectives(text)}
    expected = {
        ("all-reduce", (("float32", (4, 4)),), 3, 4),
        ("all-gather", (("float32", (16, 4)),), 1, 4),
        ("reduce-scatter", (("float32", (4, 4)),), 1, 4),
    }
    assert expected <= got
    assert {kind for kind, *_ in got} <= {*(kind for kind, *_ in expected), "collective-permute"}
    sizes_in_bytes = {o.opcode: o.nbytes for o in hlo.collectives(text)}
    assert sizes_in_bytes["all-gather"] == 16 * 4 * 4


WRITTEN = """
HloModule jit_f

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%fused (p: s8[2,3]) -> bf16[6] {
  %p = s8[2,3]{1,0} parameter(0)
  %c = bf16[2,3]{1,0} convert(%p)
  ROOT %r = bf16[6]{0} dynamic-update-slice(%c)
}

%unused (p: f32[]) -> f32[] {
  ROOT %s = f32[] sine(%p)
}

ENTRY %main (a: s8[2,3]) -> (bf16[6], f32[4,5]) {
  %a = s8[2,3]{1,0} parameter(0)
  %f = bf16[6]{0} fusion(%a), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/write"}
  %half = (f32[1,5]{1,0}, /*index=1*/f32[4,5]{1,0}) all-gather-start(%f), replica_groups=[2,4]<=[8]
  %done = f32[4,5]{1,0} all-gather-done(%half)
  %all = (pred[7]{0}, u8[]) all-to-all(%f), replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %t = (bf16[6]{0}, f32[4,5]{1,0}) tuple(%f, %done)
}
"""


def test_gpu_collectives_and_device_groups_are_parsed():
    """A GPU's collectives are split in two operations; device groups have several notations."""
    start, exchange = hlo.collectives(WRITTEN)
    assert (start.opcode, start.devices, start.times) == ("all-gather", 4, 1)
    assert start.outputs == (("float32", (4, 5)),)
    assert (exchange.opcode, exchange.devices) == ("all-to-all", 2)
    assert exchange.outputs == (("bool", (7,)), ("uint8", ())) and exchange.nbytes == 8


def test_operations_within_fusions_are_marked():
    found = {operation.name: operation for operation in hlo.operations(WRITTEN)}
    assert "s" not in found  # nothing calls it
    assert found["f"].root == "dynamic-update-slice" and not found["f"].fused
    assert found["f"].source == "jit(f)/write"
    assert found["c"].fused and found["r"].fused and not found["done"].fused
    assert found["c"].outputs == (("bfloat16", (2, 3)),) and found["p"].outputs[0][0] == "int8"


def test_text_without_an_entry_is_rejected():
    with pytest.raises(ValueError, match="text of a compiled program"):
        hlo.operations("module @jit_f {}")

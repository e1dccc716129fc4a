"""What a step runs, reads and takes on a GPU, of programs whose counts are known by hand."""

import dataclasses

import pytest

from grok1.planning import hlo
from grok1.planning.accelerators import ACCELERATORS
from grok1.planning.gpu_program import Kernel, Program
from grok1.planning.projection import (
    BANDWIDTH_SHARE,
    COLLECTIVE_S,
    CONDITIONAL_S,
    LAUNCH_S,
    inspect_step,
)
from grok1.planning.sizes import Work
from grok1.planning.traffic import bytes_read

LAYERS = 4
WRITTEN = """
HloModule jit_decode

%slice (stack: s8[4,8,8], i: s32[]) -> s8[1,8,8] {
  %stack = s8[4,8,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %own = s8[1,8,8]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,8,8}
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %added = f32[] add(%a, %b)
}

%twice (pair: (s32[], f32[8])) -> (s32[], f32[8]) {
  %pair = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%pair), index=0
  %v = f32[8]{0} get-tuple-element(%pair), index=1
  %w = f32[8]{0} sine(%v)
  ROOT %both = (s32[], f32[8]{0}) tuple(%j, %w)
}

%layer (carry: (s32[], f32[8], s8[4,8,8])) -> (s32[], f32[8], s8[4,8,8]) {
  %carry = (s32[], f32[8]{0}, s8[4,8,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[8]{0} get-tuple-element(%carry), index=1
  %stack = s8[4,8,8]{2,1,0} get-tuple-element(%carry), index=2
  %own = s8[1,8,8]{2,1,0} fusion(%stack, %i), kind=kLoop, calls=%slice
  %y = f32[8]{0} custom-call(%x, %own), custom_call_target="__cublas$gemm"
  %start = f32[8]{0} all-reduce-start(%y), replica_groups={{0,1}}, to_apply=%sum
  %z = f32[8]{0} all-reduce-done(%start)
  %begin = (s32[], f32[8]{0}) tuple(%i, %z)
  %inner = (s32[], f32[8]{0}) while(%begin), condition=%go, body=%twice, \
backend_config={"known_trip_count":{"n":"2"}}, metadata={op_name="jit(decode)/while"}
  %after = f32[8]{0} get-tuple-element(%inner), index=1
  ROOT %out = (s32[], f32[8]{0}, s8[4,8,8]{2,1,0}) tuple(%i, %after, %stack)
}

%go (any: s32[]) -> pred[] {
  %any = s32[] parameter(0)
  ROOT %less = pred[] compare(%any, %any), direction=LT
}

%yes (c: f32[8]) -> f32[8] {
  %c = f32[8]{0} parameter(0)
  ROOT %negated = f32[8]{0} negate(%c)
}

%no (d: f32[8]) -> f32[8] {
  %d = f32[8]{0} parameter(0)
  %e = f32[8]{0} cosine(%d)
  ROOT %f = f32[8]{0} sine(%e)
}

%started (g: f32[8]) -> f32[8] {
  %g = f32[8]{0} parameter(0)
  ROOT %copied = f32[8]{0} copy(%g)
}

ENTRY %main (x: f32[8], stack: s8[4,8,8], p: pred[]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %stack = s8[4,8,8]{2,1,0} parameter(1)
  %p = pred[] parameter(2)
  %zero = s32[] constant(0)
  %init = (s32[], f32[8]{0}, s8[4,8,8]{2,1,0}) tuple(%zero, %x, %stack)
  %loop = (s32[], f32[8]{0}, s8[4,8,8]{2,1,0}) while(%init), condition=%go, body=%layer, \
backend_config={"known_trip_count":{"n":"4"}}, metadata={op_name="jit(decode)/transformer/while"}
  %last = f32[8]{0} get-tuple-element(%loop), index=1
  %asked = ((f32[8]{0}), f32[8]{0}, s32[]) async-start(%last), calls=%started
  %given = f32[8]{0} async-done(%asked)
  ROOT %r = f32[8]{0} conditional(%p, %given, %last), true_computation=%yes, false_computation=%no
}
"""
WORK = Work(bytes=100.0, operations=1e9, experts=0.25)
H100 = ACCELERATORS["h100"]


def step(text: str = WRITTEN, accelerator=H100, work=WORK):
    return inspect_step(Program(text, 1000, 50, {"k": Kernel(64, 0)}), accelerator, LAYERS, work)


def test_launches_exchanges_loops_and_branches_are_counted():
    """Not tuples, parameters and the ends of operations; both branches; loops by their length."""
    found = step()
    assert found.layer.launches == 4  # a fusion, a product, two sines
    assert found.layer.exchanges == {"all-reduce": {"count": 1, "bytes": 32, "sent": 32}}
    assert (found.layer.loops, found.layer.conditionals) == (1, 0)
    assert found.outside.launches == 4  # a copy, and of both branches negate, cosine, sine
    assert (found.outside.loops, found.outside.conditionals) == (1, 1)
    assert found.outside.exchanges == {}
    assert found.all_exchanges(LAYERS) == {"all-reduce": {"count": 4, "bytes": 128, "sent": 128}}


def test_bytes_that_are_read_are_those_of_the_operands():
    """Of a stack only the slice; the exchange's operand, too."""
    slice_, product, exchange, sines = 64 + 4, 32 + 64, 32, 2 * 32
    outside = 32 + 32 + 32 + 32
    assert bytes_read(WRITTEN, 1.0) == 4 * (slice_ + product + exchange + sines) + outside


def test_an_update_in_place_reads_what_it_writes():
    text = """
%update (cache: f32[100,8], new: f32[1,8], i: s32[]) -> f32[100,8] {
  %cache = f32[100,8]{1,0} parameter(0)
  %new = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %u = f32[100,8]{1,0} dynamic-update-slice(%cache, %new, %i, %i)
}

ENTRY %main (cache: f32[100,8], new: f32[1,8], i: s32[]) -> f32[100,8] {
  %cache = f32[100,8]{1,0} parameter(0)
  %new = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[100,8]{1,0} fusion(%cache, %new, %i), kind=kLoop, calls=%update
}
"""
    assert bytes_read(text, 1.0) == 32 + 4


KERNEL = """
ENTRY %main (l: s32[]) -> f32[1,2,32] {{
  %l = s32[] parameter(0)
  %s = s32[9]{{0}} parameter(1)
  %x = bf16[2,64]{{1,0}} parameter(2)
  %w = s8[4,{groups},64,32]{{3,2,1,0}} parameter(3)
  %g = bf16[4,{groups},1,32]{{3,2,1,0}} parameter(4)
  ROOT %y = f32[1,2,32]{{2,1,0}} custom-call(%l, %s, %x, %w, %g), custom_call_target="triton", \
metadata={{op_name="jit(decode)/grouped_product/pallas_call"}}
}}
"""


@pytest.mark.parametrize(("groups", "share"), [(8, 0.25), (1, 1.0)])
def test_a_product_reads_one_layer_of_the_experts_in_use(groups, share):
    """Of a single matrix all; the four layers of the stack are operands."""
    text = KERNEL.format(groups=groups)
    own = groups * 64 * 32 + groups * 32 * 2
    assert bytes_read(text, 0.25) == 2 * 64 * 2 + share * own


@pytest.mark.parametrize("name", ["h100", "l40s"])
def test_the_projection_is_the_sum_of_its_parts(name):
    accelerator = ACCELERATORS[name]
    found = step(accelerator=accelerator).projection
    reading = 1168 / (BANDWIDTH_SHARE * accelerator.bandwidth)
    computing = 1e9 / accelerator.rate
    launches = (4 * 4 + 4) * LAUNCH_S
    exchanges = 4 * COLLECTIVE_S[accelerator.link] + 128 / accelerator.link_bandwidth
    expected = (reading, computing, launches, exchanges, CONDITIONAL_S)
    parts = dataclasses.astuple(found)
    assert parts[:-1] == pytest.approx(expected)
    assert found.total == pytest.approx(computing + launches + exchanges + CONDITIONAL_S)
    slow = step(accelerator=dataclasses.replace(accelerator, bandwidth=1.0)).projection
    assert slow.total == pytest.approx(
        1168 / BANDWIDTH_SHARE + launches + exchanges + CONDITIONAL_S
    )


def test_operations_know_their_loops_and_operands():
    found = {(o.computation, o.name): o for o in hlo.operations(WRITTEN)}
    sine = found["twice", "w"]
    assert [loop.length for loop in sine.loops] == [4, 2] and sine.times == 8
    assert sine.loops[0].source.endswith("transformer/while") and sine.operands == ("v",)
    assert found["main", "p"].operands == ("2",)
    assert found["layer", "own"].calls == ("slice",)
    assert found["slice", "own"].fused and not found["slice", "own"].launched
    assert found["started", "copied"].launched and not found["main", "given"].launched
    assert ("go", "less") not in found  # a loop of known length asks nothing

"""The 314-billion-parameter configuration: never run here, but compiled and measured."""

import dataclasses
import functools
import math
import time
from collections import Counter

import pytest

from grok1 import hlo
from grok1.execution import fastest
from grok1.parallel.sharding import make_mesh
from grok1.serving.steps import abstract_inputs, decode, prefill
from model import grok_1

GIB = 2**30
LAYERS, WIDTH, VOCAB, CONTEXT = 64, 6144, 131072, 8192
MESHES = [(1, 8), (2, 4)]


@functools.cache
def step(name: str, sizes: tuple[int, int], sharded: bool = True):
    """Compile a step of Grok-1 for a mesh; returns it and its abstract inputs."""
    config = grok_1()
    mesh = make_mesh(sizes, num_kv_heads=config.model.num_kv_heads)
    execution = fastest(config, mesh, compiled=False).prefill
    execution = dataclasses.replace(execution, shard_activations=sharded)
    chunk = {"prefill": 1024, "decode": None}[name]
    arguments = abstract_inputs(config, execution, batch=sizes[0], chunk=chunk)
    jitted = prefill if chunk else decode
    lowered = jitted.lower(*arguments, config=config, execution=execution)
    return hlo.compile_for_inspection(lowered), arguments


@pytest.mark.slow
@pytest.mark.timed
def test_prefill_and_decode_compile_within_20_seconds():
    """Unrolled layers took the original over nine minutes."""
    config = grok_1()
    mesh = make_mesh((1, 8), num_kv_heads=config.model.num_kv_heads)
    began = time.perf_counter()
    executions = fastest(config, mesh, compiled=False)
    for jitted, chunk, how in zip((prefill, decode), (1024, None), executions, strict=True):
        arguments = abstract_inputs(config, how, batch=1, chunk=chunk)
        jitted.lower(*arguments, config=config, execution=how).compile()
    assert time.perf_counter() - began < 20


def test_prefill_and_decode_fit_80_gb_on_each_of_eight_devices():
    """The original needs 65 GB a GPU."""
    for name in ("prefill", "decode"):
        program, arguments = step(name, (1, 8))
        memory = program.memory_analysis()
        device = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        print(name, device / GIB, memory.argument_size_in_bytes / GIB)
        assert device <= 39 * GIB
        # What is donated comes back in place: at least the cache of 64 layers.
        cache = math.prod(arguments[1].memory.layers.k.shape) * 2 * 2 / 8
        assert memory.alias_size_in_bytes >= cache


def exchanged(sizes, sharded):
    """Return what devices exchange in a decode step, in the loop over layers and outside of it.

    Two counters of (kind, shape on a device).
    """
    every = hlo.collectives(step("decode", sizes, sharded)[0].as_text())
    # Whether any slot goes on, which all parts of the data axis must know.
    flags = [operation for operation in every if operation.outputs[0][0] == "bool"]
    assert [(o.devices, o.times, o.nbytes) for o in flags] == [(sizes[0], 1, 2)] * (sizes[0] > 1)
    found = [operation for operation in every if operation not in flags]
    assert {operation.devices for operation in found} == {sizes[1]}, "all along the model axis"
    assert {operation.times for operation in found} == {1, LAYERS}
    inside, outside = (
        Counter((o.opcode, o.outputs[0][1]) for o in found if o.times == times)
        for times in (LAYERS, 1)
    )
    return inside, outside


@pytest.mark.parametrize("sizes", MESHES)
def test_a_layer_costs_two_all_reduces_and_a_step_one_more_and_the_logits(sizes):
    """The original pays four all-to-alls a layer, for a cache that lies over the sequence."""
    inside, outside = exchanged(sizes, sharded=False)
    assert inside == {("all-reduce", (1, 1, WIDTH)): 2}
    # The embedding, and the rows that sampling looks at.
    assert outside == {("all-reduce", (1, 1, WIDTH)): 1, ("all-gather", (1, 1, VOCAB)): 1}


@pytest.mark.parametrize("sizes", MESHES)
def test_sharded_activations_cost_two_gathers_and_a_number_per_norm_more(sizes):
    inside, outside = exchanged(sizes, sharded=True)
    assert inside == {
        ("all-reduce", (1, 1, WIDTH)): 1,
        # In place of the mixture's all-reduce: half of one.
        ("reduce-scatter", (1, 1, WIDTH // sizes[1])): 1,
        ("all-gather", (1, 1, WIDTH)): 2,
        ("all-reduce", (1, 1)): 4,
    }
    # The embedding, the final norm, and what sampling needs: its input and its rows.
    assert outside == {
        ("all-reduce", (1, 1, WIDTH)): 1,
        ("all-reduce", (1, 1)): 1,
        ("all-gather", (1, 1, WIDTH)): 1,
        ("all-gather", (1, 1, VOCAB)): 1,
    }


@pytest.mark.parametrize("name", ["decode", "prefill"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("sizes", MESHES)
def test_nothing_large_is_copied(sizes, sharded, name):
    """No second stacked cache, no layer's eight experts, no weight gathered from its shards."""
    program, _ = step(name, sizes, sharded)
    model = sizes[1]
    # On a device: the cache of all layers, one expert's matrix, and the table of embeddings.
    stack = (LAYERS, 1, CONTEXT, 8 // model, 128)
    expert, table = WIDTH * 32768 // model, (VOCAB // model, WIDTH)
    weights = [(WIDTH, 32768), (WIDTH, VOCAB), (WIDTH, WIDTH), (1024, WIDTH)]
    handed_on = {"parameter", "get-tuple-element", "tuple", "while", "bitcast", "conditional"}
    written = []
    tokens = 1024 if name == "prefill" else 1
    own = [table, table[::-1], (1, tokens, WIDTH), (tokens, WIDTH)]  # and the activations
    for operation in hlo.operations(program.as_text()):
        if operation.fused or operation.opcode in handed_on:
            continue
        for dtype, shape in operation.outputs:
            size = math.prod(shape)
            if shape == stack and operation.root == "dynamic-update-slice":
                written.append(operation)
                continue
            assert size != math.prod(stack), operation
            # Whatever is made of stored numbers is at most one expert's matrix. (Larger arrays of
            # floats are a prefill's attention scores, and the table for a CPU's product.)
            assert "int" not in dtype or size <= expert, operation
            assert size != 8 * expert, operation
            longer = tuple(sorted(n for n in shape if n > 1))
            assert longer not in weights or shape in own, operation
    # Keys and values, in the loop over layers.
    assert [operation.times for operation in written] == [LAYERS] * 2

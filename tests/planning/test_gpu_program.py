"""Programs for GPUs that are not there, compiled by NVIDIA's compiler."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import golden
from grok1.parameters import shapes_with_4_bits
from grok1.planning import gpu_program, plan, text
from grok1.planning.accelerators import ACCELERATORS, NVLINK
from grok1.planning.projection import inspect_step
from grok1.planning.sizes import least_work
from grok1.planning.traffic import bytes_read
from model import grok_1

TINY = golden.config("three-layers", "bfloat16")
H100 = ACCELERATORS["h100"]


# ------------------------------------------------------------------------- what can be missing


def test_a_plugin_of_another_version_is_named(monkeypatch):
    other = SimpleNamespace(version="0.1.2")
    monkeypatch.setattr(gpu_program, "installed", lambda _: other)
    said = (
        r"jax-cuda12-plugin: expected version [\d.]+ as of jaxlib, got 0\.1\.2; remove it, .*pip .*"
    )
    assert re.fullmatch(said, gpu_program.missing() or "")


def test_a_missing_assembler_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_program, "PLUGINS", ("jaxlib", "jaxlib"))
    monkeypatch.setattr(gpu_program, "NVCC", "no-such-package")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert str(gpu_program.missing()).startswith("NVIDIA's assembler, ptxas, was not found; run: ")


def test_a_path_for_programs_that_is_a_file_is_refused(tmp_path):
    """Before anything is compiled."""
    (tmp_path / "file").touch()
    gpus = plan.Gpus(H100, save=tmp_path / "file")
    with pytest.raises(ValueError, match=r"/file: expected a directory .* \(File exists\); give"):
        plan.make_plan(TINY, (1, 1), gpus=gpus)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--accelerator", "h100"], "--accelerator needs --plan"),
        (["--plan", "--save-programs", "there"], "--save-programs needs --accelerator"),
        (["--plan", "--shard-activations"], "--shard-activations needs --accelerator"),
        (["--plan", "--accelerator", "h1000"], "invalid choice: 'h1000'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(command, arguments, message):
    result = command(*arguments)
    assert result.status == 2 and message in result.err and result.out == ""


@pytest.mark.parametrize("name", ACCELERATORS)
def test_descriptions_are_of_real_gpus(name):
    """A slip of the pen by a factor of ten would be outside these ranges."""
    found = ACCELERATORS[name]
    assert found.core_threads % 32 == 0 and found.block_memory < found.core_memory
    assert 50 < found.rate / found.bandwidth < 450  # operations per byte
    assert (found.link == NVLINK) == (found.link_bandwidth > 100e9)
    assert f"core_count: {found.cores}" in found.target_config()


# ------------------------------------------------------------------------------ with the compiler


@pytest.fixture(scope="module")
def decode(tmp_path_factory):
    """Grok-1 on eight H100s: the plan for one sequence, and where its programs were written."""
    directory = tmp_path_factory.mktemp("programs")
    found = plan.make_plan(grok_1(), (1, 8), gpus=plan.Gpus(H100, save=directory))
    assert found.gpu is not None, found.note
    return found, directory


@pytest.mark.slow
def test_grok_1_on_eight_h100s_fits_and_reads_little_more_than_it_must(decode):
    found, directory = decode
    assert found.fits and found.peak < 45 * 2**30
    step, prefill = found.gpu["decode"], found.gpu["prefill"]
    assert step.layer.exchanged == step.layer.exchanges["all-reduce"]["count"] == 2
    assert 8 < step.layer.launches <= 14 and step.layer.conditionals == 0
    assert 20 < step.outside.launches <= 40 and step.outside.conditionals == 1
    assert all(each["bytes"] <= 2**21 for each in step.outside.exchanges.values())
    assert 1 < step.read / step.must_read < 1.05 and step.temporaries < 0.01 * 2**30
    assert step.projection.total < 1 / 155
    assert 16 < prefill.layer.launches <= 24 and prefill.layer.exchanged == 2
    assert all(k.spilled == 0 < k.registers for s in (step, prefill) for k in s.kernels.values())
    assert len(step.kernels) > 3 and len(prefill.kernels) > 3
    for name in ("decode", "prefill"):
        assert "ENTRY" in (directory / f"{name}.txt").read_text()
    assert "as compiled for NVIDIA H100" in text.format_plan(found)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["gpu"]["decode"]["layer"]


@pytest.mark.slow
def test_the_projection_of_batch_1_is_the_sum_of_its_parts(decode):
    """Of the counts, and constants typed here: 15 us are those of a conditional."""
    step = decode[0].gpu["decode"]
    layer, outside = step.layer, step.outside
    reading = step.read / (0.85 * 3.35232e12)
    launches = (64 * layer.launches + outside.launches) * 1.5e-6
    sums = 64 * layer.exchanges["all-reduce"]["bytes"] + outside.exchanges["all-reduce"]["bytes"]
    reduced = sums * 2 * 7 / 8
    gathered = outside.exchanges["all-gather"]["bytes"] * 7 / 8
    exchanges = (64 * 2 + outside.exchanged) * 8e-6 + (reduced + gathered) / 450e9
    assert step.read / 3.35232e12 > 180.4e9 / 8 / 989e12  # computing takes less than reading
    total = reading + launches + exchanges + 15e-6
    assert step.projection.total == pytest.approx(total, rel=1e-9)


@pytest.mark.slow
def test_eight_sequences_take_the_launches_of_one(decode):
    """And no loop over the sequences in a layer; each expert in use is read once."""
    job = gpu_program.Job(grok_1(), (1, 8), H100, 8, 1024, "gpu", False, None, ("decode",))
    program = gpu_program.compile_for(job)["decode"]
    work = least_work(grok_1(), (1, 8), 8, 8, None)
    alone, together = decode[0].gpu["decode"], inspect_step(program, H100, 64, work)
    assert alone.layer.launches <= together.layer.launches <= 16 and together.layer.loops == 0
    assert together.layer.exchanged == together.layer.exchanges["all-reduce"]["count"] == 2
    assert 3 * alone.read < together.read < 1.1 * together.must_read


@pytest.mark.slow
def test_experts_of_4_bits_take_the_launches_of_8(decode):
    shapes = shapes_with_4_bits(grok_1().param_shapes())
    job = gpu_program.Job(grok_1(), (1, 8), H100, 1, 1024, "gpu", False, shapes, ("decode",))
    program = gpu_program.compile_for(job)["decode"]
    step = inspect_step(program, H100, 64, least_work(grok_1(), (1, 8), 1, 1, shapes))
    usual = decode[0].gpu["decode"]
    assert step.layer.launches == usual.layer.launches and step.layer.exchanged == 2
    assert step.read < 1.05 * step.must_read < 0.62 * usual.read
    assert step.projection.total < 1 / 205
    assert all(kernel.spilled == 0 < kernel.registers for kernel in step.kernels.values())


SPILLING = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry grouped_product_3(.param .u64 at){limit}
{{
  .reg .u64 %a;
  .reg .f32 %x<65>;
  ld.param.u64 %a, [at];
{loads}
{sums}
  st.global.f32 [%a], %x0;
  ret;
}}
"""


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "spills"), [("", False), ("\n.maxnreg 24", True)])
def test_a_kernel_that_spills_is_seen(tmp_path, limit, spills):
    """64 numbers are loaded before the first is used: they do not fit 24 registers."""
    loads = "\n".join(f"  ld.volatile.global.f32 %x{i}, [%a+{4 * i}];" for i in range(64))
    sums = "\n".join(f"  add.f32 %x0, %x0, %x{i};" for i in reversed(range(1, 64)))
    program = SPILLING.format(limit=limit, loads=loads, sums=sums)
    (tmp_path / "module_7.jit_decode.12.ptx").write_text(program)
    (found,) = gpu_program.inspect_kernels(tmp_path)["decode"].values()
    assert (found.spilled > 0) == spills and found.registers > 16


@pytest.mark.exhaustive
def test_fewer_partial_sums_are_fewer_bytes(monkeypatch):
    """A kernel's tiles decide how many partial sums are written, and read again."""
    job = gpu_program.Job(TINY, (1, 1), H100, 1, 128, "gpu", False, None, ("decode",))
    usual = bytes_read(gpu_program.compile_for(job)["decode"].text, 0.25)
    changed = "from grok1.kernels.gpu import decode_attention as own; own.PARTS = 4; "
    changed += gpu_program.CHILD
    monkeypatch.setattr(gpu_program, "CHILD", changed)
    fewer = bytes_read(gpu_program.compile_for(job)["decode"].text, 0.25)
    # Of each layer and query head, 12 sums of the values and one of the weights, in float32.
    heads, width = TINY.model.num_q_heads, TINY.model.key_size
    assert usual - fewer == TINY.model.num_layers * 12 * heads * (width + 1) * 4


@pytest.mark.slow
def test_weights_that_the_kernels_cannot_address_are_one_sentence():
    """jax adds lines to the error, which are not shown."""
    job = gpu_program.Job(grok_1(), (1, 1), ACCELERATORS["b200"], 1, 1024, "gpu", False, None)
    with pytest.raises(gpu_program.UnavailableError) as error:
        gpu_program.compile_for(job)
    said = "the compiler failed: a weight of shape (64, 6144, 6144): the GPU kernels take"
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


@pytest.mark.slow
def test_a_failure_of_the_compiler_is_one_sentence(tmp_path, monkeypatch):
    """The files of the current directory are not imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text('raise SystemExit("the wrong file was imported")')
    job = gpu_program.Job(TINY, (1, 1), H100, 1, 16, "no such kernels", False, None)
    with pytest.raises(gpu_program.UnavailableError, match="^the compiler failed: [^\n]*kernels"):
        gpu_program.compile_for(job)


@pytest.mark.slow
def test_the_packages_alone_suffice_and_change_nothing_else():
    """No CUDA toolkit is needed; a start of jax prints nothing and loads none of them."""
    assert gpu_program.ptxas().startswith(str(gpu_program.directory()))
    environment = {name: os.environ[name] for name in os.environ if name != "JAX_PLATFORMS"}
    program = "import jax, sys; jax.devices(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and "cuda12" not in done.stdout


# More kinds of GPUs, meshes and forms.


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "mesh", "batch", "kernels"),
    [
        ("h100", (2, 4), 2, "gpu"),
        ("h100", (1, 8), 32, "gpu"),
        ("h100", (1, 8), 1, "plain"),
        *((name, (1, 8), 1, "gpu") for name in ACCELERATORS if name != "h100"),
    ],
)
def test_grok_1_is_compiled_for_other_gpus_and_meshes(name, mesh, batch, kernels):
    gpus = plan.Gpus(ACCELERATORS[name], kernels)
    found = plan.make_plan(grok_1(), mesh, batch=batch, gpus=gpus)
    assert found.gpu is not None, found.note
    for step in found.gpu.values():
        assert step.layer.launches > 8 and step.projection.total > 0
        assert bool(step.kernels) == (kernels == "gpu")
        assert all(kernel.spilled == 0 for kernel in step.kernels.values())
    decode = found.gpu["decode"]
    assert decode.layer.exchanges["all-reduce"]["count"] == 2
    assert kernels == "plain" or (decode.layer.launches <= 14 and decode.layer.loops == 0)

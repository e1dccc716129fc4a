"""Sample text from Grok-1, or from the small demo model that comes with it.

python run.py --prompt "Once upon a time" --max-len 120 --temperature 0.7 --seed 1

With --distributed, several processes, on one or more hosts, form one run: they use the prompts and
options of process 0, which alone prints. If a process is lost, all others end and report which.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

# In the background of a shell script, Ctrl-C is ignored, and stays ignored.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    # Ctrl-C during the imports below ends the process without a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from grok1 import default_files, gpu_settings
from grok1.cli import interactive, prompts
from grok1.cli.console import (
    READING,
    ByteProgress,
    Progress,
    Worker,
    end_at_next_interrupt,
    limit_reached,
    notice_if_slow,
    open_standard_streams,
    run_command,
    say,
    write_out,
)
from grok1.cli.job import Job, agree, prepare
from grok1.cli.options import Options
from grok1.cli.output import JsonPrinter, TextPrinter, as_json
from grok1.cli.parsing import parse_arguments
from grok1.cli.startup import check_surroundings
from grok1.cli.timing import Timing, arrivals
from grok1.interrupts import uninterrupted
from grok1.parallel import multihost
from grok1.serving.request_limits import CHUNKS, SERVED_CHUNK

if TYPE_CHECKING:
    from grok1.serving.request import Completion
    from runner import InferenceRunner

ROOT = Path(__file__).resolve().parent
MOST_SLOTS = 8
MOST_DEVICES = 128  # virtual ones: more exhaust the threads and memory of a machine


def find_peers(options: Options, errors: TextIO) -> multihost.Peers:
    """Find this process's id and number among the processes of the run."""
    process = multihost.find_process(
        options.coordinator, options.num_processes, options.process_id, options.join_timeout
    )
    tell = functools.partial(say, file=errors)
    return multihost.Peers(process, options.join_timeout, options.peer_timeout, tell)


def keep_output(first: bool) -> None:
    """Reserve standard output for the answers of the first process.

    gloo, which runs the collectives of CPUs, prints lines to it from C++.
    """
    if first:
        # Never closed, so that the answers are written however the interpreter ends.
        sys.stdout = os.fdopen(os.dup(1), "w", 1, sys.stdout.encoding, closefd=False)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)


def make_server(job: Job, progress: ByteProgress, processes: int = 1) -> InferenceRunner:
    """Load the model according to the options, after checking the remaining prompts."""
    options = job.options
    mesh = options.mesh or (1, 1)
    # Virtual devices for the mesh: only read by the CPU backend of jax, when it starts.
    devices = min(math.prod(mesh) // processes, MOST_DEVICES)
    flags = os.environ.get("XLA_FLAGS", "")
    if devices > 1 and "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    with notice_if_slow("starting JAX"):
        import jax  # Takes seconds, so after all checks that do not need it.

        from grok1 import backend, compile_cache
        from grok1.kernels import dispatch as kernels
        from runner import RequestError, load_model

        backend.require_devices()
    # Not with several processes: XLA may wait until all of them compile.
    if not options.compile_cache:
        jax.config.update("jax_enable_compilation_cache", False)
    elif processes == 1 and (reason := compile_cache.enable()):
        say(reason)
    began = time.perf_counter()
    if options.kernels and backend.on_cpu():
        with notice_if_slow("compiling the CPU kernels, once"):
            kernels.available()
    progress.start()
    try:
        server = load_model(
            job.directory,
            job.tokenizer,
            mesh=mesh,
            # The same as before an interruption, since rounding depends on it.
            slots=options.batch or slots_for(len(prompts.answer_keys(options))),
            dtype=options.dtype,
            context=options.context,
            requests=prompts.make_requests(options, job.left),
            progress=progress,
            kernels=options.kernels,
            compile_cache=False,  # if used, it is enabled above
            pad_sizes=chunks(options.chunk or longest_chunk(options)),
            prefix_cache=options.prefix_cache,
        )
    except RequestError as error:
        line = options.lines[job.left[error.index]]
        reason = prompts.with_options(error.reason, line.settings)
        raise ValueError(f"{line.place}: {reason}") from error
    progress.close()
    dtype = jax.numpy.dtype(server.config.fprop_dtype).name
    say(
        f"loaded {job.directory} in {time.perf_counter() - began:.1f} s: "
        f"{server.config.model.num_layers} layers, {dtype} activations, "
        f"mesh {mesh[0]},{mesh[1]} on {jax.devices()[0].device_kind}"
    )
    describe_use(server, job.directory)
    return server


def describe_use(server: InferenceRunner, directory: Path) -> None:
    """Say what a token costs if the files are used in place."""
    import checkpoint
    from grok1.planning import in_place

    if not checkpoint.used_in_place(directory):
        return
    if server.mesh is not None:
        say("the files were copied to memory: several devices cannot use them in place")
        return
    stored = checkpoint.shapes_in(directory, server.config)
    say(in_place.sentence(in_place.estimate(server.config, stored, directory)))


def slots_for(answers: int) -> int:
    """Return how many sequences to serve at once: a power of two, as each number recompiles."""
    return min(1 << (answers - 1).bit_length(), MOST_SLOTS)


def longest_chunk(options: Options) -> int:
    """Return the default of --chunk: short for a server on a CPU, where others wait for it."""
    from grok1 import backend

    return SERVED_CHUNK if options.serve and backend.on_cpu() else CHUNKS[-1]


def chunks(longest: int) -> list[int]:
    """Return the lengths of the chunks in which prompts are read."""
    return [*(size for size in CHUNKS if size < longest), longest]


def generate(
    worker: Worker,
    server: InferenceRunner,
    job: Job,
    phase: Callable[[str], object] = lambda _: None,
) -> str | None:
    """Print the remaining answers, or write them to a file; then print a line of statistics.

    Returns an error message if some of them ended with an error, otherwise None.
    """
    from runner import MOST_TOKENS

    options, answers = job.options, job.answers
    if options.show_routing and server.config.model.num_experts < 2:
        raise ValueError("--show-routing: this model has no experts to route tokens to")
    # If answers are not streamed, draw several tokens per dispatch, which is faster.
    tokens = 1 if options.streamed else MOST_TOKENS
    events = server.generate_events(prompts.make_requests(options, job.left), phase, tokens)
    with Progress("answering", already=len(answers.done) if answers else 0) as progress:
        if answers:
            answers.progress = progress
            progress(len(answers.done), len(answers.keys))
        printer = answers or make_printer(options)
        timing = Timing(tokens)
        ended = {}  # answers whose routing is to be shown
        failed = {}
        try:
            # If answers go to a file, a progress bar is shown instead.
            said = contextlib.nullcontext() if answers else notice_if_slow(READING)
            for event, now in arrivals(lambda: worker.call(next, events, None), said):
                if not timing.tokens:
                    progress.start()  # leave compilation out of the estimate
                key = event.request, event.sample
                if event.finish_reason == "error":
                    failed[key] = event.completion.error
                else:
                    prompt = 0 if event.sample else len(event.completion.prompt_ids)
                    timing.take(key, event.finish_reason is not None, prompt, now)
                    if options.show_routing and event.finish_reason is not None:
                        ended[key] = event.completion
                with uninterrupted(signal.SIGINT, multihost.WAKE):
                    printer.show(event._replace(request=job.left[event.request]))
        finally:
            # Also after an interruption, so that no computed answer is lost.
            with uninterrupted(multihost.WAKE):
                printer.close()
    say(timing.line())
    for index, sample in sorted(ended):
        several = f".{sample + 1}" if options.num_samples > 1 else ""
        write_out(f"\nexperts of [{index + 1}{several}], best first")
        show_routing(worker, server, ended[index, sample])
    if options.stats:
        say(timing.block(statistics_of(server)))
    if not failed:
        return None
    (index, _), error = min(failed.items())
    others = f" ({len(failed)} answers ended with an error)" if len(failed) > 1 else ""
    return f"{options.lines[job.left[index]].place}: {error}{others}"


def show_routing(worker: Worker, server: InferenceRunner, answer: Completion) -> None:
    """Print the experts to which the tokens of a prompt and its answer were routed."""
    from grok1.cli.routing_table import print_routing

    ids = [*answer.prompt_ids, *answer.token_ids][: server.config.sequence_len]
    found = worker.call(server.inspect, ids, ("expert_index",))
    pieces = found.pieces or [str(token) for token in ids]
    print_routing(pieces, found.captured.expert_index, server.config.model.num_experts)


def statistics_of(server: InferenceRunner) -> list[tuple[str, str]]:
    """Return the server's statistics as pairs of name and value."""
    done = server.statistics
    if not done.tokens:
        return []
    host = 1e3 * (done.seconds - done.waiting) / done.tokens
    return [
        ("slots used", f"{done.slots_used:.1f} of {server.num_slots} on average"),
        ("host's work", f"{host:.2f} ms a token, {done.host_share:.0%} of the time"),
    ]


def make_printer(options: Options) -> JsonPrinter | TextPrinter:
    """Return the printer of the answers to standard output."""
    keys = prompts.answer_keys(options)
    if options.json:
        return JsonPrinter(keys, [line.id for line in options.lines])
    return TextPrinter([line.prompt for line in options.lines], keys)


def serve(worker: Worker, options: Options) -> None:
    """Load the model and answer, in one process."""
    job = prepare(options)
    if all_answered(job):
        return
    with ByteProgress("loading") as progress:
        server = worker.call(make_server, job, progress)
    if options.interactive:
        make = functools.partial(prompts.request_for, options)
        settings = interactive.Settings(make, server.check, options.seed)
        interactive.run_session(worker, server, settings, options.stats)
    elif failure := generate(worker, server, job):
        raise ValueError(failure)


def serve_http(worker: Worker, options: Options) -> None:
    """Load the model and answer by HTTP until a signal."""
    try:
        from grok1.serving.http import serve as http
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--serve: {error.name} is not installed; run: pip install -r requirements-serve.txt"
        ) from error
    from grok1.serving.http.app import Api
    from grok1.serving.http.chat import Template
    from grok1.serving.http.engine import Engine

    assert options.serve is not None
    host, port = options.serve
    template = Template(options.chat_template)
    address = http.bind(host, port)
    job = prepare(dataclasses.replace(options, batch=options.batch or MOST_SLOTS))
    with ByteProgress("loading") as progress:
        server = worker.call(make_server, job, progress)
    with notice_if_slow("compiling all steps"):
        worker.call(http.compile_all, server)
    engine = Engine(server, options.most_waiting)
    api = Api(engine, job.directory.name, template, options.api_key, options.cors)
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    http.run(api, address, options.grace, lambda: say(f"ready: {where}, model {api.name}"), say)


def connect_processes(server: InferenceRunner, peers: multihost.Peers) -> None:
    """Wait until all processes have loaded the model, and connect their devices."""
    from grok1.parallel.sharding import connect

    peers.wait_for_all()
    if server.mesh is not None:
        connect(server.mesh)


def serve_distributed(worker: Worker, options: Options, peers: multihost.Peers) -> None:
    """Load the model and answer, as one of several processes."""
    first = peers.process.process_id == 0
    if not first:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # they only report what ended them
    worker.call(peers.join)
    peers.phase("load")
    job = worker.call(agree, peers, options)
    keep_output(first)  # after opening --output, which may be /dev/stdout
    count = peers.process.num_processes
    if not all_answered(job):
        with ByteProgress("loading") as progress:
            server = worker.call(make_server, job, progress, count)
        worker.call(connect_processes, server, peers)
        failure = generate(worker, server, job, peers.phase)
        if failure and first:  # it has all answers, and ends the others
            raise ValueError(failure)
    worker.call(peers.close)


def all_answered(job: Job) -> bool:
    """Report and return whether all prompts have been answered already."""
    if not job.left:
        count = len(prompts.answer_keys(job.options))
        say(f"{job.options.output} holds all {count} answers already")
    return not job.left


def show_plan(options: Options) -> None:
    """Print whether the model fits a mesh, without reading weights or using an accelerator."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Replaced by jax_num_cpu_devices below, once the size of the mesh is known.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = re.sub(r"\S*xla_force_host_platform_device_count\S*", "", flags)
    with notice_if_slow("starting JAX"):
        import jax

        from checkpoint import config_in
        from grok1.planning import plan, text
        from grok1.planning.accelerators import ACCELERATORS
        from model import grok_1
        from runner import with_settings

    directory = options.checkpoint
    if directory is None and default_files.default_checkpoint() == default_files.RELEASED:
        directory = default_files.RELEASED
    config = grok_1() if directory is None else config_in(directory)
    dtype, mesh = ("float32", (1, 1)) if options.mapped else ("bfloat16", options.mesh)
    config = with_settings(config, options.dtype or dtype, options.context)
    jax.config.update("jax_num_cpu_devices", plan.devices_for(config, mesh))
    gpus = None
    if options.accelerator is not None:
        kernels = "gpu" if options.kernels else "plain"
        how = kernels, options.shard_activations, options.save_programs
        gpus = plan.Gpus(ACCELERATORS[options.accelerator], *how)
    with notice_if_slow("compiling the model for its mesh, without weights"):
        found = plan.make_plan(
            config,
            mesh,
            batch=options.batch,
            device_memory=int(options.device_memory) if options.device_memory else None,
            bandwidth=options.bandwidth,
            directory=directory,
            int4_experts=options.experts == "int4",
            used_in_place=options.mapped,
            gpus=gpus,
        )
    write_out(as_json(dataclasses.asdict(found)) if options.json else text.format_plan(found))


def fail(error: Exception, peers: multihost.Peers | None, errors: TextIO) -> int:
    """Report an error, also to the other processes, and return the exit status.

    An unexpected error is raised again for its traceback, or with other processes printed.
    """
    sentence, status, trace = str(error), 1, ""
    if isinstance(error, BrokenPipeError):
        sentence, status = "the reader of its answers closed the pipe, as `| head` does", 141
    elif isinstance(error, ModuleNotFoundError):
        sentence = f"{error.name} is not installed; run: pip install -r requirements.txt"
    elif (limit := limit_reached(error)) is not None:
        sentence = limit
    elif isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in sentence:
        sentence = f"too little memory for the model or its cache ({error}); use more devices"
    elif isinstance(error, ValueError | OSError):
        pass  # has its own message
    elif peers is None:
        raise error
    else:
        peers.await_loss()  # a lost process makes collectives fail
        sentence = f"{type(error).__name__}: {sentence.splitlines()[0] if sentence else ''}"
        if re.search("gloo|nccl", sentence, re.IGNORECASE):
            sentence = f"the connection between the devices failed ({sentence})"
            sentence += "; check the network between the hosts, and start all processes again"
        else:
            trace = "".join(traceback.format_exception(error))
    if peers is not None:
        peers.end(sentence)
    if status != 141:
        say(f"{trace}error: {sentence}", errors)
    if peers is not None or status == 141:
        os._exit(status)  # sys.exit would wait for the other processes or a flush
    return status


def main() -> int:
    """Run the command and return the exit status."""
    open_standard_streams()
    worker = Worker()  # runs jax
    errors = sys.stderr
    peers: multihost.Peers | None = None
    options: Options | None = None
    try:
        try:
            check_surroundings(ROOT)
            gpu_settings.prepare(os.environ)
            options = parse_arguments()
            if options.distributed:
                signal.signal(multihost.WAKE, signal.default_int_handler)
                peers = worker.call(find_peers, options, errors)
                serve_distributed(worker, options, peers)
            elif options.plan:
                worker.call(show_plan, options)
            elif options.serve:
                serve_http(worker, options)
            else:
                serve(worker, options)
        except Exception as error:
            return fail(error, peers, errors)
    except KeyboardInterrupt:
        signal.signal(multihost.WAKE, signal.SIG_IGN)
        end_at_next_interrupt()
        if peers is not None:
            peers.end("it was interrupted")
        # A pipe or a device does not store answers.
        kept = options is not None and options.output is not None and options.output.is_file()
        say("interrupted" + "; --resume continues from here" * kept, errors)
        os._exit(130)  # sys.exit would wait for the worker
    return 0


def run_and_exit() -> NoReturn:
    """Run the command and exit this process with its status."""
    run_command(main)


if __name__ == "__main__":
    run_and_exit()

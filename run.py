"""Sample text from Grok-1, or from the small demo model that comes with it.

python run.py --prompt "Once upon a time" --max-len 120 --temperature 0.7 --seed 1

With --distributed several processes, on one host or many, are one run: process 0's prompts and
options hold for all, and only it prints. When a process is lost, all end and say which.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

# In the background of a shell script Ctrl-C is ignored, and stays so.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    # It ends the imports below without showing where it struck.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from grok1 import default_files
from grok1.cli import interactive, prompts
from grok1.cli.console import (
    ByteProgress,
    Progress,
    Worker,
    check_output,
    end_at_next_interrupt,
    limit_reached,
    open_standard_streams,
    run_command,
    say,
    write_out,
)
from grok1.cli.options import parse_arguments
from grok1.cli.output import AnswerFile, JsonPrinter, TextPrinter, as_json, fingerprint
from grok1.cli.startup import check_surroundings
from grok1.cli.timing import Timing
from grok1.formats import atomic, forms
from grok1.interrupts import uninterrupted
from grok1.parallel import multihost
from grok1.serving.request_limits import CHUNKS

ROOT = Path(__file__).resolve().parent
MOST_SLOTS = 8
MOST_DEVICES = 128  # virtual ones: more take a machine's threads and memory, and end in no answer
# What process 0 decides for all; the files may lie elsewhere on each host.
SHARED = (
    "prompts", "max_len", "temperature", "top_k", "nucleus_p", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "stop", "truncate", "seed", "mesh", "dtype", "batch",
    "context", "settings", "places", "ids", "num_samples", "streamed", "kernels", "chunk",
    "logit_bias", "min_len", "top_logprobs",
)  # fmt: skip


def choose_files(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """Return the checkpoint directory, and the tokenizer if something of the run needs one."""
    directory = options.checkpoint
    if directory is None:
        directory = default_files.default_checkpoint()
        if directory == default_files.DEMO:
            cloned = default_files.RELEASED.is_dir()
            why = "checkpoints/ckpt-0 is not there" if cloned else "no --checkpoint given"
            say(f"{why}: using the small bundled demo model")
    forms.require_form(directory, "name the right one with --checkpoint")
    tokenizer = options.tokenizer
    if tokenizer is None and needs_words(options):
        tokenizer = default_files.default_tokenizer(directory)
    return directory, tokenizer


def needs_words(options: argparse.Namespace) -> bool:
    """Whether something of the run is text, which takes a tokenizer."""
    words = any(isinstance(prompt, str) for prompt in options.prompts)
    stops = options.stop or any(own.get("stop") for own in options.settings)
    return bool(options.interactive or words or stops)


def find_peers(options: argparse.Namespace, errors: TextIO) -> multihost.Peers:
    """Find out where this process stands among those of the run."""
    place = multihost.find_place(
        options.coordinator, options.num_processes, options.process_id, options.join_timeout
    )
    tell = functools.partial(say, file=errors)
    return multihost.Peers(place, options.join_timeout, options.peer_timeout, tell)


def keep_output(first: bool) -> None:
    """Keep standard output for the answers of the first process.

    gloo, which carries the collectives of CPUs, prints lines to it from C++.
    """
    if first:
        # Never closed: the answers outlive whatever ends the interpreter.
        sys.stdout = os.fdopen(os.dup(1), "w", 1, sys.stdout.encoding, closefd=False)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)


def agree(
    peers: multihost.Peers, options: argparse.Namespace
) -> tuple[tuple[Path, Path | None], AnswerFile | None, list[int]]:
    """Take process 0's options, and return this process's files, which must hold what its do.

    Also returns where the answers go, if that is a file, and which prompts it is left to answer.
    """
    from grok1 import backend

    first = peers.place.process == 0
    files: Any = ()
    answers = None
    if first:
        if options.output is None:
            check_output()
        prompts.read_file(options)
        files = choose_files(options)
        answers = open_answers(options, *files)
    shared = peers.share(
        {
            "options": {name: getattr(options, name) for name in SHARED} if first else {},
            "files": [None if file is None else str(file.absolute()) for file in files],
            "program": program(),
            "numerics": backend.numerics(),
            "contents": contents(*files) | weights(files[0]) if first else {},
            "left": left_over(options, answers) if first else [],
        }
    )
    vars(options).update(shared["options"])
    if first:
        return files, answers, shared["left"]
    if program() != shared["program"]:
        raise ValueError(
            f"{ROOT}: expected this program as on process 0, got another version of it; install "
            "the same on all hosts"
        )
    backend.use_numerics(shared["numerics"])
    if options.checkpoint is None:
        options.checkpoint = Path(shared["files"][0])
        if options.tokenizer is None and shared["files"][1] is not None:
            options.tokenizer = Path(shared["files"][1])
    if shared["files"][1] is None:
        options.tokenizer = None  # nothing of the run is text
    directory, tokenizer = choose_files(options)
    for name, found in (contents(directory, tokenizer) | weights(directory)).items():
        # Of weights what is not there, or in the other form, is not known.
        if found != shared["contents"].get(name, found):
            raise ValueError(
                f"{tokenizer if name == 'tokenizer' else directory}: expected the same {name} as "
                "on process 0, got something else; give all processes the same files"
            )
    return (directory, tokenizer), None, shared["left"]


def contents(directory: Path, tokenizer: Path | None) -> dict[str, str]:
    """Return fingerprints of the files on which all processes must agree to take the same steps.

    One that cannot be read has an empty one: loading says what is wrong with it.
    """
    files = {"config.json": directory / "config.json", "tokenizer": tokenizer}
    found = dict.fromkeys(files, "")
    for name, file in files.items():
        with contextlib.suppress(OSError), atomic.open_regular(str(file or os.devnull)) as opened:
            # Larger ones are refused, by loading as well.
            text = opened.read(forms.MAX_TOKENIZER_BYTES)
            found[name] = hashlib.sha256(text).hexdigest()
    return found


def weights(directory: Path) -> dict[str, str]:
    """Return fingerprints of the files of the weights; none if they cannot be read."""
    with contextlib.suppress(OSError):  # loading says what is wrong
        return forms.samples(directory)
    return {}


def program() -> str:
    """Return a fingerprint of this program's own files."""
    found = hashlib.sha256()
    for name in ("model.py", "runner.py", "checkpoint.py", "run.py", "grok1/**/*"):
        for file in sorted(ROOT.glob(name)):
            if file.suffix in (".py", ".cc", ".h"):
                found.update(file.read_bytes())
    return found.hexdigest()


def open_answers(
    options: argparse.Namespace, directory: Path, tokenizer: Path | None
) -> AnswerFile | None:
    """Open the file for the answers, if there is to be one. Raises ValueError."""
    if options.output is None:
        return None
    how = {"dtype": options.dtype, "context": options.context, "kernels": options.kernels}
    how["chunk"] = options.chunk
    # The one that makes text of the answers, where no prompt takes any.
    model = contents(directory, tokenizer or default_files.default_tokenizer(directory)) | how
    fingerprints = [
        fingerprint(request=prompts.fields_of(options, index), id=options.ids[index], model=model)
        for index in range(len(options.prompts))
    ]
    places = prompts.places_of_answers(options)
    return AnswerFile(options.output, places, fingerprints, options.ids, options.resume)


def left_over(options: argparse.Namespace, answers: AnswerFile | None) -> list[int]:
    """Return which prompts do not have all their answers yet."""
    done = answers.done if answers else set()
    places = prompts.places_of_answers(options)
    return sorted({index for index, sample in places if (index, sample) not in done})


def make_server(
    options: argparse.Namespace,
    left: Sequence[int],
    progress: ByteProgress,
    directory: Path,
    tokenizer: Path | None,
    processes: int = 1,
) -> Any:
    """Load the model as the options say; the prompts that are left are checked before."""
    mesh = options.mesh or (1, 1)
    # Read when jax starts its CPU backend, and ignored elsewhere: virtual devices for the mesh.
    devices = min(math.prod(mesh) // processes, MOST_DEVICES)
    flags = os.environ.get("XLA_FLAGS", "")
    if devices > 1 and "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    import jax  # Takes seconds: after all that can be checked without it.

    from grok1 import backend, compile_cache
    from grok1.kernels import dispatch as kernels
    from runner import RequestError, load_model

    backend.require_devices()
    # Not with others: where one process compiles, XLA may wait for all to do so.
    if not options.compile_cache:
        jax.config.update("jax_enable_compilation_cache", False)
    elif processes == 1 and (reason := compile_cache.enable()):
        say(reason)
    if options.kernels and backend.on_cpu():
        kernels.available()  # The first time they are compiled: not a part of loading.
    began = time.perf_counter()
    progress.start()
    try:
        server = load_model(
            directory,
            tokenizer,
            mesh=mesh,
            # As many as before an interruption: rounding depends on it.
            slots=options.batch or min(len(prompts.places_of_answers(options)), MOST_SLOTS),
            dtype=options.dtype,
            context=options.context,
            requests=prompts.make_requests(options, left),
            progress=progress,
            kernels=options.kernels,
            compile_cache=False,  # or enabled above
            pad_sizes=chunks(options.chunk),
        )
    except RequestError as error:
        index = left[error.index]
        reason = prompts.with_options(error.reason, options.settings[index])
        raise ValueError(f"{options.places[index]}: {reason}") from error
    progress.close()
    dtype = jax.numpy.dtype(server.config.fprop_dtype).name
    say(
        f"loaded {directory} in {time.perf_counter() - began:.1f} s: "
        f"{server.config.model.num_layers} layers, {dtype} activations, "
        f"mesh {mesh[0]},{mesh[1]} on {jax.devices()[0].device_kind}"
    )
    return server


def chunks(longest: int | None) -> list[int]:
    """Return the lengths in which prompts are read."""
    if longest is None:
        return [*CHUNKS]
    return [*(size for size in CHUNKS if size < longest), longest]


def generate(
    worker: Worker,
    server: Any,
    options: argparse.Namespace,
    left: Sequence[int],
    answers: AnswerFile | None = None,
    phase: Callable[[str], object] = lambda _: None,
) -> str | None:
    """Print the answers that are left, or write them to a file; then a line of statistics.

    Returns a sentence if errors ended some of them.
    """
    from runner import MOST_TOKENS

    if options.show_routing and server.config.model.num_experts < 2:
        raise ValueError("--show-routing: this model has no experts that tokens could go to")
    # Where nobody watches them come, several tokens at a time, which is faster.
    tokens = 1 if options.streamed else MOST_TOKENS
    events = server.generate_events(prompts.make_requests(options, left), phase, tokens)
    with Progress("answering", already=len(answers.done) if answers else 0) as progress:
        if answers:
            answers.progress = progress
            progress(len(answers.done), len(answers.places))
        printer = answers or make_printer(options)
        timing = Timing(tokens)
        ended = {}  # whose routing is to be shown
        failed = {}
        try:
            while event := worker.call(next, events, None):
                place = event.request, event.sample
                if event.finish_reason == "error":
                    failed[place] = event.completion.error
                else:
                    timing.take(place, event.finish_reason is not None)
                    if options.show_routing and event.finish_reason is not None:
                        ended[place] = event.completion
                with uninterrupted(signal.SIGINT, multihost.WAKE):
                    printer.show(event._replace(request=left[event.request]))
        finally:
            # After an interruption too: nothing that was computed is lost.
            with uninterrupted(multihost.WAKE):
                printer.close()
    say(timing.line())
    for index, sample in sorted(ended):
        several = f".{sample + 1}" if options.num_samples > 1 else ""
        write_out(f"\nexperts of [{index + 1}{several}], best first")
        show_routing(worker, server, ended[index, sample])
    if options.stats:
        say(timing.block(work_of(server)))
    if not failed:
        return None
    (index, _), error = min(failed.items())
    others = f" ({len(failed)} answers ended by an error)" if len(failed) > 1 else ""
    return f"{options.places[left[index]]}: {error}{others}"


def show_routing(worker: Worker, server: Any, answer: Any) -> None:
    """Print which experts the tokens of a prompt and its answer went to."""
    from grok1.cli.routing_table import print_routing

    ids = [*answer.prompt_ids, *answer.token_ids][: server.config.sequence_len]
    found = worker.call(server.inspect, ids, ("expert_index",))
    pieces = found.pieces or [str(token) for token in ids]
    print_routing(pieces, found.captured.expert_index, server.config.model.num_experts)


def work_of(server: Any) -> list[tuple[str, str]]:
    """Return what the server has to say of its work, as names and values."""
    done = server.statistics
    if not done.tokens:
        return []
    host = 1e3 * (done.seconds - done.waiting) / done.tokens
    return [
        ("slots used", f"{done.slots_used:.1f} of {server.num_slots}, in the mean"),
        ("host's work", f"{host:.2f} ms a token, {done.host_share:.0%} of the time"),
    ]


def make_printer(options: argparse.Namespace) -> Any:
    """Return what prints the answers to standard output."""
    places = prompts.places_of_answers(options)
    if options.json:
        return JsonPrinter(places, options.ids)
    return TextPrinter(options.prompts, places)


def serve(worker: Worker, options: argparse.Namespace) -> None:
    """Load the model and answer, in one process."""
    if options.output is None:
        check_output()
    prompts.read_file(options)
    files = choose_files(options)
    answers = open_answers(options, *files)
    left = left_over(options, answers)
    if nothing_left(options, left):
        return
    with ByteProgress("loading") as progress:
        server = worker.call(make_server, options, left, progress, *files)
    if options.interactive:
        make = functools.partial(prompts.request_for, options)
        seed = options.seed if options.seed_given else None
        settings = interactive.Settings(make, server.check, seed)
        interactive.converse(worker, server, settings, options.stats)
    elif failure := generate(worker, server, options, left, answers):
        raise ValueError(failure)


def connect_processes(server: Any, peers: multihost.Peers) -> None:
    """Wait until all processes have loaded the model, and connect them for their steps."""
    from grok1.parallel.sharding import connect

    peers.meet()
    if server.mesh is not None:
        connect(server.mesh)


def serve_together(worker: Worker, options: argparse.Namespace, peers: multihost.Peers) -> None:
    """Load the model and answer, as one of several processes."""
    first = peers.place.process == 0
    if not first:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # they say only what ended them
    worker.call(peers.join)
    peers.phase("load")
    files, answers, left = worker.call(agree, peers, options)
    keep_output(first)  # after --output was opened, which may be /dev/stdout
    count = peers.place.processes
    if not nothing_left(options, left):
        with ByteProgress("loading") as progress:
            server = worker.call(make_server, options, left, progress, *files, count)
        worker.call(connect_processes, server, peers)
        failure = generate(worker, server, options, left, answers, peers.phase)
        if failure and first:  # who has all answers, and ends the others
            raise ValueError(failure)
    worker.call(peers.close)


def nothing_left(options: argparse.Namespace, left: Sequence[int]) -> bool:
    """Whether all prompts have their answers already; says so."""
    if not left:
        say(f"{options.output} holds all {len(prompts.places_of_answers(options))} answers already")
    return not left


def show_plan(options: argparse.Namespace) -> None:
    """Print whether the model fits a mesh. No weights are read, and no accelerator is touched."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    # In its place the option below, which can wait until the size of the mesh is known.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = re.sub(r"\S*xla_force_host_platform_device_count\S*", "", flags)
    import jax

    from checkpoint import config_in
    from grok1 import plan
    from model import grok_1
    from runner import with_settings

    directory = options.checkpoint
    if directory is None and default_files.default_checkpoint() == default_files.RELEASED:
        directory = default_files.RELEASED
    config = grok_1() if directory is None else config_in(directory)
    config = with_settings(config, options.dtype or "bfloat16", options.context)
    jax.config.update("jax_num_cpu_devices", plan.devices_for(config, options.mesh))
    found = plan.make_plan(
        config,
        options.mesh,
        batch=options.batch,
        device_memory=int(options.device_memory),
        bandwidth=options.bandwidth,
        directory=directory,
    )
    write_out(as_json(dataclasses.asdict(found)) if options.json else plan.in_words(found))


def fail(error: Exception, peers: multihost.Peers | None, errors: TextIO) -> int:
    """Say what went wrong, to the other processes too; returns the exit status.

    Raises what should not happen, with its traceback.
    """
    sentence, status, trace = str(error), 1, ""
    if isinstance(error, BrokenPipeError):
        sentence, status = "the reader of its answers has gone, as with `| head`", 141
    elif isinstance(error, ModuleNotFoundError):
        sentence = f"{error.name} is not installed; run: pip install -r requirements.txt"
    elif (limit := limit_reached(error)) is not None:
        sentence = limit
    elif isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in sentence:
        sentence = f"too little memory for the model or its cache ({error}); use more devices"
    elif isinstance(error, ValueError | OSError):
        pass  # its own sentence
    elif peers is None:
        raise error
    else:
        peers.await_loss()  # which makes collectives fail
        sentence = f"{type(error).__name__}: {sentence.splitlines()[0] if sentence else ''}"
        if re.search("gloo|nccl", sentence, re.IGNORECASE):
            sentence = f"the connection of the devices of all processes failed ({sentence})"
            sentence += "; look at the network between the hosts, and start them again"
        else:
            trace = "".join(traceback.format_exception(error))
    if peers is not None:
        peers.end(sentence)
    if status != 141:
        say(f"{trace}error: {sentence}", errors)
    if peers is not None or status == 141:
        os._exit(status)  # sys.exit would wait: for the other processes, for a flush
    return status


def main() -> int:
    """Run the command; returns the exit status."""
    open_standard_streams()
    worker = Worker()  # jax works there
    errors = sys.stderr
    peers: multihost.Peers | None = None
    options: argparse.Namespace | None = None
    try:
        try:
            check_surroundings(ROOT)
            options = parse_arguments()
            if options.distributed:
                signal.signal(multihost.WAKE, signal.default_int_handler)
                peers = worker.call(find_peers, options, errors)
                serve_together(worker, options, peers)
            elif options.plan:
                worker.call(show_plan, options)
            else:
                serve(worker, options)
        except Exception as error:
            return fail(error, peers, errors)
    except KeyboardInterrupt:
        signal.signal(multihost.WAKE, signal.SIG_IGN)
        end_at_next_interrupt()
        if peers is not None:
            peers.end("it was interrupted")
        # A pipe or a device keeps no answers.
        kept = options is not None and options.output is not None and options.output.is_file()
        say("interrupted" + "; --resume goes on from here" * kept, errors)
        os._exit(130)  # sys.exit would wait for the worker
    return 0


def run_and_exit() -> NoReturn:
    """Run the command as this process, which ends with its status."""
    run_command(main)


if __name__ == "__main__":
    run_and_exit()

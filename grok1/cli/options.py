"""The options of run.py, and what must fit together before anything is loaded."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from grok1.cli.console import (
    Parser,
    byte_rate,
    byte_size,
    given_path,
    mesh_sizes,
    number,
    token_ids,
)
from grok1.parallel import multihost
from grok1.serving.request_limits import (
    DEFAULT_TEMPERATURE,
    LARGEST_BIAS,
    LARGEST_PENALTY,
    MOST_SAMPLES,
)

DEFAULT_PROMPT = "Once upon a time"


def coordinator(text: str) -> str:
    """Check "HOST:PORT"."""
    try:
        multihost.host_and_port(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with status 2 and one sentence if it is wrong."""
    parser = Parser(
        description=(__doc__ or "options").splitlines()[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        type=given_path,
        metavar="DIR",
        help="directory of a checkpoint; by default checkpoints/ if it holds one, else the demo",
    )
    add(
        "--tokenizer",
        type=given_path,
        metavar="FILE",
        help="SentencePiece model; by default DIR/tokenizer.model, else the demo's",
    )
    add(
        "--prompt",
        dest="prompts",
        action="append",
        metavar="TEXT",
        help=f"text to continue, may be repeated; by default {DEFAULT_PROMPT!r}",
    )
    add(
        "--prompt-ids",
        dest="prompts",
        action="append",
        type=token_ids,
        metavar='"5 6 7"',
        help="token ids to continue, may be repeated; needs no tokenizer",
    )
    count = number(int, 1, 2**31 - 1)
    add(
        "--max-len",
        type=count,
        metavar="N",
        help="most tokens to generate, beside the prompt's (200, or as many as fit the context)",
    )
    add(
        "--temperature",
        type=number(float, 0, 1e6, " (0: the most probable token)"),
        default=DEFAULT_TEMPERATURE,
        metavar="X",
        help=f"0 takes the most probable token ({DEFAULT_TEMPERATURE})",
    )
    add(
        "--top-k",
        type=number(int, 0, 2**31 - 1, " (0: no limit)"),
        default=0,
        metavar="N",
        help="draw from the N most probable tokens (0: no limit)",
    )
    add(
        "--nucleus-p",
        "--top-p",
        type=number(float, sys.float_info.min, 1),
        default=1.0,
        metavar="X",
        help="draw from the fewest tokens whose probability reaches X (1)",
    )
    add(
        "--min-p",
        type=number(float, 0, 1),
        default=0.0,
        metavar="X",
        help="draw from the tokens X times as probable as the most probable one, or more (0)",
    )
    add(
        "--repetition-penalty",
        type=number(float, 1 / LARGEST_PENALTY, LARGEST_PENALTY),
        default=1.0,
        metavar="X",
        help="above 1 tokens of prompt and answer come back less (1)",
    )
    add(
        "--presence-penalty",
        type=number(float, -LARGEST_BIAS, LARGEST_BIAS),
        default=0.0,
        metavar="X",
        help="above 0 tokens of the answer come back less (0)",
    )
    add(
        "--frequency-penalty",
        type=number(float, -LARGEST_BIAS, LARGEST_BIAS),
        default=0.0,
        metavar="X",
        help="above 0 tokens come back the less, the more often they are in the answer (0)",
    )
    add(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end the answer before this text; may be repeated",
    )
    add(
        "--truncate",
        choices=("left",),
        help="keep only the newest tokens of a prompt that is too long",
    )
    add(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        default=42,
        metavar="N",
        help="the same seed gives the same text (42)",
    )
    add(
        "--mesh",
        type=mesh_sizes,
        metavar="DATA,MODEL",
        help="devices along the batch and along heads and hidden widths (1,1); Grok-1 needs 1,8",
    )
    add(
        "--batch",
        type=count,
        metavar="N",
        help="sequences to serve at once; by default as many as there are prompts, at most 8",
    )
    add(
        "--context",
        type=count,
        metavar="N",
        help="room for so many tokens of each, prompt and answer; by default the model's context",
    )
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="activations; by default float32 on a CPU, bfloat16 elsewhere",
    )
    add(
        "--num-samples",
        type=number(int, 1, MOST_SAMPLES),
        default=1,
        metavar="N",
        help="so many answers to each prompt, which is read once; the seed counts up (1)",
    )
    add("--json", action="store_true", help="print one JSON object a line for each prompt")
    add(
        "--stats",
        action="store_true",
        help="say at the end how long first tokens took, and those after them",
    )
    add(
        "--show-routing",
        action="store_true",
        help="show which experts each token of the prompt and its answer went to, in each layer",
    )
    add(
        "--no-compile-cache",
        dest="compile_cache",
        action="store_false",
        help="neither keep compiled programs for the next start nor use those of the last one",
    )
    add(
        "--no-kernels",
        dest="kernels",
        action="store_false",
        help="use nothing but what JAX offers: slower, and on a CPU without a C++ compiler",
    )
    add_prompts(parser)
    add_plan(parser)
    add_distributed(parser)
    options = parser.parse_args(arguments)
    check_distributed(parser, options)
    check_prompts(parser, options)
    check_routing(parser, options)
    check_plan(parser, options)
    if options.prompts is None:
        options.prompts = [] if options.prompts_file else [DEFAULT_PROMPT]
    options.places = [f"request {number}" for number, _ in enumerate(options.prompts, 1)]
    if options.interactive:
        # In place of those to come: wrong settings are told before the weights are loaded.
        options.prompts, options.places = [[0]], ["the options"]
    # Of each prompt: the person's name for it, and settings of its own.
    options.ids = [None for _ in options.prompts]
    options.settings = [{} for _ in options.prompts]
    options.stop = options.stop or []
    options.streamed = not options.json and options.output is None  # the answers, token by token
    return options


def add_prompts(parser: Parser) -> None:
    """Add the options of many prompts, and of those that are yet to be typed."""
    add = parser.add_argument_group("prompts from elsewhere, and where answers go").add_argument
    add(
        "--prompts-file",
        metavar="FILE",
        help="more prompts, one a line: text, or in FILE.jsonl JSON objects with the key prompt, "
        "if wanted id, and settings of their own; - is standard input",
    )
    add(
        "--prompts-format",
        choices=("text", "jsonl"),
        help="what --prompts-file holds, whatever its name",
    )
    add(
        "--output",
        type=given_path,
        metavar="FILE",
        help="write each answer to FILE as it ends, as a JSON object a line, and print none",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with an interrupted --output: answer only what it does not hold",
    )
    add(
        "--interactive",
        action="store_true",
        help="answer prompts as they are typed; Ctrl-C stops an answer, Ctrl-D ends",
    )


def check_prompts(parser: Parser, options: argparse.Namespace) -> None:
    """Exit with status 2 if the options of prompts and answers do not fit together."""
    if options.prompts_format and options.prompts_file is None:
        parser.error("--prompts-format needs --prompts-file")
    if options.resume and options.output is None:
        parser.error("--resume needs --output, the file to go on with")
    others = {
        "--prompt": options.prompts,
        "--prompts-file": options.prompts_file,
        "--output": options.output,
        "--json": options.json,
        "--distributed": options.distributed,
        "--plan": options.plan,
        "--num-samples": options.num_samples > 1,
    }
    if options.interactive:
        refuse(parser, "--interactive", others, "prompts are typed, answers printed")


def check_routing(parser: Parser, options: argparse.Namespace) -> None:
    """Exit with status 2 if something else is to be printed than a table for the eye."""
    others = {
        "--json": options.json,
        "--output": options.output,
        "--interactive": options.interactive,
        "--distributed": options.distributed,
        "--plan": options.plan,
    }
    if options.show_routing:
        refuse(parser, "--show-routing", others, "it prints a table for people")


def refuse(parser: Parser, name: str, others: dict[str, Any], reason: str) -> None:
    """Exit with status 2 if one of the options was given that do not go together with another."""
    given = [other for other, value in others.items() if value]
    if given:
        parser.error(f"{name} and {given[0]} do not go together: {reason}")


def add_plan(parser: Parser) -> None:
    """Add the options of a plan."""
    add = parser.add_argument_group(
        "a plan, which needs neither weights nor GPUs; for --mesh, --batch, --context, --dtype"
    ).add_argument
    add(
        "--plan",
        action="store_true",
        help="say whether the model fits a mesh, by default the smallest that it fits, and what a "
        "token costs there",
    )
    add(
        "--device-memory",
        type=byte_size,
        default=byte_size("80GiB"),
        metavar="SIZE",
        help="memory of each device (80GiB)",
    )
    add(
        "--bandwidth",
        type=byte_rate,
        default=byte_rate("3.35TB/s"),
        metavar="RATE",
        help="of a device's memory (3.35TB/s, as of an H100)",
    )


def check_plan(parser: Parser, options: argparse.Namespace) -> None:
    """Exit with status 2 if prompts are to be answered, or several processes are to plan."""
    others = {
        "--prompt": options.prompts,
        "--prompts-file": options.prompts_file,
        "--output": options.output,
        "--distributed": options.distributed,
    }
    if options.plan:
        refuse(parser, "--plan", others, "a plan is made by one process, without prompts")


def add_distributed(parser: Parser) -> None:
    """Add the options of a run of several processes."""
    add = parser.add_argument_group("several processes, as a rule one a host").add_argument
    add(
        "--distributed",
        action="store_true",
        help="be one of several processes; by default placed by SLURM, GKE or MPI",
    )
    add(
        "--coordinator",
        type=coordinator,
        metavar="HOST:PORT",
        help="where process 0 listens, which all others must reach",
    )
    add(
        "--num-processes",
        type=number(int, 1, 2**20),
        metavar="N",
        help="how many processes are started, each with the same coordinator",
    )
    add(
        "--process-id",
        type=number(int, 0, 2**20),
        metavar="I",
        help="which one this is, from 0",
    )
    seconds = number(float, 2, 1e6, " (seconds)")
    add(
        "--peer-timeout",
        type=seconds,
        default=multihost.PEER_TIMEOUT,
        metavar="SECONDS",
        help="a process that is silent for so long is lost, and all end "
        f"({multihost.PEER_TIMEOUT:g})",
    )
    add(
        "--join-timeout",
        type=seconds,
        default=multihost.JOIN_TIMEOUT,
        metavar="SECONDS",
        help=f"how long to wait for all processes to come ({multihost.JOIN_TIMEOUT:g})",
    )


def check_distributed(parser: Parser, options: argparse.Namespace) -> None:
    """Exit with status 2 if the options of several processes do not fit together."""
    place = {
        "--coordinator": options.coordinator,
        "--num-processes": options.num_processes,
        "--process-id": options.process_id,
    }
    given = [name for name, value in place.items() if value is not None]
    missing = [name for name in place if name not in given]
    if given and not options.distributed:
        parser.error(f"{given[0]} needs --distributed")
    if given and missing:
        parser.error(f"{given[0]} needs {' and '.join(missing)}, or none of them to be given")
    if given and options.process_id >= options.num_processes:
        parser.error(
            f"argument --process-id: expected one from 0 to {options.num_processes - 1}, as there "
            f"are {options.num_processes} processes, got {options.process_id}"
        )

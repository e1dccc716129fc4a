r"""Evaluate this model with EleutherAI's harness, as the model `grok-1`.

    python tools/lm_eval_grok.py run --model grok-1 --tasks gsm8k,mmlu --batch_size 8 \
        --model_args checkpoint=checkpoints,mesh=1x8

model_args: checkpoint, a directory (checkpoints/); tokenizer, a SentencePiece model (by default the
checkpoint's, or the repository's); mesh, DATAxMODEL (1x1); dtype, float32 or bfloat16; context, in
tokens; kernels, true or false. Needs `pip install -r requirements-eval.txt`.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; run: pip install -r requirements-eval.txt")

import numpy as np  # noqa: E402  (after the path)

from grok1.serving.request import Request  # noqa: E402

# The harness's generation settings, and the corresponding fields of a Request.
SAMPLING = {"temperature": "temperature", "top_p": "nucleus_p", "top_k": "top_k", "min_p": "min_p"}
LENGTHS = "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"
MOST_GENERATED = 256  # tokens, as in the harness, if a task does not specify it


@register_model("grok-1")
class GrokLM(LM):
    """Grok-1, loaded by runner.py, with the harness's model interface.

    server: an initialized InferenceRunner with a tokenizer; None: load one.
    batch_size: sequences served at once. device, max_batch_size: given by the harness, not used.
    Raises ValueError, with a one-sentence message, if something is missing or does not fit.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike = ROOT / "checkpoints",
        tokenizer: str | os.PathLike | None = None,
        mesh: str = "1x1",
        dtype: str | None = None,
        context: int | None = None,
        kernels: bool = True,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # noqa: ARG002
        device: str | None = None,  # noqa: ARG002
        *,
        server: Any = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            known = "checkpoint, tokenizer, mesh, dtype, context and kernels"
            raise ValueError(f"--model_args: expected {known}, got {next(iter(unknown))!r}")
        self.server = server or _load(
            Path(checkpoint), tokenizer, mesh, batch_size, dtype=dtype, context=context,
            kernels=kernels,
        )  # fmt: skip
        if self.server.tokenizer is None:
            raise ValueError("tokenizer: the harness uses text; give a SentencePiece model")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability, and whether greedy decoding gives it.

        If a (context, continuation) pair is longer than the model's context, its last tokens are
        read.
        """
        pairs = [self._split(*request.args) for request in requests]
        most = self.server.config.sequence_len
        # A continuation that does not fit by itself is read in windows, as in `score`.
        pairs = [
            (
                context[max(0, len(context) + len(own) - most) :] if len(own) <= most else context,
                own,
            )
            for context, own in pairs
        ]
        found = []
        scored = self.server.score_continuations(pairs)
        for request, scores in zip(requests, scored, strict=True):
            result = _total(scores.logprobs), bool(np.all(scores.greedy))
            self.cache_hook.add_partial("loglikelihood", request.args, result)
            found.append(result)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the log-probability of each complete text, from `InferenceRunner.score`."""
        texts = [self.server.encode(request.args[0]) for request in requests]
        found = [_total(scores) for scores in self.server.score(texts)]
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the continuation of each (context, settings), without its stop string.

        A context that is too long loses its first tokens.
        """
        asked = [self._request(*request.args) for request in requests]
        found = [completion.text for completion in self.server.generate(asked)]
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, result)
        return found

    @property
    def tokenizer_name(self) -> str:
        """A name that identifies the vocabulary."""
        return f"grok-1-{self.server.config.vocab_size}"

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of both, as the harness's own models split them.

        Trailing spaces of the context go to the continuation.
        """
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self.server.encode(context)
        whole = self.server.encode(context + continuation)
        return before, whole[len(before) :]

    def _request(self, context: str, settings: Mapping[str, Any]) -> Request:
        """Return the Request for the harness's settings. Raises ValueError for an unknown one."""
        settings = dict(settings)
        until = settings.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        most = [settings.pop(name) for name in LENGTHS if name in settings]
        sampled = {
            field: settings.pop(name) for name, field in SAMPLING.items() if name in settings
        }
        if not settings.pop("do_sample", sampled.get("temperature", 0) > 0):
            sampled = {"temperature": 0.0}
        sampled.setdefault("temperature", 1.0)  # as in the harness's own models
        if settings:
            known = (*SAMPLING, *LENGTHS, "until", "do_sample")
            name = next(iter(settings))
            raise ValueError(f"generation: expected settings from {known}, got {name!r}")
        length = min(int(most[0]) if most else MOST_GENERATED, self.server.config.sequence_len - 1)
        stop = [text for text in stops if text]
        prompt = context or [self.server.bos_token]
        return Request(prompt, max_len=length, stop=stop, truncate="left", **sampled)


def _total(logprobs: np.ndarray) -> float:
    return float(np.sum(logprobs, dtype=np.float64))


def _load(
    checkpoint: Path, tokenizer: Any, mesh: str, batch_size: int | str, **options: Any
) -> Any:
    """Load a runner. Raises ValueError."""
    try:
        data, model = map(int, str(mesh).split("x"))  # the harness converts "1" to an int
        slots = int(batch_size)
    except ValueError:
        raise ValueError(
            f"expected mesh=DATAxMODEL, such as 1x8, and a number as batch_size, got {mesh!r} and "
            f"{batch_size!r}"
        ) from None
    from runner import load_model

    return load_model(checkpoint, tokenizer, mesh=(data, model), slots=slots, **options)


def main() -> None:
    """Run the harness's command, with this model registered."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # sys.exit would wait for jax's threads


if __name__ == "__main__":
    main()

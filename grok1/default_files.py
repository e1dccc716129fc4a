"""The default checkpoint and tokenizer."""

import os
from pathlib import Path

from grok1.formats import forms

ROOT = Path(__file__).resolve().parent.parent
RELEASED = ROOT / "checkpoints"  # holds the weights once they have been downloaded
# If the package was installed, not cloned, it contains the demo.
DEMO = RELEASED / "demo" if RELEASED.is_dir() else ROOT / "grok1" / "demo"
TOKENIZER = DEMO / "tokenizer.model"


def default_checkpoint() -> Path:
    """Return the directory of the released weights if they are there, else of the demo."""
    return RELEASED if forms.form(RELEASED) else DEMO


def default_tokenizer(directory: str | os.PathLike[str]) -> Path:
    """Return the SentencePiece model in a checkpoint's directory, or that of the demo."""
    own = Path(directory) / "tokenizer.model"
    return own if os.path.lexists(own) else TOKENIZER

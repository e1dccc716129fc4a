"""python -m grok1 does what python run.py does, from any directory."""

import os
import signal
import sys
from pathlib import Path

# As in run.py, whose own lines only hold where it is the script.
if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

# As of a script: where run.py lies comes first, and not the current directory, in which a file
# model.py may be another one.
if not sys.flags.safe_path:
    del sys.path[0]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run import run_and_exit  # noqa: E402  (found by the line above)

if __name__ == "__main__":
    run_and_exit()

"""Where the repository and the tests' data are."""

import pathlib

ROOT = pathlib.Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"

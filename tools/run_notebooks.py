"""Run notebooks from top to bottom and save their outputs in them.

    python tools/run_notebooks.py notebooks/inside_grok.ipynb notebooks/tiny_from_scratch.ipynb

Needs requirements-notebooks.txt. Times and versions are omitted, so that a file changes only if its
outputs do.
"""

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def run(path: Path) -> nbformat.NotebookNode:
    """Run a notebook in its directory, and return it with the outputs of its cells."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, record_timing=False, resources=where).execute()
    notebook.metadata.pop("language_info", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [one for one in map(_plain, cell.outputs) if one]
    return notebook


def _plain(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """Return an output without the text form of an image; None for stderr."""
    if output.output_type == "stream" and output.name == "stderr":
        return None
    if "image/png" in output.get("data", {}):
        output.data.pop("text/plain", None)
    return output


def main() -> None:
    """Run the notebooks that are named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", type=Path, nargs="+")
    for path in parser.parse_args().notebooks:
        nbformat.write(run(path), path)
        print(f"wrote {path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

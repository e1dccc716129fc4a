"""Run the notebooks from top to bottom and keep what they show in them.

    python tools/run_notebooks.py notebooks/inside_grok.ipynb notebooks/tiny_from_scratch.ipynb

It needs requirements-notebooks.txt. Times and versions are left out, so that only what a notebook
shows makes a difference.
"""

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def run(path: Path) -> nbformat.NotebookNode:
    """Return a notebook with the outputs of its cells, run where it lies."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, record_timing=False, resources=where).execute()
    notebook.metadata.pop("language_info", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [one for one in map(_plain, cell.outputs) if one]
    return notebook


def _plain(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """Return an output without what is written in two ways; None for what is no result."""
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

"""What is installed is complete: every module of ours that an installed one imports is, too."""

import ast
import pathlib
import tomllib

ROOT = pathlib.Path(__file__).parent.parent


def test_installed_modules_import_only_installed_ones() -> None:
    """`pip install -e .` would end in an import error elsewhere than in this directory."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    installed = set(project["tool"]["setuptools"]["py-modules"])
    ours = {path.stem for path in ROOT.glob("*.py")}
    assert installed <= ours
    for name in installed:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        } | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        # `python checkpoint.py` is a command, which starts where the repository is.
        assert imported & ours <= installed | {"conversion"}, name

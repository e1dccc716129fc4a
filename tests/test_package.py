"""What is installed is complete: every module of ours that an installed one imports is, too."""

import ast
import tomllib

from paths import ROOT


def test_installed_modules_import_only_installed_ones() -> None:
    """`pip install -e .` would end in an import error elsewhere than in this directory."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tools = project["tool"]["setuptools"]
    packages = set(tools["packages"])
    installed = set(tools["py-modules"]) | packages
    ours = {path.stem for path in ROOT.glob("*.py")} | packages
    assert installed <= ours
    files = [ROOT / f"{name}.py" for name in installed - packages]
    for path in (*files, *(path for name in packages for path in (ROOT / name).glob("*.py"))):
        tree = ast.parse(path.read_text())
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        } | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        # `python checkpoint.py` is a command, which starts where the repository is.
        assert imported & ours <= installed | {"conversion"}, path.name


def test_all_that_the_kernels_are_compiled_from_is_installed() -> None:
    """Without the headers an installed package ran without kernels."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = ["*.py", *project["tool"]["setuptools"]["package-data"]["kernels"]]
    files = {path for path in (ROOT / "kernels").iterdir() if path.is_file()}
    assert files == {path for pattern in patterns for path in (ROOT / "kernels").glob(pattern)}

"""The arrows between modules: which may import which, read from the imports themselves."""

import ast
import graphlib
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from paths import ROOT

MODULES = ("checkpoint", "model", "run", "runner")
# Within grok1 a module imports those of its own layer and of the layers before it.
LAYERS = (
    {"backend", "cache_directory", "checks", "inspection", "interrupts", "strict_json"},
    {"ops"},
    {"config_checks", "kernels", "parallel"},
    {"compile_cache", "default_files", "execution", "formats", "parameters", "reference"},
    {"serving"},
    {"hlo", "plan"},
    {"cli"},
)


def name_of(path: pathlib.Path) -> str:
    """The name by which a file is imported: scripts are found where they lie."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "grok1":
        return parts[-1]
    return ".".join(parts).removesuffix(".__init__")


FILES = {
    name_of(path): path
    for folder in (".", "grok1", "benchmarks", "notebooks", "tools")
    for path in (ROOT.glob("*.py") if folder == "." else (ROOT / folder).rglob("*.py"))
}


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements but those under `if TYPE_CHECKING`; functions' own are among them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from statements(child)


def imports(path: pathlib.Path) -> set[str]:
    """Our modules that a file imports, wherever in it, and the packages that these are in."""
    found = set()
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else str(node.module) for name in names}
    packages = {name.rpartition(".")[0] for name in found if name in FILES}
    return {name for name in found | packages if name in FILES} - {name_of(path)}


GRAPH = {name: imports(path) for name, path in FILES.items()}


def test_every_file_of_ours_is_looked_at() -> None:
    assert GRAPH["runner"] >= {"checkpoint", "model", "grok1.serving.scheduler", "grok1.kernels"}
    assert GRAPH["grok1.kernels.dispatch"] >= {"grok1.kernels.gpu"}  # within a function
    assert "model" not in GRAPH["grok1.serving.steps"]  # for the type checker only
    assert GRAPH["speed"] >= {"baseline", "runner"}


def test_no_module_imports_itself_in_a_circle() -> None:
    tuple(graphlib.TopologicalSorter(GRAPH).static_order())  # CycleError names the circle


def test_grok1_imports_nothing_of_the_root() -> None:
    for name in sorted(FILES):
        if name.startswith("grok1") and name != "grok1.__main__":
            assert not GRAPH[name] & set(MODULES), name
    assert {path.stem for path in ROOT.glob("*.py")} == set(MODULES)


def test_within_grok1_a_layer_imports_those_before_it() -> None:
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    inner = {name: name.split(".")[1] for name in FILES if name.startswith("grok1.")}
    del inner["grok1.__main__"]
    assert set(inner.values()) == set(rank)
    for name, own in inner.items():
        for other in GRAPH[name] & inner.keys():
            assert rank[inner[other]] <= rank[own], f"{name} imports {other}"


@pytest.mark.parametrize("kind", ["grok1", "root"])
def test_importing_anything_touches_no_device(kind: str) -> None:
    """Nor does it set an option of jax, a signal's handler, a logger or the environment."""
    names = [name for name in FILES if name.startswith("grok1") and name != "grok1.__main__"]
    program = f"""
import logging, os, signal, sys, warnings
import haiku, jax, sentencepiece, rich, tqdm
import jax.experimental.pallas, jax.experimental.pallas.triton
from jax._src import xla_bridge
def state():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    loggers = logging.root.handlers[:], logging.root.level
    return dict(jax.config.values), handlers, loggers, dict(os.environ), warnings.filters[:]
before = state()
for name in {names if kind == "grok1" else MODULES!r}:
    __import__(name)
    assert not xla_bridge.backends_are_initialized(), name
    assert state() == before, name
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_platform_is_asked_for_at_one_place() -> None:
    asking = {name for name, path in FILES.items() if "default_backend" in path.read_text()}
    assert asking == {"grok1.backend"}

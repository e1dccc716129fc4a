"""Which modules may import which, and that an import has no side effects."""

import ast
import graphlib
import subprocess
import sys

from paths import ROOT

MODULES = ("checkpoint", "model", "run", "runner")
# Within grok1, a module imports those of its own layer and of the layers before it.
LAYERS = (
    {
        "backend",
        "cache_directory",
        "checks",
        "gpu_settings",
        "host_memory",
        "inspection",
        "interrupts",
        "strict_json",
    },
    {"ops"},
    {"config_checks", "kernels", "parallel"},
    {"compile_cache", "default_files", "execution", "formats", "parameters", "reference"},
    {"serving"},
    {"planning"},
    {"cli"},
)


def name_of(path):
    """Return the name by which a file is imported; scripts are imported from their directory."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "grok1":
        return parts[-1]
    return ".".join(parts).removesuffix(".__init__")


FILES = {
    name_of(path): path
    for folder in (".", "grok1", "benchmarks", "notebooks", "tools")
    for path in (ROOT.glob("*.py") if folder == "." else (ROOT / folder).rglob("*.py"))
}


def statements(node):
    """Yield all statements, also those in functions, except those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from statements(child)


def imports(path):
    """Return the modules of this project that a file imports anywhere, and their packages."""
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


def test_imports_of_every_file_are_found():
    assert GRAPH["runner"] >= {"checkpoint", "model", "grok1.serving.scheduler", "grok1.kernels"}
    assert GRAPH["grok1.kernels.dispatch"] >= {"grok1.kernels.gpu.operations"}  # within a function
    assert "model" not in GRAPH["grok1.serving.steps"]  # for the type checker only
    assert GRAPH["speed"] >= {"baseline", "runner"}


def test_imports_have_no_cycle():
    tuple(graphlib.TopologicalSorter(GRAPH).static_order())  # CycleError names the cycle


def test_grok1_does_not_import_the_root_modules():
    for name in sorted(FILES):
        if name.startswith("grok1") and name != "grok1.__main__":
            assert not GRAPH[name] & set(MODULES), name
    assert {path.stem for path in ROOT.glob("*.py")} == set(MODULES)


def test_layers_of_grok1_import_only_earlier_layers():
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    inner = {name: name.split(".")[1] for name in FILES if name.startswith("grok1.")}
    del inner["grok1.__main__"]
    assert set(inner.values()) == set(rank)
    for name, own in inner.items():
        for other in GRAPH[name] & inner.keys():
            assert rank[inner[other]] <= rank[own], f"{name} imports {other}"


def test_model_needs_no_files_server_or_command():
    needed, found = {"model"}, set()
    while needed:
        found |= needed
        needed = set().union(*(GRAPH[name] for name in needed)) - found
    for layer in ("cli", "formats", "planning", "serving"):
        assert not any(name.startswith(f"grok1.{layer}") for name in found), layer


def test_imports_start_no_device_and_change_no_globals():
    """No option of jax, signal handler, logger, environment variable or module of others."""
    names = [name for name in FILES if name.startswith("grok1") and name != "grok1.__main__"]
    program = f"""
import logging, os, signal, sys, warnings
import haiku, jax
from jax._src import xla_bridge
def state():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    loggers = logging.root.handlers[:], logging.root.level
    return dict(jax.config.values), handlers, loggers, dict(os.environ), warnings.filters[:]
def check(name):
    variables, modules = set(globals()), dict(sys.modules)
    __import__(name)
    assert not xla_bridge.backends_are_initialized(), name
    assert state() == before, name
    assert set(globals()) == variables, name
    assert all(sys.modules[other] is module for other, module in modules.items()), name
    return {{new for new in sys.modules.keys() - modules if not new.startswith("grok1")}}
before = state()
assert check("model") == {{"model"}}
import sentencepiece, rich, tqdm
import jax.experimental.pallas, jax.experimental.pallas.triton
before = state()
for name in {[*names, *MODULES]}:
    check(name)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_platform_is_asked_for_in_one_module():
    asking = {name for name, path in FILES.items() if "default_backend" in path.read_text()}
    assert asking == {"grok1.backend"}

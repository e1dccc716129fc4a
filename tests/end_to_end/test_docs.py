"""Each snippet of README.md and docs/ runs by itself, and their tables are complete."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import compiling
from commands import Command
from model import CAPTURE_SITES
from paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
INSTALLING = "python3 -m venv"  # tested by test_package.py
# Output of snippets, as stated in their comments.
PRINTED = {
    "In a notebook": ("(1, 4, 4096)",),
    "The modules alone": ("(1, 3, 256)",),
    "Hooks": ("\n▁house ▁farm ▁barn\n",),
    "Patching and steering": ("\n little girl who\n king of king\n",),
}


def snippets(language: str) -> list[object]:
    """Return the snippets of all pages, each once, with page and heading."""
    found: dict[str, object] = {}
    for page in PAGES:
        for part in re.split(r"^#+ ", page.read_text(), flags=re.MULTILINE)[1:]:
            heading = part.partition("\n")[0]
            for i, text in enumerate(re.findall(rf"```{language}\n(.*?)```", part, re.DOTALL)):
                if not text.startswith(INSTALLING):
                    name = f"{page.stem}-{heading}-{i}"
                    found.setdefault(text, pytest.param(heading, text, id=name))
    return list(found.values())


@pytest.mark.parametrize(("heading", "text"), snippets("python"))
def test_python_snippets_run(
    heading: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(text, heading, "exec"), {"__name__": "__main__"})
    out = capsys.readouterr().out
    for said in PRINTED.get(heading, ()):
        assert said in f"\n{out}"


@pytest.mark.exhaustive
@pytest.mark.parametrize(("heading", "text"), snippets("sh"))
def test_shell_snippets_run(heading: str, text: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"XLA_FLAGS": compiling.FLAGS, "PATH": path}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{heading}: {done.stderr}"
    assert done.stdout or (tmp_path / "answers.jsonl").read_text().count("\n") == 2


def test_help_and_tables_have_the_same_options(command: Command) -> None:
    result, option = command("--help"), r"(?<![\w-])--[a-z][a-z-]*"
    assert (result.status, result.err) == (0, "")
    options = set(re.findall(option, result.out))
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("cli.md", "distributed.md"))
    assert options <= set(re.findall(option, pages))
    rows = re.findall(r"^\| `-.*? \|", pages, re.MULTILINE)
    assert set(re.findall(option, "".join(rows))) <= options


def test_the_table_of_capture_sites_is_complete() -> None:
    text = (ROOT / "docs" / "inside.md").read_text()
    sites = re.findall(r"^\| (`.*?) \| \[", text, re.MULTILINE)
    assert tuple(name for cell in sites for name in re.findall(r"`(\w+)`", cell)) == CAPTURE_SITES


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("[bc]*/README.md")], ids=lambda p: p.name)
def test_linked_and_named_files_exist(page: pathlib.Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    named = re.findall(r"`((?:grok1|docs|tests|tools|notebooks|benchmarks)/[\w./-]*)`", text)
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) < 950

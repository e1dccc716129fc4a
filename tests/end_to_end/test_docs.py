"""What README.md and docs/ show runs as it stands there, each snippet alone, and is complete."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from commands import Command
from model import CAPTURE_SITES
from paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
INSTALLING = "python3 -m venv"  # by the test of the package, and whoever runs these tests
# What snippets print, as their comments say.
PRINTED = {
    "In a notebook": ("(1, 4, 4096)",),
    "The modules alone": ("(1, 3, 256)",),
    "Hooks": ("\n▁house ▁farm ▁barn\n",),
    "Patching and steering": ("\n little girl who\n king of king\n",),
}


def snippets(language: str) -> list[object]:
    """Return the snippets of all pages, with page and heading."""
    found = []
    for page in PAGES:
        for part in re.split(r"^#+ ", page.read_text(), flags=re.MULTILINE)[1:]:
            heading = part.partition("\n")[0]
            for i, text in enumerate(re.findall(rf"```{language}\n(.*?)```", part, re.DOTALL)):
                if not text.startswith(INSTALLING):
                    found.append(pytest.param(heading, text, id=f"{page.stem}-{heading}-{i}"))
    return found


@pytest.mark.parametrize(("heading", "text"), snippets("python"))
def test_snippets_run_alone(
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


@pytest.mark.parametrize(("heading", "text"), snippets("sh"))
def test_commands_run(heading: str, text: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PATH": path}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{heading}: {done.stderr}"
    assert done.stdout or (tmp_path / "answers.jsonl").read_text().count("\n") == 2


def test_every_option_is_in_the_tables(command: Command) -> None:
    options = set(re.findall(r"--[a-z][a-z-]*", command("--help").out))
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("cli.md", "distributed.md"))
    assert options - set(re.findall(r"--[a-z][a-z-]*", pages)) <= {"--temp", "--repeat-penalty"}


def test_the_table_of_sites_is_complete() -> None:
    text = (ROOT / "docs" / "inside.md").read_text()
    sites = re.findall(r"^\| (`.*?) \| \[", text, re.MULTILINE)
    assert tuple(name for cell in sites for name in re.findall(r"`(\w+)`", cell)) == CAPTURE_SITES


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("[bc]*/README.md")], ids=lambda p: p.name)
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    named = re.findall(r"`((?:grok1|docs|tests|tools|notebooks|benchmarks)/[\w./-]*)`", text)
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) < 1000

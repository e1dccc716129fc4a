"""What README.md shows of the API runs as it stands there."""

import re

import pytest

from model import CAPTURE_SITES
from paths import ROOT


def test_the_examples_of_requests_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    load, many, _ = [text for text in snippets if "load_model(" in text]
    names: dict[str, object] = {}
    for text in (load.replace("max_tokens=60", "max_tokens=5"), many):
        exec(compile(text, "README.md", "exec"), names)
    king, answers, scored = names["king"], names["answers"], names["scored"]
    assert king.finish_reason == "stop" and "." not in king.text
    assert len({answer.text for answer in answers}) == 3
    assert len(names["handle"].completion.token_ids) == 20
    assert [handle.completion.finish_reason for handle in names["waiting"]] == [
        "length",
        "cancelled",
    ]
    assert scored.prompt_logprobs[0] is None and max(scored.prompt_logprobs[1:]) < 0


def test_the_recipes_for_looking_inside_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text()
    (text,) = [
        text for text in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "inspect" in text
    ]
    names: dict[str, object] = {}
    exec(compile(text, "README.md", "exec"), names)
    found, maps = names["found"], names["maps"]
    assert found.captured.expert_index.shape == (4, len(found.pieces), 2)
    assert maps.captured.attention_weights.shape == (1, 16, len(found.pieces), len(found.pieces))
    said = capsys.readouterr().out
    # As its comments say.
    assert "\n▁house ▁farm ▁barn\n" in said and "\n king of king\n" in said
    settings = {"temperature": 0, "max_len": 3}
    plain = names["server"].generate("Once there was a", **settings)
    assert plain.text == " little girl who"


def test_the_table_of_sites_is_complete() -> None:
    sites = re.findall(r"^\| (`.*?) \| \[", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert tuple(name for cell in sites for name in re.findall(r"`(\w+)`", cell)) == CAPTURE_SITES

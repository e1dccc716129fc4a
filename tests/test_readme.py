"""What README.md shows of the API runs as it stands there."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def test_the_examples_of_requests_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    load, many = [text for text in snippets if "load_server(" in text]
    names: dict[str, object] = {}
    for text in (load.replace("temperature=0.7", "max_len=5"), many):
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

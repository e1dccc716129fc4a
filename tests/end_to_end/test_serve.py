"""`run.py --serve` as a command, and the examples of docs/serving.md."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from grok1.cli.parsing import parse_arguments
from paths import ROOT

PAGE = (ROOT / "docs/serving.md").read_text()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


class Server(NamedTuple):
    """The command, the port that it listens at, and its lines of standard error."""

    process: subprocess.Popen[str]
    port: int
    said: list[str]


@contextlib.contextmanager
def serving(*options: str) -> Iterator[Server]:
    """Start the command with the demo; yield it when it is ready."""
    port, said = free_port(), []
    command = [sys.executable, "run.py", "--serve", str(port), "--slots", "2", "--context", "64"]
    demo = ["--model", "checkpoints/demo", *options]
    with subprocess.Popen(
        [*command, *demo], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        timer = threading.Timer(120, process.kill)
        timer.start()
        try:
            for line in process.stderr:
                said.append(line)
                if line.startswith("ready: "):
                    break
            assert process.poll() is None, said
            yield Server(process, port, said)
        finally:
            timer.cancel()
            process.kill()


def test_the_examples_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    with serving("--chunk", "16") as server:
        assert f"ready: http://127.0.0.1:{server.port}/v1, model demo\n" in server.said
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
            assert "\ngrok_prefix_cache_queries_total 0.0\n" in answer.read().decode()
        (snippet,) = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)
        exec(compile(snippet.replace("8000", str(server.port)), "serving.md", "exec"), {})
        streamed = capsys.readouterr().out
        (curl,) = re.findall(r"^curl \S+ -d '(.*)'$", PAGE, re.MULTILINE)
        url = f"http://127.0.0.1:{server.port}/v1/completions"
        with urllib.request.urlopen(url, curl.encode()) as answer:
            text = json.load(answer)["choices"][0]["text"]
        assert streamed.startswith(f"{text}\n") and len(streamed) > len(text) + 10
        server.process.send_signal(signal.SIGTERM)
        out, err = server.process.communicate(timeout=60)
        assert (server.process.returncode, out, err) == (0, "", "")


def test_every_field_and_path_of_the_page_exists() -> None:
    from grok1.serving.http import fields

    table = PAGE.partition("## Fields")[2].partition("## Chats")[0]
    named = set(re.findall(r"`([a-z_]+)[.`]", table.partition("Errors have")[0]))
    known = fields.COMPLETION | fields.CHAT | fields.IGNORED | fields.REFUSED.keys()
    assert named - {"include_usage"} == known


REFUSED: list[tuple[list[str], str]] = [
    (["--serve", "0"], "expected a port from 1 to 65535, or HOST:PORT, got '0'"),
    (["--serve", "a:b"], "expected a port from 1 to 65535"),
    (["--serve", "0.0.0.0:80"], "expected --api-key, or GROK_API_KEY in the environment"),
    (["--serve", "80", "A"], "--serve and --prompt do not go together: prompts come by HTTP"),
    (["--serve", "80", "--seed", "1"], "--serve and --seed do not go together: each request"),
    (["--serve", "80", "--temp", "1"], "--serve and --temperature do not go together"),
    (["--serve", "80", "--distributed"], "--serve and --distributed do not go together: one"),
    (["--cors", "http://a"], "--cors needs --serve"),
    (["--api-key", "a", "A"], "--api-key needs --serve"),
    (["--serve", "80", "--api-key", ""], "expected printable ASCII characters, got others or none"),
    (["--serve", "80", "--api-key", "clé"], "expected printable ASCII characters, got others"),
    (["--serve", "80", "--cors", "page"], "expected SCHEME://HOST[:PORT], such as"),
    (["--serve", "80", "--plan"], "--serve and --plan do not go together: a plan answers nothing"),
    (["--serve", "80", "--stats"], "--serve and --stats do not go together: answers, routing"),
    (["--port", "80"], "use --serve"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=str)
def test_options_that_do_not_fit_a_server_are_refused(
    given: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GROK_API_KEY", raising=False)
    with pytest.raises(SystemExit) as ended:
        parse_arguments(given)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_options_of_a_server_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROK_API_KEY", "secret")
    found = parse_arguments(["--serve", "[::]:80", "--slots", "3", "--queue", "5"])
    assert found.serve == ("::", 80) and found.api_key == "secret"
    assert (found.batch, found.most_waiting) == (3, 5)
    monkeypatch.delenv("GROK_API_KEY")
    for host in ("127.0.0.1", "localhost", "[::1]"):
        assert parse_arguments(["--serve", f"{host}:80"]).api_key is None
    assert parse_arguments(["--serve", "0.0.0.0:80", "--no-auth"]).serve == ("0.0.0.0", 80)


def run_serve(*given: str, **variables: str) -> Any:
    command = [sys.executable, "run.py", "--model", "checkpoints/demo", *given]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | variables, timeout=120
    )


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_serve("--serve", str(taken.getsockname()[1]))
    assert done.returncode == 1 and "and a free port, got an error" in done.stderr
    assert done.stderr.count("error: ") == 1 and done.stderr.count("\n") == 1
    assert done.stderr.endswith("; choose another port\n")
    done = run_serve("--serve", "192.0.2.1:80", "--no-auth")
    assert done.returncode == 1 and done.stderr.endswith("; choose another host\n")


def test_a_missing_requirement_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(name='uvicorn')")
    done = run_serve("--serve", str(free_port()), PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "uvicorn is not installed; run: pip install -r requirements-serve.txt" in done.stderr


def test_a_wrong_template_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "wrong").write_text("{% for %}")
    done = run_serve("--serve", str(free_port()), "--chat-template", str(tmp_path / "wrong"))
    assert done.returncode == 1 and "expected a Jinja template, got an error" in done.stderr

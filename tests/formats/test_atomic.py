"""Files are opened only if they are regular ones, even if one is replaced meanwhile."""

import os
import pathlib

import pytest

from grok1.formats.atomic import open_regular


def test_open_regular_refuses_a_pipe_replacing_a_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a pipe blocks until another process writes to it."""
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_bytes(b"content")
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)  # so that a failing test does not block
    before = file.stat()
    with open_regular(str(file)) as opened:
        assert opened.read() == b"content" and not os.get_inheritable(opened.fileno())
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda *_, **__: before)
        with pytest.raises(OSError, match="it is not a regular file"):
            open_regular(str(pipe))
    os.close(writer)

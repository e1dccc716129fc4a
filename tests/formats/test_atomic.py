"""A file is opened only if it is a regular one, whatever takes its place meanwhile."""

import os
import pathlib

import pytest

from grok1.formats.atomic import open_regular


def test_a_pipe_in_place_of_a_file_is_not_opened(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither if it comes after the path was looked at: to open it might take for ever."""
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_bytes(b"content")
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)  # so that nothing waits for one
    before = file.stat()
    with open_regular(str(file)) as opened:
        assert opened.read() == b"content" and not os.get_inheritable(opened.fileno())
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda *_, **__: before)
        with pytest.raises(OSError, match="it is not a regular file"):
            open_regular(str(pipe))
    os.close(writer)

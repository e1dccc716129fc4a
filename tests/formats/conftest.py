"""A small checkpoint in both forms."""

import pathlib

import pytest

import checkpoint
from small import save_layers


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_layers(tmp_path_factory.mktemp("released"), 3)


@pytest.fixture(scope="session")
def safe(released: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("safe")
    checkpoint.convert(released, directory, "safetensors")
    return directory

"""The checkpoints that the references saved (golden/make_convert.py), unpacked once, and what they computed."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from golden import seeded

FOLDER = seeded.GOLDEN / "convert"


@pytest.fixture(scope="session")
def outputs() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "outputs.npz", allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """Name of an archive, and perhaps /FILE in it -> the unpacked folder or file."""
    unpacked: dict[str, Path] = {}

    def find(name: str) -> Path:
        archive, _, file = name.partition("/")
        if archive not in unpacked:
            unpacked[archive] = tmp_path_factory.mktemp(archive)
            with tarfile.open(FOLDER / f"{archive}.tar.xz") as tar:
                tar.extractall(unpacked[archive], filter="data")
        return unpacked[archive] / file

    return find

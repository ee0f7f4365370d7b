"""Leaves this folder out of a run of all tests, because it takes minutes to build and install a wheel."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """It is run where the folder, a file of it or its marker is named."""
    named = any("wheel" in argument for argument in [*config.args, config.option.markexpr])
    return None if named else True

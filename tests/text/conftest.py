"""Lets tests of thousands of texts run without the checks of types, which take a hundred times as long as the texts."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked():
    """Switches the checks of types and shapes off; other tests of the same functions have them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)

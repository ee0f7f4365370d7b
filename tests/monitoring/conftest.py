"""Provides the small experiment of tests/training, whose trainings are profiled here."""

from tests.training.conftest import experiment  # noqa: F401

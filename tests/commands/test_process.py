"""Takes a process that has just started and leaves a verdict: programs are kept, and what the user sees is one line."""

import logging
import os
import sys
import warnings

import absl.logging
import pytest

from flax_transformer.commands.process import prepare_libraries, warnings_in_one_line


@pytest.fixture
def unprepared(monkeypatch):
    """Whatever the libraries are prepared for is undone when the test ends."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, verbosity = [logger.level for logger in loggers], absl.logging.get_verbosity()
    yield
    absl.logging.set_verbosity(verbosity)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def test_compiled_programs_are_kept_where_the_user_keeps_caches(unprepared, monkeypatch, tmp_path):
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))

    def folder():
        prepare_libraries()
        return os.environ.pop(names[0])

    assert folder() == str(tmp_path / "caches" / "flax-transformer" / "jax")
    assert os.environ[names[1]] == "0"
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")  # relative: no such thing
    assert folder() == str(tmp_path / ".cache" / "flax-transformer" / "jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folder() == str(tmp_path / ".cache" / "flax-transformer" / "jax")
    monkeypatch.setenv(names[0], "mine")
    assert folder() == "mine"


def raised_in(file):
    """What Python hands on of an error that nobody could catch, raised by code in a file."""
    try:
        exec(compile("raise OSError(28, 'No space left on device')", file, "exec"), {})
    except OSError as error:
        return type("Unraisable", (), {"exc_traceback": error.__traceback__})


def test_the_storage_is_quiet_and_others_are_not(unprepared, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    prepare_libraries()
    for file in ("/lib/orbax/checkpoint/handler.py", "/lib/asyncio/events.py", "/lib/mine.py"):
        sys.unraisablehook(raised_in(file))
    assert [raised.exc_traceback.tb_next.tb_frame.f_code.co_filename for raised in shown] == ["/lib/mine.py"]
    for name in ("absl", "asyncio"):
        assert not logging.getLogger(name).isEnabledFor(logging.ERROR)
    # jax's notes, of backends that are not there, are shown by absl, where absl starts the program.
    assert absl.logging.get_verbosity() == absl.logging.ERROR


def test_a_warning_of_this_library_is_one_line_and_others_are_not_shown(capsys):
    with warnings_in_one_line("train.py"):
        for module in ("flax_transformer.training.lock", "numpy.linalg"):
            warnings.warn_explicit("two\nlines", UserWarning, "file.py", 3, module=module)
    assert capsys.readouterr().err.strip() == "train.py: warning: two lines"

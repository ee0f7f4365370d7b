import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import absl.logging
import jax
import pytest

from flax_transformer.commands.process import is_device_error, prepare_libraries, start_devices, warnings_in_one_line

ROOT = Path(__file__).parents[2]


@pytest.fixture
def unprepared(monkeypatch):
    """Undoes all preparations of libraries when the test ends."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, verbosity = [logger.level for logger in loggers], absl.logging.get_verbosity()
    yield
    absl.logging.set_verbosity(verbosity)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def test_compiled_programs_are_cached_in_the_user_s_cache_folder(unprepared, monkeypatch, tmp_path):
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
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")  # relative, so it is ignored
    assert folder() == str(tmp_path / ".cache" / "flax-transformer" / "jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folder() == str(tmp_path / ".cache" / "flax-transformer" / "jax")
    monkeypatch.setenv(names[0], "mine")
    assert folder() == "mine"


def raised_in(file):
    """What Python passes to its hook for an uncatchable error that code in a file raises."""
    try:
        exec(compile("raise OSError(28, 'No space left on device')", file, "exec"), {})
    except OSError as error:
        return type("Unraisable", (), {"exc_traceback": error.__traceback__})


def test_storage_libraries_are_silenced_and_others_are_not(unprepared, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    prepare_libraries()
    for file in ("/lib/orbax/checkpoint/handler.py", "/lib/asyncio/events.py", "/lib/mine.py"):
        sys.unraisablehook(raised_in(file))
    assert [raised.exc_traceback.tb_next.tb_frame.f_code.co_filename for raised in shown] == ["/lib/mine.py"]
    for name in ("absl", "asyncio"):
        assert not logging.getLogger(name).isEnabledFor(logging.ERROR)
    # If absl starts the program, it shows jax's notes on missing backends.
    assert absl.logging.get_verbosity() == absl.logging.ERROR


def test_a_warning_of_this_library_is_one_line_and_others_are_not_shown(capsys):
    with warnings_in_one_line("train.py"):
        for module in ("flax_transformer.processes.lock", "numpy.linalg"):
            warnings.warn_explicit("two\nlines", UserWarning, "file.py", 3, module=module)
    assert capsys.readouterr().err.strip() == "train.py: warning: two lines"


# Opens a file right after the streams are prepared, prints, and leaves an exit status.
PRINTING = """
import sys
from flax_transformer.commands.process import complete_output, let_output_fail, prepare_streams

is_open = prepare_streams()
if "lossy" in sys.argv:
    let_output_fail()
with open(sys.argv[1], "w") as file, complete_output("program"):
    file.write(f"{file.fileno() > 2} {is_open} {sys.stdin.read()!r}")
    for _ in range(3):
        print("\\u0c85\\udc80" + 9999 * "x", flush=True)
        print("error", file=sys.stderr, flush=True)
"""


def printing(path, redirections, *arguments, **environment):
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-c", PRINTING, path, *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, input=b"", env=os.environ | environment, check=False, timeout=20
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_empty_and_no_file_gets_its_number(closed, unbuffered, tmp_path):
    ended = printing(tmp_path / "file", closed, PYTHONUNBUFFERED=unbuffered)
    assert ended.returncode == 0
    assert (tmp_path / "file").read_text() == f"True {' >&-' not in f' {closed}'} ''"
    assert bool(ended.stdout) == (" >&-" not in f" {closed}") and bool(ended.stderr) == ("2>&-" not in closed)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_an_error_unless_the_program_has_more_to_do(unbuffered, tmp_path):
    failed = printing(tmp_path / "file", ">/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert failed.returncode == 1 and failed.stderr.count(b"\n") == 1
    assert failed.stderr.startswith(b"program: standard output cannot be written (No space left on device)")
    went_on = printing(tmp_path / "file", ">/dev/full", "lossy", PYTHONUNBUFFERED=unbuffered)
    assert went_on.returncode == 0 and went_on.stderr == 3 * b"error\n"
    unseen = printing(tmp_path / "file", ">/dev/full 2>/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert unseen.returncode == 1


@pytest.mark.parametrize("encoding", ["latin-1", "ascii:strict", "utf-8"])
def test_characters_that_an_encoding_lacks_are_escaped(encoding, tmp_path):
    ended = printing(tmp_path / "file", "", PYTHONIOENCODING=encoding)
    first = "\u0c85" if encoding == "utf-8" else "\\u0c85"
    assert ended.returncode == 0 and ended.stdout.decode().startswith(first + "\\udc80xxx")


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("INTERNAL: driver mismatch"), ImportError("jaxlib")])
def test_if_jax_does_not_start_the_error_says_why_and_what_to_set(error, monkeypatch):
    def fail():
        raise error

    start_devices()
    monkeypatch.setattr(jax, "local_devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(ValueError, match=f"jax does not start with JAX_PLATFORMS=cuda .{error or 'Assert'}.*=cpu"):
        start_devices()


def test_memory_and_device_errors_are_distinguished_from_other_errors():
    mine = [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: 8 GB"), jax.errors.JaxRuntimeError("INTERNAL: no GPU")]
    others = [ValueError("RESOURCE_EXHAUSTED: quota of the bucket"), RuntimeError("a bug"), OSError(28, "full")]
    assert [is_device_error(error) for error in (*mine, *others)] == [True] * 3 + [False] * 3

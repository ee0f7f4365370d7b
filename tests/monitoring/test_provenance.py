import subprocess
from pathlib import Path

import jax
import pytest

from flax_transformer.monitoring import provenance as module
from flax_transformer.monitoring.provenance import provenance

ROOT = Path(__file__).parents[2]


def test_versions_command_and_devices_are_recorded(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--workdir=my runs"])
    noted = provenance()
    assert noted["versions"]["jax"] == jax.__version__ and noted["versions"]["flax_transformer"]
    assert noted["devices"] == f"{jax.device_count()} cpu" and noted["command"] == "train.py '--workdir=my runs'"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")
def test_the_revision_is_that_of_git():
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    revision = provenance()["revision"].removesuffix("-dirty")
    assert len(revision) == 12 and head.startswith(revision)


def test_code_copied_without_git_has_the_revision_that_was_copied(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "a" / "b" / "provenance.py"))
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "revision").write_text("0123456789ab-dirty\n")
    assert provenance()["revision"] == "0123456789ab-dirty"


def test_a_wheel_and_a_machine_without_git_have_no_revision(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "a" / "b" / "provenance.py"))
    assert provenance()["revision"] is None
    (tmp_path / ".git").mkdir()
    assert provenance()["revision"] is None  # git finds no repository
    monkeypatch.setenv("PATH", "")
    assert provenance()["revision"] is None

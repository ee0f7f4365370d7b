"""The wheel contains everything that training, translating and planning need."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.wheel
ROOT = Path(__file__).parents[2]


def test_a_wheel_trains_translates_and_plans_outside_the_repository(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={tmp_path}", str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("flax_transformer-*.whl")
    command = [str(ROOT / ".ci" / "try_wheel"), str(wheel), sysconfig.get_path("purelib")]
    environment = os.environ | {"PYTHON": sys.executable, "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    assert done.returncode == 0
    imported = done.stdout.splitlines()[0]
    assert imported.startswith("imported from ") and str(ROOT) not in imported

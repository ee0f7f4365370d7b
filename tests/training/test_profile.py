"""Takes numbers of steps and leaves a verdict: just those are watched."""

import jax.numpy as jnp
import pytest
from etils import epath

from flax_transformer.training import profile
from flax_transformer.training.profile import Profile


@pytest.fixture
def traces(monkeypatch):
    calls = []
    monkeypatch.setattr(profile.jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(profile.jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def watch(wish, first, last, tmp_path, traces):
    watched = Profile(wish, epath.Path(tmp_path) / "profile")
    said = []
    for step in range(first, last + 1):
        watched.before(step)
        traces.append(step)
        said.append(watched.after(step, jnp.zeros(3)))
    watched.close()
    return [line for line in said if line]


def test_the_steps_asked_for_are_watched_and_the_place_is_told(tmp_path, traces):
    (said,) = watch("2:3", 1, 4, tmp_path, traces)
    assert traces == [1, "start", 2, 3, "stop", 4]
    assert said == f"profile of steps 2 to 3: tensorboard --logdir {tmp_path}"


@pytest.mark.parametrize(
    ("wish", "first", "last", "seen"),
    [
        ("", 1, 2, [1, 2]),
        ("2:5", 4, 6, ["start", 4, 5, "stop", 6]),  # the training goes on in the middle
        ("2:5", 6, 7, [6, 7]),
        ("2:5", 1, 3, [1, "start", 2, 3, "stop"]),  # the training ends first
    ],
)
def test_a_training_may_begin_or_end_among_them(wish, first, last, seen, tmp_path, traces):
    watch(wish, first, last, tmp_path, traces)
    assert traces == seen


@pytest.mark.parametrize("wish", ["5", "5:2", "0:3", "a:b", "3-5"])
def test_what_is_no_range_is_an_error(wish, tmp_path):
    with pytest.raises(ValueError, match="--profile is .*e.g. 20:25"):
        Profile(wish, epath.Path(tmp_path))

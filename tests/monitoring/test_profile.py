import jax
import pytest
from etils import epath

from flax_transformer.monitoring import profile
from flax_transformer.monitoring.profile import Profile
from flax_transformer.training.loop import train_and_evaluate
from tests.training.conftest import STEPS, losses_of, with_training, without_held_out


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
        said.append(watched.close() if watched.is_complete(step) else None)
    said.append(watched.close())
    return [line for line in said if line]


@pytest.mark.parametrize(
    ("wish", "first", "last", "seen", "told"),
    [
        ("", 1, 2, [1, 2], None),
        ("2:3", 1, 4, [1, "start", 2, 3, "stop", 4], "2 to 3"),
        ("2:5", 4, 6, ["start", 4, 5, "stop", 6], "4 to 5"),  # the training goes on in the middle
        ("2:5", 6, 7, [6, 7], None),
        ("2:5", 1, 3, [1, "start", 2, 3, "stop"], "2 to 3"),  # the training ends first
    ],
)
def test_the_requested_steps_are_profiled_and_the_folder_is_reported(wish, first, last, seen, told, tmp_path, traces):
    said = watch(wish, first, last, tmp_path, traces)
    assert traces == seen
    assert said == ([f"profile of steps {told}: tensorboard --logdir {tmp_path}"] if told else [])


@pytest.mark.parametrize(
    ("wish", "first", "last", "said"),
    [
        ("20:25", 191, 200, "this training makes steps 191 to 200, choose some of these"),
        ("201:205", 1, 200, "this training makes steps 1 to 200, choose some of these"),
        ("20:25", 201, 200, "this training has already made its 200 steps, raise training.steps"),
        ("20:25", 25, 200, None),
        ("200:205", 1, 200, None),
        ("", 1, 200, None),
    ],
)
def test_a_profile_of_steps_that_training_will_not_make_is_a_warning(wish, first, last, said, tmp_path):
    line = Profile(wish, epath.Path(tmp_path)).missed(first, last)
    assert line == (said and f"--profile={wish} profiles nothing: {said}")


@pytest.mark.slow
def test_a_training_reports_its_profile_at_its_start_or_end(experiment, tmp_path, traces, capsys):
    experiment = without_held_out(experiment)
    train_and_evaluate(experiment, tmp_path, profile=f"{STEPS - 1}:{STEPS + 5}")
    assert traces == ["start", "stop"]
    told = f"profile of steps {STEPS - 1} to {STEPS}: tensorboard --logdir {tmp_path}"
    assert capsys.readouterr().out.splitlines().count(told) == 1
    train_and_evaluate(with_training(experiment, steps=STEPS + 2), tmp_path, profile="2:3")
    assert f"--profile=2:3 profiles nothing: this training makes steps {STEPS + 1} to" in capsys.readouterr().out


@pytest.mark.parametrize("wish", ["2:3", f"{STEPS}:{STEPS + 1}"])
def test_a_profile_that_cannot_be_written_is_a_warning_and_training_goes_on(
    wish, experiment, tmp_path, traces, monkeypatch, capsys
):
    def fail():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: No space left\non device")

    monkeypatch.setattr(profile.jax.profiler, "stop_trace", fail)
    with pytest.warns(UserWarning, match=f"the profile of steps {wish[0]}.* could not .* left on device$"):
        train_and_evaluate(without_held_out(experiment), tmp_path, profile=wish)
    assert [step for step, _ in losses_of(tmp_path)] == list(range(1, STEPS + 1))
    assert "tensorboard --logdir" not in capsys.readouterr().out


@pytest.mark.parametrize("wish", ["5", "5:2", "0:3", "a:b", "3-5"])
def test_an_invalid_range_is_an_error(wish, tmp_path):
    with pytest.raises(ValueError, match="--profile is .*e.g. 20:25"):
        Profile(wish, epath.Path(tmp_path))

"""Records some training steps with jax's profiler, for TensorBoard, XProf or Perfetto."""

import re
import warnings

import jax
from etils import epath


class Profile:
    """Profiles a range of steps, including its first and last step; without a range it does nothing."""

    def __init__(self, steps: str, folder: epath.Path):
        """Reads the range; profiles nothing yet.

        Args:
            steps: "first:last", or "" for no profile.
            folder: where to write the profile.

        Raises:
            ValueError: `steps` is not a range of steps.
        """
        self._first = self._last = self._seen = 0
        self._folder, self._is_open = folder, False
        if not steps:
            return
        match = re.fullmatch(r"(\d+):(\d+)", steps)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"--profile is {steps!r}: give the first and the last step to profile, e.g. 20:25")
        self._first, self._last = int(match[1]), int(match[2])

    def missed(self, first: int, last: int) -> str | None:
        """Returns a warning if a training that makes the steps `first` to `last` makes none of the wanted steps."""
        if not self._last or (self._first <= last and first <= self._last):
            return None
        remedy = (
            f"this training makes steps {first} to {last}, choose some of these"
            if first <= last
            else f"this training has already made its {last} steps, raise training.steps"
        )
        return f"--profile={self._first}:{self._last} profiles nothing: {remedy}"

    def before(self, step: int) -> None:
        """Starts the profiler if this is the first wanted step, or the first one that a resumed training makes."""
        if not self._first <= step <= self._last:
            return
        self._seen = step
        if not self._is_open:
            jax.profiler.start_trace(self._folder)
            self._is_open, self._first = True, step

    def is_complete(self, step: int) -> bool:
        """Whether the profiler runs and this was the last wanted step; `close` it when the step is done."""
        return self._is_open and step >= self._last

    def close(self) -> str | None:
        """Stops the profiler if it still runs; returns a line that says where the profile is, or `None`.

        If the profile cannot be written, this only warns, so that training goes on.
        """
        if not self._is_open:
            return None
        self._is_open = False
        steps = f"profile of steps {self._first} to {self._seen}"
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError) as error:  # jax raises its own RuntimeError if it cannot write a file.
            warnings.warn(
                f"the {steps} could not be written to {self._folder}, training continues without it: free some space "
                f"on the disk, and choose steps that are still to come: {' '.join(str(error).split())}",
                stacklevel=1,
            )
            return None
        return f"{steps}: tensorboard --logdir {self._folder.parent}"

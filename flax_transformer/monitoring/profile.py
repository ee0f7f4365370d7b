"""Takes the numbers of some steps and leaves jax's profile of them, for TensorBoard, XProf or Perfetto to show."""

import re
import warnings
from typing import Any

import jax
from etils import epath


class Profile:
    """Watches the steps `start` to `stop`, both included; without them it does nothing."""

    def __init__(self, steps: str, folder: epath.Path):
        """Takes the wish.

        Args:
            steps: "start:stop", or nothing.
            folder: where the profile goes.

        Raises:
            ValueError: it is no range of steps.
        """
        self._first = self._last = self._seen = 0
        self._folder, self._is_open = folder, False
        if not steps:
            return
        match = re.fullmatch(r"(\d+):(\d+)", steps)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"--profile is {steps!r}: give the first and the last step to be watched, e.g. 20:25")
        self._first, self._last = int(match[1]), int(match[2])

    def missed(self, first: int, last: int) -> str | None:
        """A line that says so, if none of the steps asked for is among those that a training makes."""
        if not self._last or (self._first <= last and first <= self._last):
            return None
        mend = (
            f"this training makes steps {first} to {last}, ask for some of these"
            if first <= last
            else f"this training has made its {last} steps, raise training.steps"
        )
        return f"--profile={self._first}:{self._last} watches nothing: {mend}"

    def before(self, step: int) -> None:
        """Begins, if this step is the first of them, or one of them in a training that goes on there."""
        if not self._first <= step <= self._last:
            return
        self._seen = step
        if not self._is_open:
            jax.profiler.start_trace(self._folder)
            self._is_open, self._first = True, step

    def after(self, step: int, result: Any) -> str | None:
        """Ends when this step is the last of them; a line that tells where the profile is."""
        if not self._is_open or step < self._last:
            return None
        jax.block_until_ready(result)
        return self.close()

    def close(self) -> str | None:
        """Ends what is still watched, since training ends; a line that tells where the profile is.

        Where it cannot be written, a warning says so, and training goes on.
        """
        if not self._is_open:
            return None
        self._is_open = False
        steps = f"profile of steps {self._first} to {self._seen}"
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError) as error:  # jax has its own kind for a file that it cannot write.
            warnings.warn(
                f"the {steps} could not be written to {self._folder}, training goes on without it: make room or mend "
                f"the disk, and ask for steps that are still to come: {' '.join(str(error).split())}",
                stacklevel=1,
            )
            return None
        return f"{steps}: tensorboard --logdir {self._folder.parent}"

"""Takes the numbers of some steps and leaves jax's profile of them, for TensorBoard, XProf or Perfetto to show."""

import re
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
        self._first = self._last = 0
        self._folder, self._is_open = folder, False
        if not steps:
            return
        match = re.fullmatch(r"(\d+):(\d+)", steps)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"--profile is {steps!r}: give the first and the last step to be watched, e.g. 20:25")
        self._first, self._last = int(match[1]), int(match[2])

    def before(self, step: int) -> None:
        """Begins, if this step is the first of them, or one of them in a training that goes on there."""
        if self._first <= step <= self._last and not self._is_open:
            jax.profiler.start_trace(self._folder)
            self._is_open = True

    def after(self, step: int, result: Any) -> str | None:
        """Ends when this step is the last of them; a line that tells where the profile is."""
        if not self._is_open or step < self._last:
            return None
        jax.block_until_ready(result)
        self.close()
        return f"profile of steps {self._first} to {self._last}: tensorboard --logdir {self._folder.parent}"

    def close(self) -> None:
        """Ends what is still watched, since training ends."""
        if self._is_open:
            self._is_open = False
            jax.profiler.stop_trace()

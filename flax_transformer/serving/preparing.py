"""Compiles programs before they are needed: a few before the server is ready, the others while it serves already."""

import functools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from flax_transformer.decoding.sizes import SMALLEST_ROOM
from flax_transformer.serving.models import Served

logger = logging.getLogger("flax_transformer.serving")
Step = Callable[[], None]
MANY = 4  # a step with two or three slots takes about as long as with so many, so there is no program for them
AT_ONCE = 4  # programs, where there are as many processors
ALL = 2**20  # more sentences than there are slots


class Preparation:
    """The programs of some models, compiled on threads of its own."""

    def __init__(self, models: Sequence[Served], longest: int):
        """Lists the programs; nothing is compiled yet.

        Args:
            models: the models.
            longest: the programs are for sentences of up to so many tokens.
        """
        self._first: list[Step] = []
        self._later: list[Step] = []
        for model in {id(model.translator.engine): model for model in models}.values():
            self._add(model, longest)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def _add(self, model: Served, longest: int) -> None:
        engine, config = model.translator.engine, model.translator.config
        programs = engine.programs
        programs.only_prepared()
        longest = min(longest, config.max_length)
        search, streaming = engine.compiled_for(model.search), engine.compiled_for(model.streaming)
        for room in _rooms(longest):
            least, *larger = _numbers(programs.slots(search, room, ALL, prepared=False), engine.ensemble.mesh.size)
            self._first.append(functools.partial(programs.prepare, search, room, least))
            self._later += [functools.partial(programs.prepare, search, room, count) for count in larger]
            self._later.append(functools.partial(programs.prepare, streaming, room, 1))
        self._first += [functools.partial(model.translator.inspector.compile, width) for width in _rooms(longest)[1:]]

    def begin(self, *, everything: bool) -> None:
        """Compiles what single sentences need, then lets a thread compile the rest; with `everything` all at once.

        What the thread cannot compile, for example because the device has too little memory, is logged, and the server
        does without it: more sentences wait for each other.
        """
        self._run(self._first + (self._later if everything else []))
        if not everything:
            steps = [functools.partial(_try, step) for step in self._later]
            self._thread = threading.Thread(target=self._run, args=(steps,), name="compiling", daemon=True)
            self._thread.start()

    def _run(self, steps: Sequence[Step]) -> None:
        workers = min(AT_ONCE, os.cpu_count() or 1, max(1, len(steps)))
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(self._step, steps):
                pass

    def _step(self, step: Step) -> None:
        if not self._ended.is_set():
            step()

    def end(self, seconds: float) -> bool:
        """Compiles nothing more, and waits for what is being compiled; returns whether that ended in time."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()


def _try(step: Step) -> None:
    """Takes a step; logs it if it fails."""
    try:
        step()
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")[:200]
        logger.error(
            "a program could not be compiled (%s: %s), so fewer sentences are translated at once; start with a "
            "smaller --batch_tokens if the device has too little memory",
            type(error).__name__,
            reason,
        )


def _rooms(longest: int) -> list[int]:
    """Rooms of 16, 32, 64, ... tokens up to one that holds `longest`."""
    rooms = [SMALLEST_ROOM]
    while rooms[-1] < longest:
        rooms.append(2 * rooms[-1])
    return rooms


def _numbers(most: int, least: int) -> list[int]:
    """Numbers of slots from `least` to `most`."""
    numbers = []
    while most > least:
        numbers.append(most)
        most //= 2 if most > MANY else 4
    return [least, *reversed(numbers)]

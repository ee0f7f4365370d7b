"""The engine: sentences are submitted at any time from any thread, and one thread, which owns the device, decodes them.

    submit ──▶ waiting, by length ──▶ encoded, packed ──▶ slot, one token a step ──▶ result, stream
    (any thread)                      (the engine's thread)                          (any thread)

Sentences whose searches need the same program share slots: `Machine`. All machines take turns, a few steps each.
"""

import atexit
import dataclasses
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from flax_transformer.decoding.ensemble import Ensemble
from flax_transformer.decoding.machine import Machine
from flax_transformer.decoding.programs import Programs
from flax_transformer.decoding.requests import Ids, Output, Request
from flax_transformer.decoding.settings import BeamSearch, Sampling, SearchSettings, check_sampling
from flax_transformer.decoding.shortlist import Shortlist
from flax_transformer.decoding.sizes import rooms_up_to
from flax_transformer.decoding.waiting import Waiting
from flax_transformer.positions import check_length

STEPS = 16  # of a machine in its turn, at most
STEPS_ALONE = 32  # at most, of a machine with one slot on each device, which is mostly there for a single sentence
SHARE = 8  # a machine goes on until one eighth of its sentences have ended
MANY = 2  # a machine with slots for more than twice the sentences that there are is too large
IDLE_S = 5.0  # seconds without work after which the thread ends


@dataclasses.dataclass
class _Group:
    """Sentences whose searches have the same settings, and the machines that decode them.

    Attributes:
        settings: what the program is compiled for.
        waiting: sentences without a slot.
        machines: by the room of their slots, the largest first.
        current: the machine of each room that takes new sentences; others of the room end those that they have.
        above: the size of source above which a machine takes sentences, by room.
    """

    settings: BeamSearch | Sampling
    waiting: Waiting = dataclasses.field(default_factory=Waiting)
    machines: list[tuple[int, Machine]] = dataclasses.field(default_factory=list)
    current: dict[int, Machine] = dataclasses.field(default_factory=dict)
    above: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def busy(self) -> bool:
        return bool(len(self.waiting) or any(machine.busy for _, machine in self.machines))


class Engine:
    """Decodes sentences that come at any time. `close` it, or leave it: its thread ends by itself when idle.

    Attributes:
        programs: which programs it may use.
    """

    def __init__(self, ensemble: Ensemble, *, batch_tokens: int, shortlist: Shortlist | None = None):
        """Makes an engine; nothing runs until a sentence comes.

        Args:
            ensemble: the models, and the devices that share the slots.
            batch_tokens: source tokens for which there are slots, padding included.
            shortlist: chooses the tokens among which each output is searched; `None` allows all of them.
        """
        self.ensemble, self.batch_tokens, self.shortlist = ensemble, batch_tokens, shortlist
        self.programs = Programs(ensemble, batch_tokens=batch_tokens, shortlist=shortlist)
        self._groups: dict[BeamSearch | Sampling, _Group] = {}
        self._changed = threading.Condition()
        self._inbox: list[tuple[BeamSearch | Sampling, Request]] = []
        self._jobs: list[tuple[Callable[[], None], Future[None]]] = []
        self._thread: threading.Thread | None = None
        self._closed = False
        self._submissions = itertools.count(1)
        self._filled = self._offered = 0

    @property
    def occupancy(self) -> float:
        """The share of slots that held a living sentence, over all steps made while sentences were waiting."""
        return self._filled / max(1, self._offered)

    @property
    def slots(self) -> tuple[int, int]:
        """How many slots hold a sentence now, and how many there are."""
        machines = [machine for group in list(self._groups.values()) for _, machine in list(group.machines)]
        return sum(machine.living for machine in machines), sum(machine.size.slots for machine in machines)

    def submit(
        self,
        sources: Sequence[Ids],
        settings: BeamSearch | Sampling,
        *,
        prefixes: Sequence[Ids] | None = None,
        given: Sequence[int] | None = None,
        rngs: UInt[np.ndarray, "sources key"] | None = None,
        streams: bool = False,
    ) -> list[Request]:
        """Takes sentences in, and returns at once. A sentence that cannot be decoded gets its error as its result.

        Args:
            sources: the ids of each source, including the end of sentence.
            settings: the settings of the search.
            prefixes: the ids with which each output must begin, without an end of sentence; none if not given.
            given: how many ids of each prefix, from the first on, count nothing in scores; 0 if not given.
            rngs: the data of a random key for each source, which only sampling needs.
            streams: whether the tokens of each are told one by one, which takes longer; only with one hypothesis.

        Raises:
            ValueError: the engine is closed, sampling has no random keys or is to compare texts (`mbr`), or tokens of
                several hypotheses are to be told.
        """
        if isinstance(settings, Sampling):
            check_sampling(settings, rngs)
        if streams:
            check_streaming(settings)
        submission = next(self._submissions)
        requests = [
            Request(
                source,
                prefix=prefixes[number] if prefixes else (),
                given=given[number] if given else 0,
                limit=self._limit(settings, len(source)),
                num_return=settings.num_return,
                rng=rngs[number] if rngs is not None else None,
                streams=streams,
                submission=submission,
            )
            for number, source in enumerate(sources)
        ]
        accepted = []
        for request in requests:
            try:
                self._check(request)
                if self.shortlist is not None:
                    request.listed = self._listed(self.shortlist, request)
                accepted.append((self.compiled_for(settings), request))
            except ValueError as error:
                request.fail(error)
        with self._changed:
            self._check_open()
            self._inbox += accepted
            self._wake()
        return requests

    def search(
        self,
        sources: Sequence[Ids],
        settings: BeamSearch | Sampling,
        *,
        prefixes: Sequence[Ids] | None = None,
        given: Sequence[int] | None = None,
        rngs: UInt[np.ndarray, "sources key"] | None = None,
        after_each: Callable[[], None] = lambda: None,
    ) -> list[list[Output]]:
        """Submits sentences and waits for the outputs of all; `after_each` is called after each sentence.

        An exception, also one from `after_each`, cancels the sentences that are left.
        """
        requests = self.submit(sources, settings, prefixes=prefixes, given=given, rngs=rngs)
        outputs = []
        try:
            for request in requests:
                outputs.append(request.result())
                after_each()
        finally:
            for request in requests[len(outputs) :]:
                request.cancel()
        return outputs

    def compile(self, settings: BeamSearch | Sampling, *, longest: int, sentences: int | None) -> None:
        """Compiles what sources of up to `longest` tokens need; arguments as in `Translator.compile`."""

        def run() -> None:
            for room in rooms_up_to(min(longest, self.ensemble.learned or longest)):
                self.programs.prepare(self.compiled_for(settings), room, sentences or self.batch_tokens)

        done: Future[None] = Future()
        with self._changed:
            self._check_open()
            self._jobs.append((run, done))
            self._wake()
        done.result()

    def close(self) -> None:
        """Ends the thread; sentences that are not done get an error."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._changed.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the engine is closed: make a new translator")

    def _wake(self) -> None:
        """Starts the thread if it does not run; the caller holds the lock."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="flax_transformer decoding", daemon=True)
            self._thread.start()
        self._changed.notify()

    def _limit(self, settings: SearchSettings, source_length: int) -> int:
        """The maximum length of an output, in tokens, for a source of `source_length` tokens."""
        learned = self.ensemble.learned
        most = [config.max_output for config in self.ensemble.configs if config.max_output]
        return min([settings.limit(source_length), *most, *([learned] if learned else [])])

    def _check(self, request: Request) -> None:
        """Raises ValueError if a sentence cannot be decoded."""
        if self.ensemble.learned is not None:
            check_length(len(request.source), self.ensemble.learned)
        if len(request.prefix) >= request.limit:
            raise ValueError(
                f"a prefix has {len(request.prefix)} tokens, but its output may have only {request.limit} with the end "
                "of sentence: shorten it, or raise max_length or extra_length"
            )
        config = self.ensemble.configs[0]
        for name, ids, size in (
            ("source", request.source, config.source_vocab_size),
            ("prefix", request.prefix, config.target_vocab_size),
        ):
            wrong = [token for token in ids if not 0 <= token < size]
            if wrong:
                raise ValueError(
                    f"a {name} has the token id {wrong[0]}, the vocabulary has {size}, 0 to {size - 1}: give ids of "
                    "this model's vocabulary"
                )
        never = {token for each in self.ensemble.configs for token in each.banned_ids}.intersection(request.prefix)
        if never:
            raise ValueError(
                f"a prefix has the token id {min(never)}, which the model never generates (model.banned_ids): begin "
                "with a text that has no such token"
            )

    def _listed(self, shortlist: Shortlist, request: Request) -> Int[np.ndarray, "C"]:
        """The tokens among which the outputs of a sentence are chosen, in rising order."""
        config = self.ensemble.configs[0]
        return shortlist.allowed(request.source, config.target_vocab_size, also=[*request.prefix, config.eos_id])

    def compiled_for(self, settings: BeamSearch | Sampling) -> BeamSearch | Sampling:
        """The settings of the program: what each request says for itself is left out, and ids that no output contains
        are banned."""
        never = {token for config in self.ensemble.configs for token in config.never_chosen}
        banned = tuple(sorted({*settings.banned, *never} - {self.ensemble.configs[0].eos_id}))
        shared = settings.replace(banned=banned, extra_length=0, max_length=None)
        return shared.replace(num_return=shared.beam_size) if isinstance(shared, BeamSearch) else shared.drawn

    def _run(self) -> None:
        """What the thread does."""
        atexit.register(self.close)
        try:
            while self._wait():
                try:
                    self._turn()
                except BaseException as error:  # each waiting call is to get it
                    self._fail(error)
        finally:
            atexit.unregister(self.close)

    def _wait(self) -> bool:
        """Waits for work and takes it in; false if the thread is to end."""
        with self._changed:
            while not (self._inbox or self._jobs or self._closed or self._busy):
                if not self._changed.wait(IDLE_S) and not (self._inbox or self._jobs or self._closed):
                    self._groups.clear()
                    self._thread = None
                    return False
            inbox, self._inbox = self._inbox, []
            jobs, self._jobs = self._jobs, []
            closed = self._closed
        groups: dict[Any, list[Request]] = {}
        for settings, request in inbox:
            groups.setdefault(settings, []).append(request)
        for settings, requests in groups.items():
            self._groups.setdefault(settings, _Group(settings)).waiting.add(requests)
        if closed:
            error = ValueError("the engine was closed before this was done: make a new translator")
            self._fail(error)
            for _, done in jobs:
                done.set_exception(error)
            return False
        for job, done in jobs:
            try:
                job()
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)
        return True

    @property
    def _busy(self) -> bool:
        return any(group.busy for group in self._groups.values())

    def _fail(self, error: BaseException) -> None:
        """Ends all sentences with an error, and lets go of all slots."""
        groups, self._groups = self._groups, {}
        for group in groups.values():
            for request in group.waiting.take_all():
                request.fail(error)
            for _, machine in group.machines:
                for request in machine.requests():
                    request.fail(error)

    def _turn(self) -> None:
        """Lets each machine make its next steps."""
        for group in list(self._groups.values()):
            self._make_room(group)
            for room, machine in list(group.machines):
                self._turn_machine(group, room, machine)

    def _turn_machine(self, group: _Group, room: int, machine: Machine) -> None:
        above = group.above.get(room, room)
        waiting = group.waiting if group.current.get(room) is machine else Waiting()
        machine.fill(waiting, above)
        if machine.living:
            waits = bool(waiting.count(above, room))
            own = machine.size.slots // self.ensemble.mesh.size
            enough = max(1, machine.living // self.ensemble.mesh.size // SHARE)
            steps = STEPS if own > 1 else STEPS_ALONE
            machine.dispatch(1 if machine.streams else steps, enough, waits=waits)
        if machine.pending >= self._depth or (machine.pending and not machine.living):
            before = machine.filled, machine.offered
            outgrown = machine.collect()
            self._filled += machine.filled - before[0]
            self._offered += machine.offered - before[1]
            for number, slot in enumerate(outgrown):
                machine.give(slot, self._larger(group, machine, room, len(outgrown) - number))

    @property
    def _depth(self) -> int:
        """How many chunks of work each machine has been given at once, so that a device need not wait for the host."""
        return 1 if self.ensemble.mesh.devices.flat[0].platform == "cpu" else 2

    def _make_room(self, group: _Group) -> None:
        """Makes machines for the sentences that wait, if those that are there have too few slots."""
        served: list[tuple[int, int]] = []  # a room, and the size of source above which it takes sentences
        for below, room in reversed(
            list(itertools.pairwise([0, *self.programs.rooms(group.settings, group.waiting.longest())]))
        ):
            count = group.waiting.count(below, room)
            exists = any(machine.size.slots > 1 for other, machine in group.machines if other == room)
            if served and count < self.programs.few(group.settings, room) and not exists:
                served[-1] = served[-1][0], below
            elif count:
                served.append((room, below))
        group.above = dict(served)
        for room, above in served:
            # A few sentences would be slow in the many slots that others have left, and many need more slots.
            own = [machine for other, machine in group.machines if other == room]
            demand = group.waiting.count(above, room) + sum(machine.living for machine in own)
            slots = self.programs.slots(group.settings, room, demand)
            current = next((machine for machine in own if machine is group.current.get(room)), None)
            most = self.programs.slots(group.settings, room, MANY * demand) if current and current.busy else slots
            if current is None or not slots <= current.size.slots <= most:
                fitting = (machine for machine in own if machine.size.slots == slots)
                group.current[room] = next(fitting, None) or self._add_machine(group, room, demand)

    def _larger(self, group: _Group, machine: Machine, room: int, count: int) -> Machine:
        """A machine with an empty slot and more places, for one of so many sentences that need it."""
        for _, other in group.machines:
            if other.size.target > machine.size.target and other.living < other.size.slots:
                return other
        return self._add_machine(group, 2 * room, count)

    def _add_machine(self, group: _Group, room: int, count: int) -> Machine:
        """Makes slots for so many sentences, after it has let go of those that nobody uses."""
        for each in self._groups.values():
            each.machines = [(own, machine) for own, machine in each.machines if machine.busy]
            each.current = {own: machine for own, machine in each.current.items() if machine.busy}
        machine = self.programs.machine(group.settings, room, count)
        group.machines = sorted([*group.machines, (room, machine)], key=lambda entry: -entry[0])
        return machine


def check_streaming(settings: SearchSettings) -> None:
    """Raises ValueError for a search with several hypotheses, of which no token is certain before the end."""
    if settings.hypotheses > 1:
        raise ValueError(f"streaming works with one hypothesis, not {settings.hypotheses}: search with a beam of 1")

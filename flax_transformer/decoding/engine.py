"""The engine: sentences are submitted at any time from any thread, and one thread, which owns the device, decodes them.

    submit ──▶ waiting, by length ──▶ encoded, packed ──▶ slot, one token a step ──▶ result, stream
    (any thread)                      (the engine's thread)                          (any thread)

`Scheduler` decides which sentences share slots, and when.
"""

import atexit
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt

from flax_transformer.decoding.ensemble import Ensemble
from flax_transformer.decoding.programs import Programs
from flax_transformer.decoding.requests import Ids, Output, Request
from flax_transformer.decoding.scheduler import Scheduler
from flax_transformer.decoding.settings import BeamSearch, Sampling, SearchSettings, check_sampling
from flax_transformer.decoding.shortlist import Shortlist
from flax_transformer.decoding.sizes import rooms_up_to
from flax_transformer.positions import check_length

IDLE_S = 5.0  # seconds without work after which the thread ends


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
        # A device is given work ahead, so that it need not wait for the host; a CPU is both.
        depth = 1 if ensemble.mesh.devices.flat[0].platform == "cpu" else 2
        self._scheduler = Scheduler(self.programs, devices=ensemble.mesh.size, depth=depth)
        self._changed = threading.Condition()
        self._inbox: list[tuple[BeamSearch | Sampling, Request]] = []
        self._jobs: list[tuple[Callable[[], None], Future[None]]] = []
        self._thread: threading.Thread | None = None
        self._closed = False
        self._submissions = itertools.count(1)

    @property
    def occupancy(self) -> float:
        """The share of slots that held a living sentence, over all steps made while sentences were waiting."""
        return self._scheduler.occupancy

    @property
    def slots(self) -> tuple[int, int]:
        """How many slots hold a sentence now, and how many there are."""
        return self._scheduler.slots

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
            ValueError: the engine is closed, sampling has no random keys, or no such data of them, or is to compare
                texts (`mbr`), or tokens of several hypotheses are to be told.
        """
        if isinstance(settings, Sampling):
            check_sampling(settings, rngs)
            shape = (len(sources), *jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape)
            if not isinstance(rngs, np.ndarray) or (rngs.shape, rngs.dtype) != (shape, np.uint32):
                raise ValueError(
                    f"rngs is no NumPy array of uint32 and shape {shape}: give np.asarray(jax.random.key_data(keys)), "
                    "with a key for each source"
                )
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
        accepted, compiled = [], self.compiled_for(settings)
        for request in requests:
            try:
                self._check(request)
                if (listed := self.listed(request.source, request.prefix)) is not None:
                    request.listed = listed
                accepted.append((compiled, request))
            except ValueError as error:
                request.fail(error)
        with self._changed:
            self._check_open()
            self._wake()
            self._inbox += accepted
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
            self._wake()
            self._jobs.append((run, done))
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
            thread = threading.Thread(target=self._run, name="flax_transformer decoding", daemon=True)
            thread.start()  # may fail where a process may have no more threads
            self._thread = thread
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
        if {config.pad_id, config.eos_id}.intersection(request.prefix):
            raise ValueError("a prefix has padding or an end of sentence: leave these ids out")
        if request.given > len(request.prefix):
            raise ValueError(
                f"a prefix has {len(request.prefix)} tokens, of which {request.given} are given: give a smaller number"
            )
        never = {token for each in self.ensemble.configs for token in each.banned_ids}.intersection(request.prefix)
        if never:
            raise ValueError(
                f"a prefix has the token id {min(never)}, which the model never generates (model.banned_ids): begin "
                "with a text that has no such token"
            )

    def listed(self, source: Ids, also: Ids) -> Int[np.ndarray, "C"] | None:
        """The tokens among which the outputs of a source are chosen, in rising order; `None` without a shortlist.

        Args:
            source: the ids of the source.
            also: ids that are allowed in any case, like the end of sentence.
        """
        if self.shortlist is None:
            return None
        config = self.ensemble.configs[0]
        return self.shortlist.allowed(source, config.target_vocab_size, also=[*also, config.eos_id])

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
                    self._scheduler.turn()
                except BaseException as error:  # each waiting call is to get it
                    self._scheduler.fail(error)
        finally:
            with self._changed:
                if self._thread in (None, threading.current_thread()):  # otherwise the next thread has begun
                    atexit.unregister(self.close)

    def _wait(self) -> bool:
        """Waits for work and takes it in; false if the thread is to end."""
        with self._changed:
            while not (self._inbox or self._jobs or self._closed or self._scheduler.busy):
                if not self._changed.wait(IDLE_S) and not (self._inbox or self._jobs or self._closed):
                    self._scheduler.groups.clear()
                    self._thread = None
                    return False
            inbox, self._inbox = self._inbox, []
            jobs, self._jobs = self._jobs, []
            closed = self._closed
        groups: dict[Any, list[Request]] = {}
        for settings, request in inbox:
            groups.setdefault(settings, []).append(request)
        for settings, requests in groups.items():
            self._scheduler.add(settings, requests)
        if closed:
            error = ValueError("the engine was closed before this was done: make a new translator")
            self._scheduler.fail(error)
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


def check_streaming(settings: SearchSettings) -> None:
    """Raises ValueError for a search with several hypotheses, of which no token is certain before the end."""
    if settings.hypotheses > 1:
        raise ValueError(f"streaming works with one hypothesis, not {settings.hypotheses}: search with a beam of 1")

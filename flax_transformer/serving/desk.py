"""The queue in front of the engines: it takes in the sentences of all requests, and gives each engine a few at a time.

    request a: 5,000 sentences ─┐                  ┌──────────────┐
    request b: 1 sentence      ─┼─▶ in fair turns ─▶ engine: slots │ ─▶ outputs, in the event loop
    request c: 3 sentences     ─┘                  └──────────────┘

A request that is alone may fill the engine. Beside others, it has at most as many sentences there as all others have
together, so the slots stay few and each step short while small requests come and go.
"""

import asyncio
import dataclasses
import functools
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from flax_transformer.decoding.drafts import Draft
from flax_transformer.decoding.engine import Engine
from flax_transformer.decoding.requests import Output, Request
from flax_transformer.serving.refusals import Refusal

ALWAYS = 8  # so many sentences of each request may be in the engine, whatever others have there
RETRY_S = 2.0  # after which a client may try again when the queue was full


class _Job:
    """The sentences of one request, the longest first, so that those in the engine together have similar lengths."""

    def __init__(self, draft: Draft, loop: asyncio.AbstractEventLoop):
        self.draft = draft
        sizes = [len(source) for source in draft.sources]
        self.waiting = deque(sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True))
        self.requests: dict[int, Request] = {}
        self.outputs: dict[int, list[Output]] = {}
        self.done: asyncio.Future[None] = loop.create_future()

    def end(self, error: BaseException | None = None) -> None:
        """Gives up what is left; the slots go to other sentences."""
        self.waiting.clear()
        for request in self.requests.values():
            request.cancel()
        if not self.done.done():
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)


@dataclasses.dataclass
class _Line:
    """The jobs that want the same engine, in the order of their next turns."""

    jobs: deque[_Job] = dataclasses.field(default_factory=deque)
    inside: int = 0  # sentences in the engine


class Desk:
    """Admits sentences and waits for their outputs, for coroutines of one event loop.

    Attributes:
        open: how many sentences were admitted and are not done.
    """

    def __init__(self, *, queue: int, inside: int, count_tokens: Callable[[int], None] = lambda tokens: None):
        """Makes an empty desk.

        Args:
            queue: how many sentences may be open.
            inside: how many sentences an engine has at most.
            count_tokens: is told how many tokens each output has.
        """
        self.open = 0
        self._queue, self._inside, self._count_tokens = queue, inside, count_tokens
        self._lines: dict[Engine, _Line] = {}

    async def decode(self, engine: Engine, draft: Draft) -> list[list[Output]]:
        """The outputs of each source of a draft; if the coroutine is cancelled, so are its sentences.

        Raises:
            Refusal: with status 503; too many sentences are open.
            Exception: what the engine raised for a sentence; those that are left are given up.
        """
        self.admit(len(draft.sources))
        job = _Job(draft, asyncio.get_running_loop())
        line = self._lines.setdefault(engine, _Line())
        line.jobs.append(job)
        try:
            self._give(engine, line)
            if draft.sources:
                await job.done
        finally:
            job.end()
            if job in line.jobs:
                line.jobs.remove(job)
            self.open -= len(draft.sources)
        return [job.outputs[number] for number in range(len(draft.sources))]

    async def stream(self, engine: Engine, draft: Draft) -> AsyncIterator[list[list[int]]]:
        """Yields the ids so far of each source of a draft, one source after the other.

        Tokens that come while nobody asks for them are told together. The caller has admitted the draft; arguments and
        other errors are as in `decode`.
        """
        loop = asyncio.get_running_loop()
        found: list[list[int]] = []
        for number in range(len(draft.sources)):
            told: asyncio.Queue[list[int] | None] = asyncio.Queue()

            def tell(ids: list[int] | None, told: asyncio.Queue[list[int] | None] = told) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(told.put_nowait, ids)

            (request,) = draft.submit(engine, [number], streams=True)
            request.when_told(tell)
            request.when_done(functools.partial(_tell_end, tell))
            try:
                ended, latest = False, None
                while not ended:
                    events = [await told.get()]
                    while not told.empty():
                        events.append(told.get_nowait())
                    ended = None in events
                    if some := [ids for ids in events if ids is not None]:
                        latest = some[-1]
                        yield [*found, latest]
                found.append(request.result()[0].ids.tolist())
                if found[-1] != latest:  # it ended before it was asked to tell
                    yield [*found]
            finally:
                request.cancel()
            self._count_tokens(len(found[-1]))

    def admit(self, sentences: int) -> None:
        """Counts sentences as open; raises `Refusal` if there are too many. The caller subtracts them from `open`."""
        if self.open + sentences > self._queue:
            raise Refusal(
                503,
                f"the server has {self.open} sentences to translate and room for {self._queue}: try again later"
                if sentences <= self._queue
                else f"the request has {sentences} sentences, the server's queue has room for {self._queue}: divide it",
                reason="queue_full",
                retry_after=RETRY_S,
            )
        self.open += sentences

    def _give(self, engine: Engine, line: _Line) -> None:
        """Lets each job in its turn put sentences into the engine, until it is full or no job may."""
        passed = 0
        while line.jobs and passed < len(line.jobs) and line.inside < self._inside:
            job = line.jobs[0]
            line.jobs.rotate(-1)
            others = line.inside - len(job.requests)
            share = self._inside if len(line.jobs) == 1 else max(ALWAYS, others)
            room = min(share - len(job.requests), self._inside - line.inside, len(job.waiting))
            if room > 0:
                self._submit(engine, line, job, [job.waiting.popleft() for _ in range(room)])
                passed = 0
            else:
                passed += 1

    def _submit(self, engine: Engine, line: _Line, job: _Job, numbers: Sequence[int]) -> None:
        draft, loop = job.draft, asyncio.get_running_loop()
        try:
            requests = draft.submit(engine, numbers)
        except ValueError as error:  # the engine is closed
            job.end(error)
            return
        line.inside += len(requests)
        for number, request in zip(numbers, requests, strict=True):
            job.requests[number] = request

            def ended(request: Request, number: int = number) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(self._ended, engine, line, job, number, request)

            request.when_done(ended)

    def _ended(self, engine: Engine, line: _Line, job: _Job, number: int, request: Request) -> None:
        """Takes a sentence's outputs, and gives its place to the next one."""
        line.inside -= 1
        del job.requests[number]
        if not job.done.done():
            try:
                outputs = request.result()
            except BaseException as error:
                job.end(error)
            else:
                job.outputs[number] = outputs
                self._count_tokens(len(outputs[0].ids))
                if len(job.outputs) == len(job.draft.sources):
                    job.end()
        if not job.waiting and job in line.jobs:
            line.jobs.remove(job)  # it needs no more turns
        self._give(engine, line)


def _tell_end(tell: Callable[[None], None], request: Request) -> None:
    tell(None)

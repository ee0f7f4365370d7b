import asyncio

import numpy as np
import pytest

from flax_transformer.decoding.drafts import Draft
from flax_transformer.decoding.engine import Engine
from flax_transformer.decoding.requests import Output, Request
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.serving.desk import ALWAYS, Desk
from flax_transformer.serving.refusals import Refusal

SEARCH = BeamSearch()


class SlowEngine(Engine):
    """Takes sentences, and ends them when it is told to."""

    def __init__(self):
        self.inside = []
        self.order = []

    def submit(self, sources, settings, **options):
        requests = [
            Request(source, prefix=(), given=0, limit=9, num_return=1, rng=None, streams=False) for source in sources
        ]
        self.inside += requests
        self.order += [source[0] for source in sources]
        return requests

    def end(self, count):
        for request in [request for request in self.inside if not request.done][:count]:
            request.finish([Output(np.array(request.source, np.int32), np.zeros(len(request.source)))])
        self.inside = [request for request in self.inside if not request.done]

    def of(self, name):
        return sum(request.source[0] == name and not request.done for request in self.inside)


class Sentences(Draft):
    """A draft of sentences that all begin with the same id, by which a test knows whose they are."""

    def __init__(self, name, count):
        self.sources = [[name, *[0] * (number % 5)] for number in range(count)]
        self.prefixes, self.given, self.rngs = [()] * count, [0] * count, None
        self._search = SEARCH


@pytest.fixture
def run():
    """Runs a test as a coroutine with a desk of 32 places and an engine."""

    def run(test, queue=10_000):
        return asyncio.run(asyncio.wait_for(test(Desk(queue=queue, inside=32), SlowEngine()), 60))

    return run


async def turn():
    for _ in range(5):
        await asyncio.sleep(0)


def test_outputs_come_in_the_order_of_the_sources(run):
    async def test(desk, engine):
        task = asyncio.create_task(desk.decode(engine, Sentences(7, 100)))
        while not task.done():
            await turn()
            assert len(engine.inside) <= 32
            engine.end(5)
        return await task

    found = run(test)
    assert [output.ids.tolist() for (output,) in found] == Sentences(7, 100).sources


def test_a_request_alone_fills_the_engine_and_beside_others_has_what_they_have(run):
    async def test(desk, engine):
        big = asyncio.create_task(desk.decode(engine, Sentences(1, 5000)))
        await turn()
        assert engine.of(1) == 32
        small = [asyncio.create_task(desk.decode(engine, Sentences(2, 1))) for _ in range(4)]
        await turn()
        engine.end(4)
        await turn()
        assert engine.of(2) == 4  # each came in at its first turn
        for _ in range(40):
            while engine.of(2) < 4:
                small.append(asyncio.create_task(desk.decode(engine, Sentences(2, 1))))
                await turn()
                engine.end(1)
                await turn()
            engine.inside.sort(key=lambda request: request.source[0])
            engine.end(4)
            await turn()
        assert engine.of(1) <= ALWAYS + 4  # it left the places to which it had no turn
        big.cancel()
        with pytest.raises(asyncio.CancelledError):
            await big
        await turn()
        assert engine.of(1) == 0 and desk.open == sum(not task.done() for task in small)
        for task in small:
            task.cancel()

    run(test)


def test_a_request_that_is_given_up_leaves_the_engine_and_the_queue(run):
    async def test(desk, engine):
        task = asyncio.create_task(desk.decode(engine, Sentences(1, 50)))
        await turn()
        requests = list(engine.inside)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert desk.open == 0 and all(request.done for request in requests)
        again = asyncio.create_task(desk.decode(engine, Sentences(2, 3)))
        await turn()
        assert engine.of(2) == 3
        engine.end(99)
        assert len(await again) == 3

    run(test)


def test_an_error_of_one_sentence_ends_its_request_alone(run):
    async def test(desk, engine):
        bad = asyncio.create_task(desk.decode(engine, Sentences(1, 20)))
        good = asyncio.create_task(desk.decode(engine, Sentences(2, 20)))
        await turn()
        next(request for request in engine.inside if request.source[0] == 1).fail(ValueError("too long"))
        await turn()
        assert engine.of(1) == 0
        while not good.done():
            engine.end(3)
            await turn()
        with pytest.raises(ValueError, match="too long"):
            await bad
        assert len(await good) == 20 and desk.open == 0

    run(test)


def test_more_sentences_than_the_queue_holds_are_refused_at_once(run):
    async def test(desk, engine):
        first = asyncio.create_task(desk.decode(engine, Sentences(1, 60)))
        await turn()
        with pytest.raises(Refusal) as refused:
            await desk.decode(engine, Sentences(2, 41))
        assert refused.value.status == 503 and refused.value.retry_after and desk.open == 60
        second = asyncio.create_task(desk.decode(engine, Sentences(2, 40)))
        while not (first.done() and second.done()):
            await turn()
            engine.end(8)
        assert desk.open == 0

    run(test, queue=100)


class FastEngine(SlowEngine):
    """Has ended each sentence when `submit` returns."""

    def submit(self, sources, settings, **options):
        requests = super().submit(sources, settings, **options)
        self.end(len(requests))
        return requests


def test_a_stream_tells_sentences_that_ended_before_anyone_listened(run):
    async def test(desk, engine):
        return [ids async for ids in desk.stream(FastEngine(), Sentences(7, 2))]

    assert run(test) == [[[7]], [[7], [7, 0]]]


def test_no_sentences_are_done_at_once(run):
    async def test(desk, engine):
        return await asyncio.wait_for(desk.decode(engine, Sentences(1, 0)), 1)

    assert run(test) == []

"""What an engine gives back for a sentence: the outputs when they are done, the tokens so far, and a way to cancel."""

import contextlib
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt

Ids = Sequence[int]


class Output(NamedTuple):
    """One output.

    Attributes:
        ids: its tokens, including the end of sentence.
        log_probs: the log-probability of each token, in nats.
    """

    ids: Int[np.ndarray, "T"]
    log_probs: Float[np.ndarray, "T"]


class Request:
    """A sentence that was submitted to an engine. Any thread may use it.

    Attributes:
        source: the ids of the source, including the end of sentence.
        prefix: the ids with which each output must begin.
        given: how many of these, from the first on, count nothing in scores.
        limit: the maximum length of an output, in tokens.
        num_return: how many outputs are wanted.
        listed: the tokens among which the outputs are chosen, which the engine sets; empty where all are.
        rng: the data of the random key of its samples; `None` if nothing is sampled.
        streams: whether the tokens so far are told.
        submission: the number of the call that submitted it, counted from 1.
    """

    def __init__(
        self,
        source: Ids,
        *,
        prefix: Ids,
        given: int,
        limit: int,
        num_return: int,
        rng: UInt[np.ndarray, "key"] | None,
        streams: bool,
        submission: int = 0,
    ):
        """Makes a request that no engine has begun."""
        self.source, self.prefix, self.given = source, prefix, given
        self.limit, self.num_return = limit, num_return
        self.rng, self.streams, self.submission = rng, streams, submission
        self.listed: Ids | np.ndarray = ()
        self._outputs: Future[list[Output]] = Future()
        self._tokens: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()
        self._told = 0
        self._listener: Callable[[list[int]], None] | None = None

    def result(self, timeout: float | None = None) -> list[Output]:
        """Waits for the outputs: the best first, or samples in the order they were drawn.

        Args:
            timeout: seconds to wait at most; `None` for no limit.

        Raises:
            concurrent.futures.CancelledError: the request was cancelled.
            TimeoutError: the time is over.
            ValueError: this sentence cannot be decoded, or the engine was closed.
        """
        return self._outputs.result(timeout)

    def __iter__(self) -> Iterator[list[int]]:
        """Yields all ids of its hypothesis so far after each new one, if `streams`.

        Raises errors as `result` does, but ends without one if the request was cancelled.
        """
        while (ids := self._tokens.get()) is not None:
            yield ids
        if not self._outputs.cancelled():
            self.result()

    def when_done(self, call: Callable[["Request"], None]) -> None:
        """Calls `call(request)` once it is done, failed or was cancelled; at once, or in the thread that ends it."""
        self._outputs.add_done_callback(lambda _: call(self))

    def when_told(self, call: Callable[[list[int]], None]) -> None:
        """Calls `call(ids)` with all ids so far after each new one, in the engine's thread; only if it streams.

        If the call raises an error, this request ends with it.
        """
        self._listener = call

    def cancel(self) -> None:
        """Gives the sentence up, and its slot to the next one; without effect when the outputs are there."""
        self._outputs.cancel()
        self._tokens.put(None)

    @property
    def done(self) -> bool:
        """Whether nothing more is to be done: the outputs are there, or it failed or was cancelled."""
        return self._outputs.done()

    @property
    def need(self) -> int:
        """The least places that it needs for source tokens, and for output tokens at its beginning."""
        return max(len(self.source), len(self.prefix) + 1)

    def tell(self, ids: list[int]) -> None:
        """Tells the ids so far, once for each new one; only the engine calls it, as it does the two below."""
        for length in range(self._told + 1, len(ids) + 1):
            self._tokens.put(ids[:length])
            if self._listener is not None:
                try:
                    self._listener(ids[:length])
                except Exception as error:  # it is of no concern to the other sentences
                    self._listener = None
                    self.fail(error)
        self._told = len(ids)

    def finish(self, outputs: list[Output]) -> None:
        """Ends it with outputs."""
        with contextlib.suppress(InvalidStateError):  # it was cancelled
            self._outputs.set_result(outputs)
        self._tokens.put(None)

    def fail(self, error: BaseException) -> None:
        """Ends it with an error."""
        with contextlib.suppress(InvalidStateError):
            self._outputs.set_exception(error)
        self._tokens.put(None)

"""`Service`: what all routes share. It admits requests, and ends each with an answer, an error or a deadline."""

import asyncio
import functools
import hashlib
import json
import logging
import math
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from flax_transformer.decoding.engine import Engine
from flax_transformer.decoding.settings import BeamSearch, Sampling
from flax_transformer.errors import is_out_of_memory, is_own
from flax_transformer.serving.desk import RETRY_S, Desk
from flax_transformer.serving.limits import Keys, Limits, Meter
from flax_transformer.serving.metrics import Metrics
from flax_transformer.serving.models import Models, Served
from flax_transformer.serving.parameters import Parameters, read_parameters
from flax_transformer.serving.refusals import Refusal

SEARCHES = 32  # kinds of searches that each model is compiled for
CLIENT_GONE = 499  # what the metrics call a request whose client did not wait for the answer
READING_S = 2.0  # how long the end waits for requests that are still being sent, to tell their clients
SLOTS = (
    ("slots_in_use", "Slots that hold a sentence, by model."),
    ("slots", "Slots, by model."),
)
logger = logging.getLogger("flax_transformer.serving")


class Json(Response):
    """An answer in JSON; half a surrogate pair, which is not a character, becomes a question mark."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Writes the content."""
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(errors="replace")


def error_answer(refusal: Refusal) -> Json:
    """The answer to a request that is refused."""
    answer = Json({"error": refusal.message}, refusal.status)
    if refusal.retry_after is not None:
        answer.headers["Retry-After"] = str(max(1, math.ceil(refusal.retry_after)))
    return answer


class Call:
    """A request that was let in.

    Attributes:
        service: what it may use.
        parameters: what it wants.
        client: whose it is: the address, or the digest of the key.
    """

    def __init__(self, service: "Service", parameters: Parameters, client: str):
        """Takes what the attributes say."""
        self.service, self.parameters, self.client = service, parameters, client

    def count(self, texts: int) -> None:
        """Counts the request as so many under the limit of requests a minute; raises `Refusal` if that is too many."""
        self.service.meter.count(self.client, max(1, texts))


Work = Callable[[Call], Awaitable[Response]]


class Service:
    """A server's models, its queue and its rules.

    Attributes:
        models: the models.
        limits: the limits.
        keys: the API keys, of which each request needs one; `None` if none is needed.
        metrics: the numbers that it counts.
        desk: the queue.
        meter: counts the requests of each client.
        replace_unknown: whether unknown pieces of translations are replaced by what they translate.
        streams: how many answers are being told token by token.
        bytes: how large the bodies are of all requests that are being read or answered.
        stopping: whether new requests are refused because the server is about to end.
    """

    def __init__(
        self,
        models: Models,
        limits: Limits,
        *,
        keys: Keys | None = None,
        inside: int = 256,
        replace_unknown: bool = True,
    ):
        """Makes a service without requests.

        Args:
            models: the models.
            limits: the limits.
            keys: the API keys, if one is needed.
            inside: how many sentences each model's engine has at once.
            replace_unknown: as in `Translator.hypotheses`.
        """
        self.models, self.limits, self.keys, self.replace_unknown = models, limits, keys, replace_unknown
        self.metrics, self.stopping = Metrics(), False
        self.desk = Desk(queue=limits.queue_sentences, inside=inside, count_tokens=self.metrics.tokens.inc)
        self.meter = Meter(limits.requests_a_minute)
        self.streams = self.bytes = self._open = 0
        self._searches: dict[str, set[BeamSearch | Sampling]] = {}
        self._running: set[asyncio.Task[Response]] = set()
        self.metrics.gauge("sentences_open", "Sentences waiting or being translated.").set_function(
            lambda: self.desk.open
        )
        for number, (name, meaning) in enumerate(SLOTS):
            gauge = self.metrics.gauge(name, meaning, "model")
            for model in models.served:
                gauge.labels(model.name).set_function(functools.partial(_slots, model.translator.engine, number))

    def check_search(self, model: Served, search: BeamSearch | Sampling) -> None:
        """Raises `Refusal` for one more kind of search than a server compiles: it stops all others for seconds."""
        kinds = self._searches.setdefault(model.name, {model.search})
        kind = search.replace(num_return=1)
        if kind not in kinds and len(kinds) >= SEARCHES:
            raise Refusal(
                400,
                f"this server has compiled {SEARCHES} kinds of searches, its limit: use a beam or a way of sampling "
                "that was used before",
                reason="searches",
            )
        kinds.add(kind)

    async def answer(self, request: Request, work: Work, *, public: bool = False) -> Response:
        """Answers a request with what `work` makes of it, or with the error that ended it.

        Args:
            request: the request.
            work: what is to be done.
            public: whether no key is needed, and the server says so even while it stops.
        """
        route, started = request.scope["path"], time.monotonic()
        self.metrics.running.inc()
        try:
            answer = await self._answer(request, work, public)
        finally:
            self.metrics.running.dec()
        if not isinstance(answer, StreamingResponse):  # such an answer ends later, and is timed there
            self.metrics.latency.labels(route).observe(time.monotonic() - started)
        self.metrics.requests.labels(route, str(answer.status_code)).inc()
        return answer

    async def _answer(self, request: Request, work: Work, public: bool) -> Response:
        held = 0
        self._open += 1

        def hold(size: int) -> None:
            nonlocal held
            if self.bytes > held and self.bytes + size > self.limits.queue_bytes:
                message = f"the server has requests of {self.bytes} bytes and room for {self.limits.queue_bytes}"
                raise Refusal(503, f"{message}: try again later", reason="queue_full", retry_after=RETRY_S)
            held += size
            self.bytes += size

        try:
            self._refuse_when_stopping()
            parameters = await read_parameters(request, self.limits, hold)
            self._refuse_when_stopping()  # which may have begun while the request was read
            call = Call(self, parameters, self._client(request, parameters, public))
            return await self._within_deadline(request, work(call))
        except ClientDisconnect:
            self.metrics.gone.inc()
            return Response(status_code=CLIENT_GONE)
        except Exception as error:
            return error_answer(self.refuse(error))
        finally:
            self.bytes -= held
            self._open -= 1

    def _refuse_when_stopping(self) -> None:
        if self.stopping:
            raise Refusal(503, "the server is stopping: try again later", reason="stopping", retry_after=5)

    def refuse(self, error: Exception) -> Refusal:
        """What a client is told of an error, which is counted, and logged if it is the server's."""
        refusal = _as_refusal(error)
        self.metrics.refused.labels(refusal.reason).inc()
        return refusal

    def _client(self, request: Request, parameters: Parameters, public: bool) -> str:
        """Whose request it is; raises `Refusal` with status 403 if it needs a key and has none."""
        address = request.client.host if request.client else "unknown"
        if public or self.keys is None:
            return address
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else ""
        key = key or parameters.text("api_key", "") or parameters.text("apiKey", "")
        if not key:
            raise Refusal(403, "this server needs an API key: give api_key, or ask its operator for one", reason="key")
        if key not in self.keys:
            raise Refusal(403, "the API key is not known: check it, or ask the server's operator", reason="key")
        return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()

    async def _within_deadline(self, request: Request, work: Awaitable[Response]) -> Response:
        """Waits for an answer, unless the time is over, the client goes away, or the server ends."""
        task: asyncio.Task[Response] = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_until_gone(request))
        self._running.add(task)
        try:
            done, _ = await asyncio.wait(
                {task, gone}, timeout=self.limits.deadline_s, return_when=asyncio.FIRST_COMPLETED
            )
            if task in done:
                if task.cancelled():
                    message = "the server is stopping and could not finish: try again later"
                    raise Refusal(503, message, reason="stopping", retry_after=5)
                return task.result()
            if gone in done:
                raise ClientDisconnect
            raise Refusal(
                504,
                f"the answer was not ready within {self.limits.deadline_s:g} seconds: send less text at once, or try "
                "again when the server has less to do",
                reason="deadline",
            )
        finally:
            self._running.discard(task)
            for each in (task, gone):
                each.cancel()
            await asyncio.wait({task, gone})

    async def finish(self, seconds: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """Refuses new requests, waits for those that are running, and ends those that take longer.

        Args:
            seconds: how long to wait.
            hurry: says that there is no time to wait any more.
        """
        self.stopping = True
        end = time.monotonic() + seconds
        reading = min(end, time.monotonic() + READING_S)
        while time.monotonic() < end and not hurry():
            if not (self._running or self.streams or (self._open and time.monotonic() < reading)):
                break
            await asyncio.sleep(0.05)
        for task in self._running:
            task.cancel()


def _slots(engine: Engine, number: int) -> int:
    return engine.slots[number]


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _as_refusal(error: Exception) -> Refusal:
    """What a client is told of an error. What is written to the log has no text of the request."""
    if isinstance(error, Refusal):
        return error
    if is_own(error):
        return Refusal(400, " ".join(str(error).split()))
    kind = type(error).__name__
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        logger.error("%s: out of memory; start the server with a smaller --batch_tokens", kind)
        message = "the server's device has too little memory for this now: try again later, or send less at once"
        return Refusal(503, message, reason="memory", retry_after=5)
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s while a request was answered; its message may contain texts and is left out\n%s", kind, frames)
    return Refusal(500, f"the server failed ({kind}): this is not your mistake; try again", reason="failed")

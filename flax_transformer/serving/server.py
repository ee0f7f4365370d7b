"""Runs the application with uvicorn: it limits slow clients, and ends in order."""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from flax_transformer.serving.service import Service

HEAD_BYTES = 64 * 1024  # of a request's head: some clients send whole texts in the query string


class PatientProtocol(H11Protocol):
    """HTTP that waits for a client only so long: for the head of a request, and for an answer to be taken."""

    patience_s = 30.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begins to wait for a request; whatever is written and not taken at once starts the clock too."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)
        self._start(self._check_head)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clock."""
        self._stop()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Begins to wait for the next request."""
        super().on_response_complete()
        if not self.flow.write_paused and not self.transport.is_closing():
            self._start(self._check_head)

    def pause_writing(self) -> None:
        """The client does not take what it is sent: it has so much time."""
        super().pause_writing()
        self._start(self.transport.abort)

    def resume_writing(self) -> None:
        """The client took all."""
        super().resume_writing()
        self._start(self._check_head)

    def _check_head(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def _start(self, end: Callable[[], None]) -> None:
        self._stop()
        self._timer = self.loop.call_later(self.patience_s, end)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet, so that a mistake shows before anything is compiled.

    Args:
        host: the address.
        port: the port; 0 for any that is free.

    Raises:
        OSError: the address cannot be had; names it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{host}:{port} cannot be listened at ({reason}): choose another --host or --port") from error
    return listener


class Threads(ThreadPoolExecutor):
    """Threads of requests' work, for which the event loop does not wait when it ends: some of it cannot be stopped."""

    def __init__(self) -> None:
        """Makes as many as asyncio would."""
        super().__init__(thread_name_prefix="request")
        self._open: set[Future[Any]] = set()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        """Runs a function on a thread."""
        future = super().submit(function, *arguments, **options)
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no more work, and gives up what has not begun."""
        super().shutdown(wait=False, cancel_futures=True)

    def end(self, seconds: float) -> bool:
        """Waits for what is being done; returns whether that ended in time."""
        return not futures.wait(list(self._open), seconds).not_done


class Server(uvicorn.Server):
    """A server that, when it is told to end, first answers what it has.

    Attributes:
        address: where it listens, e.g. "http://127.0.0.1:8000"; empty before it does.
        threads: the threads of its requests.
    """

    def __init__(
        self,
        application: Starlette,
        service: Service,
        *,
        listener: socket.socket,
        shutdown_s: float,
        connections: int,
        when_ready: Callable[[str], None] = lambda address: None,
        proxies: str = "",
    ):
        """Takes what to run and where.

        Args:
            application: from `make_application`.
            service: its service.
            listener: from `bind`.
            shutdown_s: seconds within which it ends.
            connections: how many connections it has at most; others get status 503.
            when_ready: is called with the address once it listens.
            proxies: the addresses of proxies whose X-Forwarded-For is believed, separated by commas.
        """
        protocol = type("Protocol", (PatientProtocol,), {"patience_s": service.limits.read_s})
        config = uvicorn.Config(
            application,
            http=protocol,
            ws="none",
            lifespan="off",
            access_log=False,  # it would show keys and texts of query strings
            log_level="critical",  # all errors are answered, and logged without texts, in `Service`
            server_header=False,
            limit_concurrency=connections,
            h11_max_incomplete_event_size=HEAD_BYTES,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=1,
            proxy_headers=bool(proxies),
            forwarded_allow_ips=proxies or None,
        )
        super().__init__(config)
        self._listener = listener
        self._service, self._shutdown_s, self._when_ready = service, shutdown_s, when_ready
        self.address, self.threads = "", Threads()

    def listen(self) -> None:
        """Serves until it is told to end."""
        self.run([self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and says so."""
        asyncio.get_running_loop().set_default_executor(self.threads)
        await super().startup(sockets)
        name, port, *_ = self._listener.getsockname()
        self.address = f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
        self._when_ready(self.address)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuses new requests and answers those that are running, then stops to listen."""
        await self._service.finish(max(0.0, self._shutdown_s - 1), lambda: self.force_exit)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Lets SIGTERM and SIGINT end the server, which then returns as after any other work."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

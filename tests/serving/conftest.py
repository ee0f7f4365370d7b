"""Provides a served model with random weights, the application in this process, and a server at a free port."""

import contextlib
import threading
import time

import jax
import pytest
from starlette.testclient import TestClient

from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.serving.application import make_application
from flax_transformer.serving.limits import Limits
from flax_transformer.serving.models import Models, Served
from flax_transformer.serving.server import Server, bind
from flax_transformer.serving.service import Service
from tests.small_models import say, small_model, word_vocabularies

PAGE = "<!doctype html><title>page</title><style>p{color:red}</style><script>let a=1</script>"


def sentence(number, length=4):
    """A sentence of random words."""
    return f"{say(number, length).capitalize()}."


@pytest.fixture(scope="session")
def trained():
    """A model of random weights for English words."""
    return small_model(word_vocabularies(sentence), 54, num_decoder_layers=2, max_length=40)


@pytest.fixture(scope="session")
def served(trained):
    """It is called English to German; few programs serve it, so that tests compile little."""
    translator = Translator(trained, batch_tokens=128, devices=jax.local_devices()[:1])
    engine, search = translator.engine, BeamSearch(extra_length=6)
    engine.programs.only_prepared()
    engine.programs.prepare(engine.compiled_for(search), 16, 4)
    return Served("en", "de", translator, search)


@pytest.fixture
def make_service(served):
    """Makes a service; arguments are limits."""

    def make(*more, keys=None, **limits):
        return Service(Models([served, *more]), Limits(**limits), keys=keys, inside=16)

    return make


@pytest.fixture
def make_client(make_service):
    """Makes a client of an application in this process; arguments as in `make_service`."""
    clients = []

    def make(*more, origins=(), **options):
        service = make_service(*more, **options)
        client = TestClient(make_application(service, page=PAGE, origins=origins))
        client.service = service
        clients.append(client.__enter__())
        return client

    yield make
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(make_client):
    return make_client()


@contextlib.contextmanager
def serving(service, *, page, connections=50, shutdown_s=5.0, proxies=""):
    """A server in a thread."""
    ready = threading.Event()
    server = Server(
        make_application(service, page=page),
        service,
        listener=bind("127.0.0.1", 0),
        shutdown_s=shutdown_s,
        connections=connections,
        when_ready=lambda address: ready.set(),
        proxies=proxies,
    )
    thread = threading.Thread(target=server.listen)
    thread.start()
    assert ready.wait(20)
    server.service, server.thread = service, thread
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def make_server(make_service):
    """Starts a server in a thread, and returns it with its service; arguments as in `make_service` and `serving`."""
    with contextlib.ExitStack() as running:

        def make(*more, connections=50, shutdown_s=5.0, proxies="", **options):
            service = make_service(*more, **options)
            started = serving(service, page=PAGE, connections=connections, shutdown_s=shutdown_s, proxies=proxies)
            return running.enter_context(started)

        yield make


def wait_until(condition, seconds=20.0):
    """Waits for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)

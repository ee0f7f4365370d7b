"""Provides a served model with random weights, the application in this process, and a server at a free port.

The translations mean nothing, but they depend on every token of the source.
"""

import contextlib
import dataclasses
import threading
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from starlette.testclient import TestClient

from flax_transformer.config import TransformerConfig
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.model import Transformer
from flax_transformer.serving.application import make_application
from flax_transformer.serving.limits import Limits
from flax_transformer.serving.models import Models, Served
from flax_transformer.serving.server import Server, bind
from flax_transformer.serving.service import Service
from flax_transformer.trained_model import TrainedModel

WORDS = "a black brown cat dog fast gets is it mouse new old on red runs sat slow the up white".split()
PAGE = "<!doctype html><title>page</title><style>p{color:red}</style><script>let a=1</script>"


def sentence(number, length=4):
    """A sentence of random words."""
    return " ".join(np.random.default_rng(number).choice(WORDS, length)).capitalize() + "."


def random_params(config, seed):
    """Matrices large enough that outputs differ between sources."""
    tokens, rng = jnp.ones((1, 2), jnp.int32), np.random.default_rng(seed)
    shapes = jax.eval_shape(partial(Transformer(config).init, deterministic=True), jax.random.key(0), tokens, tokens)

    def fill(path, leaf):
        constants = {"scale": np.ones, "bias": np.zeros}
        return jnp.asarray(constants.get(path[-1].key, partial(rng.normal, 0.0, 0.7))(leaf.shape), "float32")

    return jax.tree_util.tree_map_with_path(fill, shapes["params"])


@pytest.fixture(scope="session")
def trained():
    """A model of random weights for English words."""
    lines = [sentence(100 + number, 6) for number in range(40)]
    vocabularies = VocabularyPair.train(lines, lines, VocabularyConfig(size=110, byte_fallback=False))
    size = vocabularies.source.size
    config = TransformerConfig(
        source_vocab_size=size,
        target_vocab_size=size,
        d_model=16,
        num_heads=2,
        d_ff=24,
        num_encoder_layers=1,
        num_decoder_layers=2,
        max_length=40,
        tie_embeddings="none",  # otherwise the model would repeat its last token
    )
    return TrainedModel(config, random_params(config, 54), vocabularies)


@pytest.fixture(scope="session")
def served(trained):
    """It is called English to German; few programs serve it, so that tests compile little."""
    translator = Translator(trained, batch_tokens=128, devices=jax.local_devices()[:1])
    engine, search = translator.engine, BeamSearch(extra_length=6)
    engine.programs.only_prepared()
    engine.programs.prepare(engine.compiled_for(search), 16, 4)
    return Served("en", "de", translator, translator.inspector, search)


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
def serving(service, *, page, connections=50, shutdown_s=5.0):
    """A server in a thread."""
    ready = threading.Event()
    server = Server(
        make_application(service, page=page),
        service,
        listener=bind("127.0.0.1", 0),
        shutdown_s=shutdown_s,
        connections=connections,
        when_ready=lambda address: ready.set(),
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

        def make(*more, connections=50, shutdown_s=5.0, **options):
            service = make_service(*more, **options)
            started = serving(service, page=PAGE, connections=connections, shutdown_s=shutdown_s)
            return running.enter_context(started)

        yield make


@pytest.fixture(scope="session")
def address(served):
    """The address of a server with the page that comes with the library; its translations have some words."""
    model = dataclasses.replace(served, search=served.search.replace(min_length=4))
    with serving(Service(Models([model]), Limits(), inside=16), page=None) as server:
        yield server.address


def wait_until(condition, seconds=20.0):
    """Waits for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)

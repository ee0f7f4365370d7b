"""Serves trained models over HTTP: LibreTranslate's API for programs, and a page
that translates while you type and shows how. Ends, in order, with Ctrl-C or SIGTERM.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

from flax_transformer.commands.options import (
    checkpoint,
    count,
    explain_damage,
    filled,
    number,
    path,
    positive,
    true_or_false,
    whole,
)
from flax_transformer.commands.process import start_devices
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.files import expand
from flax_transformer.ranges import Range
from flax_transformer.serving.limits import Limits

USAGE = "(--workdir FOLDER | --model NAME=FOLDER ...) [OPTIONS]"
EXAMPLES = """\
The languages of --workdir are those that its config.json tells, as after training on
the built-in corpus, or those of --source_language and --target_language. The name in
--model tells them: kn-en, or kan_Knda-eng_Latn for a model that knows languages by
such codes. A folder of a model for several languages, which are named so or by tokens
such as >>kan<<, may be given several times, once for each pair.

See docs/serving.md for the routes, for running it behind nginx, and for each error.

examples:
  flax-transformer serve --workdir=runs/quickstart
  flax-transformer serve --model=kn-en=runs/quickstart --model=en-pt=runs/firefox
  flax-transformer serve --workdir=runs/mine --source_language=de --target_language=en
  flax-transformer serve --workdir=runs/mine --host=0.0.0.0 --api_keys=keys.txt --requests_a_minute=60
"""
MEMORY_REMEDY = "lower --batch_tokens or --beam_size"
SEARCH = BeamSearch()
# Seconds after which a thread lets another one run. Python waits 5 ms, as long as a step of a search; the thread
# of the search would wait so long for the one that talks to clients.
SWITCH_S = 0.0005
ENDING_S = 2.0  # for threads to end once the last request was answered


@dataclasses.dataclass(frozen=True)
class Named:
    """A model as the options name it.

    Attributes:
        languages: its source and its target language; `None` if the work directory is to tell them.
        folder: its work directory.
    """

    languages: tuple[str, str] | None
    folder: str


def named_model(text: str) -> tuple[str, str]:
    """The type of --model: the name of the languages, and the work directory."""
    name, is_there, folder = text.partition("=")
    if not (name and is_there and folder):
        raise argparse.ArgumentTypeError(f"{text!r}: name the languages and the work directory, as in kn-en=runs/mine")
    return name, expand(folder)


seconds = number(float, Range(above=0, within=Range(at_most=1e6)), "a number of seconds above 0")


def port(text: str) -> int:
    """The type of --port."""
    if text.isdecimal() and len(text) < 6 and int(text) < 2**16:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: give a number from 0 (any free port) to 65535")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `serve`."""
    models = parser.add_argument_group("the models")
    models.add_argument("--workdir", type=path, metavar="FOLDER", help="the work directory of a training")
    models.add_argument(
        "--model",
        action="append",
        type=named_model,
        default=[],
        metavar="NAME=FOLDER",
        help="a model by its languages and its work directory; give it once for each model",
    )
    for side in ("source", "target"):
        models.add_argument(f"--{side}_language", type=filled, metavar="CODE", help=f"the {side} language of --workdir")
    models.add_argument(
        "--checkpoint",
        type=checkpoint,
        default="chosen",
        metavar="STEP",
        help="which checkpoint of each to load: chosen (default), best, latest, averaged or a step",
    )
    models.add_argument(
        "--beam_size",
        type=whole,
        default=SEARCH.beam_size,
        metavar="N",
        help=f"hypotheses kept for each sentence (default {SEARCH.beam_size})",
    )
    models.add_argument(
        "--batch_tokens",
        type=positive,
        default=1024,
        metavar="N",
        help="source tokens of the sentences that one model translates at once; more may translate more in the same "
        "time where there is a GPU, and each takes longer (default 1024)",
    )
    models.add_argument(
        "--replace_unknown",
        type=true_or_false,
        default=True,
        metavar="true|false",
        help="whether characters that a model can only answer with its unknown piece are copied from the source "
        "(default true)",
    )
    models.add_argument(
        "--compile_longest",
        type=positive,
        default=64,
        metavar="N",
        help="the server compiles what sentences of up to N tokens need; the first longer one has to wait for its "
        "program (default 64)",
    )
    models.add_argument(
        "--compile_all",
        action="store_true",
        help="compile everything before it is ready; otherwise only what single sentences need, and the programs for "
        "many at once while it serves",
    )

    place = parser.add_argument_group("the address")
    place.add_argument(
        "--host", type=filled, default="127.0.0.1", help="where to listen (default 127.0.0.1: this machine)"
    )
    place.add_argument("--port", type=port, default=8000, help="the port (default 8000); 0 for any that is free")
    place.add_argument(
        "--api_keys", type=path, metavar="FILE", help="a file with one key in each line; each request then needs one"
    )
    place.add_argument(
        "--cors_origin",
        action="append",
        type=filled,
        default=[],
        metavar="ORIGIN",
        help="an origin whose pages may use this server, e.g. https://example.org, or * for all (default: none)",
    )
    place.add_argument(
        "--proxies",
        type=filled,
        metavar="ADDRESSES",
        help="proxies in front of it, whose X-Forwarded-For tells the client, e.g. 127.0.0.1",
    )

    limits = parser.add_argument_group("limits")
    for name, kind, meaning in LIMITS:
        default = getattr(Limits, name)
        told = f"{meaning} (default {default:.0f})"
        limits.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=told)
    limits.add_argument(
        "--connections", type=positive, default=1000, metavar="N", help="connections at once (default 1000)"
    )
    limits.add_argument(
        "--shutdown_seconds",
        type=seconds,
        default=20.0,
        metavar="N",
        help="within this time it ends after SIGTERM; until then it answers what it has (default 20)",
    )


# The options that become fields of `Limits`: their names, types and help.
LIMITS: tuple[tuple[str, Any, str], ...] = (
    ("body_bytes", positive, "bytes of a request"),
    ("queue_bytes", positive, "bytes of all requests that are read or answered"),
    ("characters", positive, "characters of all texts of a request"),
    ("texts", positive, "texts in one list"),
    ("sentences", positive, "sentences of a request"),
    ("queue_sentences", positive, "sentences of all requests that wait or are translated"),
    ("alternatives", count, "alternatives of a text; less than --beam_size"),
    ("deadline_s", seconds, "seconds in which a request is answered"),
    ("read_s", seconds, "seconds in which a client sends its request, and takes its answer"),
    ("requests_a_minute", count, "requests of each client in a minute, a text of a list counts as one; 0: any number"),
)


def run(options: argparse.Namespace) -> None:
    """Serves until it is told to end; raises ValueError or OSError that says what to do."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is missing: pip install 'flax_transformer[serve]'") from error
    from flax_transformer.data.lines import read_text
    from flax_transformer.serving.limits import read_keys
    from flax_transformer.serving.server import bind

    named = _named(options)
    limits = Limits(**{name: getattr(options, name) for name, *_ in LIMITS})
    if limits.alternatives >= options.beam_size:
        limits = dataclasses.replace(limits, alternatives=max(0, options.beam_size - 1))
    keys = None
    if options.api_keys:
        keys = read_keys(read_text(options.api_keys), options.api_keys)
    search = BeamSearch(beam_size=options.beam_size)
    listener = bind(options.host, options.port)
    with _ended_at_once():
        _serve(options, named, search, limits, keys, listener)


@contextlib.contextmanager
def _ended_at_once() -> Iterator[None]:
    """Lets SIGTERM end the process at once; the server, while it listens, has a handler of its own.

    Without a handler, the first process of a container ignores the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _serve(
    options: argparse.Namespace,
    named: list[Named],
    search: BeamSearch,
    limits: Limits,
    keys: Any,
    listener: socket.socket,
) -> None:
    """Loads the models, and serves until it is told to end."""
    from flax_transformer.serving.application import make_application
    from flax_transformer.serving.models import Models
    from flax_transformer.serving.preparing import Preparation
    from flax_transformer.serving.server import Server
    from flax_transformer.serving.service import Service

    start_devices()
    models = Models(_load(named, search, options))
    warnings.simplefilter("ignore")  # they are about single texts, which are not to be logged
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
    preparation = Preparation(models.served, options.compile_longest)
    first = "all programs" if options.compile_all else "what single sentences need"
    print(f"compiling {first}; the next start will find most of it in the cache ...", flush=True)
    preparation.begin(everything=options.compile_all)
    service = Service(
        models, limits, keys=keys, inside=inside(options.batch_tokens), replace_unknown=options.replace_unknown
    )
    server = Server(
        make_application(service, origins=options.cors_origin),
        service,
        listener=listener,
        shutdown_s=max(0.0, options.shutdown_seconds - ENDING_S),
        connections=options.connections,
        when_ready=lambda address: print(f"ready: {address}", flush=True),
        proxies=options.proxies or "",
    )
    sys.setswitchinterval(SWITCH_S)
    server.listen()
    _end(models, preparation, server.threads)


def _end(models: Any, preparation: Any, threads: Any) -> None:
    """Ends all threads; the process ends even if one of them is in the middle of a long compilation."""
    closing = threading.Thread(target=models.close, daemon=True)
    closing.start()
    deadline = time.monotonic() + ENDING_S
    closing.join(ENDING_S)
    ended = [each.end(max(0.0, deadline - time.monotonic())) for each in (threads, preparation)]
    if not all(ended) or closing.is_alive():
        sys.stdout.flush()
        os._exit(0)


def inside(batch_tokens: int) -> int:
    """How many sentences an engine is given at once: a few more than there are slots for short ones."""
    return max(8, batch_tokens // 16 * 3 // 2)


def _named(options: argparse.Namespace) -> list[Named]:
    """The models that the options name; raises ValueError if they name none, or languages without a folder."""
    from flax_transformer.serving.languages import as_pair

    models = [Named(as_pair(name), folder) for name, folder in options.model]
    languages = options.source_language, options.target_language
    if options.workdir:
        if any(languages) and not all(languages):
            raise ValueError("give both --source_language and --target_language, or none of them")
        return [Named(languages if all(languages) else None, options.workdir), *models]
    if any(languages):
        raise ValueError("--source_language and --target_language are those of --workdir: give it, or use --model")
    if not models:
        raise ValueError("there is no model: give --workdir=FOLDER, or --model=NAME=FOLDER once for each")
    return models


def _load(named: list[Named], search: BeamSearch, options: argparse.Namespace) -> list[Any]:
    """Loads each folder once; models of many languages serve several pairs from one copy."""
    from flax_transformer.decoding.translator import Translator
    from flax_transformer.serving.languages import languages_of
    from flax_transformer.serving.models import Served
    from flax_transformer.workdir import WorkDirectory

    translators: dict[str, Any] = {}
    served = []
    for each in named:
        with explain_damage(each.folder):
            pair = each.languages or languages_of(WorkDirectory(each.folder).read_config())
            if pair is None:
                raise ValueError(
                    f"{each.folder} does not tell its languages: give --source_language and --target_language"
                )
            if each.folder not in translators:
                translators[each.folder] = Translator.from_workdir(
                    each.folder, step=options.checkpoint, batch_tokens=options.batch_tokens
                )
            translator = translators[each.folder]
            if translator.vocabularies.names_languages:
                translator = translator.speaking(*pair)
        served.append(Served(*pair, translator, search))
    return served

import argparse
import dataclasses
import json
import signal
import socket
import sys

import pytest
from starlette.testclient import TestClient

from flax_transformer.commands import serve
from flax_transformer.commands.serve import LIMITS, _load, _named
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.serving import server
from flax_transformer.serving.languages import Detector, as_pair, language_name, languages_of
from flax_transformer.serving.limits import Limits
from flax_transformer.serving.preparing import Preparation
from flax_transformer.serving.server import Threads
from tests.small_models import say, small_model


def test_each_limit_of_the_server_is_an_option_of_the_command():
    assert [name for name, *_ in LIMITS] == [field.name for field in dataclasses.fields(Limits)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "give --workdir=FOLDER, or --model=NAME=FOLDER"),
        (["--model=runs/a"], "kn-en=runs/mine"),
        (["--model=kn-en="], "kn-en=runs/mine"),
        (["--port=70000"], "0 (any free port) to 65535"),
        (["--deadline_s=0"], "seconds above 0"),
        (["--workdir=a", "--source_language=kn"], "give both"),
        (["--model=kn-en=a", "--source_language=kn", "--target_language=en"], "those of --workdir"),
        (["--requests_a_minute=-1"], "at least 0"),
        (["--workdir=a", "--beam_size=0"], "beam_size is 0"),
        (["--workdir=a", "--api_keys=/nowhere/keys"], "/nowhere/keys"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_a_model_is_loaded(fail, unloaded, arguments, named):
    assert named in fail("serve", *arguments)


def test_keys_limits_origins_and_proxies_reach_the_server(run, workdir, tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("a-secret-key\n")
    made = []

    class Recorded:
        def __init__(self, application, service, **options):
            self.threads = Threads()
            made.append((application, service, options))

        def listen(self):
            made[0][2]["listener"].close()

    monkeypatch.setattr(server, "Server", Recorded)
    monkeypatch.setattr(Preparation, "begin", lambda preparation, everything: None)
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
    monkeypatch.setattr(serve.os, "_exit", lambda status: pytest.fail("the threads did not end in time"))
    options = ("--requests_a_minute=7", "--proxies=10.0.0.1", "--cors_origin=https://a.org")
    run("serve", f"--model=kn-en={workdir}", "--port=0", f"--api_keys={tmp_path / 'keys'}", *options)
    ((application, service, given),) = made
    assert "a-secret-key" in service.keys and service.limits.requests_a_minute == 7
    assert given["proxies"] == "10.0.0.1"
    client = TestClient(application)
    assert client.post("/translate", json={"q": "a", "source": "kn", "target": "en"}).status_code == 403
    assert client.get("/health", headers={"Origin": "https://a.org"}).headers["Access-Control-Allow-Origin"]


def test_sigterm_ends_a_server_that_does_not_listen_yet(run, monkeypatch):
    before, ended = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(serve.os, "_exit", ended.append)
    monkeypatch.setattr(
        serve, "_serve", lambda *arguments: signal.raise_signal(signal.SIGTERM) or arguments[-1].close()
    )
    run("serve", "--workdir=a", "--source_language=kn", "--target_language=en", "--port=0")
    assert ended == [0] and signal.getsignal(signal.SIGTERM) is before


def test_without_its_packages_serve_names_its_extra(fail, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "uvicorn is missing: pip install 'flax_transformer[serve]'" in fail("serve", "--workdir=a")


def test_an_address_that_is_taken_is_told_before_a_model_is_loaded(fail, unloaded):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be listened at" in fail("serve", "--workdir=a", f"--port={port}")
    assert "192.0.2.1:8000 cannot be listened at" in fail("serve", "--workdir=a", "--host=192.0.2.1")


def test_a_work_directory_that_does_not_tell_its_languages_is_an_error_that_names_the_options(fail, workdir):
    assert "does not tell its languages: give --source_language" in fail("serve", "--port=0", f"--workdir={workdir}")
    assert "does not name two languages" in fail("serve", "--port=0", f"--model=kannada={workdir}")
    assert "two models for kn-en" in fail("serve", "--port=0", f"--model=kn-en={workdir}", f"--model=kn-en={workdir}")


def test_the_languages_of_a_work_directory_may_have_any_codes():
    given = argparse.Namespace(workdir="a", source_language="en", target_language="pt-br", model=[("kn-en", "b")])
    assert [(each.languages, each.folder) for each in _named(given)] == [(("en", "pt-br"), "a"), (("kn", "en"), "b")]


def test_one_folder_serves_each_language_that_its_tokens_name(tmp_path):
    lines = [say(number, 4) for number in range(40)]
    config = VocabularyConfig(size=60, byte_fallback=False, user_symbols=(">>kan<<", ">>tel<<"))
    small_model(VocabularyPair.train(lines, lines, config), 3).save(tmp_path / "work")
    folder = str(tmp_path / "work")
    given = argparse.Namespace(workdir="", source_language=None, target_language=None, checkpoint="chosen")
    given.batch_tokens, given.model = 4096, [("en-kn", folder), ("en-te", folder)]
    kannada, telugu = _load(_named(given), BeamSearch(), given)
    source = kannada.translator.vocabularies.source
    assert source.encode(["the cat"]) == telugu.translator.vocabularies.source.encode([">>kan<< the cat"])
    assert telugu.translator.engine is kannada.translator.engine  # the model is loaded once
    given.model = [("en-de", folder)]
    with pytest.raises(ValueError, match="no token names the language 'de'"):
        _load(_named(given), BeamSearch(), given)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"train": "locale_phrases:kn:en:train?pairs=60000&parts=2"}, ("kn", "en")),
        ({"train": "3*locale_phrases:kn:en:train + tsv:more.tsv"}, ("kn", "en")),
        ({"train": "files:data/letters.kn,data/letters.en"}, ("kn", "en")),
        ({"train": "locale_phrases:kn:en:train?pairs=60000&swap"}, ("en", "kn")),
        ({"train": "files:a/train.kn,a/train.en?swap + 3*files:b/train.kn,b/train.en?tag=<bt>&swap"}, ("en", "kn")),
        ({"train": 'files:"a, b.kn.gz", "a, b.en.gz" + 0.5*tsv:more.tsv'}, ("kn", "en")),
        ({"train": "files:a.kn,a.en?tag=>>eng<< + files:a.kn,a.en?swap&tag=>>kan<<"}, None),
        ({"train": "files:a.txt,b.txt"}, None),
        ({"train": "tsv:pairs.tsv"}, None),
        ({"source_language": "kan_Knda", "target_language": "eng_Latn"}, ("kan_Knda", "eng_Latn")),
        ({"source_language": "kan_Knda"}, None),
        ({}, None),
    ],
    ids=json.dumps,
)
def test_the_config_tells_the_languages_where_it_knows_them(data, expected):
    assert languages_of({"data": data}) == expected
    assert languages_of({"model": {}}) is None


def test_a_name_of_a_model_is_two_codes_of_languages():
    assert as_pair("kn-en") == ("kn", "en") and as_pair("kan_Knda-eng_Latn") == ("kan_Knda", "eng_Latn")
    assert as_pair("en-pt-BR") == ("en", "pt-BR") and as_pair("zh-Hant-en") == ("zh-Hant", "en")
    for wrong in ("kn", "kn-", "kn_en", "en-pt-br", "kn-en-de-fr-x", "../../etc-en"):
        with pytest.raises(ValueError, match="does not name two languages"):
            as_pair(wrong)


def test_languages_have_english_names():
    codes = ("kn", "kan_Knda", "pt", "zho_Hans", "xx")
    assert [language_name(code) for code in codes] == ["Kannada", "Kannada", "Portuguese", "Chinese (Simplified)", "xx"]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("kan_Knda", "ಇಂದು ಹವಾಮಾನ ಚೆನ್ನಾಗಿದೆ."),
        ("en", "The weather is fine today."),
        ("pt", "Hoje o tempo está bom e vamos ao mar."),
        ("de", "Heute ist das Wetter schön."),
    ],
)
def test_the_language_of_a_text_is_one_of_those_that_come_into_question(code, text):
    languages = ("en", "pt", "kan_Knda", "de", "xx")
    found = Detector(languages).detect(text)
    assert found[0][0] == code and {each for each, _ in found} == {*languages}
    assert sum(share for _, share in found) == pytest.approx(1, abs=1e-3)
    regions = Detector(("pt", "pt-BR", "en", "de")).detect(text)
    shares = dict(regions)
    assert shares["pt"] == shares["pt-BR"] and (regions[0][0] == code) == (code != "kan_Knda")
    assert Detector(("fr",)).detect(text) == [("fr", 1.0)]
    assert len(Detector(("xx", "yy")).detect(text)) == 2

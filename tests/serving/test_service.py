import asyncio
import threading
import time
import urllib.parse

import jax
import jax.numpy as jnp
import pytest
from starlette.requests import Request

from flax_transformer.decoding.inspection import Inspector
from flax_transformer.decoding.machine import Machine
from flax_transformer.packaged_font import packaged_font
from flax_transformer.serving.application import page_policy
from flax_transformer.serving.limits import Keys, Limits, Meter, read_keys
from flax_transformer.serving.models import Models, Served
from flax_transformer.serving.parameters import _parse_form
from flax_transformer.serving.refusals import Refusal
from tests.serving.conftest import PAGE, sentence

FIELDS = {"q": "a dog runs", "source": "en", "target": "de"}


@pytest.mark.parametrize(
    "options",
    [
        {"json": FIELDS | {"api_key": "secret-one"}},
        {"data": FIELDS | {"api_key": "secret-two"}},
        {"json": FIELDS | {"apiKey": "secret-one"}},
        {"json": FIELDS, "headers": {"Authorization": "Bearer secret-two"}},
    ],
)
def test_with_a_key_a_request_is_let_in(make_client, options):
    client = make_client(keys=Keys(["secret-one", "secret-two"]))
    assert client.post("/translate", **options).status_code == 200


@pytest.mark.parametrize("key", [None, "", "secret", "secret-onE", "secret-one ", "\ud800"])
def test_without_a_right_key_it_is_not_and_the_key_is_not_told(make_client, key, caplog, capsys):
    client = make_client(keys=Keys(["secret-one"]))
    for path in ("/translate", "/detect", "/explain", "/attention", "/stream"):
        body = b'{"q": "a", "source": "en", "target": "de"%s}' % (
            b"" if key is None else b', "api_key": "%s"' % key.encode("ascii", "backslashreplace")
        )
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 403 and "secret" not in answer.text
    assert client.get("/languages").status_code == client.get("/health").status_code == 200
    assert client.get("/frontend/settings").json()["keyRequired"] is True
    written = capsys.readouterr()
    assert "secret" not in caplog.text + written.out + written.err


def test_a_file_of_keys_has_one_in_each_line():
    keys = read_keys("# ours\n\n  first-key-1 \nsecond-key\n", "keys.txt")
    assert "first-key-1" in keys and "second-key" in keys and "# ours" not in keys and "" not in keys
    with pytest.raises(ValueError, match=r"keys.txt has no keys"):
        read_keys("# none\n", "keys.txt")
    for wrong in ("short", "two words in it"):
        with pytest.raises(ValueError, match=r"key 2 in keys.txt has \d+ characters or white space") as raised:
            read_keys(f"a-good-one\n{wrong}\n", "keys.txt")
        assert wrong not in str(raised.value)


def test_a_client_has_so_many_requests_a_minute_and_gets_new_ones_as_time_goes_on():
    now = [100.0]
    meter = Meter(6, clock=lambda: now[0])
    for _ in range(6):
        meter.count("a")
    with pytest.raises(Refusal) as refused:
        meter.count("a")
    assert refused.value.status == 429 and refused.value.retry_after == pytest.approx(10)
    meter.count("b", 5)  # another client
    now[0] += 10
    meter.count("a")
    with pytest.raises(Refusal):
        meter.count("b", 3)
    now[0] += 60
    meter.count("b", 100)  # a list of more texts than that costs a whole minute
    Meter(0).count("a", 10**6)


def test_a_minute_is_counted_for_each_key(make_client):
    client = make_client(keys=Keys(["secret-one", "secret-two"]), requests_a_minute=1)
    for key, status in (("secret-one", 200), ("secret-one", 429), ("secret-two", 200)):
        assert client.post("/translate", json=FIELDS | {"api_key": key}).status_code == status


def test_a_list_costs_its_length_and_the_answer_says_when_to_try_again(make_client):
    client = make_client(requests_a_minute=5)
    assert client.post("/translate", json=FIELDS | {"q": ["a dog"] * 4}).status_code == 200
    answer = client.post("/translate", json=FIELDS | {"q": ["a dog"] * 3})
    assert answer.status_code == 429 and int(answer.headers["Retry-After"]) in range(1, 61)
    assert client.get("/health").status_code == 200


def test_each_answer_has_security_headers_and_the_page_a_policy_that_allows_its_own_parts(make_client):
    client = make_client()
    for path in ("/", "/languages", "/nothing", "/translate"):
        headers = client.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["X-Frame-Options"] == "DENY"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert "Access-Control-Allow-Origin" not in headers
    page = client.get("/")
    assert page.text == PAGE and page.headers["content-type"].startswith("text/html")
    policy = page.headers["Content-Security-Policy"]
    # printf 'let a=1' | openssl dgst -sha256 -binary | base64, and the same of p{color:red}
    assert "script-src 'sha256-+Q3dsIT3kYyYXlBldxY4Baal1kEoF6cDrlPvZn4iLYs='" in policy
    assert "style-src 'sha256-p0bF+un5yUb9MBO6xRb8kPHlY2BdpHVtLiFkDrZPF64='" in policy
    assert "connect-src 'self'" in policy and "unsafe" not in policy and "http" not in policy
    assert "script-src 'none'" in page_policy("<p>no script</p>")


def test_the_font_of_the_page_is_served_and_may_be_kept_by_browsers(make_client, monkeypatch):
    client = make_client()
    answer = client.get("/font.ttf")
    assert answer.status_code == 200 and answer.headers["content-type"] == "font/ttf"
    assert answer.content == packaged_font().read_bytes() and "max-age" in answer.headers["Cache-Control"]
    assert "font-src 'self'" in client.get("/").headers["Content-Security-Policy"]
    monkeypatch.setattr("flax_transformer.serving.application.packaged_font", lambda: None)
    answer = client.get("/font.ttf")
    assert answer.status_code == 404 and "install weblate-fonts" in answer.json()["error"]


def test_cors_is_a_choice(make_client):
    origin = {"Origin": "https://example.org"}
    assert "Access-Control-Allow-Origin" not in make_client().post("/translate", json=FIELDS, headers=origin).headers
    client = make_client(origins=["https://example.org"])
    answer = client.post("/translate", json=FIELDS, headers=origin)
    assert answer.headers["Access-Control-Allow-Origin"] == "https://example.org"
    other = client.post("/translate", json=FIELDS, headers={"Origin": "https://evil.example"})
    assert "Access-Control-Allow-Origin" not in other.headers
    asked = client.options("/translate", headers=origin | {"Access-Control-Request-Method": "POST"})
    assert asked.status_code == 200


def test_a_body_that_is_too_large_is_not_read(make_client):
    client = make_client(body_bytes=1000)
    for content in (b"q=" + b"a" * 2000, iter([b"q=", b"a" * 600, b"b" * 600])):  # the second tells no length
        answer = client.post(
            "/translate", content=content, headers={"Content-Type": "application/x-www-form-urlencoded"}
        )
        assert answer.status_code == 413 and "1000 bytes" in answer.json()["error"]


@pytest.mark.parametrize("encode", [lambda text: text.encode(), lambda text: urllib.parse.quote(text).encode()])
def test_long_forms_are_read_as_long_json_is(encode):
    text, kind = "ಕನ್ನಡ " * 30_000, "application/x-www-form-urlencoded"
    form = Request({"type": "http", "headers": [(b"content-type", kind.encode())]})
    assert asyncio.run(_parse_form(form, kind, b"q=" + encode(text))) == {"q": text}
    many = asyncio.run(_parse_form(form, kind, b"q=a&" * 2000 + b"source=kn"))
    assert many == {"q": ["a"] * 2000, "source": "kn"}


def test_beyond_its_queue_a_server_says_when_to_try_again(make_client):
    client = make_client(queue_sentences=3)
    answer = client.post("/translate", json=FIELDS | {"q": "A dog.\n" * 4})
    assert answer.status_code == 503 and answer.headers["Retry-After"] and "room for 3" in answer.json()["error"]
    client.service.desk.open = 2
    assert client.post("/translate", json=FIELDS | {"q": "A dog.\n" * 2}).status_code == 503
    client.service.desk.open = 0
    assert client.post("/translate", json=FIELDS | {"q": "A dog.\n" * 3}).status_code == 200
    assert client.service.desk.open == 0


def hold(monkeypatch):
    """Keeps the engine from telling what it has decoded until the event is set."""
    go_on, collect = threading.Event(), Machine.collect

    def wait(machine):
        assert go_on.wait(20)
        return collect(machine)

    monkeypatch.setattr(Machine, "collect", wait)
    return go_on


def test_a_request_has_a_deadline_after_which_its_sentences_are_given_up(make_client, monkeypatch):
    client, go_on = make_client(deadline_s=0.2), hold(monkeypatch)
    answer = client.post("/translate", json=FIELDS)
    go_on.set()
    assert answer.status_code == 504 and "0.2 seconds" in answer.json()["error"]
    assert client.service.desk.open == 0
    client.service.limits = Limits()
    assert client.post("/translate", json=FIELDS).status_code == 200


def test_an_error_in_one_request_is_that_requests_alone(make_client, monkeypatch):
    client, go_on = make_client(), hold(monkeypatch)
    answers = {}

    def ask(name, **fields):
        answers[name] = client.post("/explain", json=FIELDS | fields)

    asked = {"good": {}, "bad": {"prefix": [5] * 39}, "other": {"q": sentence(3)}}
    threads = [threading.Thread(target=ask, args=(name,), kwargs=fields) for name, fields in asked.items()]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    go_on.set()
    for thread in threads:
        thread.join()
    assert {name: answer.status_code for name, answer in answers.items()} == {"good": 200, "bad": 400, "other": 200}


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (lambda: jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while allocating"), 503, "memory"),
        (lambda: MemoryError(), 503, "memory"),
        (lambda: RuntimeError("broken by a secret text"), 500, "RuntimeError"),
        (lambda: KeyError("a secret text"), 500, "KeyError"),
    ],
)
@pytest.mark.parametrize("path", ["/translate", "/explain"])
def test_an_error_of_the_engine_is_told_without_its_texts_and_the_next_request_is_served(
    make_client, monkeypatch, caplog, error, status, told, path
):
    client = make_client()
    with monkeypatch.context() as patch:
        patch.setattr(Machine, "collect", lambda machine: (_ for _ in ()).throw(error()))
        answer = client.post(path, json=FIELDS)
    assert answer.status_code == status and told in answer.json()["error"]
    assert "secret" not in answer.text + caplog.text and "dog" not in caplog.text
    assert client.post(path, json=FIELDS).status_code == 200


def test_an_error_of_the_pass_that_explains_is_told_too(make_client, monkeypatch):
    client = make_client()
    with monkeypatch.context() as patch:
        # More than any device has.
        patch.setattr(Inspector, "inspect", lambda *arguments: jnp.zeros(2**50, "int8").block_until_ready())
        for path, fields in (("/explain", {}), ("/attention", {"ids": [5, 2]}), ("/translate", {"format": "html"})):
            answer = client.post(path, json=FIELDS | {"q": "a <b>dog</b> runs"} | fields)
            assert answer.status_code == 503 and "too little memory" in answer.json()["error"]
            assert answer.headers["Retry-After"]
    assert client.post("/explain", json=FIELDS).status_code == 200 and client.service.desk.open == 0


def test_metrics_count_what_happened_and_tell_no_texts(make_client):
    client = make_client()
    client.post("/translate", json=FIELDS | {"q": ["a dog runs", "on it"]})
    client.post("/translate", json=FIELDS | {"target": "xx"})
    client.post("/nothing/a dog runs")
    text = client.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    lines = {name.removeprefix("flax_transformer_"): float(value) for name, value in lines.items()}
    assert lines['requests_total{route="/translate",status="200"}'] == 1
    assert lines['requests_total{route="/translate",status="400"}'] == 1
    assert lines['request_seconds_count{route="/translate"}'] == 2
    assert lines['sentences_total{model="en-de"}'] == 2 and lines["tokens_total"] >= 2
    assert lines['refused_total{reason="invalid"}'] == 1
    assert lines["sentences_open"] == 0 and lines["requests_running"] == 1  # this one
    assert lines['slots_in_use{model="en-de"}'] <= lines['slots{model="en-de"}']
    assert "dog" not in text and "nothing" not in text


def test_auto_chooses_among_the_languages_from_which_the_target_is_served(make_client, served):
    others = [Served(*pair, served.translator, served.search) for pair in (("fr", "de"), ("en", "fr"))]
    client = make_client(*others)
    texts = {
        "en": "The weather is fine today and we are going to the sea.",
        "fr": "Il fait beau aujourd'hui et nous allons à la mer.",
    }
    for code, text in texts.items():
        answer = client.post("/translate", json={"q": text, "source": "auto", "target": "de"}).json()
        assert answer["detectedLanguage"]["language"] == code and answer["detectedLanguage"]["confidence"] > 60
        (first, *_) = client.post("/detect", json={"q": text}).json()
        assert first["language"] == code
    answer = client.post("/translate", json={"q": list(texts.values()), "source": "auto", "target": "de"}).json()
    assert [each["language"] for each in answer["detectedLanguage"]] == ["en", "fr"]
    only = client.post("/translate", json={"q": texts["fr"], "source": "auto", "target": "fr"}).json()
    assert only["detectedLanguage"] == {"confidence": 100, "language": "en"}
    wrong = client.post("/translate", json={"q": "a", "source": "fr", "target": "fr"})
    assert wrong.status_code == 400 and "en-de, fr-de, en-fr" in wrong.json()["error"]


def test_two_models_for_the_same_languages_are_an_error_that_names_them(served):
    with pytest.raises(ValueError, match="two models for en-de"):
        Models([served, served])
    with pytest.raises(ValueError, match="no model"):
        Models([])

import json
from urllib.parse import quote

import pytest

from flax_transformer.decoding.settings import BeamSearch
from tests.serving.conftest import sentence


def ask(client, path="/translate", status=200, **fields):
    fields = {"source": "en", "target": "de"} | fields if path == "/translate" else fields
    answer = client.post(path, json={name: value for name, value in fields.items() if value is not None})
    assert answer.status_code == status, answer.text
    return answer.json()


@pytest.fixture
def expected(served):
    """What the translator itself makes of sentences."""

    def translate(*sentences):
        return served.translator.translate(sentences, BeamSearch(extra_length=6), replace_unknown=True)

    return translate


def test_a_text_gets_a_text_and_a_list_gets_a_list(client, expected):
    first, second = sentence(1), sentence(2)
    assert ask(client, q=first) == {"translatedText": expected(first)[0]}
    assert ask(client, q=[first, second]) == {"translatedText": expected(first, second)}
    assert ask(client, q=[first]) == {"translatedText": expected(first)}
    assert ask(client, q=[]) == {"translatedText": []}


@pytest.mark.parametrize("how", ["form", "multipart", "query", "mixed"])
def test_a_form_and_a_query_string_are_as_good_as_json(client, expected, how):
    fields = {"q": sentence(3), "source": "en", "target": "de", "format": "text", "alternatives": "0", "api_key": ""}
    options = {
        "form": {"data": fields},
        "multipart": {"files": {name: (None, value) for name, value in fields.items()}},
        "query": {"params": fields},
        "mixed": {"params": {"q": fields["q"]}, "data": {"source": "en", "target": "de"}},
    }[how]
    answer = client.post("/translate", **options)
    assert (answer.status_code, answer.json()) == (200, {"translatedText": expected(fields["q"])[0]})


@pytest.mark.parametrize("write", [str, quote])
def test_a_form_may_hold_utf_8_as_it_is_as_curl_sends_it(client, write):
    text = "😀 ☃ 12"  # has no letters and comes back as it is
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = client.post("/translate", content=f"q={write(text)}&source=en&target=de".encode(), headers=headers)
    assert answer.json() == {"translatedText": text}


def test_a_field_that_a_form_repeats_is_a_list(client, expected):
    fields = {"q": [sentence(1), sentence(2)], "source": "en", "target": "de"}
    assert client.post("/translate", data=fields).json() == {"translatedText": expected(*fields["q"])}


def test_every_sentence_is_translated_by_itself_and_white_space_stays(client, expected):
    one, two, three = (sentence(number) for number in (4, 5, 6))
    a, b, c = expected(one, two, three)
    assert ask(client, q=f"  {one} {two}\n\n\t{three}\n")["translatedText"] == f"  {a} {b}\n\n\t{c}\n"


@pytest.mark.parametrize("text", ["", "   ", "\n\n", "😀", "12 + 3", "https://example.org/a?b=c", "…!?"])
@pytest.mark.parametrize("source", ["en", "auto"])
def test_what_has_no_letters_comes_back_unchanged(client, text, source):
    assert ask(client, q=text, source=source)["translatedText"] == text


def test_alternatives_are_as_many_others_as_there_are_and_nested_for_lists(client):
    text = f"{sentence(7)} {sentence(8)}"
    found = ask(client, q=text, alternatives=3)
    others = found["alternatives"]
    assert 1 <= len(others) <= 3 and len({found["translatedText"], *others}) == len(others) + 1
    assert ask(client, q=[text, "😀"], alternatives=2)["alternatives"] == [others[:2], []]
    assert "alternatives" not in ask(client, q=text, alternatives=0)
    assert "4" in ask(client, q=text, alternatives=4, status=400)["error"]
    body = {"q": text, "source": "en", "target": "de"}
    assert client.post("/translate?alternatives=3", json=body).json() == found  # a text of the query string
    answer = client.post("/translate", json=body | {"alternatives": "3"})
    assert answer.status_code == 400 and "alternatives is '3'" in answer.json()["error"]


def test_with_auto_the_language_is_told_and_with_one_source_there_is_only_one(client):
    assert ask(client, q=sentence(1), source="auto")["detectedLanguage"] == {"confidence": 100, "language": "en"}
    found = ask(client, q=[sentence(1), sentence(2)], source="auto")
    assert [each["language"] for each in found["detectedLanguage"]] == ["en", "en"]


def test_details_tell_the_scores_of_each_sentence(client, served):
    (found,) = served.translator.hypotheses([sentence(9)], BeamSearch(extra_length=6))
    (told,) = ask(client, q=f" {sentence(9)}", details=True)["details"]
    assert told["source"] == sentence(9)
    assert told["translations"][0]["text"] == found[0].text
    assert told["translations"][0]["score"] == pytest.approx(found[0].score, abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"q": None}, "q is missing"),
        ({"source": None}, "source is missing"),
        ({"target": None}, "target is missing"),
        ({"q": 5}, "q is 5"),
        ({"q": ["a", {}]}, "q[1]"),
        ({"source": ["en"]}, "source"),
        ({"source": "xx"}, "'xx' is not supported"),
        ({"target": "en"}, "'en' is not supported"),
        ({"source": "auto", "target": "xx"}, "'xx' is not supported"),
        ({"format": "pdf"}, "'pdf'"),
        ({"alternatives": "many"}, "'many'"),
        ({"alternatives": -1}, "-1"),
        ({"alternatives": True}, "True"),
        ({"alternatives": 1e999}, "inf"),
        ({"details": "yes"}, "'yes'"),
        ({"q": "long " * 200}, "1000 characters"),
        ({"q": ["a"] * 11}, "11 texts"),
        ({"q": "A dog. " * 6}, "6 sentences"),
    ],
    ids=str,
)
def test_a_wrong_request_is_told_what_is_wrong(make_client, fields, named):
    client = make_client(characters=500, texts=10, sentences=5)
    fields = {"q": "a dog", "source": "en", "target": "de"} | fields
    body = json.dumps({name: value for name, value in fields.items() if value is not None})
    answer = client.post("/translate", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and named in answer.json()["error"], answer.text


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{", "application/json"),
        (b"[1]", "application/json"),
        (b"\xff\xfe", "application/json"),
        (b'{"q": ' + b"[" * 100_000, "application/json"),
        (b'{"q": ' + b"9" * 10_000 + b"}", "application/json"),
        (b"<q/>", "application/xml"),
        (b"--x\r\nbroken", "multipart/form-data; boundary=x"),
        (b"broken", "multipart/form-data"),
        (b"q=%ff%fe&source=en", "application/x-www-form-urlencoded"),
    ],
    ids=str,
)
def test_a_body_that_is_not_what_its_type_says_is_an_error_of_the_client(client, body, kind):
    answer = client.post("/translate", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 400 and answer.json()["error"]


def test_half_a_surrogate_pair_is_answered_with_text_that_utf_8_can_hold(client):
    for form in ("text", "html"):
        body = f'{{"q": "a dog \\ud800 \\u0000 runs", "source": "en", "target": "de", "format": "{form}"}}'
        answer = client.post("/translate", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200 and isinstance(answer.json()["translatedText"], str)


def test_the_language_of_html_is_that_of_its_text(client, monkeypatch):
    seen = []
    monkeypatch.setattr(
        type(client.service.models), "detect", lambda models, text, target="": seen.append(text) or [("en", 1.0)]
    )
    page = "<style>p { color: red }</style><p class='menschlich'>A dog <b>runs</b>.</p><p>Two men talk.</p>"
    ask(client, q=page, source="auto", format="html")
    ask(client, q=page, source="auto")
    assert seen == ["A dog runs. Two men talk.", page]


def test_a_slash_behind_a_route_is_no_redirection_to_another_address(client):
    answer = client.post("/translate/", json={"q": "a", "source": "en", "target": "de"}, follow_redirects=False)
    assert answer.status_code == 404 and "error" in answer.json()


def test_languages_detection_health_and_settings(client):
    assert (
        client.get("/languages").json()
        == client.post("/languages").json()
        == [
            {"code": "en", "name": "English", "targets": ["de"]},
            {"code": "de", "name": "German", "targets": []},
        ]
    )
    assert client.get("/health").json() == {"status": "ok"}
    assert ask(client, "/detect", q="a dog runs") == [{"confidence": 100, "language": "en"}]
    assert ask(client, "/detect", q="  ") == [{"confidence": 0, "language": "en"}]
    assert "missing" in ask(client, "/detect", status=400)["error"]
    settings = client.get("/frontend/settings").json()
    assert settings["language"] == {
        "source": {"code": "en", "name": "English"},
        "target": {"code": "de", "name": "German"},
    }
    assert settings["charLimit"] == client.service.limits.characters and settings["keyRequired"] is False


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/translate", 405),
        ("PUT", "/translate", 405),
        ("PUT", "/languages", 405),
        ("GET", "/explain", 405),
        ("POST", "/suggest", 404),
        ("POST", "/translate_file", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
    ],
)
def test_what_is_not_there_is_an_error_in_json(client, method, path, status):
    answer = client.request(method, path)
    assert answer.status_code == status and set(answer.json()) == {"error"}
    assert "etc" not in answer.text

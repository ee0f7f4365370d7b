import json
import math

import numpy as np
import pytest

from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.serving.exploring import _numbers
from tests.serving.conftest import sentence

PAIR = {"source": "en", "target": "de"}
SEARCH = BeamSearch(extra_length=6)


def explain(client, status=200, **fields):
    answer = client.post("/explain", json=PAIR | fields)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_each_token_has_its_place_in_the_text_its_probability_and_candidates(client, served):
    text = f"  {sentence(1)} {sentence(2)}\n"
    one, two = explain(client, q=text, candidates=3, hypotheses=2)["sentences"]
    assert (one["before"], two["before"], one["after"], two["after"]) == ("  ", " ", "", "\n")
    for told, source in ((one, sentence(1)), (two, sentence(2))):
        expected = served.translator.hypotheses([source], SEARCH.replace(num_return=2))[0]
        assert told["source"] == source and len(told["hypotheses"]) == 2
        for found, translation in zip(told["hypotheses"], expected, strict=True):
            assert found["text"] == translation.text
            assert [token["id"] for token in found["tokens"]] == list(translation.ids)
            shares = [token["probability"] for token in found["tokens"]]
            np.testing.assert_allclose(shares, np.exp(translation.token_log_probs), atol=1e-3)
            assert found["log_prob"] == pytest.approx(translation.log_prob, abs=1e-3)
            for token in found["tokens"][:-1]:
                assert found["text"][token["start"] : token["end"]] == token["piece"].replace("▁", "")
        for token in told["source_tokens"][:-1]:
            assert source[token["start"] : token["end"]] == token["text"].replace("▁", "")
        first = told["hypotheses"][0]
        assert np.shape(first["alignment"]) == (len(first["tokens"]), len(told["source_tokens"]))
        np.testing.assert_allclose(np.sum(first["alignment"], axis=1), 1, atol=1e-2)


def test_candidates_are_the_likeliest_tokens_at_their_place(client, served):
    (told,) = explain(client, q=sentence(3), beam_size=1, candidates=10)["sentences"]
    tokens = told["hypotheses"][0]["tokens"][:-1]  # the last may be the end because there is no room for more
    for number, token in enumerate(tokens):
        likely = token["candidates"]
        shares = [each["probability"] for each in likely]
        assert len(likely) == 10 and shares == sorted(shares, reverse=True) and sum(shares) <= 1.001
        # Greedy search chooses the likeliest token, unless it may not.
        assert token["id"] == likely[0]["id"] or likely[0]["id"] in served.translator.config.never_chosen
        prefix = [each["id"] for each in tokens[:number]]
        (again,) = explain(client, q=sentence(3), beam_size=1, candidates=10, prefix=prefix)["sentences"]
        assert again["hypotheses"][0]["text"] == told["hypotheses"][0]["text"]


def test_another_token_as_prefix_leads_to_another_translation_that_begins_with_it(client, served):
    (told,) = explain(client, q=sentence(4))["sentences"]
    tokens = told["hypotheses"][0]["tokens"]
    other = next(each["id"] for each in tokens[0]["candidates"] if each["id"] not in (tokens[0]["id"], 0, 1, 2))
    (changed,) = explain(client, q=sentence(4), prefix=[other])["sentences"]
    assert changed["hypotheses"][0]["tokens"][0]["id"] == other
    assert changed["hypotheses"][0]["text"] != told["hypotheses"][0]["text"]


def test_unknown_pieces_are_copied_from_the_source_as_in_translate(client, served):
    unknown = served.translator.vocabularies.target.unk_id
    (told,) = explain(client, q="a ☃ dog", prefix=[unknown], hypotheses=2)["sentences"]
    for hypothesis in told["hypotheses"]:
        text, first = hypothesis["text"], hypothesis["tokens"][0]
        assert first["id"] == unknown and text[first["start"] : first["end"]] == "☃" and "⁇" not in text
    client.service.replace_unknown = False
    (told,) = explain(client, q="a ☃ dog", prefix=[unknown])["sentences"]
    assert told["hypotheses"][0]["text"].lstrip().startswith("⁇")


def test_samples_depend_on_the_seed_alone(client):
    fields = {"q": sentence(5), "sampling": {"temperature": 2.0}, "hypotheses": 3}
    first, again, other = (explain(client, **fields, seed=seed)["sentences"][0] for seed in (1, 1, 2))
    texts = [[each["text"] for each in told["hypotheses"]] for told in (first, again, other)]
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 3 and len(set(texts[0])) > 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"q": None}, "q is missing"),
        ({"q": ["a"]}, "q is ['a']"),
        ({"q": "A dog. A cat.", "prefix": [5]}, "2 sentences"),
        ({"q": "", "prefix": [5]}, "0 sentences"),
        ({"prefix": [2]}, "the id 2"),
        ({"prefix": [10**6]}, "1000000"),
        ({"prefix": ["a"]}, "token ids"),
        ({"prefix": [4] * 60}, "token ids"),
        ({"prefix": [4] * 30}, "30 tokens"),
        ({"beam_size": 9}, "beam_size is 9"),
        ({"beam_size": 2, "hypotheses": 3}, "hypotheses is 3"),
        ({"candidates": 0}, "candidates is 0"),
        ({"sampling": []}, "sampling is []"),
        ({"sampling": {"temperature": 0}}, "temperature is 0"),
        ({"seed": 2**40}, "seed"),
        ({"q": "cat " * 100}, "too many to explain"),
        ({"q": "A cat.\n" * 60}, "60 sentences"),
    ],
    ids=str,
)
def test_what_cannot_be_explained_is_told(client, fields, named):
    assert named in explain(client, status=400, **({"q": "a cat"} | fields))["error"]


def test_there_is_a_limit_to_kinds_of_searches_since_each_is_compiled(client, monkeypatch):
    monkeypatch.setattr("flax_transformer.serving.service.SEARCHES", 1)
    assert "kinds of searches" in explain(client, q="a cat", beam_size=3, status=400)["error"]
    assert explain(client, q="a cat")["sentences"]


@pytest.mark.parametrize("kind", ["cross", "encoder", "decoder"])
def test_the_attention_of_each_head_is_that_of_the_model(client, served, kind):
    (told,) = explain(client, q=sentence(6))["sentences"]
    ids = [token["id"] for token in told["hypotheses"][0]["tokens"]]
    fields = PAIR | {"q": sentence(6), "ids": ids, "kind": kind, "layer": 0}
    shown = client.post("/attention", json=fields).json()
    sizes = {"source": len(told["source_tokens"]), "target": len(ids)}
    rows, columns = (
        sizes["source" if kind == "encoder" else "target"],
        sizes["target" if kind == "decoder" else "source"],
    )
    assert (len(shown["rows"]), len(shown["columns"])) == (rows, columns)
    heads = np.array(shown["heads"])
    assert heads.shape == (2, rows, columns)
    np.testing.assert_allclose(heads.sum(axis=-1), 1, atol=1e-3)
    if kind == "decoder":
        assert (np.triu(heads, 1) == 0).all()
    if kind == "cross":
        (alignment,) = served.translator.align([sentence(6)], [told_as_translation(served)], layer=0)
        np.testing.assert_allclose(heads.mean(axis=0), alignment.weights, atol=1e-3)


def told_as_translation(served):
    return served.translator.hypotheses([sentence(6)], SEARCH)[0][0]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"ids": None}, "ids is missing"),
        ({"ids": []}, "ids is missing"),
        ({"ids": [10**6]}, "1000000"),
        ({"kind": "other"}, "'other'"),
        ({"layer": 2}, "layer is 2"),
        ({"q": " "}, "blank"),
        ({"q": "cat " * 100}, "40 tokens"),
    ],
    ids=str,
)
def test_attention_that_cannot_be_shown_is_told(client, fields, named):
    answer = client.post("/attention", json=PAIR | {"q": "a cat", "ids": [5, 2], "kind": "cross", "layer": 0} | fields)
    assert answer.status_code == 400 and named in answer.json()["error"]


def read_events(text):
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        yield name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_stream_grows_to_the_greedy_translation(client, served, method):
    one, two = sentence(7), sentence(8)
    fields = PAIR | {"q": f"{one}\n{two}"}
    answer = client.request(method, "/stream", **({"params": fields} if method == "GET" else {"json": fields}))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["X-Accel-Buffering"] == "no"  # or nginx would hold the tokens back
    *tokens, (last, done) = read_events(answer.text)
    greedy = served.translator.translate([one, two], BeamSearch(beam_size=1, extra_length=6))
    assert last == "done" and done == {"translatedText": "\n".join(greedy)}
    for number, whole in enumerate(greedy):
        texts = [data["text"] for name, data in tokens if data["sentence"] == number]
        assert texts[-1] == whole and all(whole.startswith(text.strip()) for text in texts)
        assert [len(text) for text in texts] == sorted(len(text) for text in texts)
    counted = client.get("/metrics").text
    assert 'flax_transformer_request_seconds_count{route="/stream"} 1.0' in counted
    assert "flax_transformer_requests_running 1.0" in counted  # the request for these numbers


def test_all_sentences_and_bytes_of_a_stream_count_for_the_limits_of_the_queue(make_client, monkeypatch):
    client = make_client(queue_sentences=3)
    service, held = client.service, []
    admit = type(service.desk).admit
    monkeypatch.setattr(type(service.desk), "admit", lambda *each: held.append(service.bytes) or admit(*each))
    (event,) = read_events(client.get("/stream", params=PAIR | {"q": "a cat\n" * 4}).text)
    assert event[0] == "error" and "the request has 4 sentences" in event[1]["error"]
    assert held == [len("a cat\n" * 4)]
    *_, (last, _) = read_events(client.get("/stream", params=PAIR | {"q": "a cat\n" * 3}).text)
    assert last == "done" and (service.desk.open, service.bytes, service.streams) == (0, 0, 0)


def test_pairs_whose_attention_needs_too_much_memory_are_refused(client, monkeypatch):
    monkeypatch.setattr("flax_transformer.serving.exploring.LOOKED_INTO", 4)
    monkeypatch.setattr(type(client.service.desk), "decode", None)  # nothing is searched before
    fields = PAIR | {"ids": [5, 5, 5, 5, 2], "kind": "cross", "layer": 0}
    for path, body in (("/attention", fields | {"q": "a cat"}), ("/explain", PAIR | {"q": "the cat saw the dog"})):
        answer = client.post(path, json=body)
        assert answer.status_code == 400 and "4 can be looked into: shorten it" in answer.json()["error"]


def test_weights_that_float16_could_not_hold_are_zero():
    assert _numbers(np.float16([[np.nan, 1], [0.5, 0.25]]))[1] == [0.5, 0.25]
    assert json.loads(json.dumps(_numbers(np.float16([np.nan])), allow_nan=False)) == [0]


def test_an_error_after_the_beginning_of_a_stream_is_an_event(client, monkeypatch):
    monkeypatch.setattr(type(client.service.desk), "admit", lambda desk, count: 1 / 0)
    ((name, data),) = read_events(client.get("/stream", params=PAIR | {"q": "a cat"}).text)
    assert name == "error" and "ZeroDivisionError" in data["error"]


def test_models_say_what_a_picture_of_them_needs(client, served):
    (model,) = client.get("/models").json()
    assert (model["name"], model["source"], model["target"]) == ("en-de", "en", "de")
    assert (model["encoder_layers"], model["decoder_layers"], model["heads"], model["d_model"]) == (1, 2, 2, 16)
    assert model["decoder_self_attention"] is True and np.shape(model["position_waves"]) == (32, 16)
    # Section 3.5: dimension 0 is the sine of the position, dimension 1 its cosine.
    assert model["position_waves"][3][:2] == [round(math.sin(3), 3), round(math.cos(3), 3)]

"""Our own routes, which show how a translation came about: its pieces, their probabilities and the attention."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from starlette.responses import Response, StreamingResponse

from flax_transformer.data.sentencepiece_vocabulary import INCOMPLETE
from flax_transformer.decoding.drafts import Draft
from flax_transformer.decoding.inspection import CANDIDATES
from flax_transformer.decoding.results import Translation
from flax_transformer.decoding.settings import BeamSearch, Sampling
from flax_transformer.serving.libretranslate import check_texts
from flax_transformer.serving.models import Served
from flax_transformer.serving.parameters import Parameters
from flax_transformer.serving.refusals import Refusal
from flax_transformer.serving.service import Call, Json, Service
from flax_transformer.serving.texts import LOOKED_INTO, check_sentences, write
from flax_transformer.text.alignment import spans
from flax_transformer.text.documents import Document, divide
from flax_transformer.text.splitting import join_parts

MAX_BEAM = 8
KINDS = ("cross", "encoder", "decoder")
START = "<s>"  # what a decoder sees before the first piece; vocabularies have other names for it, or none
SENTENCES = 50  # of one request that are explained at once


async def models(call: Call) -> Response:
    """`GET /models`: the models that are served, with what a picture of them needs."""
    return Json(await asyncio.to_thread(lambda: [_describe(model) for model in call.service.models.served]))


def _describe(model: Served) -> dict[str, Any]:
    config = model.translator.config
    return {
        "name": model.name,
        "source": model.source,
        "target": model.target,
        "d_model": config.d_model,
        "encoder_layers": config.num_encoder_layers,
        "decoder_layers": config.num_decoder_layers,
        "heads": config.num_heads,
        "positions": config.positions,
        "position_waves": model.position_vectors,
        "beam_size": model.search.beam_size,
        "decoder_self_attention": config.decoder_autoregression == "self_attention",
    }


async def explain(call: Call) -> Response:
    """`POST /explain`: translates a text, and shows each token with what else it might have been."""
    parameters, service = call.parameters, call.service
    text = parameters.text("q")
    model = service.models.find(parameters.text("source"), parameters.text("target"))
    candidates = parameters.whole("candidates", 5, 1, CANDIDATES)
    wanted = parameters.whole("hypotheses", 1, 1, MAX_BEAM)
    search = _search(parameters, model, wanted)
    seed = parameters.whole("seed", 0, 0, 2**32 - 1)
    prefix = parameters.ids("prefix", model.translator.config.max_length)
    check_texts(call, [text])
    document = await asyncio.to_thread(divide, text)
    sentences = document.sentences
    check_sentences(service, len(sentences))
    if len(sentences) > SENTENCES:
        raise Refusal(400, f"the text has {len(sentences)} sentences, {SENTENCES} can be explained at once: divide it")
    if prefix is not None and len(sentences) != 1:
        raise Refusal(400, f"prefix is given, and q has {len(sentences)} sentences: give one sentence")
    copies = wanted if isinstance(search, Sampling) else 1  # samples of one sentence are as many sentences
    draft = await asyncio.to_thread(_draft, model, sentences, copies, search, seed, prefix)
    service.check_search(model, search)
    found = await service.desk.decode(model.translator.engine, draft)
    service.metrics.sentences.labels(model.name).inc(len(sentences))
    translations = await write(service, model, draft, found)
    explained = []
    for number, sentence in enumerate(sentences):
        own = slice(number * copies, (number + 1) * copies)
        several = [each for ranks in translations[own] for each in ranks][:wanted]
        described = await asyncio.to_thread(_explain, model, sentence, draft.sources[own.start], several, candidates)
        described["before"] = document.kept[number]
        described["after"] = document.kept[number + 1] if number + 1 == len(sentences) else ""
        explained.append(described)
    return Json({"sentences": explained})


def _search(parameters: Parameters, model: Served, wanted: int) -> BeamSearch | Sampling:
    beam = parameters.whole("beam_size", model.search.beam_size, 1, max(MAX_BEAM, model.search.beam_size))
    sampling = parameters.section("sampling")
    if sampling is not None:
        return Sampling(
            extra_length=model.search.extra_length,
            max_length=model.search.max_length,
            temperature=sampling.number("temperature", 1.0, 0.0, 100.0),
            top_k=sampling.whole("top_k", 0, 0, model.translator.config.target_vocab_size),
            top_p=sampling.number("top_p", 1.0, 0.0, 1.0),
        )
    if wanted > beam:
        raise Refusal(400, f"hypotheses is {wanted}, beam_size {beam}: lower the first or raise the second")
    return model.search.replace(beam_size=beam, num_return=wanted)


def _draft(
    model: Served,
    sentences: Sequence[str],
    copies: int,
    search: BeamSearch | Sampling,
    seed: int,
    prefix: list[int] | None,
) -> Draft:
    """What the engine is to decode: one source for each sentence, or as many equal ones as there are samples."""
    draft = model.translator.draft([each for each in sentences for _ in range(copies)], search, seed=seed)
    longest = model.translator.config.max_length
    if any(len(parts) != 1 for parts in draft.parts):
        raise Refusal(400, f"a sentence has more than {longest} tokens, which are too many to explain: shorten it")
    _check_looked_into(*draft.sources)
    if prefix is not None:
        config = model.translator.config
        wrong = [token for token in prefix if token in (config.pad_id, config.eos_id)]
        if wrong:
            raise Refusal(400, f"prefix has the id {wrong[0]}, which ends or pads a sentence: leave it out")
        language = next(iter(draft.prefixes), [])  # the token of the target language, in models that are told it so
        own = prefix[:1] and prefix[0] in model.translator.vocabularies.target.language_ids
        prefix = prefix if own else [*language, *prefix]
        draft.prefixes = [prefix] * copies
    return draft


def _explain(
    model: Served, sentence: str, source: list[int], translations: Sequence[Translation], candidates: int
) -> dict[str, Any]:
    """A sentence with its translations; runs on a worker thread, because it uses the device."""
    vocabularies = model.translator.vocabularies
    pieces = vocabularies.source.pieces(source)
    hypotheses = [_hypothesis(translation) for translation in translations]
    first = translations[0]
    _check_looked_into(first.ids)
    listed = model.translator.engine.listed(source, first.ids)
    inspection = model.translator.inspector.inspect(source, first.ids, listed)
    best, log_probs = inspection.candidates()
    for token, ids, row in zip(hypotheses[0]["tokens"], best, log_probs, strict=True):
        likely = list(zip(ids[:candidates].tolist(), row[:candidates].tolist(), strict=True))
        token["candidates"] = [
            {"id": each, "piece": piece, "probability": _probability(log_prob)}
            for (each, log_prob), piece in zip(
                likely, vocabularies.target.pieces(each for each, _ in likely), strict=True
            )
        ]
    hypotheses[0]["alignment"] = _numbers(inspection.alignment())
    return {
        "source": sentence,
        "source_tokens": [
            {"text": piece, "start": start, "end": end}
            for piece, (start, end) in zip(pieces, spans(pieces, sentence), strict=True)
        ],
        "hypotheses": hypotheses,
    }


def _numbers(weights: np.ndarray) -> list[Any]:
    """Weights as JSON can hold them: where float16 overflowed there are none, and 0 stands for them."""
    return np.nan_to_num(weights.astype(float)).round(4).tolist()


def _check_looked_into(*sides: Sequence[int]) -> None:
    """Raises `Refusal` for a source or target whose attention would take too much memory."""
    longest = max(map(len, sides), default=0)
    if longest > LOOKED_INTO:
        raise Refusal(400, f"a sentence has {longest} tokens, {LOOKED_INTO} can be looked into: shorten it")


def _hypothesis(translation: Translation) -> dict[str, Any]:
    places = spans(translation.tokens, translation.text)
    columns = zip(translation.ids, translation.tokens, places, translation.token_log_probs, strict=True)
    return {
        "text": translation.text,
        "score": round(translation.score, 6),
        "log_prob": round(translation.log_prob, 6),
        "tokens": [
            {"id": token, "piece": piece, "start": start, "end": end, "probability": _probability(log_prob)}
            for token, piece, (start, end), log_prob in columns
        ],
    }


def _probability(log_prob: float) -> float:
    return round(min(1.0, math.exp(log_prob)), 6) if not math.isnan(log_prob) else 0.0


async def attention(call: Call) -> Response:
    """`POST /attention`: the weights of each head of one layer, for a sentence and a translation of it."""
    parameters = call.parameters
    text = parameters.text("q")
    model = call.service.models.find(parameters.text("source"), parameters.text("target"))
    kind = parameters.text("kind", "cross")
    if kind not in KINDS:
        raise Refusal(400, f"kind is {kind[:60]!r}: give {', '.join(KINDS)}")
    config = model.translator.config
    if kind == "decoder" and config.decoder_autoregression != "self_attention":
        raise Refusal(400, "the decoder of this model is recurrent and has no self-attention: look at cross or encoder")
    layers = config.num_encoder_layers if kind == "encoder" else config.num_decoder_layers
    layer = parameters.whole("layer", layers - 1, 0, layers - 1)
    ids = parameters.ids("ids", 2 * config.max_length)
    if not ids:
        raise Refusal(400, "the parameter ids is missing: give the token ids of the translation, with its end")
    check_texts(call, [text])
    return Json(await asyncio.to_thread(_attention, model, text, ids, kind, layer))


def _attention(model: Served, text: str, ids: list[int], kind: str, layer: int) -> dict[str, Any]:
    vocabularies, config = model.translator.vocabularies, model.translator.config
    if max(ids) >= config.target_vocab_size:
        raise Refusal(400, f"ids has {max(ids)}, the vocabulary has {config.target_vocab_size} tokens: give its ids")
    draft = model.translator.draft([text], model.search)
    if len(draft.sources) != 1:
        what = f"has more than {config.max_length} tokens: shorten it" if draft.sources else "is blank: give a sentence"
        raise Refusal(400, f"q {what}")
    source = draft.sources[0]
    _check_looked_into(source, ids)
    heads = model.translator.inspector.inspect(source, ids).heads(kind, layer)
    read, written = vocabularies.source.pieces(source), vocabularies.target.pieces(ids)
    return {
        "rows": read if kind == "encoder" else written,
        "columns": [START, *written[:-1]] if kind == "decoder" else read,  # the decoder sees what comes before
        "heads": _numbers(heads),
    }


async def stream(call: Call) -> Response:
    """`GET` or `POST /stream`: translates a text greedily, and tells each token as it comes (server-sent events)."""
    parameters, started = call.parameters, time.monotonic()
    text = parameters.text("q")
    model = call.service.models.find(parameters.text("source"), parameters.text("target"))
    check_texts(call, [text])
    document = await asyncio.to_thread(divide, text)
    check_sentences(call.service, len(document.sentences))
    # The first sentence is looked at before the answer begins, since only then can an error have a status.
    first = await asyncio.to_thread(model.translator.draft, document.sentences[:1], model.streaming)
    events = _events(call.service, model, text, document, first, started)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the latter lets nginx pass each event on
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def _events(
    service: Service, model: Served, text: str, document: Document, first: Draft, started: float
) -> AsyncIterator[bytes]:
    """The events of a text; its bytes and its sentences count for the server's limits until the last of them."""
    translations: list[str] = []
    size, waiting = len(text.encode(errors="replace")), 0
    service.streams += 1
    service.bytes += size
    service.metrics.running.inc()
    try:
        service.desk.admit(len(document.sentences))
        waiting = len(document.sentences)
        async with asyncio.timeout(service.limits.deadline_s):
            for number, sentence in enumerate(document.sentences):
                draft = (
                    await asyncio.to_thread(model.translator.draft, [sentence], model.streaming) if number else first
                )
                told = ""
                async for parts in service.desk.stream(model.translator.engine, draft):
                    told = join_parts(model.translator.vocabularies.target.decode(parts))
                    yield _event("token", {"sentence": number, "text": told.rstrip(INCOMPLETE)})
                translations.append(told)
                waiting -= 1
                service.desk.open -= 1
                service.metrics.sentences.labels(model.name).inc()
        yield _event("done", {"translatedText": document.join(translations)})
    except TimeoutError:
        yield _event("error", {"error": f"the answer was not ready within {service.limits.deadline_s:g} seconds"})
    except Exception as error:
        yield _event("error", {"error": service.refuse(error).message})
    finally:
        service.streams -= 1
        service.bytes -= size
        service.desk.open -= waiting
        service.metrics.running.dec()
        service.metrics.latency.labels("/stream").observe(time.monotonic() - started)


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode(errors="replace")

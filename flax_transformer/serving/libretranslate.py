"""The routes of LibreTranslate's HTTP API, so that clients that know it work unchanged."""

import asyncio
from typing import Any

from starlette.responses import Response

from flax_transformer.decoding.documents import Documents, divide_documents
from flax_transformer.serving.languages import language_name
from flax_transformer.serving.models import AUTO
from flax_transformer.serving.refusals import Refusal
from flax_transformer.serving.service import Call, Json
from flax_transformer.serving.texts import Translated, beside, check_sentences, translate_texts
from flax_transformer.text.spelling import is_blank

FORMATS = {"text": False, "html": True}


async def translate(call: Call) -> Response:
    """`POST /translate`: translates a text, or each text of a list."""
    service, parameters = call.service, call.parameters
    texts, is_list = parameters.texts("q")
    source, target = parameters.text("source"), parameters.text("target")
    form = parameters.text("format", "text") or "text"
    if form not in FORMATS:
        raise Refusal(400, f"format is {form[:60]!r}: give text or html")
    alternatives = parameters.whole("alternatives", 0, 0, service.limits.alternatives)
    details = parameters.flag("details")
    check_texts(call, texts)
    markup = FORMATS[form]
    _check_languages(call, source, target)
    divided = await beside(sum(map(len, texts)), divide_documents, texts, markup=markup)
    check_sentences(service, len(divided.sentences))
    # Tags and styles are in no language.
    samples = [" ".join(document.sentences) for document in divided.documents] if markup else texts
    detected = [(source, 1.0)] * len(texts)
    if source == AUTO:
        detected = await asyncio.to_thread(lambda: [service.models.detect(text, target)[0] for text in samples])
    by_source: dict[str, list[int]] = {}
    for number, (code, _) in enumerate(detected):
        by_source.setdefault(code, []).append(number)
    models = {code: service.models.find(code, target) for code in by_source}
    results: dict[int, Translated] = {}
    for code, numbers in by_source.items():
        found = await translate_texts(
            service,
            models[code],
            Documents.of([divided.documents[number] for number in numbers]),
            characters=sum(len(texts[number]) for number in numbers),
            alternatives=0 if markup else alternatives,
        )
        results |= dict(zip(numbers, found, strict=True))
    translated = [results[number] for number in range(len(texts))]
    answer: dict[str, Any] = {"translatedText": [each.text for each in translated]}
    if source == AUTO:
        answer["detectedLanguage"] = [_confidence(*each) for each in detected]
    if alternatives:
        answer["alternatives"] = [list(each.alternatives) for each in translated]
    if details:
        answer["details"] = [_details(each) for each in translated]
    return Json(answer if is_list else {name: values[0] for name, values in answer.items()})


def check_texts(call: Call, texts: list[str]) -> None:
    """Counts texts under the client's limit; raises `Refusal` if they are too many or too long."""
    limits = call.service.limits
    call.count(len(texts))
    if len(texts) > limits.texts:
        raise Refusal(
            400, f"the list has {len(texts)} texts, this server allows {limits.texts}: divide it", reason="too_large"
        )
    characters = sum(map(len, texts))
    if characters > limits.characters:
        raise Refusal(
            400,
            f"the request has {characters} characters, this server allows {limits.characters}: divide it",
            reason="too_large",
        )


def _check_languages(call: Call, source: str, target: str) -> None:
    """Raises `Refusal` if no model translates between two languages, of which the source may be "auto"."""
    models = call.service.models
    if source != AUTO:
        models.find(source, target)
    elif target not in models.targets:
        models.find(models.sources[0], target)  # says what is wrong


def _confidence(code: str, probability: float) -> dict[str, Any]:
    return {"confidence": round(100 * probability, 1), "language": code}


def _details(translated: Translated) -> list[dict[str, Any]]:
    return [
        {
            "source": sentence,
            "translations": [
                {"text": each.text, "score": round(each.score, 6), "log_prob": round(each.log_prob, 6)}
                for each in several
            ],
        }
        for sentence, several in translated.sentences
    ]


async def detect(call: Call) -> Response:
    """`POST /detect`: tells in which of the served source languages a text is."""
    texts, _ = call.parameters.texts("q")
    text = "\n".join(texts)
    check_texts(call, [text])
    found = await asyncio.to_thread(call.service.models.detect, text)
    told = [] if is_blank(text) else [each for each in found if each[1] > 0]
    # As LibreTranslate, which answers with some language where it can tell none: clients read the first one.
    return Json([_confidence(*each) for each in told or [(call.service.models.sources[0], 0.0)]])


async def languages(call: Call) -> Response:
    """`GET /languages`: the languages that are served."""
    return Json(call.service.models.languages())


async def health(call: Call) -> Response:
    """`GET /health`: says that the server works."""
    return Json({"status": "ok"})


async def settings(call: Call) -> Response:
    """`GET /frontend/settings`: what a page needs to know of this server."""
    service = call.service
    first = service.models.served[0]
    return Json(
        {
            "charLimit": service.limits.characters,
            "frontendTimeout": 500,
            "apiKeys": service.keys is not None,
            "keyRequired": service.keys is not None,
            "suggestions": False,
            "filesTranslation": False,
            "supportedFilesFormat": [],
            "language": {
                side: {"code": code, "name": language_name(code)}
                for side, code in (("source", first.source), ("target", first.target))
            },
        }
    )

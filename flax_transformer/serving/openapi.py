"""Describes the routes in OpenAPI 3.1, from which `/docs` is made too."""

import html
import importlib.metadata
from typing import Any

from flax_transformer.decoding.inspection import CANDIDATES
from flax_transformer.serving.exploring import KINDS, MAX_BEAM
from flax_transformer.serving.libretranslate import FORMATS
from flax_transformer.serving.limits import Limits

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
WHOLE: Schema = {"type": "integer"}
FLAG: Schema = {"type": "boolean"}
FILE: Schema = {"type": "string", "format": "binary"}
ERRORS = {
    "400": "Something is missing or wrong; the error says what.",
    "403": "The API key is missing or wrong.",
    "404": "There is no such route.",
    "405": "The route has no such method.",
    "408": "The request came too slowly.",
    "413": "The request has too many bytes.",
    "429": "The client had its requests of this minute; Retry-After says when to try again.",
    "500": "The server failed.",
    "503": "The queue is full, the device has too little memory, or the server is stopping.",
    "504": "The answer was not ready within the deadline.",
}


def _object(required: str = "", **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": required.split()}


def _array(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def _within(least: int, most: int, default: int | None = None) -> Schema:
    return WHOLE | {"minimum": least, "maximum": most} | ({} if default is None else {"default": default})


def _either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


CONFIDENCE = _object("confidence language", confidence=NUMBER, language=TEXT)
TRANSLATION = _object("text score log_prob", text=TEXT, score=NUMBER, log_prob=NUMBER)
DETAILS = _array(_object("source translations", source=TEXT, translations=_array(TRANSLATION)))  # a sentence each
SPAN = {"start": WHOLE, "end": WHOLE}
CANDIDATE = _object("id piece probability", id=WHOLE, piece=TEXT, probability=NUMBER)
TOKEN = _object(
    "id piece start end probability", id=WHOLE, piece=TEXT, **SPAN, probability=NUMBER, candidates=_array(CANDIDATE)
)
HYPOTHESIS = _object(
    "text score log_prob tokens",
    text=TEXT,
    score=NUMBER,
    log_prob=NUMBER,
    tokens=_array(TOKEN),
    alignment=_array(_array(NUMBER)),
)
EXPLAINED = _object(
    "source source_tokens before after hypotheses",
    source=TEXT,
    source_tokens=_array(_object("text start end", text=TEXT, **SPAN)),
    before=TEXT,
    after=TEXT,
    hypotheses=_array(HYPOTHESIS),
)
MODEL = _object(
    "name source target",
    name=TEXT,
    source=TEXT,
    target=TEXT,
    d_model=WHOLE,
    encoder_layers=WHOLE,
    decoder_layers=WHOLE,
    heads=WHOLE,
    positions=TEXT,
    position_waves=_array(_array(NUMBER)),
    beam_size=WHOLE,
    decoder_self_attention=FLAG,
)
SIDE = _object("code name", code=TEXT, name=TEXT)
SETTINGS = _object(
    "charLimit frontendTimeout apiKeys keyRequired suggestions filesTranslation supportedFilesFormat language",
    charLimit=WHOLE,
    frontendTimeout=WHOLE,
    apiKeys=FLAG,
    keyRequired=FLAG,
    suggestions=FLAG,
    filesTranslation=FLAG,
    supportedFilesFormat=_array(TEXT),
    language=_object("source target", source=SIDE, target=SIDE),
)
SAMPLING = _object(
    temperature=NUMBER | {"exclusiveMinimum": 0, "maximum": 100},
    top_k=WHOLE | {"minimum": 0},
    top_p=NUMBER | {"exclusiveMinimum": 0, "maximum": 1},
)


def describe(limits: Limits) -> Schema:
    """The description of a server with these limits."""
    key = {"api_key": TEXT | {"description": "The API key, if the server needs one; or as Authorization: Bearer KEY."}}
    pair = {"source": TEXT | {"description": "A language code of /languages."}, "target": TEXT}
    texts = _either(TEXT, _array(TEXT, maxItems=limits.texts)) | {"description": "A text, or a list of texts."}
    from_auto = TEXT | {"description": 'A language code of /languages, or "auto".'}
    detected = _either(CONFIDENCE, _array(CONFIDENCE))
    translate = _object(
        "q source target",
        q=texts,
        source=from_auto,
        target=TEXT,
        format=TEXT | {"enum": list(FORMATS), "default": "text"},
        alternatives=_within(0, limits.alternatives, 0),
        details=FLAG | {"description": "Whether to tell the scores of each sentence."},
        **key,
    )
    translated = _object(
        "translatedText",
        translatedText=_either(TEXT, _array(TEXT)),
        detectedLanguage=detected,
        alternatives=_array(_either(TEXT, _array(TEXT))),
        details=_either(DETAILS, _array(DETAILS)),
    )
    explain = _object(
        "q source target",
        q=TEXT,
        **pair,
        prefix=_array(WHOLE | {"minimum": 0}) | {"description": "Ids with which the translation begins; one sentence."},
        beam_size=_within(1, MAX_BEAM) | {"description": "As the server searches, if it is not given."},
        candidates=_within(1, CANDIDATES, 5),
        hypotheses=_within(1, MAX_BEAM, 1),
        sampling=SAMPLING,
        seed=_within(0, 2**32 - 1, 0),
        **key,
    )
    attention = _object(
        "q source target ids",
        q=TEXT,
        **pair,
        ids=_array(WHOLE | {"minimum": 0}, minItems=1) | {"description": "Ids of the translation, with its end."},
        kind=TEXT | {"enum": list(KINDS), "default": KINDS[0]},
        layer=WHOLE | {"minimum": 0},
        **key,
    )
    heads = _object("rows columns heads", rows=_array(TEXT), columns=_array(TEXT), heads=_array(_array(_array(NUMBER))))
    stream = _object("q source target", q=TEXT, **pair, **key)
    languages = _array(_object("code name targets", code=TEXT, name=TEXT, targets=_array(TEXT)))
    forms, json_only = ("application/json", "application/x-www-form-urlencoded"), ("application/json",)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "flax_transformer",
            "version": importlib.metadata.version("flax_transformer"),
            "description": "Translates texts, and shows how a translation came about.",
        },
        "paths": {
            "/translate": {"post": _posts("Translates a text or a list of texts.", translate, translated, forms)},
            "/detect": {
                "post": _posts("Tells the language of a text.", _object("q", q=TEXT, **key), _array(CONFIDENCE), forms)
            },
            "/languages": {
                "get": _gets("The languages that are served.", languages),
                "post": _gets("The same, for clients that post.", languages),
            },
            "/health": {"get": _gets("Says that the server works.", _object("status", status=TEXT))},
            "/frontend/settings": {"get": _gets("What a page needs to know of the server.", SETTINGS)},
            "/models": {"get": _gets("The models that are served.", _array(MODEL))},
            "/explain": {
                "post": _posts(
                    "Translates a text, and shows each token, its probability and what else was likely.",
                    explain,
                    _object("sentences", sentences=_array(EXPLAINED)),
                    json_only,
                )
            },
            "/attention": {
                "post": _posts("The attention weights of each head of a layer.", attention, heads, json_only)
            },
            "/stream": {
                "get": {
                    "summary": "Translates a text and tells each token as it comes (server-sent events).",
                    "parameters": [
                        {"name": name, "in": "query", "required": name in stream["required"], "schema": schema}
                        for name, schema in stream["properties"].items()
                    ],
                    "responses": _answers({"text/event-stream": {"schema": TEXT}}),
                },
                "post": _posts("The same with a body.", stream, TEXT, forms, answer="text/event-stream"),
            },
            "/font.ttf": {
                "get": _gets("The font of the page, for scripts that a machine lacks.", FILE, answer="font/ttf")
            },
            "/metrics": {"get": _gets("Numbers for Prometheus.", TEXT, answer="text/plain")},
            "/spec": {"get": _gets("This description.", {"type": "object"})},
        },
    }


def _posts(
    summary: str, body: Schema, result: Schema, kinds: tuple[str, ...], answer: str = "application/json"
) -> Schema:
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {kind: {"schema": body} for kind in kinds}},
        "responses": _answers({answer: {"schema": result}}),
    }


def _gets(summary: str, result: Schema, answer: str = "application/json") -> Schema:
    return {"summary": summary, "responses": _answers({answer: {"schema": result}})}


def _answers(content: Schema) -> Schema:
    error = {"application/json": {"schema": _object("error", error=TEXT)}}
    errors = {status: {"description": meaning, "content": error} for status, meaning in ERRORS.items()}
    return {"200": {"description": "The answer.", "content": content}, **errors}


def describe_in_html(description: Schema) -> str:
    """The description as a page without scripts."""
    rows = []
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {})
            fields = content and next(iter(content.values()))["schema"]["properties"]
            fields = fields or {each["name"]: {} for each in operation.get("parameters", [])}
            cells = (f"{method.upper()} {path}", operation["summary"], ", ".join(fields))
            rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>flax_transformer: routes</title></head>'
        '<body><h1>Routes</h1><p>In full, for programs: <a href="/spec">/spec</a> (OpenAPI). Parameters may be sent as '
        "JSON, as a form or in the query string.</p><table><tr><th>route</th><th>what it does</th><th>parameters</th>"
        f"</tr>{body}</table></body></html>"
    )

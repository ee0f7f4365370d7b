"""Reads the parameters of a request from JSON, a form or the query string, and checks their types."""

import asyncio
import json
import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from starlette.exceptions import HTTPException
from starlette.formparsers import FormParser, MultiPartParser
from starlette.requests import Request

from flax_transformer.serving.limits import Limits
from flax_transformer.serving.refusals import Refusal

FIELDS = 10_000  # in a form
TRUE_OR_FALSE = {"true": True, "1": True, "false": False, "0": False}


class Parameters:
    """The parameters of a request. Those of a form or a query string are texts, and are read as what they should be."""

    def __init__(self, json_values: Mapping[str, Any], texts: Mapping[str, str | list[str]] = MappingProxyType({})):
        """Takes the values by name: those of JSON, where a number is not a text, and texts for what JSON lacks."""
        self._values, self._typed = {**texts, **json_values}, json_values.keys()

    def texts(self, name: str) -> tuple[list[str], bool]:
        """The texts of a parameter that is one text or a list, and whether it is a list; `Refusal` if it is neither."""
        value = self._values.get(name)
        if value is None:
            raise Refusal(400, f"the parameter {name} is missing: give a text, or a list of texts")
        if isinstance(value, str):
            return [value], False
        if not isinstance(value, list):
            raise Refusal(400, f"{name} is {_shown(value)}: give a text, or a list of texts")
        for number, text in enumerate(value):
            if not isinstance(text, str):
                raise Refusal(400, f"{name}[{number}] is {_shown(text)}: give a text")
        return value, True

    def text(self, name: str, default: str | None = None) -> str:
        """A text; `Refusal` if it is missing without a default, or something else."""
        value = self._values.get(name)
        if value is None:
            if default is None:
                raise Refusal(400, f"the parameter {name} is missing: give it")
            return default
        if not isinstance(value, str):
            raise Refusal(400, f"{name} is {_shown(value)}: give a text")
        return value

    def whole(self, name: str, default: int, least: int, most: int) -> int:
        """A whole number within limits."""
        value = self._values.get(name)
        if value is None or (value == "" and name not in self._typed):
            return default
        number = _as_number(value, int, name in self._typed)
        if number is None or not least <= number <= most:
            raise Refusal(400, f"{name} is {_shown(value)}: give a whole number from {least} to {most}")
        return int(number)

    def number(self, name: str, default: float, above: float, most: float) -> float:
        """A number within limits."""
        value = self._values.get(name)
        if value is None:
            return default
        number = _as_number(value, float, name in self._typed)
        if number is None or not above < number <= most:
            raise Refusal(400, f"{name} is {_shown(value)}: give a number above {above:g}, at most {most:g}")
        return number

    def flag(self, name: str) -> bool:
        """True or false; false if it is missing."""
        value = self._values.get(name, False)
        if isinstance(value, str) and name not in self._typed:
            value = TRUE_OR_FALSE.get(value.lower(), value)
        if not isinstance(value, bool):
            raise Refusal(400, f"{name} is {_shown(value)}: give true or false")
        return value

    def ids(self, name: str, most: int) -> list[int] | None:
        """A list of at most so many token ids; `None` if it is missing."""
        value = self._values.get(name)
        if value is None:
            return None
        whole = isinstance(value, list) and all(type(token) is int and 0 <= token < 2**31 for token in value)
        if not whole or len(value) > most:
            raise Refusal(400, f"{name} is {_shown(value)}: give a list of at most {most} token ids")
        return value

    def section(self, name: str) -> "Parameters | None":
        """An object of JSON within this one; `None` if it is missing."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise Refusal(400, f"{name} is {_shown(value)}: give an object")
        return Parameters(value)


def _as_number(value: Any, kind: type[int] | type[float], typed: bool) -> float | None:
    if isinstance(value, str) and not typed and len(value) < 40:
        try:
            value = kind(value)
        except ValueError:
            return None
    if isinstance(value, float) and value.is_integer() and kind is int:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | kind):
        return None
    return value if -(2.0**53) < value < 2.0**53 and math.isfinite(value) else None


def _shown(value: Any) -> str:
    """A value as an error shows it: short."""
    written = repr(value)
    return written if len(written) <= 60 else f"{written[:60]} …"


async def read_parameters(request: Request, limits: Limits, hold: Callable[[int], None]) -> Parameters:
    """Reads the body of a request, and its query string where the body lacks a parameter.

    Args:
        request: the request.
        limits: the limits.
        hold: is told how many bytes come, as they come; raises `Refusal` if the server has no room for them.

    Raises:
        Refusal: the body is too large (413), came too slowly (408) or is not what its type says (400).
        ClientDisconnect: the client went away meanwhile.
    """
    try:
        async with asyncio.timeout(limits.read_s):
            body = await _read(request, limits.body_bytes, hold)
    except TimeoutError as error:
        message = f"the request was not read within {limits.read_s:g} seconds: send it faster"
        raise Refusal(408, message, reason="slow") from error
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    query = _joined(request.query_params.multi_items())
    if kind == "application/json" or (not kind and body.lstrip()[:1] == b"{"):
        values = _parse_json(body) if body.strip() else {}
        return Parameters(values, query)
    if kind in ("application/x-www-form-urlencoded", "multipart/form-data", ""):
        return Parameters({}, query | await _parse_form(request, kind, body))
    if body:
        raise Refusal(400, f"the content type {kind[:60]!r} is not known: send application/json or a form")
    return Parameters({}, query)


async def _read(request: Request, most: int, hold: Callable[[int], None]) -> bytes:
    told = request.headers.get("content-length", "0")
    size = int(told) if told.isdecimal() and len(told) < 20 else 0
    chunks: list[bytes] = []
    if size <= most:
        size = 0
        async for chunk in request.stream():
            if (size := size + len(chunk)) > most:
                break
            hold(len(chunk))
            chunks.append(chunk)
    if size > most:
        raise Refusal(413, f"the request has more than {most} bytes: divide it", reason="too_large")
    return b"".join(chunks)


def _parse_json(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:100]
        raise Refusal(400, f"the body is not JSON ({reason}): send one object in UTF-8") from error
    if not isinstance(values, dict):
        raise Refusal(400, f"the body is {_shown(values)}: send one object of JSON")
    return values


async def _parse_form(request: Request, kind: str, body: bytes) -> dict[str, str | list[str]]:
    if not body:
        return {}

    if kind != "multipart/form-data":
        # `curl -d` sends UTF-8 as it is, which Starlette would read as Latin-1.
        body = re.sub(rb"[\x80-\xff]+", lambda found: b"%" + found[0].hex("%").encode(), body)

    async def stream() -> Any:
        yield body
        yield b""

    try:
        if kind == "multipart/form-data":
            form = await MultiPartParser(
                request.headers, stream(), max_files=0, max_fields=FIELDS, max_part_size=len(body)
            ).parse()
        else:
            form = await FormParser(request.headers, stream(), max_fields=FIELDS, max_part_size=len(body)).parse()
    except (HTTPException, ValueError, KeyError, AssertionError) as error:
        raise Refusal(400, "the form cannot be read: send application/x-www-form-urlencoded or JSON") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("python_multipart", "multipart", "starlette"):
            raise
        raise Refusal(400, "the form cannot be read: send application/x-www-form-urlencoded or JSON") from error
    return _joined([(name, value) for name, value in form.multi_items() if isinstance(value, str)])


def _joined(items: list[tuple[str, str]]) -> dict[str, str | list[str]]:
    """Values by name; one that occurs several times is a list."""
    if len(items) > FIELDS:
        raise Refusal(400, f"there are {len(items)} parameters: give at most {FIELDS}")
    values: dict[str, Any] = {}
    for name, value in items:
        values.setdefault(name, []).append(value)
    return {name: several if len(several) > 1 else several[0] for name, several in values.items()}

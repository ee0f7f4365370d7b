"""Reads the YAML of downloaded models: mappings, lists and text come out, and nothing in it can run code or grow.

YAML can name a part and repeat it, so that a few lines stand for billions; the parts that could do so are refused.
"""

from typing import Any

import yaml

MAX_BYTES = 2**25  # the longest vocabularies have a tenth of it
MAX_DEPTH = 8


def read_yaml(content: bytes, place: object) -> Any:
    """Reads one document.

    Args:
        content: the text, in UTF-8.
        place: where it stands, for errors.

    Returns:
        Dicts, lists and strings; numbers and other plain values stay strings, as they are written.

    Raises:
        ValueError: the text is too long, is no YAML or nests too deeply, has a key twice, or has anchors, aliases or
            tags.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"{place} has {len(content):,} bytes of YAML, at most {MAX_BYTES:,} are read: do not trust it")
    events = yaml.parse(content.decode("utf-8", "replace"), Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    try:
        return _Builder(place, events).document()
    except (yaml.YAMLError, OverflowError) as error:
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
        raise ValueError(f"{place} is no YAML ({reason}): download the file again") from error


class _Builder:
    def __init__(self, place: object, events: Any):
        self._place, self._events = place, events

    def document(self) -> Any:
        next(self._events)  # the beginning of the stream
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return ""
        value = self._value(next(self._events), MAX_DEPTH)
        next(self._events)  # the end of the document
        if not isinstance(next(self._events), yaml.StreamEndEvent):
            raise ValueError(f"{self._place} has several YAML documents, but one is expected: download the file again")
        return value

    def _value(self, event: Any, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None or event.tag is not None:
            raise ValueError(
                f"{self._place} has an anchor, an alias or a tag in its YAML, which no model needs: do not trust it"
            )
        if isinstance(event, yaml.ScalarEvent):
            return event.value
        if not depth:
            raise ValueError(f"{self._place} nests its YAML more than {MAX_DEPTH} levels deep: do not trust it")
        if isinstance(event, yaml.SequenceStartEvent):
            return list(self._until(yaml.SequenceEndEvent, depth))
        return self._mapping(depth)

    def _mapping(self, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        parts = self._until(yaml.MappingEndEvent, depth)
        for key in parts:
            if not isinstance(key, str) or key in values:
                raise ValueError(
                    f"{self._place} has the key {repr(key)[:60]} twice, or a list as a key: download it again"
                )
            values[key] = next(parts)
        return values

    def _until(self, end: type, depth: int) -> Any:
        while not isinstance(event := next(self._events), end):
            yield self._value(event, depth - 1)

"""Reads HTML or XML as a flat list of tokens that is always balanced: tags, text, and what is neither.

A text that is well-formed XML, as most snippets of content systems, strings files and XLIFF are, is read with expat,
which tells where each tag stands; so all of it that is not translated comes back byte for byte. Everything else is read
as browsers read HTML, with lxml: tags that lack are added, and tags that close nothing are left out.
"""

import functools
import html
import itertools
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple
from xml.parsers import expat

Kind = Literal["start", "end", "text", "other"]

# How characters of a text are written in markup.
_ESCAPES = {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;", 0xA0: "&#160;"}
# HTML's elements that have no end tag.
_VOID = frozenset("area base basefont br col embed frame hr img input link meta param source track wbr".split())
# Elements whose contents no one needs to look into: they are one token.
_OPAQUE = frozenset(
    "audio canvas code iframe kbd math noembed noframes object plaintext pre samp script style svg template textarea "
    "var video xmp".split()
)
_WHOLE = re.compile(rb"\s*(?:<!--(?>.*?-->)\s*)*+<(?:!doctype|\?xml|html|head|body)[\s>?]", re.IGNORECASE | re.DOTALL)
_PROLOG = re.compile(rb"\s*(?:<!--(?>.*?-->)\s*)*+<(?:!doctype|\?xml)[\s>?]", re.IGNORECASE | re.DOTALL)
_WRAPPER = b"<text>"


class Token(NamedTuple):
    """A piece of markup or text.

    Attributes:
        kind: "start" or "end" of an element, "text", or "other": a comment, a void element, or an opaque element.
        raw: what to write.
        name: the name of the element in lower case; empty for comments, instructions and text.
        text: what the text reads, with entities decoded; of an opaque element, its text.
        translate: whether a start tag switches translation on or off; `None` if it says nothing.
    """

    kind: Kind
    raw: str
    name: str = ""
    text: str = ""
    translate: bool | None = None


def read_tokens(text: str) -> list[Token]:
    """The tokens of a text: every start has its end, and ends come in the order that nesting wants.

    Raises:
        ValueError: lxml is needed and not installed, HTML is nested more than 2,000 deep, or the document type has
            declarations of its own, such as entities.
    """
    data = text.encode(errors="replace")
    try:
        return list(_join_opaque(_read_xml(data)))
    except expat.ExpatError:
        return list(_read_html(data))


def escape(text: str) -> str:
    """The text as HTML and XML write it."""
    return text.translate(_ESCAPES)


def _read_xml(data: bytes) -> list[Token]:
    """The tokens of well-formed XML, or of several elements and text; raises ExpatError for anything else."""
    wrap = not _PROLOG.match(data)
    shift = len(_WRAPPER) if wrap else 0
    events: list[tuple[int, Kind, str, str, bool | None]] = []
    parser = expat.ParserCreate("utf-8")
    parser.UseForeignDTD(True)  # names of HTML's entities, such as &nbsp;, are then no errors
    parser.ExternalEntityRefHandler = lambda *_: 1  # nothing is ever fetched

    def event(kind: Kind, name: str = "", text: str = "", translate: bool | None = None) -> None:
        events.append((parser.CurrentByteIndex - shift, kind, name.lower(), text, translate))

    def entity(name: str, is_parameter: int) -> None:
        written, decoded = f"&{name};", html.unescape(f"&{name};")
        event("other" if decoded == written else "text", text=decoded)

    def doctype(name: str, system: Any, public: Any, has_internal_subset: int) -> None:
        if has_internal_subset:  # its entities may grow without limit
            raise ValueError(
                "the markup has declarations in square brackets in its document type, such as <!ENTITY>: remove them, "
                "and write in full what they stand for"
            )
        event("other")

    parser.StartElementHandler = lambda name, attributes: event("start", name, translate=_switch(attributes))
    parser.EndElementHandler = lambda name: event("end", name)
    parser.CharacterDataHandler = lambda text: event("text", text=text)
    parser.SkippedEntityHandler = entity
    parser.StartDoctypeDeclHandler = doctype
    for handler in ("CommentHandler", "ProcessingInstructionHandler", "XmlDeclHandler"):
        setattr(parser, handler, lambda *_: event("other"))
    cdata = [False]  # a CDATA section is one token

    def start_cdata() -> None:
        event("other")
        cdata[0] = True
        parser.CharacterDataHandler = None

    def end_cdata() -> None:
        parser.CharacterDataHandler = lambda text: event("text", text=text)

    parser.StartCdataSectionHandler, parser.EndCdataSectionHandler = start_cdata, end_cdata
    parser.Parse(_WRAPPER + data + b"</" + _WRAPPER[1:] if wrap else data, True)
    if wrap:
        events = events[1:-1]
    cuts = [*(position for position, *_ in events), len(data)]
    raws = [data[start:stop].decode() for start, stop in itertools.pairwise(cuts)]
    first = data[: cuts[0]].decode()
    tokens = [Token("other", first)] if first else []
    return tokens + [
        Token(kind, raw, name, text, translate)
        for raw, (_, kind, name, text, translate) in zip(raws, events, strict=True)
    ]


def _join_opaque(tokens: list[Token]) -> Iterator[Token]:
    """The tokens with one in place of each opaque or empty element."""
    number = 0
    while number < len(tokens):
        token = tokens[number]
        stop = number
        if token.kind == "start":
            if token.name in _OPAQUE:
                stop = _end_of(tokens, number)
            elif tokens[number + 1].kind == "end" and (not tokens[number + 1].raw or token.name in _VOID):
                stop = number + 1
        if stop == number:
            yield token
        else:
            inside = tokens[number : stop + 1]
            raw, text = ("".join(getattr(each, field) for each in inside) for field in ("raw", "text"))
            yield token._replace(kind="other", raw=raw, text=text)
        number = stop + 1


def _end_of(tokens: list[Token], start: int) -> int:
    depth = 0
    for number in range(start, len(tokens)):
        depth += {"start": 1, "end": -1}.get(tokens[number].kind, 0)
        if depth == 0:
            return number
    raise AssertionError("an element without an end")


def _read_html(data: bytes) -> Iterator[Token]:
    """The tokens of HTML as lxml reads it."""
    etree = _etree()
    whole = _WHOLE.match(data)
    parser = etree.HTMLParser(encoding="utf-8", huge_tree=True, default_doctype=False)
    root = etree.fromstring(data if whole else b"<html><body>" + data, parser)
    if any("depth" in entry.message for entry in parser.error_log):
        raise ValueError("the markup has elements that are nested more than 2,000 deep: close them, or divide the text")
    if root is None:
        yield Token("other", escape(data.decode()))
        return
    tree = root.getroottree()
    if whole and tree.docinfo.doctype:
        yield Token("other", f"{tree.docinfo.doctype}\n")
    written = {
        name
        for name in ("html", "head", "body")
        if whole and re.search(rb"<%s[\s/>]" % name.encode(), data, re.IGNORECASE)
    }
    for before in reversed(list(root.itersiblings(preceding=True))):
        yield Token("other", _markup(before, data))
    for token in _walk(root, data):
        if token.name not in ("html", "head", "body") or token.name in written:
            yield token
    for after in root.itersiblings():
        yield Token("other", _markup(after, data))


def _walk(root: Any, data: bytes) -> Iterator[Token]:
    """The tokens of an element and its contents; without recursion, since elements may be nested thousands deep."""
    etree = _etree()
    skipped = None
    for event, element in etree.iterwalk(root, events=("start", "end", "comment", "pi")):
        if skipped is not None:
            if element is skipped and event == "end":
                skipped = None
                yield from _text(element.tail)
            continue
        if event in ("comment", "pi"):
            yield Token("other", _markup(element, data))
            yield from _text(element.tail)
            continue
        name = element.tag.lower()
        is_void = name in _VOID and not len(element) and not element.text
        if event == "start":
            if name in _OPAQUE:
                raw = etree.tostring(element, encoding="unicode", method="html", with_tail=False)
                yield Token("other", raw, name, "".join(element.itertext(etree.Element)), _switch(element.attrib))
                skipped = element
            elif is_void:
                yield Token("other", _start_tag(element), name)
            else:
                yield Token("start", _start_tag(element), name, translate=_switch(element.attrib))
                yield from _text(element.text)
        else:
            if not is_void:
                yield Token("end", f"</{element.tag}>", name)
            if element is not root:
                yield from _text(element.tail)


def _text(text: str | None) -> Iterator[Token]:
    if text:
        yield Token("text", escape(text), text=text)


def _start_tag(element: Any) -> str:
    attributes = "".join(f' {name}="{html.escape(value)}"' for name, value in element.attrib.items())
    return f"<{element.tag}{attributes}>"


def _markup(comment: Any, data: bytes) -> str:
    """A comment; and as they were written, instructions and CDATA sections, which HTML takes for comments."""
    text = comment.text or ""
    for form in (f"<{text}>" if text.startswith("?") else "", f"<!{text}>" if text.startswith("[CDATA[") else ""):
        if form and form.encode(errors="replace") in data:
            return form
    return f"<!--{text}-->"


def _switch(attributes: Any) -> bool | None:
    """Whether the attributes of an element switch the translation of its contents on or off."""
    if "notranslate" in attributes.get("class", "").split():
        return False
    value = attributes.get("translate", attributes.get("translatable", "")).strip().lower()
    return {"no": False, "false": False, "yes": True, "true": True}.get(value)


@functools.cache
def _etree() -> Any:
    try:
        from lxml import etree
    except ImportError as error:
        message = "HTML is read with lxml, which is not installed: pip install 'flax_transformer[markup]'"
        raise ValueError(message) from error
    return etree

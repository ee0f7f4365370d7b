"""Spells text the way a vocabulary knows it, so that text that looks the same is translated the same.

Keyboards, web pages and PDF files write one visible text in many ways: composed or decomposed accents (Unicode Standard
Annex 15), a tab or a no-break space for a space, a byte order mark or a soft hyphen that nobody sees. To a vocabulary
that was trained on one of these spellings the others are unknown characters. `Spelling` chooses among them by asking
the vocabulary what it knows; the functions here need no vocabulary.
"""

import collections
import unicodedata
from collections.abc import Callable, Iterable

import regex

# Everything that may end a line: for Python's `str.splitlines`, in editors, and in Unicode Standard Annex 14.
LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
_LINE_END = regex.compile(rf"\r\n|[{LINE_ENDS}]")
# Characters that have neither a shape nor a width: joiners, marks of direction, soft hyphens, byte order marks,
# variation selectors (the Unicode property Default_Ignorable_Code_Point), control characters, anchors of annotations.
_INVISIBLE = regex.compile(r"[\p{Default_Ignorable_Code_Point}\p{Cc}\ufff9-\ufffb]")
# Those among them that change the shape of what is seen: joiners, variation selectors, and the tags of flags.
_SHAPING = regex.compile(r"[\u200c\u200d\p{Variation_Selector}\U000e0020-\U000e007f]")
# To put marks into their canonical order takes Python quadratic time; no text of a language has as many on a character.
_MANY_MARKS = regex.compile(r"(\p{M}{30})\p{M}+")
_BLANK_BRAILLE = "\u2800"
_BYTE_ORDER_MARK = "\ufeff"


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: it is empty, or consists of white space and invisible characters."""
    return all(_is_space(character) or _INVISIBLE.match(character) for character in text)


def in_one_line(text: str) -> str:
    """The text with a space in place of each line end, so that a file can hold one text a line."""
    return _LINE_END.sub(" ", text)


def in_one_cell(text: str) -> str:
    """The text with a space in place of each line end and tab, so that a table can hold it."""
    return in_one_line(text).replace("\t", " ")


def composed(text: str) -> str:
    """The text in composed form (NFC). Of more than 30 marks on one character, which cannot be read, 30 are left.

    Unicode Standard Annex 15 has this limit in its Stream-Safe Text Format.
    """
    return unicodedata.normalize("NFC", _MANY_MARKS.sub(r"\1", text))


def comparable(text: str) -> str:
    """The text as translations and references are compared: composed (NFC), in one line, with single spaces inside."""
    return " ".join(filter(None, composed(in_one_line(text)).split(" ")))


def training_text(text: str, *, compose: bool = True) -> str:
    """The text as a vocabulary is trained on it: composed (NFC) unless `compose` is false, tabs and line ends as
    spaces, and no byte order marks.

    A lone surrogate, which is not a character, becomes a question mark.

    White space of other kinds, such as no-break spaces, and other invisible characters, such as the joiners of Kannada
    and Persian, stay: translations should be able to write them.
    """
    text = composed(text) if compose else text
    return quotable(in_one_cell(text).replace(_BYTE_ORDER_MARK, ""))


def quotable(text: str) -> str:
    """The text for a message that any stream can write: a lone surrogate, which is not a character, becomes "?"."""
    return text.encode(errors="replace").decode()


class Spelling:
    """Spells text with the characters that a vocabulary knows. Safe to share between threads."""

    def __init__(
        self,
        knows: Callable[[str], bool],
        pieces: Iterable[str],
        *,
        spells_bytes: bool = False,
        compose: bool = True,
    ):
        """Remembers the vocabulary.

        Args:
            knows: returns whether the vocabulary has a piece for a character.
            pieces: the pieces of the vocabulary.
            spells_bytes: whether it spells a character that has no piece in bytes. Then joiners and other invisible
                characters that change the shape of their neighbours stay even without a piece.
            compose: whether text is composed (NFC).
        """
        self._knows, self._spells_bytes, self._compose = knows, spells_bytes, compose
        # The number of pieces in which each character occurs.
        uses = collections.Counter(character for piece in pieces for character in set(piece))
        # A vocabulary that was trained on uncomposed text may have characters that composing replaces, such as U+0958
        # or the ohm sign. They are kept, unless the vocabulary has the replacement in at least as many pieces: the
        # letter K stays K even if the training text had a few Kelvin signs.
        self._restored = {
            replaced: character
            for character in sorted(uses if compose else ())
            if (replaced := unicodedata.normalize("NFC", character)) != character
            and any(uses[part] < uses[character] for part in replaced)
        }
        # Caches: what each character becomes, and which characters the vocabulary can write.
        self._replacements: dict[int, str] = {}
        self._known: set[str] = set()

    def spell(self, text: str) -> str:
        """The text in the vocabulary's own spelling.

        Canonically equivalent texts become the same text, unless texts are not composed or have more than 30 marks on
        one character. White space around the text is removed. Other white space becomes a space if it has no piece, and
        invisible characters without a piece are removed; those with a piece stay, such as the joiners that some
        languages need.
        """
        text = (composed(text) if self._compose else text).strip()
        for replaced, character in self._restored.items():
            text = text.replace(replaced, character)
        others = set(text) - self._known
        if not others:
            return text
        for character in others:
            if ord(character) not in self._replacements:
                known = self._knows(character)
                self._replacements[ord(character)] = character if known else self._replace(character)
                if known:
                    self._known.add(character)
        return text.translate(self._replacements)

    def unknown(self, text: str) -> str:
        """The visible characters of the text that have no piece, in their order, each as often as it occurs."""
        return "".join(
            character
            for character in self.spell(text)
            if not (character in self._known or is_blank(character) or self._knows(character))
        )

    def _replace(self, character: str) -> str:
        """What a character becomes that has no piece."""
        if _is_space(character):
            return " "
        if _INVISIBLE.match(character):
            return character if self._spells_bytes and _SHAPING.match(character) else ""
        # A vocabulary that was trained on decomposed text has pieces for the parts: for all, or for the last marks.
        parts = unicodedata.normalize("NFD", character)
        for apart in range(1, len(parts)):
            spelled = unicodedata.normalize("NFC", parts[:-apart]) + parts[-apart:]
            if all(map(self._knows, spelled)):
                return spelled
        return character


def _is_space(character: str) -> bool:
    return character.isspace() or character == _BLANK_BRAILLE

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

# All that ends a line for some reader: Python's `str.splitlines`, editors, and Unicode Standard Annex 14.
_LINE_END = regex.compile(r"\r\n|[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
# Characters that have neither a shape nor a width: joiners, marks of direction, soft hyphens, byte order marks,
# variation selectors (the Unicode property Default_Ignorable_Code_Point), control characters, anchors of annotations.
_INVISIBLE = regex.compile(r"[\p{Default_Ignorable_Code_Point}\p{Cc}\ufff9-\ufffb]")
_BLANK_BRAILLE = "\u2800"
_BYTE_ORDER_MARK = "\ufeff"


def is_blank(text: str) -> bool:
    """Whether a reader sees nothing: the text is empty, or all white space and invisible characters."""
    return all(_is_space(character) or _INVISIBLE.match(character) for character in text)


def in_one_line(text: str) -> str:
    """The text with a space in place of each line end, so that a file can hold one text a line."""
    return _LINE_END.sub(" ", text)


def in_one_cell(text: str) -> str:
    """The text with a space in place of each line end and tab, so that a table can hold it."""
    return in_one_line(text).replace("\t", " ")


def comparable(text: str) -> str:
    """The text as translations and references are compared: composed (NFC), in one line."""
    return unicodedata.normalize("NFC", in_one_line(text))


def training_text(text: str) -> str:
    """The text as a vocabulary is trained on it: `comparable`, tabs as spaces, and no byte order marks.

    Half a surrogate pair, which is no character, becomes a question mark.

    White space of other kinds, such as no-break spaces, and other invisible characters, such as the joiners of Kannada
    and Persian, stay: translations should be able to write them.
    """
    return in_one_cell(comparable(text)).replace(_BYTE_ORDER_MARK, "").encode(errors="replace").decode()


class Spelling:
    """Spells text with the characters that a vocabulary knows. Safe to share between threads."""

    def __init__(self, knows: Callable[[str], bool], pieces: Iterable[str]):
        """Remembers the vocabulary.

        Args:
            knows: whether the vocabulary has a piece for a character.
            pieces: those that it has.
        """
        self._knows = knows
        # In how many pieces each character stands.
        uses = collections.Counter(character for piece in pieces for character in set(piece))
        # A vocabulary that was trained on text that was not composed may know characters which composing replaces, such
        # as U+0958 or the ohm sign. It keeps reading them, unless it knows the replacement as well: the letter K stays
        # one, also where the text held a few Kelvin signs.
        self._restored = {
            composed: character
            for character in sorted(uses)
            if (composed := unicodedata.normalize("NFC", character)) != character
            and any(uses[part] < uses[character] for part in composed)
        }
        # What each character met so far becomes, and those that the vocabulary can write.
        self._replacements: dict[int, str] = {}
        self._known: set[str] = set()

    def spell(self, text: str) -> str:
        """The text in the vocabulary's own spelling.

        Canonically equivalent texts become one. White space around the text goes. White space that the vocabulary has
        no piece for becomes a space, and invisible characters that it has no piece for are left out; those that it
        knows, the joiners that a language spells with for example, stay.
        """
        text = unicodedata.normalize("NFC", text).strip()
        for composed, character in self._restored.items():
            text = text.replace(composed, character)
        others = set(text) - self._known
        if not others:
            return text
        for character in others:
            if ord(character) not in self._replacements:
                replacement = self._replacements[ord(character)] = self._replace(character)
                if replacement == character and self._knows(character):
                    self._known.add(character)
        return text.translate(self._replacements)

    def unknown(self, text: str) -> str:
        """The characters of the text that the vocabulary cannot write, in their order, each as often as it occurs."""
        return "".join(
            character
            for character in self.spell(text)
            if not (character in self._known or _is_space(character) or self._knows(character))
        )

    def _replace(self, character: str) -> str:
        if self._knows(character):
            return character
        if _is_space(character):
            return " "
        if _INVISIBLE.match(character):
            return ""
        # Trained on decomposed text, a vocabulary knows the parts: all of them apart, or the last marks alone.
        parts = unicodedata.normalize("NFD", character)
        for apart in range(1, len(parts)):
            spelled = unicodedata.normalize("NFC", parts[:-apart]) + parts[-apart:]
            if all(map(self._knows, spelled)):
                return spelled
        return character


def _is_space(character: str) -> bool:
    return character.isspace() or character == _BLANK_BRAILLE

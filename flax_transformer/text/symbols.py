"""Texts that a vocabulary may keep as one piece: tags, tokens of languages, and symbols of the user's own."""

import re

# SentencePiece's own pieces.
SPECIAL_SYMBOLS = ("<pad>", "<s>", "</s>", "<unk>")
# The tokens of languages in vocabularies of Marian and trained here, of NLLB and of M2M100.
MARIAN_LANGUAGE = re.compile(r">>[^<>\s]+<<")
NLLB_LANGUAGE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
M2M100_LANGUAGE = re.compile(r"__[a-z]{2,3}__")
# The piece of a byte, such as <0x41>.
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# SentencePiece represents a space by this character, so it reads this character as a space.
SPACE = "▁"
# SentencePiece uses this character internally and drops every sentence that contains it.
RESERVED = "▅"


def is_language(piece: str) -> bool:
    """Whether a piece has the form of a token of a language."""
    return any(form.fullmatch(piece) for form in (MARIAN_LANGUAGE, NLLB_LANGUAGE, M2M100_LANGUAGE))


def without_language(text: str) -> str:
    """A text without the token of a language with which it begins, if it does."""
    first, _, rest = text.partition(" ")
    return rest if is_language(first) else text


def is_free_symbol(text: str) -> bool:
    """Whether a text has no white space or byte order mark and means nothing else to SentencePiece."""
    return bool(
        re.fullmatch(r"[^\s\ufeff]+", text)
        and text not in SPECIAL_SYMBOLS
        and not BYTE.fullmatch(text)
        and not any(character in text for character in (SPACE, RESERVED))
    )

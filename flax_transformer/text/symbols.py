"""Texts that a vocabulary may keep as one piece: tags, and symbols of the user's own."""

import re

# SentencePiece's own pieces.
SPECIAL_SYMBOLS = ("<pad>", "<s>", "</s>", "<unk>")
# The piece of a byte, such as <0x41>.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# SentencePiece writes ▁ for a space, and uses ▅ internally.
_RESERVED = ("▁", "▅")


def is_free_symbol(text: str) -> bool:
    """Whether a text has no white space and means nothing else to SentencePiece."""
    return bool(
        re.fullmatch(r"\S+", text)
        and text not in SPECIAL_SYMBOLS
        and not _BYTE.fullmatch(text)
        and not any(character in text for character in _RESERVED)
    )

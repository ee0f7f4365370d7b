"""Finds what a translation should copy from its source where the model could only write its unknown piece."""

from collections.abc import Sequence

import numpy as np
import regex
from jaxtyping import Bool, Float

from flax_transformer.text.alignment import Span
from flax_transformer.text.symbols import SPACE

# Scripts that put no spaces between words: there each piece counts as a word.
_WITHOUT_SPACES = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")
_USED = 0.1  # what is left of the weight of an unknown piece that was copied: the next copy is probably of another


def words_to_copy(
    source: str,
    pieces: Sequence[str],
    places: Sequence[Span],
    is_unknown: Bool[np.ndarray, "S"],
    weights: Float[np.ndarray, "N S"],
) -> list[str]:
    """For each unknown piece of a translation, the words or characters of the source to write in its place.

    These are the unknown characters of the source at which the model looked most; if it knows all characters, the word.

    Args:
        source: the source as text.
        pieces: the S pieces of it that the model looked at.
        places: their spans in the source.
        is_unknown: which of them are unknown.
        weights: for each of the N unknown pieces of the translation, how much it attends to each source piece.
    """
    has_text = np.array([start < stop for start, stop in places], bool)
    wanted = is_unknown & has_text
    candidates = wanted if wanted.any() else has_text
    if not candidates.any():
        return [""] * len(weights)

    def begins_word(number: int) -> bool:
        start = places[number][0]  # a word begins with a character of these scripts, and behind one
        return pieces[number].startswith(SPACE) or bool(_WITHOUT_SPACES.search(source, max(0, start - 1), start + 1))

    left = np.ones(len(pieces))
    copies = []
    for row in weights:
        chosen = int(np.argmax(np.where(candidates, row * left, -1.0)))
        left[chosen] *= _USED
        first = last = chosen
        if not wanted.any():
            while first > 0 and not begins_word(first) and has_text[first - 1]:
                first -= 1
            while last + 1 < len(pieces) and not begins_word(last + 1) and has_text[last + 1]:
                last += 1
        copies.append(source[places[first][0] : places[last][1]].strip())
    return copies

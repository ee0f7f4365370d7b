"""Rules by which a sentence pair is left out of a corpus: each is a function that says whether a pair breaks it.

A rule looks at one pair alone. What needs the other pairs, or other files, is in `data/seen.py`. No rule changes text,
so a corpus in which no pair breaks a rule stays as it is, and a corpus that was cleaned is clean.
"""

import dataclasses
import functools
import hashlib
import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
import regex
from babel.core import get_global
from jaxtyping import UInt64

from flax_transformer.ranges import AT_LEAST_ONE, Range, check, setting
from flax_transformer.text.spelling import composed, is_blank

# Added to lengths before they are compared, so that short labels may differ in length more than sentences.
RATIO_SLACK = 10
# Numbers up to this one are often written in words on one of the sides.
SPELLED_OUT = 12
# A single letter or vowel sign may be repeated more often than a longer unit, as in "Nooooo!".
LONGEST_RUN = 9
# The longest unit whose repetitions are looked for: in words, and in characters of a script without spaces.
MOST_WORDS, LONGEST_UNIT = 6, 20

_INVALID = regex.compile(r"[\p{Cs}\ufffd\p{Noncharacter_Code_Point}]|(?!\t)\p{Cc}|\A\ufeff")
_LETTER = regex.compile(r"[\p{L}\p{M}]")
# Letters and marks that belong to certain scripts; many marks, such as accents and vowel signs of Arabic, do not.
_OF_A_SCRIPT = regex.compile(r"[[\p{L}\p{M}]--[\p{Script=Zyyy}\p{Script=Zinh}]]", regex.VERSION1)
_RUN = regex.compile(rf"([\p{{L}}\p{{M}}])\1{{{LONGEST_RUN},}}")
# Tags such as <b>, </p> and <a href="x">, and entities such as &nbsp; and &#39;.
_MARKUP = re.compile(
    r"</?[A-Za-z][\w:-]*(?:\s[^<>]*)?/?>|&(?:[A-Za-z][A-Za-z0-9]{1,30}|#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6});"
)
_BETWEEN_WORDS = regex.compile(r"[^\p{L}\p{M}\p{N}]+")
_NUMBER = regex.compile(r"\p{Nd}+(?:[.,'’٫٬\u00a0\u202f]\p{Nd}+)*")
# What a script that several languages are named by consists of, by the names of ISO 15924.
_PARTS = {
    "Jpan": ("Hani", "Hira", "Kana"),
    "Kore": ("Hang", "Hani"),
    "Hans": ("Hani",),
    "Hant": ("Hani",),
    "Hanb": ("Hani", "Bopo"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleaningRules:
    """The limits of the rules.

    Attributes:
        max_characters: the length of a side.
        max_ratio: how many times as long as the other a side may be; both are counted with ten characters more.
        min_letters: the share of letters and their marks among the visible characters of a side.
        min_script: the share of a side's letters that must be in the script of its language.
        max_repeats: how often the same words, or the same parts of a word, may follow one another.
        source_language: the code of the source's language, e.g. "kn" or "kan_Knda"; empty if any script is right.
        target_language: that of the target's.
        without: names of rules that are not applied.
    """

    max_characters: int = setting(1000, AT_LEAST_ONE)
    max_ratio: float = setting(3.0, Range(at_least=1))
    min_letters: float = setting(0.4, Range(at_least=0, at_most=1))
    min_script: float = setting(0.5, Range(at_least=0, at_most=1))
    max_repeats: int = setting(4, AT_LEAST_ONE)
    source_language: str = ""
    target_language: str = ""
    without: Sequence[str] = ()

    def __post_init__(self):
        """Checks each field; raises ValueError naming the field, what it holds and what it may hold."""
        check(self)
        for language in filter(None, (self.source_language, self.target_language)):
            scripts_of(language)


def is_invalid(source: str, target: str, rules: CleaningRules) -> bool:
    """Whether a side has bytes that were not UTF-8, replacement, control or non-characters, or a byte order mark first.

    If files were concatenated, the mark of the second one is inside; reading removes only one at the beginning.
    """
    return any(map(_INVALID.search, (source, target)))


def is_empty(source: str, target: str, rules: CleaningRules) -> bool:
    """Whether a side shows nothing."""
    return is_blank(source) or is_blank(target)


def has_markup(source: str, target: str, rules: CleaningRules) -> bool:
    """Whether a side has tags or entities of HTML, or of XML."""
    return any(map(_MARKUP.search, (source, target)))


def is_too_long(source: str, target: str, rules: CleaningRules) -> bool:
    """Whether a side has more than `max_characters` characters."""
    return max(len(source), len(target)) > rules.max_characters


def is_uneven(source: str, target: str, rules: CleaningRules) -> bool:
    """Whether one side is more than `max_ratio` times as long as the other."""
    short, long = sorted((len(source) + RATIO_SLACK, len(target) + RATIO_SLACK))
    return long > rules.max_ratio * short


def has_few_letters(source: str, target: str, rules: CleaningRules) -> bool:
    """Whether less than `min_letters` of the visible characters of a side are letters or their marks."""
    return any(_share_of_letters(side) < rules.min_letters for side in (source, target))


def is_in_another_script(source: str, target: str, rules: CleaningRules) -> bool:
    """Whether less than `min_script` of the letters of a side are in the script of its language."""
    return any(
        bool(language) and _share_in_script(side, language) < rules.min_script
        for side, language in ((source, rules.source_language), (target, rules.target_language))
    )


def is_equal(source: str, target: str, rules: CleaningRules) -> bool:
    """Whether both sides are the same text, apart from case, white space and composition."""
    return comparable_side(source).casefold() == comparable_side(target).casefold()


def repeats_itself(source: str, target: str, rules: CleaningRules) -> bool:
    """Whether letters on a side follow one another more than `max_repeats` times, as in translations that go astray."""
    return any(_repeats(side, rules.max_repeats) for side in (source, target))


def has_other_numbers(source: str, target: str, rules: CleaningRules) -> bool:
    """Whether the numbers in digits differ, whatever the digits' script and the marks between them.

    A side may lack numbers up to twelve, which are often written in words, if the other lacks none.
    """
    ours, theirs = _numbers(source), _numbers(target)
    lacking = (theirs - ours, ours - theirs)
    return all(lacking) or any(len(number) > 2 or int(number) > SPELLED_OUT for number in lacking[0] | lacking[1])


Rule = Callable[[str, str, CleaningRules], bool]
# In the order in which they are asked; a pair counts for the first that it breaks.
RULES: dict[str, Rule] = {
    "unicode": is_invalid,
    "empty": is_empty,
    "markup": has_markup,
    "long": is_too_long,
    "ratio": is_uneven,
    "letters": has_few_letters,
    "script": is_in_another_script,
    "equal": is_equal,
    "repeats": repeats_itself,
    "numbers": has_other_numbers,
}


def first_broken(source: str, target: str, rules: CleaningRules) -> str:
    """The name of the first rule that a pair breaks; empty if it breaks none."""
    for name, breaks in RULES.items():
        if name not in rules.without and breaks(source, target, rules):
            return name
    return ""


def examine(
    pairs: Sequence[tuple[str, str]], rules: CleaningRules
) -> tuple[list[str], UInt64[np.ndarray, "pairs"], UInt64[np.ndarray, "pairs"]]:
    """The rule that each pair breaks, as in `first_broken`, and numbers that stand for its source and its target."""
    broken = [first_broken(source, target, rules) for source, target in pairs]
    return broken, keys_of([source for source, _ in pairs]), keys_of([target for _, target in pairs])


def keys_of(texts: Sequence[str]) -> UInt64[np.ndarray, "texts"]:
    """Numbers of 64 bits that are equal for equal texts, apart from white space, composition and byte order marks."""
    digests = (
        hashlib.blake2b(comparable_side(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for text in texts
    )
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def comparable_side(text: str) -> str:
    """The text in composed form, with single spaces between words, and without byte order marks."""
    return " ".join(composed(text).replace("\ufeff", "").split())


@functools.cache
def scripts_of(language: str) -> tuple[str, ...]:
    """The scripts in which a language is written, by their names in ISO 15924.

    Args:
        language: a code such as "kn" or "kan", with the region where it decides the script: "pa_PK", or with the script
            after it if it is not the usual one: "sr_Latn".

    Raises:
        ValueError: the code is not known.
    """
    words = language.replace("-", "_").split("_")
    script = next((word.title() for word in words[1:] if len(word) == 4 and word.isalpha()), "")
    if not script:
        aliases, likely = get_global("language_aliases"), get_global("likely_subtags")
        code = words[0].lower()
        codes = [each for each in (aliases.get(code, code), code) if each]
        regions = [f"{each}_{word.upper()}" for each in codes for word in words[1:]]
        found = next(filter(None, map(likely.get, [*regions, *codes])), "")
        script = next((word for word in found.split("_")[1:] if len(word) == 4), "")
    scripts = _PARTS.get(script, (script,))
    try:
        for name in scripts:
            regex.compile(rf"\p{{Script={name}}}")
    except regex.error:
        scripts = ()
    if not script or not scripts:
        raise ValueError(f"the script of the language {language!r} is not known: name it, as in kan_Knda or sr_Latn")
    return scripts


@functools.cache
def _letters_of(language: str) -> regex.Pattern[str]:
    scripts = "".join(rf"\p{{Script={name}}}" for name in scripts_of(language))
    return regex.compile(rf"[[{scripts}]&&[\p{{L}}\p{{M}}]]", regex.VERSION1)


def _share_of_letters(text: str) -> float:
    visible = sum(not character.isspace() for character in text)
    return len(_LETTER.findall(text)) / visible if visible else 0.0


def _share_in_script(text: str, language: str) -> float:
    letters = len(_OF_A_SCRIPT.findall(text))
    return len(_letters_of(language).findall(text)) / letters if letters else 1.0


def _repeats(text: str, most: int) -> bool:
    if _RUN.search(text):
        return True
    words = _BETWEEN_WORDS.sub(" ", text).casefold().split()
    for size in range(1, min(MOST_WORDS, len(words) // (most + 1)) + 1):
        same = 0
        for place, (word, later) in enumerate(zip(words, words[size:], strict=False)):
            same = same + 1 if word == later else 0
            if same == size * most and any(map(_LETTER.search, words[place - size + 1 : place + 1])):
                return True
    # Scripts without spaces between words repeat within what looks like one.
    return any(_repeated_part(word, most) for word in words if len(word) > 2 * most)


def _repeated_part(word: str, most: int) -> bool:
    # A part that is one letter is looked for above, as "aa" is the letter a twice.
    return any(_LETTER.search(found[1]) and len(set(found[1])) > 1 for found in _unit(most).finditer(word))


@functools.cache
def _unit(repeats: int) -> re.Pattern[str]:
    return re.compile(rf"(.{{2,{LONGEST_UNIT}}}?)\1{{{repeats},}}")


def _numbers(text: str) -> set[str]:
    """The numbers that a text has in digits, without marks between the digits and without zeros in front."""
    found = _NUMBER.findall(text)
    digits = ("".join(str(unicodedata.decimal(each)) for each in number if each.isdecimal()) for number in found)
    return {number.lstrip("0") or "0" for number in digits}

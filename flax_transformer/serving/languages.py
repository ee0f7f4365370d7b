"""Names languages, and tells in which of the served languages a text is."""

import re
from collections.abc import Iterable
from typing import Any

import babel

from flax_transformer.data.corpus import corpus_languages
from flax_transformer.text.languages import short

ENOUGH = 2000  # characters tell the language of a text
_ENGLISH = babel.Locale("en")
# After a hyphen a region or script begins with a capital letter: "en-pt-br" might be two pairs.
_CODE = r"([a-z]{2,3}(?:_[A-Za-z]{2,8}|-[A-Z][A-Za-z]{1,7})?)"
NAME = re.compile(f"{_CODE}-{_CODE}")


def language_name(code: str) -> str:
    """The English name of a language, e.g. "Kannada" for "kn" and for "kan_Knda"; the code if it has no name here."""
    try:
        locale = babel.Locale.parse(code.replace("-", "_"))
    except (ValueError, babel.UnknownLocaleError):
        return code
    named = _ENGLISH.languages.get(locale.language) if code.isalpha() else locale.get_display_name("en")
    return named or code


def languages_of(config: dict[str, Any]) -> tuple[str, str] | None:
    """The source and the target language that a work directory's config tells; `None` if it does not.

    It tells them by `data.source_language` and `data.target_language`, by the built-in corpus, or by the names of the
    two files of its training corpus, as in "files:letters.kn,letters.en". All parts of the corpus that tell languages
    must tell the same.
    """
    data = config.get("data") or {}
    source, target = data.get("source_language") or "", data.get("target_language") or ""
    if source and target:
        return source, target
    told = {pair for pair in corpus_languages(data.get("train") or "") if {*pair} <= _ENGLISH.languages.keys()}
    return told.pop() if len(told) == 1 else None


def as_pair(text: str) -> tuple[str, str]:
    """The source and the target language of a model's name such as "kn-en", "en-pt-BR" or "kan_Knda-eng_Latn".

    Raises:
        ValueError: the name does not have this form.
    """
    found = NAME.fullmatch(text)
    if not found:
        raise ValueError(
            f'{text!r} does not name two languages: write their codes as in "kn-en", "en-pt-BR" or "kan_Knda-eng_Latn"'
        )
    return found[1], found[2]


class Detector:
    """Tells in which of some languages a text is; with one language there is nothing to tell."""

    def __init__(self, languages: Iterable[str]):
        """Takes the languages that come into question, as the server calls them, and reads what tells them apart."""
        self.languages = tuple(languages)
        self._names: dict[str, list[str]] = {}  # by the names that the library has, which tell no regions apart
        if len(self.languages) > 1:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier

            self._identifier: Any = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
            labels = set(self._identifier.labels)
            for code in self.languages:
                if short(code) in labels:
                    self._names.setdefault(short(code), []).append(code)
            self._identifier.set_languages(list(self._names) or None)

    def detect(self, text: str) -> list[tuple[str, float]]:
        """The languages and their probabilities, the most probable one first; those that the library lacks have 0.

        Languages that it does not tell apart, such as "pt" and "pt-BR", all have the probability of theirs.
        """
        if len(self.languages) == 1:
            return [(self.languages[0], 1.0)]
        ranked = self._identifier.rank(text[:ENOUGH]) if self._names else []
        found = [(code, float(share)) for name, share in ranked for code in self._names[name]]
        return found + [(code, 0.0) for code in self.languages if code not in dict(found)]

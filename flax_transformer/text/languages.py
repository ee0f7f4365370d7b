"""Finds the token by which a vocabulary names a language: ">>kan<<" for "kn"."""

import re
from collections.abc import Sequence

import babel


def short(code: str) -> str:
    """The code of two letters, where there is one, of a language: "kn" for "kan_Knda" and "kn"."""
    language = re.split("[_-]", code)[0]
    try:
        return babel.Locale.parse(language).language
    except (ValueError, babel.UnknownLocaleError):
        return language


def token_of(code: str, tokens: Sequence[str]) -> str:
    """Which of a vocabulary's tokens, such as ">>kan<<", tells a model to write a language.

    Args:
        code: the language, e.g. "kn", or its token.
        tokens: the vocabulary's tokens of languages.

    Raises:
        ValueError: no token names it, or several do.
    """
    named = {token: _name(token) for token in tokens}
    exact = [token for token, name in named.items() if name == _name(code)]
    found = exact or [token for token, name in named.items() if short(name) == short(_name(code))]
    if len(found) == 1:
        return found[0]
    few = ", ".join((found or list(tokens))[:8])
    what = f"{len(found)} tokens name the language {code!r}" if found else f"no token names the language {code!r}"
    raise ValueError(f"the model is told what to write by a token, and {what}: write one of {few}, without the marks")


def _name(token: str) -> str:
    """A language's code, in small letters and with "_", since people write "pt-BR" and models have ">>pt_br<<"."""
    return token.removeprefix(">>").removesuffix("<<").replace("-", "_").casefold()

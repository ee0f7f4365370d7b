"""Vocabularies of M2M100 and NLLB: SentencePiece splits the text, a list gives each piece its id, as fairseq numbers
them, and each text begins with a token that names its language.

The ids are those of "<s>", "<pad>", "</s>", "<unk>", then of the pieces, of the languages, of "<mask>" (NLLB only), and
of rows of the embeddings that nothing uses, which fairseq calls "madeupword" and a number.
"""

import difflib
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

from etils import epath

from flax_transformer.data.marian_vocabulary import MarianVocabulary
from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.text.symbols import M2M100_LANGUAGE, NLLB_LANGUAGE

PIECES_MODEL, DESCRIPTION = "sentencepiece.bpe.model", "languages.json"
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"
# What the token of a language looks like, and an example, by the name of the tokenizer in transformers.
FORMS = {
    "NllbTokenizer": (NLLB_LANGUAGE, "kan_Knda"),
    "M2M100Tokenizer": (M2M100_LANGUAGE, "__kn__"),
}
_UNUSED = re.compile(r"madeupword\d+")


class FairseqVocabulary(MarianVocabulary):
    """The vocabulary of M2M100 or NLLB, for texts of one language unless a text itself names another one.

    A text that begins with the token of a language and a space ("kan_Knda ನಮಸ್ಕಾರ", "__kn__ ನಮಸ್ಕಾರ") is in that
    language, any other text in the language of `speaking`. Other special tokens have no meaning within a text: "</s>"
    is four characters of text. Decoding leaves all of them out.

    Tokens equal those of `NllbTokenizer` and `M2M100Tokenizer` of transformers 5.23 for composed text (NFC) without
    white space at its ends. Text that is not composed gets the tokens of composed text, and invisible characters that
    have no piece are left out.

    Attributes:
        tokenizer: the name of the tokenizer in transformers, one of `FORMS`.
        language: the token of the language of texts that name none; empty if each must name its own.
        languages: the tokens of all languages.
        language_ids: their ids.
        language_last: whether the token comes last, after the end of sentence, as in the oldest NLLB tokenizers
            (`legacy_behaviour`); this concerns sources only.
    """

    def __init__(
        self,
        model: bytes,
        pieces: Sequence[str],
        languages: Sequence[str],
        tokenizer: str,
        language: str = "",
        language_last: bool = False,
    ):
        """Reads a serialised SentencePiece model, and takes the pieces in the order of their ids.

        Raises:
            ValueError: the bytes are not a SentencePiece model, a piece occurs twice, a special piece is missing, or
                the languages are not among the pieces.
        """
        if tokenizer not in FORMS:
            raise ValueError(f"tokenizer is {tokenizer!r}: give one of {', '.join(FORMS)}")
        ids = {piece: number for number, piece in enumerate(pieces)}
        if len(ids) != len(pieces):
            twice = next(piece for number, piece in enumerate(pieces) if ids[piece] != number)
            raise ValueError(f"the piece {twice!r} has two ids: take the files that belong to the model")
        super().__init__(model, ids)
        wrong = [code for code in languages if code not in ids or not FORMS[tokenizer][0].fullmatch(code)]
        if wrong or not languages:
            found = f"of which {wrong[0]!r} is none" if wrong else "and there are none"
            raise ValueError(f"languages are pieces such as {FORMS[tokenizer][1]}, {found}: download the model again")
        self.tokenizer, self.language_last, self.languages = tokenizer, language_last, tuple(languages)
        self.language_ids = frozenset(ids[code] for code in languages)
        self._not_text = self.language_ids | {
            ids[piece] for piece in pieces if piece == MASK or _UNUSED.fullmatch(piece)
        }
        self.language = self._find(language) if language else ""

    def __reduce__(self):
        """Pickles as the arguments of the constructor."""
        arguments = (self._model, self._pieces, self.languages, self.tokenizer, self.language, self.language_last)
        return FairseqVocabulary, arguments

    def speaking(self, language: str) -> "FairseqVocabulary":
        """See `Vocabulary.speaking`; the language of M2M100's token "__kn__" may also be called "kn"."""
        if not language:
            return self
        return self._changed(language=self._find(language))

    def as_target(self) -> "FairseqVocabulary":
        """The same vocabulary for targets, in which the language always comes first."""
        return self._changed(language_last=False) if self.language_last else self

    def _spelled(self, language: str) -> str:
        """The token of a language, which in M2M100 may be named without its underscores."""
        short = self.tokenizer == "M2M100Tokenizer" and re.fullmatch("[a-z]{2,3}", language)
        return f"__{language}__" if short else language

    def _find(self, language: str) -> str:
        code = self._spelled(language)
        if code in self.languages:
            return code
        names = [known.strip("_") for known in self.languages]
        near = ", ".join(_near(code.strip("_"), names)[:6])
        raise ValueError(
            f"the model knows no language {language}: "
            + (f"did you mean {near}?" if near else f"give one of {', '.join(names[:8])}, …")
            + f" It knows {len(names)} languages, named as {FORMS[self.tokenizer][1].strip('_')}"
        )

    def with_language(self, language: str) -> "FairseqVocabulary":
        """The same vocabulary with a token for one more language; it takes the first id that nothing uses.

        Raises:
            ValueError: the name does not have the form of the other languages' names.
        """
        code = self._spelled(language)
        if code in self.languages:
            return self
        form, example = FORMS[self.tokenizer]
        if not form.fullmatch(code) or code in self._ids:
            raise ValueError(f"a new language cannot be called {language!r}: give it a name such as {example}")
        pieces = list(self._pieces)
        unused = next((number for number, piece in enumerate(pieces) if _UNUSED.fullmatch(piece)), len(pieces))
        pieces[unused : unused + 1] = [code]
        languages = (*self.languages, code)
        return FairseqVocabulary(
            self._model, pieces, languages, self.tokenizer, self.language, language_last=self.language_last
        )

    def _description(self, **languages: str) -> bytes:
        fields: dict[str, Any] = {"tokenizer": self.tokenizer, "language_last": self.language_last} | languages
        fields |= {"languages": self.languages, "pieces": self._pieces}
        return json.dumps(fields, ensure_ascii=False, indent=0).encode() + b"\n"

    def to_bytes(self) -> bytes:
        """Everything that defines this vocabulary, its language too: the description, then the model."""
        return self._description(language=self.language) + self._model

    def files(self, target: Vocabulary) -> dict[str, bytes]:
        """See `Vocabulary.files`; both sides share all but the language."""
        assert isinstance(target, FairseqVocabulary), "both sides are made together"
        description = self._description(source_language=self.language, target_language=target.language)
        return {PIECES_MODEL: self._model, DESCRIPTION: description}

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each sentence: its language, its pieces and `eos_id`.

        Raises:
            ValueError: a sentence has no language, or names one that the model does not know.
        """
        return [self._encode(sentence) for sentence in sentences]

    def _encode(self, sentence: str) -> list[int]:
        code, text = self.split_language(sentence)
        language = self._ids.get(code.strip() or self.language)
        if language is None:
            where = f'the text "{text[:40]}"' if text else "a text"
            raise ValueError(
                f"the model needs the language of {where}: give source_language and target_language, e.g. "
                f"{self.languages[0].strip('_')}, or begin the text with its token, {self.languages[0]}"
            )
        ids = self._split(text)
        return [*ids, self.eos_id, language] if self.language_last else [language, *ids, self.eos_id]

    def without_symbols(self, sentence: str) -> str:
        """See `Vocabulary.without_symbols`; the token of the language is the only such text."""
        return self.split_language(sentence)[1]

    def split_language(self, sentence: str) -> tuple[str, str]:
        """See `Vocabulary.split_language`; raises ValueError for a language that the model does not know."""
        text = self._spelling.spell(sentence)
        first, space, rest = text.partition(" ")
        if FORMS[self.tokenizer][0].fullmatch(first):
            return self._find(first) + " ", rest.strip()
        return "", text

    def _text_ids(self, row: Iterable[SupportsIndex]) -> list[int]:
        return [token for token in super()._text_ids(row) if token not in self._not_text]


def read_fairseq_vocabularies(directory: epath.PathLike) -> tuple[FairseqVocabulary, FairseqVocabulary]:
    """Reads the vocabularies of both sides from a work directory.

    Raises:
        ValueError: a file is missing or damaged; names it.
    """
    folder = epath.Path(directory)
    if not (folder / PIECES_MODEL).exists():
        raise ValueError(f"{folder} lacks {PIECES_MODEL}: copy all files of the model")
    try:
        fields = json.loads((folder / DESCRIPTION).read_bytes())
        pieces, languages = ([*map(_as_text, fields[name])] for name in ("pieces", "languages"))
        last = fields["language_last"] is True
        model = (folder / PIECES_MODEL).read_bytes()
        tokenizer = _as_text(fields["tokenizer"])
        vocabulary = FairseqVocabulary(model, pieces, languages, tokenizer=tokenizer, language_last=last)
        source = vocabulary.speaking(_as_text(fields["source_language"]))
        return source, vocabulary.as_target().speaking(_as_text(fields["target_language"]))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / DESCRIPTION} is damaged ({error}): copy it again") from error
    except ValueError as error:
        raise ValueError(f"{folder / PIECES_MODEL}, with {DESCRIPTION}: {error}") from error


def _near(name: str, names: Sequence[str]) -> list[str]:
    """Those names of languages that begin as a name does, or are spelled alike, the nearest first."""
    alike = {
        known: (len(os.path.commonprefix([known, name])), difflib.SequenceMatcher(None, known, name).ratio())
        for known in names
    }
    near = [known for known in names if alike[known][0] >= min(2, len(name) - 1) or alike[known][1] >= 0.6]
    return sorted(near, key=alike.__getitem__, reverse=True)


def _as_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value

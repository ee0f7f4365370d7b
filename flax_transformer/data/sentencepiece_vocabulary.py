"""Turns sentences into token ids and back with a SentencePiece model.

In every vocabulary that this library trains, ids 0 to 3 are padding, beginning of sentence, end of sentence and
unknown, and the pieces follow. A character that did not occur in the training text is spelled in bytes, if the
vocabulary has pieces for them (`vocabulary.byte_fallback`). Otherwise it becomes the unknown id, which is decoded as
" ⁇ ".

Before a sentence is encoded, it is rewritten in the spelling that the vocabulary knows (`text/spelling.py`): composed
and decomposed accents, a tab and a space, or a word with and without a byte order mark give the same ids.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

from flax_transformer.data.sentencepiece_model import byte_ids, is_composed, parse, read_processor
from flax_transformer.data.vocabulary_training import train_pieces
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.text.languages import token_of
from flax_transformer.text.spelling import Spelling, is_blank
from flax_transformer.text.symbols import MARIAN_LANGUAGE, SPACE

JOINT_FILE, SOURCE_FILE, TARGET_FILE = "joint.model", "source.model", "target.model"
FEW = 200  # sentences, which are encoded sooner than SentencePiece has started threads for them

# What SentencePiece decodes bytes to that are not a whole character, such as the first bytes of one that is not done.
INCOMPLETE = "\ufffd"


class Vocabulary:
    """The vocabulary of one side: immutable, picklable, and safe to share between threads.

    Other kinds of vocabularies derive from this class. Callers tell them apart by what they answer (`start_id`,
    `languages`, `files`), not by their type.

    Attributes:
        pad_id: 0, fills up rows.
        bos_id: 1, the beginning of a sentence.
        eos_id: 2, the end of a sentence.
        unk_id: 3, stands for a character that has no piece.
        language: the token of the language of texts that do not name theirs, where texts begin with such a token; in
            vocabularies with tokens such as ">>kan<<", of the language into which such texts are to be translated.
        languages: the tokens that name the language to translate into; empty if the vocabulary has none.
        language_ids: the ids of tokens with which a target begins and which name its language; they are given, not
            predicted. Empty if targets begin with their text.
        language_last: whether sources name their language at their end.
    """

    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    unk_id: int = 3
    language: str = ""
    languages: tuple[str, ...] = ()
    language_ids: frozenset[int] = frozenset()
    language_last: bool = False

    def __init__(self, model: bytes):
        """Reads a serialised SentencePiece model.

        Raises:
            ValueError: the bytes are not a SentencePiece model, or ids 0 to 3 have other meanings in it.
        """
        self._processor = read_processor(model)
        self._model = model
        pieces = self.all_pieces()
        self.languages = tuple(piece for piece in pieces if MARIAN_LANGUAGE.fullmatch(piece))
        self._mark = byte_ids(self._processor, SPACE)
        self._spelling = Spelling(self._knows, pieces, spells_bytes=bool(self._mark), compose=is_composed(model))
        expected = (self.pad_id, self.bos_id, self.eos_id, self.unk_id)
        processor = self._processor
        found = (processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id())
        if found != expected:
            raise ValueError(
                f"the SentencePiece model has pad, bos, eos, unk = {found}, but {expected} is needed: "
                "train it with Vocabulary.train, or with pad_id=0 bos_id=1 eos_id=2 unk_id=3"
            )

    def __reduce__(self):
        """Pickles as the model's bytes."""
        return Vocabulary, (self._model,), {"language": self.language}

    @property
    def size(self) -> int:
        """The number of ids, including the four special ones."""
        return self._processor.get_piece_size()

    @property
    def start_id(self) -> int | None:
        """The id from which a decoder starts, or `None` if each model defines its own."""
        return self.bos_id

    def to_bytes(self) -> bytes:
        """Everything that defines this vocabulary, in bytes."""
        return self._model

    @property
    def pieces_model(self) -> bytes:
        """The serialised SentencePiece model."""
        return self._model

    def files(self, target: "Vocabulary") -> dict[str, bytes]:
        """The files that store this vocabulary, of the source, together with that of the target: contents by name."""
        if target is self:
            return {JOINT_FILE: self._model}
        return {SOURCE_FILE: self._model, TARGET_FILE: target.to_bytes()}

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each sentence, with `eos_id` at the end and no `bos_id`.

        Several spaces count as one, white space without a piece counts as a space, and invisible characters without a
        piece are dropped; with byte fallback, those that shape their neighbours stay. Canonically equivalent texts give
        equal ids, unless `vocabulary.normalize` was false. A lone surrogate, which is not a character, becomes a
        question mark.
        """
        spelled = [self._spelling.spell(sentence) for sentence in self._named(sentences)]
        texts = [text.encode(errors="replace") for text in spelled]
        if len(texts) <= FEW:
            rows = [self._processor.encode(text, add_eos=True) for text in texts]
        else:
            rows = self._processor.encode(texts, add_eos=True)
        return self._mend_marks(rows, spelled)

    def _named(self, sentences: Sequence[str]) -> Sequence[str]:
        """The sentences, each with the token of the language into which it is to be translated, if one is chosen."""
        if not self.language:
            return sentences
        return [language + text for language, text in map(self.split_language, sentences)]

    def check_sampling(self) -> None:
        """Raises ValueError if this vocabulary has only one segmentation of each sentence into pieces."""
        trainer = parse(self._model).trainer_spec
        if trainer.model_type not in map(trainer.ModelType.Value, ("BPE", "UNIGRAM")):
            raise ValueError(
                "data.source_sampling and data.target_sampling vary the pieces of vocabularies with "
                'vocabulary.model_type "bpe" or "unigram", and this one has "char": set both to 0'
            )

    def _mend_marks(self, rows: list[list[int]], spelled: Sequence[str]) -> list[list[int]]:
        """The ids of texts, of which those with the character by which SentencePiece represents a space are wrong."""
        for row, text in enumerate(spelled):
            if self._mark and SPACE in text:
                rows[row] = self._encode_with_mark(text)
        return rows

    def _encode_with_mark(self, text: str) -> list[int]:
        """The ids of a text that contains the character by which SentencePiece represents a space, in bytes."""
        # A code point that is no character stands for it, and its bytes are replaced.
        stand_in = next(character for character in map(chr, range(0xFDD0, 0xFDF0)) if character not in text)
        ids = self._processor.encode(text.replace(SPACE, stand_in).encode(errors="replace"), add_eos=True)
        wrong = byte_ids(self._processor, stand_in)
        start = 0
        while start < len(ids):
            if ids[start : start + len(wrong)] == wrong:
                ids[start : start + len(wrong)] = self._mark
            start += 1
        return ids

    def unknown_characters(self, sentence: str) -> str:
        """The visible characters of a sentence that have no piece, in their order, each as often as it occurs.

        Those of tags and other texts that are always one piece are known.
        """
        return self._spelling.unknown(self.without_symbols(sentence))

    def without_symbols(self, sentence: str) -> str:
        """The sentence without the texts that are always one piece (`vocabulary.user_symbols`, tags of corpora)."""
        text = self._spelling.spell(sentence)
        for symbol in self._symbols:
            text = text.replace(symbol, "")
        return text

    @functools.cached_property
    def _symbols(self) -> list[str]:
        pieces = parse(self._model).pieces
        found = [piece.piece for piece in pieces if piece.type == piece.Type.Value("USER_DEFINED")]
        return sorted(found, key=len, reverse=True)

    def _knows(self, character: str) -> bool:
        """Whether a character has pieces other than the unknown one and those of single bytes."""
        ids = self._processor.encode(character.encode(errors="replace"))
        return not any(token == self.unk_id or self._processor.is_byte(token) for token in ids)

    def speaking(self, language: str) -> "Vocabulary":
        """The same vocabulary for texts of one language, which is named by its code; "" changes nothing.

        Raises:
            ValueError: it does not know the language, or no language by a code.
        """
        if not language:
            return self
        known = f"begin each sentence with one of {', '.join(self.languages[:8])}" if self.languages else "leave it out"
        raise ValueError(f"the language {language} is named, but this model does not know languages by code: {known}")

    def translating_into(self, language: str) -> "Vocabulary":
        """The same vocabulary for sources that are to be translated into a language, which their token names.

        A sentence that begins with the token of another language is still translated into that one.

        Args:
            language: its code, e.g. "kn" or "kan" for the token ">>kan<<"; "" changes nothing.

        Raises:
            ValueError: no token names the language, or several do.
        """
        return self._changed(language=token_of(language, self.languages)) if language else self

    def _changed(self, **fields: Any) -> Any:
        """This vocabulary with other attributes; all else is shared, not copied."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__ | fields
        return other

    def with_language(self, language: str) -> "Vocabulary":
        """The same vocabulary with a token for one more language; raises ValueError if it cannot have one."""
        return self.speaking(language)

    def split_language(self, sentence: str) -> tuple[str, str]:
        """Splits a source sentence into the token that names the wanted language ("" if there is none) and the text.

        A sentence without a token has that of `translating_into`. The token, together with a part of the text, is a
        sentence again.

        Raises:
            ValueError: the sentence begins with the token of a language that the vocabulary does not know, and it knows
                others.
        """
        text = self._spelling.spell(sentence) if self.languages else ""
        begin = MARIAN_LANGUAGE.match(text)
        if begin is None:
            return self.language and f"{self.language} ", sentence
        if begin[0] not in self.languages:
            few = ", ".join(self.languages[:8]) + (", …" if len(self.languages) > 8 else "")
            raise ValueError(f'the model knows no language {begin[0]} ("{sentence[:40]}"): begin with one of {few}')
        return f"{begin[0]} ", text[begin.end() :]

    def split_languages(self, targets: Sequence[str]) -> tuple[list[str], list[str]]:
        """Splits targets into the tokens with which they name their language ("" for those with none) and the texts.

        Only where targets begin with a language (`language_ids`); elsewhere all of a target is text.
        """
        if not self.language_ids:
            return [""] * len(targets), list(targets)
        languages = [self.split_language(target)[0] for target in targets]
        texts = [
            target if not language else "".join(target.split(maxsplit=1)[1:])
            for language, target in zip(languages, targets, strict=True)
        ]
        return languages, texts

    def fill_languages(self, languages: Sequence[str], texts: Sequence[str]) -> list[str]:
        """Gives blank texts that name no language the first one that is named, where texts have no other language.

        A blank reference names none, and its source has to be translated into something.
        """
        first = "" if self.language else next(filter(None, languages), "")
        return [each or (first if is_blank(text) else "") for each, text in zip(languages, texts, strict=True)]

    def decode(self, ids: Iterable[Iterable[SupportsIndex]]) -> list[str]:
        """Returns the sentence of each row, up to its first `eos_id`, skipping `pad_id` and `bos_id`.

        Args:
            ids: rows of ids of any lengths; lists, or an integer array `[B, T]`.
        """
        return [self._processor.decode(self._text_ids(row)) for row in ids]

    def decode_with(self, ids: Iterable[SupportsIndex], texts: Iterable[str | None]) -> str:
        """The sentence of one row, as `decode` returns it, with a text in place of each unknown id, in order.

        Args:
            ids: the ids.
            texts: for each unknown id what to write, or `None` to write it as `decode` does.
        """
        rest = iter(texts)
        row = self._text_ids(ids)
        filled = [next(rest, None) if token == self.unk_id else None for token in row]
        pieces = self.pieces(row)
        return self._join([piece if text is None else text for piece, text in zip(pieces, filled, strict=True)])

    def _join(self, pieces: Sequence[str]) -> str:
        return self._processor.decode_pieces(list(pieces))

    def pieces(self, ids: Iterable[SupportsIndex]) -> list[str]:
        """The piece of each id, including special ones, e.g. ["▁a", "</s>"]; "▁" stands for a space."""
        return [self._processor.id_to_piece(int(token)) for token in ids]

    def all_pieces(self) -> list[str]:
        """The pieces in the order of their ids."""
        return self.pieces(range(self.size))

    def _text_ids(self, row: Iterable[SupportsIndex]) -> list[int]:
        ids = []
        for token in map(int, row):
            if token == self.eos_id:
                break
            if token not in (self.pad_id, self.bos_id):
                ids.append(token)
        return ids

    @classmethod
    def train(cls, sentences: Sequence[str], config: VocabularyConfig) -> "Vocabulary":
        """Trains a vocabulary on the sentences; equal arguments give equal bytes.

        `config.size` is exact for "bpe" and "unigram"; for "char" it is an upper limit, since there are only as many
        pieces as characters. A warning names the characters of the sentences that the vocabulary cannot represent.

        Raises:
            ValueError: there is no text, or `config.size` does not fit it; names the limit and the setting to change.
        """
        return Vocabulary(train_pieces(sentences, config, (cls.pad_id, cls.bos_id, cls.eos_id, cls.unk_id)))

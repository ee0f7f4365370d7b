"""Vocabularies of OPUS-MT (Marian) models: SentencePiece splits the text, and a separate list gives each piece its id.

The files have the names that such models are distributed with: `source.spm`, `target.spm`, `vocab.json`, and
`target_vocab.json` if the target has a list of its own.
"""

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import SupportsIndex

from etils import epath

from flax_transformer.data.sentencepiece_model import is_composed, read_processor
from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.text.spelling import Spelling
from flax_transformer.text.symbols import BYTE, MARIAN_LANGUAGE, SPACE

SOURCE_PIECES, TARGET_PIECES, IDS, TARGET_IDS = "source.spm", "target.spm", "vocab.json", "target_vocab.json"


class MarianVocabulary(Vocabulary):
    """One side of a Marian model.

    A sentence may begin with a token such as ">>fra<<", which names the language to translate into. A piece without an
    id becomes the unknown id.

    Attributes:
        pad_id: fills up rows; most Marian decoders also start from it.
        bos_id: the id of "<s>" if there is one, else `pad_id`.
        eos_id: the end of a sentence.
        unk_id: stands for a piece that has no id.
        languages: the tokens that name the language to translate into.
    """

    def __init__(self, model: bytes, ids: Mapping[str, int]):
        """Reads a serialised SentencePiece model and takes the id of each piece.

        Raises:
            ValueError: the bytes are not a SentencePiece model, the ids are not 0, 1, 2, ..., or a special piece is
                missing.
        """
        if sorted(map(repr, ids.values())) != sorted(map(repr, range(len(ids)))):
            raise ValueError(f"a list of pieces must give each an id, and no id twice, from 0 on: {_shorten(ids)}")
        if missing := [piece for piece in ("<pad>", "</s>", "<unk>") if piece not in ids]:
            raise ValueError(f"the list of pieces lacks {', '.join(missing)}: take the one that belongs to the model")
        self._processor = read_processor(model)
        self._model = model
        self._ids = dict(ids)
        self._pieces = sorted(ids, key=self._ids.__getitem__)
        self.pad_id, self.eos_id, self.unk_id = ids["<pad>"], ids["</s>"], ids["<unk>"]
        self.bos_id = ids.get("<s>", self.pad_id)
        self.languages = tuple(piece for piece in self._pieces if MARIAN_LANGUAGE.fullmatch(piece))
        # Marian's SentencePiece models compose accents themselves.
        self._spelling = Spelling(self._knows, (), spells_bytes="<0x00>" in ids, compose=is_composed(model))

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> "MarianVocabulary":
        """The same pieces with the same ids, in Marian's form."""
        ids = {piece: number for number, piece in enumerate(vocabulary.all_pieces())}
        return cls(vocabulary.pieces_model, ids)

    def __reduce__(self):
        """Pickles as the model's bytes and the list of ids."""
        return MarianVocabulary, (self._model, self._ids), {"language": self.language}

    @property
    def size(self) -> int:
        """The number of ids."""
        return len(self._ids)

    @property
    def start_id(self) -> None:
        """`None`: a Marian model's config defines it, usually as `pad_id`."""
        return None

    def ids_file(self) -> bytes:
        """The list of ids as JSON, in their order."""
        ids = {piece: number for number, piece in enumerate(self._pieces)}
        return json.dumps(ids, ensure_ascii=False, indent=1).encode() + b"\n"

    def to_bytes(self) -> bytes:
        """Everything that defines this vocabulary: the list of ids, then the model."""
        return self.ids_file() + self._model

    def files(self, target: Vocabulary) -> dict[str, bytes]:
        """See `Vocabulary.files`; both sides share one list of ids if their lists are equal."""
        ids, target_ids = self.ids_file(), MarianVocabulary.of(target).ids_file()
        pieces = {SOURCE_PIECES: self.pieces_model, TARGET_PIECES: target.pieces_model}
        return pieces | {IDS: ids} | ({} if ids == target_ids else {TARGET_IDS: target_ids})

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each sentence, with `eos_id` at the end; a language token that has no id is plain text."""
        return [self._encode(sentence) for sentence in sentences]

    def _encode(self, sentence: str) -> list[int]:
        text = self._spelling.spell(sentence)
        own = self._known_language(text)
        language = own or self.language
        begin = [self._ids[language]] if language else []
        return [*begin, *self._split(text.removeprefix(own)), self.eos_id]

    def _split(self, text: str) -> list[int]:
        """The ids of the pieces into which SentencePiece splits a text."""
        pieces = self._processor.encode(text.encode(errors="replace"), out_type=str)
        return [self._ids.get(piece, self.unk_id) for piece in pieces]

    def _known_language(self, text: str) -> str:
        """The token at the beginning of a text that names a language, if it has an id; or else ""."""
        begin = MARIAN_LANGUAGE.match(text)
        return begin[0] if begin and begin[0] in self._ids else ""

    def check_sampling(self) -> None:
        """Raises ValueError: only vocabularies that this library trains vary their pieces."""
        raise ValueError(
            "data.source_sampling and data.target_sampling vary the pieces of vocabularies that are trained here, and "
            "this one comes from a converted model: set both to 0"
        )

    def without_symbols(self, sentence: str) -> str:
        """See `Vocabulary.without_symbols`; the token of the language is the only such text."""
        text = self._spelling.spell(sentence)
        return text.removeprefix(self._known_language(text))

    def _knows(self, character: str) -> bool:
        ids = self._split(character)
        return self.unk_id not in ids and not any(map(BYTE.fullmatch, self.pieces(ids)))

    def split_language(self, sentence: str) -> tuple[str, str]:
        """See `Vocabulary.split_language`; raises ValueError for a language that the model does not know."""
        sentence = self._spelling.spell(sentence) if self.languages else sentence
        begin = MARIAN_LANGUAGE.match(sentence) if self.languages else None
        if begin is None:
            return self.language, sentence
        if begin[0] not in self._ids:
            few = ", ".join(self.languages[:8]) + (", …" if len(self.languages) > 8 else "")
            raise ValueError(f'the model knows no language {begin[0]} ("{sentence[:40]}"): begin with one of {few}')
        return begin[0], sentence[begin.end() :]

    def decode(self, ids: Iterable[Iterable[SupportsIndex]]) -> list[str]:
        """See `Vocabulary.decode`."""
        return [self._join(self.pieces(self._text_ids(row))) for row in ids]

    def _join(self, pieces: Sequence[str]) -> str:
        # SentencePiece does not replace the space of a piece that only the other side's model has.
        return super()._join(pieces).replace(SPACE, " ").strip()

    def pieces(self, ids: Iterable[SupportsIndex]) -> list[str]:
        """See `Vocabulary.pieces`."""
        return [self._pieces[int(token)] for token in ids]


def read_marian_vocabularies(directory: epath.PathLike, *, separate: bool) -> tuple[MarianVocabulary, MarianVocabulary]:
    """Reads the vocabularies of source and target from the files that a Marian model is distributed with.

    Args:
        directory: where the files are.
        separate: whether the target has a list of ids of its own.

    Raises:
        ValueError: a file is missing or damaged; names it.
    """
    folder = epath.Path(directory)

    def read(name: str) -> bytes:
        if not (folder / name).exists():
            raise ValueError(f"{folder} lacks {name}: copy all files of the model")
        return (folder / name).read_bytes()

    def read_side(pieces: str, ids: str) -> MarianVocabulary:
        try:
            return MarianVocabulary(read(pieces), dict(json.loads(read(ids))))
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, RecursionError) as error:
            raise ValueError(f"{folder / ids} is damaged ({error}): copy it again") from error
        except ValueError as error:
            raise ValueError(f"{folder / pieces}, with {ids}: {error}") from error

    return read_side(SOURCE_PIECES, IDS), read_side(TARGET_PIECES, TARGET_IDS if separate else IDS)


def _shorten(value: object) -> str:
    return textwrap.shorten(repr(value), 80, placeholder=" …")

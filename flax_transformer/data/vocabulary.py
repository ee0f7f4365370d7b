"""Turns sentences into token ids and back with SentencePiece models, and reads and writes these.

Ids 0 to 3 are padding, beginning, end and unknown in every vocabulary that is trained here; the pieces follow. There is
no byte fallback: a character that training did not see becomes the unknown id, and decodes as " ⁇ ". A converted
OPUS-MT model brings a `MarianVocabulary`, which says itself which ids mean what.

Text is encoded in the spelling that the vocabulary knows (`text/spelling.py`): composed and decomposed accents, a tab
and a space, or a word with and without a byte order mark before it give the same ids.
"""

import dataclasses
import hashlib
import json
import re
import textwrap
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import SupportsIndex

import sentencepiece
from etils import epath

from flax_transformer.data.vocabulary_training import train_pieces
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.text.spelling import Spelling

JOINT_FILE, SOURCE_FILE, TARGET_FILE = "joint.model", "source.model", "target.model"
# As OPUS-MT models have them.
SOURCE_PIECES, TARGET_PIECES, IDS, TARGET_IDS = "source.spm", "target.spm", "vocab.json", "target_vocab.json"
FILES = (JOINT_FILE, SOURCE_FILE, TARGET_FILE, SOURCE_PIECES, TARGET_PIECES, IDS, TARGET_IDS)


class Vocabulary:
    """The SentencePiece model of one side; immutable, shared freely between threads, and picklable.

    Attributes:
        pad_id: 0, fills up rows.
        bos_id: 1, the beginning of a sentence.
        eos_id: 2, the end of a sentence.
        unk_id: 3, stands for a character that has no piece.
    """

    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    unk_id: int = 3

    def __init__(self, model: bytes):
        """Reads a serialised SentencePiece model; ValueError if it is none, or if ids 0 to 3 mean something else."""
        self._processor = _read_pieces(model)
        self._model = model
        self._spelling = Spelling(self._knows, self.pieces(range(self.size)))
        expected = (self.pad_id, self.bos_id, self.eos_id, self.unk_id)
        processor = self._processor
        found = (processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id())
        if found != expected:
            raise ValueError(
                f"the SentencePiece model has pad, bos, eos, unk = {found}, {expected} is needed: "
                "train it with Vocabulary.train, or with pad_id=0 bos_id=1 eos_id=2 unk_id=3"
            )

    def __reduce__(self):
        """Pickles as the model's bytes."""
        return Vocabulary, (self._model,)

    @property
    def size(self) -> int:
        """The number of ids, the four special ones among them."""
        return self._processor.get_piece_size()

    def to_bytes(self) -> bytes:
        """The serialised model, which `Vocabulary(model)` reads back."""
        return self._model

    @property
    def pieces_model(self) -> bytes:
        """The serialised SentencePiece model alone."""
        return self._model

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Ids of each sentence, ending with `eos_id` and with no `bos_id`.

        Runs of spaces count as one, white space that has no piece counts as a space, invisible characters that have no
        piece are left out, canonically equivalent text gives equal ids, and half a surrogate pair, which is no
        character, becomes a question mark.
        """
        spelled = [self._spelling.spell(sentence).encode(errors="replace") for sentence in sentences]
        return self._processor.encode(spelled, add_eos=True)

    def unknown_characters(self, sentence: str) -> str:
        """The visible characters of a sentence that have no piece, in their order, each as often as it occurs."""
        return self._spelling.unknown(sentence)

    def _knows(self, character: str) -> bool:
        """Whether there are pieces for a character, other than the unknown one and those of single bytes."""
        ids = self._processor.encode(character.encode(errors="replace"))
        return not any(token == self.unk_id or self._processor.is_byte(token) for token in ids)

    def split_language(self, sentence: str) -> tuple[str, str]:
        """The token for the language that is wanted, and the rest; vocabularies that are trained here have none."""
        return "", sentence

    def decode(self, ids: Iterable[Iterable[SupportsIndex]]) -> list[str]:
        """The sentence that each row spells: up to its first `eos_id`, passing over `pad_id` and `bos_id`.

        Args:
            ids: rows of ids of any lengths; lists, or an integer array `[B, T]`.
        """
        return [self._processor.decode(self._text_ids(row)) for row in ids]

    def pieces(self, ids: Iterable[SupportsIndex]) -> list[str]:
        """The piece of each id, special ones included, e.g. ["▁a", "</s>"]; "▁" stands for a space."""
        return [self._processor.id_to_piece(int(token)) for token in ids]

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
        """Trains on the sentences; equal arguments give equal bytes.

        `config.size` is exact for "bpe" and "unigram"; for "char" it is an upper limit, since there are no more pieces
        than characters. A warning names the characters of the sentences that the vocabulary cannot write.

        Raises:
            ValueError: there is no text, or `config.size` does not fit it; names the limit and the key to set.
        """
        return Vocabulary(train_pieces(sentences, config, (cls.pad_id, cls.bos_id, cls.eos_id, cls.unk_id)))


class MarianVocabulary(Vocabulary):
    """One side of an OPUS-MT (Marian) model: pieces from its SentencePiece model, their ids from a list of its own.

    A sentence may begin with a token such as ">>fra<<", which names the language that is wanted; a piece without an id
    becomes the unknown id.

    Attributes:
        pad_id: fills up rows; the decoder starts from it.
        bos_id: the id of "<s>" if there is one, else `pad_id`.
        eos_id: the end of a sentence.
        unk_id: stands for a piece that has no id.
    """

    def __init__(self, model: bytes, ids: Mapping[str, int]):
        """Takes a serialised SentencePiece model, and the id of each piece; ValueError if one of them is not that."""
        if sorted(map(repr, ids.values())) != sorted(map(repr, range(len(ids)))):
            raise ValueError(f"a list of pieces must give each an id, and no id twice, from 0 on: {_shorten(ids)}")
        if missing := [piece for piece in ("<pad>", "</s>", "<unk>") if piece not in ids]:
            raise ValueError(f"the list of pieces lacks {', '.join(missing)}: take the one that belongs to the model")
        self._processor = _read_pieces(model)
        self._model = model
        self._ids = dict(ids)
        self._pieces = sorted(ids, key=self._ids.__getitem__)
        self.pad_id, self.eos_id, self.unk_id = ids["<pad>"], ids["</s>"], ids["<unk>"]
        self.bos_id = ids.get("<s>", self.pad_id)
        self.languages = tuple(piece for piece in self._pieces if _LANGUAGE.fullmatch(piece))
        self._spelling = Spelling(self._knows, ())  # its SentencePiece model has composed its pieces

    def __reduce__(self):
        """Pickles as the model's bytes and the list of ids."""
        return MarianVocabulary, (self._model, self._ids)

    @property
    def size(self) -> int:
        """The number of ids."""
        return len(self._ids)

    def ids_file(self) -> bytes:
        """The list of ids as JSON, in their order."""
        ids = {piece: number for number, piece in enumerate(self._pieces)}
        return json.dumps(ids, ensure_ascii=False, indent=1).encode() + b"\n"

    def to_bytes(self) -> bytes:
        """All that makes this vocabulary: the list of ids, then the model."""
        return self.ids_file() + self._model

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Ids of each sentence, ending with `eos_id`; what looks like a language and is none is text."""
        return [self._encode(sentence) for sentence in sentences]

    def _encode(self, sentence: str) -> list[int]:
        text = self._spelling.spell(sentence)
        begin = _LANGUAGE.match(text)
        language, text = ([begin[0]], text[begin.end() :]) if begin and begin[0] in self._ids else ([], text)
        pieces = self._processor.encode(text.encode(errors="replace"), out_type=str)
        return [*(self._ids.get(piece, self.unk_id) for piece in [*language, *pieces]), self.eos_id]

    def unknown_characters(self, sentence: str) -> str:
        """As of any `Vocabulary`; the token for a language is not looked at."""
        begin = _LANGUAGE.match(self._spelling.spell(sentence))
        known = begin[0] if begin and begin[0] in self._ids else ""
        return self._spelling.unknown(self._spelling.spell(sentence).removeprefix(known))

    def _knows(self, character: str) -> bool:
        pieces = self._processor.encode(character.encode(errors="replace"), out_type=str)
        return all(self._ids.get(piece, self.unk_id) != self.unk_id for piece in pieces)

    def split_language(self, sentence: str) -> tuple[str, str]:
        """A source sentence's language token and the rest; ValueError for a language that the model does not know."""
        sentence = self._spelling.spell(sentence) if self.languages else sentence
        begin = _LANGUAGE.match(sentence) if self.languages else None
        if begin is None:
            return "", sentence
        if begin[0] not in self._ids:
            few = ", ".join(self.languages[:8]) + (", …" if len(self.languages) > 8 else "")
            raise ValueError(f'the model knows no language {begin[0]} ("{sentence[:40]}"): begin with one of {few}')
        return begin[0], sentence[begin.end() :]

    def decode(self, ids: Iterable[Iterable[SupportsIndex]]) -> list[str]:
        """As of any `Vocabulary`."""
        texts = (self._processor.decode_pieces(self.pieces(self._text_ids(row))) for row in ids)
        # A piece that only the other side's model knows keeps its mark of a space.
        return [text.replace("▁", " ").strip() for text in texts]

    def pieces(self, ids: Iterable[SupportsIndex]) -> list[str]:
        """As of any `Vocabulary`."""
        return [self._pieces[int(token)] for token in ids]


@dataclasses.dataclass(frozen=True)
class VocabularyPair:
    """The vocabularies of both sides: one object twice when they are joint (section 5.1).

    Attributes:
        source: reads and writes the source language.
        target: reads and writes the target language.
    """

    source: Vocabulary
    target: Vocabulary

    @property
    def joint(self) -> bool:
        """Whether both sides share one vocabulary."""
        return self.source is self.target

    @classmethod
    def train(
        cls, source_sentences: Sequence[str], target_sentences: Sequence[str], config: VocabularyConfig
    ) -> "VocabularyPair":
        """Trains one vocabulary on both sides' sentences, or one on each, as `config.joint` says."""
        if config.joint:
            vocabulary = Vocabulary.train([*source_sentences, *target_sentences], config)
            return cls(vocabulary, vocabulary)
        return cls(Vocabulary.train(source_sentences, config), Vocabulary.train(target_sentences, config))

    @classmethod
    def load(cls, directory: epath.PathLike) -> "VocabularyPair":
        """Reads what `save` wrote; FileNotFoundError if the folder holds no vocabulary."""
        folder = epath.Path(directory)
        if (folder / IDS).exists():
            return cls.load_marian(folder, separate=(folder / TARGET_IDS).exists())
        if (folder / JOINT_FILE).exists():
            vocabulary = Vocabulary((folder / JOINT_FILE).read_bytes())
            return cls(vocabulary, vocabulary)
        if (folder / SOURCE_FILE).exists() and (folder / TARGET_FILE).exists():
            return cls(*(Vocabulary((folder / name).read_bytes()) for name in (SOURCE_FILE, TARGET_FILE)))
        raise FileNotFoundError(
            f"{directory} holds no vocabulary, neither {JOINT_FILE} nor {SOURCE_FILE} and {TARGET_FILE}: "
            "check the path, or write one there with VocabularyPair.train(...).save(...)"
        )

    @classmethod
    def load_marian(cls, directory: epath.PathLike, *, separate: bool) -> "VocabularyPair":
        """Reads the files that a Marian model comes with.

        Args:
            directory: where they are.
            separate: whether the target has a list of ids of its own.

        Raises:
            ValueError: a file is missing or damaged; names it.
        """
        folder = epath.Path(directory)

        def read(name: str) -> bytes:
            if not (folder / name).exists():
                raise ValueError(f"{folder} lacks {name}: copy all files of the model")
            return (folder / name).read_bytes()

        sides = []
        for pieces, ids in ((SOURCE_PIECES, IDS), (TARGET_PIECES, TARGET_IDS if separate else IDS)):
            try:
                sides.append(MarianVocabulary(read(pieces), dict(json.loads(read(ids)))))
            except (json.JSONDecodeError, UnicodeDecodeError, TypeError, RecursionError) as error:
                raise ValueError(f"{folder / ids} is damaged ({error}): copy it again") from error
            except ValueError as error:
                raise ValueError(f"{folder / pieces}, with {ids}: {error}") from error
        return cls(*sides)

    def files(self) -> dict[str, bytes]:
        """What `save` writes, by the files' names."""
        if isinstance(self.source, MarianVocabulary) and isinstance(self.target, MarianVocabulary):
            source, target = self.source.ids_file(), self.target.ids_file()
            pieces = {SOURCE_PIECES: self.source.pieces_model, TARGET_PIECES: self.target.pieces_model}
            return pieces | {IDS: source} | ({} if source == target else {TARGET_IDS: target})
        if self.joint:
            return {JOINT_FILE: self.source.to_bytes()}
        return {SOURCE_FILE: self.source.to_bytes(), TARGET_FILE: self.target.to_bytes()}

    @staticmethod
    def is_in(directory: epath.PathLike) -> bool:
        """Whether a folder holds a vocabulary, or a part of one."""
        folder = epath.Path(directory)
        return any((folder / name).exists() for name in FILES)

    def save(self, directory: epath.PathLike) -> None:
        """Writes `joint.model`, or `source.model` and `target.model`, or the files that a Marian model came with.

        A reader never sees half a file.
        """
        folder = epath.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        files = self.files()
        for name, content in files.items():
            draft = folder / f"{name}.{uuid.uuid4().hex}.tmp"
            draft.write_bytes(content)
            draft.replace(folder / name)
        for name in set(FILES) - files.keys():
            (folder / name).unlink(missing_ok=True)

    def fingerprint(self) -> str:
        """A hexadecimal SHA-256 of both models, to notice that ids come from another vocabulary."""
        sides = (hashlib.sha256(side.to_bytes()).digest() for side in (self.source, self.target))
        return hashlib.sha256(b"".join(sides)).hexdigest()


_LANGUAGE = re.compile(r">>[^<>\s]+<<")


def _read_pieces(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """Reads a serialised SentencePiece model; ValueError if it is none."""
    if not model:  # SentencePiece takes no bytes for "load later" and fails only when it is used.
        raise ValueError("a SentencePiece model of 0 bytes: the file is empty, train the vocabulary again")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(f"these {len(model)} bytes are no SentencePiece model: {error}") from error


def _shorten(value: object) -> str:
    return textwrap.shorten(repr(value), 80, placeholder=" …")

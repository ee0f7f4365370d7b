"""Trains, saves and loads the vocabularies of source and target together.

A saved pair is found again by the names of its files: `joint.model`, or `source.model` and `target.model`, for the
vocabularies that are trained here (`sentencepiece_vocabulary.py`), `vocab.json` for those of OPUS-MT models
(`marian_vocabulary.py`), `languages.json` for those of M2M100 and NLLB (`fairseq_vocabulary.py`).
"""

import dataclasses
import hashlib
from collections.abc import Sequence

from etils import epath

from flax_transformer.atomic_files import write_file
from flax_transformer.data.fairseq_vocabulary import DESCRIPTION, PIECES_MODEL, read_fairseq_vocabularies
from flax_transformer.data.marian_vocabulary import (
    IDS,
    SOURCE_PIECES,
    TARGET_IDS,
    TARGET_PIECES,
    read_marian_vocabularies,
)
from flax_transformer.data.sentencepiece_vocabulary import JOINT_FILE, SOURCE_FILE, TARGET_FILE, Vocabulary
from flax_transformer.experiment import VocabularyConfig

FILES = (JOINT_FILE, SOURCE_FILE, TARGET_FILE, SOURCE_PIECES, TARGET_PIECES, IDS, TARGET_IDS, PIECES_MODEL, DESCRIPTION)


@dataclasses.dataclass(frozen=True)
class VocabularyPair:
    """The vocabularies of both sides, which are the same object if they are joint (section 5.1).

    Attributes:
        source: encodes and decodes the source language.
        target: encodes and decodes the target language.
    """

    source: Vocabulary
    target: Vocabulary

    @property
    def joint(self) -> bool:
        """Whether both sides share one vocabulary."""
        return self.source is self.target

    @property
    def shares_ids(self) -> bool:
        """Whether each id stands for the same piece on both sides, as with one vocabulary or one list of ids."""
        return self.joint or self.source.all_pieces() == self.target.all_pieces()

    @classmethod
    def train(
        cls, source_sentences: Sequence[str], target_sentences: Sequence[str], config: VocabularyConfig
    ) -> "VocabularyPair":
        """Trains one vocabulary on the sentences of both sides, or one on each side, according to `config.joint`."""
        if config.joint:
            vocabulary = Vocabulary.train([*source_sentences, *target_sentences], config)
            return cls(vocabulary, vocabulary)
        return cls(Vocabulary.train(source_sentences, config), Vocabulary.train(target_sentences, config))

    def speaking(self, source_language: str, target_language: str, *, add: bool = False) -> "VocabularyPair":
        """The same vocabularies for texts of these languages; "" leaves a side as it is.

        Args:
            source_language: the code of the source's language, e.g. "kan_Knda".
            target_language: the code of the target's language.
            add: whether a language that they do not know gets a token of its own; otherwise it is an error.

        Raises:
            ValueError: they do not know a language, or no languages by codes.
        """
        source, target = self.source, self.target
        for language in filter(None, (source_language, target_language) if add else ()):
            source, target = source.with_language(language), target.with_language(language)
        return VocabularyPair(source.speaking(source_language), target.speaking(target_language))

    @property
    def names_languages(self) -> bool:
        """Whether translating needs the languages: NLLB's models name both, others that of the target (">>kan<<")."""
        return bool(self.target.language_ids or self.source.languages)

    def translating(self, source_language: str, target_language: str) -> "VocabularyPair":
        """The same vocabularies to translate between these languages; "" leaves a side as it is.

        Where a token such as ">>kan<<" before the source names the target's language, the source's language may be
        given, too, although nothing depends on it.

        Raises:
            ValueError: they do not know a language, or no languages by codes.
        """
        if self.source.languages and not self.target.language_ids:
            return VocabularyPair(self.source.translating_into(target_language), self.target)
        return self.speaking(source_language, target_language)

    @classmethod
    def load(cls, directory: epath.PathLike) -> "VocabularyPair":
        """Reads what `save` wrote; raises FileNotFoundError if the folder has no vocabulary."""
        folder = epath.Path(directory)
        if (folder / DESCRIPTION).exists():
            return cls(*read_fairseq_vocabularies(folder))
        if (folder / IDS).exists():
            return cls(*read_marian_vocabularies(folder, separate=(folder / TARGET_IDS).exists()))
        if (folder / JOINT_FILE).exists():
            vocabulary = Vocabulary((folder / JOINT_FILE).read_bytes())
            return cls(vocabulary, vocabulary)
        if (folder / SOURCE_FILE).exists() and (folder / TARGET_FILE).exists():
            return cls(*(Vocabulary((folder / name).read_bytes()) for name in (SOURCE_FILE, TARGET_FILE)))
        raise FileNotFoundError(
            f"{directory} holds no vocabulary, neither {JOINT_FILE} nor {SOURCE_FILE} and {TARGET_FILE}: "
            "check the path, or write one there with VocabularyPair.train(...).save(...)"
        )

    def files(self) -> dict[str, bytes]:
        """The files that `save` writes: contents by name."""
        return self.source.files(self.target)

    @staticmethod
    def is_in(directory: epath.PathLike) -> bool:
        """Whether a folder has a vocabulary, or a part of one."""
        folder = epath.Path(directory)
        return any((folder / name).exists() for name in FILES)

    def save(self, directory: epath.PathLike) -> None:
        """Writes the files of both vocabularies, and removes those of another kind of vocabulary."""
        folder = epath.Path(directory)
        files = self.files()
        for name, content in files.items():
            write_file(folder / name, content)
        for name in set(FILES) - files.keys():
            (folder / name).unlink(missing_ok=True)

    def fingerprint(self) -> str:
        """A hexadecimal SHA-256 of both vocabularies, which shows when ids come from another vocabulary."""
        sides = (hashlib.sha256(side.to_bytes()).digest() for side in (self.source, self.target))
        return hashlib.sha256(b"".join(sides)).hexdigest()

"""Turns texts into what an engine decodes, and the outputs of the engine into translations."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import UInt

from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.engine import Engine
from flax_transformer.decoding.requests import Output, Request
from flax_transformer.decoding.results import Translation
from flax_transformer.decoding.search import BROKEN
from flax_transformer.decoding.settings import BeamSearch, Sampling, SearchSettings
from flax_transformer.decoding.sources import split_sources
from flax_transformer.decoding.texts import Texts, as_list
from flax_transformer.decoding.writing import Copies, write_translations
from flax_transformer.ranges import SEED_OF_SAMPLES, check_value


class Draft:
    """Sentences as an engine takes them: one source for each, several for one that is too long, none for a blank one.

    Attributes:
        sentences: the sentences.
        parts: for each sentence the ids of its sources.
        sources: the ids of each source, including the end of sentence.
        prefixes: the ids with which the output of each source must begin.
        given: how many ids of each prefix, from the first on, count nothing in scores.
        rngs: the data of a random key for each source; `None` where nothing is sampled.
    """

    def __init__(
        self,
        vocabularies: VocabularyPair,
        longest: int,
        sentences: Texts,
        search: BeamSearch | Sampling,
        *,
        prefixes: Texts | None = None,
        seed: int = 0,
    ):
        """Encodes the sentences.

        Args:
            vocabularies: the vocabularies of both sides.
            longest: the maximum length of a source, in tokens.
            sentences: as in `Translator.hypotheses`, like the arguments below.
            search: how to search for translations.
            prefixes: the text with which each translation must begin.
            seed: the seed of sampling.

        Raises:
            ValueError: as `Translator.hypotheses` does.
        """
        sentences = as_list("sentences", sentences)
        self._begun = [""] * len(sentences) if prefixes is None else as_list("prefixes", prefixes)
        if len(self._begun) != len(sentences):
            raise ValueError(f"there are {len(self._begun)} prefixes for {len(sentences)} sentences: give one for each")
        self._target, self._search = vocabularies.target, search
        self.sentences = sentences
        self.parts = split_sources(vocabularies.source, sentences, longest, stacklevel=5)  # who called `hypotheses`
        # Where each part comes from: the number of its sentence, and its number within the sentence.
        self._places = [(number, part) for number, parts in enumerate(self.parts) for part in range(len(parts))]
        self.sources = [self.parts[number][part] for number, part in self._places]
        begun = self._target.encode([self._beginning(self._begun[number], part) for number, part in self._places])
        self.prefixes = [ids[:-1] for ids in begun]
        self.given = given_tokens(self._target, begun)
        self.rngs = random_keys(search, seed, self._places)

    def __len__(self) -> int:
        """How many sentences there are."""
        return len(self.parts)

    def submit(self, engine: Engine, numbers: Sequence[int], *, streams: bool = False) -> list[Request]:
        """Submits some of the sources to an engine, and returns a request for each; errors as in `Engine.submit`.

        Args:
            engine: decodes them, with the draft's search.
            numbers: which of `sources`.
            streams: whether the requests tell their tokens as they come.
        """
        return engine.submit(
            [self.sources[number] for number in numbers],
            self._search,
            prefixes=[self.prefixes[number] for number in numbers],
            given=[self.given[number] for number in numbers],
            rngs=None if self.rngs is None else self.rngs[list(numbers)],
            streams=streams,
        )

    def broken(self, found: Sequence[Sequence[Output]]) -> int:
        """How many sentences have a translation that ended early, because logits were not finite."""
        least = [min(output.log_probs.min() for output in outputs) for outputs in found]
        return len({number for (number, _), low in zip(self._places, least, strict=True) if low < BROKEN / 2})

    def by_part(self, found: Sequence[Sequence[Output]]) -> list[list[list[Output]]]:
        """The outputs that were found for each source, by sentence and part."""
        outputs = iter(found)
        return [[list(next(outputs)) for _ in parts] for parts in self.parts]

    def translations(
        self, found: Sequence[Sequence[Output]], copies: Sequence[Sequence[Sequence[Copies]]] | None = None
    ) -> list[list[Translation]]:
        """The translations of each sentence.

        Args:
            found: the outputs that were found for each source.
            copies: for each sentence, part and output the texts to write in place of its unknown pieces.
        """
        return [
            write_translations(self._target, several, self._search, before, None if copies is None else copies[number])
            for number, (several, before) in enumerate(zip(self.by_part(found), self._begun, strict=True))
        ]

    def _beginning(self, before: str, part: int) -> str:
        """The text with which the translation of a part of a sentence begins; only the language from the second on."""
        return before if part == 0 else self._target.split_language(before)[0] if self._target.language_ids else ""


def given_tokens(target: Vocabulary, targets: Sequence[Sequence[int]]) -> list[int]:
    """How many of each target's first tokens are given, not predicted: the one that names its language."""
    return [int(bool(ids) and ids[0] in target.language_ids) for ids in targets]


def random_keys(
    search: SearchSettings, seed: int, places: Sequence[tuple[int, int]]
) -> UInt[np.ndarray, "parts key"] | None:
    """The data of a random key for each part, which depends only on its two numbers and the seed."""
    if not isinstance(search, Sampling):
        return None
    seed = check_value("seed", seed, int, SEED_OF_SAMPLES)
    # Their number is a power of two, so that jax compiles the functions below only a few times.
    padded = np.zeros((1 << max(0, len(places) - 1).bit_length(), 2), np.uint32)
    padded[: len(places)] = np.array(places, np.uint32).reshape(-1, 2)
    sentences, parts = padded.T
    fold_in = jax.random.fold_in
    keys = jax.vmap(lambda sentence, part: fold_in(fold_in(jax.random.key(seed), sentence), part))(sentences, parts)
    return np.asarray(jax.random.key_data(keys))[: len(places)]

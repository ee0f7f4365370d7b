"""Turns texts into what an engine decodes, and the outputs of the engine into translations."""

import itertools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import UInt

from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.requests import Output
from flax_transformer.decoding.results import Translation
from flax_transformer.decoding.search import BROKEN
from flax_transformer.decoding.settings import Sampling, SearchSettings
from flax_transformer.decoding.sources import split_sources
from flax_transformer.decoding.texts import Texts, as_list
from flax_transformer.ranges import SEED_OF_SAMPLES, check_value
from flax_transformer.text.splitting import join_parts


class Draft:
    """Sentences as an engine takes them: one source for each, several for one that is too long, none for a blank one.

    Attributes:
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
        search: SearchSettings,
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
        self._texts_before = [""] * len(sentences) if prefixes is None else as_list("prefixes", prefixes)
        if len(self._texts_before) != len(sentences):
            raise ValueError(
                f"there are {len(self._texts_before)} prefixes for {len(sentences)} sentences: give one for each"
            )
        self._target, self._search = vocabularies.target, search
        all_parts = split_sources(vocabularies.source, sentences, longest, stacklevel=5)  # who called `hypotheses`
        self._counts = [len(parts) for parts in all_parts]
        # Where each part comes from: the number of its sentence, and its number within the sentence.
        self._places = [(number, part) for number, parts in enumerate(all_parts) for part in range(len(parts))]
        self.sources = [all_parts[number][part] for number, part in self._places]
        begun = self._target.encode(
            [self._beginning(self._texts_before[number], part) for number, part in self._places]
        )
        self.prefixes = [ids[:-1] for ids in begun]
        self.given = given_tokens(self._target, begun)
        self.rngs = random_keys(search, seed, self._places)

    def __len__(self) -> int:
        """How many sentences there are."""
        return len(self._counts)

    def broken(self, found: Sequence[Sequence[Output]]) -> int:
        """How many sentences have a translation that ended early, because logits were not finite."""
        least = [best.log_probs.min() for best, *_ in found]
        return len({number for (number, _), low in zip(self._places, least, strict=True) if low < BROKEN / 2})

    def translations(self, found: Sequence[Sequence[Output]]) -> list[list[Translation]]:
        """The translations of each sentence, from the outputs that were found for each source."""
        outputs = iter(found)
        return [
            self._join(list(itertools.islice(outputs, count)), before)
            for count, before in zip(self._counts, self._texts_before, strict=True)
        ]

    def _join(self, parts: Sequence[Sequence[Output]], before: str) -> list[Translation]:
        """Joins the translations of a sentence's parts: the best ones of all parts, then the second best, and so on."""
        ranks = zip(*parts, strict=False)
        return [as_translation(self._target, outputs, self._search, before) for outputs in ranks] or [Translation()]

    def _beginning(self, before: str, part: int) -> str:
        """The text with which the translation of a part of a sentence begins; only the language from the second on."""
        return before if part == 0 else self._target.split_language(before)[0] if self._target.language_ids else ""


def as_translation(
    target: Vocabulary, outputs: Sequence[Output], search: SearchSettings, before: str = ""
) -> Translation:
    """The translation of a sentence from the outputs of its parts.

    Args:
        target: the vocabulary of the translation.
        outputs: an output of each part.
        search: supplies the length penalty of the score.
        before: the text with which the translation had to begin.
    """
    ids = [token for output in outputs for token in output.ids.tolist()]
    log_probs = [log_prob for output in outputs for log_prob in output.log_probs.tolist()]
    return Translation(
        text=join_parts(_texts(target, outputs, before)),
        tokens=tuple(target.pieces(ids)),
        ids=tuple(ids),
        token_log_probs=tuple(log_probs),
        log_prob=sum(log_probs),
        score=sum(log_probs) / search.penalty(len(ids)) if ids else 0.0,
    )


def _texts(target: Vocabulary, outputs: Sequence[Output], before: str) -> list[str]:
    """The text of each part of a translation; the first begins with `before` exactly as it was given."""
    texts = target.decode(output.ids for output in outputs)
    if texts and before.strip():
        # The decoded prefix has the vocabulary's spelling, and the unknown token for characters that it lacks.
        (begun,) = target.decode([target.encode([before])[0][:-1]])
        written = target.split_language(before)[1] if target.language_ids else before
        if begun and texts[0].startswith(begun):
            texts[0] = written.strip() + texts[0].removeprefix(begun)
    return texts


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
    sentences, parts = np.array(places, np.uint32).reshape(-1, 2).T
    fold_in = jax.random.fold_in
    keys = jax.vmap(lambda sentence, part: fold_in(fold_in(jax.random.key(seed), sentence), part))(sentences, parts)
    return np.asarray(jax.random.key_data(keys))

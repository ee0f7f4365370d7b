"""Takes sentences and leaves their translations: a trained model, its vocabulary and a search, put together.

Sentences of like length share a batch, and lengths are rounded up to a few buckets, so that a few programs are
compiled whatever the text. Glossary: B sentences, S source length, L longest output, V vocabulary.
"""

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Int, PyTree

from flax_transformer.config import TransformerConfig
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.search import Hypotheses, beam_search
from flax_transformer.model import Transformer
from flax_transformer.positions import check_length
from flax_transformer.workdir import WorkDirectory

# The paper: a translation is at most 50 tokens longer than its source (section 6.1).
EXTRA_LENGTH = 50
SMALLEST_BUCKET = 8


@functools.partial(jax.jit, static_argnames=("config", "beam_size", "alpha", "max_length"))
def search_translations(
    params: PyTree,
    source: Int[Array, "B S"],
    limits: Int[Array, "B"],
    *,
    config: TransformerConfig,
    beam_size: int,
    alpha: float,
    max_length: int,
) -> Hypotheses:
    """Encodes a batch and searches its translations, in one compiled program.

    Args:
        params: the model's.
        source: token ids, padded.
        limits: each sentence's longest output in tokens.
        config: the model's.
        beam_size: hypotheses kept for each sentence; 1 is greedy search.
        alpha: exponent of the length penalty.
        max_length: the largest limit.
    """
    model = Transformer(config)
    variables = {"params": params}
    start = model.apply(variables, source, max_length=max_length, hypotheses=beam_size, method="start_decoding")

    def step_fn(state: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        # Only what differs among hypotheses travels through the search; the memory stays where it is.
        position, target = state
        state = start.replace(position=position, target=target)
        state, logits = model.apply(variables, state, tokens[:, None], method="decode_step")
        return (state.position, state.target), logits[:, 0]

    return beam_search(
        step_fn,
        (start.position, start.target),
        limits,
        beam_size=beam_size,
        max_length=max_length,
        start_id=config.start_id,
        eos_id=config.eos_id,
        pad_id=config.pad_id,
        alpha=alpha,
    )


class Translator:
    """Translates sentences with one model.

    Attributes:
        config: the model's.
        params: its parameters.
        vocabularies: of both sides.
    """

    def __init__(
        self, config: TransformerConfig, params: PyTree, vocabularies: VocabularyPair, *, batch_tokens: int = 4096
    ):
        """Puts a translator together from its parts.

        Args:
            config: the model's.
            params: its parameters.
            vocabularies: of both sides.
            batch_tokens: source tokens in a batch, padding included.
        """
        self.config = config
        self.vocabularies = vocabularies
        self.params = params
        self._batch_tokens = batch_tokens

    @classmethod
    def from_workdir(cls, path: epath.PathLike, *, step: str | int = "best", batch_tokens: int = 4096) -> "Translator":
        """Loads a translator from the work directory that training left.

        Args:
            path: the work directory.
            step: "best" (the newest where none was scored), "latest", or the number of a checkpoint.
            batch_tokens: as in the constructor.

        Raises:
            ValueError: it is no work directory, or has no such checkpoint.
        """
        workdir = WorkDirectory(path)
        config = workdir.read_model_config()
        tokens = jax.ShapeDtypeStruct((1, 2), "int32")
        init = functools.partial(Transformer(config).init, deterministic=True)
        shapes = jax.eval_shape(init, jax.random.key(0), tokens, tokens)
        # The best is the best by the metric that training chose by; a converted model has neither.
        best_metric = workdir.read_config().get("training", {}).get("best_metric", "loss")
        with workdir.open_checkpoints(best_metric=best_metric, read_only=True) as checkpoints:
            params = checkpoints.restore_params(step, shapes["params"])
        return cls(config, params, workdir.read_vocabularies(), batch_tokens=batch_tokens)

    def translate(self, sentences: Sequence[str], *, beam_size: int = 4, alpha: float = 0.6) -> list[str]:
        """Translates sentences, in order; an empty one stays empty.

        Args:
            sentences: of the source language.
            beam_size: hypotheses kept for each; 1 is greedy search.
            alpha: exponent of the length penalty (section 6.1).
        """
        if isinstance(sentences, str):
            raise ValueError("translate was given one string: give a list of sentences")
        encoded = self.vocabularies.source.encode(sentences)
        translations = [""] * len(sentences)
        wanted = [number for number, sentence in enumerate(sentences) if sentence.strip()]
        for numbers, source, limits in self._batches(encoded, wanted):
            hypotheses = search_translations(
                self.params,
                source,
                limits,
                config=self.config,
                beam_size=beam_size,
                alpha=alpha,
                max_length=self._output_limit(source.shape[1]),
            )
            tokens = np.asarray(hypotheses.tokens[:, 0])[: len(numbers)]
            for number, translation in zip(numbers, self.vocabularies.target.decode(tokens), strict=True):
                translations[number] = translation
        return translations

    def _batches(
        self, encoded: Sequence[Sequence[int]], wanted: Sequence[int]
    ) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Sentence numbers, padded source and output limits of each batch, longest bucket first."""
        buckets = defaultdict(list)
        for number in sorted(wanted, key=lambda number: len(encoded[number])):
            buckets[self._bucket(len(encoded[number]))].append(number)
        for bucket, numbers in sorted(buckets.items(), reverse=True):
            # One shape a bucket: the last batch is filled up with sentences that end at once.
            rows = min(max(1, self._batch_tokens // bucket), _power_of_two(len(numbers)))
            for start in range(0, len(numbers), rows):
                batch = numbers[start : start + rows]
                source = np.full((rows, bucket), self.config.pad_id, np.int32)
                limits = np.ones(rows, np.int32)
                for row, number in enumerate(batch):
                    source[row, : len(encoded[number])] = encoded[number]
                    limits[row] = self._output_limit(len(encoded[number]))
                yield batch, source, limits

    def _bucket(self, length: int) -> int:
        """The padded length of a sentence; learned positions, unlike sinusoidal ones, come to an end."""
        bucket = max(SMALLEST_BUCKET, _power_of_two(length))
        if self.config.positions == "learned":
            check_length(length, self.config.max_length)
            return min(bucket, self.config.max_length)
        return bucket

    def _output_limit(self, source_length: int) -> int:
        limit = source_length + EXTRA_LENGTH
        return min(limit, self.config.max_length) if self.config.positions == "learned" else limit


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()

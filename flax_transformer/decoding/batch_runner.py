"""Divides many sentences into batches, runs the compiled functions of `jitted.py` on them, and collects the outputs.

Glossary: B sentences of a batch, S source, T target, L longest output, P longest prefix.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.extend.backend import get_default_device
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from flax_transformer.config import TransformerConfig
from flax_transformer.decoding.batching import Shape, bucket, bucket_shapes, full_rows, rows_for, shape_batches
from flax_transformer.decoding.jitted import (
    BATCH_AXIS,
    align_targets,
    extend_stream,
    score_targets,
    search_translations,
    start_stream,
)
from flax_transformer.decoding.search import Hypotheses
from flax_transformer.decoding.settings import BeamSearch, Sampling, SearchSettings
from flax_transformer.positions import check_length

Ids = Sequence[int]


class Output(NamedTuple):
    """One output.

    Attributes:
        ids: its tokens, including the end of sentence.
        log_probs: the log-probability of each token, in nats.
    """

    ids: Int[np.ndarray, "T"]
    log_probs: Float[np.ndarray, "T"]


class Engine:
    """One model, or an ensemble, on one device or several.

    Attributes:
        configs: the config of each model, with an implementation of attention that these devices can run.
        models: the parameters of each model, copied to every device.
        batch_tokens: source tokens in a batch, including padding.
        mesh: the devices.
    """

    def __init__(
        self,
        configs: Sequence[TransformerConfig],
        models: Sequence[PyTree],
        *,
        batch_tokens: int,
        devices: Sequence[jax.Device],
    ):
        """Copies the parameters to every device."""
        # "cudnn" would fail in the steps of a search, which have too few queries for it, and "auto" decides by the
        # default device, which may not be one of these.
        attention = "auto" if devices[0].platform == get_default_device().platform else "xla"
        self.configs = tuple(
            config
            if config.attention_implementation == "xla"
            else dataclasses.replace(config, attention_implementation=attention)
            for config in configs
        )
        self.batch_tokens = batch_tokens
        self.mesh = Mesh(np.array(devices), (BATCH_AXIS,))
        self.models = tuple(jax.device_put(tuple(models), NamedSharding(self.mesh, Spec())))

    @property
    def longest(self) -> int:
        """The maximum length of a source, in tokens, for which all models were trained."""
        return min(config.max_length for config in self.configs)

    def search(
        self,
        sources: Sequence[Ids],
        settings: BeamSearch | Sampling,
        *,
        prefixes: Sequence[Ids],
        rngs: Key[Array, "sources"] | None,
        after_batch: Callable[[], None] = lambda: None,
    ) -> list[list[Output]]:
        """Returns the outputs of each source, in order: the best first, or samples in the order they were drawn.

        Most outputs are about as long as their sources. So the program of a bucket has room for only slightly longer
        ones, and does not wait for the last few sentences of a batch to end. These are searched again in the next
        bucket.

        Args:
            sources: the ids of each source, including the end of sentence.
            settings: the settings of the search.
            prefixes: the ids with which each output must begin, without an end of sentence; may be empty.
            rngs: a random key for each source, which only sampling needs.
            after_batch: called after each batch; an exception from it ends the search.

        Raises:
            ValueError: a source has more tokens than there are learned positions, or a prefix fills its whole output.
        """
        outputs: list[list[Output]] = [[] for _ in sources]
        waiting: dict[int, list[int]] = defaultdict(list)
        moved: set[int] = set()
        for number, source in enumerate(sources):
            waiting[self._width(len(source))].append(number)
        while waiting:
            width = min(waiting)
            numbers = sorted(waiting.pop(width), key=lambda number: len(sources[number]), reverse=True)
            for shape in bucket_shapes(numbers, (width,), self.batch_tokens, self.mesh.size):
                may_wait = np.array([width != self._room and number not in moved for number in shape.numbers])
                found, is_open = self._search_batch(shape, sources, settings, prefixes, rngs, may_wait)
                for number, hypotheses, goes_on in zip(shape.numbers, found, is_open, strict=False):
                    if goes_on:
                        moved.add(number)
                        waiting[2 * width if self._room is None else min(2 * width, self._room)].append(number)
                    outputs[number] = hypotheses
                after_batch()
        return outputs

    def _search_batch(
        self,
        shape: Shape,
        sources: Sequence[Ids],
        settings: BeamSearch | Sampling,
        prefixes: Sequence[Ids],
        rngs: Key[Array, "sources"] | None,
        may_wait: Bool[np.ndarray, "sentences"],
    ) -> tuple[list[list[Output]], Bool[np.ndarray, "B"]]:
        """The outputs of each row, and whether its search is still unfinished."""
        limits = np.ones(shape.rows, np.int32)  # rows without a sentence end at once
        limits[: len(shape.numbers)] = [self._limit(settings, len(sources[number])) for number in shape.numbers]
        begun = [prefixes[number] for number in shape.numbers]
        for ids, limit in zip(begun, limits, strict=False):
            if len(ids) >= limit:
                raise ValueError(
                    f"a prefix has {len(ids)} tokens, but its output may have only {limit} with the end of sentence: "
                    "shorten it, or raise max_length or extra_length"
                )
        indices = np.zeros(shape.rows, np.int32)
        indices[: len(shape.numbers)] = shape.numbers
        width = max(map(len, begun))
        hypotheses, is_open = self._search(
            self._pad([sources[number] for number in shape.numbers], shape.rows, shape.widths[0]),
            limits,
            settings,
            prefix=self._pad(begun, shape.rows, bucket(width)) if width else None,
            rngs=None if rngs is None else rngs[indices],
            may_wait=np.resize(may_wait, shape.rows),
        )
        tokens, lengths, log_probs, is_open = jax.device_get(
            (hypotheses.tokens, hypotheses.lengths, hypotheses.token_log_probs, is_open)
        )
        outputs = [
            [
                Output(tokens[row, rank, :length], log_probs[row, rank, :length])
                for rank, length in enumerate(lengths[row])
                if length
            ]
            for row in range(len(shape.numbers))
        ]
        return outputs, is_open

    def stream(
        self, source: Ids, settings: BeamSearch | Sampling, *, rngs: Key[Array, "sources"] | None
    ) -> Iterator[list[int]]:
        """Yields all ids of one hypothesis so far after each new one; arguments as in `search`."""
        width = self._width(len(source))
        padded = self._pad([source], 1, width)
        limits = np.array([self._limit(settings, len(source))], np.int32)
        options = {
            "configs": self.configs,
            "settings": self._completed(settings),
            "max_length": self._limit(settings, width),
            "rngs": rngs,
        }
        progress = start_stream(self.models, padded, limits, **options)
        length = 0
        while not length:
            progress = extend_stream(self.models, progress, limits, **options)
            step, tokens, length = jax.device_get((progress.step, progress.live.tokens[0, 0], progress.live.lengths))
            yield tokens[:step].tolist()

    def score(self, sources: Sequence[Ids], targets: Sequence[Ids]) -> list[Output]:
        """Returns the given targets with the log-probability of each token; raises ValueError as `search` does."""
        log_probs = self._targets(score_targets, sources, targets)
        return [Output(np.array(ids, np.int32), row[: len(ids)]) for ids, row in zip(targets, log_probs, strict=True)]

    def align(self, sources: Sequence[Ids], targets: Sequence[Ids], layer: int) -> list[Float[np.ndarray, "T S"]]:
        """Returns each pair's attention from target to source tokens; raises ValueError as `search` does."""
        weights = self._targets(align_targets, sources, targets, layer=layer)
        sizes = [(len(target), len(source)) for source, target in zip(sources, targets, strict=True)]
        return [matrix[:rows, :columns] for matrix, (rows, columns) in zip(weights, sizes, strict=True)]

    def compile(self, settings: BeamSearch | Sampling, *, longest: int, sentences: int | None) -> None:
        """Compiles what `search` needs for sources of up to `longest` tokens; arguments as in `Translator.compile`."""
        room = longest if self._room is None else min(longest, self._room)
        for width in sorted({self._width(length) for length in range(1, room + 1)}):
            full = full_rows((width,), self.batch_tokens, self.mesh.size)
            rows = full if sentences is None else rows_for(sentences, full, self.mesh.size)
            # With a limit of one token the search ends at once, so nearly all the time is compiling.
            source, limits = self._pad([], rows, width), np.ones(rows, np.int32)
            rngs = jax.random.split(jax.random.key(0), rows) if isinstance(settings, Sampling) else None
            found = self._search(source, limits, settings, prefix=None, rngs=rngs, may_wait=limits == 1)
            jax.block_until_ready(found)

    def _search(
        self,
        source: Int[np.ndarray, "B S"],
        limits: Int[np.ndarray, "B"],
        settings: BeamSearch | Sampling,
        *,
        prefix: Int[np.ndarray, "B P"] | None,
        rngs: Key[Array, "B"] | None,
        may_wait: Bool[np.ndarray, "B"],
    ) -> tuple[Hypotheses, jax.Array]:
        width = source.shape[1]
        limit = self._limit(settings, width)
        return search_translations(
            self.models,
            source,
            limits,
            configs=self.configs,
            settings=self._completed(settings),
            max_length=limit if width == self._room else min(limit, width + width // 2 + 8),
            prefix=prefix,
            rngs=rngs,
            may_wait=may_wait,
            mesh=self._shared_mesh,
        )

    def _targets(self, program, sources: Sequence[Ids], targets: Sequence[Ids], **options) -> list[np.ndarray]:
        results: list[np.ndarray] = [np.empty(0)] * len(sources)
        for shape in self._shapes(sources, targets):
            padded = (
                self._pad([side[number] for number in shape.numbers], shape.rows, width)
                for side, width in zip((sources, targets), shape.widths, strict=True)
            )
            found = program(self.models, *padded, configs=self.configs, mesh=self._shared_mesh, **options)
            for number, result in zip(shape.numbers, np.asarray(found), strict=False):
                results[number] = result
        return results

    def _shapes(self, *sides: Sequence[Ids]) -> Iterator[Shape]:
        lengths = [tuple(map(len, ids)) for ids in zip(*sides, strict=True)]
        for shape in shape_batches(lengths, self.batch_tokens, self.mesh.size):
            yield shape._replace(widths=tuple(map(self._width, shape.widths)))

    @property
    def _room(self) -> int | None:
        """The number of learned positions; `None` if no model has learned positions."""
        learned = [config.max_length for config in self.configs if config.positions == "learned"]
        return min(learned) if learned else None

    def _width(self, length: int) -> int:
        """The padded length of a sentence of `length` tokens; raises ValueError if it exceeds the learned positions."""
        if self._room is None:
            return bucket(length)
        check_length(length, self._room)
        return min(bucket(length), self._room)

    def _limit(self, settings: SearchSettings, source_length: int) -> int:
        """The maximum length of an output, in tokens, for a source of `source_length` tokens."""
        limits = [settings.limit(source_length), *(config.max_output for config in self.configs if config.max_output)]
        return min(limits if self._room is None else [*limits, self._room])

    def _completed(self, settings: BeamSearch | Sampling) -> BeamSearch | Sampling:
        """The same settings, but with the ids banned that no output may contain, such as padding and the start."""
        eos_id, never = self.configs[0].eos_id, self.configs[0].never_chosen
        return settings.replace(banned=tuple(sorted({*settings.banned, *never} - {eos_id})))

    def _pad(self, rows: Sequence[Ids], count: int, width: int) -> Int[np.ndarray, "B S"]:
        padded = np.full((count, width), self.configs[0].pad_id, np.int32)
        for row, ids in zip(padded, rows, strict=False):
            row[: len(ids)] = ids
        return padded

    @property
    def _shared_mesh(self) -> Mesh | None:
        return self.mesh if self.mesh.size > 1 else None

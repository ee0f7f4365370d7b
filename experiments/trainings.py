"""Trains the small models that the experiments compare: one recipe, variants that differ in one thing, three seeds.

One more is the quick start as it is, for what can only be seen in a model that has learned its task. All translate
the phrases of the quick start from Kannada to English. Each training has a work directory of its own and is made once:
experiments share them, and a training that was stopped continues. Where the library has no setting for a variant,
something else takes the place of a part of the library while the model is trained and while it is measured.
"""

import contextlib
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from absl import logging

from flax_transformer import attention, layers, model, stacks
from flax_transformer.commands.config import read_config
from flax_transformer.data.corpus import load_corpus
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.experiment import Experiment
from flax_transformer.masks import causal_mask, combine_masks, segment_mask
from flax_transformer.training.loop import train_and_evaluate
from flax_transformer.workdir import WorkDirectory

SEEDS = (0, 1, 2)
# What differs from the quick start: a smaller model, with the tutorial's 3 * d_model, less text and less training.
RECIPE: dict[str, Any] = {
    "model.d_model": 64,
    "model.num_heads": 4,
    "model.d_ff": 192,
    "data.train": "locale_phrases:kn:en:train?pairs=20000&parts=2",
    "training.steps": 800,
    "training.schedule.warmup_steps": 150,
    "training.rng_impl": "rbg",
    "training.evaluation.every": 200,
    "training.evaluation.sentences": 8,
    "training.evaluation.best_metric": "loss",
    "training.checkpoints.every": 400,
}
GREEDY = BeamSearch(beam_size=1)
Replaced = contextlib.AbstractContextManager[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A model that differs in one thing from the first one.

    Attributes:
        name: that of its work directories.
        settings: the settings that differ from the recipe's.
        recipe: the settings that differ from the quick start's, and that all have in common.
        seeds: one training for each.
        replaced: puts something else in place of a part of the library; nothing if not given.
    """

    name: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=lambda: RECIPE)
    seeds: Sequence[int] = SEEDS
    replaced: Callable[[], Replaced] = contextlib.nullcontext

    def experiment(self, seed: int) -> Experiment:
        """The experiment with a seed."""
        quickstart = Experiment.from_mapping(read_config("quickstart", []))
        return quickstart.changed({**self.recipe, **self.settings, "training.seed": seed, "data.seed": seed})

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While this lasts, the library has the variant's part. What was compiled before is forgotten."""
        jax.clear_caches()
        with self.replaced():
            yield
        jax.clear_caches()


def _hide_nothing(length: int) -> jax.Array:
    return jnp.zeros((1, 1, length, length))


def _hide_what_follows_in_the_source(queries: jax.Array, memory: jax.Array) -> jax.Array:
    mask = segment_mask(queries, memory)
    return combine_masks(mask, causal_mask(queries.shape[1])) if queries is memory else mask


def _no_positions(positions: jax.Array, d_model: int, **options: bool) -> jax.Array:
    return jnp.zeros((*positions.shape, d_model))


def _unscaled(query: jax.Array, *arguments: Any, **options: Any) -> Any:
    """Attention whose scores are not divided by sqrt(K): the query is multiplied by it beforehand."""
    return SCALED(query * query.shape[-1] ** 0.5, *arguments, **options)


def _no_feed_forward(*arguments: Any) -> Callable[..., jax.Array]:
    return lambda inputs, *, deterministic: jnp.zeros_like(inputs)


SCALED = attention.dot_product_attention

QUICKSTART = Variant(name="quickstart", recipe={}, seeds=SEEDS[:1])
BASE = Variant(name="base")
ONE_HEAD = Variant(name="one_head", settings={"model.num_heads": 1})
UNSCALED = Variant(  # with one head, whose d_k is 64
    name="unscaled",
    settings=ONE_HEAD.settings,
    replaced=lambda: mock.patch.object(attention, "dot_product_attention", _unscaled),
)
CHEATING = Variant(name="cheating", replaced=lambda: mock.patch.object(model, "causal_mask", _hide_nothing))
CAUSAL_ENCODER = Variant(
    name="causal_encoder",
    replaced=lambda: mock.patch.object(model, "segment_mask", _hide_what_follows_in_the_source),
)
# Trained on phrases of up to 16 tokens, and tested on longer ones, too.
SHORT = {"data.rows": 48, "data.source_slots": 16, "data.target_slots": 16}
SINUSOIDAL_POSITIONS = Variant(name="sinusoidal_positions", settings=SHORT)
LEARNED_POSITIONS = Variant(name="learned_positions", settings=SHORT | {"model.positions": "learned"})
NO_POSITIONS = Variant(
    name="no_positions",
    settings=SHORT,
    replaced=lambda: mock.patch.object(stacks, "sinusoidal_positions", _no_positions),
)
SIXTEEN_HEADS = Variant(name="sixteen_heads", settings={"model.num_heads": 16})
NO_FEED_FORWARD = Variant(
    name="no_feed_forward", replaced=lambda: mock.patch.object(layers, "FeedForward", _no_feed_forward)
)
WIDER = Variant(name="wider", settings={"model.d_ff": 256})
LAYERS = {
    number: Variant(
        name=f"layers_{number}",
        settings={"model.num_encoder_layers": number, "model.num_decoder_layers": number},
    )
    for number in (1, 5)
}
FEW_PAIRS = "locale_phrases:kn:en:train?pairs=2000&parts=2"
DROPOUT = {
    rate: Variant(
        name=f"dropout_{rate}",
        settings={"data.train": FEW_PAIRS, "model.dropout_rate": rate, "training.evaluation.every": 100},
    )
    for rate in (0.0, 0.1, 0.3)
}


# The place of the norm, and whether the learning rate rises to its peak or begins there: five layers, the beginning.
STARTS = {
    f"{norm}-norm, {'no ' * (not steps)}warm-up": Variant(
        name=f"{norm}_{'warm' if steps else 'abrupt'}",
        settings=LAYERS[5].settings
        | {
            "model.norm": norm,
            "training.schedule.warmup_steps": steps,
            "training.steps": 200,
            "training.evaluation.every": 40,
            "training.checkpoints.every": 40,
            "training.checkpoints.keep_latest": 5,
        },
    )
    for norm in ("post", "pre")
    for steps in (80, 0)
}
VARIANTS = {
    variant.name: variant
    for variant in (
        QUICKSTART,
        BASE,
        CHEATING,
        CAUSAL_ENCODER,
        SINUSOIDAL_POSITIONS,
        LEARNED_POSITIONS,
        NO_POSITIONS,
        ONE_HEAD,
        UNSCALED,
        SIXTEEN_HEADS,
        NO_FEED_FORWARD,
        WIDER,
        *LAYERS.values(),
        *DROPOUT.values(),
        *STARTS.values(),
    )
}


def trained(variant: Variant, seed: int, folder: Path) -> WorkDirectory:
    """The work directory of a variant's training, which is made or finished if need be."""
    workdir = WorkDirectory(folder / f"{variant.name}-{seed}")
    if not any(line["kind"] == "test" for line in workdir.read_metrics()):
        print(f"training {variant.name}, seed {seed}", file=sys.stderr, flush=True)
        logging.set_verbosity(logging.ERROR)
        with variant.in_place(), contextlib.redirect_stdout(sys.stderr):
            train_and_evaluate(variant.experiment(seed), workdir.path)
    return workdir


def test_scores(workdir: WorkDirectory) -> dict[str, float]:
    """Scores of the test set: the percentage of phrases that are exactly right, BLEU, chrF, and the loss."""
    test = [line for line in workdir.read_metrics() if line["kind"] == "test"][-1]
    return {name: test[name] for name in ("exact_match", "bleu", "chrf", "loss")}


def curve(workdir: WorkDirectory, kind: str, name: str) -> dict[int, float]:
    """What `metrics.jsonl` says after so many steps; `kind` is "train" or "valid"."""
    return {line["step"]: line[name] for line in workdir.read_metrics() if line["kind"] == kind}


def exactly_right(translator: Translator, source: Sequence[str], target: Sequence[str]) -> float:
    """The percentage of greedy translations that equal their references."""
    translations = translator.translate(source, GREEDY)
    return 100 * statistics.mean(mine == wanted for mine, wanted in zip(translations, target, strict=True))


def all_scores(variants: Mapping[str, Variant], folder: Path) -> dict[str, dict[str, list[float]]]:
    """The test set's scores of each seed, by what a variant is called and by metric."""
    found: dict[str, dict[str, list[float]]] = {}
    for title, variant in variants.items():
        seeds = [test_scores(trained(variant, seed, folder)) for seed in SEEDS]
        found[title] = {name: [scores[name] for scores in seeds] for name in seeds[0]}
    return found


def phrases(pairs: int, parts: int, split: str = "test") -> tuple[Sequence[str], Sequence[str]]:
    """Phrases of the built-in corpus, each of up to so many parts, and their translations."""
    corpus = load_corpus(f"locale_phrases:kn:en:{split}?pairs={pairs}&parts={parts}")
    return corpus.source, corpus.target

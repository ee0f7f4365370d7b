"""The functions that `jax.jit` compiles for translating: search, scores, alignments and streaming.

Each takes a tuple of parameters and a tuple of configs; several models form an ensemble, which averages their
probabilities. Glossary: B sentences, S source, T target, L longest output, P longest prefix, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from flax_transformer.config import TransformerConfig
from flax_transformer.decoding.search import Hypotheses, Progress, Search
from flax_transformer.decoding.settings import BeamSearch, Sampling
from flax_transformer.model import Transformer

Configs = tuple[TransformerConfig, ...]
Models = tuple[PyTree, ...]
BATCH_AXIS = "batch"


@functools.partial(jax.jit, static_argnames=("configs", "settings", "max_length", "mesh"))
def search_translations(
    models: Models,
    source: Int[Array, "B S"],
    limits: Int[Array, "B"],
    *,
    configs: Configs,
    settings: BeamSearch | Sampling,
    max_length: int,
    prefix: Int[Array, "B P"] | None = None,
    rngs: Key[Array, "B"] | None = None,
    may_wait: Bool[Array, "B"] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Hypotheses, Bool[Array, "B"]]:
    """Encodes a batch and searches for its translations, in one compiled program.

    Args:
        models: the parameters of each model.
        source: token ids, padded.
        limits: the maximum length of each sentence's output, in tokens.
        configs: the config of each model.
        settings: the settings of the search.
        max_length: the number of tokens for which there is room, L; may be less than some of the limits.
        prefix: tokens that each output begins with, padded.
        rngs: one random key for each sentence, for sampling.
        may_wait: the sentences that may be left unfinished when only a few of the batch are not done.
        mesh: the devices that share the sentences, each searching its own; `None` for one device.

    Returns:
        The hypotheses, and which sentences are unfinished, because they waited or because they need more room.
    """

    def run(models, source, limits, prefix, rngs, may_wait):
        search = _search(models, limits, configs, settings, max_length, prefix, rngs, may_wait)
        progress = search.run(_start(models, source, configs, settings, max_length))
        return search.result(progress), search.open(progress)

    return _divided(run, mesh)(models, source, limits, prefix, rngs, may_wait)


@functools.partial(jax.jit, static_argnames=("configs", "settings", "max_length"))
def start_stream(
    models: Models,
    source: Int[Array, "B S"],
    limits: Int[Array, "B"],
    *,
    configs: Configs,
    settings: BeamSearch | Sampling,
    max_length: int,
    rngs: Key[Array, "B"] | None = None,
) -> Progress:
    """The progress of a search before its first step; arguments as in `search_translations`."""
    state = _start(models, source, configs, settings, max_length)
    return _search(models, limits, configs, settings, max_length, None, rngs).start(state)


@functools.partial(jax.jit, static_argnames=("configs", "settings", "max_length"), donate_argnames=("progress",))
def extend_stream(
    models: Models,
    progress: Progress,
    limits: Int[Array, "B"],
    *,
    configs: Configs,
    settings: BeamSearch | Sampling,
    max_length: int,
    rngs: Key[Array, "B"] | None = None,
) -> Progress:
    """The progress after one more token; arguments as in `search_translations`."""
    return _search(models, limits, configs, settings, max_length, None, rngs).extend(progress)


@functools.partial(jax.jit, static_argnames=("configs", "mesh"))
def score_targets(
    models: Models,
    source: Int[Array, "B S"],
    target: Int[Array, "B T"],
    *,
    configs: Configs,
    mesh: Mesh | None = None,
) -> Float[Array, "B T"]:
    """The log-probability of each token of given targets, 0 for padding, from one parallel pass (forced decoding)."""

    def run(models, source, target):
        logits = [
            _sayable(config, Transformer(config).apply({"params": params}, source, target, deterministic=True))
            for config, params in zip(configs, models, strict=True)
        ]
        log_probs = jax.nn.log_softmax(_average(logits))
        chosen = jnp.take_along_axis(log_probs, target[..., None], axis=-1)[..., 0]
        return jnp.where(target == configs[0].pad_id, 0.0, chosen)

    return _divided(run, mesh)(models, source, target)


@functools.partial(jax.jit, static_argnames=("configs", "layer", "mesh"))
def align_targets(
    models: Models,
    source: Int[Array, "B S"],
    target: Int[Array, "B T"],
    *,
    configs: Configs,
    layer: int,
    mesh: Mesh | None = None,
) -> Float[Array, "B T S"]:
    """How much one decoder layer, when it predicts each target token, attends to each source token.

    The weights are averaged over heads and models.
    """

    def run(models, source, target):
        total: Any = 0.0
        for config, params in zip(configs, models, strict=True):
            model = Transformer(config)
            _, weights = model.apply({"params": params}, source, target, deterministic=True, return_weights=True)
            total += weights.cross[layer].mean(axis=1)
        return total / len(models)

    return _divided(run, mesh)(models, source, target)


def _divided(run: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """The same function with the batch divided among devices; each of them has the whole first argument."""
    if mesh is None:
        return run

    def divided(models, *batch):
        specs = (Spec(), *(Spec(BATCH_AXIS) for _ in batch))
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=Spec(BATCH_AXIS), check_vma=False)(
            models, *batch
        )

    return divided


def _start(
    models: Models, source: jax.Array, configs: Configs, settings: BeamSearch | Sampling, max_length: int
) -> tuple[Any, ...]:
    return tuple(
        Transformer(config).apply(
            {"params": params},
            source,
            max_length=max_length,
            hypotheses=settings.hypotheses,
            method="start_decoding",
        )
        for config, params in zip(configs, models, strict=True)
    )


def _search(
    models: Models,
    limits: jax.Array,
    configs: Configs,
    settings: BeamSearch | Sampling,
    max_length: int,
    prefix: jax.Array | None,
    rngs: jax.Array | None,
    may_wait: jax.Array | None = None,
) -> Search:
    def step_fn(states: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        steps = [
            Transformer(config).apply({"params": params}, state, tokens[:, None], method="decode_step")
            for config, params, state in zip(configs, models, states, strict=True)
        ]
        return tuple(state for state, _ in steps), _average(
            [_sayable(config, logits[:, 0]) for config, (_, logits) in zip(configs, steps, strict=True)]
        )

    return Search(
        step_fn=step_fn,
        limits=limits,
        settings=settings,
        max_length=max_length,
        start_id=configs[0].start_id,
        eos_id=configs[0].eos_id,
        pad_id=configs[0].pad_id,
        prefix=prefix,
        rngs=rngs,
        may_wait=may_wait,
        # No keys or values are copied: each state records which hypotheses wrote the past of each hypothesis.
        follow=lambda states, parents: tuple(state.follow(parents) for state in states),
    )


def _sayable(config: TransformerConfig, logits: jax.Array) -> jax.Array:
    """The logits, with -inf for tokens that the model never generates."""
    return logits.at[..., jnp.array(config.banned_ids)].set(-jnp.inf) if config.banned_ids else logits


def _average(logits: list[jax.Array]) -> jax.Array:
    """Logits whose softmax is the average of the models' probabilities."""
    if len(logits) == 1:
        return logits[0]
    return jax.nn.logsumexp(jnp.stack([jax.nn.log_softmax(each) for each in logits]), axis=0)

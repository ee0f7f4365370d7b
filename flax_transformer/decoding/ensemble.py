"""The models of an ensemble as one function: from the state and the last tokens to the logits of the next tokens.

Glossary: B sentences, N hypotheses of each, V vocabulary, C tokens listed for each sentence.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.backend import get_default_device
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Float, Int, PyTree

from flax_transformer.config import TransformerConfig
from flax_transformer.decoding.transposed import TransposedParams, opened, transpose_kernels
from flax_transformer.model import OutputRows
from flax_transformer.stacks import DecodingState

# The config and the parameters of each model; a single model is an ensemble of one.
Configs = tuple[TransformerConfig, ...]
Models = tuple[PyTree | TransposedParams, ...]
States = tuple[DecodingState, ...]
Rows = tuple[OutputRows, ...]
StepFunction = Callable[[States, jax.Array], tuple[States, jax.Array]]
BATCH_AXIS = "batch"
# Up to so many rows of the output matrix are copied for the listed tokens of all sentences; with more sentences, all
# logits take less memory.
LISTED_ROWS = 65_536


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Models whose probabilities are averaged, on one device or several.

    Attributes:
        configs: the config of each model, with an implementation of attention that these devices can run.
        models: the parameters of each model, copied to every device; on CPUs with transposed kernels.
        mesh: the devices.
    """

    configs: Configs
    models: Models
    mesh: Mesh

    @classmethod
    def on_devices(
        cls, configs: Sequence[TransformerConfig], models: Sequence[PyTree], devices: Sequence[jax.Device]
    ) -> "Ensemble":
        """Copies the parameters to every device.

        Raises:
            ValueError: models differ in the ids of padding, start or end.
        """
        special = [(config.pad_id, config.start_id, config.eos_id) for config in configs]
        for number, ids in enumerate(special[1:], 2):
            if ids != special[0]:
                raise ValueError(
                    f"model {number} has pad_id, start_id and eos_id {ids}, model 1 has {special[0]}: an ensemble "
                    "decodes the same ids with all models, so combine models that agree in these"
                )
        # "cudnn" would fail in the steps of a search, which have too few queries for it, and "auto" decides by the
        # default device, which may not be one of these.
        attention = "auto" if devices[0].platform == get_default_device().platform else "xla"
        mesh = Mesh(np.array(devices), (BATCH_AXIS,))
        stored = [transpose_kernels(params) for params in models] if devices[0].platform == "cpu" else models
        return cls(
            configs=tuple(
                config
                if config.attention_implementation == "xla"
                else dataclasses.replace(config, attention_implementation=attention)
                for config in configs
            ),
            models=tuple(jax.device_put(tuple(stored), NamedSharding(mesh, Spec()))),
            mesh=mesh,
        )

    def params(self, number: int) -> PyTree:
        """The parameters of a model, as `Transformer` has them."""
        stored = self.models[number]
        return stored.original() if isinstance(stored, TransposedParams) else stored

    @property
    def longest(self) -> int:
        """The maximum length of a source, in tokens, for which all models were trained."""
        return min(config.max_length for config in self.configs)

    @property
    def learned(self) -> int | None:
        """The number of learned positions; `None` if no model has learned positions."""
        learned = [config.max_length for config in self.configs if config.positions == "learned"]
        return min(learned) if learned else None

    @property
    def may_overflow(self) -> bool:
        """Whether activations may become infinite or NaN, as in float16.

        A mask does not hide NaN, since 0 * NaN is NaN; so no sentence is then to share anything with another one.
        """
        return any(config.dtype == "float16" for config in self.configs)

    @property
    def pad_id(self) -> int:
        """The id of padding."""
        return self.configs[0].pad_id


def copies_rows(listed: int) -> bool:
    """Whether the rows of so many listed tokens are copied out of the output matrix, B * C of them."""
    return 0 < listed <= LISTED_ROWS


def rows_of(models: Models, listed: Int[Array, "B C"], *, configs: Configs) -> Rows:
    """The rows of each model's output matrix for the listed tokens; anything for -1."""
    return tuple(
        _apply(config, params, listed, method="output_rows") for config, params in zip(configs, models, strict=True)
    )


def _apply(config: TransformerConfig, params: PyTree | TransposedParams, *arguments: Any, method: str) -> Any:
    with opened(config, params) as (model, variables):
        return model.apply(variables, *arguments, method=method)


def step_function(
    models: Models, configs: Configs, listed: Int[Array, "B C"] | None = None, rows: Rows | None = None
) -> StepFunction:
    """The `step_fn` of a `Search` with these models: takes their states and the last tokens [B * N].

    It returns the next states and the logits [B * N, V] of the average of the models' probabilities.

    Args:
        models: the parameters of each model.
        configs: the config of each model.
        listed: the target tokens among which each sentence chooses, then -1. The logits are then [B * N, C], and -inf
            for -1.
        rows: from `rows_of` for these tokens; they are copied here if not given, unless they are too many.
    """
    copies = listed is not None and copies_rows(listed.size)
    if rows is None and listed is not None and copies:
        rows = rows_of(models, listed, configs=configs)

    def step(states: States, tokens: jax.Array) -> tuple[States, jax.Array]:
        steps = [
            _apply(config, params, state, tokens[:, None], own, method="decode_step")
            for config, params, state, own in zip(configs, models, states, rows or [None] * len(configs), strict=True)
        ]
        logits = [logits[:, 0] for _, logits in steps]
        if listed is None:
            logits = [without_banned(config, each) for config, each in zip(configs, logits, strict=True)]
        else:
            logits = [_of_listed(config, each, listed, copies) for config, each in zip(configs, logits, strict=True)]
        return tuple(state for state, _ in steps), average(logits)

    return step


def _of_listed(
    config: TransformerConfig, logits: Float[Array, "R V"], listed: Int[Array, "B C"], chosen: bool
) -> Float[Array, "R C"]:
    """The logits of the listed tokens, -inf for those never generated; `chosen` says that `logits` are theirs alone."""
    by_sentence = logits.reshape(len(listed), -1, logits.shape[-1])
    if not chosen:
        by_sentence = jnp.take_along_axis(by_sentence, jnp.maximum(listed, 0)[:, None], axis=2)
    never = (listed < 0) | jnp.isin(listed, jnp.array(config.banned_ids, jnp.int32))
    return jnp.where(never[:, None], -jnp.inf, by_sentence).reshape(len(logits), -1)


def for_all_tokens(step_fn: StepFunction, listed: Int[Array, "B C"], size: int) -> StepFunction:
    """The same function with logits [B * N, V] of all tokens, -inf for those that are not listed.

    With it a random draw does not depend on how the tokens are listed.

    Args:
        step_fn: from `step_function`, for the same listed tokens.
        listed: these tokens.
        size: the size of the vocabulary, V.
    """

    def step(states: States, tokens: jax.Array) -> tuple[States, jax.Array]:
        states, logits = step_fn(states, tokens)
        rows = jnp.arange(len(tokens)).reshape(len(listed), -1, 1)
        columns = jnp.where(listed < 0, size, listed)[:, None]
        every = jnp.full((len(tokens), size), -jnp.inf)
        return states, every.at[rows, columns].set(logits.reshape(*rows.shape[:2], -1), mode="drop")

    return step


def follow(states: States, parents: jax.Array) -> States:
    """Lets each hypothesis continue its parent in the state of each model; no keys or values are copied."""
    return tuple(state.follow(parents) for state in states)


def without_banned(config: TransformerConfig, logits: jax.Array) -> jax.Array:
    """The logits, with -inf for tokens that the model never generates."""
    return logits.at[..., jnp.array(config.banned_ids)].set(-jnp.inf) if config.banned_ids else logits


def average(logits: Sequence[jax.Array]) -> jax.Array:
    """Logits whose softmax is the average of the models' probabilities."""
    if len(logits) == 1:
        return logits[0]
    return jax.nn.logsumexp(jnp.stack([jax.nn.log_softmax(each) for each in logits]), axis=0)


def divided(run: Callable[..., Any], mesh: Mesh, *, shared: int = 1) -> Callable[..., Any]:
    """The same function, run by each device on its own part of the arguments' first dimension.

    Args:
        run: the function.
        mesh: the devices; with a single one it stays as it is.
        shared: how many of its first arguments every device has as a whole.
    """
    if mesh.size == 1:
        return run

    def run_divided(*arguments):
        whole, parts = arguments[:shared], arguments[shared:]
        specs = (*(Spec() for _ in whole), *(Spec(BATCH_AXIS) for _ in parts))
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=Spec(BATCH_AXIS), check_vma=False)(*arguments)

    return run_divided

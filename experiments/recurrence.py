"""Claim 1: a recurrent network reads word after word, which takes time, and forgets; attention does neither.

    python -m experiments.recurrence

A GRU encoder-decoder without attention (Flax's own cells; Cho et al., 2014, https://arxiv.org/abs/1406.1078) beside a
Transformer with as many parameters, both trained by the same loop: on copying random symbols, on the Kannada phrases,
and one update timed for sentences of growing length.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from experiments.command import Results, padded, run
from experiments.trainings import BASE, SEEDS, phrases, trained
from flax_transformer.charts import Curves, plot_curves, plot_scores
from flax_transformer.config import TransformerConfig
from flax_transformer.figures import Figure
from flax_transformer.model import Transformer
from flax_transformer.trained_model import TrainedModel
from flax_transformer.training.loss import cross_entropy_sums

PAD, START, END, SYMBOLS = 0, 1, 2, 26
LONGEST = 32  # symbols, when copying is learned
LENGTHS = (4, 8, 12, 16, 20, 24, 28, 32)
TIMED = (16, 32, 64, 128, 256, 512)
ROWS, STEPS = 32, 800
PHRASE_ROWS, PHRASE_STEPS, PHRASE_LENGTH = 48, 800, 40
PEAKS = (1e-3, 4e-3)


class Recurrent(nn.Module):
    """A GRU reads the source into one vector, from which another GRU writes the target.

    Attributes:
        vocabulary: number of token ids; one matrix embeds source and target and gives the logits.
        width: features of all vectors.
    """

    vocabulary: int
    width: int

    def setup(self):
        """Makes one cell for each side; `RNN` runs it over all places."""
        self.embed = nn.Embed(self.vocabulary, self.width)
        self.cell = nn.GRUCell(self.width)
        self.encoder = nn.RNN(nn.GRUCell(self.width), return_carry=True)
        self.decoder = nn.RNN(self.cell)

    def __call__(
        self, source: Int[Array, "B S"], target: Int[Array, "B T"], *, deterministic: bool
    ) -> Float[Array, "B T V"]:
        """The logits of each target token, given those before it."""
        shifted = jnp.pad(target, ((0, 0), (1, 0)), constant_values=START)[:, :-1]
        hidden = self.decoder(self.embed(shifted), initial_carry=self.start(source))
        return self.embed.attend(hidden)

    def start(self, source: Int[Array, "B S"]) -> Float[Array, "B D"]:
        """What the encoder makes of a source."""
        lengths = jnp.sum(source != PAD, axis=1)
        return self.encoder(self.embed(source), seq_lengths=lengths)[0]

    def step(self, state: Float[Array, "B D"], tokens: Int[Array, "B 1"]) -> tuple[Array, Float[Array, "B 1 V"]]:
        """The next state, and the logits of the next token."""
        state, hidden = self.cell(state, self.embed(tokens[:, 0]))
        return state, self.embed.attend(hidden)[:, None]


def transformer(vocabulary: int) -> Transformer:
    """A model of the size of the other experiments' first one, without dropout, as the GRU has none."""
    return Transformer(
        TransformerConfig(
            source_vocab_size=vocabulary,
            target_vocab_size=vocabulary,
            d_model=64,
            num_heads=4,
            d_ff=192,
            num_encoder_layers=2,
            num_decoder_layers=2,
            max_length=max(TIMED),
            dropout_rate=0.0,
        )
    )


def size(model: nn.Module) -> int:
    """The number of parameters."""
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    shapes = jax.eval_shape(lambda ids: model.init(jax.random.key(0), ids, ids, deterministic=True), ids)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def recurrent_as_large(vocabulary: int) -> Recurrent:
    """The recurrent model whose number of parameters is nearest to that of the Transformer."""
    wanted = size(transformer(vocabulary))
    return min((Recurrent(vocabulary, width) for width in range(64, 200, 4)), key=lambda m: abs(size(m) - wanted))


def copying(rng: PRNGKeyArray, rows: int, longest: int, shortest: int = 4) -> tuple[Array, Array]:
    """Rows of random symbols of random lengths, as source and as target, which both end with END."""
    length_rng, symbol_rng = jax.random.split(rng)
    lengths = jax.random.randint(length_rng, (rows, 1), shortest, longest + 1)
    places = jnp.arange(longest + 1)
    symbols = jax.random.randint(symbol_rng, (rows, longest + 1), END + 1, END + 1 + SYMBOLS)
    ids = jnp.where(places < lengths, symbols, jnp.where(places == lengths, END, PAD))
    return ids, ids


class Fit:
    """A model and its training: Adam, whose rate rises for a tenth of the steps and then falls to zero."""

    def __init__(self, model: nn.Module, steps: int, seed: int, example: tuple[Array, Array], peak: float):
        """Makes the parameters and the update for batches like `example`; `peak` is the highest learning rate."""
        self.model = model
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
        self._optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))
        init = jax.jit(model.init, static_argnames="deterministic")
        self.params = init(jax.random.key(seed), *example, deterministic=True)["params"]
        self._state = self._optimizer.init(self.params)

        def loss(params: PyTree, source: Array, target: Array) -> Array:
            logits = model.apply({"params": params}, source, target, deterministic=True)
            sums = cross_entropy_sums(logits, target, target != PAD, 0.0)
            return sums.cross_entropy / sums.tokens

        @jax.jit
        def update(params: PyTree, state: PyTree, source: Array, target: Array) -> tuple[PyTree, PyTree, Array]:
            found, gradients = jax.value_and_grad(loss)(params, source, target)
            changes, state = self._optimizer.update(gradients, state, params)
            return optax.apply_updates(params, changes), state, found

        self._update = update

    def step(self, source: Array, target: Array) -> Array:
        """Makes an update; returns the loss in nats per token."""
        self.params, self._state, loss = self._update(self.params, self._state, source, target)
        return loss


def copying_learned(seed: int, model: nn.Module, peak: float) -> tuple[float, dict[int, float]]:
    """The last loss of a training in nats per token, and the percentage of symbols that are copied, by length.

    Each symbol is copied with the right ones before it given.
    """
    rng = jax.random.key(seed)
    make = jax.jit(lambda number: copying(jax.random.fold_in(rng, number), ROWS, LONGEST))
    fit = Fit(model, STEPS, seed, make(0), peak)
    for number in range(STEPS):
        loss = fit.step(*make(number))
    print(f"{type(model).__name__}, peak {peak}, seed {seed}: loss {float(loss):.3f}", file=sys.stderr, flush=True)
    predict = jax.jit(lambda params, source: model.apply({"params": params}, source, source, deterministic=True))
    found = {}
    for length in LENGTHS:
        source, target = copying(jax.random.fold_in(rng, STEPS + length), 256, LONGEST, LONGEST)
        source = target = jnp.where(jnp.arange(LONGEST + 1) < length, source, PAD).at[:, length].set(END)
        found[length] = 100 * float(jnp.mean((jnp.argmax(predict(fit.params, source), -1) == target)[:, :length]))
    return float(loss), found


def copying_accuracy(model: nn.Module) -> Results:
    """What each seed has learned at the learning rate that is best for the first seed."""
    first = {peak: copying_learned(SEEDS[0], model, peak) for peak in PEAKS}
    peak = min(first, key=lambda peak: first[peak][0])
    seeds = [first[peak], *(copying_learned(seed, model, peak) for seed in SEEDS[1:])]
    return {"peak": peak, "losses": [loss for loss, _ in seeds], "copied": [copied for _, copied in seeds]}


def seconds_for_an_update(model: nn.Module, length: int) -> float:
    """The median time of seven updates with 8 rows of so many tokens."""
    batch = copying(jax.random.key(0), 8, length - 1, length - 1)
    fit, times = Fit(model, 100, 0, batch, PEAKS[0]), []
    for _ in range(9):
        began = time.perf_counter()
        jax.block_until_ready(fit.step(*batch))
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def greedy(step: Callable[[Any, Array], tuple[Any, Array]], state: Any, rows: int, length: int) -> Int[Array, "B L"]:
    """The likeliest token after each other one."""

    def next_token(carry: tuple[Any, Array], _: None) -> tuple[tuple[Any, Array], Array]:
        state, logits = step(*carry)
        tokens = jnp.argmax(logits, axis=-1)
        return (state, tokens), tokens[:, 0]

    return jax.lax.scan(next_token, (state, jnp.full((rows, 1), START)), length=length)[1].T


def phrases_right(seed: int, kind: str, peak: float, learned: TrainedModel) -> float:
    """The percentage of test phrases that a model translates exactly, greedily, after a training on the phrases."""
    vocabularies = learned.vocabularies
    size = vocabularies.source.size
    model = transformer(size) if kind == "Transformer" else recurrent_as_large(size)
    source, target = phrases(20_000, 2, "train")
    encoded = vocabularies.source.encode(source), vocabularies.target.encode(target)
    kept = [pair for pair in zip(*encoded, strict=True) if max(map(len, pair)) <= PHRASE_LENGTH]
    sources, targets = (padded([pair[side] for pair in kept], PHRASE_LENGTH) for side in (0, 1))

    fit = Fit(model, PHRASE_STEPS, seed, (sources[:PHRASE_ROWS], targets[:PHRASE_ROWS]), peak)
    rng = np.random.default_rng(seed)
    for _ in range(PHRASE_STEPS):
        chosen = rng.integers(len(kept), size=PHRASE_ROWS)
        loss = fit.step(sources[chosen], targets[chosen])
    print(f"phrases, {kind}, seed {seed}: loss {float(loss):.3f}", file=sys.stderr, flush=True)
    variables = {"params": fit.params}

    @jax.jit
    def translate(ids: Array) -> Array:
        if isinstance(model, Recurrent):
            state = model.apply(variables, ids, method="start")
            step = lambda state, tokens: model.apply(variables, state, tokens, method="step")  # noqa: E731
        else:
            state = model.apply(variables, ids, max_length=PHRASE_LENGTH, method="start_decoding")
            step = lambda state, tokens: model.apply(variables, state, tokens, method="decode_step")  # noqa: E731
        return greedy(step, state, len(ids), PHRASE_LENGTH)

    source, target = phrases(500, 2)
    outputs = np.asarray(translate(padded(vocabularies.source.encode(source), PHRASE_LENGTH))).tolist()
    cut = [[*row, END][: [*row, END].index(END)] for row in outputs]
    right = [mine == wanted for mine, wanted in zip(vocabularies.target.decode(cut), target, strict=True)]
    return 100 * statistics.mean(right)


def measure(folder: Path) -> Results:
    """All three comparisons."""
    ids = END + 1 + SYMBOLS
    models = {"GRU": recurrent_as_large(ids), "Transformer": transformer(ids)}
    learned = TrainedModel.load(trained(BASE, SEEDS[0], folder).path)  # for its vocabulary
    copied = {name: copying_accuracy(model) for name, model in models.items()}
    pieces = learned.vocabularies.source.size
    return {
        "parameters": {name: size(model) for name, model in models.items()},
        "parameters_for_phrases": {"GRU": size(recurrent_as_large(pieces)), "Transformer": size(transformer(pieces))},
        "seconds": {
            name: {length: seconds_for_an_update(model, length) for length in TIMED} for name, model in models.items()
        },
        "copying": copied,
        "phrases": {
            name: [phrases_right(seed, name, copied[name]["peak"], learned) for seed in SEEDS] for name in models
        },
    }


def draw(results: Results) -> Mapping[str, Figure]:
    """Time over length, accuracy over distance, and the phrases."""
    timed = Curves(
        title="Time of one update with 8 rows, on 2 CPU cores",
        x_label="length of a row, symbols",
        y_label="milliseconds",
        curves={
            name: {float(length): 1000 * seconds for length, seconds in curve.items()}
            for name, curve in results["seconds"].items()
        },
        log_x=True,
        log_y=True,
    )
    copied = Curves(
        title=f"Copying (longest rows in training: {LONGEST})",
        x_label="length of the row, symbols",
        y_label="symbols copied, the right ones before given, %",
        curves={
            name: {float(length): [seed[length] for seed in found["copied"]] for length in found["copied"][0]}
            for name, found in results["copying"].items()
        },
    )
    return {
        "recurrence": plot_curves([timed, copied]),
        "recurrence_phrases": plot_scores({"Phrases exactly right": results["phrases"]}, x_label="% of the test set"),
    }


if __name__ == "__main__":
    run("recurrence", measure, draw)

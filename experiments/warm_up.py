"""Claim 12: with the norm after each sub-layer, gradients differ between layers at the start, so it needs a warm-up.

    python -m experiments.warm_up

The norm of the gradient of each layer's first feed-forward matrix before the first update, for models of 6 and of 18
layers with either place of the layer norm; the same after 40 updates with and without warm-up, for 5 + 5 layers; and
how the loss of these trainings falls (Xiong et al., 2020, https://arxiv.org/abs/2002.04745, measured and explained it).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from experiments.command import Results, padded, run
from experiments.trainings import SEEDS, STARTS, curve, phrases, trained
from flax_transformer.charts import Curves, plot_curves
from flax_transformer.config import TransformerConfig
from flax_transformer.figures import Figure
from flax_transformer.model import Transformer
from flax_transformer.trained_model import TrainedModel
from flax_transformer.training.loss import cross_entropy_sums

DEPTHS = (6, 18)
ROWS, LENGTH, PIECES = 16, 24, 1500
UPDATES = 40
PHRASES = 64


def gradient_norms(
    config: TransformerConfig, params: PyTree, source: Int[Array, "B S"], target: Int[Array, "B T"]
) -> list[float]:
    """The norm of the gradient of each decoder layer's first feed-forward matrix, without dropout."""

    @jax.jit
    @jax.grad
    def gradients(params: PyTree, source: Array, target: Array) -> Array:
        logits = Transformer(config).apply({"params": params}, source, target, deterministic=True)
        sums = cross_entropy_sums(logits, target, target != config.pad_id, 0.0)
        return sums.cross_entropy / sums.tokens

    decoder = gradients(params, source, target)["decoder"]
    layers = range(config.num_decoder_layers)
    return [float(jnp.linalg.norm(decoder[f"layers_{layer}"]["feed_forward"]["inner"]["kernel"])) for layer in layers]


def at_the_start(norm: str, depth: int, seed: int) -> list[float]:
    """The norms before the first update, for random sentences."""
    config = TransformerConfig(
        source_vocab_size=PIECES,
        target_vocab_size=PIECES,
        d_model=64,
        num_heads=4,
        d_ff=192,
        num_encoder_layers=1,
        num_decoder_layers=depth,
        norm=norm,
    )
    init_rng, *rngs = jax.random.split(jax.random.key(seed), 3)
    source, target = (jax.random.randint(rng, (ROWS, LENGTH), 3, PIECES) for rng in rngs)
    init = jax.jit(lambda rng: Transformer(config).init(rng, source, target, deterministic=True)["params"])
    return gradient_norms(config, init(init_rng), source, target)


def after_updates(path: Path) -> list[float]:
    """The norms after `UPDATES` updates of a training, for phrases of the test set."""
    model = TrainedModel.load(path, step=UPDATES)
    source, target = phrases(PHRASES, 2)
    ids = padded(model.vocabularies.source.encode(source)), padded(model.vocabularies.target.encode(target))
    return gradient_norms(model.config, model.params, *ids)


def measure(folder: Path) -> Results:
    """Gradients by depth or training, by seed and layer; and the validation losses of the trainings."""
    workdirs = {title: [trained(variant, seed, folder) for seed in SEEDS] for title, variant in STARTS.items()}
    return {
        "start": {
            depth: {f"{norm}-norm": [at_the_start(norm, depth, seed) for seed in SEEDS] for norm in ("post", "pre")}
            for depth in DEPTHS
        },
        "after": {title: [after_updates(Path(each.path)) for each in seeds] for title, seeds in workdirs.items()},
        "curves": {title: [curve(each, "valid", "loss") for each in seeds] for title, seeds in workdirs.items()},
    }


def draw_gradients(found: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> Figure:
    """The norms over the layers; takes those of each seed, by name of the curve, by title of the panel."""
    panels = [
        Curves(
            title=title,
            x_label="decoder layer",
            y_label="norm of the gradient",
            curves={
                name: {float(layer): list(norms) for layer, norms in enumerate(zip(*seeds, strict=True), 1)}
                for name, seeds in curves.items()
            },
            log_y=True,
        )
        for title, curves in found.items()
    ]
    return plot_curves(panels)


def draw(results: Results) -> Mapping[str, Figure]:
    """Gradients over the layers, and losses over the updates."""
    start = {f"{depth} layers, before the first update": found for depth, found in results["start"].items()}
    losses = Curves(
        title="5 + 5 layers: how the loss falls",
        x_label="update",
        y_label="loss of the validation set, nats per token",
        curves={
            title: {float(step): [seed[step] for seed in seeds] for step in seeds[0]}
            for title, seeds in results["curves"].items()
        },
    )
    return {
        "warm_up_gradients": draw_gradients(start),
        "warm_up_after": draw_gradients({f"5 + 5 layers, after {UPDATES} updates": results["after"]}),
        "warm_up_losses": plot_curves([losses]),
    }


if __name__ == "__main__":
    run("warm_up", measure, draw)

"""Claim 3: without 1 / sqrt(d_k) the scores grow with d_k, the softmax saturates, and few queries get a gradient.

    python -m experiments.scaling

Queries and keys of independent features with variance 1 (section 3.2.1, footnote 4), and two trainings of a model with
one head of 64 features, with and without the factor.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.command import Results, run
from experiments.trainings import ONE_HEAD, UNSCALED, all_scores
from flax_transformer.charts import Curves, plot_curves, plot_scores
from flax_transformer.figures import Figure

SIZES = tuple(2**power for power in range(2, 10))
SEEDS = range(3)
LENGTH = 32
DIVIDED = -0.5
WAYS = {"divided by √d_k": DIVIDED, "not divided": 0.0}  # the power of d_k by which scores are multiplied


def numbers(size: int, seed: int, power: float) -> dict[str, float]:
    """What becomes of random queries.

    Returns:
        The scores' variance; the weights' entropy in nats; the mean norm of the gradient for a query; and the
        percentage of queries whose gradient is less than a tenth of the mean with divided scores.
    """
    query, key, value, wanted = jax.random.normal(jax.random.key(seed), (4, LENGTH, size))

    def outcome(query: jax.Array, power: float) -> jax.Array:
        return jnp.sum(jax.nn.softmax(query @ key.T * size**power) @ value * wanted) / size**0.5

    scores = query @ key.T * size**power
    weights = jax.nn.softmax(scores)
    entropy = -jnp.sum(jnp.where(weights > 0, weights * jnp.log(weights), 0.0), axis=-1).mean()
    norms, usual = (jnp.linalg.norm(jax.grad(outcome)(query, each), axis=-1) for each in (power, DIVIDED))
    return {
        "variance": float(scores.var()),
        "entropy": float(entropy),
        "gradient": float(norms.mean()),
        "left_out": 100 * float((norms < usual.mean() / 10).mean()),
    }


def measure(folder: Path) -> Results:
    """The numbers for each size and seed, and the trainings' scores."""
    found = {
        way: {size: [numbers(size, seed, power) for seed in SEEDS] for size in SIZES} for way, power in WAYS.items()
    }
    scores = all_scores({"divided by √d_k": ONE_HEAD, "not divided": UNSCALED}, folder)
    return {"numbers": found, "scores": scores}


def draw_numbers(found: Mapping[str, Mapping[int, Sequence[Mapping[str, float]]]]) -> Figure:
    """Three of the numbers over d_k; takes those of each seed, by size, by way."""

    def curves(name: str) -> dict[str, dict[float, list[float]]]:
        return {
            way: {float(size): [seed[name] for seed in seeds] for size, seeds in sizes.items()}
            for way, sizes in found.items()
        }

    titles = {
        "variance": ("The scores grow with d_k …", "variance of the scores", True),
        "entropy": ("… one word gets all the weight …", "entropy of the weights, nats", False),
        "left_out": ("… and ever more queries get no gradient", "queries with next to no gradient, %", False),
    }
    return plot_curves(
        [
            Curves(
                title=title, x_label="d_k, features of a head", y_label=y, curves=curves(name), log_x=True, log_y=log
            )
            for name, (title, y, log) in titles.items()
        ]
    )


def draw(results: Results) -> Mapping[str, Figure]:
    """The three numbers, and the trainings."""
    right = {way: scores["exact_match"] for way, scores in results["scores"].items()}
    return {
        "scaling": draw_numbers(results["numbers"]),
        "scaling_trained": plot_scores(
            {"One head of 64 features: translations exactly right": right}, x_label="% of the test set"
        ),
    }


if __name__ == "__main__":
    run("scaling", measure, draw)

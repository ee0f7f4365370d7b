"""Claim 2: attention looks a query up in a dictionary, and gathers all values, weighted by how well their keys match.

    python -m experiments.soft_dictionary

Six words have random keys of 64 features. The query is the key of one of them, with noise. The smaller the scores, the
more the result is a mean of all values; the larger, the more it is the value of the best key, as in a dictionary.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.command import Results, run
from flax_transformer.attention import dot_product_attention
from flax_transformer.charts import Curves, plot_curves
from flax_transformer.figures import Figure

WORDS = ("January", "May", "km", "kg", "Ghana", "Peru")
SIZE = 64
LOOKED_UP = "km"
NOISE = 1.0
SCALES = tuple(2.0**power for power in range(-6, 5))


def look_up(scale: float, seed: int = 0) -> tuple[dict[str, float], float]:
    """The weight of each word, and the distance of the result from the looked-up word's own value."""
    key_rng, value_rng, noise_rng = jax.random.split(jax.random.key(seed), 3)
    keys = jax.random.normal(key_rng, (1, len(WORDS), 1, SIZE))
    values = jax.random.normal(value_rng, keys.shape)
    number = WORDS.index(LOOKED_UP)
    query = keys[:, number : number + 1] + NOISE * jax.random.normal(noise_rng, (1, 1, 1, SIZE))
    gathered, weights = dot_product_attention(scale * query, keys, values, return_weights=True)
    distance = jnp.linalg.norm(gathered[0, 0, 0] - values[0, number, 0]) / SIZE**0.5
    return dict(zip(WORDS, weights[0, 0, 0].tolist(), strict=True)), float(distance)


def measure(folder: Path) -> Results:
    """Looks the word up with scores of different sizes."""
    found = {scale: look_up(scale) for scale in SCALES}
    return {
        "weights": {word: {scale: weights[word] for scale, (weights, _) in found.items()} for word in WORDS},
        "distance": {scale: distance for scale, (_, distance) in found.items()},
    }


def draw(results: Results) -> Mapping[str, Figure]:
    """The weights over the size of the scores, and how far the result is from the entry."""
    weights = {
        word: {float(scale): weight for scale, weight in curve.items()} for word, curve in results["weights"].items()
    }
    distance = {float(scale): value for scale, value in results["distance"].items()}
    panels = [
        Curves(
            title=f"Whoever asks for “{LOOKED_UP}” gets a bit of every word,\nuntil the scores are large",
            x_label="scores multiplied by",
            y_label="attention weight",
            curves=weights,
            log_x=True,
        ),
        Curves(
            title="Large scores give the entry itself",
            x_label="scores multiplied by",
            y_label="distance of the result from the entry\n(root mean square of the features)",
            curves={"result": distance},
            log_x=True,
        ),
    ]
    return {"soft_dictionary": plot_curves(panels)}


if __name__ == "__main__":
    run("soft_dictionary", measure, draw)

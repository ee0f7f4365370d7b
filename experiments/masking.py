"""Claims 4 and 5: a decoder that sees the word it predicts cheats; an encoder that does not see all words loses.

    python -m experiments.masking

Three trainings that differ in one mask: the library's; one whose decoder's mask hides nothing of the target, so that
the word to be predicted can be copied from the input; and one whose encoder has a causal mask.
"""

from collections.abc import Mapping
from pathlib import Path

from experiments.command import Results, run
from experiments.trainings import BASE, CAUSAL_ENCODER, CHEATING, all_scores
from flax_transformer.charts import plot_scores
from flax_transformer.figures import Figure

VARIANTS = {
    "decoder masked, encoder not": BASE,
    "decoder not masked": CHEATING,
    "encoder masked, too": CAUSAL_ENCODER,
}


def measure(folder: Path) -> Results:
    """The scores of the trainings."""
    return all_scores(VARIANTS, folder)


def draw(results: Results) -> Mapping[str, Figure]:
    """The loss, which is computed with the right words before each word, beside the translations."""
    losses = {title: scores["loss"] for title, scores in results.items()}
    right = {title: scores["exact_match"] for title, scores in results.items()}
    return {
        "masking_loss": plot_scores(
            {"The loss, with the right earlier words given": losses}, x_label="nats per token", digits=3
        ),
        "masking": plot_scores({"Translating by itself: exactly right": right}, x_label="% of the test set"),
    }


if __name__ == "__main__":
    run("masking", measure, draw)

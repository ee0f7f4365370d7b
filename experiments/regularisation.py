"""Claim 11: on little data, dropout keeps a model from learning the phrases by heart.

    python -m experiments.regularisation

2,000 pairs in place of 20,000, and dropout rates of 0, 0.1 and 0.3.
"""

from collections.abc import Mapping
from pathlib import Path

from experiments.command import Results, run
from experiments.trainings import DROPOUT, SEEDS, curve, exactly_right, phrases, trained
from flax_transformer.charts import Curves, plot_curves, plot_scores
from flax_transformer.decoding.translator import Translator
from flax_transformer.figures import Figure
from flax_transformer.workdir import WorkDirectory


def last_score(workdir: WorkDirectory) -> float:
    """The percentage of test phrases that the model is right on after the last update, not where it was best."""
    translator = Translator.from_workdir(workdir.path, step="latest")
    found = exactly_right(translator, *phrases(500, 2))
    translator.close()
    return found


def measure(folder: Path) -> Results:
    """The losses of training and of the validation set over the steps, and the scores."""
    titles = {f"dropout {rate:g}": variant for rate, variant in DROPOUT.items()}
    kinds = {"train": "cross_entropy", "valid": "loss"}
    curves = {
        kind: {
            title: [curve(trained(variant, seed, folder), kind, name) for seed in SEEDS]
            for title, variant in titles.items()
        }
        for kind, name in kinds.items()
    }
    scores = {
        title: [last_score(trained(variant, seed, folder)) for seed in SEEDS] for title, variant in titles.items()
    }
    return {"curves": curves, "exact_match": scores}


def draw(results: Results) -> Mapping[str, Figure]:
    """Both losses, and the scores."""

    def by_step(kind: str) -> dict[str, dict[float, list[float]]]:
        return {
            # A training that was stopped for a while has one more point, where it stopped.
            title: {
                float(step): [seed[step] for seed in seeds] for step in seeds[0] if all(step in seed for seed in seeds)
            }
            for title, seeds in results["curves"][kind].items()
        }

    titles = {"train": "The phrases of training (with dropout)", "valid": "Phrases that are kept apart"}
    panels = [
        Curves(
            title=title,
            x_label="update",
            y_label="loss, nats per token",
            curves=by_step(kind),
            markers=kind == "valid",
            log_y=True,
        )
        for kind, title in titles.items()
    ]
    return {
        "regularisation_curves": plot_curves(panels),
        "regularisation": plot_scores(
            {"Translations exactly right, after the last update": results["exact_match"]}, x_label="% of the test set"
        ),
    }


if __name__ == "__main__":
    run("regularisation", measure, draw)

"""The programs that compare trainings, without a training."""

import dataclasses
import itertools

import pytest

from benchmarks import ablations
from flax_transformer.commands.config import read_config
from flax_transformer.experiment import Experiment


@pytest.mark.parametrize("comparison", [ablations.MODELS, ablations.INGREDIENTS], ids=["models", "ingredients"])
def test_every_variant_is_another_experiment(comparison):
    config = Experiment.from_mapping(read_config("multi30k_en_de", []))
    experiments = [config.changed({**comparison.shared, **each}) for each in comparison.variants.values()]
    assert all(one != other for one, other in itertools.combinations(experiments, 2))


def test_runs_that_are_done_are_not_made_again(tmp_path, monkeypatch):
    comparison = dataclasses.replace(ablations.MODELS, file=tmp_path / "found.json")
    trained = []

    def train(config, settings, workdir):
        trained.append((config, workdir))
        if len(trained) == 7:
            raise KeyboardInterrupt
        return {"bleu": 20.0 + settings["training.seed"], "chrf": 50.0, "loss": 2.5}

    monkeypatch.setattr(ablations, "train", train)
    with pytest.raises(KeyboardInterrupt):
        comparison.run("config", tmp_path)
    assert (
        comparison.table().count("| 2 | 20.5 (20.0 to 21.0) |") == 1 and comparison.table().count("| 1 | 20.0 |") == 4
    )
    comparison.run("config", tmp_path)
    comparison.run("config", tmp_path)
    assert len(trained) == 3 * len(comparison.variants) + 1 and len(set(trained)) == len(trained) - 1
    assert comparison.table().count("| 3 | 21.0 (20.0 to 22.0) | 50.0 (50.0 to 50.0) |") == len(comparison.variants)

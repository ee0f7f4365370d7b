import warnings

import pytest

from flax_transformer.data.corpus import ParallelText
from flax_transformer.experiment import DataConfig
from flax_transformer.training.loop import train_and_evaluate
from flax_transformer.training.notices import (
    notice_of_other_rate,
    notice_of_rows,
    notice_of_tags,
    warn_of_settings,
    warn_of_texts,
)
from flax_transformer.training.optimizer import learning_rate_schedule
from tests.training.conftest import with_training, without_held_out

ONE = [f"one{number} two{number}" for number in range(30)]
EIN = [f"ein{number} zwei{number}" for number in range(30)]


def text(source, target):
    return ParallelText(list(source), list(target), [1] * len(source))


def warned(function, *arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*arguments)
    return [str(each.message) for each in caught]


def test_held_out_pairs_that_training_sees_are_counted_once_each():
    train = text(ONE, EIN)
    told = warned(warn_of_texts, {"train": train, "valid": text([*ONE[:3], ONE[0], "new"], [*EIN[:3], EIN[0], "neu"])})
    assert len(told) == 1 and "3 of the 4 different pairs of data.valid are in data.train too" in told[0]
    # A sentence with another translation is another pair.
    assert not warned(warn_of_texts, {"train": train, "valid": text(ONE[:3], EIN[1:4])})


def test_tags_without_a_piece_are_named():
    data = DataConfig(train="tsv:a?tag=<a> + tsv:b?tag=<b>", valid="tsv:c?tag=<c>", test="")
    assert notice_of_tags(data, ["the", "<a>", "<b>", "<c>"]) == notice_of_tags(DataConfig(train="tsv:a"), []) == ""
    told = notice_of_tags(data, ["the", "<b>"])
    assert told.startswith("the vocabulary has no piece for <a>, <c>, and")


def test_swapped_files_are_noticed_by_their_words():
    train, held_out = text(ONE, EIN), text(ONE[1:20], EIN[:19])
    assert not warned(warn_of_texts, {"train": train, "test": held_out})
    (told,) = warned(warn_of_texts, {"train": train, "test": text(held_out.target, held_out.source)})
    assert "the sources of data.test look like the targets of data.train" in told
    # Neither side tells anything where both have the same words, nor where all words are new.
    assert not warned(warn_of_texts, {"train": text(ONE, ONE[::-1]), "valid": text(ONE[4:], ONE[:-4])})
    assert not warned(warn_of_texts, {"train": train, "valid": text(["a b"] * 20, ["c d"] * 20)})


def test_a_warm_up_longer_than_the_training_is_a_warning(experiment):
    settings = {"steps": 10, "schedule.warmup_steps": 11}
    (told,) = warned(warn_of_settings, with_training(experiment, **settings))
    assert "warmup_steps is 11" in told and "10" in told
    assert not warned(warn_of_settings, with_training(experiment, **settings | {"schedule.warmup_steps": 10}))


def test_empty_rows_are_counted():
    assert "4 empty rows" in notice_of_rows(12, 16, 8)
    assert notice_of_rows(16, 16, 8) == ""


@pytest.mark.parametrize(("name", "jumps"), [("cosine", True), ("linear", True), ("paper", False), ("constant", False)])
def test_another_number_of_steps_is_told_of_if_it_changes_the_rate(name, jumps, experiment):
    before = with_training(experiment, steps=20, **{"schedule.name": name})
    now = with_training(before, steps=30)
    told = notice_of_other_rate(before, now, 20)
    assert bool(told) == jumps
    if jumps:
        rate = float(learning_rate_schedule(now.training, now.model.d_model)(20))
        assert f"{rate:.3g}" in told and "was to be 0 " in told and "steps was 20 and is 30" in told
    assert notice_of_other_rate(before, before, 15) == ""


@pytest.mark.slow
def test_a_training_that_continues_tells_of_its_rate_and_its_devices(experiment, tmp_path, capsys):
    first = with_training(without_held_out(experiment), steps=6, **{"schedule.name": "cosine"})
    train_and_evaluate(first, tmp_path)
    assert "empty rows" not in capsys.readouterr().out
    train_and_evaluate(with_training(first, steps=9, **{"parallelism.layout": "auto"}), tmp_path)
    told = capsys.readouterr().out
    assert "training.steps was 6 and is 9, where cosine ends" in told
    assert "data.rows = 4 on 8 devices: 4 empty rows" in told

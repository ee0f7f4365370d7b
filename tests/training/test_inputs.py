import codecs
import json
import operator
import random
import re
import shutil
from pathlib import Path

import pytest
from flax.traverse_util import flatten_dict

from flax_transformer.commands.config import config_of, read_config
from flax_transformer.config import TransformerConfig
from flax_transformer.data.corpus import load_corpus
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.translator import Translator
from flax_transformer.experiment import (
    MOVED,
    CheckpointsConfig,
    DataConfig,
    EvaluationConfig,
    Experiment,
    ParallelismConfig,
    TrainingConfig,
    VocabularyConfig,
)
from flax_transformer.files import OWN_FILES, OWN_FOLDERS
from flax_transformer.processes import hosts
from flax_transformer.training.inputs import load_texts
from flax_transformer.training.loop import train_and_evaluate
from flax_transformer.training.resuming import check_fingerprints, check_processes
from flax_transformer.workdir import WorkDirectory

DIGITS = "zero one two three four five six seven eight nine".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of six text files: digits in words to the same words in reverse order."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for split, pairs in (("train", 40), ("valid", 5), ("test", 3)):
        sentences = [rng.choices(DIGITS, k=rng.randint(1, 2)) for _ in range(pairs)]
        (folder / f"{split}.in").write_text("".join(" ".join(words) + "\n" for words in sentences))
        (folder / f"{split}.out").write_text("".join(" ".join(reversed(words)) + "\n" for words in sentences))
    return folder


@pytest.fixture(scope="module")
def experiment(corpus):
    specs = {split: f"files:{corpus}/{split}.in,{corpus}/{split}.out" for split in ("train", "valid", "test")}
    return Experiment(
        model=TransformerConfig(
            d_model=8, num_heads=2, d_ff=12, num_encoder_layers=1, num_decoder_layers=1, max_length=12
        ),
        vocabulary=VocabularyConfig(size=50, byte_fallback=False),
        data=DataConfig(**specs, rows=4, source_slots=12, target_slots=12),
        training=TrainingConfig(
            steps=1,
            parallelism=ParallelismConfig(layout="jit"),
            evaluation=EvaluationConfig(every=1, best_metric="loss", samples=0),
            checkpoints=CheckpointsConfig(every=1),
        ),
    )


def change(experiment, section, **values):
    return experiment.changed({f"{section}.{name}": value for name, value in values.items()})


@pytest.fixture(scope="module")
def trained(experiment, tmp_path_factory):
    """The folder of a training of one step, scored."""
    path = tmp_path_factory.mktemp("trained")
    train_and_evaluate(experiment, path)
    return path


@pytest.fixture
def path(trained, tmp_path):
    """A copy of it in which a test continues training."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def edit(corpus):
    """Adds a sentence pair to a text; when the test ends, all texts are what they were."""
    texts = {file: file.read_bytes() for file in corpus.iterdir()}

    def put_back():
        for file, content in texts.items():
            file.write_bytes(content)

    def edit(split):
        for side in ("in", "out"):
            with (corpus / f"{split}.{side}").open("a") as file:
                file.write("nine\n")
        return put_back

    yield edit
    put_back()


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def refused(experiment, path, message):
    """Training is refused in one line, and does not change the work directory."""
    left = files_in(path)
    with pytest.raises(ValueError, match=message) as caught:
        train_and_evaluate(experiment, path)
    assert "\n" not in str(caught.value) and files_in(path) == left


def lines_of(path, kind):
    return [line for line in WorkDirectory(path).read_metrics() if line["kind"] == kind]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "valid"])
def test_an_edited_text_is_refused_until_it_is_restored_or_accepted(split, experiment, path, edit):
    fingerprints = WorkDirectory(path).read_fingerprints()
    put_back = edit(split)
    spec = getattr(experiment.data, split)
    message = (
        rf"^data\.{split} \({spec}\) has another text .* ran in {path}: put the text back, .*--accept_changed_corpus$"
    )
    refused(experiment, path, message)

    put_back()
    train_and_evaluate(experiment, path)
    assert WorkDirectory(path).read_fingerprints() == fingerprints

    edit(split)
    train_and_evaluate(change(experiment, "training", steps=2), path, accept_changed_corpus=True)
    assert [line["step"] for line in lines_of(path, "train")] == [1, 2]
    accepted = WorkDirectory(path).read_fingerprints()
    assert {name for name in fingerprints | accepted if accepted.get(name) != fingerprints.get(name)} == {split}
    train_and_evaluate(change(experiment, "training", steps=2), path)  # it is the text of this training now
    put_back()
    refused(experiment, path, message)


def test_a_text_that_another_version_of_a_package_makes_is_blamed_on_the_version(experiment, path, edit):
    edit("train")
    workdir = WorkDirectory(path)
    (start,) = lines_of(path, "start")
    assert start["versions"]["babel"] and start["versions"]["tensorflow-datasets"]
    workdir.append_metrics(start | {"versions": start["versions"] | {"babel": "2.0"}})
    refused(experiment, path, r"babel was 2\.0 then and is [\d.]+ now: install that version again, give another")


def test_both_texts_are_named_if_both_were_edited(experiment, path, edit):
    edit("train"), edit("valid")
    refused(experiment, path, r"^data\.train \(.*train\.out\) and data\.valid \(.*valid\.out\) has another text")


def test_another_corpus_may_be_named_for_validation(experiment, path, corpus):
    other = f"files:{corpus}/test.in,{corpus}/test.out"
    # Step 1 is not scored again, since its turn does not come.
    later = change(experiment, "training", steps=2, **{"evaluation.every": 2})
    train_and_evaluate(change(later, "data", valid=other), path)
    with WorkDirectory(path).open_checkpoints(read_only=True) as checkpoints:
        assert checkpoints.scores.keys() == {2}  # those of the other text are forgotten


@pytest.mark.parametrize(
    ("changes", "exists", "message"),
    [
        ({"training.schedule.learning_rate": 3.0}, False, r"process 1 has other settings .*schedule\.learning_rate\)"),
        ({"training.evaluation.every": 7, "data.seed": 2}, False, r"\(data\.seed, training\.evaluation\.every\)"),
        ({}, True, "processes 0 and 1 see different things in .*: give a --workdir that all hosts share"),
        ({"model.attention_implementation": "xla"}, False, None),
    ],
)
def test_processes_with_other_settings_or_another_folder_are_an_error(
    changes, exists, message, experiment, tmp_path, monkeypatch
):
    def gather(mine):
        settings = flatten_dict(experiment.changed(changes).to_mapping(), sep=".")
        theirs = {"settings": {name: settings[name] for name in mine["settings"]}, "exists": exists}
        return json.loads(json.dumps([mine, theirs]))

    monkeypatch.setattr(hosts, "gather", gather)
    if message is None:
        check_processes(experiment, WorkDirectory(tmp_path))
    else:
        with pytest.raises(ValueError, match=message):
            check_processes(experiment, WorkDirectory(tmp_path))


@pytest.mark.parametrize("wrong", ["train", "valid"])
def test_a_language_that_the_vocabulary_lacks_is_found_before_the_settings_are_recorded(wrong, experiment, tmp_path):
    for name in ("train", "valid"):
        lines = [">>eng<< one\tuno"] * 40 + [">>en<< two\tdue"] * (name == wrong)
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    texts = {"train": f"tsv:{tmp_path / 'train.tsv'}", "valid": f"tsv:{tmp_path / 'valid.tsv'}", "test": ""}
    settings = {"size": 24, "model_type": "char", "user_symbols": (">>eng<<",)}
    tagged = change(change(experiment, "data", **texts), "vocabulary", **settings)
    with pytest.raises(ValueError, match="knows no language >>en<< .*begin with one of >>eng<<"):
        train_and_evaluate(tagged, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_other_texts_in_another_process_are_an_error(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "gather", lambda mine: [mine, mine | {"train": "2"}])
    with pytest.raises(ValueError, match="process 1 has other texts than process 0: give all hosts the same files"):
        check_fingerprints(experiment, None, WorkDirectory(tmp_path), {"train": "1"}, False)


@pytest.mark.parametrize(("split", "scored"), [pytest.param("train", {1, 2}, marks=pytest.mark.slow), ("valid", {2})])
def test_scores_are_removed_if_the_validation_text_has_changed(split, scored, experiment, path, edit):
    edit(split)
    # Step 1 is not scored again, since its turn does not come.
    later = change(experiment, "training", steps=2, **{"evaluation.every": 2})
    train_and_evaluate(later, path, accept_changed_corpus=True)
    with WorkDirectory(path).open_checkpoints(read_only=True) as checkpoints:
        assert checkpoints.scores.keys() == scored


@pytest.mark.slow
def test_a_validation_text_that_was_not_used_for_a_while_is_still_known(experiment, path, edit):
    without = change(change(experiment, "data", valid=""), "training", steps=2)
    train_and_evaluate(without, path)
    edit("valid")
    refused(change(experiment, "training", steps=2), path, r"^data\.valid \(.*valid\.out\) has another text")


def test_an_edited_test_text_is_accepted(experiment, path, edit):
    edit("test")
    assert train_and_evaluate(experiment, path).sentences == 4
    assert [line["sentences"] for line in lines_of(path, "test")] == [3, 4]


def test_another_vocabulary_of_the_same_size_is_refused_by_training_and_translating(experiment, path):
    workdir = WorkDirectory(path)
    own = workdir.read_vocabularies()
    assert Translator.from_workdir(path).vocabularies.fingerprint() == own.fingerprint()
    lines = [codecs.encode(f"{first} {second}", "rot13") for first in DIGITS for second in DIGITS]
    other = VocabularyPair.train(lines, lines, experiment.vocabulary)
    assert other.source.size == own.source.size and other.fingerprint() != own.fingerprint()
    workdir.write_vocabularies(other)
    message = f"^the vocabulary in {path} is not the one that the model was trained with: put that one back, or give"
    refused(experiment, path, message)
    with pytest.raises(ValueError, match=message):
        Translator.from_workdir(path)
    workdir.write_vocabularies(own)
    train_and_evaluate(experiment, path)


def test_a_vocabulary_that_was_lost_is_not_replaced_by_that_of_another_text(experiment, path, edit):
    file = path / "joint.model"
    vocabulary = file.read_bytes()
    file.unlink()
    train_and_evaluate(experiment, path)
    assert file.read_bytes() == vocabulary
    file.unlink()
    for _ in range(60):
        edit("train")
    with pytest.raises(ValueError, match="is not the one that the model was trained with: put that one back"):
        train_and_evaluate(experiment, path, accept_changed_corpus=True)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model", "d_ff", 16),
        ("vocabulary", "seed", 1),
        ("data", "rows", 8),
        ("data", "train", "locale_phrases:kn:en:train?pairs=50&parts=1"),
        ("data", "temperature", 2.0),
        ("data", "source_sampling", 0.1),
        ("data", "target_sampling", 0.1),
        ("training", "seed", 1),
        ("training", "optimizer.clip_norm", 1.0),
        ("training", "optimizer.ema_decay", 0.5),
    ],
)
def test_a_changed_setting_that_must_stay_the_same_is_refused(section, name, value, experiment, path):
    found = operator.attrgetter(name)(getattr(experiment, section))
    other = change(experiment, section, **{name: value})
    message = f"{path} was begun with {section}.{name} = {found!r}, now it is {value!r}: set it back, give another"
    refused(other, path, f"^{re.escape(message)}")


def test_only_the_shares_of_training_corpora_have_a_temperature(experiment):
    both = f"{experiment.data.train} + {experiment.data.valid}"
    texts = load_texts(change(experiment, "data", train=both, valid=both, temperature=2.0))
    assert texts["train"].repeats == load_corpus(both, 2.0).repeats != texts["valid"].repeats


def test_a_training_whose_config_has_old_names_is_held_to_its_settings_and_goes_on(experiment, path):
    file = path / "config.json"
    config = json.loads(file.read_bytes())
    sections = config["training"]
    old = {name: operator.attrgetter(new)(experiment.training) for name, new in MOVED.items()}
    flat = {name: value for name, value in sections.items() if not isinstance(value, dict)} | old
    file.write_text(json.dumps(config | {"training": flat | {"tokenize": "13a"}}))
    other = change(experiment, "training", **{"optimizer.clip_norm": 1.0})
    refused(other, path, "was begun with training.optimizer.clip_norm = 0.0, now it is 1.0: set it back")
    train_and_evaluate(experiment, path)
    assert json.loads(file.read_bytes()) == config


def test_all_settings_that_must_stay_the_same_are_named_at_once(experiment, path):
    other = change(change(experiment, "model", d_ff=16, norm="pre"), "training", seed=3)
    message = (
        "model.d_ff = 12, now it is 16; with model.norm = 'post', now it is 'pre'; with training.seed = 0, now it is "
        "3: set them back"
    )
    refused(other, path, re.escape(message))


def test_a_training_goes_on_with_what_its_work_directory_says(path):
    settings = read_config(config_of(str(path)), [("training.steps", "2")])
    train_and_evaluate(Experiment.from_mapping(settings), path)
    assert [line["step"] for line in lines_of(path, "train")] == [1, 2]


def test_the_implementation_of_attention_may_change(experiment, path):
    other = change(experiment, "model", attention_implementation="xla")
    train_and_evaluate(change(other, "data", test=""), path)


def test_damaged_fingerprints_are_an_error_and_missing_ones_are_written(experiment, path):
    file = path / "fingerprints.json"
    written = file.read_bytes()
    for content in (b"", b"{", b"3", b"\xff"):
        file.write_bytes(content)
        refused(experiment, path, r"fingerprints\.json is damaged \(.*\): put back the file .*, or remove it if")
    file.unlink()
    train_and_evaluate(experiment, path)
    assert file.read_bytes() == written


def test_a_start_that_failed_before_the_config_was_written_may_have_another_vocabulary(experiment, path):
    (path / "config.json").unlink()
    shutil.rmtree(path / "checkpoints")
    train_and_evaluate(change(change(experiment, "vocabulary", size=45), "data", valid="", test=""), path)
    assert WorkDirectory(path).read_vocabularies().source.size == 45


@pytest.mark.parametrize("name", ["joint.model", "config.json", "cache/text", "not_finite_3.tsv"])
def test_a_corpus_file_that_training_would_overwrite_is_refused_before_it_is_read(name, experiment, tmp_path):
    text = tmp_path / "run" / name
    text.parent.mkdir(parents=True)
    text.write_text("no tab here\n")
    with pytest.raises(ValueError, match=r"data.valid names .*, which training would write over .*: move the text"):
        train_and_evaluate(change(experiment, "data", valid=f"tsv:{text}"), tmp_path / "run")
    assert text.read_text() == "no tab here\n"


def test_an_unwritable_work_directory_is_an_error_before_the_corpus_is_read(experiment, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="the folder .*file/run cannot be made"):
        train_and_evaluate(change(experiment, "data", train="tsv:none"), tmp_path / "file" / "run")


def test_a_converted_model_is_not_trained_in_its_own_folder(experiment, path):
    with pytest.raises(ValueError, match="training.start_from and --workdir are both .*: give another --workdir"):
        train_and_evaluate(change(experiment, "training", start_from=str(path)), path)


def test_every_file_that_training_writes_belongs_to_the_work_directory(path):
    assert {each.name for each in path.iterdir()} <= {*OWN_FILES, *OWN_FOLDERS}

"""A config is found by name or path, and the command line changes its settings, or says which one it cannot change."""

import textwrap

import pytest

from flax_transformer.commands.config import config_names, read_config, split_changes
from flax_transformer.experiment import Experiment

SMALL = """
from ml_collections import ConfigDict
from flax_transformer.experiment import Experiment

def get_config(corpus="files:a,b"):
    config = ConfigDict(Experiment().to_mapping())
    config.data.train = corpus
    config.data.source_slots = 64
    config.data.target_slots = config.data.get_ref("source_slots")
    return config
"""


@pytest.fixture
def write(tmp_path):
    """Writes a config file and returns its path."""

    def write(text, name="mine.py"):
        (tmp_path / name).write_text(textwrap.dedent(text))
        return str(tmp_path / name)

    return write


def experiment(config, *words):
    others, changes = split_changes(words)
    assert others == []
    return Experiment.from_mapping(read_config(config, changes))


def test_a_config_of_the_library_is_found_by_its_name_and_any_config_by_its_path(write, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "quickstart" in config_names()
    assert experiment("quickstart").training.evaluation.best_metric == "exact_match"
    assert experiment("kannada_english:small,folder").data.test == "files:folder/bible/test.kn,folder/bible/test.en"
    path = write(SMALL)
    assert experiment(path).data.train == experiment("mine.py").data.train == "files:a,b"
    assert experiment(f"{path}:files:c,d").data.train == "files:c,d"  # only the first colon divides
    assert experiment(write(SMALL, "quickstart")).data.train == experiment("quickstart").data.train == "files:a,b"


def test_every_type_of_setting_can_be_changed_in_every_way_of_writing(write):
    changed = experiment(
        write(SMALL), "--config.training.steps=1e3", "--config.training.schedule.learning_rate=3",
        "--config.vocabulary.joint=False", "--config.model.tie_embeddings", "decoder", "--config.data.valid=",
        "--config.training.evaluation.alpha", "-.5",
        "--config.data.test=a=b\n", "--config.model.banned_ids=(5, 7)", "--config.training.steps=8",
    )  # fmt: skip
    assert changed.training.steps == 8 and changed.training.evaluation.alpha == -0.5
    rate = changed.training.schedule.learning_rate
    assert rate == 3.0 and isinstance(rate, float)
    assert changed.vocabulary.joint is False and changed.model.tie_embeddings == "decoder"
    assert changed.data.valid == "" and changed.data.test == "a=b\n" and changed.model.banned_ids == (5, 7)
    assert experiment("quickstart", "--config.training.steps=1e3").training.steps == 1000
    flags = ("--config.vocabulary.split_digits", "--noconfig.vocabulary.joint", "--config.model.tie_embeddings=none")
    switched = experiment(write(SMALL), *flags)
    assert switched.vocabulary.split_digits is True and switched.vocabulary.joint is False
    repeated = experiment(write(SMALL), "--config.model.banned_ids=5", "--config.model.banned_ids=7")
    assert repeated.model.banned_ids == (5, 7)
    symbols = experiment(write(SMALL), "--config.vocabulary.user_symbols=[SEP],[NUM]").vocabulary.user_symbols
    assert symbols == ("[SEP]", "[NUM]")
    for given, expected in ((":)", (":)",)), ("f(),(x)", ("f()", "(x)")), ("(<a>, <b>)", ("<a>", "<b>"))):
        changed = experiment(write(SMALL), f"--config.vocabulary.user_symbols={given}")
        assert changed.vocabulary.user_symbols == expected


def test_a_setting_that_refers_to_another_follows_it(write):
    changed = experiment(write(SMALL), "--config.data.source_slots=32")
    assert changed.data.source_slots == changed.data.target_slots == 32


def test_a_config_of_some_settings_has_the_defaults_of_the_others(write):
    changed = experiment(write("def get_config(): return {'data': {'train': 'tsv:a'}}"), "--config.training.steps=7")
    assert changed.data.train == "tsv:a" and changed.training.steps == 7
    assert changed.vocabulary == Experiment().vocabulary


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("learning_rate", "schedule.learning_rate", 0.5),
        ("schedule", "schedule.name", "cosine"),
        ("parallelism", "parallelism.layout", "fsdp"),
        ("evaluate_every", "evaluation.every", 7),
    ],
)
def test_a_setting_by_its_old_name_is_changed_with_a_word_on_the_new_one(write, old, new, value):
    path = write(SMALL)
    with pytest.warns(UserWarning, match=rf"--config\.training\.{old} is --config\.training\.{new} now"):
        changed = experiment(path, f"--config.training.{new}=1", f"--config.training.{old}={value}")
    assert changed == experiment(path, f"--config.training.{new}={value}")


def test_a_config_file_with_old_names_works_and_the_command_line_changes_it(write):
    old = """
        from ml_collections import ConfigDict

        def get_config():
            config = ConfigDict({"training": {"schedule": "cosine", "learning_rate": 3.0, "steps": 90}})
            config.training.warmup_steps = config.training.get_ref("steps")
            return config
    """
    schedule = experiment(write(old)).training.schedule
    assert (schedule.name, schedule.learning_rate, schedule.warmup_steps) == ("cosine", 3.0, 90)
    flags = ("--config.training.schedule.learning_rate=2", "--config.training.steps=80")
    schedule = experiment(write(old), *flags).training.schedule
    assert (schedule.name, schedule.learning_rate, schedule.warmup_steps) == ("cosine", 2.0, 80)


def test_words_that_change_no_setting_are_handed_on_in_order():
    words = ["--workdir", "a", "--config=b", "--config.c.d", "--topology=e", "--config.f.g", "h", "--", "i"]
    others, changes = split_changes(words)
    assert others == ["--workdir", "a", "--config=b", "--topology=e", "--", "i"]
    assert changes == [("c.d", "true"), ("f.g", "h")]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--config.training.stepz=3", ["training.stepz", "training.steps?"]),
        ("--config.vocab.size=3", ["vocab.size", "vocabulary.size?"]),
        ("--config.steps=3", ["config.steps", "training.steps?"]),
        ("--config.modle.d_model=3", ["modle.d_model", "model.d_model?"]),
        ("--config.model.beam_size=3", ["model.beam_size", "training.evaluation.beam_size?"]),
        ("--config.training.optimizer.bata1=0", ["training.optimizer.bata1", "training.optimizer.beta1?"]),
        ("--config.training.warmup_step=0", ["training.warmup_step ", "training.schedule.warmup_steps?"]),
        ("--config.training.evaluate_evry=0", ["training.evaluate_evry", "training.evaluation.every?"]),
        ("--config.training.optimizer=3", ["training.optimizer is a section", "training.optimizer.beta1"]),
        ("--config.data=x", ["config.data", "data.train", "data.rows"]),
        ("--config.zzz=3", ["config.zzz", "data, model, training, vocabulary"]),
        ("--config.training.steps=many", ["training.steps", "'many'", "whole number"]),
        ("--config.training.steps=1.5", ["training.steps", "1.5", "whole number"]),
        ("--config.training.steps", ["training.steps", "whole number"]),
        ("--config.vocabulary.joint=yes", ["vocabulary.joint", "'yes'", "true or false"]),
        ("--config.training.evaluation.alpha=nan", ["training.evaluation.alpha", "nan", "a number"]),
        ("--config.training.schedule.name=cosin", ["training.schedule.name", "'cosin'", "cosine"]),
        ("--config.model.banned_ids=3,x", ["model.banned_ids", "'x'", "whole number"]),
    ],
)
def test_a_mistaken_setting_is_named_with_its_value_and_what_was_meant(write, word, said):
    with pytest.raises(ValueError) as raised:
        experiment(write(SMALL), word)
    for words in said:
        assert words in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_of_this_name", ["line 1", "ModuleNotFoundError", "nothing_of_this_name"]),
        ("\n\ndef get_config():\n    return {}['model']", ["line 4", "KeyError", "model"]),
        ("def get_config(:", ["SyntaxError", "line 1"]),
        (
            SMALL.replace("return config", "config.training.schedule = 'cosine'\n    return config"),
            ["line 10", "TypeError", "training.schedule is training.schedule.name now"],
        ),
        (
            SMALL.replace("return config", "config.data.rows = config.training.warmup_steps\n    return config"),
            ["line 10", "training.warmup_steps is training.schedule.warmup_steps now"],
        ),
        (
            SMALL.replace("Experiment()", "Experiment(training=TrainingConfig(alpha=1.0))").replace(
                "import Experiment", "import Experiment, TrainingConfig"
            ),
            ["alpha is evaluation.alpha now", "evaluation=EvaluationConfig(alpha=1.0)"],
        ),
        ("def get_confg(): pass", ["no function get_config"]),
        ("def get_config(): pass", ["NoneType", "ConfigDict"]),
        ("def get_config(): raise ValueError('choose one of these')", ["choose one of these"]),
    ],
)
def test_a_config_that_cannot_be_read_is_named_with_its_line(write, text, said):
    path = write(text)
    with pytest.raises(ValueError) as raised:
        experiment(path)
    for words in [path, *said]:
        assert words in str(raised.value)


@pytest.mark.parametrize("config", ["configs/none.py", "quickstar", "none/quickstart", ":small", "."])
def test_a_config_that_is_not_there_is_named_with_those_that_are(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="multi30k_en_de, quickstart") as raised:
        experiment(config)
    assert config.partition(":")[0] in str(raised.value)

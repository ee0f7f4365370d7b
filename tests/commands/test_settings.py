"""All settings are listed with what the dataclasses say; a training goes on without a config."""

import json
import re
from pathlib import Path

import pytest

from flax_transformer.commands.config import read_config
from flax_transformer.commands.settings import all_settings
from flax_transformer.experiment import Experiment
from flax_transformer.ranges import setting_fields

DOCS = Path(__file__).parents[2] / "docs"


def listed(run, capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        run("train", *arguments)
    assert not stopped.value.code
    return capsys.readouterr().out


def test_every_setting_is_listed_with_its_default_and_a_meaning(run, capsys):
    shown = listed(run, capsys, "--list_settings")
    fields = setting_fields(Experiment)
    assert [each.name for each in all_settings()] == re.findall(r"^(\S+) = ", shown, re.MULTILINE)
    assert {each.name for each in all_settings()} == fields.keys()
    for each in all_settings():
        assert len(each.meaning) > 8 and each.default == repr(fields[each.name].default)
    assert "training.schedule.warmup_steps = 4000\n    updates until the peak." in shown


def test_the_page_in_docs_is_the_list(run, capsys):
    page = (DOCS / "settings.md").read_text()
    assert page == listed(run, capsys, "--list_settings=markdown"), "run `make settings`"


def test_the_config_of_a_work_directory_is_a_config_that_the_command_line_changes(tmp_path):
    mapping = Experiment().changed({"data.train": "files:a,b", "training.steps": 7}).to_mapping()
    file = tmp_path / "config.json"
    file.write_text(json.dumps(mapping))
    assert Experiment.from_mapping(read_config(str(file), [])) == Experiment.from_mapping(mapping)
    changed = Experiment.from_mapping(read_config(str(file), [("training.steps", "9")]))
    assert changed == Experiment.from_mapping(mapping).changed({"training.steps": 9})


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "cannot be read"), ("[]", "describes a model and no training"), ('{"model": {}}', "--config=finetune:")],
)
def test_a_file_that_is_not_of_a_training_is_refused(text, said, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_config(str(file), [])


def test_without_config_and_without_a_training_the_configs_are_named(fail, tmp_path):
    assert "quickstart" in fail("train", f"--workdir={tmp_path}")

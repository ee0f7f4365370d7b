"""Every command that README and the pages of docs/ show is one that the program understands."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from flax_transformer.__main__ import VERBS, main
from flax_transformer.commands.config import read_config
from flax_transformer.experiment import Experiment

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
START = re.compile(rf"(?:flax-transformer|python -m flax_transformer) (?=(?:{'|'.join(VERBS)})(?: |$))")


def commands_of(page):
    """The arguments of each command in the blocks of a page, whose lines a backslash may continue."""
    lines = "\n".join(line for line in page.read_text("utf-8").split("\n") if line.startswith("    "))
    found = []
    for line in re.sub(r"\\\n\s*", "", lines).split("\n"):
        if (command := START.search(line)) and "..." not in line:
            words = shlex.shlex(line[command.end() :], posix=True, punctuation_chars="|;>")
            words.whitespace_split, words.commenters = True, "#"
            found.append([])
            for word in words:
                if re.fullmatch(r"[|;>]+", word):
                    break
                found[-1].append(word)
    return found


EXAMPLES = [(page.name, words) for page in PAGES for words in commands_of(page)]


def test_the_pages_show_every_verb_and_many_commands():
    assert set(VERBS) == {words[0] for _, words in EXAMPLES} and len(EXAMPLES) > 45


@pytest.mark.parametrize(("page", "words"), EXAMPLES, ids=lambda value: value if isinstance(value, str) else value[0])
def test_a_documented_command_is_understood(page, words, monkeypatch):
    command, parsed = importlib.import_module(f"flax_transformer.commands.{words[0]}"), []
    monkeypatch.setattr(command, "run", parsed.append)
    monkeypatch.chdir(ROOT)
    main([word.replace("=PRICE", "=1") for word in words])
    (options,) = parsed
    if words[0] == "train" and "finetune" not in options.config:  # which reads the model that it begins with
        Experiment.from_mapping(read_config(options.config, options.changes))

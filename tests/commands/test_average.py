import re
import shlex
from functools import partial

import jax
import numpy as np
import pytest

from flax_transformer.decoding.translator import Translator


def test_the_newest_are_averaged_and_the_printed_command_uses_them(run, broken, source):
    said = run("average", "--workdir", broken, "--last=2")
    assert re.search(r"step 3, 2", said)
    command = shlex.split(said.splitlines()[-1])
    assert command[:2] == ["flax-transformer", "translate"]
    translations = run(*command[1:], "--input", source).splitlines()
    averaged = Translator.from_workdir(broken, step="averaged")
    assert translations == averaged.translate(source.read_text(encoding="utf-8").splitlines())
    parts = [Translator.from_workdir(broken, step=step).params for step in (3, 2)]
    mean = jax.tree.map(lambda newest, older: (newest + older) / 2, *parts)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), averaged.params, mean)


def test_the_average_of_one_checkpoint_is_that_checkpoint(run, broken, source):
    assert "step 1" in run("average", "--workdir", broken, "--best=1")  # the best by BLEU
    best = run("translate", "--workdir", broken, "--input", source)
    assert run("translate", "--workdir", broken, "--input", source, "--checkpoint=averaged") == best


@pytest.mark.parametrize("which", ["--last", "--best"])
def test_averaging_more_checkpoints_than_exist_is_an_error_with_their_number(fail, broken, which):
    assert re.search(r"3 .*checkpoints", fail("average", "--workdir", broken, f"{which}=4"))


def test_where_nothing_was_scored_the_newest_are_proposed(fail, broken):
    (broken / "scores.json").unlink()
    assert "has no scored checkpoint: take the newest, --last" in fail("average", "--workdir", broken, "--best=1")


def test_a_missing_folder_is_an_error(fail, tmp_path):
    assert "is not a work directory" in fail("average", "--workdir", tmp_path, "--last=2")


def test_a_missing_average_is_an_error_that_names_the_verb(fail, broken):
    said = fail("translate", "--workdir", broken, "--checkpoint=averaged", given="the cat\n")
    assert "flax-transformer average" in said

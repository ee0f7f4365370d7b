import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from etils.epath import gpath

import flax_transformer.__main__ as program

ROOT = Path(__file__).parents[2]


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )


def test_help_imports_nothing_heavy():
    asked = """
import sys
from flax_transformer.__main__ import VERBS, main
for arguments in ([], *([verb] for verb in VERBS)):
    try:
        main([*arguments, "--help"])
    except SystemExit as stopped:
        assert not stopped.code
print(*sys.modules)
"""
    done = python("-c", asked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: flax-transformer") == 1 + len(program.VERBS)
    modules = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert not modules & {"jax", "flax", "orbax", "tensorflow_datasets", "grain", "matplotlib"}


def test_a_verb_that_fails_has_an_exit_status_and_no_traceback(tmp_path):
    done = python("-m", "flax_transformer", "translate", "--workdir", str(tmp_path), "--input", os.devnull)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(
        r"flax-transformer translate: .* is not a work directory, config.json is missing: .*\n", done.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"flax-transformer: name a verb: train, translate, .* \(see flax-transformer --help\)"),
        (["translat"], r"invalid choice: 'translat' \(choose from .*translate.*average"),
        (["translate"], r"flax-transformer translate: .*--workdir"),
        (["average", "--workdir=x"], r"flax-transformer average: .*--last --best"),
        (["average", "--workdir=x", "--last=2", "--best=2"], r"--best: not allowed with argument --last"),
        (["score", "--workdir=x", "--targte=x"], r"--targte.*--target\?"),
        (["score", "--workdir=x", "x.de", "y.de"], r"unexpected argument x.de"),
        (["train", "--workdir=x", "--data.temperature=5"], "a setting is changed by --config.data.temperature=VALUE"),
        (["train", "--workdir=x", "data.temperature=5"], "a setting is changed by --config.data.temperature=VALUE"),
        (["train", "--workdir=x", "config.data.temperature=5"], "is changed by --config.data.temperature=VALUE"),
        (["train", "--workdir=x", "--confg.training.steps=5"], "is changed by --config.training.steps=VALUE"),
        (["train", "--workdir=x", "-data.temperature=5"], "is changed by --config.data.temperature=VALUE"),
        (["clean", "--source=a", "--target=b", "-held-out=t"], "did you mean --held_out"),
        (["train", "--workdir=x", "quickstart.py"], "a config is named by --config=quickstart.py"),
    ],
)
def test_a_wrong_command_line_is_an_error_of_one_line(fail, unloaded, arguments, message):
    assert re.search(message, fail(*arguments))


def test_ctrl_c_stops_silently(monkeypatch, run, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("flax_transformer.commands.average.run", interrupt)
    with pytest.raises(SystemExit) as stopped:
        run("average", "--workdir=x", "--last=2")
    assert stopped.value.code == 128 + 2  # SIGINT, as a shell reports it
    assert capsys.readouterr().err == ""


PLAN = ["--config=quickstart", "--topology=cpu:1"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("translate", "--workdir=gs://bucket/run", "a dog"),
        ("train", "--config=gs://bucket/config.json", "--workdir=work"),
        ("clean", "--source=gs://bucket/a.kn", "--target=gs://bucket/a.en", "--dry_run"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_name_in_a_bucket_says_what_to_install(arguments, fail, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)  # etils would prefer it
    assert "needs the packages for buckets: pip install 'flax_transformer[gcs]'" in fail(*arguments)


def test_too_little_memory_is_an_error_with_a_remedy(monkeypatch, fail):
    def allocate(options):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 34359738368 bytes.")

    for verb, mine, remedy in (("translate", [], "--batch_tokens"), ("plan", PLAN, "on a machine that has more")):
        monkeypatch.setattr(f"flax_transformer.commands.{verb}.run", allocate)
        assert remedy in fail(verb, *(mine or ["--workdir=x"]))


def damage_config(folder):
    (folder / "config.json").write_text('{"model": {"d_model"')


def drop_model_section(folder):
    (folder / "config.json").write_text("{}")


def drop_vocabulary(folder):
    (folder / "joint.model").unlink()


def damage_vocabulary(folder):
    (folder / "joint.model").write_bytes(b"not a model")


def drop_parameters(folder):
    for file in (folder / "checkpoints" / "1" / "params" / "d").iterdir():
        file.unlink()


def cut_parameters(folder):
    for file in (folder / "checkpoints" / "1" / "params" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:7])


def damage_metadata(folder):
    (folder / "checkpoints" / "1" / "params" / "_METADATA").write_text("{")


def drop_checkpoints(folder):
    for file in (folder / "checkpoints").iterdir():
        file.rename(folder / file.name)


def change_width(folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"d_model": 16', '"d_model": 32'))


def change_vocabulary_size(folder):
    config = folder / "config.json"
    config.write_text(re.sub(r'_vocab_size": \d+', '_vocab_size": 999', config.read_text()))


# If one read fails, Orbax closes its event loop while others are still in progress.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_config, "config.json is damaged"),
        (drop_model_section, "config.json is damaged"),
        (drop_vocabulary, "holds no vocabulary"),
        (damage_vocabulary, "not a SentencePiece model"),
        (drop_parameters, "broken is damaged .*: copy it again, or choose another --checkpoint"),
        (cut_parameters, "broken is damaged .*: copy it again, or choose another --checkpoint"),
        (damage_metadata, "broken is damaged .*: copy it again, or choose another --checkpoint"),
        (drop_checkpoints, "holds no checkpoint"),
        (change_width, "does not fit config.json"),
        (change_vocabulary_size, "does not fit config.json"),
    ],
)
def test_a_damaged_work_directory_is_an_error_of_one_line(fail, broken, damage, message):
    damage(broken)
    said = fail("translate", "--workdir", broken, given="the cat\n")
    assert re.search(message, said) and len(said) < 600

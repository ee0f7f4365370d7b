"""train.py answers --help at once, reports a mistake in one line, and trains."""

import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.workdir import WorkDirectory

ROOT = Path(__file__).parents[1]
QUICKSTART = "--config=configs/quickstart.py"


def train(*arguments, python=()):
    command = [sys.executable, *python, "train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_help_names_the_flags_without_loading_jax():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = train("--help", python=["-X", "importtime"])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown.returncode == 0 and {"--config", "--workdir", "quickstart"} <= set(re.findall(r"[-\w]+", shown.stdout))
    imported = {line.rsplit("|", 1)[-1].strip() for line in shown.stderr.splitlines()}
    assert "argparse" in imported and not {"jax", "flax", "numpy"} & imported
    # Seconds of work, not of waiting: a busy machine is not the program's fault.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([QUICKSTART, "--config.training.stepz=3"], ["training.stepz", "training.steps"]),
        (["--config=configs/none.py"], ["configs/none.py"]),
        (["--config=configs/finetune.py:none"], ["none is not a work directory"]),
        ([QUICKSTART, "--config.data.train=files:none.kn,none.en"], ["cannot read none.kn", "check the path"]),
    ],
    ids=["setting", "config", "start", "corpus"],
)
def test_a_mistake_is_one_line_that_names_it_and_no_traceback(arguments, said, tmp_path):
    ended = train(*arguments, f"--workdir={tmp_path / 'run'}")
    assert ended.returncode not in (0, None)
    (line,) = [line for line in ended.stderr.splitlines() if line.strip()]
    for words in said:
        assert words in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([QUICKSTART], ["--workdir"]),
        (["--workdir=runs/none"], ["--config"]),
        ([QUICKSTART, "--workdir="], ["--workdir", "empty"]),
        ([QUICKSTART, "-workdir=runs/none", "--workdri=runs/none"], ["--workdri", "--workdir?"]),
        (["--config=quickstart", "--workdir", "runs/none", "more"], ["more"]),
        ([QUICKSTART, "--workdir=runs/none", "--process_id=-1"], ["--process_id", "'-1'"]),
        ([QUICKSTART, "--workdir=runs/none", "--distributed=maybe"], ["--distributed", "'maybe'"]),
    ],
)
def test_a_mistaken_flag_is_named_without_a_traceback(arguments, said):
    ended = train(*arguments)
    assert ended.returncode == 1 and ended.stderr.startswith("train.py: ") and ended.stderr.count("\n") == 1
    assert all(words in ended.stderr for words in said)
    assert not (ROOT / "runs" / "none").exists()


REVERSING = """
from ml_collections import ConfigDict

from flax_transformer.config import TransformerConfig
from flax_transformer.experiment import (
    DataConfig,
    EvaluationConfig,
    Experiment,
    ParallelismConfig,
    ScheduleConfig,
    TrainingConfig,
    VocabularyConfig,
)


def get_config(folder):
    return ConfigDict(
        Experiment(
            model=TransformerConfig(
                d_model=32, num_heads=4, d_ff=64, num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.0,
                max_length=12,
            ),
            vocabulary=VocabularyConfig(size=20, byte_fallback=False, model_type="char"),
            data=DataConfig(
                train=f"files:{folder}/train.in,{folder}/train.out",
                valid=f"files:{folder}/valid.in,{folder}/valid.out",
                test=f"files:{folder}/test.in,{folder}/test.out",
                rows=32,
                source_slots=12,
                target_slots=12,
            ),
            training=TrainingConfig(
                steps=600, label_smoothing=0.0, log_every=100, parallelism=ParallelismConfig(layout="jit"),
                schedule=ScheduleConfig(name="cosine", learning_rate=1e-2, warmup_steps=50),
                evaluation=EvaluationConfig(every=600, best_metric="exact_match"),
            ),
        ).to_mapping()
    )
"""


@pytest.mark.slow
def test_the_command_learns_to_reverse_strings_and_the_translator_reverses_them(tmp_path):
    rng = random.Random(0)
    strings = sorted({"".join(rng.choices("abcdefghij", k=rng.randint(1, 6))) for _ in range(3000)})
    rng.shuffle(strings)
    test, valid, training = strings[:100], strings[100:150], strings[150:]
    for split, part in (("train", training), ("valid", valid), ("test", test)):
        (tmp_path / f"{split}.in").write_text("".join(string + "\n" for string in part))
        (tmp_path / f"{split}.out").write_text("".join(string[::-1] + "\n" for string in part))
    (tmp_path / "reversing.py").write_text(REVERSING)
    ended = train(f"--config={tmp_path / 'reversing.py'}:{tmp_path}", f"--workdir={tmp_path / 'run'}")
    assert ended.returncode == 0, ended.stderr
    closing = ended.stdout.splitlines()[-1]
    assert closing.startswith("exact match: ") and "of 100 held-out phrases" in closing

    translations = Translator.from_workdir(tmp_path / "run").translate(test, BeamSearch(beam_size=1))
    right = sum(translation == string[::-1] for translation, string in zip(translations, test, strict=True))
    assert right >= 90
    (measured,) = (line for line in WorkDirectory(tmp_path / "run").read_metrics() if line["kind"] == "test")
    assert measured["exact_match"] == pytest.approx(right)

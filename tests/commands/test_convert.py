import shlex

import pytest

from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.workdir import WorkDirectory


def change_config(path, **changes):
    config = WorkDirectory(path).read_config()
    config["model"] |= changes
    WorkDirectory(path).write_config(config)


@pytest.mark.slow
def test_to_marian_and_back_translates_as_before(run, workdir, source, tmp_path):
    before = run("translate", "--workdir", workdir, "--input", source)
    assert "MarianMTModel" in run("convert", "to-marian", workdir, tmp_path / "marian")
    said = run("convert", "from-marian", tmp_path / "marian", tmp_path / "work")
    assert "1+1 layers, d_model 16, relu, 110 pieces" in said
    command = shlex.split(said.splitlines()[1])
    assert command[:2] == ["flax-transformer", "translate"]
    again = run(*[str(source) if word == "--input=FILE" else word for word in command[1:-1]], "--input", source)
    assert again == before
    assert "--config=finetune:" in said
    assert VocabularyPair.load(tmp_path / "work").source.size == 110


def test_a_checkpoint_can_be_chosen(run, workdir, tmp_path):
    contents = []
    for step in (1, 2):
        run("convert", "to-marian", workdir, tmp_path / str(step), f"--checkpoint={step}")
        contents.append((tmp_path / str(step) / "model.safetensors").read_bytes())
    run("convert", "to-marian", workdir, tmp_path / "chosen")
    assert contents[0] == (tmp_path / "chosen" / "model.safetensors").read_bytes() != contents[1]


def test_to_marian_s_own_format_and_back_translates_as_before(run, broken, source, tmp_path):
    marian = {"positions": "sinusoidal_tensor2tensor", "norm_epsilon": 1e-6, "zero_start": True}
    change_config(broken, **marian, start_id=0, suppressed_ids=[3])  # <unk>
    before = run("translate", "--workdir", broken, "--input", source)
    said = run("convert", "to-marian-native", broken, tmp_path / "marian")
    assert "decoder.yml" in said
    run("convert", "from-marian", tmp_path / "marian" / "model.npz", tmp_path / "work")
    assert run("translate", "--workdir", tmp_path / "work", "--input", source) == before


def test_the_other_conversions_write_what_their_readers_need(run, workdir, tmp_path):
    assert "README.md" in run("convert", "to-ctranslate2", workdir, tmp_path / "ct2", "--quantization=int8")
    assert "weights int8" in (tmp_path / "ct2" / "README.md").read_text()
    assert "translate.py" in run("convert", "to-stablehlo", workdir, tmp_path / "hlo")
    assert (tmp_path / "hlo" / "decode_step.stablehlo").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("to-onnx", "a", "b"), "invalid choice"),
        (("to-marian", "a"), "TO"),
        (("to-marian", "a", "b", "c"), "unexpected argument c"),
        (("to-marian", "a", "b", "--quantization=int8"), "--quantization applies to to-ctranslate2"),
        (("from-marian", "a", "b", "--checkpoint=best"), "--checkpoint applies to work directories"),
        (("to-marian", "a", "b", "--trained_positions"), "--trained_positions applies to from-marian only"),
        (("to-marian", "nowhere", "b"), "nowhere is not a work directory"),
        (("from-marian", "nowhere", "b"), "nowhere is not a folder"),
    ],
)
def test_a_mistake_is_an_error_of_one_line(fail, arguments, match):
    assert match in fail("convert", *arguments)


def test_an_option_that_marian_lacks_is_an_error(fail, broken, tmp_path):
    change_config(broken, norm_epsilon=1e-6)
    assert "model.norm_epsilon is 1e-06" in fail("convert", "to-marian", broken, tmp_path / "marian")
    assert not (tmp_path / "marian").exists()


def test_a_model_of_transformers_is_not_taken_for_a_damaged_work_directory(run, fail, workdir, tmp_path):
    run("convert", "to-marian", workdir, tmp_path / "theirs")
    said = fail("convert", "to-ctranslate2", tmp_path / "theirs", tmp_path / "ct2")
    assert "in the format of transformers: convert it first" in said


def test_an_existing_folder_is_not_changed(fail, workdir, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for way in ("to-marian", "to-marian-native", "to-ctranslate2", "to-stablehlo"):
        assert "exists and is not empty" in fail("convert", way, workdir, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]

import argparse

import jax
import pytest

from flax_transformer.commands.options import (
    add_model_options,
    add_search_options,
    checkpoint,
    explain_damage,
    pair_checkpoints,
    positive,
    search_settings,
    seed,
    whole,
)
from flax_transformer.decoding.settings import BeamSearch, Sampling


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_search_options(parser)
    return search_settings(parser.parse_args(arguments))


def test_options_default_to_those_of_the_library():
    assert parse() == BeamSearch()
    assert parse("--sample") == Sampling()


def test_every_setting_can_be_given():
    limits = ["--min_length=2", "--max_length=9", "--extra_length=4", "--no_repeat_ngram=3"]
    penalty = ["--length_penalty=length", "--alpha=1"]
    common = {"min_length": 2, "max_length": 9, "extra_length": 4, "no_repeat_ngram": 3}
    common |= {"length_penalty": "length", "alpha": 1.0}
    assert parse("--beam_size=7", "--stopping=first", *limits, *penalty) == BeamSearch(
        beam_size=7, stopping="first", **common
    )
    assert parse("--sample", "--temperature=.5", "--top_k=3", "--top_p=.9", *limits, *penalty) == Sampling(
        temperature=0.5, top_k=3, top_p=0.9, **common
    )
    assert parse("--mbr=8", "--top_p=.9") == parse("--sample", "--mbr=8", "--top_p=.9") == Sampling(mbr=8, top_p=0.9)


@pytest.mark.parametrize("option", ["--beam_size=1", "--stopping=first"])
def test_an_option_of_the_other_kind_of_search_is_an_error(option):
    with pytest.raises(ValueError, match=f"{option.partition('=')[0]} applies to beam search only"):
        parse("--sample", option)


def test_an_error_names_the_option():
    with pytest.raises(ValueError, match="^--top_p is 2.0: it must be above 0 and at most 1$"):
        parse("--sample", "--top_p=2")


def test_checkpoints_and_work_directories_pair_up():
    assert pair_checkpoints(["a"], ["best"]) == [("a", "best")]
    assert pair_checkpoints(["a"], [1, 2]) == [("a", 1), ("a", 2)]
    assert pair_checkpoints(["a", "b"], ["best"]) == [("a", "best"), ("b", "best")]
    assert pair_checkpoints(["a", "b"], [1, 2]) == [("a", 1), ("b", 2)]
    with pytest.raises(ValueError, match="2 values of --checkpoint for 3 of --workdir"):
        pair_checkpoints(["a", "b", "c"], [1, 2])


def test_by_default_the_checkpoint_is_the_one_that_training_chose():
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    assert pair_checkpoints(["a"], parser.parse_args(["--workdir=a"]).checkpoint) == [("a", "chosen")]
    assert parser.parse_args(["--workdir=a", "--checkpoint", "best", "3"]).checkpoint == ["best", 3]
    both = parser.parse_args(["--workdir=a", "--workdir=b", "--checkpoint=best", "--checkpoint=3"])
    assert pair_checkpoints(both.workdir, both.checkpoint) == [("a", "best"), ("b", 3)]


def test_values_that_make_no_sense_are_errors_that_name_valid_ones():
    names = ["chosen", "best", "latest", "averaged"]
    assert [checkpoint(text) for text in [*names, "120"]] == [*names, 120]
    message = "'-1': choose chosen, best, latest, averaged or the number of a step"
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        checkpoint("-1")
    assert positive("3") == 3 and positive("1e3") == 1000
    for text in ("0", "-1", "x", "1.5", "nan", "inf", "1e400", str(2**31), str(2**64)):
        with pytest.raises(argparse.ArgumentTypeError, match="give a whole number above 0"):
            positive(text)


def test_any_error_in_reading_names_the_work_directory_and_a_remedy():
    for failure in (KeyError("model"), RuntimeError("cannot parse"), ValueError("NOT_FOUND: " + 999 * "d ")):
        with pytest.raises(ValueError, match=f"runs/a is damaged .{type(failure).__name__}: .*: copy it again"):
            with explain_damage("runs/a"):
                raise failure


def test_errors_of_this_library_keep_their_text():
    with pytest.raises(ValueError, match="^runs/a: beam_size is 0: it must be at least 1$"):
        with explain_damage("runs/a"):
            BeamSearch(beam_size=0)


def test_a_whole_number_may_be_written_with_an_exponent():
    assert [whole(text) for text in ("7", "-2", "1e3", "2.0")] == [7, -2, 1000, 2]
    for text in ("1.5", "1e-3", "many", "", "nan", "inf", "1e400"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}': give a whole number"):
            whole(text)


def test_a_seed_has_at_most_the_32_bits_that_jax_uses():
    assert seed("0") == 0 and seed(str(2**32 - 1)) == 2**32 - 1
    for text in ("-1", str(2**32), str(2**63), str(2**64), "1.5", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}': give a whole number, at least 0 and at most"):
            seed(text)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (f"--extra_length={2**40}", f"--extra_length is {2**40}: it must be at most 1000000"),
        (f"--min_length={2**40}", f"--min_length is {2**40}: it must be at most 1000000"),
        (f"--max_length={2**64}", f"--max_length is {2**64}: it must be at most 1000000"),
        (f"--no_repeat_ngram={2**40}", f"--no_repeat_ngram is {2**40}: it must be at most 100"),
        (f"--beam_size={2**40}", f"--beam_size is {2**40}: it must be at most 10000"),
        ("--alpha=1000", "--alpha is 1000.0: it must be at least -5 and at most 5"),
        ("--alpha=nan", "--alpha is nan: it must be a number, at least -5 and at most 5"),
    ],
)
def test_a_number_that_the_search_does_not_allow_is_an_error_that_names_the_option(option, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        parse(option)


@pytest.mark.parametrize("temperature", ["inf", "nan", "0", "-1", "1e-300", "1e300"])
def test_no_allowed_temperature_makes_logits_nan(temperature):
    with pytest.raises(ValueError, match=r"^--temperature is .*: it must be "):
        parse("--sample", f"--temperature={temperature}")


@pytest.mark.parametrize(
    "error", [MemoryError(), jax.errors.JaxRuntimeError("INTERNAL: no GPU"), RuntimeError("RESOURCE_EXHAUSTED: 8 GB")]
)
def test_a_device_failure_is_not_reported_as_a_damaged_folder(error):
    with pytest.raises(type(error)) as raised, explain_damage("runs/a"):
        raise error
    assert raised.value is error

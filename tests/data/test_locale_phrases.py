"""Tests the guarantees that `locale_phrases` gives, with several pairs of locales and seeds."""

import functools
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from configs.quickstart import get_config
from flax_transformer.data import locale_phrases as module
from flax_transformer.data.corpus import load_corpus
from flax_transformer.data.locale_phrases import locale_phrases

PROGRAM = """
from flax_transformer.data.locale_phrases import locale_phrases
print(ascii(locale_phrases("kn", "en", "train", pairs=1000, seed=3)))
"""


@functools.cache
def corpus(split, pairs=200, seed=0, locales=("kn", "en"), parts=2):
    return locale_phrases(*locales, split, pairs=pairs, seed=seed, parts=parts)


def pairs_of(*arguments, **options):
    return list(zip(*corpus(*arguments, **options), strict=True))


def words(texts):
    return {word for text in texts for word in re.split(r"[\s\d.,:;()–/%-]+", text)}


def test_the_same_seed_gives_the_same_pairs_in_another_process():
    outputs = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        outputs.append(subprocess.check_output([sys.executable, "-c", PROGRAM], env=environment, text=True).strip())
    here = ascii(locale_phrases("kn", "en", "train", pairs=1000, seed=3))
    assert outputs == [here, here]


def test_another_seed_gives_other_pairs():
    assert corpus("test", 100) != corpus("test", 100, seed=1)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_fewer_pairs_are_a_prefix_of_more(split):
    more = pairs_of(split)
    for fewer in (0, 1, 37):
        assert pairs_of(split, fewer) == more[:fewer]


def test_the_requested_number_of_pairs_are_different_and_clean():
    sources, targets = corpus("train", 6_000)
    assert len(sources) == len(targets) == 6_000
    assert len(set(zip(sources, targets, strict=True))) == 6_000
    for text in (*sources, *targets):
        assert text == " ".join(text.split()) != ""
        assert len(text) <= 80


def test_no_text_of_one_split_occurs_in_another_even_across_seeds():
    train, test, valid = corpus("train", 6_000), corpus("test"), corpus("valid", seed=1)
    for side in (0, 1):
        sets = [set(split[side]) for split in (train, test, valid)]
        assert sets[0].isdisjoint(sets[1] | sets[2])
        assert sets[1].isdisjoint(sets[2])


def assert_one_target_for_each_source(*many_pairs):
    targets = {}
    for source, target in (pair for pairs in many_pairs for pair in pairs):
        assert targets.setdefault(source, target) == target, source


@pytest.mark.slow
def test_a_source_has_one_target():
    # Different seeds give the same sources again; within one call each source occurs only once anyway.
    many = [pairs_of("train", 6_000, seed=seed) for seed in (0, 1)]
    assert len({source for pairs in many for source, _ in pairs}) < 12_000, "no source was met twice"
    assert_one_target_for_each_source(*many, pairs_of("test"), pairs_of("valid", seed=1))


def test_a_source_has_one_target_where_cldr_abbreviates_differently():
    # German `März` is both the long and the short name, but in Tamil they differ; `Watt` is the long and short name of
    # a unit.
    for locales in (("de", "ta"), ("de", "en")):
        assert_one_target_for_each_source(
            *(pairs_of("train", 2_000, seed=seed, locales=locales, parts=1) for seed in (0, 1))
        )


def test_held_out_phrases_consist_of_words_that_occur_in_training():
    train = corpus("train", 6_000)
    for held_out in (corpus("test"), corpus("valid", seed=1)):
        for side in (0, 1):
            assert words(held_out[side]) <= words(train[side])


def test_training_data_begins_with_every_name_alone():
    kannada, english = module._locale("kn"), module._locale("en")
    names, values = module._unambiguous(kannada, english)
    atoms = sum(len(kind.atoms) for kind in (*names, *values))
    opening = set(pairs_of("train", 6_000)[:atoms])
    for kind in names:
        assert {(kind.write(kannada, atom), kind.write(english, atom)) for atom in kind.atoms} <= opening


def test_names_are_frequent_enough_to_be_learned():
    text = " | ".join(corpus("train", 6_000)[1])
    for name in ("Kannada", "Iceland", "Swiss franc", "liter", "Wednesday", "April", "Nov", "ago"):
        assert len(re.findall(rf"\b{name}", text)) >= 50 / 10


def test_the_corpus_is_larger_than_two_hundred_thousand_pairs():
    # Capture and recapture: two samples of n out of N share n²/N, and more if some pairs are more probable than others,
    # so n²/shared is a lower bound. Short pairs are left out, because they are few and often shared.
    first, second = ({pair for pair in pairs_of("train", 6_000, seed=seed) if len(pair[1]) > 20} for seed in (0, 1))
    assert len(first) * len(second) / max(1, len(first & second)) > 200_000


def test_parts_limits_the_parts_of_a_phrase():
    single, triple = (corpus("test", 100, parts=parts)[1] for parts in (1, 3))
    assert not any(re.search(r" and .* \d{4}| or |: | \(", text) for text in single)
    assert any(re.search(r"^[^,]+, [^,]+, and |^[^:]+: .+ and ", text) for text in triple)
    assert sum(map(len, triple)) > sum(map(len, single))


@pytest.mark.parametrize("locales", [("de", "ta"), ("pt_BR", "kn"), ("en", "kn")])
def test_other_locales_work(locales):
    train, test = (corpus(split, pairs, locales=locales) for split, pairs in (("train", 1_000), ("test", 50)))
    assert len(set(train[0])) == 1_000 and len(set(test[0])) == 50
    scripts = {"kn": "[\u0c80-\u0cff]", "ta": "[\u0b80-\u0bff]"}
    assert sum(bool(re.search(scripts[locales[1]], text)) for text in train[1]) > 700


def test_kannada_is_paired_with_english():
    # Compares with a dictionary, because all other tests would pass with two columns of nonsense.
    train = dict(pairs_of("train", 6_000))
    assert train["ಭಾರತ"] == "India"
    assert train["ಕನ್ನಡ"] == "Kannada"


def test_the_version_that_makes_the_corpus_is_pinned_and_made_the_phrases_in_the_readme():
    root = Path(__file__).parents[2]
    dependencies = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    (pin,) = (each for each in dependencies if each.startswith("babel"))
    assert pin == f"babel=={importlib.metadata.version('babel')}"
    readme = (root / "README.md").read_text()
    shown = re.findall(r"^ +source  (.+)\n +reference  (.+)$", readme, re.MULTILINE)
    test = get_config().data.test
    corpus = load_corpus(test)
    assert len(shown) >= 2 and set(shown) <= set(zip(corpus.source[:5], corpus.target[:5], strict=True))


def test_a_wrong_argument_is_an_error_with_a_remedy():
    with pytest.raises(ValueError, match="'xx' is not a CLDR locale.*locale_identifiers"):
        locale_phrases("xx", "en", "train", pairs=1)
    with pytest.raises(ValueError, match="'not a locale' is not a CLDR locale"):
        locale_phrases("kn", "not a locale", "train", pairs=1)
    with pytest.raises(ValueError, match="'dev'.*'train', 'valid' or 'test'"):
        locale_phrases("kn", "en", "dev", pairs=1)
    with pytest.raises(ValueError, match="at least 1 part"):
        locale_phrases("kn", "en", "train", pairs=1, parts=0)
    with pytest.raises(ValueError, match="of io-en"):
        locale_phrases("io", "en", "train", pairs=1)


def test_an_exhausted_corpus_says_how_many_pairs_there_are(monkeypatch):
    # Only percentages: at most a thousand sources, most of which both checksums assign to the training split.
    monkeypatch.setattr(module, "VALUES", module.VALUES[-1:])
    with pytest.raises(ValueError, match=r"about \d+ distinct train pairs of up to 1 parts, not 5000: ask for fewer"):
        locale_phrases("kn", "en", "train", pairs=5_000, parts=1)

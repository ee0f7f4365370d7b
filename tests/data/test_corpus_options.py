"""What a corpus's name asks for beside the text: weights, temperature, tags and exchanged sides."""

import dataclasses
import gzip

import numpy as np
import pytest

from flax_transformer.data.corpus import corpus_files, corpus_tags, load_corpus
from flax_transformer.data.epochs import even_ranks, times_in_epoch, training_corpus
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.unreadable import Unreadable
from flax_transformer.experiment import DataConfig, VocabularyConfig


@pytest.fixture
def write(tmp_path):
    def write(name, count):
        text = "".join(f"{name} {number}\t{name} is {number}\n" for number in range(count))
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_a_tag_comes_before_each_source_and_swap_exchanges_the_sides(write):
    path = write("a", 2)
    spec = f"tsv:{path}?tag=<bt> + 2*tsv:{path}?swap&tag=>>kan<< + tsv:{path}?swap"
    corpus = load_corpus(spec)
    assert corpus.source == ["<bt> a 0", "<bt> a 1", ">>kan<< a is 0", ">>kan<< a is 1", "a is 0", "a is 1"]
    assert corpus.target == ["a is 0", "a is 1", "a 0", "a 1", "a 0", "a 1"]
    assert corpus.repeats == [1, 1, 2, 2, 1, 1]
    assert corpus_tags(spec) == ["<bt>", ">>kan<<"] and corpus_files(spec) == [path] * 3


def test_a_tag_is_composed_as_text_is(write):
    path = write("x", 1)
    spec = f"tsv:{path}?tag=<e\u0301>"
    assert load_corpus(spec).source == ["<\u00e9> x 0"] and corpus_tags(spec) == ["<\u00e9>"]


def test_the_characters_of_a_tag_do_not_make_a_sentence_unreadable():
    text = ["the house", "no", "kan not here"]
    vocabulary = VocabularyPair.train(
        text, text, VocabularyConfig(size=30, byte_fallback=False, user_symbols=[">>kan<<"])
    ).source
    assert vocabulary.unknown_characters(">>kan<< no") == ""
    assert Unreadable.of(">>kan<< noż", vocabulary).share == pytest.approx(1 / 3)


def test_a_mistyped_option_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"correct its option \?tga=<bt>: there are \?swap and \?tag=TAG"):
        load_corpus("tsv:t.tsv?tga=<bt>")


@pytest.mark.parametrize("weight", [".5*", "0.5 * ", "0.5*"])
def test_a_weight_may_be_written_with_spaces_and_without_a_zero(write, weight):
    assert load_corpus(f"{weight}tsv:{write('a', 1)}").repeats == [0.5]


def test_a_tag_does_not_hide_that_a_source_is_blank(tmp_path):
    (tmp_path / "a").write_text("one\ttwo\n\tthree\n")
    assert load_corpus(f"tsv:{tmp_path}/a?tag=<bt>").source == ["<bt> one", ""]


def test_options_of_a_kind_and_of_all_kinds_may_be_mixed():
    corpus = load_corpus("locale_phrases:kn:en:valid?pairs=11&swap&parts=1&tag=<p>&seed=3")
    plain = load_corpus("locale_phrases:kn:en:valid?pairs=11&parts=1&seed=3")
    assert (corpus.source, corpus.target) == ([f"<p> {text}" for text in plain.target], plain.source)


def test_a_path_in_quotes_may_contain_options(tmp_path):
    (tmp_path / "a?swap").write_text("one\ttwo\n")
    assert load_corpus(f'tsv:"{tmp_path}/a?swap"').source == ["one"]
    assert load_corpus(f'tsv:"{tmp_path}/a?swap"?swap').source == ["two"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tsv:a?tag=", "give one tag"),
        ("tsv:a?tag=a b", "give one tag"),
        ("tsv:a?tag=<s>", "means nothing else to a vocabulary"),
        ("tsv:a?tag=<0x41>", "means nothing else to a vocabulary"),
        ("tsv:a?tag=a▁b", "means nothing else to a vocabulary"),
        ("tsv:a?tag=<a>&tag=<b>", "give one tag"),
        ("tsv:a?swap&tga=<a>", "option 'tga=<a>' is not known: did you mean 'tag'"),
        ("0.0*tsv:a", "weight 0: give more than 0"),
    ],
)
def test_wrong_options_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(spec)


def test_a_corpus_may_be_compressed(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"one\n"))
    (tmp_path / "b").write_text("two\n")
    assert load_corpus(f"files:{tmp_path}/a.gz,{tmp_path}/b").source == ["one"]


def shares(spec, temperature):
    """What part of the pairs of an epoch each source of the corpus has, on average."""
    corpus = load_corpus(spec, temperature)
    names = [text.split()[0] for text in corpus.source]
    total = sum(corpus.repeats)
    return {
        name: sum(times for times, each in zip(corpus.repeats, names, strict=True) if each == name) / total
        for name in dict.fromkeys(names)
    }


def test_temperature_one_gives_corpora_their_sizes_shares_and_more_evens_them(write):
    spec = f"tsv:{write('big', 900)} + tsv:{write('small', 100)}"
    assert shares(spec, 1) == {"big": 0.9, "small": 0.1}
    assert load_corpus(spec, 1) == load_corpus(spec)
    assert shares(spec, 2) == pytest.approx({"big": 0.75, "small": 0.25})  # 30 : 10
    assert shares(spec, 1000) == pytest.approx({"big": 0.5, "small": 0.5}, abs=0.001)
    assert shares(f"tsv:{write('big', 900)} + 9*tsv:{write('small', 100)}", 5) == pytest.approx(
        {"big": 0.5, "small": 0.5}
    )
    repeats = load_corpus(spec, 5).repeats
    assert sum(repeats) == pytest.approx(1000)
    assert repeats == [round(each, 9) for each in repeats]  # the last bits of a power differ between processors


def test_the_fingerprint_of_whole_weights_is_what_it_was_and_others_differ(write):
    path = write("a", 3)
    whole, half = load_corpus(f"2*tsv:{path}"), load_corpus(f"0.5*tsv:{path}")
    assert whole.fingerprint() == dataclasses.replace(whole, repeats=[2, 2, 2]).fingerprint()
    others = [dataclasses.replace(whole, repeats=[times] * 3).fingerprint() for times in (0.5, 0.25, 1, 2, 1.5)]
    assert others[0] == half.fingerprint() and len(set(others)) == 5 and others[3] == whole.fingerprint()


def test_a_real_weight_is_kept_in_each_epoch_and_evenly_over_epochs():
    repeats = np.array([0.3] * 70 + [2.0] * 20 + [1.75] * 40)
    ranks = even_ranks(repeats, np.random.default_rng(5))
    epochs = np.array([times_in_epoch(repeats, ranks, epoch) for epoch in range(40)])
    assert ((epochs == np.floor(repeats)) | (epochs == np.ceil(repeats))).all()
    for part, expected in ((slice(70), 21), (slice(70, 90), 40), (slice(90, None), 70)):
        assert np.abs(epochs[:, part].sum(axis=1) - expected).max() <= 1
    assert epochs.sum(axis=0) == pytest.approx(40 * repeats, abs=1)


def test_the_rows_of_an_epoch_have_the_shares_that_the_temperature_gives(write):
    spec = f"tsv:{write('big', 90)} + tsv:{write('small', 10)}"
    text = load_corpus(spec, 2)
    vocabularies = VocabularyPair.train(
        text.source, text.target, VocabularyConfig(size=40, byte_fallback=False, model_type="char")
    )
    corpus = training_corpus(text, vocabularies, DataConfig(rows=1, seed=3), max_length=64)
    found = np.zeros(100, int)
    step = 0
    for epoch in range(4):
        rows = corpus._size(epoch)[0]
        times = np.bincount(
            [pair for row in range(step, step + rows) for pair in corpus.example_ids(row)], minlength=100
        )
        step += rows
        assert abs(times[:90].sum() - 75) <= 1 and abs(times[90:].sum() - 25) <= 1
        found += times
    assert found[:90].max() - found[:90].min() <= 1 and found[90:].tolist() == [10] * 10

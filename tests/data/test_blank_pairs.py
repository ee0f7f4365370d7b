"""Pairs with a blank side are left out of training and counted."""

import numpy as np
import pytest
from etils import epath

from flax_transformer.data.corpus import ParallelText
from flax_transformer.data.pipeline import PackedCorpus
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import DataConfig, VocabularyConfig

SOURCE = [f"the {word} fox ran" for word in "quick brown lazy old red slow".split()] * 5
TARGET = [sentence.upper() for sentence in SOURCE]
BLANK = ["", "  ", "\t\r", "\u3000", "\u200b", "\ufeff\u200c"]


@pytest.fixture(scope="module")
def vocabularies():
    return VocabularyPair.train(SOURCE, TARGET, VocabularyConfig(size=70, byte_fallback=False))


def pack(vocabularies, source, target, **options):
    config = DataConfig(rows=4, source_slots=32, target_slots=32)
    text = ParallelText(source, target, [1 + number % 2 for number in range(len(source))])
    return PackedCorpus.from_text(text, vocabularies, config, max_length=30, **options)


@pytest.mark.parametrize("blank", BLANK, ids=ascii)
@pytest.mark.parametrize("sides", ["source", "target", "both"])
def test_a_pair_with_a_blank_side_is_in_no_batch_and_is_counted(vocabularies, blank, sides):
    source, target = SOURCE.copy(), TARGET.copy()
    for number in (2, 5):
        if sides != "target":
            source[number] = blank
        if sides != "source":
            target[number] = blank
    corpus = pack(vocabularies, source, target)
    assert corpus.blank == (2, 5) and not len(corpus.too_long)
    assert set(corpus.packing.pairs.tolist()) == set(range(len(SOURCE))) - {2, 5}
    for batch in corpus.one_epoch():
        assert np.array_equal(np.unique(batch.source.segments), np.unique(batch.target.segments))


def test_a_blank_pair_that_is_too_long_is_counted_once(vocabularies):
    corpus = pack(vocabularies, [*SOURCE, "the fox " * 40], [*TARGET, ""])
    assert corpus.blank == (len(SOURCE),) and not len(corpus.too_long)


def test_blank_pairs_are_counted_from_the_cache_too(vocabularies, tmp_path):
    for _ in range(2):
        corpus = pack(vocabularies, [*SOURCE, "the fox"], [*TARGET, " "], cache=epath.Path(tmp_path))
        assert corpus.blank == (len(SOURCE),)


def test_a_corpus_of_blank_pairs_alone_is_an_error(vocabularies):
    with pytest.raises(ValueError, match="each of 30 sentence pairs has a blank side"):
        pack(vocabularies, SOURCE, [""] * len(SOURCE))

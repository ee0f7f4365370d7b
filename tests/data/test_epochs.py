"""Epochs with subword sampling: each holds every pair once, and each batch is a pure function of its step."""

import dataclasses
import itertools
import json
import threading
from collections import Counter

import jax
import numpy as np
import pytest
from etils import epath

from flax_transformer.data.corpus import ParallelText
from flax_transformer.data.epochs import Ahead, ChangingCorpus, EpochSizes, training_corpus
from flax_transformer.data.marian_vocabulary import MarianVocabulary
from flax_transformer.data.pipeline import PackedCorpus, Packing
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import DataConfig, VocabularyConfig

WORDS = "whenever quiet children walked home along river they kept singing about seven brave travellers".split()
RNG = np.random.default_rng(0)
TEXT = ParallelText(
    [" ".join(RNG.choice(WORDS, RNG.integers(1, 7))) for _ in range(61)],
    [" ".join(RNG.choice(WORDS, RNG.integers(1, 9))) for _ in range(60)] + [" "],
    [1] * 61,
)
WEIGHTED = dataclasses.replace(TEXT, repeats=[(0.5, 1.0, 1.75)[number % 3] for number in range(61)])
SIZES = {"bpe": 75, "unigram": 42}
CONFIG = DataConfig(rows=5, source_slots=41, target_slots=53, source_sampling=0.3, target_sampling=0.2, seed=7)


@pytest.fixture(scope="module", params=["bpe", pytest.param("unigram", marks=pytest.mark.slow)])
def vocabularies(request):
    return VocabularyPair.train(
        TEXT.source,
        TEXT.target,
        VocabularyConfig(size=SIZES[request.param], byte_fallback=False, model_type=request.param),
    )


def build(vocabularies, *, max_length=64, multiple=1, host=0, num_hosts=1, cache=None, text=TEXT, **config):
    config = dataclasses.replace(CONFIG, **config)
    return training_corpus(
        text,
        vocabularies,
        config,
        max_length=max_length,
        multiple=multiple,
        host=host,
        num_hosts=num_hosts,
        cache=cache,
    )


def sentences(tokens):
    """The ids of each sentence of a batch's side, row after row."""
    found = []
    for ids, segments in zip(tokens.ids, tokens.segments, strict=True):
        found += [ids[segments == number].tolist() for number in range(1, segments.max(initial=0) + 1)]
    return found


def equal(batch, other):
    return all(map(np.array_equal, jax.tree.leaves(batch), jax.tree.leaves(other)))


def rows_of_epochs(corpus, count):
    """The first step and the last of each of the first epochs of a corpus with one row in a batch."""
    ends = list(itertools.accumulate(corpus._size(epoch)[0] for epoch in range(count)))
    return list(zip([0, *ends], ends, strict=False))


def test_an_epoch_holds_every_pair_once_and_its_text_is_the_pair_s(vocabularies):
    corpus = build(vocabularies, rows=1)
    assert isinstance(corpus, ChangingCorpus) and corpus.blank == (60,)
    fits = [number for number in range(60) if number not in set(corpus.too_long.tolist())]
    assert len(fits) > 50
    segmentations = []
    for start, stop in rows_of_epochs(corpus, 4):
        pairs = [pair for step in range(start, stop) for pair in corpus.example_ids(step)]
        assert sorted(pairs) == fits
        batches = [corpus.batch(step) for step in range(start, stop)]
        source = [ids for batch in batches for ids in sentences(batch.source)]
        target = [ids for batch in batches for ids in sentences(batch.target)]
        assert vocabularies.source.decode(source) == [TEXT.source[pair] for pair in pairs]
        assert vocabularies.target.decode(target) == [TEXT.target[pair] for pair in pairs]
        segmentations.append({pair: tuple(ids) for pair, ids in zip(pairs, source, strict=True)})
    changed = [pair for pair in fits if len({segmentation[pair] for segmentation in segmentations}) > 1]
    assert len(changed) > 5


def test_sides_vary_separately(vocabularies):
    still = vocabularies.target.encode(TEXT.target)
    corpus = build(vocabularies, target_sampling=0.0, rows=1)
    for start, stop in rows_of_epochs(corpus, 2):
        for step in range(start, stop):
            assert sentences(corpus.batch(step).target) == [still[pair] for pair in corpus.example_ids(step)]


def test_each_epoch_shuffles_the_pairs_before_packing_and_the_rows_after_it(vocabularies, monkeypatch):
    pairs, pack = [], Packing.in_order
    monkeypatch.setattr(
        Packing, "in_order", staticmethod(lambda shuffled, *rest: pairs.append(shuffled) or pack(shuffled, *rest))
    )
    corpus = build(vocabularies, rows=1)
    epochs = [corpus._make(number) for number in range(3)]
    first_rows = [tuple(epoch.order[epoch.order < 10].tolist()) for epoch in epochs]
    assert len({*first_rows, tuple(range(10))}) == 4
    first_pairs = [tuple(shuffled[shuffled < 10].tolist()) for shuffled in pairs[-3:]]
    assert len({*first_pairs, tuple(range(10))}) == 4


@pytest.mark.parametrize("text", [TEXT, WEIGHTED], ids=["whole", "weighted"])
def test_a_batch_is_the_same_whatever_was_read_before(vocabularies, tmp_path, text):
    corpus = build(vocabularies, text=text)
    forwards = [corpus.batch(step) for step in range(40)]
    assert all(equal(corpus.batch(step), forwards[step]) for step in (39, 0, 17, 3))
    cache = epath.Path(tmp_path)
    for _ in range(2):  # without a cache file, and with it
        resumed = build(vocabularies, cache=cache, text=text)
        assert equal(resumed.batch(33), forwards[33]) and resumed.example_ids(33) == corpus.example_ids(33)
        assert all(map(equal, resumed.batches(21, 24), forwards[21:24]))


def test_a_resumed_training_makes_only_the_epochs_that_it_reads(vocabularies, tmp_path, monkeypatch):
    cache = epath.Path(tmp_path)
    expected = build(vocabularies, cache=cache, rows=1).batch(100)
    made = []
    make = ChangingCorpus._make
    monkeypatch.setattr(ChangingCorpus, "_make", lambda self, number: made.append(number) or make(self, number))
    corpus = build(vocabularies, cache=cache, rows=1)
    assert corpus.epoch_steps > 0 and not made
    assert equal(corpus.batch(100), expected)
    assert min(made) >= 2 and made[0] == len([end for _, end in rows_of_epochs(corpus, made[0]) if end <= 100])


def test_epochs_are_made_once_though_batches_span_them(vocabularies, monkeypatch):
    made = []
    make = ChangingCorpus._make
    monkeypatch.setattr(ChangingCorpus, "_make", lambda self, number: made.append(number) or make(self, number))
    corpus = build(vocabularies)
    epochs = [{epoch.order.tobytes() for epoch, _ in corpus._places(step)} for step in range(40)]
    assert max(map(len, epochs)) > 1
    assert made == list(range(len(made))) and len(made) > 3


def test_many_epochs_are_not_written_one_by_one(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("flax_transformer.data.epochs.write_file", lambda path, content: written.append(content))
    sizes = EpochSizes(epath.Path(tmp_path / "sizes.json"))
    for epoch in range(2000):
        sizes.add(epoch, 1, 5)
    assert len(sizes.found) == 2000 and 100 < len(written) < 500
    assert len(json.loads(written[-1])) > 1980


@pytest.mark.parametrize("damage", [b"", b"[[1", b'{"a": 1}', b"[[1, 2, 3]]"])
def test_a_damaged_file_of_sizes_is_counted_again(vocabularies, tmp_path, damage):
    cache = epath.Path(tmp_path)
    expected = build(vocabularies, cache=cache).batch(20)
    (file,) = cache.glob("train_epochs-*.json")
    whole = file.read_bytes()
    file.write_bytes(damage)
    assert equal(build(vocabularies, cache=cache).batch(20), expected)
    written = json.loads(file.read_bytes())
    assert written and json.loads(whole)[: len(written)] == written


def test_weights_that_leave_no_pair_for_an_epoch_are_refused(vocabularies):
    text = ParallelText(["river"] * 4, ["quiet river"] * 4, [0.1] * 4)
    with pytest.raises(ValueError, match="an epoch has 0.4 sentence pairs: raise them"):
        build(vocabularies, text=text)


@pytest.mark.parametrize("text", [TEXT, WEIGHTED], ids=["whole", "weighted"])
def test_three_hosts_share_the_batch_of_one_host(vocabularies, text):
    whole = build(vocabularies, multiple=6, text=text)
    parts = [build(vocabularies, multiple=6, host=host, num_hosts=3, text=text) for host in range(3)]
    for step in range(25):  # across several epochs
        batches = [part.batch(step) for part in parts]
        assert equal(jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches), whole.batch(step))


def test_another_seed_or_strength_gives_other_tokens(vocabularies):
    corpora = [build(vocabularies, **changes) for changes in ({}, {"seed": 8}, {"source_sampling": 0.4})]
    for one, other in itertools.combinations(corpora, 2):
        assert not all(equal(one.batch(step), other.batch(step)) for step in range(20))


def test_a_pair_that_a_segmentation_makes_too_long_keeps_its_shortest(vocabularies):
    lengths = [len(ids) for ids in vocabularies.source.encode(TEXT.source)]
    limit = max(lengths)
    corpus = build(vocabularies, rows=1, max_length=limit, source_slots=64, target_slots=64, source_sampling=0.9)
    start, stop = rows_of_epochs(corpus, 1)[0]
    assert max(len(ids) for step in range(start, stop) for ids in sentences(corpus.batch(step).source)) <= limit
    found = Counter(pair for step in range(start, stop) for pair in corpus.example_ids(step))
    assert set(found.values()) == {1} and len(found) == 60 - len(corpus.too_long)


def test_without_sampling_and_with_whole_weights_the_corpus_is_packed_once(vocabularies):
    corpus = build(vocabularies, source_sampling=0.0, target_sampling=0.0)
    assert isinstance(corpus, PackedCorpus)
    alone = PackedCorpus.from_text(TEXT, vocabularies, CONFIG, max_length=64)
    assert equal(corpus.batch(3), alone.batch(3))


def test_the_fill_rate_is_that_of_the_first_epoch(vocabularies):
    corpus = build(vocabularies, rows=1)
    start, stop = rows_of_epochs(corpus, 1)[0]
    used = sum(
        (side.segments > 0).sum()
        for step in range(start, stop)
        for side in (corpus.batch(step).source, corpus.batch(step).target)
    )
    assert corpus.fill_rate == pytest.approx(used / (corpus.num_rows * (41 + 53)))
    assert corpus.epoch_steps == corpus.num_rows == stop


def test_vocabularies_with_one_segmentation_of_a_sentence_are_refused(vocabularies):
    converted = MarianVocabulary.of(vocabularies.source)
    with pytest.raises(ValueError, match="comes from a converted model: set both to 0"):
        build(VocabularyPair(converted, converted))
    letters = VocabularyConfig(model_type="char", byte_fallback=False)
    with pytest.raises(ValueError, match='this one has "char": set both to 0'):
        build(VocabularyPair.train(TEXT.source, TEXT.target, letters))


def test_the_next_item_is_made_ahead_and_an_error_is_raised_where_it_is_wanted():
    made = {number: threading.Event() for number in range(5)}

    def make(number):
        made[number].set()
        if number == 2:
            raise ValueError("no second")
        return number * 10

    ahead = Ahead(make)
    assert ahead.get(0) == 0 and made[1].wait(10)
    assert ahead.get(1) == 10
    with pytest.raises(ValueError, match="no second"):
        ahead.get(2)
    assert ahead.get(1) == 10 and ahead.get(0) == 0

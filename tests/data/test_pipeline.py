import dataclasses
import os
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from flax_transformer.data import pipeline
from flax_transformer.data.corpus import ParallelText, load_corpus
from flax_transformer.data.pipeline import OPEN_ROWS, PackedCorpus, Packing, TokenSide, pack
from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import DataConfig, VocabularyConfig

PAIRS, ROWS, SOURCE_SLOTS, TARGET_SLOTS = 41, 5, 20, 24
EOS = 2


def sentences(lengths, first_id):
    """Sentence n consists of the id `first_id + n`, so that it can be recognised everywhere."""
    return [[first_id + number] * (length - 1) + [EOS] for number, length in enumerate(lengths)]


SOURCE = sentences(np.random.default_rng(0).integers(2, 12, PAIRS), 100)
TARGET = sentences(np.random.default_rng(1).integers(2, 15, PAIRS), 200)


def build(source=SOURCE, target=TARGET, *, repeats=None, max_length=100, multiple=1, host=0, num_hosts=1, **config):
    config = DataConfig(**{"rows": ROWS, "source_slots": SOURCE_SLOTS, "target_slots": TARGET_SLOTS, **config})
    sides = TokenSide.join(source), TokenSide.join(target)
    packing = Packing.plan(*sides, [1] * len(source) if repeats is None else repeats, config, max_length)
    return PackedCorpus(*sides, packing, config, multiple=multiple, host=host, num_hosts=num_hosts)


def rows_of(corpus):
    return [corpus.packing[row].tolist() for row in range(corpus.num_rows)]


def read_back(batch):
    """The pairs of ids in each row, by segment."""
    return [
        [
            tuple(tokens[row][segments[row] == number].tolist() for tokens, segments in sides_of(batch))
            for number in range(1, batch.source.segments[row].max() + 1)
        ]
        for row in range(len(batch.source.ids))
    ]


def sides_of(batch):
    return (batch.source.ids, batch.source.segments), (batch.target.ids, batch.target.segments)


def pairs_in(batch):
    return [pair for row in read_back(batch) for pair in row]


def equal(batch, other):
    return all(map(np.array_equal, jax.tree.leaves(batch), jax.tree.leaves(other)))


def test_a_batch_has_the_pairs_of_example_ids_in_that_order():
    corpus = build()
    for step in range(20):
        assert pairs_in(corpus.batch(step)) == [(SOURCE[pair], TARGET[pair]) for pair in corpus.example_ids(step)]


def test_the_sentences_of_a_row_are_numbered_from_one_and_padding_is_zero():
    for batch in build().batches(0, 20):
        assert batch.source.ids.shape == (ROWS, SOURCE_SLOTS) and batch.target.ids.shape == (ROWS, TARGET_SLOTS)
        assert all(leaf.dtype == np.int32 for leaf in jax.tree.leaves(batch))
        for tokens in (batch.source, batch.target):
            segments, positions = tokens.segments, tokens.positions
            for row in range(ROWS):
                used = int((segments[row] > 0).sum())
                numbers, lengths = np.unique(segments[row, :used], return_counts=True)
                assert numbers.tolist() == list(range(1, len(numbers) + 1))
                assert segments[row, :used].tolist() == np.repeat(numbers, lengths).tolist()
                assert positions[row, :used].tolist() == [place for length in lengths for place in range(length)]
                for leaf in jax.tree.leaves(tokens):
                    assert (leaf[row, used:] == 0).all()


def test_both_sides_of_a_row_have_the_same_segments():
    for batch in build().batches(0, 20):
        assert np.array_equal(batch.source.segments.max(1), batch.target.segments.max(1))


@pytest.mark.parametrize("repeats", [[1] * PAIRS, [number % 4 for number in range(PAIRS)]], ids=["once", "0 to 3"])
def test_an_epoch_has_every_pair_as_often_as_repeats_says(repeats):
    corpus = build(repeats=repeats)
    epoch_rows = corpus.num_rows
    assert epoch_rows % ROWS  # so that batches run across the epochs' boundaries
    assert corpus.epoch_steps == epoch_rows / ROWS
    row_ids = np.concatenate([corpus.row_ids(step) for step in range(epoch_rows)])
    for epoch in row_ids.reshape(ROWS, epoch_rows):
        assert sorted(epoch) == list(range(epoch_rows))
        read = Counter(pair for row in epoch.tolist() for pair in corpus.packing[row].tolist())
        assert read == +Counter(dict(enumerate(repeats)))
    # `epoch_rows` batches of ROWS rows are ROWS epochs.
    read = Counter(pair[0] - 100 for step in range(epoch_rows) for (pair, _) in pairs_in(corpus.batch(step)))
    assert read == +Counter({pair: ROWS * times for pair, times in enumerate(repeats)})


def test_each_epoch_has_a_different_order():
    corpus = build(rows=1)
    epochs = np.array([corpus.row_ids(step)[0] for step in range(3 * corpus.num_rows)]).reshape(3, -1)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_batch_larger_than_the_corpus_spans_several_epochs():
    corpus = build(SOURCE[:7], TARGET[:7], rows=11)
    assert corpus.num_rows < 11
    counts = Counter(pair for step in range(corpus.num_rows) for pair in corpus.example_ids(step))
    assert counts == dict.fromkeys(range(7), 11)


def test_a_batch_depends_only_on_its_step():
    corpus = build()
    forwards = [corpus.batch(step) for step in range(30)]
    assert all(equal(corpus.batch(step), forwards[step]) for step in reversed(range(30)))
    assert all(equal(build().batch(step), forwards[step]) for step in (0, 29, 7))
    assert not equal(forwards[0], forwards[1])


def test_another_seed_changes_packing_and_order():
    corpus, other = build(), build(seed=1)
    assert not equal(corpus.batch(0), other.batch(0))
    assert set(map(frozenset, rows_of(corpus))) != set(map(frozenset, rows_of(other)))


@pytest.mark.parametrize("multiple", [1, 2, 3, 8])
def test_the_number_of_devices_only_adds_empty_rows(multiple):
    plain, filled = build().batch(3), build(multiple=multiple).batch(3)
    height = len(filled.source.ids)
    assert height % multiple == 0 and ROWS <= height < ROWS + multiple
    assert equal([leaf[:ROWS] for leaf in jax.tree.leaves(filled)], plain)
    assert not any(leaf[ROWS:].any() for leaf in jax.tree.leaves(filled))


def test_a_pair_with_too_long_a_side_is_counted_and_left_out():
    source = sentences([SOURCE_SLOTS, SOURCE_SLOTS + 1, 5, 5, 5], 100)
    target = sentences([TARGET_SLOTS, 5, TARGET_SLOTS, TARGET_SLOTS + 1, 5], 200)
    corpus = build(source, target)
    assert corpus.too_long.tolist() == [1, 3]
    assert sorted(corpus.packing.pairs) == [0, 2, 4]
    assert build(source, target, max_length=5).too_long.tolist() == [0, 1, 2, 3]
    assert build(source, target, max_length=SOURCE_SLOTS).too_long.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("pairs", [0, PAIRS])
def test_a_corpus_without_a_pair_that_fits_is_an_error_with_a_remedy(pairs):
    with pytest.raises(ValueError, match=f"none of {pairs} sentence pairs fits into 1 source .*raise .*max_length"):
        build(SOURCE[:pairs], TARGET[:pairs], max_length=1)


def test_rows_are_within_their_slots_and_have_each_pair_once():
    source, target = np.random.default_rng(2).integers(1, 20, (2, 3000))
    row_of_pair = pack(source, target, 20, 22)
    count = row_of_pair.max() + 1
    assert count > 2 * OPEN_ROWS  # so that rows were closed to make room
    assert row_of_pair.shape == (3000,) and set(row_of_pair) == set(range(count))
    for row in range(count):
        assert source[row_of_pair == row].sum() <= 20 and target[row_of_pair == row].sum() <= 22


def test_the_pairs_of_a_row_have_the_order_of_the_shuffle():
    sides = [TokenSide.join(sentences(np.random.default_rng(4).integers(1, 20, 3000), 100))] * 2
    packing = Packing.plan(*sides, [1] * 3000, DataConfig(seed=5, source_slots=301, target_slots=307), 20)
    place = np.argsort(np.random.default_rng([5, 0]).permutation(3000))
    assert all((np.diff(place[packing[row]]) > 0).all() for row in range(len(packing)))


def test_a_pair_is_put_into_a_row_with_room_on_both_sides():
    # Pair 2 has room on either side of row 0 but not on both; pair 3 still goes there.
    assert pack(np.array([4, 2, 3, 4]), np.array([2, 5, 4, 1]), 10, 10).tolist() == [0, 0, 1, 0]


def test_lengths_like_multi30k_fill_nine_slots_of_ten():
    rng = np.random.default_rng(3)
    source = np.clip(rng.lognormal(np.log(14), 0.35, 4000), 3, 50).astype(int)
    target = np.clip(source * rng.normal(1.05, 0.2, 4000), 3, 60).astype(int)
    corpus = build(sentences(source, 100), sentences(target, 200), rows=32, source_slots=64, target_slots=64)
    assert not len(corpus.too_long)
    assert corpus.fill_rate >= 0.9


def test_the_fill_rate_equals_that_of_an_epoch():
    corpus = build()
    segments = [leaf for batch in corpus.one_epoch() for _, leaf in sides_of(batch)]
    slots = corpus.num_rows * (SOURCE_SLOTS + TARGET_SLOTS)
    assert corpus.fill_rate == pytest.approx(sum((leaf > 0).sum() for leaf in segments) / slots)


def test_real_multi30k_fills_nine_slots_of_ten():
    raw = Path(os.environ.get("FLAX_TRANSFORMER_DATA", ""), "multi30k", "raw")
    if not (raw / "train.en").exists():
        pytest.skip("set FLAX_TRANSFORMER_DATA to the folder that holds multi30k/raw/train.en and train.de")
    text = load_corpus(f"files:{raw}/train.en,{raw}/train.de")
    vocabularies = VocabularyPair.train(text.source, text.target, VocabularyConfig(size=4000, max_sentences=10_000))
    corpus = PackedCorpus.from_text(text, vocabularies, DataConfig(), max_length=256)
    assert corpus.fill_rate >= 0.9
    assert len(corpus.too_long) < 0.001 * len(text)


def test_batches_returns_any_range_of_steps_in_order():
    corpus = build(multiple=3)
    for start, stop in ((0, 9), (5, 9), (8, 9), (1000, 1003), (4, 4)):
        batches = list(corpus.batches(start, stop))
        assert len(batches) == stop - start
        assert all(equal(batch, corpus.batch(step)) for step, batch in enumerate(batches, start))


def test_one_epoch_visits_each_row_once_and_fills_up_the_last_batch():
    corpus = build(multiple=3)
    batches = list(corpus.one_epoch())
    assert corpus.num_rows % ROWS
    assert {batch.source.ids.shape for batch in batches} == {(6, SOURCE_SLOTS)}
    rows = [row for batch in batches for row in read_back(batch) if row]
    assert rows == [[(SOURCE[pair], TARGET[pair]) for pair in row] for row in rows_of(corpus)]


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 5, 11])
def test_the_parts_of_all_hosts_together_equal_the_batch_of_one_host(num_hosts, rows):
    whole = build(rows=rows, multiple=8)
    hosts = [build(rows=rows, multiple=8, host=host, num_hosts=num_hosts) for host in range(num_hosts)]
    height = -(-rows // 8) * 8
    steps = range(2 * whole.num_rows // rows)  # across the epochs' boundary
    for expected, *parts in [
        *([corpus.batch(step) for corpus in (whole, *hosts)] for step in steps),
        *zip(*(corpus.batches(1, 4) for corpus in (whole, *hosts)), strict=True),
        *zip(*(corpus.one_epoch() for corpus in (whole, *hosts)), strict=True),
    ]:
        assert {leaf.shape[0] for part in parts for leaf in jax.tree.leaves(part)} == {height // num_hosts}
        assert equal(jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts), expected)
    assert all(host.example_ids(step) == whole.example_ids(step) for host in hosts for step in steps)


@pytest.mark.parametrize("wrong", [{"multiple": 3}, {"multiple": 4, "host": 2}, {"multiple": 4, "host": -1}])
def test_hosts_that_do_not_share_a_batch_evenly_are_refused(wrong):
    with pytest.raises(AssertionError, match="num_hosts is 2"):
        build(num_hosts=2, **wrong)


TEXT = ParallelText(
    ["a cat sat", "no dog", "a dog sat on a cat", "do", "on a cat"],
    ["ek", "do teen", "chaar", "do", "k"],
    [1, 2, 1, 1, 3],
)
LETTERS = VocabularyConfig(size=60, byte_fallback=False, joint=False, model_type="char")


@pytest.fixture(scope="module")
def vocabularies():
    return VocabularyPair.train(TEXT.source, TEXT.target, LETTERS)


@pytest.fixture
def tokenised(monkeypatch):
    """Collects how many sentences each call of a vocabulary encodes."""
    counts = []

    def encode(vocabulary, sentences, original=Vocabulary.encode):
        counts.append(len(sentences))
        return original(vocabulary, sentences)

    monkeypatch.setattr(Vocabulary, "encode", encode)
    return counts


def test_batches_have_the_ids_that_the_vocabularies_give(vocabularies):
    corpus = PackedCorpus.from_text(TEXT, vocabularies, DataConfig(rows=3), max_length=64)
    encoded = zip(vocabularies.source.encode(TEXT.source), vocabularies.target.encode(TEXT.target), strict=True)
    found = [pair for batch in corpus.one_epoch() for pair in pairs_in(batch)]
    assert sorted(found) == sorted(
        pair for pair, times in zip(encoded, TEXT.repeats, strict=True) for _ in range(times)
    )


def test_tokenising_in_parts_makes_no_difference(vocabularies, monkeypatch):
    whole = TokenSide.join(vocabularies.source.encode(TEXT.source))
    for at_once in (1, 2, 5, 7):
        monkeypatch.setattr(pipeline, "TOKENISED_AT_ONCE", at_once)
        side = TokenSide.encode(vocabularies.source, TEXT.source)
        assert np.array_equal(side.tokens, whole.tokens) and np.array_equal(side.starts, whole.starts)
        assert side.tokens.dtype == np.int32
    assert TokenSide.encode(vocabularies.source, []).starts.tolist() == [0]


def test_no_more_sentences_are_tokenised_at_once_than_memory_is_meant_to_hold(vocabularies, monkeypatch, tokenised):
    monkeypatch.setattr(pipeline, "TOKENISED_AT_ONCE", 2)
    PackedCorpus.from_text(TEXT, vocabularies, DataConfig(rows=3), max_length=64)
    assert tokenised == [2, 2, 1] * 2


CONFIG = DataConfig(rows=3, source_slots=19, target_slots=13)
AS_FIRST_MADE = {"text": TEXT, "config": CONFIG, "max_length": 17}


def load(vocabularies, cache, *, text, config, **options):
    return PackedCorpus.from_text(text, vocabularies, config, cache=cache, **options)


NOT_DECISIVE = {
    "nothing": {},
    "rows": {"config": dataclasses.replace(CONFIG, rows=7)},
    "hosts": {"multiple": 4, "host": 1, "num_hosts": 2},
}
DECISIVE = {
    "text": {"text": dataclasses.replace(TEXT, target=["ek ", *TEXT.target[1:]])},
    "repeats": {"text": dataclasses.replace(TEXT, repeats=[1, 2, 1, 1, 2])},
    "source_slots": {"config": dataclasses.replace(CONFIG, source_slots=23)},
    "target_slots": {"config": dataclasses.replace(CONFIG, target_slots=11)},
    "seed": {"config": dataclasses.replace(CONFIG, seed=1)},
    "max_length": {"max_length": 19},
}


@pytest.mark.parametrize("change", NOT_DECISIVE.values(), ids=NOT_DECISIVE)
def test_settings_that_do_not_affect_packing_keep_the_cache(vocabularies, tmp_path, tokenised, change):
    cache = epath.Path(tmp_path)
    load(vocabularies, cache, **AS_FIRST_MADE)
    tokenised.clear()
    cached = load(vocabularies, cache, **AS_FIRST_MADE | change)
    assert tokenised == []
    made_again = load(vocabularies, None, **AS_FIRST_MADE | change)
    assert sum(tokenised) == 2 * len(TEXT)
    assert cached.too_long.tolist() == made_again.too_long.tolist() == [2]
    assert cached.fill_rate == made_again.fill_rate
    for step in range(9):
        assert equal(cached.batch(step), made_again.batch(step))
        assert cached.example_ids(step) == made_again.example_ids(step)
    assert all(map(equal, cached.one_epoch(), made_again.one_epoch()))


@pytest.mark.parametrize("change", DECISIVE.values(), ids=DECISIVE)
def test_settings_that_affect_packing_replace_the_cache(vocabularies, tmp_path, tokenised, change):
    cache = epath.Path(tmp_path)
    load(vocabularies, cache, **AS_FIRST_MADE)
    before = list(cache.iterdir())
    tokenised.clear()
    changed = load(vocabularies, cache, **AS_FIRST_MADE | change)
    assert sum(tokenised) == 2 * len(TEXT)
    expected = load(vocabularies, None, **AS_FIRST_MADE | change)
    assert all(equal(changed.batch(step), expected.batch(step)) for step in range(9))
    after = list(cache.iterdir())
    assert len(before) == len(after) == 1 and before != after


def test_another_vocabulary_on_either_side_replaces_the_cache(vocabularies, tmp_path, tokenised):
    cache = epath.Path(tmp_path)
    other = Vocabulary.train([*TEXT.source, *TEXT.target, "xyz"], LETTERS)
    for pair in (
        vocabularies,
        VocabularyPair(vocabularies.source, other),
        VocabularyPair(other, vocabularies.target),
    ):
        tokenised.clear()
        made = load(pair, cache, **AS_FIRST_MADE)
        assert sum(tokenised) == 2 * len(TEXT)
        assert made.source[0].tolist() == pair.source.encode(TEXT.source[:1])[0]
        assert made.target[1].tolist() == pair.target.encode(TEXT.target[1:2])[0]


def test_the_corpora_of_a_training_are_cached_side_by_side(vocabularies, tmp_path, tokenised):
    cache = epath.Path(tmp_path)
    corpora = {"train": TEXT, "valid": ParallelText(["no cat"], ["ek"], [1])}
    for _ in range(2):
        loaded = {
            name: load(vocabularies, cache, **AS_FIRST_MADE | {"text": text}, name=name)
            for name, text in corpora.items()
        }
        assert sum(tokenised) == 2 * (5 + 1)  # once, in the first round
        assert [len(corpus.source.lengths) for corpus in loaded.values()] == [5, 1]
    assert sorted(path.name.partition("-")[0] for path in cache.iterdir()) == ["train", "valid"]


def test_a_corpus_without_a_pair_that_fits_leaves_no_cache(vocabularies, tmp_path):
    with pytest.raises(ValueError, match="none of 5 sentence pairs fits"):
        load(vocabularies, epath.Path(tmp_path) / "cache", **AS_FIRST_MADE | {"max_length": 1})
    assert not list(tmp_path.iterdir())


def test_joined_sentences_can_be_separated_again():
    side = TokenSide.join([[5, 6, 7], [8], [9, 2]])
    assert side.lengths.tolist() == [3, 1, 2]
    assert [side[number].tolist() for number in range(3)] == [[5, 6, 7], [8], [9, 2]]

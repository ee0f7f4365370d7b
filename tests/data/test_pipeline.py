"""Takes sentence pairs of known ids and leaves a verdict: every batch is right, and an epoch has each pair once."""

import os
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_transformer.data.corpus import ParallelText, load_corpus
from flax_transformer.data.pipeline import OPEN_ROWS, PackedCorpus, TokenSide, pack
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.experiment import DataConfig, VocabularyConfig

PAIRS, ROWS, SOURCE_SLOTS, TARGET_SLOTS = 41, 5, 20, 24
EOS = 2


def sentences(lengths, first_id):
    """Sentence n consists of the id `first_id + n`, so that it is known again wherever it turns up."""
    return [[first_id + number] * (length - 1) + [EOS] for number, length in enumerate(lengths)]


SOURCE = sentences(np.random.default_rng(0).integers(2, 12, PAIRS), 100)
TARGET = sentences(np.random.default_rng(1).integers(2, 15, PAIRS), 200)


def build(source=SOURCE, target=TARGET, *, repeats=None, max_length=100, multiple=1, **config):
    settings = {"rows": ROWS, "source_slots": SOURCE_SLOTS, "target_slots": TARGET_SLOTS, **config}
    return PackedCorpus(
        TokenSide.join(source),
        TokenSide.join(target),
        [1] * len(source) if repeats is None else repeats,
        DataConfig(**settings),
        max_length=max_length,
        multiple=multiple,
    )


def read_back(batch):
    """The pairs of ids that each row holds, by segment."""
    return [
        [
            tuple(tokens[row][segments[row] == number].tolist() for tokens, segments in sides_of(batch))
            for number in range(1, batch.source_segments[row].max() + 1)
        ]
        for row in range(len(batch.source))
    ]


def sides_of(batch):
    return (batch.source, batch.source_segments), (batch.target, batch.target_segments)


def pairs_in(batch):
    return [pair for row in read_back(batch) for pair in row]


def equal(batch, other):
    return all(map(np.array_equal, jax.tree.leaves(batch), jax.tree.leaves(other)))


def test_a_batch_holds_the_pairs_that_example_ids_names_in_that_order():
    corpus = build()
    for step in range(20):
        assert pairs_in(corpus.batch(step)) == [(SOURCE[pair], TARGET[pair]) for pair in corpus.example_ids(step)]


def test_sentences_stand_one_after_another_numbered_from_one_and_padding_is_zero():
    for batch in build().batches(0, 20):
        assert batch.source.shape == (ROWS, SOURCE_SLOTS) and batch.target.shape == (ROWS, TARGET_SLOTS)
        assert all(leaf.dtype == np.int32 for leaf in jax.tree.leaves(batch))
        for tokens, segments, positions in (
            (batch.source, batch.source_segments, batch.source_positions),
            (batch.target, batch.target_segments, batch.target_positions),
        ):
            for row in range(ROWS):
                used = int((segments[row] > 0).sum())
                numbers, lengths = np.unique(segments[row, :used], return_counts=True)
                assert numbers.tolist() == list(range(1, len(numbers) + 1))
                assert segments[row, :used].tolist() == np.repeat(numbers, lengths).tolist()
                assert positions[row, :used].tolist() == [place for length in lengths for place in range(length)]
                for leaf in (tokens, segments, positions):
                    assert (leaf[row, used:] == 0).all()


def test_both_sides_of_a_row_have_the_same_segments():
    for batch in build().batches(0, 20):
        assert np.array_equal(batch.source_segments.max(1), batch.target_segments.max(1))


@pytest.mark.parametrize("repeats", [[1] * PAIRS, [number % 4 for number in range(PAIRS)]], ids=["once", "0 to 3"])
def test_an_epoch_has_every_pair_as_often_as_it_repeats(repeats):
    corpus = build(repeats=repeats)
    epoch_rows = len(corpus.rows)
    assert epoch_rows % ROWS  # so that batches run across the epochs' boundaries
    assert corpus.epoch_steps == epoch_rows / ROWS
    row_ids = np.concatenate([corpus.row_ids(step) for step in range(epoch_rows)])
    for epoch in row_ids.reshape(ROWS, epoch_rows):
        assert sorted(epoch) == list(range(epoch_rows))
        assert Counter(int(pair) for row in epoch for pair in corpus.rows[row]) == +Counter(dict(enumerate(repeats)))
    # `epoch_rows` batches of ROWS rows are ROWS epochs.
    read = Counter(pair[0] - 100 for step in range(epoch_rows) for (pair, _) in pairs_in(corpus.batch(step)))
    assert read == +Counter({pair: ROWS * times for pair, times in enumerate(repeats)})


def test_each_epoch_has_an_order_of_its_own():
    corpus = build(rows=1)
    epochs = np.array([corpus.row_ids(step)[0] for step in range(3 * len(corpus.rows))]).reshape(3, -1)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_batch_larger_than_the_corpus_spans_several_epochs():
    corpus = build(SOURCE[:7], TARGET[:7], rows=11)
    assert len(corpus.rows) < 11
    counts = Counter(pair for step in range(len(corpus.rows)) for pair in corpus.example_ids(step))
    assert counts == dict.fromkeys(range(7), 11)


def test_a_batch_depends_on_its_step_and_on_nothing_before_it():
    corpus = build()
    forwards = [corpus.batch(step) for step in range(30)]
    assert all(equal(corpus.batch(step), forwards[step]) for step in reversed(range(30)))
    assert all(equal(build().batch(step), forwards[step]) for step in (0, 29, 7))
    assert not equal(forwards[0], forwards[1])


def test_another_seed_packs_and_orders_in_another_way():
    corpus, other = build(), build(seed=1)
    assert not equal(corpus.batch(0), other.batch(0))
    assert {frozenset(row) for row in corpus.rows} != {frozenset(row) for row in other.rows}


@pytest.mark.parametrize("multiple", [1, 2, 3, 8])
def test_for_a_number_of_devices_only_empty_rows_are_added(multiple):
    plain, filled = build().batch(3), build(multiple=multiple).batch(3)
    height = len(filled.source)
    assert height % multiple == 0 and ROWS <= height < ROWS + multiple
    assert equal([leaf[:ROWS] for leaf in jax.tree.leaves(filled)], plain)
    assert not any(leaf[ROWS:].any() for leaf in jax.tree.leaves(filled))


def test_a_pair_with_a_side_too_long_is_counted_and_left_out():
    source = sentences([SOURCE_SLOTS, SOURCE_SLOTS + 1, 5, 5, 5], 100)
    target = sentences([TARGET_SLOTS, 5, TARGET_SLOTS, TARGET_SLOTS + 1, 5], 200)
    corpus = build(source, target)
    assert corpus.too_long.tolist() == [1, 3]
    assert sorted(pair for row in corpus.rows for pair in row) == [0, 2, 4]
    assert build(source, target, max_length=5).too_long.tolist() == [0, 1, 2, 3]
    assert build(source, target, max_length=SOURCE_SLOTS).too_long.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("pairs", [0, PAIRS])
def test_a_corpus_of_which_nothing_fits_is_an_error_that_names_the_mend(pairs):
    with pytest.raises(ValueError, match=f"none of {pairs} sentence pairs fits into 1 source .*raise .*max_length"):
        build(SOURCE[:pairs], TARGET[:pairs], max_length=1)


def test_rows_hold_no_more_than_their_slots_and_each_pair_once():
    source, target = np.random.default_rng(2).integers(1, 20, (2, 3000))
    rows = pack(source, target, 20, 22)
    assert len(rows) > 2 * OPEN_ROWS  # so that rows were closed to make room
    assert sorted(pair for row in rows for pair in row) == list(range(3000))
    assert all(source[row].sum() <= 20 and target[row].sum() <= 22 for row in rows)


def test_a_pair_goes_where_there_is_room_on_both_sides():
    # Pair 2 has room on either side of row 0 but not on both; pair 3 still goes there.
    assert pack(np.array([4, 2, 3, 4]), np.array([2, 5, 4, 1]), 10, 10) == [[0, 1, 3], [2]]


def test_lengths_like_multi30k_fill_nine_slots_of_ten():
    rng = np.random.default_rng(3)
    source = np.clip(rng.lognormal(np.log(14), 0.35, 4000), 3, 50).astype(int)
    target = np.clip(source * rng.normal(1.05, 0.2, 4000), 3, 60).astype(int)
    corpus = build(sentences(source, 100), sentences(target, 200), rows=32, source_slots=64, target_slots=64)
    assert not len(corpus.too_long)
    assert corpus.fill_rate >= 0.9


def test_the_fill_rate_is_what_an_epoch_shows():
    corpus = build()
    segments = [leaf for batch in corpus.one_epoch() for _, leaf in sides_of(batch)]
    slots = len(corpus.rows) * (SOURCE_SLOTS + TARGET_SLOTS)
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


def test_batches_come_in_order_from_any_step_to_any_other():
    corpus = build(multiple=3)
    for start, stop in ((0, 9), (5, 9), (8, 9), (1000, 1003), (4, 4)):
        batches = list(corpus.batches(start, stop))
        assert len(batches) == stop - start
        assert all(equal(batch, corpus.batch(step)) for step, batch in enumerate(batches, start))


def test_one_epoch_visits_each_row_once_and_fills_up_the_last_batch():
    corpus = build(multiple=3)
    batches = list(corpus.one_epoch())
    assert len(corpus.rows) % ROWS
    assert {batch.source.shape for batch in batches} == {(6, SOURCE_SLOTS)}
    rows = [row for batch in batches for row in read_back(batch) if row]
    assert rows == [[(SOURCE[pair], TARGET[pair]) for pair in row] for row in corpus.rows]


def test_text_arrives_at_the_model_as_its_vocabularies_encode_it():
    text = ParallelText(["a cat sat", "no dog", "a dog sat on a cat"], ["ek", "do teen", "chaar"], [1, 2, 1])
    vocabularies = VocabularyPair.train(
        text.source, text.target, VocabularyConfig(size=60, joint=False, model_type="char")
    )
    corpus = PackedCorpus.from_text(text, vocabularies, DataConfig(rows=3), max_length=64)
    encoded = list(zip(vocabularies.source.encode(text.source), vocabularies.target.encode(text.target), strict=True))
    found = [pair for batch in corpus.one_epoch() for pair in pairs_in(batch)]
    assert sorted(found) == sorted(encoded + encoded[1:2])


def test_sentences_joined_end_to_end_come_apart_again():
    side = TokenSide.join([[5, 6, 7], [8], [9, 2]])
    assert side.lengths.tolist() == [3, 1, 2]
    assert [side[number].tolist() for number in range(3)] == [[5, 6, 7], [8], [9, 2]]

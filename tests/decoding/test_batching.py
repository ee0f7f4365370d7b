import numpy as np
import pytest

from flax_transformer.decoding.batching import (
    RUNG,
    SMALLEST_BUCKET,
    bucket,
    full_rows,
    rows_for,
    shape_batches,
)


def lengths_of(seed, count, sides=1, longest=70):
    rng = np.random.default_rng(seed)
    return [tuple(row) for row in rng.integers(1, longest, (count, sides)).tolist()]


def test_a_bucket_is_the_next_power_of_two():
    assert [bucket(length) for length in (1, 7, 8, 9, 16, 17, 64, 65)] == [8, 8, 8, 16, 16, 32, 64, 128]
    for length in range(1, 300):
        assert length <= bucket(length) < max(2 * length, SMALLEST_BUCKET + 1)


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("batch_tokens", [1, 100, 512, 4096])
def test_every_sentence_is_in_one_batch_that_has_room_for_it(sides, devices, batch_tokens):
    lengths = lengths_of(0, 150, sides)
    shapes = list(shape_batches(lengths, batch_tokens, devices))
    numbers = [number for shape in shapes for number in shape.numbers]
    assert sorted(numbers) == list(range(150))
    for shape in shapes:
        assert 1 <= len(shape.numbers) <= shape.rows
        for number in shape.numbers:
            assert tuple(map(bucket, lengths[number])) == shape.widths
        # The rows are divided evenly, and each device has at least one, however small the budget.
        assert shape.rows % devices == 0
        assert shape.rows * max(shape.widths) <= batch_tokens or shape.rows == devices


def test_each_bucket_has_one_shape_and_the_longest_sentences_come_first():
    lengths = lengths_of(1, 500)
    shapes = list(shape_batches(lengths, 300))
    sizes = {(shape.rows, shape.widths) for shape in shapes}
    assert len(shapes) > 3 * len(sizes)
    assert len(sizes) == len({tuple(map(bucket, length)) for length in lengths})
    order = [lengths[number] for shape in shapes for number in shape.numbers]
    assert order == sorted(lengths, reverse=True)


def test_sides_of_many_lengths_have_one_shape_for_each_pair_of_buckets():
    lengths = lengths_of(2, 300, sides=2)
    sizes = {(shape.rows, shape.widths) for shape in shape_batches(lengths, 512)}
    assert len(sizes) == len({tuple(map(bucket, pair)) for pair in lengths})


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_a_few_sentences_get_one_of_a_few_small_numbers_of_rows(devices):
    full = full_rows((8,), 4096, devices)
    sizes = [rows_for(count, full, devices) for count in range(1, full + 1)]
    for count, rows in enumerate(sizes, 1):
        assert count <= rows <= full and rows % devices == 0
        # The next smaller size would be too small, otherwise nothing would be saved.
        assert rows <= max(devices, RUNG * (count + devices))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 1 + np.ceil(np.log(full) / np.log(RUNG))
    assert sizes[0] == devices and sizes[-1] == full


def test_no_sentences_make_no_batch():
    assert list(shape_batches([], 4096)) == []

import pytest

from flax_transformer.decoding.sizes import pool_shape, rooms_up_to, slot_size, slots_for
from flax_transformer.decoding.slots import ENCODED_AT_ONCE


def test_rooms_are_few_and_the_last_one_holds_what_it_is_asked_for():
    assert rooms_up_to(1) == rooms_up_to(16) == [16] and rooms_up_to(17) == [16, 24]
    assert rooms_up_to(65) == [16, 24, 32, 48, 64, 96]
    for tokens in range(17, 500):
        *_, below, last = rooms_up_to(tokens)
        assert below < tokens <= last <= 1.5 * below


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("hypotheses", [1, 4, 9])
def test_sentences_get_about_as_many_slots_as_they_are_until_a_batch_is_full(devices, hypotheses):
    options = {"batch_tokens": 2048, "hypotheses": hypotheses, "devices": devices}
    sizes = [slots_for(count, 24, **options) for count in range(1, 1000)]
    assert sizes == sorted(sizes) and sizes[0] == devices and len(set(sizes)) <= 10
    most = max(devices, 2048 * max(1, 4 // hypotheses) // 24)
    for count, slots in enumerate(sizes, 1):
        assert slots % devices == 0 and slots <= most
        assert slots < 2 * count + devices
        assert slots >= count / 1.5 - devices or 2 * slots > most - devices


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("room", [16, 48, 96, 384])
def test_the_pool_has_rows_for_every_device_that_hold_the_longest_source(room, devices):
    for slots in (devices, 4 * devices):
        size = slot_size(slots, room, None)
        assert size == (slots, room, room * 3 // 2, 0)
        rows, width = pool_shape(size, batch_tokens=2048, devices=devices)
        assert width >= room and rows % devices == 0
        own = rows // devices
        assert own % min(own, max(1, ENCODED_AT_ONCE // width)) == 0  # as `encode` divides them


def test_learned_positions_bound_the_places_of_a_slot():
    assert slot_size(2, 24, 20) == (2, 20, 20, 0) and slot_size(2, 24, 30) == (2, 24, 30, 0)

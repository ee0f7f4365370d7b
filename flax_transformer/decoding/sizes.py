"""Chooses the sizes of slots, so that few programs serve sentences of any length and any number of them.

Rooms are 16, 32, 64, ... source tokens. A room has slots for one sentence, for a full batch, and for a sixteenth and a
quarter of it; outputs get room for one and a half times as many tokens, and the few that are longer are moved to the
next room.
"""

from collections.abc import Iterator

from flax_transformer.decoding.slots import ENCODED_AT_ONCE, Size

SMALLEST_ROOM = 16
SOURCE_WIDTH = 64  # tokens in a row of packed sources, unless a source is longer
RUNG = 4
FULL_ROWS = 4  # a search with fewer hypotheses gets more slots, so that matrix products do not become too small


def room_for(tokens: int) -> int:
    """The smallest room for a source, or a prefix, of so many tokens."""
    return max(SMALLEST_ROOM, 1 << (tokens - 1).bit_length())


def slots_for(sentences: int, room: int, *, batch_tokens: int, hypotheses: int, devices: int) -> int:
    """How many slots so many waiting sentences get: a few more sentences than slots take turns.

    Args:
        sentences: how many sentences wait.
        room: the size of each slot, in source tokens.
        batch_tokens: source tokens in a full batch.
        hypotheses: how many hypotheses of each sentence are decoded side by side.
        devices: how many devices share the slots.
    """
    full = max(1, batch_tokens * max(1, FULL_ROWS // hypotheses) // (room * devices)) * devices
    for slots in _rungs(full, devices):
        if sentences <= slots + slots // 2:
            return slots
    return full


def _rungs(full: int, devices: int) -> Iterator[int]:
    """One slot for each device, a sixteenth of `full`, and a quarter."""
    yield devices
    for share in (RUNG * RUNG, RUNG):
        slots = full // (share * devices) * devices
        if slots > devices:
            yield slots


def slot_size(slots: int, room: int, learned: int | None) -> Size:
    """The size of slots of a room.

    Args:
        slots: how many.
        room: source tokens in each.
        learned: how many learned positions there are, which no sentence can exceed; `None` if there are none.
    """
    target = room + room // 2
    return Size(slots, room, target) if learned is None else Size(slots, min(room, learned), min(target, learned))


def pool_shape(size: Size, *, batch_tokens: int, devices: int) -> tuple[int, int]:
    """The rows and the width of the packed sources of slots: those of a batch, or a single one for each device."""
    if size.slots == devices:
        return devices, size.source
    width = max(SOURCE_WIDTH, size.source)
    block = max(1, ENCODED_AT_ONCE // width) * devices
    return max(1, batch_tokens // (width * block)) * block, width

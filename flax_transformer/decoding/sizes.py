"""Chooses the sizes of slots, so that few programs serve sentences of any length and any number of them.

Rooms are 16, 24, 32, 48, 64, 96, ... source tokens. Outputs get room for one and a half times as many tokens, and the
few that are longer are moved to a larger room. A room has 1, 2, 4, 8, ... slots, as many as sentences wait, and at most
as many as a batch of source tokens fills.
"""

from flax_transformer.decoding.next_token import GROUP
from flax_transformer.decoding.shortlist import Shortlist
from flax_transformer.decoding.slots import ENCODED_AT_ONCE, Size

SMALLEST_ROOM = 16
SOURCE_WIDTH = 64  # tokens in a row of packed sources, unless a source is longer
FULL_ROWS = 4  # a search with fewer hypotheses gets more slots, so that matrix products do not become too small


def rooms_up_to(tokens: int) -> list[int]:
    """The rooms up to the smallest one that holds a source, or a prefix, of so many tokens; the smallest first."""
    rooms = [SMALLEST_ROOM]
    while rooms[-1] < tokens:
        power = 1 << (rooms[-1].bit_length() - 1)
        rooms.append(power * 3 // 2 if rooms[-1] == power else 2 * power)
    return rooms


def slots_for(sentences: int, room: int, *, batch_tokens: int, hypotheses: int, devices: int) -> int:
    """How many slots so many waiting sentences get.

    The number doubles only if more than one and a half sentences would wait for each slot; until then they take turns.

    Args:
        sentences: how many sentences wait.
        room: the size of each slot, in source tokens.
        batch_tokens: source tokens for which there are slots at most, padding included.
        hypotheses: how many hypotheses of each sentence are decoded side by side.
        devices: how many devices share the slots.
    """
    full = max(1, batch_tokens * max(1, FULL_ROWS // hypotheses) // (room * devices))
    slots = 1
    while 2 * slots <= full and sentences > (slots + slots // 2) * devices:
        slots *= 2
    return slots * devices


def slot_size(
    slots: int, room: int, learned: int | None, shortlist: Shortlist | None = None, vocab_size: int = 0
) -> Size:
    """The size of slots of a room.

    Args:
        slots: how many.
        room: source tokens in each.
        learned: how many learned positions there are, which no sentence can exceed; `None` if there are none.
        shortlist: what chooses the tokens of each output; `None` if nothing does.
        vocab_size: the size of the target vocabulary, which only a shortlist needs.
    """
    source, target = room, room + room // 2
    if learned is not None:
        source, target = min(source, learned), min(target, learned)
    if shortlist is None:
        return Size(slots, source, target)
    # A prefix and the end of sentence are allowed too. The search divides tokens into groups.
    most = min(shortlist.most(source, vocab_size) + target, vocab_size)
    return Size(slots, source, target, -(-most // GROUP) * GROUP)


def pool_shape(size: Size, *, batch_tokens: int, devices: int) -> tuple[int, int]:
    """The rows and the width of the packed sources of slots: those of a batch, or a single one for each device."""
    if size.slots == devices:
        return devices, size.source
    width = max(SOURCE_WIDTH, size.source)
    block = max(1, ENCODED_AT_ONCE // width) * devices
    return max(1, batch_tokens // (width * block)) * block, width

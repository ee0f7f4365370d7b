"""Chooses the programs of an engine: how large slots are, how many there are, and which are compiled ahead.

By itself an engine compiles what fits the sentences best, once they come. A server, where others would have to wait
meanwhile, prepares some programs, and its engine gets by with these as far as they go.
"""

import threading

from flax_transformer.decoding.ensemble import Ensemble
from flax_transformer.decoding.machine import Machine
from flax_transformer.decoding.settings import BeamSearch, Sampling
from flax_transformer.decoding.shortlist import Shortlist
from flax_transformer.decoding.sizes import pool_shape, rooms_up_to, slot_size, slots_for

# Fewer sentences than this use the slots of longer ones: to compile a program for smaller slots would take longer.
FEW = 64
FEW_PREPARED = 4  # the same where that program is compiled already, but would have to be run beside the other one


class Programs:
    """The programs of one engine."""

    def __init__(self, ensemble: Ensemble, *, batch_tokens: int, shortlist: Shortlist | None):
        """Takes what the programs are for; arguments as in `Engine`."""
        self._ensemble, self._batch_tokens, self._shortlist = ensemble, batch_tokens, shortlist
        self._lock = threading.Lock()
        # Room and number of slots of each program, by the settings of the search; `None` if any may be made.
        self._prepared: dict[BeamSearch | Sampling, set[tuple[int, int]]] | None = None

    def only_prepared(self) -> None:
        """From now on, what was not prepared is made with one slot, and only where no prepared room is large enough."""
        self._prepared = {} if self._prepared is None else self._prepared

    def prepare(self, settings: BeamSearch | Sampling, room: int, count: int) -> None:
        """Compiles what so many sentences of a room need, in any thread, and lets the engine use it then."""
        machine = self.machine(settings, room, count, prepared=False)
        machine.compile()
        if self._prepared is not None:
            with self._lock:
                before = self._prepared.get(settings, set())
                self._prepared[settings] = before | {(room, machine.size.slots)}  # a new set: the engine may be reading

    def rooms(self, settings: BeamSearch | Sampling, tokens: int) -> list[int]:
        """The rooms for sentences of up to so many tokens, the smallest first."""
        prepared = sorted({room for room, _ in (self._prepared or {}).get(settings, ())})
        enough = next((room for room in prepared if room >= tokens), rooms_up_to(tokens)[-1])
        return [*(room for room in prepared if room < tokens), enough] if prepared else rooms_up_to(tokens)

    def few(self, settings: BeamSearch | Sampling, room: int) -> int:
        """Fewer sentences of a room than this had better share the slots of a larger room."""
        prepared = {room for room, _ in (self._prepared or {}).get(settings, ())}
        return FEW_PREPARED if room in prepared else FEW

    def slots(self, settings: BeamSearch | Sampling, room: int, count: int, *, prepared: bool = True) -> int:
        """How many slots so many sentences get.

        Args:
            settings: the settings of the search.
            room: the size of each slot.
            count: how many sentences there are.
            prepared: whether programs that were prepared come first, if there are any.
        """
        devices = self._ensemble.mesh.size
        best = slots_for(count, room, batch_tokens=self._batch_tokens, hypotheses=settings.hypotheses, devices=devices)
        if self._prepared is None or not prepared:
            return best
        sizes = sorted(slots for other, slots in self._prepared.get(settings, ()) if other == room)
        above = [slots for slots in sizes if best <= slots <= 2 * best]
        below = [slots for slots in sizes if slots <= best]
        return above[0] if above else below[-1] if below else devices

    def machine(self, settings: BeamSearch | Sampling, room: int, count: int, *, prepared: bool = True) -> Machine:
        """Makes slots for so many sentences; arguments as in `slots`."""
        slots = self.slots(settings, room, count, prepared=prepared)
        vocab_size = self._ensemble.configs[0].target_vocab_size
        size = slot_size(slots, room, self._ensemble.learned, self._shortlist, vocab_size)
        shape = pool_shape(size, batch_tokens=self._batch_tokens, devices=self._ensemble.mesh.size)
        return Machine(self._ensemble, settings, size, shape)

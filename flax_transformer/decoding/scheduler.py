"""Continuous batching: a sentence that has ended leaves its slot, and one that waits takes it while the others go on.

Sentences whose searches need the same program share slots of the sizes that suit them; the slots of one size are a
`Machine`. All machines take turns, a few steps each. One thread, that of the engine, calls everything here.
"""

import dataclasses
import itertools

from flax_transformer.decoding.machine import Machine
from flax_transformer.decoding.programs import Programs
from flax_transformer.decoding.requests import Request
from flax_transformer.decoding.settings import BeamSearch, Sampling
from flax_transformer.decoding.waiting import Waiting

STEPS = 16  # of a machine in its turn, at most
STEPS_ALONE = 32  # at most, of a machine with one slot on each device, which is mostly there for a single sentence
SHARE = 8  # a machine goes on until one eighth of its sentences have ended
MANY = 2  # a machine with slots for more than twice the sentences that there are is too large


@dataclasses.dataclass
class Group:
    """Sentences whose searches have the same settings, and the machines that decode them.

    Attributes:
        settings: what the program is compiled for.
        waiting: sentences without a slot.
        machines: by the room of their slots, the largest first.
        current: the machine of each room that takes new sentences; others of the room end those that they have.
        above: for each room in use, the number of source tokens above which a sentence belongs to it; those with fewer
            belong to a smaller room.
    """

    settings: BeamSearch | Sampling
    waiting: Waiting = dataclasses.field(default_factory=Waiting)
    machines: list[tuple[int, Machine]] = dataclasses.field(default_factory=list)
    current: dict[int, Machine] = dataclasses.field(default_factory=dict)
    above: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def busy(self) -> bool:
        """Whether a sentence waits or is being decoded."""
        return bool(len(self.waiting) or any(machine.busy for _, machine in self.machines))

    def needs(self, room: int, machine: Machine) -> bool:
        """Whether a machine has sentences, or is to take some that wait."""
        takes = self.current.get(room) is machine and room in self.above
        return machine.busy or (takes and self.waiting.count(self.above[room], room) > 0)


class Scheduler:
    """Decides which sentences share slots, and lets all machines take turns.

    Attributes:
        groups: the sentences and machines, by the settings of their program.
    """

    def __init__(self, programs: Programs, *, devices: int, depth: int):
        """Begins without sentences.

        Args:
            programs: which programs may be used.
            devices: how many devices share the slots.
            depth: how many chunks of work each machine is given at once, so that a device need not wait for the host.
        """
        self.groups: dict[BeamSearch | Sampling, Group] = {}
        self._programs, self._devices, self._depth = programs, devices, depth
        self._filled = self._offered = 0

    @property
    def busy(self) -> bool:
        """Whether there is a sentence."""
        return any(group.busy for group in self.groups.values())

    @property
    def occupancy(self) -> float:
        """The share of slots that held a living sentence, over all steps made while sentences were waiting."""
        return self._filled / max(1, self._offered)

    @property
    def slots(self) -> tuple[int, int]:
        """How many slots hold a sentence now, and how many there are; any thread may ask."""
        machines = [machine for group in list(self.groups.values()) for _, machine in list(group.machines)]
        return sum(machine.living for machine in machines), sum(machine.size.slots for machine in machines)

    def add(self, settings: BeamSearch | Sampling, requests: list[Request]) -> None:
        """Takes in sentences that one program decodes."""
        self.groups.setdefault(settings, Group(settings)).waiting.add(requests)

    def fail(self, error: BaseException) -> None:
        """Ends all sentences with an error, and lets go of all slots."""
        groups, self.groups = self.groups, {}
        for group in groups.values():
            for request in group.waiting.take_all():
                request.fail(error)
            for _, machine in group.machines:
                for request in machine.requests():
                    request.fail(error)

    def turn(self) -> None:
        """Lets each machine make its next steps."""
        for group in list(self.groups.values()):
            self._make_room(group)
            for room, machine in list(group.machines):
                self._turn_machine(group, room, machine)

    def _turn_machine(self, group: Group, room: int, machine: Machine) -> None:
        above = group.above.get(room, room)
        waiting = group.waiting if group.current.get(room) is machine else Waiting()
        machine.fill(waiting, above)
        if machine.living:
            waits = bool(waiting.count(above, room))
            slots_of_a_device = machine.size.slots // self._devices
            enough = max(1, machine.living // self._devices // SHARE)
            steps = STEPS if slots_of_a_device > 1 else STEPS_ALONE
            machine.dispatch(1 if machine.streams else steps, enough, waits=waits)
        if machine.pending >= self._depth or (machine.pending and not machine.living):
            before = machine.filled, machine.offered
            outgrown = machine.collect()
            self._filled += machine.filled - before[0]
            self._offered += machine.offered - before[1]
            for number, slot in enumerate(outgrown):
                machine.give(slot, self._larger(group, machine, room, len(outgrown) - number))

    def _make_room(self, group: Group) -> None:
        """Chooses the machine of each room for the sentences that wait, and makes those that are lacking."""
        group.above = self._lengths_of_rooms(group)
        lacking = []
        for room, above in group.above.items():
            own = [machine for other, machine in group.machines if other == room]
            demand = group.waiting.count(above, room) + sum(machine.living for machine in own)
            slots = self._programs.slots(group.settings, room, demand)
            current = next((machine for machine in own if machine is group.current.get(room)), None)
            # A few sentences would be slow in the many slots that others have left, and many need more slots.
            most = self._programs.slots(group.settings, room, MANY * demand) if current and current.busy else slots
            if current is None or not slots <= current.size.slots <= most:
                current = next((machine for machine in own if machine.size.slots == slots), None)
            if current is None:
                group.current.pop(room, None)
                lacking.append((room, demand))
            else:
                group.current[room] = current
        for room, demand in lacking:
            group.current[room] = self._add_machine(group, room, demand)

    def _lengths_of_rooms(self, group: Group) -> dict[int, int]:
        """The rooms that are to take sentences, the largest first, and the size of source above which each takes them.

        A few sentences share a larger room, unless slots of their own room are there already.
        """
        found: dict[int, int] = {}
        rooms = [0, *self._programs.rooms(group.settings, group.waiting.longest())]
        for below, room in reversed(list(itertools.pairwise(rooms))):
            count = group.waiting.count(below, room)
            exists = any(machine.size.slots > 1 for other, machine in group.machines if other == room)
            if found and count < self._programs.few(group.settings, room) and not exists:
                found[next(reversed(found))] = below
            elif count:
                found[room] = below
        return found

    def _larger(self, group: Group, machine: Machine, room: int, count: int) -> Machine:
        """A machine with an empty slot and more places, for one of so many sentences that need it."""
        for _, other in group.machines:
            if other.size.target > machine.size.target and other.living < other.size.slots:
                return other
        return self._add_machine(group, 2 * room, count)

    def _add_machine(self, group: Group, room: int, count: int) -> Machine:
        """Makes slots for so many sentences, after it has let go of those that nobody needs."""
        for each in self.groups.values():
            each.machines = [(own, machine) for own, machine in each.machines if each.needs(own, machine)]
            each.current = {own: machine for own, machine in each.current.items() if each.needs(own, machine)}
        machine = self._programs.machine(group.settings, room, count)
        group.machines = sorted([*group.machines, (room, machine)], key=lambda entry: -entry[0])
        return machine

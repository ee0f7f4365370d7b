"""Reads XLA's text of a compiled program (HLO): its collective operations and how often its loops run.

Jax reports neither of these in any other way.
"""

import dataclasses
import math
import re
from collections import defaultdict

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1, "s8": 1, "f64": 8, "s64": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collective operations of one kind in one step.

    Attributes:
        kind: XLA's name, e.g. "all-reduce".
        count: how often it runs.
        bytes: total size on one device of what is reduced, or of what has been gathered.
    """

    kind: str
    count: int
    bytes: int


class Module:
    """An optimised HLO module, and how often a step runs each of its computations.

    Attributes:
        computations: the lines of each computation, by name.
        times: how often each computation runs, by name; the body of a loop runs once per iteration.
        fused: the names of the computations that are the body of a fusion.
        devices: how many devices run it together.
    """

    def __init__(self, text: str):
        """Parses the text."""
        sizes = re.findall(r"(?:replica_count|num_partitions)=(\d+)", text.partition("\n")[0])
        self.devices = math.prod(map(int, sizes))
        self.computations: dict[str, list[str]] = {}
        self.times: dict[str, int] = defaultdict(int)
        self.fused: set[str] = set()
        entry = name = ""
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
                name = head[2]
                self.computations[name] = []
                entry = name if head[1] else entry
            elif name:
                self.computations[name].append(line)
        self._visit(entry, 1)

    def _visit(self, name: str, times: int) -> None:
        self.times[name] += times
        for line in self.computations[name]:
            turns = times * self._turns(line) if " while(" in line else times
            for called in re.findall(r"(?:calls|body|to_apply|called_computations)=\{?%?([\w.\-]+)", line):
                if called in self.computations:
                    self.fused |= {called} if " fusion(" in line else set()
                    self._visit(called, turns)

    def _turns(self, line: str) -> int:
        """The number of iterations of a loop: from XLA's annotation, else the constant in the loop's condition."""
        if known := re.search(r"known_trip_count\W+n\W+(\d+)", line):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        lines = self.computations.get(condition[1], []) if condition else []
        return max((int(number) for number in re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(lines))), default=1)

    @property
    def has_loops(self) -> bool:
        """Whether the program has loops."""
        return any(" while(" in line for lines in self.computations.values() for line in lines)

    @property
    def num_custom_calls(self) -> int:
        """The number of custom calls outside fusions that compute something; those in a loop's body count once."""
        whole = [lines for name, lines in self.computations.items() if self.times[name] and name not in self.fused]
        return sum(" custom-call(" in line and '"AllocateBuffer"' not in line for lines in whole for line in lines)

    def cycles(self, *, loops: bool) -> int:
        """Sum of the TPU compiler's estimates for single operations; with `loops`, each iteration of a loop counts."""
        total = 0
        for name, lines in self.computations.items():
            cycles = sum(map(int, re.findall(r"estimated_cycles\W+(\d+)", "\n".join(lines))))
            total += cycles * (self.times[name] if loops else self.times[name] > 0)
        return total


def read_collectives(module: Module) -> list[Collective]:
    """The collective operations of a step, by kind."""
    # The TPU's compiler writes a collective that overlaps with other work into several computations, which share a
    # channel. Under `pmap` all collectives share one channel, but they are in one computation.
    found: dict[tuple[str, str, str], dict[str, tuple[int, int]]] = defaultdict(dict)
    for name, lines in module.computations.items():
        for number, line in enumerate(lines):
            match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
            if not match or not module.times[name]:
                continue
            kind = "reduce-scatter" if "all-reduce-scatter" in name else match[2]
            channel = re.search(r"channel_id=(\d+)", line)
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            if match[2] != "all-reduce" and "-start(" in line:
                # The operands come before the results; two numbers of a permutation's context may follow.
                shapes = [shape for shape in shapes if shape != ("u32", "")]
                shapes = shapes[len(shapes) // 2 :]
            size = sum(ITEM_BYTES[dtype] * math.prod(map(int, re.findall(r"\d+", shape))) for dtype, shape in shapes)
            if match[2] == "reduce-scatter":
                size *= _group_size(line, module.devices)  # the result is one device's part of what is reduced
            places = found[kind, channel[1] if channel else f"{name}:{number}", str(shapes)]
            count, total = places.get(name, (0, 0))
            places[name] = (count + module.times[name], total + module.times[name] * size)
    sums: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for (kind, _, _), places in found.items():
        count, total = max(places.values())
        sums[kind] = (sums[kind][0] + count, sums[kind][1] + total)
    return [Collective(kind, *sums[kind]) for kind in sorted(sums)]


def _group_size(line: str, devices: int) -> int:
    """How many devices take part in a collective operation together: all, if the line does not name them."""
    groups = re.search(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])", line)
    if groups is None:
        return devices
    return int(groups[2]) if groups[2] else len(groups[1].split(","))

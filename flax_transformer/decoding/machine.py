"""The host's side of the slots of one size: who is in which slot, what the device is to do next, what it has told."""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from flax_transformer.decoding.ensemble import Ensemble
from flax_transformer.decoding.listed_rows import empty_rows, replace_rows
from flax_transformer.decoding.moving import move
from flax_transformer.decoding.requests import Output, Request
from flax_transformer.decoding.settings import BeamSearch, Sampling
from flax_transformer.decoding.slots import Outcome, Size, Tenants, advance, empty_slots, encode
from flax_transformer.decoding.waiting import Waiting
from flax_transformer.tokens import Tokens


class Encoded(NamedTuple):
    """A source that lies in the pool.

    Attributes:
        request: whose source it is.
        row: its row.
        start: the place of its first token.
    """

    request: Request
    row: int
    start: int


class Machine:
    """Slots of one size, for sentences whose searches have the same settings.

    Attributes:
        size: the size of the slots.
        filled: sum over all steps, made while sentences were waiting, of the slots with a living sentence.
        offered: the same of all slots.
    """

    def __init__(self, ensemble: Ensemble, settings: BeamSearch | Sampling, size: Size, pool_shape: tuple[int, int]):
        """Makes empty slots.

        Args:
            ensemble: the models, and the devices that share the slots.
            settings: the settings of the search.
            size: the size of the slots.
            pool_shape: rows and width of the packed sources.
        """
        self.size, self._ensemble, self._settings, self._pool_shape = size, ensemble, settings, pool_shape
        self._progress = empty_slots(configs=ensemble.configs, settings=settings, size=size, mesh=ensemble.mesh)
        self._rows = empty_rows(
            ensemble.models, configs=ensemble.configs, slots=size.slots, listed=size.listed, mesh=ensemble.mesh
        )
        self._listed_anew: set[int] = set()  # the slots whose rows are not there yet
        self._pool: Any = None
        self._requests: list[Request | None] = [None] * size.slots
        self._encoded: deque[Encoded] = deque()
        self._pending: deque[tuple[Outcome, list[Request | None], bool]] = deque()
        self._limits = np.ones(size.slots, np.int32)
        self._num_return = np.ones(size.slots, np.int32)
        self._given = np.zeros(size.slots, np.int32)
        self._prefix = np.full((size.slots, size.target), ensemble.pad_id, np.int32)
        self._listed = np.full((size.slots, size.listed), -1, np.int32) if size.listed else None
        shape = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
        self._rngs = np.zeros((size.slots, *shape), np.uint32) if isinstance(settings, Sampling) else None
        self._arrivals: list[tuple[int, Encoded]] = []
        self.filled = self.offered = 0

    @property
    def living(self) -> int:
        """How many slots hold a sentence."""
        return sum(request is not None for request in self._requests)

    @property
    def busy(self) -> bool:
        """Whether a sentence is in a slot or encoded for one, or the device has something to tell."""
        return bool(self.living or self._encoded or self._pending)

    @property
    def pending(self) -> int:
        """How many chunks of work the device has been given whose outcome has not been read."""
        return len(self._pending)

    @property
    def streams(self) -> bool:
        """Whether someone waits for each token of a sentence."""
        return any(request is not None and request.streams for request in self._requests)

    def requests(self) -> list[Request]:
        """Those in slots and those that are encoded."""
        return [*filter(None, self._requests), *(encoded.request for encoded in self._encoded)]

    def fill(self, waiting: Waiting, above: int) -> None:
        """Puts waiting sentences into the empty slots.

        Args:
            waiting: the sentences.
            above: sentences of up to this many tokens belong to smaller slots. Here they only fill what longer ones
                leave free.
        """
        for slot, request in enumerate(self._requests):
            if request is not None and request.done:  # it was cancelled
                self._requests[slot] = None
        empty = deque(slot for slot, request in enumerate(self._requests) if request is None)
        while empty:
            if not self._encoded:
                if self._arrivals:
                    if not waiting.count(above, self.size.source):
                        return
                    self.dispatch(0, 1, waits=True)  # they lie in the pool that is about to be replaced
                    self._pending.pop()
                if not self._encode(waiting, above):
                    return
            encoded = self._encoded.popleft()
            if not encoded.request.done:
                self._arrivals.append((empty[0], encoded))
                self._seat(empty.popleft(), encoded.request)

    def _seat(self, slot: int, request: Request) -> None:
        self._requests[slot] = request
        self._limits[slot], self._num_return[slot] = request.limit, request.num_return
        self._given[slot] = request.given
        self._prefix[slot] = self._ensemble.pad_id
        self._prefix[slot, : len(request.prefix)] = request.prefix
        if self._listed is not None:
            self._listed[slot] = -1
            self._listed[slot, : len(request.listed)] = request.listed
            self._listed_anew.add(slot)
        if self._rngs is not None:
            self._rngs[slot] = request.rng

    def _encode(self, waiting: Waiting, above: int) -> bool:
        """Encodes waiting sentences, packed into rows, as many as the pool takes; false if there are none."""
        rows, width = self._pool_shape
        devices = self._ensemble.mesh.size
        ids = np.full((rows, width), self._ensemble.pad_id, np.int32)
        segments, positions = np.zeros_like(ids), np.zeros_like(ids)
        used = np.zeros(devices, np.int32)
        for number in range(rows):
            device, own_row = number % devices, number // devices
            row = device * (rows // devices) + own_row
            start, segment = 0, 0
            least, most = above, self.size.source
            while (request := waiting.take(least, most)) is not None:
                self._encoded.append(Encoded(request, row, start))
                length, segment = len(request.source), segment + 1
                ids[row, start : start + length] = request.source
                segments[row, start : start + length] = segment
                positions[row, start : start + length] = range(length)
                start += length
                least, most = 0, min(width - start, self.size.source)
                if self._ensemble.may_overflow:
                    break
            if not segment:
                break
            used[device] = own_row + 1
        if not self._encoded:
            return False
        self._pool = self._encoder(Tokens(ids, segments, positions), used)
        return True

    def _encoder(self, tokens: Tokens, used: Int[np.ndarray, "devices"]) -> Any:
        ensemble = self._ensemble
        return encode(ensemble.models, tokens, used, configs=ensemble.configs, mesh=ensemble.mesh)

    def dispatch(self, steps: int, enough: int, *, waits: bool) -> None:
        """Gives the device its next chunk of work: the new sentences, and some steps.

        Args:
            steps: maximum number of steps.
            enough: number of ended sentences, on each device, after which it stops.
            waits: whether sentences are waiting, so that empty slots count in `filled` and `offered`.
        """
        if self._pool is None:
            empty = np.zeros(self._pool_shape, np.int32)
            self._pool = self._encoder(Tokens(empty, empty, empty), np.zeros(self._ensemble.mesh.size, np.int32))
        if self._listed_anew:
            self._replace_rows()
        ensemble, tenants = self._ensemble, self._tenants()
        self._arrivals = []
        self._progress, outcome = advance(
            ensemble.models,
            self._progress,
            self._pool,
            tenants,
            np.int32(steps),
            np.int32(enough),
            self._rows,
            configs=ensemble.configs,
            settings=self._settings,
            mesh=ensemble.mesh,
        )
        self._pending.append((outcome, list(self._requests), waits))

    def _tenants(self) -> Tenants:
        """Copies, since the device may read them while the next sentences are put in."""
        slots = self.size.slots
        is_new = np.zeros(slots, bool)
        row, start, length = (np.zeros(slots, np.int32) for _ in range(3))
        for slot, encoded in self._arrivals:
            is_new[slot] = True
            row[slot], start[slot], length[slot] = encoded.row, encoded.start, len(encoded.request.source)
        arrivals, count = self._by_device([slot for slot, _ in self._arrivals])
        return Tenants(
            active=np.array([request is not None for request in self._requests]),
            limits=self._limits.copy(),
            num_return=self._num_return.copy(),
            prefix=self._prefix.copy(),
            given=self._given.copy(),
            listed=None if self._listed is None else self._listed.copy(),
            rngs=None if self._rngs is None else self._rngs.copy(),
            is_new=is_new,
            arrivals=arrivals,
            count=count,
            row=row,
            start=start,
            length=length,
        )

    def _by_device(self, slots: Sequence[int]) -> tuple[Int[np.ndarray, "slots"], Int[np.ndarray, "devices"]]:
        """These slots, counted from 0 on each device and one device after the other, and how many each device has."""
        devices = self._ensemble.mesh.size
        own = self.size.slots // devices
        numbers, count = np.zeros(self.size.slots, np.int32), np.zeros(devices, np.int32)
        for slot in slots:
            device = slot // own
            numbers[device * own + count[device]] = slot % own
            count[device] += 1
        return numbers, count

    def _replace_rows(self) -> None:
        """Copies the rows of the output matrix for the sentences that have come since the last time."""
        if self._rows is None or self._listed is None:
            return
        changed, count = self._by_device(sorted(self._listed_anew))
        self._listed_anew.clear()
        ensemble = self._ensemble
        self._rows = replace_rows(
            ensemble.models,
            self._rows,
            self._listed.copy(),
            changed,
            count,
            configs=ensemble.configs,
            mesh=ensemble.mesh,
        )

    def collect(self) -> list[int]:
        """Reads the oldest chunk's outcome, and gives outputs to those that wait for them.

        Returns:
            The slots of the sentences that need more places than there are, which are to be moved.
        """
        outcome, requests, waits = self._pending.popleft()
        is_open, step, steps, living = jax.device_get((outcome.is_open, outcome.step, outcome.steps, outcome.living))
        if waits:
            self.filled += int(living.sum())
            self.offered += int(steps.sum()) * self.size.slots // self._ensemble.mesh.size
        present = [
            (slot, request)
            for slot, request in enumerate(requests)
            if request is not None and self._requests[slot] is request
        ]
        ended = [slot for slot, _ in present if not is_open[slot]]
        if ended or any(request.streams for _, request in present):
            hypotheses = jax.device_get(vars(outcome.hypotheses))
            for slot, request in present:
                if request.streams:
                    request.tell(hypotheses["tokens"][slot, 0, : step[slot]].tolist())
                if not is_open[slot]:
                    request.finish(_outputs(hypotheses, slot, request.num_return))
                    self._requests[slot] = None
        return [slot for slot, _ in present if is_open[slot] and step[slot] >= self.size.target]

    def give(self, slot: int, other: "Machine") -> None:
        """Moves the sentence of a slot to an empty slot of a machine with more places."""
        request = self._requests[slot]
        assert request is not None
        new_slot = other._requests.index(None)
        options = {"pad_id": self._ensemble.pad_id, "mesh": self._ensemble.mesh}
        other._progress = move(self._progress, other._progress, np.int32(slot), np.int32(new_slot), **options)
        other._seat(new_slot, request)
        self._requests[slot] = None

    def compile(self) -> None:
        """Compiles its programs, by encoding nothing and making no step."""
        self._replace_rows()
        self.dispatch(0, 1, waits=False)
        jax.block_until_ready(self._pending.popleft()[0])


def _outputs(hypotheses: dict[str, Any], slot: int, count: int) -> list[Output]:
    lengths, tokens, log_probs = (hypotheses[name][slot] for name in ("lengths", "tokens", "token_log_probs"))
    return [
        Output(tokens[rank, :length].copy(), log_probs[rank, :length].copy())
        for rank, length in enumerate(lengths[:count])
        if length
    ]

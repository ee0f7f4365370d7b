"""Takes a pure step and leaves it running on the devices at hand: `jit` on one, `pmap` on several, of all processes.

Whatever the way, the compiled step takes and returns the same un-stacked state, so that checkpoints, losses and the
loop around it are the same. A process gives its own rows of the global batch, those of its own devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

AXIS = "batch"


class Parallelism:
    """A way of running steps on devices.

    Attributes:
        kind: "jit" or "pmap".
        devices: of all processes.
        num_devices: by which the rows of a global batch are divided.
    """

    def __init__(self, kind: str, devices: list[jax.Device] | None = None):
        """Chooses devices.

        Args:
            kind: "auto" (`pmap` on several devices, `jit` on one), "jit" (the first device alone) or "pmap".
            devices: those of all processes if not given.

        Raises:
            ValueError: one device is asked for, and there are several processes.
        """
        devices = jax.devices() if devices is None else devices
        if kind == "auto":
            kind = "pmap" if len(devices) > 1 else "jit"
        if kind == "jit" and jax.process_count() > 1:
            raise ValueError(
                f'training.parallelism is "jit", one device of one process, and there are {jax.process_count()} '
                'processes: set it to "pmap" or "auto"'
            )
        self.kind = kind
        self.devices = devices if kind == "pmap" else devices[:1]
        self.num_devices = len(self.devices)
        self._mesh = _mesh(self.devices)
        self._local_mesh = _mesh([device for device in self.devices if device.process_index == jax.process_index()])

    def __str__(self) -> str:
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        device = f"{self.devices[0].device_kind} device{'s'[: self.num_devices > 1]}"
        return f"{self.kind} on {self.num_devices} {device}{processes}"

    def micro_batches(self, rows: int, rows_per_device: int) -> int:
        """In how many parts each device takes its share of `rows`, if it takes `rows_per_device` at most; 0 is all."""
        share = -(-rows // self.num_devices)
        return -(-share // rows_per_device) if rows_per_device else 1

    def place(self, state: PyTree) -> PyTree:
        """Puts a state on every device, whole; a step that donates the result spends what was given too."""
        return jax.device_put(state, NamedSharding(self._local_mesh, PartitionSpec()))

    def as_global(self, state: PyTree) -> PyTree:
        """The state as arrays of all processes together, as checkpoints hold it; no copy."""
        if jax.process_count() == 1:
            return state
        return multihost_utils.host_local_array_to_global_array(state, self._mesh, PartitionSpec())

    def as_local(self, state: PyTree) -> PyTree:
        """The way back from `as_global`: as the compiled step takes it."""
        if jax.process_count() == 1:
            return state
        return multihost_utils.global_array_to_host_local_array(state, self._mesh, PartitionSpec())

    def compile(self, step: Callable[..., Any], *, donate_state: bool) -> Callable[[PyTree, PyTree], Any]:
        """Makes a step of (state, batch, *, axis_name) run on the devices.

        Args:
            step: pure; sums over `axis_name` if it is given one.
            donate_state: whether the state's memory is reused for the result, which spends the state passed in.
        """
        donated = (0,) if donate_state else ()
        if self.kind == "jit":
            return jax.jit(step, donate_argnums=donated)
        parallel_step = jax.pmap(
            lambda state, batch: step(state, batch, axis_name=AXIS),
            axis_name=AXIS,
            in_axes=(None, 0),
            out_axes=None,
            donate_argnums=donated,
            devices=self.devices,
        )
        return lambda state, batch: parallel_step(state, self._divide(batch))

    def _divide(self, batch: PyTree) -> PyTree:
        devices = self._local_mesh.size
        return jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), batch)


def _mesh(devices: list[jax.Device]) -> Mesh:
    return Mesh(np.array(devices), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))

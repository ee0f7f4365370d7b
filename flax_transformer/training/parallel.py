"""Takes a pure step and leaves it running on the devices at hand: `jit` on one, `pmap` on several.

Whatever the way, the compiled step takes and returns the same un-stacked state and a batch of global shape, so that
checkpoints, losses and the loop around it are the same.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

AXIS = "batch"


class Parallelism:
    """A way of running steps on devices.

    Attributes:
        num_devices: by which the rows of a batch are divided.
    """

    def __init__(self, kind: str, devices: list[jax.Device] | None = None):
        """Chooses devices.

        Args:
            kind: "auto" (`pmap` on several devices, `jit` on one), "jit" (the first device alone) or "pmap".
            devices: those of this process if not given.
        """
        devices = jax.local_devices() if devices is None else devices
        if kind == "auto":
            kind = "pmap" if len(devices) > 1 else "jit"
        self.kind = kind
        self.devices = devices if kind == "pmap" else devices[:1]
        self.num_devices = len(self.devices)
        self._mesh = Mesh(np.array(self.devices), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))

    def __str__(self) -> str:
        return f"{self.kind} on {self.num_devices} {self.devices[0].device_kind} device{'s'[: self.num_devices > 1]}"

    def place(self, state: PyTree) -> PyTree:
        """Puts a state on every device, whole; a step that donates the result spends what was given too."""
        return jax.device_put(state, NamedSharding(self._mesh, PartitionSpec()))

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
        return jax.tree.map(lambda leaf: leaf.reshape(self.num_devices, -1, *leaf.shape[1:]), batch)

"""Takes a pure step and runs it on the devices of all processes: with `jit` on one, `pmap`, or `jit` over a mesh.

In all three ways the compiled step takes and returns the same un-stacked state, so the checkpoints and the training
loop are the same too. Each process passes the rows of the global batch that belong to its own devices.

A mesh has two axes. Along "data" each device keeps all parameters; along "fsdp" each keeps a part of the parameters and
of the optimizer's state (Zhao et al., 2023; ZeRO stage 3 of Rajbhandari et al., 2020). The rows of a batch are divided
along both, and so are the activations: the layers name their first dimension "batch" (`nn.with_logical_constraint`).
"""

import re
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from flax_transformer.monitoring.utilization import memory_of

# The axis of `pmap`, and the name that the layers give to the dimension of rows.
AXIS = "batch"

# The matrices that are divided along "fsdp", by the end of their names, and the dimension that is divided. Where the
# number of devices does not divide that dimension, the other one is taken. The first rule that matches a name applies.
# All other arrays (biases, norms, counters) are small and stay whole.
RULES = (
    ("embedding", 0),
    ("output_kernel", 1),
    ("outer/kernel", 0),
    ("kernel", 1),
)


class Parallelism:
    """A way of running steps on devices.

    Attributes:
        kind: "jit", "pmap" or "mesh".
        devices: the devices of all processes.
        num_devices: their number; the rows of a global batch are divided among them.
    """

    def __init__(self, kind: str, devices: list[jax.Device] | None = None):
        """Chooses devices.

        Args:
            kind: "auto" (`pmap` on several devices, `jit` on one), "jit" (the first device alone), "pmap", "data" or
                "fsdp" (a mesh with that axis alone), or the size of one axis or both, e.g. "data=2,fsdp=4".
            devices: the devices to use; by default those of all processes.

        Raises:
            ValueError: "jit" is asked for and there are several processes, or the sizes of the mesh do not multiply to
                the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        # The rows that a process reads are consecutive, so its devices must be consecutive too.
        devices = sorted(devices, key=lambda device: device.process_index)
        if kind == "auto":
            kind = "pmap" if len(devices) > 1 else "jit"
        if kind == "jit" and jax.process_count() > 1:
            raise ValueError(
                f'training.parallelism.layout is "jit", one device of one process, and there are {jax.process_count()} '
                'processes: set it to "pmap" or "auto"'
            )
        self.kind = kind if kind in ("jit", "pmap") else "mesh"
        self.devices = devices[:1] if kind == "jit" else devices
        self.num_devices = len(self.devices)
        if self.kind == "mesh":
            self._mesh = self._local_mesh = _mesh(self.devices, mesh_shape(kind, self.num_devices))
        else:
            local = [device for device in self.devices if device.process_index == jax.process_index()]
            self._mesh = _mesh(self.devices, {AXIS: self.num_devices})
            self._local_mesh = _mesh(local, {AXIS: len(local)})

    @property
    def local_devices(self) -> list[jax.Device]:
        """Those of the devices that belong to this process."""
        return [device for device in self.devices if device.process_index == jax.process_index()]

    def __str__(self) -> str:
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        device = f"{self.devices[0].device_kind} device{'s'[: self.num_devices > 1]}"
        kind = self.kind
        if kind == "mesh":
            kind = "jit over a mesh of " + " x ".join(f"{size} {name}" for name, size in self._mesh.shape.items())
        return f"{kind} on {self.num_devices} {device}{processes}"

    def micro_batches(self, rows: int, rows_per_device: int) -> int:
        """The number of parts in which each device processes its share of `rows`.

        Args:
            rows: of a global batch.
            rows_per_device: the largest part that a device processes at once; 0 means its whole share.
        """
        share = -(-rows // self.num_devices)
        return -(-share // rows_per_device) if rows_per_device else 1

    def sharding(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        """How an array of the state is divided among devices.

        Args:
            name: its path, e.g. "params/encoder/layers_0/feed_forward/inner/kernel".
            shape: the shape of the whole array.
        """
        spec = PartitionSpec()
        if self.kind == "mesh":
            first = next((dimension for ending, dimension in RULES if name.endswith(ending)), None)
            if first is not None and len(shape) == 2:
                for dimension in (first, 1 - first):
                    if shape[dimension] % self._mesh.shape["fsdp"] == 0:
                        spec = PartitionSpec(*[None] * dimension, "fsdp")
                        break
        return NamedSharding(self._local_mesh, spec)

    def create(self, function: Callable[..., PyTree], *arguments: Any) -> PyTree:
        """The result of a pure function, created in its parts, so that no device ever holds more than its own."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes(function, *arguments))
        return jax.jit(function, out_shardings=shardings)(*arguments)

    def shapes(self, function: Callable[..., PyTree], *arguments: Any) -> PyTree:
        """The shapes, types and shardings of the arrays that `create` would create."""
        return jax.tree.map_with_path(
            lambda path, leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=self.sharding(_name(path), leaf.shape)
            ),
            jax.eval_shape(function, *arguments),
        )

    def lower(self, step: Callable[..., Any], state: PyTree, batch: PyTree) -> jax.stages.Lowered:
        """A step that donates its state, ready to be compiled for the devices, which do not have to exist.

        Args:
            step: as in `compile`.
            state: from `shapes`.
            batch: the shapes of all rows.
        """
        if self.kind == "pmap":
            # It places the state by itself, and has one more dimension in front of the rows: the devices.
            count = self.num_devices
            state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
            batch = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((count, leaf.shape[0] // count, *leaf.shape[1:]), leaf.dtype), batch
            )
        else:
            sharding = self.batch_sharding
            batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), batch)
        return self.transform(step, donate_state=True).lower(state, batch)

    def place(self, state: PyTree) -> PyTree:
        """Divides a state among the devices; a step that donates the result may use up the given state too."""
        if self.kind == "mesh" and jax.process_count() > 1:
            # A process cannot copy from one of its devices to those of another process.
            state = jax.device_get(state)
        return jax.tree.map_with_path(
            lambda path, leaf: jax.device_put(leaf, self.sharding(_name(path), leaf.shape)), state
        )

    def as_global(self, state: PyTree) -> PyTree:
        """The state as arrays of all processes together, which checkpoints hold; nothing is copied."""
        if jax.process_count() == 1 or self.kind == "mesh":
            return state
        return multihost_utils.host_local_array_to_global_array(state, self._mesh, PartitionSpec())

    def as_local(self, state: PyTree) -> PyTree:
        """The opposite of `as_global`: the state as the compiled step takes it."""
        if jax.process_count() == 1 or self.kind == "mesh":
            return state
        return multihost_utils.global_array_to_host_local_array(state, self._mesh, PartitionSpec())

    def as_whole(self, params: PyTree) -> PyTree:
        """The parameters whole, which translating needs: on each device, or with several processes on one of a mesh."""
        if self.kind != "mesh":
            return params
        whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(self._mesh, PartitionSpec()))(params)
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole) if jax.process_count() > 1 else whole

    def compile(self, step: Callable[..., Any], *, donate_state: bool) -> "ParallelStep":
        """A step that runs on the devices.

        Args:
            step: a pure function of (state, batch, *, axis_name), which sums over `axis_name` if there is one.
            donate_state: whether the result reuses the memory of the state, which can then be used no more.
        """
        return ParallelStep(self, step, donate_state=donate_state)

    def transform(self, step: Callable[..., Any], *, donate_state: bool) -> Any:
        """The step under `jit` or `pmap`: it takes batches from `divide`, and has the method `lower`."""
        donated = (0,) if donate_state else ()
        if self.kind == "jit":
            return jax.jit(step, donate_argnums=donated)
        if self.kind == "mesh":
            return jax.jit(lambda state, batch: self._on_mesh(step, state, batch), donate_argnums=donated)
        return jax.pmap(
            lambda state, batch: step(state, batch, axis_name=AXIS),
            axis_name=AXIS,
            in_axes=(None, 0),
            out_axes=None,
            donate_argnums=donated,
            devices=self.devices,
        )

    def _on_mesh(self, step: Callable[..., Any], state: PyTree, batch: PyTree) -> Any:
        """The step, in which the layers divide the rows of their activations as those of the batch are divided.

        Results are divided by `sharding`, as the state was. XLA might otherwise divide the new state in another way.
        """
        rules = ((AXIS, self._mesh.axis_names),)
        with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh), nn.logical_axis_rules(rules):
            made = step(state, batch)
        return jax.tree.map_with_path(
            lambda path, leaf: jax.lax.with_sharding_constraint(leaf, self.sharding(_name(path), leaf.shape)), made
        )

    @property
    def batch_sharding(self) -> NamedSharding:
        """How the rows of a batch are divided over a mesh."""
        return NamedSharding(self._mesh, PartitionSpec(tuple(self._mesh.axis_names)))

    def divide(self, batch: PyTree) -> PyTree:
        """Divides this process's rows of a batch among its devices, for a step from `transform`."""
        if self.kind == "jit":
            return batch
        if self.kind == "mesh":
            return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(self.batch_sharding, leaf), batch)
        devices = self._local_mesh.size
        return jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), batch)


class ParallelStep:
    """A step of (state, batch), compiled at the first call; later arguments must have the shapes of the first ones.

    Attributes:
        trace_seconds: time for tracing and lowering; 0 before the first call, and where `compile_seconds` includes it.
        compile_seconds: time for compiling, or for reading a program that an earlier run has compiled.
        memory: bytes of each device that the program needs; 0 if unknown.
    """

    def __init__(self, parallelism: Parallelism, step: Callable[..., Any], *, donate_state: bool):
        """Compiles nothing yet; arguments as in `Parallelism.compile`."""
        self._parallelism, self._step, self._donate_state = parallelism, step, donate_state
        self._compiled: Callable[..., Any] | None = None
        self.trace_seconds = self.compile_seconds = 0.0
        self.memory = 0

    def __call__(self, state: PyTree, batch: PyTree) -> Any:
        """The result of the step."""
        batch = self._parallelism.divide(batch)
        if self._compiled is None:
            begin = time.monotonic()
            transformed = self._parallelism.transform(self._step, donate_state=self._donate_state)
            if self._parallelism.kind == "pmap" and jax.process_count() > 1:
                # A step compiled ahead would expect the rows of all processes from each of them (jax 0.10).
                self._compiled = transformed
                result = transformed(state, batch)
                self.compile_seconds = time.monotonic() - begin
                return result
            lowered = transformed.lower(state, batch)
            self.trace_seconds, begin = time.monotonic() - begin, time.monotonic()
            self._compiled = compiled = lowered.compile()
            self.compile_seconds = time.monotonic() - begin
            self.memory = memory_of(compiled)
        return self._compiled(state, batch)


def mesh_shape(kind: str, num_devices: int) -> dict[str, int]:
    """The sizes of a mesh's axes, from `training.parallelism.layout`; raises ValueError if they do not fit."""
    sizes = {"data": 1, "fsdp": 1}
    if kind in sizes:
        return sizes | {kind: num_devices}
    sizes |= {name: int(size) for name, size in re.findall(r"(data|fsdp)=(\d+)", kind)}
    if sizes["data"] * sizes["fsdp"] != num_devices:
        raise ValueError(
            f"training.parallelism.layout is {kind!r}, which needs {sizes['data'] * sizes['fsdp']} devices, but there "
            f"are {num_devices}: choose sizes whose product is {num_devices}, or pmap, data or fsdp alone"
        )
    return sizes


def _mesh(devices: list[jax.Device], shape: dict[str, int]) -> Mesh:
    axis_types = (jax.sharding.AxisType.Auto,) * len(shape)
    return Mesh(np.array(devices).reshape(*shape.values()), tuple(shape), axis_types=axis_types)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")

"""Takes a pure step and leaves it running on the devices of all processes: `jit` on one, `pmap`, or `jit` over a mesh.

Whatever the way, the compiled step takes and returns the same un-stacked state, so that checkpoints, losses and the
loop around it are the same. A process gives its own rows of the global batch, those of its own devices.

A mesh has two axes: over "data" the parameters lie whole on each device, over "fsdp" each device keeps a part of them
and of the optimizer's state (Zhao et al., 2023; ZeRO stage 3 of Rajbhandari et al., 2020). The rows of a batch are
divided over both.
"""

import functools
import re
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.linen.module import InterceptorContext
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from flax_transformer.monitoring.utilization import memory_of

AXIS = "batch"

# What is divided over "fsdp": by the end of its name, the dimension, or the other one where the axis does not divide
# that; the rest (biases, norms, counters) is small. The first rule that fits counts.
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
        devices: of all processes.
        num_devices: by which the rows of a global batch are divided.
    """

    def __init__(self, kind: str, devices: list[jax.Device] | None = None):
        """Chooses devices.

        Args:
            kind: "auto" (`pmap` on several devices, `jit` on one), "jit" (the first device alone), "pmap", "data" or
                "fsdp" (a mesh with that axis alone), or the size of one or both, e.g. "data=2,fsdp=4".
            devices: those of all processes if not given.

        Raises:
            ValueError: one device is asked for, and there are several processes, or a mesh has not as many places as
                there are devices.
        """
        devices = jax.devices() if devices is None else devices
        # A process reads rows that lie one after another.
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

    def __str__(self) -> str:
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        device = f"{self.devices[0].device_kind} device{'s'[: self.num_devices > 1]}"
        kind = self.kind
        if kind == "mesh":
            kind = "jit over a mesh of " + " x ".join(f"{size} {name}" for name, size in self._mesh.shape.items())
        return f"{kind} on {self.num_devices} {device}{processes}"

    def micro_batches(self, rows: int, rows_per_device: int) -> int:
        """In how many parts each device takes its share of `rows`, if it takes `rows_per_device` at most; 0 is all."""
        share = -(-rows // self.num_devices)
        return -(-share // rows_per_device) if rows_per_device else 1

    def sharding(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        """Where an array of the state lies.

        Args:
            name: its path, e.g. "params/encoder/layers_0/feed_forward/inner/kernel".
            shape: of the whole array.
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
        """What a pure function makes, made where it will lie: no device ever holds more than its part."""
        shapes, structure = self.shapes(function, *arguments)

        def leaves_of(*arguments: Any) -> list[jax.Array]:
            return jax.tree.leaves(function(*arguments))

        leaves = jax.jit(leaves_of, out_shardings=[shape.sharding for shape in shapes])(*arguments)
        return jax.tree.unflatten(structure, leaves)

    def shapes(self, function: Callable[..., PyTree], *arguments: Any) -> tuple[list[jax.ShapeDtypeStruct], Any]:
        """What a pure function would make: its leaves' shapes, types and places, and the structure that holds them."""
        structure = None
        names: list[str] = []

        def leaves_of(*arguments: Any) -> list[jax.Array]:
            nonlocal structure
            with_paths, structure = jax.tree.flatten_with_path(function(*arguments))
            names[:] = [_name(path) for path, _ in with_paths]
            return [leaf for _, leaf in with_paths]

        shapes = jax.eval_shape(leaves_of, *arguments)
        placed = [
            jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=self.sharding(name, shape.shape))
            for name, shape in zip(names, shapes, strict=True)
        ]
        return placed, structure

    def lower(
        self, step: Callable[..., Any], state: tuple[list[jax.ShapeDtypeStruct], Any], batch: PyTree
    ) -> jax.stages.Lowered:
        """A step that donates its state, ready to be compiled for the devices, which need not be there.

        Args:
            step: as in `compile`.
            state: from `shapes`.
            batch: the shapes of all rows.
        """
        leaves, structure = state
        rows, layout = jax.tree.flatten(batch)
        if self.kind == "pmap":
            # It finds places for itself.
            leaves = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
            rows = [
                jax.ShapeDtypeStruct((self.num_devices, leaf.shape[0] // self.num_devices, *leaf.shape[1:]), leaf.dtype)
                for leaf in rows
            ]
        else:
            sharding = self.batch_sharding
            rows = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for leaf in rows]

        return self.transform(_on_leaves(step, structure, layout), donate_state=True).lower(leaves, rows)

    def place(self, state: PyTree) -> PyTree:
        """Puts a state where it belongs; a step that donates the result spends what was given too."""
        if self.kind == "mesh" and jax.process_count() > 1:
            # From a device of its own a process can give no other one its part.
            state = jax.device_get(state)
        return jax.tree.map_with_path(
            lambda path, leaf: jax.device_put(leaf, self.sharding(_name(path), leaf.shape)), state
        )

    def as_global(self, state: PyTree) -> PyTree:
        """The state as arrays of all processes together, as checkpoints hold it; no copy."""
        if jax.process_count() == 1 or self.kind == "mesh":
            return state
        return multihost_utils.host_local_array_to_global_array(state, self._mesh, PartitionSpec())

    def as_local(self, state: PyTree) -> PyTree:
        """The way back from `as_global`: as the compiled step takes it."""
        if jax.process_count() == 1 or self.kind == "mesh":
            return state
        return multihost_utils.global_array_to_host_local_array(state, self._mesh, PartitionSpec())

    def as_whole(self, params: PyTree) -> PyTree:
        """Parameters whole on each of this process's devices, as translating wants them."""
        if self.kind != "mesh":
            return params
        whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(self._mesh, PartitionSpec()))(params)
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole) if jax.process_count() > 1 else whole

    def compile(self, step: Callable[..., Any], *, donate_state: bool) -> "ParallelStep":
        """Makes a step of (state, batch, *, axis_name) run on the devices.

        Args:
            step: pure; sums over `axis_name` if it is given one.
            donate_state: whether the state's memory is reused for the result, which spends the state passed in.
        """
        return ParallelStep(self, step, donate_state=donate_state)

    def transform(self, step: Callable[..., Any], *, donate_state: bool) -> Any:
        """The step under `jit` or `pmap`, which takes batches from `divide`, and can also be lowered."""
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
        """The step, with the compiler told how its arrays are divided.

        Activations are divided by rows as the batch is: left to itself, XLA may divide them as the kernels are, and
        gather whole activations in place of kernels. It does not divide the work of the generator "rbg" at all: each
        device draws for its own rows. What is made lies as the state lay, or it would wander.
        """
        rows = self.batch_sharding

        def drop(run: Callable[..., Any], inputs: jax.Array, rng: jax.Array) -> jax.Array:
            return run(inputs, jax.random.fold_in(rng, jax.lax.axis_index(self._mesh.axis_names)))

        def divide_rows(run: Callable[..., Any], arguments: Any, options: Any, context: InterceptorContext) -> Any:
            if context.method_name == "drop" and str(jax.random.key_impl(arguments[1])) != "threefry2x32":
                specs = rows.spec, PartitionSpec()
                run = jax.shard_map(
                    functools.partial(drop, run), mesh=self._mesh, in_specs=specs, out_specs=rows.spec, check_vma=False
                )
            made = run(*arguments, **options)
            divided = isinstance(context.module, nn.Dense | nn.Embed) and isinstance(made, jax.Array)
            return jax.lax.with_sharding_constraint(made, rows) if divided else made

        with nn.intercept_methods(divide_rows):
            made = step(state, batch)
        return jax.tree.map_with_path(
            lambda path, leaf: jax.lax.with_sharding_constraint(leaf, self.sharding(_name(path), leaf.shape)), made
        )

    @property
    def batch_sharding(self) -> NamedSharding:
        """How the rows of a batch are divided over a mesh."""
        return NamedSharding(self._mesh, PartitionSpec(tuple(self._mesh.axis_names)))

    def divide(self, batch: PyTree) -> PyTree:
        """This process's rows of a batch, divided among its devices as the step under `transform` takes them."""
        if self.kind == "jit":
            return batch
        if self.kind == "mesh":
            return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(self.batch_sharding, leaf), batch)
        devices = self._local_mesh.size
        return jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), batch)


class ParallelStep:
    """A step of (state, batch) that is compiled for the first two that it gets; all others have their shapes.

    Attributes:
        trace_seconds: what tracing and lowering took; 0 before the first call, and where it is part of the next.
        compile_seconds: what compiling took, or reading what was compiled by an earlier run.
        memory: bytes of a device that it takes; 0 where that is not known.
    """

    def __init__(self, parallelism: Parallelism, step: Callable[..., Any], *, donate_state: bool):
        """Compiles nothing yet; arguments as in `Parallelism.compile`."""
        self._parallelism, self._step, self._donate_state = parallelism, step, donate_state
        self._compiled: Callable[..., Any] | None = None
        self.trace_seconds = self.compile_seconds = 0.0
        self.memory = 0

    def __call__(self, state: PyTree, batch: PyTree) -> Any:
        """What the step makes."""
        leaves, structure = jax.tree.flatten(state)
        rows, layout = jax.tree.flatten(self._parallelism.divide(batch))
        if self._compiled is None:
            begin = time.monotonic()
            step = _on_leaves(self._step, structure, layout)
            transformed = self._parallelism.transform(step, donate_state=self._donate_state)
            if self._parallelism.kind == "pmap" and jax.process_count() > 1:
                # Compiled ahead, it would want from each process the rows of all (jax 0.10).
                self._compiled = transformed
                result = transformed(leaves, rows)
                self.compile_seconds = time.monotonic() - begin
                return result
            lowered = transformed.lower(leaves, rows)
            self.trace_seconds, begin = time.monotonic() - begin, time.monotonic()
            self._compiled = compiled = lowered.compile()
            self.compile_seconds = time.monotonic() - begin
            self.memory = memory_of(compiled)
        return self._compiled(leaves, rows)


def _on_leaves(step: Callable[..., Any], structure: Any, layout: Any) -> Callable[..., Any]:
    """The same step of the leaves of a state and of a batch: what jax tells of lists has no types that must hold."""

    def on_leaves(leaves: list[jax.Array], rows: list[jax.Array], **axis: Any) -> Any:
        return step(jax.tree.unflatten(structure, leaves), jax.tree.unflatten(layout, rows), **axis)

    return on_leaves


def mesh_shape(kind: str, num_devices: int) -> dict[str, int]:
    """The sizes of a mesh's axes, as `training.parallelism.layout` names them; raises ValueError unless they fit."""
    sizes = {"data": 1, "fsdp": 1}
    if kind in sizes:
        return sizes | {kind: num_devices}
    sizes |= {name: int(size) for name, size in re.findall(r"(data|fsdp)=(\d+)", kind)}
    if sizes["data"] * sizes["fsdp"] != num_devices:
        raise ValueError(
            f"training.parallelism.layout is {kind!r}, {sizes['data'] * sizes['fsdp']} places for {num_devices} "
            "devices: let the sizes multiply to the number of devices"
        )
    return sizes


def _mesh(devices: list[jax.Device], shape: dict[str, int]) -> Mesh:
    axis_types = (jax.sharding.AxisType.Auto,) * len(shape)
    return Mesh(np.array(devices).reshape(*shape.values()), tuple(shape), axis_types=axis_types)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")

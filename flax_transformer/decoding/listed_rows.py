"""Keeps the rows of the output matrix that belong to the listed tokens of each slot's sentence.

With a shortlist each sentence computes the logits of its own tokens alone, from a copy of their rows. A copy is made
when the sentence gets its slot and stays until another sentence takes its place: to copy the rows of all slots takes
about as long as a step of the search.

Glossary: B slots, C tokens listed for each, D model width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Int

from flax_transformer.decoding.ensemble import BATCH_AXIS, Configs, Models, Rows, copies_rows, divided, rows_of


@functools.partial(jax.jit, static_argnames=("configs", "slots", "listed", "mesh"))
def empty_rows(models: Models, *, configs: Configs, slots: int, listed: int, mesh: Mesh) -> Rows | None:
    """Room for the rows of some slots.

    Args:
        models: the parameters of each model.
        configs: the config of each model.
        slots: number of slots, B.
        listed: number of tokens for each, C.
        mesh: the devices that share the slots.

    Returns:
        The rows of each model, zero; `None` where nothing is listed, or too much to be copied.
    """
    if not copies_rows(slots // mesh.size * listed):
        return None
    ids = jax.ShapeDtypeStruct((slots, listed), jnp.int32)
    shapes = jax.eval_shape(functools.partial(rows_of, configs=configs), models, ids)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.with_sharding_constraint(zeros, NamedSharding(mesh, Spec(BATCH_AXIS)))


@functools.partial(jax.jit, static_argnames=("configs", "mesh"), donate_argnames=("rows",))
def replace_rows(
    models: Models,
    rows: Rows,
    listed: Int[Array, "B C"],
    changed: Int[Array, "B"],
    count: Int[Array, "devices"],
    *,
    configs: Configs,
    mesh: Mesh,
) -> Rows:
    """The rows with those of some slots copied anew.

    Args:
        models: the parameters of each model.
        rows: the rows so far; their memory is used for the result.
        listed: the tokens of each slot, then -1.
        changed: the slots whose tokens are other ones than before, counted from 0 on each device; only the first
            `count` are read.
        count: how many these are on each device.
        configs: the config of each model.
        mesh: the devices that share the slots.
    """

    def run(models: Models, rows: Rows, listed: jax.Array, changed: jax.Array, count: jax.Array) -> Rows:
        def put(number: jax.Array, rows: Rows) -> Rows:
            slot = changed[number]
            new = rows_of(models, jax.lax.dynamic_slice_in_dim(listed, slot, 1), configs=configs)
            return jax.tree.map(
                lambda whole, own: jax.lax.dynamic_update_slice_in_dim(whole, own, slot, axis=0), rows, new
            )

        return jax.lax.fori_loop(0, count[0], put, rows)

    return divided(run, mesh, shared=1)(models, rows, listed, changed, count)

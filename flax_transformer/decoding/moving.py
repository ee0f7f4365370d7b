"""Moves a sentence from its slot to a slot of another machine, which has as much room or more.

Glossary: as in `slots.py`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Int

from flax_transformer.attention import KVCache
from flax_transformer.decoding.ensemble import BATCH_AXIS
from flax_transformer.decoding.search import Hypotheses, Progress
from flax_transformer.stacks import DecodingState


@functools.partial(jax.jit, static_argnames=("pad_id", "mesh"), donate_argnames=("new",))
def move(
    old: Progress, new: Progress, old_slot: Int[Array, ""], new_slot: Int[Array, ""], *, pad_id: int, mesh: Mesh
) -> Progress:
    """Copies the sentence of one slot to a slot of another machine, which has as much room or more.

    Args:
        old: the slots that hold the sentence.
        new: the slots that are to hold it; their memory is used for the result.
        old_slot: its slot.
        new_slot: the slot to put it in; what is in it is lost.
        pad_id: the id of padding.
        mesh: the devices that share the slots.
    """

    def widened(whole: jax.Array, leaf: jax.Array, filler: float = 0) -> jax.Array:
        widths = [(0, larger - size) for larger, size in zip(whole.shape[1:], leaf.shape[1:], strict=True)]
        return whole.at[new_slot].set(jnp.pad(leaf[old_slot], widths, constant_values=filler))

    def moved_hypotheses(whole: Hypotheses, leaf: Hypotheses) -> Hypotheses:
        copied = jax.tree.map(widened, whole, leaf)
        return copied.replace(tokens=widened(whole.tokens, leaf.tokens, pad_id))

    states = tuple(
        _move_state(state, other, old_slot, new_slot, old.step[old_slot], mesh, widened)
        for state, other in zip(old.state, new.state, strict=True)
    )
    moved = Progress(
        step=new.step.at[new_slot].set(old.step[old_slot]),
        state=states,
        live=moved_hypotheses(new.live, old.live),
        ended=moved_hypotheses(new.ended, old.ended),
    )
    return jax.lax.with_sharding_constraint(moved, NamedSharding(mesh, Spec(BATCH_AXIS)))


def _move_state(
    old: DecodingState,
    new: DecodingState,
    old_slot: jax.Array,
    new_slot: jax.Array,
    step: jax.Array,
    mesh: Mesh,
    widened: Callable[[jax.Array, jax.Array, float], jax.Array],
) -> DecodingState:
    """The new state with the old sentence in its slot.

    The entry that was written k steps ago in the old ring goes to the place of k steps ago in the new one.
    """
    (slots, hypotheses, room), (new_slots, _, new_room) = old.ancestors.shape, new.ancestors.shape
    next_old = old.place[old_slot // (slots // mesh.size)]
    next_new = new.place[new_slot // (new_slots // mesh.size)]
    age = (next_new - 1 - jnp.arange(new_room)) % new_room
    place = (next_old - 1 - age) % room  # anything for places that are older than the old ring, which nothing sees

    def rotated(whole: jax.Array, leaf: jax.Array, axis: int) -> jax.Array:
        """`axis` of a sentence holds its L * N entries."""
        sentence = leaf[old_slot]
        shape = sentence.shape
        by_place = sentence.reshape(*shape[:axis], room, -1, *shape[axis + 1 :])
        return whole.at[new_slot].set(jnp.take(by_place, place, axis=axis).reshape(whole.shape[1:]))

    own = jnp.arange(hypotheses, dtype=jnp.int32)[:, None]
    ancestors = jnp.where(age < room, jnp.take(old.ancestors[old_slot], place, axis=1), own)
    return new.replace(
        position=new.position.at[new_slot].set(step),
        ancestors=new.ancestors.at[new_slot].set(ancestors),
        target=tuple(
            KVCache(key=rotated(whole.key, leaf.key, 2), value=rotated(whole.value, leaf.value, 1))
            for whole, leaf in zip(new.target, old.target, strict=True)
        ),
        recurrent=jax.tree.map(lambda whole, leaf: widened(whole, leaf, 0), new.recurrent, old.recurrent),
        memory=jax.tree.map(lambda whole, leaf: widened(whole, leaf, 0), new.memory, old.memory),
        memory_mask=widened(new.memory_mask, old.memory_mask, -jnp.inf),
    )

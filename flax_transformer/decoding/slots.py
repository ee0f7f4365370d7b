"""Slots: places on the device for sentences that come and go while one program moves all of them on.

         sources, packed               slots                              outputs
    [ a a a b b c c c c . ]  encode    [ a ] ─┐
    [ d d e e e e e e f f ] ────────▶  [ d ]  │ advance: one token for     a's tokens
                              pool     [   ]  │ every slot and step   ──▶  d's tokens
                                       [ e ] ─┘

`encode` makes keys and values of packed sources, the pool. `advance` first puts waiting sources of the pool into empty
slots, then decodes step by step until enough sentences have ended. Each slot counts its own steps, so a sentence can
begin while others are in the middle of theirs (see `DecodingState` for the cache that makes it possible). `move` takes
a sentence that needs more room to larger slots.

Memory of the slots in bytes, for each model: about 2 * B * num_decoder_layers * d_model * (N * L + S) activations, of 4
bytes each in float32. For the base model with 64 slots, N = 4, S = 32 and L = 48, as for 2,048 source tokens, that is
352 MB; the pool holds 2 * num_decoder_layers * d_model activations a source token, 50 MB for 2,048.

Glossary: B slots, N hypotheses of each, S places for source tokens, L places for output tokens, R rows of the pool,
W source tokens in each row.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Bool, Int, PyTree, UInt

from flax_transformer.attention import KVCache
from flax_transformer.config import TransformerConfig
from flax_transformer.decoding.ensemble import BATCH_AXIS, Configs, Models, divided, follow, step_function
from flax_transformer.decoding.search import Hypotheses, Progress, Search
from flax_transformer.decoding.settings import BeamSearch, Sampling
from flax_transformer.model import Transformer
from flax_transformer.stacks import DecodingState, first_ancestors
from flax_transformer.tokens import Tokens

ENCODED_AT_ONCE = 256  # source tokens: enough for fast matrix products
Pool = tuple[tuple[KVCache, ...], ...]  # of each model, of each decoder layer


class Size(NamedTuple):
    """The size of a machine's slots.

    Attributes:
        slots: number of slots, B; a multiple of the number of devices.
        source: places for source tokens in each slot, S.
        target: places for output tokens in each slot, L.
    """

    slots: int
    source: int
    target: int


class Tenants(flax.struct.PyTreeNode):
    """What the host says about the sentences in the slots, and which of them are new.

    Attributes:
        active: whether a slot holds a sentence that goes on.
        limits: the maximum length of each output, in tokens.
        num_return: how many outputs are wanted.
        prefix: the tokens with which each output must begin, padded.
        given: how many of these, from the first on, count nothing in scores.
        rngs: the data of a random key for each sentence; `None` where nothing is sampled.
        is_new: whether a slot's sentence begins now.
        arrivals: the slots of the new sentences, counted from 0 on each device, then anything.
        count: number of new sentences on each device.
        row: the row of the pool in which each new source lies.
        start: the place of its first token in that row.
        length: the number of its tokens.
    """

    active: Bool[Any, "B"]
    limits: Int[Any, "B"]
    num_return: Int[Any, "B"]
    prefix: Int[Any, "B L"]
    given: Int[Any, "B"]
    rngs: UInt[Any, "B key"] | None
    is_new: Bool[Any, "B"]
    arrivals: Int[Any, "B"]
    count: Int[Any, "devices"]
    row: Int[Any, "B"]
    start: Int[Any, "B"]
    length: Int[Any, "B"]


class Outcome(flax.struct.PyTreeNode):
    """What `advance` tells the host.

    Attributes:
        is_open: whether the sentence of a slot goes on.
        step: number of tokens that it has so far.
        hypotheses: its outputs; those of greedy search and sampling hold the tokens so far while it goes on.
        steps: number of steps made, on each device.
        living: sum over these steps of the slots whose sentence went on.
    """

    is_open: Bool[Array, "B"]
    step: Int[Array, "B"]
    hypotheses: Hypotheses
    steps: Int[Array, "devices"]
    living: Int[Array, "devices"]


@functools.partial(jax.jit, static_argnames=("configs", "mesh"))
def encode(models: Models, tokens: Tokens, used: Int[Array, "devices"], *, configs: Configs, mesh: Mesh) -> Pool:
    """Encodes packed sources, and projects them to the keys and values that the decoder's layers attend to.

    Args:
        models: the parameters of each model.
        tokens: the sources [R, W], each a segment of its row.
        used: how many rows of each device hold sources; the time is in proportion to it.
        configs: the config of each model.
        mesh: the devices, each of which encodes R / devices rows; the pool is then copied to all of them.
    """

    def run(models: Models, tokens: Tokens, used: jax.Array) -> Pool:
        rows, width = tokens.ids.shape
        block = min(rows, max(1, ENCODED_AT_ONCE // width))
        assert rows % block == 0, f"{rows} rows are encoded {block} at once"

        def encode_block(number: jax.Array, pool: Pool) -> Pool:
            part = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, number * block, block), tokens)
            new = tuple(_project_source(*model, part) for model in zip(configs, models, strict=True))
            return jax.tree.map(
                lambda whole, some: jax.lax.dynamic_update_slice_in_dim(whole, some, number * block, axis=0), pool, new
            )

        empty = {"batch": rows, "source_length": width, "hypotheses": 1, "max_length": 1}
        pool = tuple(DecodingState.empty(config, **empty).memory for config in configs)
        pool = jax.lax.fori_loop(0, (used[0] + block - 1) // block, encode_block, pool)
        return pool if mesh.size == 1 else jax.lax.all_gather(pool, BATCH_AXIS, axis=0, tiled=True)

    if mesh.size == 1:
        return run(models, tokens, used)
    specs = (Spec(), Spec(BATCH_AXIS), Spec(BATCH_AXIS))
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=Spec(), check_vma=False)(models, tokens, used)


def _project_source(config: TransformerConfig, params: PyTree, tokens: Tokens) -> tuple[KVCache, ...]:
    model, variables = Transformer(config), {"params": params}
    memory = model.apply(variables, tokens, deterministic=True, method="encode")
    return model.apply(variables, memory, method="project_memory")


@functools.partial(jax.jit, static_argnames=("configs", "settings", "size", "mesh"))
def empty_slots(*, configs: Configs, settings: BeamSearch | Sampling, size: Size, mesh: Mesh) -> Progress:
    """Empty slots; arguments as in `advance`."""
    state = tuple(
        DecodingState.empty(
            config,
            batch=size.slots,
            hypotheses=settings.hypotheses,
            max_length=size.target,
            source_length=size.source,
        ).replace(place=jnp.zeros(mesh.size, jnp.int32))
        for config in configs
    )
    limits = jnp.ones(size.slots, jnp.int32)
    rngs = jax.random.split(jax.random.key(0), size.slots)
    progress = _search((), configs, settings, size.target, limits=limits, rngs=rngs).start(state)
    return jax.lax.with_sharding_constraint(progress, NamedSharding(mesh, Spec(BATCH_AXIS)))


@functools.partial(jax.jit, static_argnames=("configs", "settings", "mesh"), donate_argnames=("progress",))
def advance(
    models: Models,
    progress: Progress,
    pool: Pool,
    tenants: Tenants,
    steps: Int[Array, ""],
    enough: Int[Array, ""],
    *,
    configs: Configs,
    settings: BeamSearch | Sampling,
    mesh: Mesh,
) -> tuple[Progress, Outcome]:
    """Puts the new sentences into their slots, then moves all slots on, one token at each step.

    It stops after `steps` steps, when `enough` sentences have ended since it began, when all have ended, and when one
    has used all its L places and is to be moved to larger slots. Slots without a sentence cost nothing but their share
    of the time.

    Args:
        models: the parameters of each model.
        progress: the slots; their memory is used for the result.
        pool: the keys and values of the sources that are to be put into slots.
        tenants: who is in the slots.
        steps: maximum number of steps.
        enough: number of sentences, on each device.
        configs: the config of each model.
        settings: the settings of the search; `num_return`, `extra_length` and `max_length` do not matter, since
            `tenants` says them for each slot.
        mesh: the devices that share the slots; each stops by itself.
    """

    def run(models, pool, steps, enough, progress: Progress, tenants: Tenants) -> tuple[Progress, Outcome]:
        room = tenants.prefix.shape[1]
        rngs = None if tenants.rngs is None else jax.random.wrap_key_data(tenants.rngs)
        told = {name: getattr(tenants, name) for name in ("limits", "prefix", "given", "num_return")}
        search = _search(models, configs, settings, room, rngs=rngs, **told)
        progress = _with_places(progress, lambda place: place[0])
        progress = _take_in(search, progress, pool, tenants)

        def is_open(progress: Progress) -> jax.Array:
            return tenants.active & search.open(progress)

        begun = jnp.sum(is_open(progress))

        def goes_on(carry: tuple[Progress, jax.Array, jax.Array]) -> jax.Array:
            progress, made, _ = carry
            going = is_open(progress)
            living = jnp.sum(going)
            outgrown = jnp.any(going & (progress.step >= room))
            return (made < steps) & (living > 0) & (begun - living < enough) & ~outgrown

        def extend(carry: tuple[Progress, jax.Array, jax.Array]) -> tuple[Progress, jax.Array, jax.Array]:
            progress, made, living = carry
            going = is_open(progress)
            after = search.extend(progress)
            # Slots without a living sentence stay where they are: a position past the learned ones would leave NaN in
            # the cache, which the slot's next sentence could not mask.
            step = jnp.where(going, after.step, progress.step)
            position = jnp.minimum(step, room - 1)
            state = tuple(state.replace(position=position) for state in after.state)
            return after.replace(step=step, state=state), made + 1, living + jnp.sum(going)

        nothing = jnp.zeros((), jnp.int32)
        progress, made, living = jax.lax.while_loop(goes_on, extend, (progress, nothing, nothing))
        outcome = Outcome(
            is_open=is_open(progress),
            step=progress.step,
            hypotheses=search.result(progress),
            steps=made[None],
            living=living[None],
        )
        return _with_places(progress, lambda place: place[None]), outcome

    return divided(run, mesh, shared=4)(models, pool, steps, enough, progress, tenants)


def _search(
    models: Models, configs: Configs, settings: BeamSearch | Sampling, max_length: int, **tenants: Any
) -> Search:
    return Search(
        step_fn=step_function(models, configs),
        follow=follow,
        settings=settings,
        max_length=max_length,
        start_id=configs[0].start_id,
        eos_id=configs[0].eos_id,
        pad_id=configs[0].pad_id,
        **tenants,
    )


def _with_places(progress: Progress, change: Callable[[jax.Array], jax.Array]) -> Progress:
    return progress.replace(state=tuple(state.replace(place=change(state.place)) for state in progress.state))


def _take_in(search: Search, progress: Progress, pool: Pool, tenants: Tenants) -> Progress:
    """The progress with the new sentences in their slots, before their first step."""
    fresh = search.start(progress.state)
    goes_on = jnp.any(tenants.active & ~tenants.is_new)

    def renewed(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(tenants.is_new.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    states = []
    for state, sources in zip(progress.state, pool, strict=True):
        width = state.memory_mask.shape[-1]
        seen = jnp.where(jnp.arange(width) < tenants.length[:, None], 0.0, -jnp.inf)[:, None, None]

        def put(number: jax.Array, memory: tuple[KVCache, ...], sources=sources) -> tuple[KVCache, ...]:
            slot = tenants.arrivals[number]
            return jax.tree.map(
                lambda whole, source: _copy_source(whole, source, slot, tenants.row[slot], tenants.start[slot]),
                memory,
                sources,
                is_leaf=lambda node: isinstance(node, KVCache),
            )

        target = state.target
        if jnp.float16 in {leaf.dtype.type for leaf in jax.tree.leaves(target)}:  # see `Ensemble.may_overflow`
            target = jax.tree.map(lambda leaf: renewed(jnp.zeros_like(leaf), leaf), target)
        states.append(
            state.replace(
                target=target,
                memory=jax.lax.fori_loop(0, tenants.count[0], put, state.memory),
                memory_mask=renewed(seen, state.memory_mask),
                position=renewed(jnp.zeros_like(state.position), state.position),
                # Sums of floats depend on their order: where all begin together they get the same bits each time.
                place=jnp.where(goes_on, state.place, 0),
                ancestors=renewed(first_ancestors(*state.ancestors.shape), state.ancestors),
            )
        )
    live, ended, step = (
        jax.tree.map(renewed, getattr(fresh, name), getattr(progress, name)) for name in ("live", "ended", "step")
    )
    return Progress(step=step, state=tuple(states), live=live, ended=ended)


def _copy_source(memory: KVCache, pool: KVCache, slot: jax.Array, row: jax.Array, start: jax.Array) -> KVCache:
    """The memory with one source of the pool in its slot; what follows the source there is masked."""

    def copied(whole: jax.Array, sources: jax.Array, axis: int) -> jax.Array:
        width = whole.shape[axis]
        first = jnp.minimum(start, sources.shape[axis] - width)  # a slice that begins later would not fit
        begin: list[Any] = [row, 0, 0, 0]
        begin[axis] = first
        source = jax.lax.dynamic_slice(sources, begin, [1, *whole.shape[1:]])
        return jax.lax.dynamic_update_slice(whole, jnp.roll(source, first - start, axis), [slot, 0, 0, 0])

    return KVCache(key=copied(memory.key, pool.key, 3), value=copied(memory.value, pool.value, 2))


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
    """The new state with the old sentence in it: what was written so many steps ago there is so many steps old here."""
    (slots, hypotheses, room), (new_slots, _, new_room) = old.ancestors.shape, new.ancestors.shape
    next_old = old.place[old_slot // (slots // mesh.size)]
    next_new = new.place[new_slot // (new_slots // mesh.size)]
    age = (next_new - 1 - jnp.arange(new_room)) % new_room
    place = (next_old - 1 - age) % room  # anything for places that are older than the old ring, which nothing sees

    def turned(whole: jax.Array, leaf: jax.Array, axis: int) -> jax.Array:
        """`axis` of a sentence holds its L * N entries."""
        sentence = leaf[old_slot]
        shape = sentence.shape
        by_place = sentence.reshape(*shape[:axis], room, -1, *shape[axis + 1 :])
        return whole.at[new_slot].set(jnp.take(by_place, place, axis=axis).reshape(whole.shape[1:]))

    own = jnp.arange(hypotheses)[:, None]
    ancestors = jnp.where(age < room, jnp.take(old.ancestors[old_slot], place, axis=1), own)
    return new.replace(
        position=new.position.at[new_slot].set(step),
        ancestors=new.ancestors.at[new_slot].set(ancestors),
        target=tuple(
            KVCache(key=turned(whole.key, leaf.key, 2), value=turned(whole.value, leaf.value, 1))
            for whole, leaf in zip(new.target, old.target, strict=True)
        ),
        memory=jax.tree.map(lambda whole, leaf: widened(whole, leaf, 0), new.memory, old.memory),
        memory_mask=widened(new.memory_mask, old.memory_mask, -jnp.inf),
    )

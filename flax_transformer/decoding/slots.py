"""Slots: places on the device for sentences that come and go while one program moves all of them on.

         sources, packed               slots                              outputs
    [ a a a b b c c c c . ]  encode    [ a ] ─┐
    [ d d e e e e e e f f ] ────────▶  [ d ]  │ advance: one token for     a's tokens
                              pool     [   ]  │ every slot and step   ──▶  d's tokens
                                       [ e ] ─┘

`encode` makes keys and values of packed sources, the pool. `advance` first puts waiting sources of the pool into empty
slots, then decodes step by step until enough sentences have ended. Each slot counts its own steps, so a sentence can
begin while others are in the middle of theirs (see `DecodingState` for the cache that makes it possible). `move`
(in `moving.py`) takes a sentence that needs more room to larger slots.

Memory of the slots in bytes, for each model: about 2 * B * num_decoder_layers * d_model * (N * L + S) activations, of 4
bytes each in float32. For the base model with 64 slots, N = 4, S = 32 and L = 48, as for 2,048 source tokens, that is
352 MB; the pool holds 2 * num_decoder_layers * d_model activations a source token, 50 MB for 2,048. With recurrent
decoder layers N / 2 takes the place of N * L, and each of these is of 4 bytes.

Glossary: B slots, N hypotheses of each, S places for source tokens, L places for output tokens, C places for listed
tokens, R rows of the pool, W source tokens in each row.
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
from flax_transformer.decoding.ensemble import (
    BATCH_AXIS,
    Configs,
    Models,
    Rows,
    divided,
    follow,
    for_all_tokens,
    step_function,
)
from flax_transformer.decoding.search import Hypotheses, Progress, Search
from flax_transformer.decoding.settings import BeamSearch, Sampling
from flax_transformer.decoding.transposed import TransposedParams, opened
from flax_transformer.stacks import DecodingState, first_ancestors
from flax_transformer.tokens import Tokens

ENCODED_AT_ONCE = 256  # source tokens: enough for fast matrix products
FEW_AT_ONCE = 128  # the same on a CPU, where matrix products with more are hardly faster, and few sentences often come
Pool = tuple[tuple[KVCache, ...], ...]  # of each model, of each decoder layer


class Size(NamedTuple):
    """The size of a machine's slots.

    Attributes:
        slots: number of slots, B; a multiple of the number of devices.
        source: places for source tokens in each slot, S.
        target: places for output tokens in each slot, L.
        listed: places for the tokens among which each slot's output is chosen, C; 0 if it is chosen among all.
    """

    slots: int
    source: int
    target: int
    listed: int = 0


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
        arrivals: the slots of the new sentences, counted from 0 on each device; only the first `count` are read.
        count: number of new sentences on each device.
        row: the row of the pool in which each new source lies.
        start: the place of its first token in that row.
        length: the number of its tokens.
        listed: the tokens among which each output is chosen, then -1; `None` for all tokens.
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
    listed: Int[Any, "B C"] | None = None


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
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        block = min(rows, max(1, (FEW_AT_ONCE if on_cpu else ENCODED_AT_ONCE) // width))
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


def _project_source(
    config: TransformerConfig, params: PyTree | TransposedParams, tokens: Tokens
) -> tuple[KVCache, ...]:
    with opened(config, params) as (model, variables):
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
    rows: Rows | None = None,
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
        rows: the rows of the output matrix for the tokens that the tenants list; see `listed_rows.py`.
        configs: the config of each model.
        settings: the settings of the search; `num_return`, `extra_length` and `max_length` do not matter, since
            `tenants` says them for each slot.
        mesh: the devices that share the slots; each stops by itself.
    """

    def run(
        models, pool, steps, enough, progress: Progress, tenants: Tenants, rows: Rows | None
    ) -> tuple[Progress, Outcome]:
        room = tenants.prefix.shape[1]
        rngs = None if tenants.rngs is None else jax.random.wrap_key_data(tenants.rngs)
        told = {name: getattr(tenants, name) for name in ("limits", "prefix", "given", "listed", "num_return")}
        search = _search(models, configs, settings, room, rows=rows, rngs=rngs, **told)
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
            return after.replace(step=step, state=state), made + 1, living + jnp.sum(going, dtype=jnp.int32)

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

    return divided(run, mesh, shared=4)(models, pool, steps, enough, progress, tenants, rows)


def _search(
    models: Models,
    configs: Configs,
    settings: BeamSearch | Sampling,
    max_length: int,
    listed: Int[Array, "B C"] | None = None,
    rows: Rows | None = None,
    **tenants: Any,
) -> Search:
    step_fn = step_function(models, configs, listed, rows)
    if listed is not None and isinstance(settings, Sampling):
        step_fn, listed = for_all_tokens(step_fn, listed, configs[0].target_vocab_size), None
    return Search(
        step_fn=step_fn,
        listed=listed,
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
                recurrent=jax.tree.map(lambda leaf: renewed(jnp.zeros_like(leaf), leaf), state.recurrent),
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
        zero = jnp.zeros_like(row)  # a plain 0 would be of another type where jax has 64 bits
        begin: list[Any] = [row, zero, zero, zero]
        begin[axis] = first
        source = jax.lax.dynamic_slice(sources, begin, [1, *whole.shape[1:]])
        return jax.lax.dynamic_update_slice(whole, jnp.roll(source, first - start, axis), [slot, zero, zero, zero])

    return KVCache(key=copied(memory.key, pool.key, 3), value=copied(memory.value, pool.value, 2))

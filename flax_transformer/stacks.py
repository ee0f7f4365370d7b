"""The encoder and the decoder of figure 1: embedded tokens with positions, and the layers on top of them.

Glossary: B batch, S source, T target, D d_model, H heads, N hypotheses of each sentence, L longest target,
P = Q * N: the next Q target positions of all hypotheses of a sentence, ordered by position, then by hypothesis.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_transformer.attention import KVCache
from flax_transformer.config import WAVES, TransformerConfig
from flax_transformer.dropout import Dropout
from flax_transformer.layers import DecoderLayer, EncoderLayer, layer_norm
from flax_transformer.positions import LearnedPositions, Length, sinusoidal_positions


class DecodingState(flax.struct.PyTreeNode):
    """The state of step-by-step decoding, a plain pytree that each step takes and returns.

    The cache is a ring of L places, each with room for the N hypotheses of a sentence. At each step all sentences
    write to the same place, wherever each of them stands, and the next step writes to the next place; after the last
    place comes the first again. A sentence sees as many of the last places as it has tokens, so sentences can begin at
    any step. When a search continues one hypothesis from another, only `ancestors` changes; keys and values are never
    copied.

    Decoders with `decoder_autoregression="ssru"` have no cache of the target but one vector for each hypothesis and
    layer, which is copied when a search continues one hypothesis from another.

    Attributes:
        position: number of target positions decoded so far, for each sentence.
        place: the place in the ring that the next step writes to; an array of one for each device where several
            devices share the sentences, each decoding by itself.
        ancestors: for each hypothesis and place, which of the N hypotheses wrote its entry in the cache.
        target: each layer's keys and values of the last L steps; empty if its layers are recurrent.
        recurrent: each layer's state of the recurrent unit, float32; empty if its layers have self-attention.
        memory: each layer's keys and values of the encoder's memory, projected once.
        memory_mask: hides the source's padding.
    """

    position: Int[Array, "B"]
    place: Int[Array, "*devices"]
    ancestors: Int[Array, "B N L"]
    target: tuple[KVCache, ...]
    recurrent: tuple[Float[Array, "B N D"], ...]
    memory: tuple[KVCache, ...]
    memory_mask: Float[Array, "B 1 1 S"]

    def follow(self, parents: Int[Array, "B N"]) -> "DecodingState":
        """The state after each hypothesis has been replaced by a copy of its parent."""
        inherited = jnp.take_along_axis(self.ancestors, parents[:, :, None], axis=1)
        room = self.ancestors.shape[2]
        age = (self.place - 1 - jnp.arange(room)) % room
        decoded = age < self.position[:, None]
        return self.replace(
            ancestors=jnp.where(decoded[:, None], inherited, first_ancestors(*self.ancestors.shape)),
            recurrent=tuple(jnp.take_along_axis(each, parents[:, :, None], axis=1) for each in self.recurrent),
        )

    @classmethod
    def empty(
        cls, config: TransformerConfig, *, batch: Length, hypotheses: int, max_length: Length, source_length: Length
    ) -> "DecodingState":
        """A state before any step, whose memory is zeros that nothing sees.

        Args:
            config: that of the model.
            batch: number of sentences, B.
            hypotheses: number of hypotheses of each, N.
            max_length: number of places in the ring, L.
            source_length: number of places of the memory, S.
        """
        heads, size = config.num_heads, config.d_model // config.num_heads
        recurrent = config.decoder_autoregression == "ssru"
        nothing = jnp.zeros((batch, hypotheses, config.d_model), jnp.float32)

        def zeros(places: Length) -> tuple[KVCache, ...]:
            cache = KVCache(
                key=jnp.zeros((batch, heads, size, places), config.dtype),
                value=jnp.zeros((batch, heads, places, size), config.dtype),
            )
            return (cache,) * config.num_decoder_layers

        return cls(
            position=jnp.zeros(batch, jnp.int32),
            place=jnp.zeros((), jnp.int32),
            ancestors=first_ancestors(batch, hypotheses, max_length),
            target=() if recurrent else zeros(max_length * hypotheses),
            recurrent=(nothing,) * config.num_decoder_layers if recurrent else (),
            memory=zeros(source_length),
            memory_mask=jnp.full((batch, 1, 1, source_length), -jnp.inf),
        )


def first_ancestors(batch: Length, hypotheses: int, length: Length) -> Int[Array, "B N L"]:
    """The ancestors before any step: each hypothesis is its own."""
    return jnp.broadcast_to(jnp.arange(hypotheses, dtype=jnp.int32)[:, None], (batch, hypotheses, length))


def wave_vectors(config: TransformerConfig, positions: Int[Array, "*B S"]) -> Float[Array, "*B S D"]:
    """The vectors that a model with sinusoidal positions adds to its embeddings."""
    return sinusoidal_positions(positions + config.position_offset, config.d_model, **WAVES[config.positions])


class _Stack(nn.Module):
    """What both stacks share: positions added to embeddings, and dropout on the sum (sections 3.4, 3.5 and 5.4)."""

    config: TransformerConfig

    def _embed_setup(self) -> None:
        if self.config.positions == "learned":
            self.learned_positions = LearnedPositions(self.config.max_length, self.config.d_model)
        self.dropout = Dropout(self.config.dropout_rate)
        if self.config.norm == "pre":
            self.norm = layer_norm(self.config)

    def _embed(
        self,
        embeddings: Float[Array, "B S D"],
        positions: Int[Array, "*B S"],
        deterministic: bool,
    ) -> Float[Array, "B S D"]:
        config = self.config
        if config.scale_embeddings:
            embeddings = embeddings * config.d_model**0.5
        if config.positions == "learned":
            vectors = self.learned_positions(positions)
        else:
            vectors = wave_vectors(config, positions)
        return self.dropout((embeddings + vectors).astype(config.dtype), deterministic=deterministic)

    def _finish(self, inputs: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.norm(inputs) if self.config.norm == "pre" else inputs

    def _call_layer(self, layer: nn.Module, *arrays: jax.Array | KVCache | None, **options: bool):
        """Calls one layer; with `remat` only its inputs are kept for the backward pass."""

        def call(layer, *arrays):
            return layer(*arrays, **options)

        return nn.remat(call)(layer, *arrays) if self.config.remat else call(layer, *arrays)


class Encoder(_Stack):
    """The stack on the left of figure 1.

    Attributes:
        config: the model's config.
    """

    def setup(self):
        """The layers are `layers_0`, `layers_1` and so on in a checkpoint."""
        self._embed_setup()
        self.layers = [EncoderLayer(self.config) for _ in range(self.config.num_encoder_layers)]

    def __call__(
        self,
        embeddings: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        mask: Float[Array, "..."],
        *,
        deterministic: bool,
        return_weights: bool = False,
    ) -> tuple[Float[Array, "B S D"], tuple[Float[Array, "B H S S"] | None, ...]]:
        """Encodes a source; the second result is each layer's weights, `None` unless asked for."""
        outputs, all_weights = self._embed(embeddings, positions, deterministic), []
        for layer in self.layers:
            outputs, weights = self._call_layer(
                layer, outputs, mask, deterministic=deterministic, return_weights=return_weights
            )
            all_weights.append(weights)
        return self._finish(outputs), tuple(all_weights)


class Decoder(_Stack):
    """The stack on the right of figure 1.

    Attributes:
        config: the model's config.
    """

    def setup(self):
        """The layers are `layers_0`, `layers_1` and so on in a checkpoint."""
        self._embed_setup()
        self.layers = [DecoderLayer(self.config) for _ in range(self.config.num_decoder_layers)]

    def project_memory(self, memory: Float[Array, "B S D"]) -> tuple[KVCache, ...]:
        """Each layer's keys and values of the encoder's memory."""
        return tuple(layer.project_memory(memory) for layer in self.layers)

    def __call__(
        self,
        embeddings: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        memory: tuple[KVCache, ...],
        self_mask: Float[Array, "..."] | None,
        memory_mask: Float[Array, "..."] | None,
        *,
        deterministic: bool,
        return_weights: bool = False,
    ) -> tuple[Float[Array, "B T D"], tuple[tuple[Array | None, Array | None], ...]]:
        """Decodes a whole target at once; the second result is each layer's two weights, `None` unless asked for."""
        begins = positions == 0 if self.config.decoder_autoregression == "ssru" else None
        outputs, all_weights = self._embed(embeddings, positions, deterministic), []
        for layer, layer_memory in zip(self.layers, memory, strict=True):
            outputs, _, weights = self._call_layer(
                layer,
                outputs,
                layer_memory,
                self_mask,
                memory_mask,
                begins,
                deterministic=deterministic,
                return_weights=return_weights,
            )
            all_weights.append(weights)
        return self._finish(outputs), tuple(all_weights)

    def step(
        self, embeddings: Float[Array, "B P D"], state: DecodingState, self_mask: Float[Array, "B 1 P M"] | None
    ) -> tuple[DecodingState, Float[Array, "B P D"]]:
        """Decodes the next positions without dropout; `self_mask` lets each hypothesis see its own past."""
        recurrent = self.config.decoder_autoregression == "ssru"
        _, hypotheses, room = state.ancestors.shape
        steps = embeddings.shape[1] // hypotheses
        positions = state.position[:, None] + jnp.arange(embeddings.shape[1]) // hypotheses
        outputs = self._embed(embeddings, positions, deterministic=True)
        before: tuple[KVCache | Array, ...] = state.recurrent if recurrent else state.target
        kept = []
        for layer, memory, cache in zip(self.layers, state.memory, before, strict=True):
            outputs, cache, _ = layer(
                outputs,
                memory,
                self_mask,
                state.memory_mask,
                deterministic=True,
                cache=cache,
                write_at=state.place * hypotheses,
            )
            kept.append(cache)
        # A longer sentence would overwrite its own beginning, and several positions at once must not go round the end
        # of the ring: NaN makes the mistake visible.
        fits = (state.position + steps <= room) & (state.place + steps <= room)
        outputs = jnp.where(fits[:, None, None], self._finish(outputs), jnp.nan)
        state = state.replace(position=state.position + steps, place=(state.place + steps) % room)
        after = {"recurrent" if recurrent else "target": tuple(kept)}
        return state.replace(**after), outputs

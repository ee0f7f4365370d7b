"""Takes source and target token ids and leaves the logits of every target token: the whole Transformer (section 3).

Glossary: B batch, S source, T target, Q target positions decoded at once, L longest target, D d_model, H heads,
V target vocabulary, N hypotheses of each sentence, R = B * N rows, the hypotheses of a sentence together.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_transformer.attention import KVCache
from flax_transformer.config import TransformerConfig
from flax_transformer.masks import ancestor_mask, causal_mask, combine_masks, padding_mask, segment_mask
from flax_transformer.positions import Length, check_length
from flax_transformer.projections import project
from flax_transformer.stacks import Decoder, DecodingState, Encoder, first_ancestors
from flax_transformer.tokens import check_beside, check_tokens, look_up


class AttentionWeights(flax.struct.PyTreeNode):
    """What looked at what, one array a layer; padding rows are zero.

    Attributes:
        encoder: source looking at source.
        decoder: target looking at target.
        cross: target looking at source.
    """

    encoder: tuple[Float[Array, "B H S S"], ...]
    decoder: tuple[Float[Array, "B H T T"], ...]
    cross: tuple[Float[Array, "B H T S"], ...]


def shift_right(target: Int[Array, "B T"], positions: Int[Array, "B T"], start_id: int) -> Int[Array, "B T"]:
    """The decoder's input: each target token one position later, `start_id` where a sentence begins (section 3.1)."""
    return jnp.where(positions == 0, start_id, jnp.roll(target, 1, axis=1))


class Transformer(nn.Module):
    """The Transformer: `model.apply(variables, source, target, deterministic=True)` gives logits.

    Token ids are int32. Where segments are not given, every token that is not `pad_id` belongs to segment 1; where
    positions are not given, they count from 0 along each segment.

    Attributes:
        config: what the model is.
    """

    config: TransformerConfig

    def setup(self):
        """One embedding matrix, two or three, by `tie_embeddings`; raises ValueError for an impossible vocabulary."""
        config = self.config
        if min(config.source_vocab_size, config.target_vocab_size) < 1:
            raise ValueError(
                f"model.source_vocab_size is {config.source_vocab_size}, model.target_vocab_size "
                f"{config.target_vocab_size}: set both to the numbers of token ids"
            )
        if not 0 <= config.start_id < config.target_vocab_size:
            raise ValueError(
                f"model.start_id is {config.start_id}, model.target_vocab_size {config.target_vocab_size}: "
                "the decoder starts from a token of the target vocabulary"
            )
        if config.tie_embeddings == "three_way":
            self.shared_embedding = self._embedding(config.source_vocab_size)
        else:
            self.source_embedding = self._embedding(config.source_vocab_size)
            self.target_embedding = self._embedding(config.target_vocab_size)
        if config.tie_embeddings == "none":
            self.output_kernel = self.param(
                "output_kernel", nn.initializers.xavier_uniform(), (config.d_model, config.target_vocab_size)
            )
        if config.output_bias:
            self.output_bias = self.param("output_bias", nn.initializers.zeros, (config.target_vocab_size,))
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def _embedding(self, size: int) -> nn.Embed:
        # Multiplied by sqrt(d_model), such vectors have unit variance, like the positions added to them.
        init = nn.initializers.normal(self.config.d_model**-0.5)
        return nn.Embed(size, self.config.d_model, embedding_init=init)

    def _embed_source(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        shared = self.config.tie_embeddings == "three_way"
        return look_up(self.shared_embedding if shared else self.source_embedding, tokens)

    def _embed_target(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        shared = self.config.tie_embeddings == "three_way"
        return look_up(self.shared_embedding if shared else self.target_embedding, tokens)

    def logits(self, outputs: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The logits, float32, of what the decoder puts out (section 3.4)."""
        if self.config.tie_embeddings == "none":
            kernel = self.output_kernel
        else:
            tied = "shared_embedding" if self.config.tie_embeddings == "three_way" else "target_embedding"
            kernel = getattr(self, tied).embedding.T
        logits = project(outputs, kernel.astype(outputs.dtype), jnp.float32)
        return logits + self.output_bias if self.config.output_bias else logits

    def _segments(self, tokens: Int[Array, "B S"]) -> Int[Array, "B S"]:
        return (tokens != self.config.pad_id).astype(jnp.int32)

    def _positions(self, tokens: Int[Array, "B S"], segments: Int[Array, "B S"] | None) -> Int[Array, "B S"]:
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segments is not None:
            begins = segments != jnp.roll(segments, 1, axis=1)
            return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
        if self.config.positions == "learned":
            check_length(tokens.shape[1], self.config.max_length)
        return index

    def __call__(
        self,
        source: Int[Array, "B S"],
        target: Int[Array, "B T"],
        *,
        source_segments: Int[Array, "B S"] | None = None,
        target_segments: Int[Array, "B T"] | None = None,
        source_positions: Int[Array, "B S"] | None = None,
        target_positions: Int[Array, "B T"] | None = None,
        deterministic: bool,
        return_weights: bool = False,
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], AttentionWeights]:
        """The logits of each target token, given the source and the target tokens before it.

        Args:
            source: source token ids.
            target: target token ids, unshifted: the model itself puts `start_id` in front.
            source_segments: the number of each token's sentence within its row, 0 for padding.
            target_segments: the same for the target; segment i of the target translates segment i of the source.
            source_positions: the position of each token within its sentence.
            target_positions: the same for the target.
            deterministic: true switches dropout off; false needs `rngs={"dropout": ...}`.
            return_weights: whether the attention weights come too.

        Returns:
            Logits, float32; with `return_weights` a pair of them and `AttentionWeights`. They are NaN where a sentence
            holds a token id that the vocabulary lacks and that could not be seen, inside `jit`.

        Raises:
            ValueError: token ids, segments or positions are not integers [B, S] and [B, T], or a token id is known not
                to be in the vocabulary.
        """
        outputs, encoder_weights, decoder_weights = self._run(
            source,
            target,
            source_segments,
            target_segments,
            source_positions,
            target_positions,
            deterministic,
            return_weights,
        )
        if not return_weights:
            return self.logits(outputs)
        self_weights, cross_weights = zip(*decoder_weights, strict=True)
        return self.logits(outputs), AttentionWeights(
            encoder=encoder_weights, decoder=self_weights, cross=cross_weights
        )

    def outputs(
        self,
        source: Int[Array, "B S"],
        target: Int[Array, "B T"],
        *,
        source_segments: Int[Array, "B S"] | None = None,
        target_segments: Int[Array, "B T"] | None = None,
        source_positions: Int[Array, "B S"] | None = None,
        target_positions: Int[Array, "B T"] | None = None,
        deterministic: bool,
    ) -> Float[Array, "B T D"]:
        """What `logits` makes the logits of, for whoever wants them in parts; arguments as in `__call__`."""
        return self._run(
            source,
            target,
            source_segments,
            target_segments,
            source_positions,
            target_positions,
            deterministic,
            return_weights=False,
        )[0]

    def _run(
        self,
        source,
        target,
        source_segments,
        target_segments,
        source_positions,
        target_positions,
        deterministic,
        return_weights,
    ):
        check_tokens("source", source, self.config.source_vocab_size)
        check_tokens("target", target, self.config.target_vocab_size)
        check_beside("source_segments", source_segments, source.shape)
        check_beside("target_segments", target_segments, target.shape)
        check_beside("source_positions", source_positions, source.shape)
        check_beside("target_positions", target_positions, target.shape)
        source_positions = self._positions(source, source_segments) if source_positions is None else source_positions
        target_positions = self._positions(target, target_segments) if target_positions is None else target_positions
        source_segments = self._segments(source) if source_segments is None else source_segments
        target_segments = self._segments(target) if target_segments is None else target_segments
        memory, encoder_weights = self._encode(source, source_segments, source_positions, deterministic, return_weights)
        outputs, decoder_weights = self._decode(
            memory,
            shift_right(target, target_positions, self.config.start_id),
            source_segments,
            target_segments,
            target_positions,
            deterministic,
            return_weights,
        )
        return outputs, encoder_weights, decoder_weights

    def encode(
        self,
        source: Int[Array, "B S"],
        *,
        segments: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
        deterministic: bool,
    ) -> Float[Array, "B S D"]:
        """The encoder's memory: one vector a source token; arguments as in `__call__`."""
        check_tokens("source", source, self.config.source_vocab_size)
        check_beside("segments", segments, source.shape)
        check_beside("positions", positions, source.shape)
        positions = self._positions(source, segments) if positions is None else positions
        segments = self._segments(source) if segments is None else segments
        return self._encode(source, segments, positions, deterministic, return_weights=False)[0]

    def decode(
        self,
        memory: Float[Array, "B S D"],
        decoder_input: Int[Array, "B T"],
        *,
        source_segments: Int[Array, "B S"] | None = None,
        target_segments: Int[Array, "B T"] | None = None,
        target_positions: Int[Array, "B T"] | None = None,
        deterministic: bool,
    ) -> Float[Array, "B T V"]:
        """The logits of the token that follows each token of `decoder_input`, given the encoder's memory.

        Args:
            memory: from `encode`.
            decoder_input: target token ids behind `start_id`, as `shift_right` makes them.
            source_segments: segments of the memory; all 1 if not given, so give them where the source has padding.
            target_segments: segments of the decoder's input; all 1 if not given.
            target_positions: positions of the decoder's input.
            deterministic: true switches dropout off.
        """
        check_tokens("decoder_input", decoder_input, self.config.target_vocab_size)
        check_beside("source_segments", source_segments, memory.shape[:2])
        check_beside("target_segments", target_segments, decoder_input.shape)
        check_beside("target_positions", target_positions, decoder_input.shape)
        if target_positions is None:
            target_positions = self._positions(decoder_input, target_segments)
        if source_segments is None:
            source_segments = jnp.ones(memory.shape[:2], jnp.int32)
        if target_segments is None:
            target_segments = jnp.ones_like(decoder_input)
        outputs, _ = self._decode(
            memory,
            decoder_input,
            source_segments,
            target_segments,
            target_positions,
            deterministic,
            return_weights=False,
        )
        return self.logits(outputs)

    def _encode(self, source, segments, positions, deterministic, return_weights):
        return self.encoder(
            self._embed_source(source),
            positions,
            segment_mask(segments, segments),
            deterministic=deterministic,
            return_weights=return_weights,
        )

    def _decode(
        self, memory, decoder_input, source_segments, target_segments, positions, deterministic, return_weights
    ):
        return self.decoder(
            self._embed_target(decoder_input),
            positions,
            self.decoder.project_memory(memory),
            combine_masks(causal_mask(decoder_input.shape[1]), segment_mask(target_segments, target_segments)),
            segment_mask(target_segments, source_segments),
            deterministic=deterministic,
            return_weights=return_weights,
        )

    def start_decoding(self, source: Int[Array, "B S"], *, max_length: Length, hypotheses: int = 1) -> DecodingState:
        """Encodes the source and makes room for its translations.

        Args:
            source: source token ids, padded with `pad_id`.
            max_length: the most target tokens that will be decoded, L.
            hypotheses: how many translations of each sentence are decoded side by side.

        Raises:
            ValueError: positions are learned and `max_length` is more than there are.
        """
        config = self.config
        if config.positions == "learned":
            check_length(max_length, config.max_length)
        segments = self._segments(source)
        memory = self.encode(source, segments=segments, deterministic=True)
        heads, size, room = config.num_heads, config.d_model // config.num_heads, max_length * hypotheses
        empty = KVCache(
            key=jnp.zeros((source.shape[0], heads, size, room), config.dtype),
            value=jnp.zeros((source.shape[0], heads, room, size), config.dtype),
        )
        return DecodingState(
            position=jnp.zeros((), jnp.int32),
            ancestors=first_ancestors(source.shape[0], hypotheses, max_length),
            target=(empty,) * config.num_decoder_layers,
            # The barrier keeps XLA from moving the layout of the memory into the loop, to be made anew at each step.
            memory=jax.lax.optimization_barrier(self.decoder.project_memory(memory)),
            memory_mask=padding_mask(segments > 0),
        )

    def decode_step(
        self, state: DecodingState, tokens: Int[Array, "R Q"]
    ) -> tuple[DecodingState, Float[Array, "R Q V"]]:
        """The logits after each of the next Q tokens; equal to those of one parallel pass.

        Args:
            state: from `start_decoding` or the step before.
            tokens: the tokens last chosen, the first time `start_id`; one for each hypothesis, or several at once.

        Returns:
            The next state, and logits; NaN where more tokens came than `start_decoding` made room for.
        """
        check_tokens("tokens", tokens, self.config.target_vocab_size)
        batch, hypotheses, room = state.ancestors.shape
        length = tokens.shape[1]
        if length > room:
            raise ValueError(f"{length} tokens at once, start_decoding made room for {room}: raise max_length")
        by_position = tokens.reshape(batch, hypotheses, length).swapaxes(1, 2).reshape(batch, -1)
        self_mask = ancestor_mask(state.ancestors, length, state.position)
        state, outputs = self.decoder.step(self._embed_target(by_position), state, self_mask)
        logits = self.logits(outputs).reshape(batch, length, hypotheses, -1)
        return state, logits.swapaxes(1, 2).reshape(*tokens.shape, -1)

"""The whole Transformer (section 3): from source and target tokens to the logits of every target token.

Glossary: B batch, S source, T target, Q target positions decoded at once, L longest target, D d_model, H heads,
V target vocabulary, C tokens listed for a sentence, N hypotheses of each sentence, R = B * N rows, the hypotheses of a
sentence together.
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
from flax_transformer.projections import project, project_to_rows
from flax_transformer.stacks import Decoder, DecodingState, Encoder
from flax_transformer.tokens import Tokens, check_tokens, look_up


class AttentionWeights(flax.struct.PyTreeNode):
    """Attention weights, one array for each layer; the rows of padding are zero.

    Attributes:
        encoder: from source to source.
        decoder: from target to target; empty if the decoder's layers are recurrent (`decoder_autoregression`).
        cross: from target to source.
    """

    encoder: tuple[Float[Array, "B H S S"], ...]
    decoder: tuple[Float[Array, "B H T T"], ...]
    cross: tuple[Float[Array, "B H T S"], ...]


class OutputRows(flax.struct.PyTreeNode):
    """What computes the logits of some tokens alone, other ones for each sentence.

    Attributes:
        kernel: the vector of each token.
        bias: its bias, if the model has an output bias.
    """

    kernel: Float[Array, "B C D"]
    bias: Float[Array, "B C"] | None


class Transformer(nn.Module):
    """The Transformer: `model.apply(variables, source, target, deterministic=True)` gives logits.

    Source and target are int32 token ids padded with `pad_id`, one sentence in each row, or `Tokens`, which also
    describe rows of several sentences. `logits(decode(encode(source), source, target))` gives the same.

    Attributes:
        config: the model's sizes and options.
    """

    config: TransformerConfig

    def setup(self):
        """Makes one, two or three embedding matrices, as `tie_embeddings` says; raises ValueError for wrong sizes."""
        config = self.config
        if min(config.source_vocab_size, config.target_vocab_size) < 1:
            raise ValueError(
                f"model.source_vocab_size is {config.source_vocab_size}, model.target_vocab_size "
                f"{config.target_vocab_size}: set both to the numbers of token ids"
            )
        if not 0 <= config.pad_id < min(config.source_vocab_size, config.target_vocab_size):
            raise ValueError(
                f"model.pad_id is {config.pad_id}, model.source_vocab_size {config.source_vocab_size} and "
                f"model.target_vocab_size {config.target_vocab_size}: padding is a token of both vocabularies"
            )
        if not 0 <= config.start_id < config.target_vocab_size:
            raise ValueError(
                f"model.start_id is {config.start_id}, model.target_vocab_size {config.target_vocab_size}: "
                "the decoder starts from a token of the target vocabulary"
            )
        if not 0 <= config.eos_id < config.target_vocab_size:
            raise ValueError(
                f"model.eos_id is {config.eos_id}, model.target_vocab_size {config.target_vocab_size}: "
                "the end of a sentence is a token of the target vocabulary"
            )
        if config.tie_embeddings == "three_way":
            self.shared_embedding = self._new_embedding(config.source_vocab_size)
        else:
            self.source_embedding = self._new_embedding(config.source_vocab_size)
            self.target_embedding = self._new_embedding(config.target_vocab_size)
        if config.tie_embeddings == "none":
            self.output_kernel = self.param(
                "output_kernel", nn.initializers.xavier_uniform(), (config.d_model, config.target_vocab_size)
            )
        if config.output_bias:
            self.output_bias = self.param("output_bias", nn.initializers.zeros, (config.target_vocab_size,))
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def _new_embedding(self, size: int) -> nn.Embed:
        # Multiplied by sqrt(d_model), such vectors have unit variance, like the positions added to them.
        init = nn.initializers.normal(self.config.d_model**-0.5)
        return nn.Embed(size, self.config.d_model, embedding_init=init)

    @property
    def _is_recurrent(self) -> bool:
        return self.config.decoder_autoregression == "ssru"

    def _embedding(self, side: str) -> nn.Embed:
        shared = self.config.tie_embeddings == "three_way"
        return self.shared_embedding if shared else getattr(self, f"{side}_embedding")

    def _embed_target(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        vectors = look_up(self._embedding("target"), ids)
        if self.config.zero_start:
            vectors = jnp.where((ids == self.config.start_id)[..., None], 0.0, vectors)
        return vectors

    def _tokens(self, side: str, given: Tokens | Int[Array, "B S"]) -> Tokens:
        """Checks one side of a batch; ids alone get their default segments and positions."""
        config = self.config
        check_tokens(side, given, config.source_vocab_size if side == "source" else config.target_vocab_size)
        if not isinstance(given, Tokens):
            if config.positions == "learned":
                check_length(given.shape[1], config.max_length)
            given = Tokens.from_ids(given, config.pad_id)
        return jax.tree.map(jnp.asarray, given)

    def __call__(
        self,
        source: Tokens | Int[Array, "B S"],
        target: Tokens | Int[Array, "B T"],
        *,
        deterministic: bool,
        return_weights: bool = False,
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], AttentionWeights]:
        """The logits of each target token, given the source and the target tokens before it.

        Args:
            source: source tokens.
            target: target tokens, not shifted: the model itself puts `start_id` in front. Segment i of the target
                translates segment i of the source.
            deterministic: true switches dropout off; false needs `rngs={"dropout": ...}`.
            return_weights: whether to return the attention weights too.

        Returns:
            Logits, float32; with `return_weights` a pair of them and `AttentionWeights`. Inside `jit`, where token ids
            cannot be checked, the logits of a sentence with an id outside the vocabulary are NaN.

        Raises:
            ValueError: token ids, segments or positions are not integers [B, S] and [B, T], or a token id is known not
                to be in the vocabulary; positions are learned, and a row of ids is longer than there are positions.
        """
        options = {"deterministic": deterministic, "return_weights": return_weights}
        source, target = self._tokens("source", source), self._tokens("target", target)
        memory, encoder_weights = self._encode(source, **options)
        hidden, decoder_weights = self._decode(memory, source, target, **options)
        logits = self.logits(hidden)
        if not return_weights:
            return logits
        self_weights, cross_weights = zip(*decoder_weights, strict=True)
        if self._is_recurrent:
            self_weights = ()
        return logits, AttentionWeights(encoder=encoder_weights, decoder=self_weights, cross=cross_weights)

    def encode(self, source: Tokens | Int[Array, "B S"], *, deterministic: bool) -> Float[Array, "B S D"]:
        """The encoder's memory, one vector for each source token; arguments as in `__call__`."""
        return self._encode(self._tokens("source", source), deterministic=deterministic)[0]

    def decode(
        self,
        memory: Float[Array, "B S D"],
        source: Tokens | Int[Array, "B S"],
        target: Tokens | Int[Array, "B T"],
        *,
        deterministic: bool,
    ) -> Float[Array, "B T D"]:
        """The decoder's hidden vectors, from which `logits` predicts each target token.

        Args:
            memory: the result of `encode` for this source.
            source: the source of `memory`; its segments determine which target tokens may see which vectors.
            target: as in `__call__`.
            deterministic: as in `__call__`.
        """
        source, target = self._tokens("source", source), self._tokens("target", target)
        return self._decode(memory, source, target, deterministic=deterministic)[0]

    def project_memory(self, memory: Float[Array, "B S D"]) -> tuple[KVCache, ...]:
        """Each decoder layer's keys and values of the encoder's memory, as `DecodingState.memory` holds them."""
        return self.decoder.project_memory(memory)

    def _encode(
        self, source: Tokens, *, deterministic: bool, return_weights: bool = False
    ) -> tuple[Float[Array, "B S D"], tuple[Float[Array, "B H S S"] | None, ...]]:
        return self.encoder(
            look_up(self._embedding("source"), source.ids),
            source.positions,
            segment_mask(source.segments, source.segments),
            deterministic=deterministic,
            return_weights=return_weights,
        )

    def _decode(
        self,
        memory: Float[Array, "B S D"],
        source: Tokens,
        target: Tokens,
        *,
        deterministic: bool,
        return_weights: bool = False,
    ) -> tuple[Float[Array, "B T D"], tuple[tuple[Array | None, Array | None], ...]]:
        mask = None
        if not self._is_recurrent:
            mask = combine_masks(causal_mask(target.ids.shape[1]), segment_mask(target.segments, target.segments))
        return self.decoder(
            self._embed_target(target.shift_right(self.config.start_id).ids),
            target.positions,
            self.decoder.project_memory(memory),
            mask,
            segment_mask(target.segments, source.segments),
            deterministic=deterministic,
            return_weights=return_weights,
        )

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The logits, float32, of the decoder's hidden vectors (section 3.4)."""
        if self.config.tie_embeddings == "none":
            logits = project(hidden, self.output_kernel.astype(hidden.dtype), jnp.float32)
        else:
            logits = project_to_rows(hidden, self._embedding("target").embedding.astype(hidden.dtype), jnp.float32)
        return logits + self.output_bias if self.config.output_bias else logits

    def output_rows(self, ids: Int[Array, "B C"]) -> OutputRows:
        """The rows of the output matrix for some target tokens of each sentence; anything for ids below 0."""
        ids, config = jnp.maximum(ids, 0), self.config
        if config.tie_embeddings == "none":
            rows = jnp.moveaxis(self.output_kernel[:, ids], 0, -1)
        else:
            rows = self._embedding("target").embedding[ids]
        return OutputRows(rows.astype(config.dtype), self.output_bias[ids] if config.output_bias else None)

    def start_decoding(self, source: Int[Array, "B S"], *, max_length: Length, hypotheses: int = 1) -> DecodingState:
        """Encodes the source and allocates caches for its translations.

        Args:
            source: source token ids, padded with `pad_id`.
            max_length: maximum number of target tokens to decode, L.
            hypotheses: number of translations of each sentence that are decoded side by side.

        Raises:
            ValueError: positions are learned, and there are fewer than `max_length`; or the source is not integers
                [B, S], or has an id outside the vocabulary.
        """
        config = self.config
        if config.positions == "learned":
            check_length(max_length, config.max_length)
        check_tokens("source", source, config.source_vocab_size)
        tokens = Tokens.from_ids(source, config.pad_id)
        tokens = tokens.replace(positions=tokens.positions * tokens.segments)  # learned ones may end before the padding
        memory = self.encode(tokens, deterministic=True)
        state = DecodingState.empty(
            config,
            batch=source.shape[0],
            hypotheses=hypotheses,
            max_length=max_length,
            source_length=source.shape[1],
        )
        # Without the barrier XLA moves a change of the memory's layout into the loop and repeats it at each step.
        projected = jax.lax.optimization_barrier(self.decoder.project_memory(memory))
        return state.replace(memory=projected, memory_mask=padding_mask(tokens.segments > 0))

    def decode_step(
        self, state: DecodingState, tokens: Int[Array, "R Q"], rows: OutputRows | None = None
    ) -> tuple[DecodingState, Float[Array, "R Q V"]]:
        """The logits that follow each of the next Q tokens; they equal those of one parallel pass.

        Args:
            state: from `start_decoding` or the previous step.
            tokens: the tokens chosen last, or `start_id` in the first step; one or more for each hypothesis.
            rows: from `output_rows`, to compute the logits of these tokens alone; then they are [R, Q, C].

        Returns:
            The next state and the logits, which are NaN once a sentence has more tokens than `max_length`, and where
            several tokens at once go round the end of the ring (see `DecodingState`).

        Raises:
            ValueError: tokens are not integers [R, Q] with a row for each hypothesis, have an id outside the
                vocabulary, or are more at once than `start_decoding` made room for.
        """
        check_tokens("tokens", tokens, self.config.target_vocab_size)
        batch, hypotheses, room = state.ancestors.shape
        given, length = tokens.shape
        if given != batch * hypotheses:
            raise ValueError(
                f"tokens have {given} rows, the state has {batch} sentences with {hypotheses} hypotheses each: give "
                f"[{batch * hypotheses}, Q]"
            )
        if length > room:
            raise ValueError(f"{length} tokens at once, start_decoding made room for {room}: raise max_length")
        by_position = tokens.reshape(batch, hypotheses, length).swapaxes(1, 2).reshape(batch, -1)
        self_mask = None
        if not self._is_recurrent:
            self_mask = ancestor_mask(state.ancestors, length, state.position, state.place)
        state, outputs = self.decoder.step(self._embed_target(by_position), state, self_mask)
        logits = self.logits(outputs) if rows is None else _logits_of(rows, outputs)
        logits = logits.reshape(batch, length, hypotheses, -1)
        return state, logits.swapaxes(1, 2).reshape(*tokens.shape, -1)


def _logits_of(rows: OutputRows, hidden: Float[Array, "B P D"]) -> Float[Array, "B P C"]:
    """The logits, float32, of the tokens of these rows alone."""
    logits = jnp.einsum("bpd,bcd->bpc", hidden, rows.kernel, preferred_element_type=jnp.float32)
    return logits if rows.bias is None else logits + rows.bias[:, None]

"""The model of one of our configs in PyTorch, built on `nn.Transformer`, and its training step."""

import math
from collections.abc import Callable

import torch
from torch import nn

from flax_transformer.config import TransformerConfig


class TorchTransformer(nn.Module):
    """`nn.Transformer` with embeddings, positions and logits as in `flax_transformer.Transformer`.

    `nn.Transformer` also drops attention weights and inner activations, and has a norm after each stack even with
    post-norm. The paper and the configs here have neither, so both are switched off.

    Attributes:
        embedding: shared by source, target and output.
    """

    def __init__(self, config: TransformerConfig, length: int):
        """Builds the model for sentences of at most `length` tokens."""
        super().__init__()
        assert config.tie_embeddings == "three_way" and config.positions == "sinusoidal" and config.scale_embeddings
        assert not (config.output_bias or config.attention_dropout_rate or config.activation_dropout_rate)
        self._scale = math.sqrt(config.d_model)
        self.embedding = nn.Embedding(config.source_vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, config.d_model, 2) / config.d_model)
        self.register_buffer("positions", torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(length, -1))
        self.dropout = nn.Dropout(config.dropout_rate)
        shape = (config.d_model, config.num_heads, config.d_ff, config.dropout_rate, config.activation)
        options = {"batch_first": True, "norm_first": config.norm == "pre", "layer_norm_eps": config.norm_epsilon}

        def final_norm() -> nn.LayerNorm | None:
            return nn.LayerNorm(config.d_model, eps=config.norm_epsilon) if config.norm == "pre" else None

        self.transformer = nn.Transformer(
            config.d_model,
            config.num_heads,
            batch_first=True,
            custom_encoder=nn.TransformerEncoder(
                nn.TransformerEncoderLayer(*shape, **options),
                config.num_encoder_layers,
                final_norm(),
                enable_nested_tensor=False,
            ),
            custom_decoder=nn.TransformerDecoder(
                nn.TransformerDecoderLayer(*shape, **options), config.num_decoder_layers, final_norm()
            ),
        )
        for parameter in self.transformer.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.transformer.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
            if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
                module.dropout.p = 0.0

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.embedding(tokens) * self._scale + self.positions[: tokens.shape[1]])

    def forward(self, source: torch.Tensor, inputs: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """Logits.

        Args:
            source: token ids [B, S].
            inputs: target token ids shifted right, [B, T].
            padding: true where the source has no token; `None` if every row is full.
        """
        # The target's padding comes last, where the causal mask already hides it. Without a padding mask PyTorch can
        # use its fastest attention.
        outputs = self.transformer(
            self._embed(source),
            self._embed(inputs),
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(inputs.shape[1], device=inputs.device),
            tgt_is_causal=True,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        return outputs @ self.embedding.weight.T


def make_step(
    config: TransformerConfig, length: int, *, learning_rate: float, label_smoothing: float, device: str, compiled: bool
) -> Callable[..., torch.Tensor]:
    """Makes a model and its update: a function from source, target and the source's padding to the loss.

    Args:
        config: the model's config; `autocast` handles types other than float32.
        length: the length of the longest sentence.
        learning_rate: Adam's learning rate.
        label_smoothing: section 5.4.
        device: "cpu" or "cuda".
        compiled: whether `torch.compile` compiles the model and the loss.
    """
    model = TorchTransformer(config, length).to(device).train()
    criterion = nn.CrossEntropyLoss(ignore_index=config.pad_id, label_smoothing=label_smoothing)
    # The fused one makes one pass over each parameter.
    optimizer = torch.optim.Adam(model.parameters(), learning_rate, (0.9, 0.98), 1e-9, fused=True)

    def loss_of(source: torch.Tensor, target: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            inputs = nn.functional.pad(target[:, :-1], (1, 0), value=config.start_id)
            logits = model(source, inputs, padding)
        return criterion(logits.flatten(0, 1).float(), target.flatten())

    if compiled:
        loss_of = torch.compile(loss_of)

    def step(source: torch.Tensor, target: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        loss = loss_of(source, target, padding)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step

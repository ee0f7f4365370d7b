import math
from functools import partial

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.model import Transformer
from flax_transformer.tokens import Tokens

torch = pytest.importorskip("torch", reason="PyTorch is not installed: `make peers` installs it")
pytestmark = pytest.mark.peers

B, S, T, D, F, V, LAYERS = 2, 5, 7, 16, 24, 31, 2
SOURCE = np.array([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]], "int32")
TARGET = np.array([[3, 4, 5, 6, 7, 8, 2], [10, 11, 12, 2, 0, 0, 0]], "int32")
SHIFTED = np.array([[1, 3, 4, 5, 6, 7, 8], [1, 10, 11, 12, 2, 0, 0]], "int32")
REAL = TARGET != 0


def ours(norm, activation, num_heads):
    config = TransformerConfig(
        source_vocab_size=V,
        target_vocab_size=V,
        d_model=D,
        num_heads=num_heads,
        d_ff=F,
        num_encoder_layers=LAYERS,
        num_decoder_layers=LAYERS,
        norm=norm,
        activation=activation,
    )
    model = Transformer(config)
    shapes = jax.eval_shape(partial(model.init, deterministic=True), jax.random.key(0), SOURCE, TARGET)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return (rng.normal(scale=0.25, size=leaf.shape) + (path[-1].key == "scale")).astype(leaf.dtype)

    return model, jax.tree.map_with_path(draw, shapes)["params"]


def theirs(norm, activation, num_heads):
    """Both stacks of nn.Transformer, with its final norms in pre-norm only: post-norm's last sub-layer has one."""
    options = {"dropout": 0.0, "activation": activation, "norm_first": norm == "pre", "batch_first": True}

    def final_norm():
        return torch.nn.LayerNorm(D) if norm == "pre" else None

    encoder_layer = torch.nn.TransformerEncoderLayer(D, num_heads, F, **options)
    decoder_layer = torch.nn.TransformerDecoderLayer(D, num_heads, F, **options)
    return torch.nn.Transformer(
        D,
        batch_first=True,
        custom_encoder=torch.nn.TransformerEncoder(encoder_layer, LAYERS, final_norm(), enable_nested_tensor=False),
        custom_decoder=torch.nn.TransformerDecoder(decoder_layer, LAYERS, final_norm()),
    )


SUB_LAYERS = {
    # Where our sub-layer and its norm are in a layer of PyTorch's.
    "encoder": {"self_attention": ("self_attn", "norm1"), "feed_forward": ("", "norm2")},
    "decoder": {
        "self_attention": ("self_attn", "norm1"),
        "cross_attention": ("multihead_attn", "norm2"),
        "feed_forward": ("", "norm3"),
    },
}


def in_their_names(params):
    """Our tree, parameters or gradients alike, as the state dictionary of nn.Transformer."""
    state = {}

    def put(name, layer):
        if "scale" in layer:
            state[f"{name}.weight"], state[f"{name}.bias"] = layer["scale"], layer["bias"]
        else:
            state[f"{name}.weight"], state[f"{name}.bias"] = layer["kernel"].T, layer["bias"]

    for stack, sub_layers in SUB_LAYERS.items():
        for index in range(LAYERS):
            layer, prefix = params[stack][f"layers_{index}"], f"{stack}.layers.{index}"
            for sub_layer, (name, norm) in sub_layers.items():
                put(f"{prefix}.{norm}", layer[f"{sub_layer}_norm"])
                part = layer[sub_layer]
                if sub_layer == "feed_forward":
                    put(f"{prefix}.linear1", part["inner"])
                    put(f"{prefix}.linear2", part["outer"])
                    continue
                put(f"{prefix}.{name}.out_proj", part["out"])
                projections = [part[projection] for projection in ("query", "key", "value")]
                state[f"{prefix}.{name}.in_proj_weight"] = np.concatenate([p["kernel"].T for p in projections])
                state[f"{prefix}.{name}.in_proj_bias"] = np.concatenate([p["bias"] for p in projections])
        if "norm" in params[stack]:
            put(f"{stack}.norm", params[stack]["norm"])
    return state


def leaves(state):
    """The arrays of a state dictionary, with the joined projections of query, key and value apart again."""
    for name, array in state.items():
        if "in_proj" in name:
            for projection, part in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                yield f"{name}.{projection}", part
        else:
            yield name, array


def their_logits(model, embedding):
    """Embedding, positions, both stacks and the tied output, worked out in PyTorch."""

    def embed(tokens):
        places = torch.arange(tokens.shape[1], dtype=torch.float64)[:, None]
        angles = places / 10000 ** (torch.arange(0, D, 2, dtype=torch.float64) / D)
        positions = torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(-1, D)
        return torch.nn.functional.embedding(torch.tensor(tokens), embedding) * math.sqrt(D) + positions.float()

    source_padding = torch.tensor(SOURCE == 0)
    outputs = model(
        embed(SOURCE),
        embed(SHIFTED),
        tgt_mask=torch.ones(T, T).triu(1).bool(),  # true hides
        src_key_padding_mask=source_padding,
        memory_key_padding_mask=source_padding,
        tgt_key_padding_mask=torch.tensor(TARGET == 0),
    )
    return outputs @ embedding.T


@pytest.mark.parametrize(
    ("norm", "activation", "num_heads"),
    [
        ("post", "relu", 4),
        ("pre", "gelu", 2),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("post", "gelu", 4), ("pre", "relu", 2))),
    ],
)
def test_logits_and_gradients_equal_pytorchs(norm, activation, num_heads):
    model, params = ours(norm, activation, num_heads)

    def loss(params, source, target):
        logits = model.apply({"params": params}, source, target, deterministic=True)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[..., 0]
        return jnp.where(target != 0, losses, 0.0).sum() / (target != 0).sum(), logits

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (our_loss, our_logits), gradients = jax.device_get(grad(params, SOURCE, TARGET))

    peer = theirs(norm, activation, num_heads)
    peer.load_state_dict({name: torch.tensor(array) for name, array in in_their_names(params).items()})
    embedding = torch.tensor(params["shared_embedding"]["embedding"], requires_grad=True)
    logits = their_logits(peer, embedding)
    real = torch.tensor(REAL)
    their_loss = torch.nn.functional.cross_entropy(logits[real], torch.tensor(TARGET)[real].long())
    their_loss.backward()

    # Padded queries differ on purpose, since ours see nothing; they do not affect real tokens.
    np.testing.assert_allclose(our_logits[REAL], logits.detach().numpy()[REAL], atol=1e-5)
    np.testing.assert_allclose(our_loss, their_loss.detach().numpy(), atol=1e-5)

    found = dict(leaves(in_their_names(gradients) | {"embedding": gradients["shared_embedding"]["embedding"]}))
    grads = {name: parameter.grad.numpy() for name, parameter in peer.named_parameters()}
    expected = dict(leaves(grads | {"embedding": embedding.grad.numpy()}))
    assert found.keys() == expected.keys()
    assert len(found) == len(flax.traverse_util.flatten_dict(params))
    for name, gradient in expected.items():
        difference = np.linalg.norm(found[name] - gradient)
        if name.endswith("in_proj_bias.key"):
            assert difference < 1e-6, name  # zero in exact arithmetic: the same added to each logit moves no weight
        else:
            assert difference < 1e-4 * np.linalg.norm(gradient), name
    together, differences = (
        math.hypot(*(np.linalg.norm(array) for array in arrays))
        for arrays in (expected.values(), [found[name] - expected[name] for name in expected])
    )
    assert differences < 1e-4 * together


def test_the_shifted_target_equals_that_of_this_library():
    config = TransformerConfig()
    tokens = Tokens.from_ids(jnp.asarray(TARGET), config.pad_id)
    assert np.array_equal(tokens.shift_right(config.start_id).ids, SHIFTED)

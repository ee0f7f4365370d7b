"""Compares attention by cuDNN with attention by XLA, and tests which of them is chosen.

Without a GPU, cuDNN's kernel is only lowered, and a replacement for it runs.
"""

import re
from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer import attention
from flax_transformer.attention import dot_product_attention
from flax_transformer.config import TransformerConfig
from flax_transformer.masks import causal_mask, combine_masks, padding_mask, segment_mask
from flax_transformer.model import Transformer

B, Q, M, H, K = 2, 64, 70, 3, 8


def segments(total, *lengths):
    """Rows of `total` tokens: for each the lengths of its segments, then padding."""
    numbers = [np.repeat(np.arange(len(row)) + 1, row) for row in lengths]
    return jnp.asarray([np.pad(row, (0, total - len(row))) for row in numbers])


TARGET, SOURCE = segments(Q, [20, 30, 14], [50, 7]), segments(M, [40, 20], [9, 21, 10])
# Queries that see nothing: padding of the target; in "cross" the third sentence of row 0, which has no source.
MASKS = {
    "none": None,
    "padded": padding_mask(SOURCE > 0),
    "nothing but padding": padding_mask(SOURCE > jnp.array([[0], [3]])),
    "packed": segment_mask(TARGET, TARGET),
    "causal": causal_mask(Q),
    "packed and causal": combine_masks(causal_mask(Q), segment_mask(TARGET, TARGET)),
    "cross": segment_mask(TARGET, SOURCE),
    "each head its own": jnp.where(jnp.arange(M) < 20 * jnp.arange(1, H + 1)[:, None, None], 0.0, -jnp.inf)[None],
}


def random_inputs(queries=Q, memory=M, size=K, dtype="bfloat16"):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, length, H, size)), dtype) for length in (queries, memory, memory))


def outputs_and_gradients(mask, implementation, inputs):
    """The outputs, and the gradients of a product with them, in the order of the inputs."""
    directions = np.random.default_rng(1).normal(size=inputs[0].shape).astype("float32")

    def loss(*inputs):
        gathered = dot_product_attention(*inputs, mask, implementation=implementation)
        return (gathered * directions).sum(), gathered

    (_, gathered), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs)
    return jax.device_get((gathered, *gradients))


def check_equal_but_for_rounding(mask, dtype):
    inputs = random_inputs(memory=M if mask is None else mask.shape[-1], dtype=dtype)
    expected = outputs_and_gradients(mask, "xla", inputs)
    found = outputs_and_gradients(mask, "cudnn", inputs)
    for array, other in zip(found, expected, strict=True):
        assert array.dtype == dtype
        array, other = array.astype("float64"), other.astype("float64")
        assert np.linalg.norm(array - other) < 2e-2 * np.linalg.norm(other)  # bfloat16 keeps 8 bits
    if mask is not None:
        blind = np.broadcast_to(~(np.asarray(mask) == 0).any(-1), (B, H, Q)).swapaxes(1, 2)
        assert (found[0][blind] == 0).all() and (found[1][blind] == 0).all()


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU with cuDNN, sufficient for choosing the implementation and lowering it."""
    monkeypatch.setattr(attention, "_gpu_has_cudnn", lambda: True)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)


@pytest.fixture
def calls(gpu, monkeypatch):
    """Replaces the kernel, with NaN for rows that see nothing and their gradients; records the shapes of calls."""
    shapes = []

    def kernel(query, key, value, *, mask=None, implementation):
        assert implementation == "cudnn" and (mask is None or mask.shape[2:] == (query.shape[1], key.shape[1]))
        shapes.append((query.shape, key.shape))
        logits = jnp.einsum("bqhk,bmhk->bhqm", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
        weights = jax.nn.softmax(logits if mask is None else jnp.where(mask, logits, -jnp.inf))
        return jnp.einsum("bhqm,bmhk->bqhk", weights.astype(value.dtype), value)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    return shapes


@pytest.mark.parametrize("name", MASKS)
def test_cudnn_with_a_replacement_for_its_kernel_equals_xla(name, calls):
    check_equal_but_for_rounding(MASKS[name], "bfloat16")
    assert len(calls) == 1


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU: JAX_PLATFORMS=cuda,cpu pytest -k on_a_gpu")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", MASKS)
def test_on_a_gpu_cudnn_equals_xla(name, dtype):
    check_equal_but_for_rounding(MASKS[name], dtype)


@pytest.mark.parametrize("name", MASKS)
def test_on_a_gpu_forward_and_backward_pass_are_lowered_to_cudnn_kernels(name, gpu):
    mask = MASKS[name]
    inputs = random_inputs(memory=M if mask is None else mask.shape[-1])

    def lower(function):
        return jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()

    def loss(*inputs):
        return dot_product_attention(*inputs, mask).sum()

    forward, both = lower(loss), lower(jax.grad(loss, (0, 1, 2)))
    kernel = "__cudnn$fmhaSoftmax" if mask is None else "__cudnn$fmhaScaleBiasSoftmax"
    assert re.findall(r"__cudnn\$\w+", forward) == [kernel]
    assert re.findall(r"__cudnn\$\w+", both) == [kernel, f"{kernel}Backward"]
    if mask is not None:
        bias = "x".join(map(str, (*mask.shape[:2], Q, inputs[1].shape[1])))
        assert re.search(rf"custom_call @__cudnn.*tensor<{bias}xbf16>\) ->", forward)


KEY = jax.random.key(0)
# What differs from 64 queries, 70 memory positions and a mask; whether "auto" selects cuDNN; the error of "cudnn".
CHOICES = [
    ({}, True, None),
    ({"dtype": "float16"}, True, None),
    ({"dtype": "float32"}, False, "activations are float32: make them bfloat16 or float16"),
    ({"size": 128}, True, None),
    ({"size": 12}, False, "the head size is 12: make it a multiple of 8, at most 128"),
    ({"size": 136}, False, "the head size is 136: make it a multiple of 8, at most 128"),
    ({"queries": 65}, False, "there are 65 queries and 70 memory positions under a mask: make both even"),
    ({"memory": 71}, False, "there are 64 queries and 71 memory positions under a mask: make both even"),
    ({"queries": 65, "memory": 71, "mask": None}, True, None),
    ({"queries": 62}, False, None),
    ({"queries": 1, "mask": None}, False, None),
    ({"dropout_rate": 0.25}, True, None),
    ({"dropout_rate": 0.25, "dropout_rng": KEY}, False, "the dropout rate on the weights is 0.25: make it 0"),
    ({"dropout_rate": 0.0, "dropout_rng": KEY}, True, None),
    ({"return_weights": True}, False, "the weights are asked for, which it never holds: do without"),
]


def attend(implementation, *, queries=Q, memory=M, size=K, dtype="bfloat16", mask=True, **options):
    mask = mask and jnp.zeros((B, 1, 1, memory))
    call = partial(dot_product_attention, mask=mask, implementation=implementation, **options)
    jax.eval_shape(call, *random_inputs(queries, memory, size, dtype))


@pytest.mark.parametrize(("changes", "auto", "obstacle"), CHOICES, ids=lambda value: str(value)[:40])
def test_auto_selects_cudnn_where_it_runs_and_cudnn_says_what_prevents_it(changes, auto, obstacle, calls):
    attend("auto", **changes)
    assert len(calls) == auto
    attend("xla", **changes)
    assert len(calls) == auto
    if obstacle is None:
        attend("cudnn", **changes)
        assert len(calls) == auto + 1
    else:
        with pytest.raises(ValueError, match=f'implementation is "cudnn" and {obstacle}; or choose "auto" or "xla"'):
            attend("cudnn", **changes)


def test_an_unknown_implementation_is_an_error_that_lists_the_choices():
    with pytest.raises(ValueError, match="implementation is 'flash': choose one of auto, xla, cudnn"):
        attend("flash")


@pytest.mark.parametrize(
    ("platform_version", "attributes", "has_it"),
    [
        ("PJRT C API\ncuda 12080", {"compute_capability": "8.0"}, True),
        ("PJRT C API\ncuda 13000", {"compute_capability": "10.0"}, True),
        ("PJRT C API\ncuda 12080", {"compute_capability": "7.5"}, False),
        ("PJRT C API\nrocm 60300", {"compute_capability": "gfx942"}, False),
        ("PJRT C API\nTFRT TPU v5 lite", {}, False),
    ],
)
def test_cudnn_s_kernel_needs_an_ampere_gpu_or_later(platform_version, attributes, has_it, monkeypatch):
    device = SimpleNamespace(
        client=SimpleNamespace(platform_version=platform_version), device_kind="Device 9", **attributes
    )
    monkeypatch.setattr(attention, "get_default_device", lambda: device)
    assert attention._gpu_has_cudnn() == has_it
    if not has_it:
        attend("auto")
        with pytest.raises(ValueError, match=r"needs an NVIDIA GPU of compute capability 8\.0 .* runs on Device 9; or"):
            attend("cudnn")


def model_calls(calls, implementation="auto", **changes):
    """The model, its parameters' shapes, and how often its initialisation called the kernel."""
    config = TransformerConfig(
        source_vocab_size=31,
        target_vocab_size=31,
        d_model=H * K * 2,
        num_heads=H,
        d_ff=24,
        num_encoder_layers=3,
        num_decoder_layers=2,
        dtype="bfloat16",
        attention_implementation=implementation,
        **changes,
    )
    model, tokens = Transformer(config), np.ones((B, Q), "int32")
    return model, jax.eval_shape(partial(model.init, deterministic=True), KEY, tokens, tokens), len(calls)


@pytest.mark.parametrize(("implementation", "expected"), [("auto", 3 + 2 * 2), ("cudnn", 3 + 2 * 2), ("xla", 0)])
def test_all_attention_of_a_model_uses_the_implementation_of_the_config(implementation, expected, calls):
    model, variables, begun = model_calls(calls, implementation)
    assert begun == 0
    source, target = np.ones((B, M), "int32"), np.ones((B, Q), "int32")
    jax.eval_shape(partial(model.apply, deterministic=True), variables, source, target)
    assert len(calls) == expected
    assert {(query[1], key[1]) for query, key in calls} == ({(M, M), (Q, Q), (Q, M)} if expected else set())


def test_the_steps_of_a_search_use_xla(calls):
    model, variables, _ = model_calls(calls)

    def first_steps(variables):
        source = jnp.ones((B, M), jnp.int32)
        state = model.apply(variables, source, max_length=Q, hypotheses=4, method="start_decoding")
        for tokens in (1, 3):
            state, logits = model.apply(variables, state, jnp.ones((B * 4, tokens), jnp.int32), method="decode_step")
        return logits

    jax.eval_shape(first_steps, variables)
    assert calls == [((B, M, H, 2 * K),) * 2] * 3  # the encoder's


# Masks of other conventions, which cannot be distinguished from additive ones while tracing.
FOREIGN = {
    "1 and 0": lambda: nn.make_causal_mask(jnp.ones((B, Q))),
    "a large finite bias": lambda: jnp.where(causal_mask(Q) == 0, 0.0, -1e9),
    "a bias by distance": lambda: causal_mask(Q) - 0.1 * jnp.abs(jnp.arange(Q) - jnp.arange(Q)[:, None]),
}


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_traced_mask_of_another_convention_gives_nan_with_each_implementation(name, implementation, calls):
    inputs = random_inputs(memory=Q)
    call = partial(dot_product_attention, implementation=implementation)
    assert np.isnan(jax.jit(call)(*inputs, FOREIGN[name]())).any()
    with pytest.raises(ValueError, match="mask holds"):
        call(*inputs, FOREIGN[name]())
    assert np.isfinite(jax.jit(call)(*inputs, causal_mask(Q))).all()

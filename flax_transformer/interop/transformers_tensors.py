"""Converts the named tensors of Marian, M2M100 and NLLB models, as transformers has them, to our parameters and back.

Their linear maps are stored [out, in], ours [in, out]; norms and embeddings are the same arrays. Both formats store
a shared matrix once, but not by the same rules; here matrices are shared if they are equal.

Glossary: D d_model, V a vocabulary's size.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from flax_transformer.config import TransformerConfig
from flax_transformer.interop.parameters import build_params, check_depth, check_embeddings, embeddings
from flax_transformer.interop.tensor_files import Tensors

SHARED, SOURCE, TARGET = "model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"
OUTPUT, OUTPUT_BIAS = "lm_head.weight", "final_logits_bias"
# Sinusoidal positions follow from the configuration, but older files contain them too.
POSITIONS = {
    f"model.{stack}.embed_positions.{name}" for stack in ("encoder", "decoder") for name in ("weight", "weights")
}
ATTENTION_PARTS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}


def layer_names(config: TransformerConfig) -> Iterator[tuple[str, str]]:
    """The path of each parameter of all layers and final norms, and the name of its tensor in transformers."""
    for stack, layers in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        attentions = {"self_attention": "self_attn"} | (
            {} if stack == "encoder" else {"cross_attention": "encoder_attn"}
        )
        parts = {"feed_forward/inner": "fc1", "feed_forward/outer": "fc2", "feed_forward_norm": "final_layer_norm"}
        for ours, theirs in attentions.items():
            parts |= {f"{ours}/{part}": f"{theirs}.{name}" for part, name in ATTENTION_PARTS.items()}
            parts[f"{ours}_norm"] = f"{theirs}_layer_norm"
        for number in range(layers):
            for ours, theirs in parts.items():
                weight = "scale" if ours.endswith("_norm") else "kernel"
                for own_leaf, their_leaf in ((weight, "weight"), ("bias", "bias")):
                    yield (
                        f"{stack}/layers_{number}/{ours}/{own_leaf}",
                        f"model.{stack}.layers.{number}.{theirs}.{their_leaf}",
                    )
        if config.norm == "pre":
            yield f"{stack}/norm/scale", f"model.{stack}.layer_norm.weight"
            yield f"{stack}/norm/bias", f"model.{stack}.layer_norm.bias"


def from_tensors(
    config: TransformerConfig, tensors: Tensors, *, shared: bool, tied: bool
) -> tuple[TransformerConfig, PyTree]:
    """Makes our parameters from the tensors of a model.

    Args:
        config: the model's config, in which it is still open which embeddings are tied.
        tensors: arrays by their names in transformers; they may be mapped from files.
        shared: whether source and target share their embeddings according to the configuration.
        tied: whether the output is tied to them according to the configuration.

    Returns:
        The complete config, and the parameters.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape than the config asks for.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if name not in POSITIONS}
    check_depth(config, tensors, "config.json")
    source, target, output = _matrices(tensors, shared=shared, tied=tied)
    same = _same(target, output)
    tie = "three_way" if same and _same(source, target) else "decoder" if same else "none"
    if tie == "three_way":
        found: dict[str, Any] = {"shared_embedding/embedding": source}
    else:
        found = {"source_embedding/embedding": source, "target_embedding/embedding": target}
    if tie == "none":
        found["output_kernel"] = output.T
    if OUTPUT_BIAS in tensors:
        found["output_bias"] = tensors[OUTPUT_BIAS].reshape(-1)
    named = {"source_embedding/embedding": SOURCE, "target_embedding/embedding": TARGET, "output_kernel": OUTPUT}
    named |= {"shared_embedding/embedding": SHARED, "output_bias": OUTPUT_BIAS}
    for path, name in layer_names(config):
        named[path] = name
        if name in tensors:
            found[path] = tensors[name].T  # vectors stay as they are
    if unknown := tensors.keys() - {SHARED, *named.values()}:
        raise ValueError(f"the tensor {min(unknown)} is unknown, and no part of such a model")
    check_embeddings(SOURCE, source, config.source_vocab_size, "config.json")
    check_embeddings(TARGET, target, config.target_vocab_size, "config.json")
    config = dataclasses.replace(config, tie_embeddings=tie, output_bias=OUTPUT_BIAS in tensors)
    return config, build_params(config, found, named, "config.json")


def _matrices(tensors: Tensors, *, shared: bool, tied: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrices of source, target and output; the configuration says which other one replaces a missing one."""
    # A file may contain a shared matrix under any one of its names.
    targets = [TARGET, *([SHARED, SOURCE] if shared else []), *([OUTPUT] if tied else [])]
    sources = [SOURCE, *([SHARED, TARGET] if shared else []), *([OUTPUT] if shared and tied else [])]
    outputs = [OUTPUT, *(targets if tied else [])]

    def find(*names: str) -> np.ndarray:
        found = next((tensors[name] for name in names if name in tensors), None)
        if found is None:
            raise ValueError(f"the tensor {names[0]} is missing: the file is not complete, download it again")
        return found

    if shared and tied:
        first, *others = [tensors[name] for name in (SHARED, SOURCE, TARGET) if name in tensors] or [find(*sources)]
        if not all(_same(first, other) for other in others):
            raise ValueError(
                f"{SOURCE}, {TARGET} and {SHARED} differ, but config.json shares them: download both files again"
            )
    return find(*sources), find(*targets), find(*outputs)


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    return first is second or np.array_equal(first, second)


def to_tensors(config: TransformerConfig, params: PyTree) -> tuple[dict[str, np.ndarray], dict[str, bool]]:
    """The tensors of a model by their names in transformers, and the two fields that say which of them are shared.

    A bias of the output is among them if the model has one. Marian, which has the norm after each sub-layer, always
    has that bias; it is zero if the model has none.
    """
    source, target, output = embeddings(config, params)
    shared, tied = np.array_equal(source, target), np.array_equal(target, output)
    tensors = {SHARED: source} if shared else {SOURCE: source, TARGET: target}
    if not tied:
        # If the output is not tied, transformers shares nothing, whatever the field for the embeddings says.
        tensors |= {SOURCE: source, TARGET: target, OUTPUT: output}
    flat = flatten_dict(params, sep="/")
    if config.output_bias or config.norm == "post":
        tensors[OUTPUT_BIAS] = np.asarray(flat.get("output_bias", np.zeros(config.target_vocab_size, np.float32)))[None]
    tensors |= {name: np.asarray(flat[path]).T for path, name in layer_names(config)}
    arrays = {name: np.array(tensor, np.float32, order="C") for name, tensor in tensors.items()}
    return arrays, {"share_encoder_decoder_embeddings": shared, "tie_word_embeddings": tied}


def concatenate_waves(config: TransformerConfig, params: PyTree) -> tuple[TransformerConfig, PyTree]:
    """Reorders features so that the model computes the same with the sines of its positions before all the cosines.

    In the paper's positions, sines and cosines alternate. All vectors of d_model features are reordered in the same
    way: kernels that read such vectors get their rows in the new order, and kernels that write them their columns. Only
    rounding can differ.
    """
    if config.positions != "sinusoidal":
        return config, params
    order = np.r_[0 : config.d_model : 2, 1 : config.d_model : 2]

    def reorder(path: str, leaf: np.ndarray) -> np.ndarray:
        *_, part, kind = ["", *path.split("/")]
        if part in ("query", "key", "value", "inner"):  # read such vectors
            return leaf[order] if kind == "kernel" else leaf
        if path == "output_kernel":
            return leaf[order]
        return leaf if path == "output_bias" else leaf[..., order]

    flat = {path: reorder(path, np.asarray(leaf)) for path, leaf in flatten_dict(params, sep="/").items()}
    return dataclasses.replace(config, positions="sinusoidal_concatenated"), unflatten_dict(flat, sep="/")

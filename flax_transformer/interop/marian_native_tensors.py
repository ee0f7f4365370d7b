"""Converts the tensors of a model in Marian's own format to our parameters, and back.

Matrices lie [in, out] in both, biases and norms are [1, n] there. Marian has no padding: here every vocabulary gets at
least one more id, whose embedding is zero and whose logit is always `NEVER`.

Glossary: D d_model, V a vocabulary's size.
"""

from collections.abc import Iterator

import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import PyTree

from flax_transformer.config import TransformerConfig
from flax_transformer.interop.parameters import build_params, check_depth, check_embeddings, embeddings
from flax_transformer.interop.tensor_files import Tensors

SHARED, SOURCE, TARGET = "Wemb", "encoder_Wemb", "decoder_Wemb"
# The second is of older versions, and lies [D, V].
OUTPUT, OLD_OUTPUT, OUTPUT_BIAS = "decoder_ff_logit_out_Wt", "decoder_ff_logit_out_W", "decoder_ff_logit_out_b"
ATTENTION_PARTS = {"query": "q", "key": "k", "value": "v", "out": "o"}
# A logit with which a token has no probability, and that does not drown the rest of a loss with label smoothing.
NEVER = -100.0


def layer_names(config: TransformerConfig) -> Iterator[tuple[str, str]]:
    """The path of each parameter of both stacks, and the name of its tensor in Marian."""
    before = config.norm == "pre"
    suffix = "_pre" if before else ""
    recurrent = config.decoder_autoregression == "ssru"
    for stack, layers in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        parts = {"feed_forward_norm": f"ffn_ffn_ln_*{suffix}"}
        for ours, theirs in {"inner": "1", "outer": "2"}.items():
            parts |= {f"feed_forward/{ours}/kernel": f"ffn_W{theirs}", f"feed_forward/{ours}/bias": f"ffn_b{theirs}"}
        attentions = {"self_attention": "self"} | ({"cross_attention": "context"} if stack == "decoder" else {})
        if stack == "decoder" and recurrent:
            del attentions["self_attention"]
            parts |= {"recurrence/input/kernel": "rnn_W", "recurrence/forget/kernel": "rnn_Wf"}
            parts |= {"recurrence/forget/bias": "rnn_bf"}
            parts["recurrence_norm"] = "rnn_ln_*_pre" if before else "rnn_ffn_ln_*"
        for ours, theirs in attentions.items():
            for part, letter in ATTENTION_PARTS.items():
                parts[f"{ours}/{part}/kernel"] = f"{theirs}_W{letter}"
                parts[f"{ours}/{part}/bias"] = f"{theirs}_b{letter}"
            parts[f"{ours}_norm"] = f"{theirs}_Wo_ln_*{suffix}"
        named = {
            f"{stack}/layers_{number}/{ours}": f"{stack}_l{number + 1}_{theirs}"
            for number in range(layers)
            for ours, theirs in parts.items()
        }
        if before:
            named[f"{stack}/norm"] = f"{stack}_top_ln_*"
        for ours, theirs in named.items():
            if "*" in theirs:  # a norm
                yield from ((f"{ours}/{leaf}", theirs.replace("*", leaf)) for leaf in ("scale", "bias"))
            else:
                yield ours, theirs


def from_tensors(
    config: TransformerConfig, tensors: Tensors, sizes: tuple[int, int], *, bias: bool, place: str
) -> PyTree:
    """Makes our parameters from Marian's tensors.

    Args:
        config: the model's config, with the sizes of our vocabularies.
        tensors: float32 arrays by Marian's names.
        sizes: the sizes of source and target vocabulary in Marian's files, which are not larger.
        bias: whether Marian has a bias on the logits; if not, and ours has one, it only excludes padding.
        place: the file of the options, for errors.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape than the config asks for.
    """
    check_depth(config, tensors, place)
    tensors = dict(tensors)
    if OLD_OUTPUT in tensors:
        tensors[OUTPUT] = tensors.pop(OLD_OUTPUT).T
    if config.tie_embeddings == "three_way":
        names = {"shared_embedding/embedding": SHARED}
    else:
        # With tied-embeddings-src alone, source and target share a matrix, and the output has its own.
        shared = config.tie_embeddings == "none" and SHARED in tensors
        names = {"source_embedding/embedding": SHARED if shared else SOURCE}
        names["target_embedding/embedding"] = SHARED if shared else TARGET
    if config.tie_embeddings == "none":
        names["output_kernel"] = OUTPUT
    lengths = dict(zip(("source", "target"), sizes, strict=True))
    found = {}
    for path, name in names.items():
        if name in tensors:
            side = "source" if path.startswith("source") else "target"
            check_embeddings(name, tensors[name], lengths[side], place)
            matrix = _lengthened(tensors[name], getattr(config, f"{side}_vocab_size"), 0.0)
            found[path] = matrix.T if path == "output_kernel" else matrix
    if bias:
        names["output_bias"] = OUTPUT_BIAS
    if config.output_bias and (OUTPUT_BIAS in tensors or not bias):
        column = tensors[OUTPUT_BIAS].T if bias else np.zeros((sizes[1], 1), np.float32)
        check_embeddings(OUTPUT_BIAS, column, sizes[1], place)
        found["output_bias"] = _lengthened(column[:, 0], config.target_vocab_size, NEVER)
    for path, name in layer_names(config):
        names[path] = name
        if name in tensors:
            found[path] = tensors[name] if path.endswith("kernel") else tensors[name].reshape(-1)
    if unknown := tensors.keys() - set(names.values()):
        raise ValueError(f"the tensor {min(unknown)} is unknown, or does not belong to a model with these options")
    return build_params(config, found, names, place)


def _lengthened(array: np.ndarray, size: int, value: float) -> np.ndarray:
    """The array with further rows of one value, up to a size."""
    more = [(0, size - len(array)), *[(0, 0)] * (array.ndim - 1)]
    return np.pad(array, more, constant_values=value)


def to_tensors(
    config: TransformerConfig, params: PyTree, sizes: tuple[int, int], *, bias: bool
) -> dict[str, np.ndarray]:
    """The tensors of a model by Marian's names.

    Args:
        config: the model's config.
        params: its parameters.
        sizes: the sizes of source and target vocabulary in Marian's files; further rows are left out.
        bias: whether Marian gets a bias on the logits.
    """
    source, target, output = embeddings(config, params)
    if config.tie_embeddings == "three_way":
        tensors = {SHARED: source[: sizes[0]]}
    else:
        tensors = {SOURCE: source[: sizes[0]], TARGET: target[: sizes[1]]}
    if config.tie_embeddings == "none":
        tensors[OUTPUT] = output[: sizes[1]]
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    if bias:
        tensors[OUTPUT_BIAS] = flat["output_bias"][None, : sizes[1]]
    for path, name in layer_names(config):
        tensors[name] = flat[path] if path.endswith("kernel") else flat[path][None]
    return {name: np.array(tensor, np.float32, order="C") for name, tensor in tensors.items()}

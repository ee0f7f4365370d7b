"""Exports a model to a folder for CTranslate2, with the SentencePiece models and an example of their use."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import PyTree

from flax_transformer.config import TransformerConfig
from flax_transformer.data.marian_vocabulary import SOURCE_PIECES, TARGET_PIECES, MarianVocabulary
from flax_transformer.interop.fields import check_options
from flax_transformer.interop.folders import new_folder
from flax_transformer.interop.parameters import embeddings
from flax_transformer.ranges import check_value
from flax_transformer.stacks import wave_vectors
from flax_transformer.trained_model import TrainedModel

# CTranslate2's names; with "none" the weights stay float32.
QUANTIZATIONS = ("none", "int8", "int8_float32", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16")
ACTIVATIONS = {"quick_gelu": "GELUSigmoid"}  # the others have the same names in capitals
# A logit's bias that float16 can hold and that reduces the probability to 0.
NEVER = -3e4
# Minimum number of sinusoidal positions to export: each takes 4 * d_model bytes.
POSITIONS = 1024
EXAMPLE = """\
import ctranslate2, sentencepiece

translator = ctranslate2.Translator("{folder}")
source, target = (sentencepiece.SentencePieceProcessor("{folder}/" + name) for name in ("source.spm", "target.spm"))
pieces = {language}source.encode("A dog runs.", out_type=str)
(found,) = translator.translate_batch([pieces], {options})
print(target.decode(found.hypotheses[0]{text}).replace("▁", " ").strip())
"""


def to_ctranslate2(model: TrainedModel, folder: epath.PathLike, *, quantization: str = "none") -> None:
    """Writes a folder for CTranslate2, with the SentencePiece models and a README that shows their use.

    Args:
        model: the model to export.
        folder: where to write it; must be empty or not exist.
        quantization: one of `QUANTIZATIONS`.

    Raises:
        ValueError: ctranslate2 is not installed, there is no such quantization, the model's decoder is recurrent, or
            sources end with their language.
    """
    check_options(
        model.config,
        {"decoder_autoregression": ["self_attention"]},
        "CTranslate2 needs",
        "train with that, or convert to-marian-native or to-stablehlo",
    )
    check_value("--quantization", quantization, str, QUANTIZATIONS)
    source, target = model.vocabularies.source, model.vocabularies.target
    if source.language_last:
        raise ValueError(
            "the tokenizer has legacy_behaviour, so that sources end with their language, but CTranslate2 puts the end "
            "of sentence last: set legacy_behaviour to false in tokenizer_config.json and convert the model again"
        )
    with new_folder(folder) as draft:
        write_model(
            draft,
            model.config,
            model.params,
            source.all_pieces(),
            target.all_pieces(),
            target.unk_id,
            quantization=quantization,
        )
        (draft / SOURCE_PIECES).write_bytes(source.pieces_model)
        (draft / TARGET_PIECES).write_bytes(target.pieces_model)
        (draft / "README.md").write_text(_readme(model, epath.Path(folder).name, quantization))


def write_model(
    folder: epath.Path,
    config: TransformerConfig,
    params: PyTree,
    source_pieces: Sequence[str],
    target_pieces: Sequence[str],
    unk_id: int,
    *,
    quantization: str = "none",
) -> None:
    """Writes the files that CTranslate2 reads; raises ValueError if it is not installed.

    Args:
        folder: an existing folder; files of the same names are replaced.
        config: the model's config.
        params: its parameters.
        source_pieces: the piece of each source token, in the order of their ids.
        target_pieces: the piece of each target token, in the order of their ids.
        unk_id: the target's unknown token.
        quantization: one of `QUANTIZATIONS`.
    """
    try:
        from ctranslate2.converters.converter import Converter
    except ImportError as error:
        raise ValueError("ctranslate2 is not installed: pip install 'flax_transformer[interop]'") from error

    class Ours(Converter):
        def _load(self) -> Any:
            spec = _describe(config, params)
            spec.config.decoder_start_token = spec.config.bos_token = target_pieces[config.start_id]
            spec.config.eos_token, spec.config.unk_token = target_pieces[config.eos_id], target_pieces[unk_id]
            spec.register_source_vocabulary(list(source_pieces))
            spec.register_target_vocabulary(list(target_pieces))
            return spec

    weights = None if quantization == "none" else quantization
    Ours().convert(str(folder), quantization=weights, force=True)


def _describe(config: TransformerConfig, params: PyTree) -> Any:
    """Builds what CTranslate2 calls a specification: the model's shape and its arrays."""
    from ctranslate2.specs import common_spec
    from ctranslate2.specs.transformer_spec import TransformerSpec

    spec = TransformerSpec.from_config(
        (config.num_encoder_layers, config.num_decoder_layers),
        config.num_heads,
        pre_norm=config.norm == "pre",
        activation=common_spec.Activation[ACTIVATIONS.get(config.activation, config.activation.upper())],
    )
    spec.config.layer_norm_epsilon = config.norm_epsilon
    spec.config.add_source_bos, spec.config.add_source_eos = False, True
    # Copies, because quantizing changes arrays in place.
    source, target, output = (np.array(matrix) for matrix in embeddings(config, params))
    if config.zero_start:
        target[config.start_id] = 0.0
    spec.encoder.embeddings[0].weight, spec.decoder.embeddings.weight = source, target
    spec.encoder.scale_embeddings = spec.decoder.scale_embeddings = config.scale_embeddings
    spec.decoder.projection.weight = output
    if config.output_bias or config.banned_ids:
        bias = np.array(params["output_bias"] if config.output_bias else np.zeros(config.target_vocab_size, np.float32))
        bias[list(config.banned_ids)] = NEVER
        spec.decoder.projection.bias = bias
    for theirs, name in ((spec.encoder, "encoder"), (spec.decoder, "decoder")):
        # Without this table CTranslate2 computes its own, which starts from position 1 and has other wavelengths.
        theirs.position_encodings.encodings = _positions(config, params[name])
        if config.norm == "pre":
            _fill_norm(theirs.layer_norm, params[name]["norm"])
        for number, layer in enumerate(theirs.layer):
            _fill_layer(layer, params[name][f"layers_{number}"])
    return spec


def _positions(config: TransformerConfig, stack: PyTree) -> np.ndarray:
    if config.positions == "learned":
        return np.array(stack["learned_positions"]["embedding"])
    return np.array(wave_vectors(config, jnp.arange(max(config.max_length, POSITIONS))))


def _fill_layer(theirs: Any, ours: PyTree) -> None:
    def parts(attention: str) -> list[PyTree]:
        return [ours[attention][part] for part in ("query", "key", "value", "out")]

    query, key, value, out = parts("self_attention")
    _fill_linear(theirs.self_attention.linear[0], [query, key, value])
    _fill_linear(theirs.self_attention.linear[1], [out])
    _fill_norm(theirs.self_attention.layer_norm, ours["self_attention_norm"])
    if "cross_attention" in ours:
        query, key, value, out = parts("cross_attention")
        for linear, together in zip(theirs.attention.linear, ([query], [key, value], [out]), strict=True):
            _fill_linear(linear, together)
        _fill_norm(theirs.attention.layer_norm, ours["cross_attention_norm"])
    _fill_linear(theirs.ffn.linear_0, [ours["feed_forward"]["inner"]])
    _fill_linear(theirs.ffn.linear_1, [ours["feed_forward"]["outer"]])
    _fill_norm(theirs.ffn.layer_norm, ours["feed_forward_norm"])


def _fill_linear(theirs: Any, parts: Iterable[PyTree]) -> None:
    theirs.weight = np.concatenate([np.asarray(part["kernel"]).T for part in parts])
    theirs.bias = np.concatenate([np.asarray(part["bias"]) for part in parts])


def _fill_norm(theirs: Any, ours: PyTree) -> None:
    theirs.gamma, theirs.beta = np.array(ours["scale"]), np.array(ours["bias"])


def _readme(model: TrainedModel, name: str, quantization: str) -> str:
    config, vocabulary = model.config, model.vocabularies.target
    banned = [[piece] for piece in vocabulary.pieces(config.never_chosen)]
    options = f"beam_size=4, max_decoding_length={config.max_output or config.max_length}, suppress_sequences={banned}"
    language = text = begins = ""
    if vocabulary.language_ids:  # both sides begin with the token of their language
        languages = vocabulary.languages
        english = next((code for code in languages if code in ("eng_Latn", "__en__")), languages[0])
        language, text = f'["{english}"] + ', "[1:]"
        options = f'target_prefix=[["{vocabulary.language or languages[-1]}"]], {options}'
    if vocabulary.languages:
        sides = "The source and the target begin" if vocabulary.language_ids else "The source begins"
        # Vocabularies that were trained here have these tokens among the pieces.
        apart = vocabulary.language_ids or isinstance(model.vocabularies.source, MarianVocabulary)
        place = "pieces" if apart else "text"
        begins = f"{sides} with a language token, put before the {place}: {', '.join(vocabulary.languages)}.\n"
    example = EXAMPLE.format(folder=name, language=language, text=text, options=options)
    return (
        f"# {name}\n\nA Transformer of {config.num_encoder_layers}+{config.num_decoder_layers} layers for CTranslate2 "
        f"(`pip install ctranslate2 sentencepiece`), weights {'float32' if quantization == 'none' else quantization}. "
        f"It is made for sentences of up to {config.max_length} tokens. Run this in the folder above:\n\n"
        f"```python\n{example}```\n\n"
        "CTranslate2 adds the end of a sentence itself; its `length_penalty` divides by length ^ penalty.\n"
        f"{begins}"
    )

"""Converts OPUS-MT (Marian) models to models of this library, and back to the format that transformers stores.

`marian_native.py` reads Marian's own files. In the format of transformers, a folder has `config.json`, the weights,
`source.spm`, `target.spm`, `vocab.json`, and possibly `target_vocab.json`, `generation_config.json` and
`tokenizer_config.json`.
"""

from etils import epath

from flax_transformer.config import TransformerConfig
from flax_transformer.data.marian_vocabulary import TARGET_IDS, MarianVocabulary, read_marian_vocabularies
from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.interop.downloaded import read_json_if_there
from flax_transformer.interop.folders import new_folder
from flax_transformer.interop.marian_fields import FIELDS, check_expressible, read_fields, write_fields
from flax_transformer.interop.marian_native import read_native
from flax_transformer.interop.marian_native_files import is_native
from flax_transformer.interop.tensor_files import read_tensors
from flax_transformer.interop.transformers_files import (
    ADDED_TOKENS,
    TOKENIZER_CONFIG,
    check_ids,
    read_configuration,
    write_json,
    write_model,
)
from flax_transformer.interop.transformers_tensors import concatenate_waves, from_tensors, to_tensors
from flax_transformer.trained_model import TrainedModel


def read_marian(path: epath.PathLike, *, trained_positions: bool = False) -> TrainedModel:
    """Reads a Marian model.

    Args:
        path: the folder with its files; in Marian's own format also the `.npz` or `.bin` file.
        trained_positions: for transformers' format: whether to compute the positions with which Marian trained the
            model, as Marian's own format always does, and not those of transformers, which have other wavelengths.

    Raises:
        ValueError: a file is missing or damaged, the files do not belong together, or the model has a feature that this
            library's models lack; names the field and its value.
    """
    folder = epath.Path(path).expanduser()
    if is_native(folder):
        return read_native(folder)
    fields = read_configuration(folder, FIELDS)
    vocabularies = _read_vocabularies(folder)
    config = read_fields(fields, trained_positions=trained_positions)
    _check_sizes(folder, config, vocabularies)
    check_ids(config, vocabularies)
    shared, tied = (
        fields.flag(name, default=True) for name in ("share_encoder_decoder_embeddings", "tie_word_embeddings")
    )
    config, params = from_tensors(config, read_tensors(folder), shared=shared, tied=tied)
    return TrainedModel(config, params, vocabularies)


def _read_vocabularies(folder: epath.Path) -> VocabularyPair:
    settings = read_json_if_there(folder / TOKENIZER_CONFIG)
    separate = bool(settings.get("separate_vocabs", (folder / TARGET_IDS).exists()))
    return VocabularyPair(*read_marian_vocabularies(folder, separate=separate))


def _check_sizes(folder: epath.Path, config: TransformerConfig, vocabularies: VocabularyPair) -> None:
    for side, vocabulary, size in (
        ("source", vocabularies.source, config.source_vocab_size),
        ("target", vocabularies.target, config.target_vocab_size),
    ):
        if vocabulary.size != size:
            raise ValueError(
                f"the {side} vocabulary has {vocabulary.size} pieces, but config.json says {size}: "
                f"{_explain_size(folder, vocabulary, size)}"
            )


def _explain_size(folder: epath.Path, vocabulary: Vocabulary, size: int) -> str:
    """Explains why the model has more or fewer embeddings than the vocabulary has pieces, and what to do about it."""
    tokens = read_json_if_there(folder / ADDED_TOKENS)
    if tokens and size == vocabulary.size + len(tokens):
        few = ", ".join(map(repr, list(tokens)[:4])) + (", …" if len(tokens) > 4 else "")
        return (
            f"{ADDED_TOKENS} gives the model {len(tokens)} more ({few}), which SentencePiece does not know and which "
            "cannot be converted: take the model from before they were added, or in transformers remove them with "
            f"model.resize_token_embeddings({vocabulary.size}) and save it without {ADDED_TOKENS}"
        )
    if size > vocabulary.size:
        return (
            f"the embeddings were resized for {size - vocabulary.size} pieces more than the files of the vocabulary "
            "name. If tokens were added, or the size was rounded up, take it back in transformers with "
            f"model.resize_token_embeddings({vocabulary.size}) and save the model; if not, download all files again"
        )
    return "a file belongs to another model, or is not complete: download all files again"


def from_marian(path: epath.PathLike, workdir: epath.PathLike, *, trained_positions: bool = False) -> TrainedModel:
    """Converts a Marian model to a work directory; arguments and errors as of `read_marian` and `new_folder`."""
    model = read_marian(path, trained_positions=trained_positions)
    with new_folder(workdir) as draft:
        model.save(draft)
    return model


def to_marian(model: TrainedModel, folder: epath.PathLike) -> None:
    """Writes a folder that transformers' `MarianMTModel` and `MarianTokenizer` load.

    Args:
        model: the model to convert.
        folder: where to write it; must be empty or not exist.

    Raises:
        ValueError: Marian does not support the model; names the option.
    """
    check_expressible(model.config)
    source = model.vocabularies.source
    if source.languages and not isinstance(source, MarianVocabulary):
        raise ValueError(
            f"SentencePiece itself splits off {source.languages[0]} after a space, and transformers' tokenizer"
            " without: convert to-ctranslate2 or to-stablehlo"
        )
    config, params = concatenate_waves(model.config, model.params)
    tensors, sharing = to_tensors(config, params)
    fields, generation = write_fields(config)
    sides = (model.vocabularies.source, model.vocabularies.target)
    vocabulary = VocabularyPair(*map(MarianVocabulary.of, sides)).files()
    tokenizer = {
        "tokenizer_class": "MarianTokenizer",
        "model_max_length": config.max_length,
        "separate_vocabs": TARGET_IDS in vocabulary,
    }
    with new_folder(folder) as draft:
        write_model(draft, tensors, fields | sharing, generation)
        write_json(draft / TOKENIZER_CONFIG, tokenizer)
        for name, content in vocabulary.items():
            (draft / name).write_bytes(content)

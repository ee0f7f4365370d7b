"""Converts OPUS-MT (Marian) models to models of this library, and back to the format that transformers stores.

`marian_native.py` reads Marian's own files. In the format of transformers, a folder has `config.json`, the weights,
`source.spm`, `target.spm`, `vocab.json`, and possibly `target_vocab.json`, `generation_config.json` and
`tokenizer_config.json`.
"""

import json
from typing import Any

from etils import epath

from flax_transformer.config import TransformerConfig
from flax_transformer.data.marian_vocabulary import TARGET_IDS, MarianVocabulary, read_marian_vocabularies
from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.interop.fields import read_flag, read_json
from flax_transformer.interop.folders import new_folder
from flax_transformer.interop.marian_fields import FIELDS, check_expressible, join_fields, read_fields, write_fields
from flax_transformer.interop.marian_native import is_native, read_native
from flax_transformer.interop.marian_tensors import check_layers, concatenate_waves, from_tensors, to_tensors
from flax_transformer.interop.tensor_files import SAFETENSORS, read_tensors
from flax_transformer.trained_model import TrainedModel

# Where transformers keeps tokens that were added to a tokenizer after training.
ADDED_TOKENS = "added_tokens.json"


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
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: download all files of the model first")
    fields = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
    for name, file in ((folder / "config.json", fields), (folder / "generation_config.json", generation)):
        FIELDS.check(name, file)
    vocabularies = _read_vocabularies(folder)
    config = read_fields(join_fields(fields, generation), trained_positions=trained_positions)
    _check_vocabularies(folder, config, vocabularies)
    config, params = from_tensors(
        config,
        read_tensors(folder),
        shared=read_flag("config.json", fields, "share_encoder_decoder_embeddings", default=True),
        tied=read_flag("config.json", fields, "tie_word_embeddings", default=True),
    )
    return TrainedModel(config, params, vocabularies)


def _read_vocabularies(folder: epath.Path) -> VocabularyPair:
    tokenizer = folder / "tokenizer_config.json"
    separate = (folder / TARGET_IDS).exists()
    if tokenizer.exists():
        separate = bool(read_json(tokenizer).get("separate_vocabs", separate))
    return VocabularyPair(*read_marian_vocabularies(folder, separate=separate))


def _check_vocabularies(folder: epath.Path, config: TransformerConfig, vocabularies: VocabularyPair) -> None:
    for side, size in (("source", config.source_vocab_size), ("target", config.target_vocab_size)):
        vocabulary: Vocabulary = getattr(vocabularies, side)
        if vocabulary.size != size:
            raise ValueError(
                f"the {side} vocabulary has {vocabulary.size} pieces, but config.json says {size}: "
                f"{_explain_size(folder, vocabulary, size)}"
            )
        for name, found, wanted in (
            ("pad_token_id", vocabulary.pad_id, config.pad_id),
            ("eos_token_id", vocabulary.eos_id, config.eos_id),
        ):
            if found != wanted:
                raise ValueError(
                    f"config.json: {name} is {wanted}, but in the {side} vocabulary it is {found}: download both again"
                )
    outside = [number for number in (config.start_id, *config.banned_ids) if number >= config.target_vocab_size]
    if outside:
        raise ValueError(
            f"config.json: decoder_start_token_id or bad_words_ids is {outside[0]}, but the vocabulary ends at "
            f"{config.target_vocab_size - 1}: download both again"
        )


def _explain_size(folder: epath.Path, vocabulary: Vocabulary, size: int) -> str:
    """Explains why the model has more or fewer embeddings than the vocabulary has pieces, and what to do about it."""
    tokens: dict[str, Any] = {}
    if (folder / ADDED_TOKENS).exists():
        tokens = read_json(folder / ADDED_TOKENS)
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
    import safetensors.numpy

    config = model.config
    check_layers(config, "transformers' MarianMTModel")
    check_expressible(config)
    config, params = concatenate_waves(config, model.params)
    tensors, sharing = to_tensors(config, params)
    fields, searching = write_fields(config)
    sides = (model.vocabularies.source, model.vocabularies.target)
    vocabulary = VocabularyPair(*map(MarianVocabulary.of, sides)).files()
    tokenizer = {
        "tokenizer_class": "MarianTokenizer",
        "model_max_length": config.max_length,
        "separate_vocabs": TARGET_IDS in vocabulary,
    }
    with new_folder(folder) as draft:
        for name, stored in vocabulary.items():
            (draft / name).write_bytes(stored)
        (draft / SAFETENSORS).write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))
        for name, content in (
            ("config.json", fields | sharing),
            ("generation_config.json", searching),
            ("tokenizer_config.json", tokenizer),
        ):
            (draft / name).write_text(json.dumps(content, indent=2) + "\n")

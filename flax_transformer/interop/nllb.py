"""Converts M2M100 and NLLB models, in the format that transformers stores, to models of this library and back.

A folder downloaded from the hub has `config.json`, the weights, `sentencepiece.bpe.model`, for M2M100 `vocab.json`, and
possibly `generation_config.json`, `tokenizer_config.json`, `special_tokens_map.json` and `tokenizer.json`.
"""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from flax_transformer.config import TransformerConfig
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.interop.fields import read_flag, read_json
from flax_transformer.interop.folders import new_folder
from flax_transformer.interop.marian_fields import join_fields
from flax_transformer.interop.marian_tensors import OUTPUT, SHARED, SOURCE, TARGET, from_tensors, to_tensors
from flax_transformer.interop.nllb_fields import FIELDS, check_expressible, read_fields, write_fields
from flax_transformer.interop.nllb_vocabulary import files, read_vocabularies
from flax_transformer.interop.tensor_files import SAFETENSORS, read_tensors
from flax_transformer.trained_model import TrainedModel


def read_nllb(folder: epath.PathLike) -> TrainedModel:
    """Reads an M2M100 or NLLB model; its parameters are the only copy of the weights in memory.

    Args:
        folder: where its files are.

    Raises:
        ValueError: a file is missing or damaged, the files do not belong together, or the model has a feature that this
            library's models lack; names the field and its value.
    """
    folder = epath.Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: download all files of the model first")
    fields = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
    for name, file in ((folder / "config.json", fields), (folder / "generation_config.json", generation)):
        FIELDS.check(name, file)
    joined = join_fields(fields, generation)
    config = read_fields(joined)
    vocabularies = read_vocabularies(folder, fields, config.source_vocab_size)
    _check_ids(config, vocabularies)
    shared = read_flag("config.json", fields, "tie_word_embeddings", default=True)
    config, params = from_tensors(config, read_tensors(folder), shared=shared, tied=shared)
    return TrainedModel(config, params, _with_forced_language(vocabularies, joined))


def _check_ids(config: TransformerConfig, vocabularies: VocabularyPair) -> None:
    for name, found in (("pad", config.pad_id), ("eos", config.eos_id), ("decoder_start", config.start_id)):
        wanted = vocabularies.source.pad_id if name == "pad" else vocabularies.source.eos_id
        if found != wanted:
            raise ValueError(
                f"config.json: {name}_token_id is {found}, but in the vocabulary it is {wanted}: download both again"
            )
    outside = [number for number in config.banned_ids if number >= config.target_vocab_size]
    if outside:
        raise ValueError(
            f"config.json: bad_words_ids is {outside[0]}, but the vocabulary ends at {config.target_vocab_size - 1}: "
            "download both again"
        )


def _with_forced_language(vocabularies: VocabularyPair, fields: Mapping[str, Any]) -> VocabularyPair:
    """The vocabularies, which speak the language that generation is forced to begin with, if there is one."""
    forced = fields.get("forced_bos_token_id")
    if forced is None:
        return vocabularies
    if type(forced) is not int or forced not in vocabularies.target.language_ids:
        raise ValueError(f"forced_bos_token_id is {forced!r}, which is not a language: remove that line")
    (language,) = vocabularies.target.pieces([forced])
    return vocabularies.speaking("", language)


def from_nllb(folder: epath.PathLike, workdir: epath.PathLike) -> TrainedModel:
    """Converts an M2M100 or NLLB model to a work directory; arguments and errors as of `read_nllb` and `new_folder`."""
    model = read_nllb(folder)
    with new_folder(workdir) as draft:
        model.save(draft)
    return model


def to_nllb(model: TrainedModel, folder: epath.PathLike) -> None:
    """Writes a folder that transformers' `M2M100ForConditionalGeneration`, and the model's tokenizer there, load.

    Args:
        model: the model to convert, which came from `from_nllb`, possibly fine-tuned.
        folder: where to write it; must be empty or not exist.

    Raises:
        ValueError: these models do not support an option of it; names the option.
    """
    import safetensors.numpy

    config, target = model.config, model.vocabularies.target
    stored = files(model.vocabularies, config.max_length)
    check_expressible(config)
    tensors, sharing = to_tensors(config, model.params)
    tied = all(sharing.values())
    if not tied:  # transformers shares all three matrices or none
        tensors.setdefault(SHARED, tensors[SOURCE])
        tensors.setdefault(OUTPUT, tensors[TARGET])
    languages = {target.pieces([number])[0]: number for number in target.language_ids}
    fields, searching = write_fields(config, languages.get(target.language))
    with new_folder(folder) as draft:
        for name, file in stored.items():
            (draft / name).write_bytes(file)
        (draft / SAFETENSORS).write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))
        for name, content in (
            ("config.json", fields | {"tie_word_embeddings": tied}),
            ("generation_config.json", searching),
        ):
            (draft / name).write_text(json.dumps(content, indent=2) + "\n")

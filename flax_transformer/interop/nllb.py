"""Converts M2M100 and NLLB models, in the format that transformers stores, to models of this library and back.

A folder downloaded from the hub has `config.json`, the weights, `sentencepiece.bpe.model`, for M2M100 `vocab.json`, and
possibly `generation_config.json`, `tokenizer_config.json`, `special_tokens_map.json` and `tokenizer.json`.
"""

from etils import epath

from flax_transformer.config import TransformerConfig
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.interop.fields import Fields
from flax_transformer.interop.folders import new_folder
from flax_transformer.interop.nllb_fields import FIELDS, check_expressible, read_fields, write_fields
from flax_transformer.interop.nllb_vocabulary import files, read_vocabularies
from flax_transformer.interop.tensor_files import read_tensors
from flax_transformer.interop.transformers_files import check_ids, read_configuration, write_model
from flax_transformer.interop.transformers_tensors import OUTPUT, SHARED, SOURCE, TARGET, from_tensors, to_tensors
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
    fields = read_configuration(folder, FIELDS)
    config = read_fields(fields)
    vocabularies = read_vocabularies(folder, fields, config.source_vocab_size)
    _check_ids(config, vocabularies)
    tied = fields.flag("tie_word_embeddings", default=True)
    config, params = from_tensors(config, read_tensors(folder), shared=tied, tied=tied)
    return TrainedModel(config, params, _with_forced_language(vocabularies, fields))


def _check_ids(config: TransformerConfig, vocabularies: VocabularyPair) -> None:
    check_ids(config, vocabularies)
    if config.start_id != config.eos_id:
        raise ValueError(
            f"config.json: decoder_start_token_id is {config.start_id}, but in these models it is that of </s>, "
            f"{config.eos_id}: download the file again"
        )


def _with_forced_language(vocabularies: VocabularyPair, fields: Fields) -> VocabularyPair:
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
    config, target = model.config, model.vocabularies.target
    tokenizer = files(model.vocabularies, config.max_length)
    check_expressible(config)
    tensors, sharing = to_tensors(config, model.params)
    tied = all(sharing.values())
    if not tied:  # transformers shares all three matrices or none
        tensors.setdefault(SHARED, tensors[SOURCE])
        tensors.setdefault(OUTPUT, tensors[TARGET])
    language = target.all_pieces().index(target.language) if target.language else None
    fields, generation = write_fields(config, language)
    with new_folder(folder) as draft:
        write_model(draft, tensors, fields | {"tie_word_embeddings": tied}, generation)
        for name, content in tokenizer.items():
            (draft / name).write_bytes(content)

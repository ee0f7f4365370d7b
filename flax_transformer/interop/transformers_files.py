"""Reads and writes the files that Marian, M2M100 and NLLB models in transformers have in common.

A folder has `config.json`, the weights, possibly `generation_config.json`, and the files of the tokenizer.
"""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from flax_transformer.config import TransformerConfig
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.interop.downloaded import read_json, read_json_if_there
from flax_transformer.interop.fields import Fields, KnownFields
from flax_transformer.interop.tensor_files import SAFETENSORS, Tensors
from flax_transformer.interop.transformers_fields import CONFIG

GENERATION, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
WAYS = {"marian": "from-marian", "m2m_100": "from-nllb"}  # by the type of the model
ENDS = ("eos_token_id", "forced_eos_token_id")  # some programs store such a number as a list of one
ADDED_TOKENS = "added_tokens.json"  # tokens that were added to a tokenizer after training


def read_configuration(folder: epath.Path, known: KnownFields) -> Fields:
    """Reads the fields of `config.json` and `generation_config.json`; the latter overrides settings of the search.

    Args:
        folder: where the files are.
        known: what is known about their fields.

    Raises:
        ValueError: there is no such folder, a file is missing or damaged, a field cannot be converted, or the files
            disagree.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: download all files of the model first")
    fields, generation = read_json(folder / CONFIG), read_json_if_there(folder / GENERATION)
    _check_kind(folder, fields, known)
    for each in (fields, generation):
        each |= {name: each[name][0] for name in ENDS if isinstance(each.get(name), list) and len(each[name]) == 1}
    known.check(folder / CONFIG, fields)
    known.check(folder / GENERATION, generation)
    for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        first, second = fields.get(name), generation.get(name)
        if first is not None and second is not None and first != second:
            raise ValueError(f"{name} is {first!r} in {CONFIG} and {second!r} in {GENERATION}: download both again")
    return Fields(CONFIG, fields | {name: value for name, value in generation.items() if value is not None})


def _check_kind(folder: epath.Path, fields: Mapping[str, Any], known: KnownFields) -> None:
    """Raises ValueError for the folder of a model that is converted in another way, or need not be."""
    if isinstance(fields.get("model"), dict):
        raise ValueError(
            f"{folder} is a work directory already: translate with it, or convert it for another library, e.g. "
            "to-ctranslate2"
        )
    way = WAYS.get(str(fields.get("model_type")))
    if way and fields["model_type"] != known.fixed["model_type"]:
        raise ValueError(f"{folder} has a model of type {fields['model_type']}: convert it with {way}")


def check_ids(config: TransformerConfig, vocabularies: VocabularyPair) -> None:
    """Raises ValueError if the ids in a configuration are not those of the vocabularies, which have the right sizes."""
    for side, vocabulary in (("source", vocabularies.source), ("target", vocabularies.target)):
        for name, found, wanted in (
            ("pad_token_id", config.pad_id, vocabulary.pad_id),
            ("eos_token_id", config.eos_id, vocabulary.eos_id),
        ):
            if found != wanted:
                raise ValueError(
                    f"{CONFIG}: {name} is {found}, but in the {side} vocabulary it is {wanted}: download both again"
                )
    never = (*config.banned_ids, *config.suppressed_ids)
    outside = [number for number in (config.start_id, *never) if number >= config.target_vocab_size]
    if outside:
        raise ValueError(
            f"{CONFIG}: decoder_start_token_id or bad_words_ids is {outside[0]}, but the vocabulary ends at "
            f"{config.target_vocab_size - 1}: download both again"
        )


def write_model(folder: epath.Path, tensors: Tensors, fields: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
    """Writes the weights and the two configurations to an existing folder; ValueError if safetensors is missing."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ValueError("safetensors is not installed: pip install 'flax_transformer[interop]'") from error

    (folder / SAFETENSORS).write_bytes(safetensors.numpy.save(dict(tensors), {"format": "pt"}))
    write_json(folder / CONFIG, fields)
    write_json(folder / GENERATION, generation)


def write_json(file: epath.Path, fields: Mapping[str, Any]) -> None:
    """Writes the fields of a file, each on a line."""
    file.write_text(json.dumps(fields, indent=2) + "\n")

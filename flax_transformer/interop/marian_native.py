"""Converts models in Marian's own format, as OPUS-MT, the Tatoeba challenge and Firefox publish them, and back."""

import dataclasses

import numpy as np
from etils import epath

from flax_transformer.config import TransformerConfig
from flax_transformer.data.marian_vocabulary import SOURCE_PIECES, TARGET_PIECES
from flax_transformer.data.sentencepiece_model import pieces_of
from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.interop.folders import new_folder
from flax_transformer.interop.marian_native_files import DECODER, find_files, find_shortlist
from flax_transformer.interop.marian_native_items import OPTIONS, read_items, write_npz
from flax_transformer.interop.marian_native_options import read_options, write_options
from flax_transformer.interop.marian_native_tensors import from_tensors, to_tensors
from flax_transformer.interop.marian_native_vocabulary import LISTS, list_of_ids, read_vocabularies, without_padding
from flax_transformer.interop.marian_shortlist import read_shortlist
from flax_transformer.trained_model import TrainedModel

MODEL = "model.npz"


def read_native(path: epath.Path) -> TrainedModel:
    """Reads a model; `path` is its folder, or its `.npz` or `.bin` file.

    Raises:
        ValueError: a file is missing or damaged, the files do not belong together, or the model has a feature that this
            library's models lack; names the option and its value.
    """
    file, lists = find_files(path)
    tensors, options = read_items(file)
    config = read_options(options, f"{OPTIONS} of {file}")
    sizes = (config.source_vocab_size, config.target_vocab_size)
    vocabularies = read_vocabularies(lists, sizes, file)
    source, target = vocabularies.source, vocabularies.target
    bias, padded = config.output_bias, (source.size, target.size) != sizes
    config = dataclasses.replace(
        config,
        source_vocab_size=source.size,
        target_vocab_size=target.size,
        output_bias=bias or padded,
        pad_id=target.pad_id,
        start_id=target.pad_id,
        eos_id=target.eos_id,
        suppressed_ids=(target.unk_id,),
    )
    params = from_tensors(config, tensors, sizes, bias=bias, place=f"the options in {file.name}")
    shortlist = find_shortlist(file.parent)
    allowed = read_shortlist(shortlist, joint=vocabularies.shares_ids) if shortlist else None
    if allowed is not None and allowed.sources == sizes[0]:  # the fillers of a shorter source side have no words
        fillers = max(0, source.size - 1 - sizes[0])
        allowed = dataclasses.replace(allowed, offsets=np.pad(allowed.offsets, (0, fillers), mode="edge"))
    return TrainedModel(config, params, vocabularies, allowed)


def to_marian_native(model: TrainedModel, folder: epath.PathLike) -> None:
    """Writes a folder that Marian reads: `model.npz`, `decoder.yml`, lists of ids and SentencePiece models.

    Args:
        model: the model to convert.
        folder: where to write it; must be empty or not exist.

    Raises:
        ValueError: Marian's own format does not have an option of the model; names it.
    """
    config, sides = model.config, (model.vocabularies.source, model.vocabularies.target)
    _check_ids(config, sides[1])
    lists = [side.all_pieces() for side in sides]
    if config.start_id == config.pad_id:
        lists = [without_padding(pieces, config.pad_id) for pieces in lists]
    sizes = (len(lists[0]), len(lists[1]))
    bias = config.output_bias
    if bias and sizes[1] < config.target_vocab_size:  # it may be there only to exclude padding
        bias = bool(np.any(np.asarray(model.params["output_bias"])[: sizes[1]]))
    options = write_options(config, sizes, bias=bias)
    tensors = to_tensors(config, model.params, sizes, bias=bias)
    # Where the SentencePiece models give the ids, Marian splits the text itself.
    splits = all(pieces_of(side.pieces_model) == pieces for side, pieces in zip(sides, lists, strict=True))
    vocabularies = (SOURCE_PIECES, TARGET_PIECES) if splits else LISTS
    allow_unk = "false" if sides[1].unk_id in config.suppressed_ids else "true"
    with new_folder(folder) as draft:
        (draft / MODEL).write_bytes(write_npz(tensors, options))
        for name, side in zip((SOURCE_PIECES, TARGET_PIECES), sides, strict=True):
            (draft / name).write_bytes(side.pieces_model)
        for name, pieces in zip(LISTS, lists, strict=True):
            (draft / name).write_text(list_of_ids(pieces), encoding="utf-8")
        (draft / DECODER).write_text(
            f"relative-paths: true\nmodels:\n  - {MODEL}\nvocabs:\n  - {vocabularies[0]}\n  - {vocabularies[1]}\n"
            f"beam-size: 4\nnormalize: 1\nallow-unk: {allow_unk}\n"
        )


def _check_ids(config: TransformerConfig, target: Vocabulary) -> None:
    """Raises ValueError for ids that Marian would choose, or would not."""
    own = {config.pad_id, config.start_id}
    for name, allowed in (("banned_ids", own), ("suppressed_ids", own | {target.unk_id})):
        if more := set(getattr(config, name)) - allowed:
            raise ValueError(
                f"model.{name} has {min(more)}, but Marian can exclude no token but <unk>: take it out of config.json, "
                "or convert to-ctranslate2"
            )

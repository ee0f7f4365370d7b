"""Reads and writes the vocabularies of models in Marian's own format, and adds the padding that Marian lacks."""

import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from flax_transformer.data.marian_vocabulary import SOURCE_PIECES, TARGET_PIECES, MarianVocabulary
from flax_transformer.data.sentencepiece_model import pieces_of
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.interop.downloaded import damaged, read_file, read_json
from flax_transformer.interop.yaml_text import read_yaml

LISTS = ("source.vocab.yml", "target.vocab.yml")
PADDING, FILLER = "<pad>", "<filler {}>"


def read_vocabularies(files: Sequence[epath.Path], sizes: tuple[int, int], model: epath.Path) -> VocabularyPair:
    """Reads the vocabularies of source and target, with padding.

    Args:
        files: the two vocabularies, which may be the same file.
        sizes: how many pieces of each side the model has.
        model: the model's file, for errors.

    Raises:
        ValueError: a file is missing, damaged, or does not belong to the model.
    """
    source, target = (_read_ids(file) for file in files)
    for side, ids, file, size in zip(("source", "target"), (source, target), files, sizes, strict=True):
        if len(ids) != size:
            raise ValueError(
                f"the {side} vocabulary {file.name} has {len(ids)} pieces, but the model {model.name} has {size}: "
                "take the one that belongs to the model"
            )
    _pad(source, target)
    # A list of ids splits no text; there are SentencePiece models beside it.
    splitters = [
        file if file.suffix == ".spm" else file.parent / name
        for file, name in zip(files, (SOURCE_PIECES, TARGET_PIECES), strict=True)
    ]
    pair = VocabularyPair(_vocabulary(splitters[0], source), _vocabulary(splitters[1], target))
    for name in ("pad_id", "eos_id"):
        if getattr(pair.source, name) != getattr(pair.target, name):
            raise ValueError(f"{name} differs between {files[0]} and {files[1]}: they need the same one")
    return pair


def _read_ids(file: epath.Path) -> dict[str, int]:
    """The id of each piece in Marian's files."""
    if file.suffix == ".spm":
        model = read_file(file)
        try:
            return {piece: number for number, piece in enumerate(pieces_of(model))}
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    if file.suffix not in (".yml", ".yaml", ".json"):
        raise ValueError(f"{file} is a vocabulary that cannot be converted: only .spm, .yml and .json can")
    ids: Any = read_json(file) if file.suffix == ".json" else read_yaml(read_file(file), file)
    if not isinstance(ids, dict) or not all(re.fullmatch(r"[0-9]{1,9}", str(number)) for number in ids.values()):
        raise damaged(file, "it is no list of pieces and their ids")
    return {piece: int(number) for piece, number in ids.items()}


def _vocabulary(splitter: epath.Path, ids: dict[str, int]) -> MarianVocabulary:
    if not splitter.exists():
        raise ValueError(
            f"{splitter.parent} lacks {splitter.name}, the SentencePiece model that splits the text: copy it there; "
            "models that split text in another way, such as with BPE codes, cannot be converted"
        )
    content = read_file(splitter)
    try:
        return MarianVocabulary(content, ids)
    except ValueError as error:
        raise ValueError(f"{splitter}: {error}") from error


def _pad(source: dict[str, int], target: dict[str, int]) -> None:
    """Appends padding, with the same id, to the pieces of both sides; on the shorter side fillers go before it."""
    found = [ids.get(PADDING) for ids in (source, target)]
    if found[0] != found[1]:
        raise ValueError(
            f"the id of {PADDING} is {found[0]} in the source and {found[1]} in the target vocabulary, but must be the "
            "same: rename that piece"
        )
    if found[0] is None:
        size = max(len(source), len(target))
        for ids in (source, target):
            ids |= {FILLER.format(number): number for number in range(len(ids), size)} | {PADDING: size}


def without_padding(pieces: Sequence[str], pad_id: int) -> list[str]:
    """The pieces that Marian has: all but padding at their end, and the fillers before it."""
    kept = list(pieces)
    if pad_id == len(kept) - 1:
        del kept[pad_id]
        while kept[-1:] == [FILLER.format(len(kept) - 1)]:
            del kept[-1]
    return kept


def list_of_ids(pieces: Sequence[str]) -> str:
    """A list of ids in YAML, as Marian reads it."""
    return "".join(f"{_quoted(piece)}: {number}\n" for number, piece in enumerate(pieces))


def _quoted(piece: str) -> str:
    """A piece as a string in YAML; characters that YAML does not allow are written as numbers."""
    plain = piece.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(each if each.isprintable() else f"\\U{ord(each):08x}" for each in plain) + '"'

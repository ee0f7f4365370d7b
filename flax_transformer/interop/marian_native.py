"""Converts models in Marian's own format, as OPUS-MT, the Tatoeba challenge and Firefox publish them, and back.

A model is one `.npz` or `.bin` file and its vocabularies: SentencePiece models that also give each piece its id
(`vocab.*.spm`, or one for each side), or SentencePiece models (`source.spm`, `target.spm`) and lists of ids (`.yml`). A
file such as `decoder.yml` may say which files belong together.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from flax_transformer.config import TransformerConfig
from flax_transformer.data.marian_vocabulary import SOURCE_PIECES, TARGET_PIECES, MarianVocabulary
from flax_transformer.data.sentencepiece_vocabulary import Vocabulary, read_pieces
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.shortlist import Shortlist
from flax_transformer.interop.folders import file_inside, new_folder
from flax_transformer.interop.marian_items import read_items, write_npz
from flax_transformer.interop.marian_options import read_options, write_options
from flax_transformer.interop.marian_parameters import from_items, to_items
from flax_transformer.interop.marian_shortlist import read_shortlist
from flax_transformer.interop.yaml_text import read_yaml
from flax_transformer.trained_model import TrainedModel

SETTINGS, MODEL, LISTS = "decoder.yml", "model.npz", ("source.vocab.yml", "target.vocab.yml")
SIDES = ("src|source", "trg|tgt|target")
PADDING, FILLER = "<pad>", "<filler {}>"


def is_native(path: epath.Path) -> bool:
    """Whether there is a model in Marian's own format at a path, not one as transformers stores it."""
    return path.is_file() or (path.is_dir() and not (path / "config.json").exists() and bool(_models(path)))


def read_native(path: epath.Path) -> TrainedModel:
    """Reads a model; `path` is its folder, or its `.npz` or `.bin` file.

    Raises:
        ValueError: a file is missing or damaged, the files do not belong together, or the model has a feature that this
            library's models lack; names the option and its value.
    """
    folder = path.parent if path.is_file() else path
    model, vocabularies = _find_files(path)
    tensors, settings = read_items(model)
    config = read_options(settings, model)
    sizes = (config.source_vocab_size, config.target_vocab_size)
    source, target = (_read_ids(file) for file in vocabularies)
    for side, ids, file, size in zip(("source", "target"), (source, target), vocabularies, sizes, strict=True):
        if len(ids) != size:
            raise ValueError(
                f"the {side} vocabulary {file.name} has {len(ids)} pieces, but the model {model.name} has {size}: "
                "take the one that belongs to the model"
            )
    _pad(source, target)
    pieces = [
        file if file.suffix == ".spm" else folder / name
        for file, name in zip(vocabularies, (SOURCE_PIECES, TARGET_PIECES), strict=True)
    ]
    pair = VocabularyPair(_vocabulary(pieces[0], source), _vocabulary(pieces[1], target))
    for name in ("pad_id", "eos_id"):
        if getattr(pair.source, name) != getattr(pair.target, name):
            raise ValueError(f"{name} differs between {vocabularies[0]} and {vocabularies[1]}: they need the same one")
    padded = (pair.source.size, pair.target.size) != sizes
    bias = config.output_bias
    config = dataclasses.replace(
        config,
        source_vocab_size=pair.source.size,
        target_vocab_size=pair.target.size,
        output_bias=bias or padded,
        pad_id=pair.target.pad_id,
        start_id=pair.target.pad_id,
        eos_id=pair.target.eos_id,
        suppressed_ids=(pair.target.unk_id,),
    )
    params = from_items(config, tensors, sizes, bias=bias, place=f"the options in {model.name}")
    return TrainedModel(config, params, pair, _read_shortlist(model.parent, pair))


def _read_shortlist(folder: epath.Path, vocabularies: VocabularyPair) -> Shortlist | None:
    """The lexical shortlist that lies beside a model, if there is one."""
    files = sorted(folder.glob("lex.*.bin"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder} has several shortlists ({names}): leave only the one that belongs to the model")
    return read_shortlist(files[0], joint=vocabularies.shares_ids) if files else None


def _models(folder: epath.Path) -> list[epath.Path]:
    """The files of a folder that may be models in Marian's own format."""
    other = re.compile(r"lex\..*|pytorch_model.*|.*\.optimizer\..*")
    return sorted(file for file in folder.iterdir() if file.suffix in (".npz", ".bin") and not other.match(file.name))


def _find_files(path: epath.Path) -> tuple[epath.Path, list[epath.Path]]:
    """The model's file, and those of the vocabularies of source and target."""
    folder = path.parent if path.is_file() else path
    models = [path] if path.is_file() else _models(folder)
    for file in sorted(folder.glob("*.yml"), key=lambda file: (file.name != SETTINGS, file.name)):
        settings = {} if "vocab" in file.name else read_yaml(file.read_bytes(), file)
        if not isinstance(settings, dict):
            continue
        lists: list[Any] = [settings.get("models"), settings.get("vocabs")]
        if not all(isinstance(names, list) and names for names in lists):
            continue
        named, vocabularies = ([file_inside(folder, name, file.name) for name in names] for names in lists)
        if len(named) == 1 and (path.is_dir() or path.name == named[0].name) and len(vocabularies) == 2:
            return named[0], vocabularies
    if len(models) != 1:
        names = ", ".join(file.name for file in models)
        raise ValueError(f"{folder} has several models ({names}): give the path of one instead of the folder")
    return models[0], _find_vocabularies(folder)


def _find_vocabularies(folder: epath.Path) -> list[epath.Path]:
    """The vocabularies of source and target where no file says which they are."""
    own = sorted(file for file in folder.glob("*.spm") if file.name not in (SOURCE_PIECES, TARGET_PIECES))
    lists = sorted(file for file in folder.iterdir() if "vocab" in file.name and file.suffix in (".yml", ".json"))
    for found in (own, lists):
        if len(found) == 1:
            return found * 2
        if len(found) == 2 and all(re.search(*each) for each in zip(SIDES, [file.name for file in found], strict=True)):
            return found
    raise ValueError(
        f"{folder} needs one vocabulary, such as vocab.spm or *.vocab.yml, or two with src and trg in their names, but "
        f"has {', '.join(file.name for file in [*own, *lists]) or 'none'}: put a model and its vocabulary into a folder"
    )


def _read_ids(file: epath.Path) -> dict[str, int]:
    """The id of each piece in Marian's files."""
    if file.suffix == ".spm":
        try:
            return {piece: number for number, piece in enumerate(_numbered(_content(file)))}
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    if file.suffix not in (".yml", ".yaml", ".json"):
        raise ValueError(f"{file} is a vocabulary that cannot be converted: only .spm, .yml and .json can")
    content = _content(file)
    try:
        ids: Any = json.loads(content) if file.suffix == ".json" else read_yaml(content, file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): download it again") from error
    if not isinstance(ids, dict) or not all(re.fullmatch(r"[0-9]{1,9}", str(number)) for number in ids.values()):
        raise ValueError(f"{file} is no list of pieces and their ids: download it again")
    return {piece: int(number) for piece, number in ids.items()}


def _numbered(model: bytes) -> list[str]:
    """The pieces of a serialised SentencePiece model in the order of its own ids."""
    processor = read_pieces(model)
    return processor.id_to_piece(list(range(processor.get_piece_size())))


def _content(file: epath.Path) -> bytes:
    if not file.exists():
        raise ValueError(f"{file.parent} lacks {file.name}: download all files of the model")
    return file.read_bytes()


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


def _vocabulary(pieces: epath.Path, ids: dict[str, int]) -> MarianVocabulary:
    content = _content(pieces)
    try:
        return MarianVocabulary(content, ids)
    except ValueError as error:
        raise ValueError(f"{pieces}: {error}") from error


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
    lists = [side.pieces(range(side.size)) for side in sides]
    if config.start_id == config.pad_id:
        lists = [_without_padding(pieces, config.pad_id) for pieces in lists]
    sizes = (len(lists[0]), len(lists[1]))
    padded = sizes[1] < config.target_vocab_size
    bias = config.output_bias and bool(not padded or np.any(np.asarray(model.params["output_bias"])[: sizes[1]]))
    settings = write_options(config, sizes, bias=bias)
    items = to_items(config, model.params, sizes, bias=bias)
    unknown = sides[1].unk_id in config.suppressed_ids
    # Where the SentencePiece models give the ids, Marian splits the text itself.
    own = all(_numbered(side.pieces_model) == pieces for side, pieces in zip(sides, lists, strict=True))
    vocabularies = (SOURCE_PIECES, TARGET_PIECES) if own else LISTS
    with new_folder(folder) as draft:
        (draft / MODEL).write_bytes(write_npz(items, settings))
        for name, side in zip((SOURCE_PIECES, TARGET_PIECES), sides, strict=True):
            (draft / name).write_bytes(side.pieces_model)
        for name, pieces in zip(LISTS, lists, strict=True):
            lines = (f"{_quoted(piece)}: {number}\n" for number, piece in enumerate(pieces))
            (draft / name).write_text("".join(lines), encoding="utf-8")
        (draft / SETTINGS).write_text(
            f"relative-paths: true\nmodels:\n  - {MODEL}\nvocabs:\n  - {vocabularies[0]}\n  - {vocabularies[1]}\n"
            f"beam-size: 4\nnormalize: 1\nallow-unk: {'false' if unknown else 'true'}\n"
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


def _without_padding(pieces: Sequence[str], pad_id: int) -> list[str]:
    """The pieces that Marian has: all but padding at their end, and the fillers before it."""
    kept = list(pieces)
    if pad_id == len(kept) - 1:
        del kept[pad_id]
        while kept[-1:] == [FILLER.format(len(kept) - 1)]:
            del kept[-1]
    return kept


def _quoted(piece: str) -> str:
    """A piece as a string in YAML; characters that YAML does not allow are written as numbers."""
    plain = piece.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(each if each.isprintable() else f"\\U{ord(each):08x}" for each in plain) + '"'

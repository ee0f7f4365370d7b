"""Finds the files of a model in Marian's own format: its tensors, its vocabularies and its shortlist.

A model is one `.npz` or `.bin` file and its vocabularies: SentencePiece models that also give each piece its id
(`vocab.*.spm`, or one for each side), or SentencePiece models (`source.spm`, `target.spm`) and lists of ids (`.yml`). A
file such as `decoder.yml` may say which files belong together.
"""

import re
from collections.abc import Iterator

from etils import epath

from flax_transformer.data.marian_vocabulary import SOURCE_PIECES, TARGET_PIECES
from flax_transformer.interop.downloaded import file_inside, read_file
from flax_transformer.interop.yaml_text import read_yaml

COMPRESSED = re.compile(r".*\.(npz|bin|spm|yml)\.(gz|zst|xz)")
# Which files belong together, as Marian's decoder reads it.
DECODER = "decoder.yml"
# What the name of a vocabulary contains if there is one for each side.
SIDES = ("src|source", "trg|tgt|target")


def is_native(path: epath.Path) -> bool:
    """Whether there is a model in Marian's own format at a path, not one as transformers stores it.

    Raises:
        ValueError: the files of the folder are still compressed.
    """
    if path.is_file():
        return True
    if not path.is_dir() or (path / "config.json").exists():
        return False
    if _models(path):
        return True
    if compressed := sorted(file.name for file in path.iterdir() if COMPRESSED.fullmatch(file.name)):
        raise ValueError(f"{path} has compressed files ({', '.join(compressed[:3])}): unpack them, e.g. with gunzip")
    return False


def find_files(path: epath.Path) -> tuple[epath.Path, list[epath.Path]]:
    """The model's file, and those of the vocabularies of source and target.

    Args:
        path: the folder, or the model's file.

    Raises:
        ValueError: a file is missing, or there are several and none says which belong together.
    """
    folder = path.parent if path.is_file() else path
    if path.is_file() and path.suffix != ".npz" and (folder / "config.json").exists():
        raise ValueError(f"{path} belongs to a model in transformers' format: give the folder, {folder}")
    models = [path] if path.is_file() else _models(folder)
    for model, vocabularies in _belonging_together(folder):
        if path.is_dir() or path.name == model.name:
            return model, vocabularies
    if len(models) != 1:
        names = ", ".join(file.name for file in models)
        raise ValueError(f"{folder} has several models ({names}): give the path of one instead of the folder")
    return models[0], _find_vocabularies(folder)


def _belonging_together(folder: epath.Path) -> Iterator[tuple[epath.Path, list[epath.Path]]]:
    """One model and its two vocabularies from each file that names them, such as `decoder.yml`, which comes first."""
    for file in sorted(folder.glob("*.yml"), key=lambda file: (file.name != DECODER, file.name)):
        settings = {} if "vocab" in file.name else read_yaml(read_file(file), file)
        models, vocabularies = (
            settings.get(name) if isinstance(settings, dict) else None for name in ("models", "vocabs")
        )
        if isinstance(models, list) and len(models) == 1 and isinstance(vocabularies, list) and len(vocabularies) == 2:
            names = (*models, *vocabularies)
            if settings.get("relative-paths") not in (True, "true"):  # Marian writes paths from where it was started
                names = tuple(str(name).rpartition("/")[2] for name in names)
            model, source, target = (file_inside(folder, name, file.name) for name in names)
            yield model, [source, target]


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


def _models(folder: epath.Path) -> list[epath.Path]:
    """The files of a folder that may be models in Marian's own format."""
    other = re.compile(r"lex\..*|pytorch_model.*|.*\.optimizer\..*")
    return sorted(file for file in folder.iterdir() if file.suffix in (".npz", ".bin") and not other.match(file.name))


def find_shortlist(folder: epath.Path) -> epath.Path | None:
    """The lexical shortlist that lies beside a model, if there is one; raises ValueError if there are several."""
    files = sorted(folder.glob("lex.*.bin"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder} has several shortlists ({names}): leave only the one that belongs to the model")
    return files[0] if files else None

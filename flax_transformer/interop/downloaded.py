"""Reads the files of a folder that was downloaded: each may be missing, damaged, or made to do harm."""

import json
import re
from typing import Any

from etils import epath


def damaged(file: object, reason: object) -> ValueError:
    """The error for a damaged file; of a reason that is an error itself, its first line is shown."""
    text = str(reason).partition("\n")[0] or type(reason).__name__
    return ValueError(f"{file} is damaged ({text[:200]}): download it again")


def read_file(file: epath.Path) -> bytes:
    """The content of a file that a model must have; raises ValueError if it is missing."""
    if not file.exists() or file.is_dir():
        raise ValueError(f"{file.parent} lacks {file.name}: download all files of the model")
    return file.read_bytes()


def read_json(file: epath.Path) -> dict[str, Any]:
    """Reads the fields of a file; raises ValueError if it is missing or damaged, or holds something else."""
    content = read_file(file)
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged(file, error) from error
    if not isinstance(fields, dict):
        raise damaged(file, "it has no fields")
    return fields


def read_json_if_there(file: epath.Path) -> dict[str, Any]:
    """As `read_json`, but a file that is missing has no fields."""
    return read_json(file) if file.exists() else {}


def file_inside(folder: epath.Path, name: object, place: object) -> epath.Path:
    """The file that another one names, in the same folder.

    Raises:
        ValueError: the name leads out of the folder, or there is no such file; `place` says where it stands.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name) or len(name) > 200:
        raise ValueError(
            f"{place} names {str(name)[:60]!r}, which is not a file in the same folder: do not trust this folder"
        )
    if not (folder / name).exists():
        raise ValueError(f"{folder} lacks {name}, which {place} names: download it too")
    return folder / name

"""Reads sentence pairs from a translation set of TensorFlow Datasets, without TensorFlow."""

import difflib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable
from typing import Any

from flax_transformer.files import expand, is_remote

CHUNK = 10_000  # examples that are read at once, which is three times as fast as one by one


def load_tfds(
    name: str, split: str, *, source: str = "", target: str = "", data_dir: str = ""
) -> tuple[list[str], list[str]]:
    """Reads a split into memory; a set that is not on disk is downloaded and prepared first.

    Args:
        name: the set, its configuration and its version, e.g. "wmt14_translate/de-en" or "small_pairs:1.0.0".
        split: one or more splits, or parts of them, e.g. "train", "train[:1%]" or "test+train[-2:]".
        source: the column of the source sentences; if empty, the first supervised key of the set.
        target: the column of their translations; if empty, the second key.
        data_dir: the folder that holds sets; if empty, the one that the environment variable TFDS_DATA_DIR names, or
            else ~/tensorflow_datasets.

    Returns:
        The sources and their targets.

    Raises:
        ValueError: there is no such set, split or column, or the set cannot be read here.
    """
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR", "")
    if is_remote(data_dir):
        raise ValueError(
            f"tfds:{name} would be read from {data_dir}, but array_record cannot read from a bucket: copy the folder "
            "to each machine, e.g. with `gcloud storage rsync --recursive`, and name the copy by data_dir= or "
            "TFDS_DATA_DIR"
        )
    builder = _builder(name, expand(data_dir) if data_dir else None)
    keys: tuple[str, str] = builder.info.supervised_keys or ("", "")
    source, target = source or keys[0], target or keys[1]
    features = list(builder.info.features)
    if source == target or not {source, target} <= set(features):
        raise ValueError(
            f"tfds:{name} has no text pair source={source}, target={target}: choose two different ones of "
            f"{', '.join(features)}, as in tfds:{name}:{split}?source=...&target=..."
        )
    _prepare(name, builder)
    examples = builder.as_data_source(split=split)
    sources, targets = [], []
    for start in range(0, len(examples), CHUNK):
        for example in examples.__getitems__(range(start, min(start + CHUNK, len(examples)))):
            sources.append(_text(name, source, example))
            targets.append(_text(name, target, example))
    return sources, targets


def _text(name: str, key: str, example: dict[str, Any]) -> str:
    if not isinstance(example[key], bytes):
        raise ValueError(f"tfds:{name}: {key} holds {type(example[key]).__name__}, not text: name another column")
    return example[key].decode("utf-8")


def _builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds  # Slow to import, and only this kind of source needs it.
    import tensorflow_datasets.translate  # Without TensorFlow, TFDS does not register these itself.

    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name.partition("/")[0], known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "import the module that defines it, or set TFDS_DATA_DIR"
        raise ValueError(f"TFDS has no set {name!r}: {remedy}") from error
    except (ValueError, AssertionError) as error:
        known = tfds.builder_cls(re.split("[/:]", name)[0])
        names = [f"{known.name}/{configuration}" for configuration in known.builder_configs] or [known.name]
        raise ValueError(
            f"tfds:{name}: there is no such configuration or version: write {' or '.join(names)}, without a version"
        ) from error


def _prepare(name: str, builder: Any) -> None:
    """Puts the set on disk in a format that can be read without TensorFlow; raises ValueError if that fails."""
    if not builder.data_path.exists():
        try:
            _check_network(builder.url_infos or ())
            builder.download_and_prepare(file_format="array_record")
        except Exception as error:  # Preparing runs each set's own code; whatever fails in it, the remedy is the same.
            reason = " ".join(str(error).split())
            remedy = "load it once on a machine with a network"
            if "No module named 'tensorflow'" in reason:  # TFDS unpacks archives with it
                remedy = "run pip install tensorflow, which only preparing needs, here or on another machine"
            raise ValueError(
                f"tfds:{name} is not in {builder.data_dir} and cannot be prepared here ({reason}): {remedy}, then set "
                "TFDS_DATA_DIR or data_dir= to the folder that has it"
            ) from error
    if builder.info.file_format.value != "array_record":
        raise ValueError(
            f"tfds:{name} in {builder.data_dir} is stored as {builder.info.file_format.value}, which only TensorFlow "
            "reads: give another folder with data_dir=, and it will be prepared there as array_record"
        )


def _check_network(urls: Iterable[str]) -> None:
    """Raises OSError if none of the first three servers answers; TFDS itself would try for minutes."""
    servers = dict.fromkeys(match[0] for match in (re.match(r"https?://[^/]+", url) for url in urls) if match)
    failure = None
    for server in list(servers)[:3]:
        try:
            urllib.request.urlopen(urllib.request.Request(server, method="HEAD"), timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # An error from the server is an answer too.
        except OSError as error:
            failure = error
    if failure:
        raise OSError(f"no network: {failure}")

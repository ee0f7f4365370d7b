"""Downloads the files of a model from the Hugging Face hub by its name, such as "Helsinki-NLP/opus-mt-dra-en".

They lie in the cache of `huggingface_hub` afterwards, as those of transformers do, and are not downloaded twice.
"""

import importlib.util
import re
from collections.abc import Collection
from typing import Any

# All that the readers of Marian, M2M100 and NLLB read beside the weights.
FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"),
    *("added_tokens.json", "vocab.json", "target_vocab.json", "source.spm", "target.spm", "sentencepiece.bpe.model"),
)
# The weights in each form, the best first: the file that shows that the hub has it, and all its files.
WEIGHTS = (
    ("model.safetensors", ["model.safetensors"]),
    ("model.safetensors.index.json", ["model.safetensors.index.json", "model-*.safetensors"]),
    ("pytorch_model.bin", ["pytorch_model.bin"]),
    ("pytorch_model.bin.index.json", ["pytorch_model.bin.index.json", "pytorch_model-*.bin"]),
)
SECONDS = 10.0  # to wait for the hub's first answer


def is_name(text: str) -> bool:
    """Whether a text has the form of a name on the hub, OWNER/MODEL."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None


def download(name: str, revision: str = "") -> str:
    """Downloads the files that a conversion needs, with a bar that shows the progress.

    A download that was interrupted goes on with the files that are not complete. Without a network, the files of an
    earlier download are taken if there are any.

    Args:
        name: the model, OWNER/MODEL.
        revision: a branch, a tag or a commit; the newest commit of the main branch if empty.

    Returns:
        The folder that holds them.

    Raises:
        ValueError: the hub has no such model or revision, cannot be reached, or `huggingface_hub` is not installed.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ValueError(
            f"there is no folder {name}, and a download needs huggingface_hub: pip install 'flax_transformer[hub]'"
        ) from error
    options: dict[str, Any] = {"repo_id": name, "revision": revision or None}
    try:
        found = huggingface_hub.HfApi().model_info(**options, timeout=SECONDS)
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{name} has no revision {revision!r} on the hub: give a branch, a tag or a commit") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no folder {name} here and no model {name} on the hub, or you may not read it: check the name"
        ) from error
    except Exception as error:  # a network fails in many ways
        return _downloaded_before(options, error)
    patterns = [*FILES, *_weights(name, {file.rfilename for file in found.siblings or ()})]
    try:
        return huggingface_hub.snapshot_download(**options, allow_patterns=patterns)
    except Exception as error:
        raise ValueError(
            f"the download of {name} stopped ({_reason(error)}): run the same command again, which goes on with the "
            "files that are not complete"
        ) from error


def _downloaded_before(options: dict[str, Any], failure: Exception) -> str:
    import huggingface_hub

    for _, weights in WEIGHTS:
        try:
            return huggingface_hub.snapshot_download(
                **options, allow_patterns=[*FILES, *weights], local_files_only=True
            )
        except OSError:  # it is not there, or not complete
            continue
    raise ValueError(
        f"there is no folder {options['repo_id']} here, and the hub cannot be reached ({_reason(failure)}): connect to "
        "a network, or download all files of the model elsewhere and give their folder"
    ) from failure


def _weights(name: str, files: Collection[str]) -> list[str]:
    """The files of the weights, in the best form that there is."""
    form = next(((mark, weights) for mark, weights in WEIGHTS if mark in files), None)
    if form is None:
        raise ValueError(f"{name} has neither {WEIGHTS[0][0]} nor {WEIGHTS[2][0]} on the hub: choose another model")
    if ".bin" in form[0] and importlib.util.find_spec("torch") is None:
        raise ValueError(f"the weights of {name} are a file of PyTorch's, which is not installed: pip install torch")
    return form[1]


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]

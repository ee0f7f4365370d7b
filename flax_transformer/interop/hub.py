"""Downloads the files of a model from the Hugging Face hub by its name, such as "Helsinki-NLP/opus-mt-dra-en".

They lie in the cache of `huggingface_hub` afterwards, as those of transformers do, and are not downloaded twice.
"""

import contextlib
import importlib.util
import os
from collections.abc import Collection
from typing import Any

from flax_transformer.data.fairseq_vocabulary import PIECES_MODEL
from flax_transformer.data.marian_vocabulary import IDS, SOURCE_PIECES, TARGET_IDS, TARGET_PIECES
from flax_transformer.interop.nllb_vocabulary import SPECIAL_TOKENS, TOKENIZER
from flax_transformer.interop.tensor_files import SAFETENSORS, SHARDS, TORCH, TORCH_SHARDS
from flax_transformer.interop.transformers_fields import CONFIG
from flax_transformer.interop.transformers_files import ADDED_TOKENS, GENERATION, TOKENIZER_CONFIG

# All that the readers of Marian, M2M100 and NLLB read beside the weights.
FILES = (
    *(CONFIG, GENERATION, TOKENIZER_CONFIG, SPECIAL_TOKENS, TOKENIZER, ADDED_TOKENS),
    *(IDS, TARGET_IDS, SOURCE_PIECES, TARGET_PIECES, PIECES_MODEL),
)
# The weights in each form, the best first: the file that shows that the hub has it, and all its files.
WEIGHTS = (
    (SAFETENSORS, [SAFETENSORS]),
    (SHARDS, [SHARDS, "model-*.safetensors"]),
    (TORCH, [TORCH]),
    (TORCH_SHARDS, [TORCH_SHARDS, "pytorch_model-*.bin"]),
)
SECONDS = 10.0  # to wait for the hub's first answer


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

    for mark, weights in WEIGHTS:
        with contextlib.suppress(OSError):  # it is not there, or not complete
            patterns = [*FILES, *weights]
            folder = huggingface_hub.snapshot_download(**options, allow_patterns=patterns, local_files_only=True)
            if os.path.exists(os.path.join(folder, mark)):
                return folder
    raise ValueError(
        f"there is no folder {options['repo_id']} here, and the hub cannot be reached ({_reason(failure)}): connect to "
        "a network, or download all files of the model elsewhere and give their folder"
    ) from failure


def _weights(name: str, files: Collection[str]) -> list[str]:
    """The files of the weights, in the best form that there is."""
    mark, weights = next((form for form in WEIGHTS if form[0] in files), ("", []))
    if not mark:
        raise ValueError(f"{name} has neither {SAFETENSORS} nor {TORCH} on the hub: choose another model")
    if mark in (TORCH, TORCH_SHARDS) and importlib.util.find_spec("torch") is None:
        raise ValueError(f"the weights of {name} are a file of PyTorch's, which is not installed: pip install torch")
    return weights


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]

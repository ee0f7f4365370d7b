"""Exports a model's encoder and decoding step as StableHLO programs, which run without this library.

`jax.export` makes the programs, for CPU, CUDA and TPU, and for any number of sentences and any lengths. The parameters
are in a file of their own, and `translate.py` shows how to call the programs.

Glossary: B sentences, S source, L longest target, V vocabulary.
"""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

from flax_transformer.data.marian_vocabulary import MarianVocabulary
from flax_transformer.interop.folders import new_folder
from flax_transformer.model import Transformer
from flax_transformer.trained_model import TrainedModel

PLATFORMS = ("cpu", "cuda", "tpu")
ENCODE, DECODE_STEP, PARAMS, IDS = "encode.stablehlo", "decode_step.stablehlo", "params.npz", "ids.json"


def export_programs(model: TrainedModel) -> tuple[export.Exported, export.Exported]:
    """Makes the two programs.

    Returns:
        `encode(params, source, room)`: the decoding state, a list of arrays, for source token ids [B, S] padded with
        `pad_id`. It has room for as many target tokens as the array `room` is long; its values do not matter.
        `decode_step(params, state, tokens)`: the next state, and the logits [B, V] that follow the last chosen tokens
        [B], which are `start_id` in the first step.

        `params` is a dict of arrays by path, e.g. "encoder/layers_0/self_attention/query/kernel".
    """
    # One program serves all platforms, so it cannot use a fused kernel of one of them.
    config = dataclasses.replace(model.config, attention_implementation="xla", remat=False)
    transformer = Transformer(config)
    learned = config.positions == "learned"
    constraints = [f"{length} <= {config.max_length}" for length in ("s", "l")] if learned else []
    batch, source_length, room = export.symbolic_shape("b, s, l", constraints=constraints)
    params = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flatten_dict(model.params, sep="/").items()
    }
    structure = None

    def encode(params: dict[str, jax.Array], source: jax.Array, room: jax.Array) -> list[jax.Array]:
        nonlocal structure
        variables = {"params": unflatten_dict(params, sep="/")}
        state = transformer.apply(variables, source, max_length=room.shape[0], method="start_decoding")
        leaves, structure = jax.tree.flatten(state)
        return leaves

    def decode_step(
        params: dict[str, jax.Array], state: list[jax.Array], tokens: jax.Array
    ) -> tuple[list[jax.Array], jax.Array]:
        variables = {"params": unflatten_dict(params, sep="/")}
        before = jax.tree.unflatten(structure, state)
        after, logits = transformer.apply(variables, before, tokens[:, None], method="decode_step")
        return jax.tree.leaves(after), logits[:, 0]

    source = jax.ShapeDtypeStruct((batch, source_length), jnp.int32)
    encoder = export.export(jax.jit(encode), platforms=PLATFORMS)(
        params, source, jax.ShapeDtypeStruct((room,), jnp.int32)
    )
    state = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in encoder.out_avals]
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return encoder, export.export(jax.jit(decode_step), platforms=PLATFORMS)(params, state, tokens)


def to_stablehlo(model: TrainedModel, folder: epath.PathLike) -> None:
    """Writes a folder with the programs, the parameters, the vocabulary and an example.

    Args:
        model: the model to export.
        folder: where to write it; must be empty or not exist.

    Raises:
        ValueError: the folder cannot be made, flatbuffers is not installed, or texts begin with their language.
    """
    if model.vocabularies.target.language_ids:
        raise ValueError(
            "to-stablehlo writes a program that does not know languages by code: convert to-ctranslate2 or to-nllb"
        )
    if importlib.util.find_spec("flatbuffers") is None:  # jax.export needs it, but jax does not install it
        raise ValueError("flatbuffers is not installed: pip install 'flax_transformer[interop]'")
    config, vocabularies = model.config, model.vocabularies
    with new_folder(folder) as draft:
        for name, program in zip((ENCODE, DECODE_STEP), export_programs(model), strict=True):
            (draft / name).write_bytes(bytes(program.serialize()))
        with (draft / PARAMS).open("wb") as file:
            arrays: dict[str, Any] = {
                path: np.asarray(leaf) for path, leaf in flatten_dict(model.params, sep="/").items()
            }
            np.savez(file, **arrays)
        sides = {"source": vocabularies.source, "target": vocabularies.target}
        for side, vocabulary in sides.items():
            (draft / f"{side}.spm").write_bytes(vocabulary.pieces_model)
        content: dict[str, Any] = {
            "pad": config.pad_id,
            "start": config.start_id,
            "eos": config.eos_id,
            "unk": vocabularies.source.unk_id,
            "banned": config.never_chosen,
            # Tokens that are put before the pieces; SentencePiece itself splits off those of vocabularies trained here.
            "languages": vocabularies.source.languages if isinstance(vocabularies.source, MarianVocabulary) else (),
            "room": config.max_length if config.positions == "learned" else None,
        }
        content |= {side: vocabulary.all_pieces() for side, vocabulary in sides.items()}
        (draft / IDS).write_text(json.dumps(content, ensure_ascii=False) + "\n")
        (draft / "translate.py").write_bytes((Path(__file__).parent / "stablehlo_example.py").read_bytes())

"""Takes the parameters of one of our Transformers and leaves the same model in two peers: transformers and CTranslate2.

Ours must be one that both can express: post-norm, `sinusoidal_concatenated` positions, scaled embeddings and an output
bias, as Marian's models are. In CTranslate2 a token's spelling is its id.
"""

from collections.abc import Iterable, Sequence

import ctranslate2
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from etils import epath
from jaxtyping import PyTree

from flax_transformer.config import TransformerConfig
from flax_transformer.interop.ctranslate2 import write_model
from flax_transformer.interop.marian_fields import write_fields
from flax_transformer.interop.parameters import embeddings
from flax_transformer.interop.transformers_tensors import OUTPUT, SOURCE, TARGET, to_tensors
from flax_transformer.trained_model import param_shapes

REQUIRED = {"norm": "post", "positions": "sinusoidal_concatenated", "scale_embeddings": True, "output_bias": True}


def random_params(
    config: TransformerConfig,
    seed: int,
    *,
    gain: float,
    end_at: float,
    end_slope: float,
    end_bias: float = 0.0,
    follow_source: bool = False,
) -> PyTree:
    """Parameters drawn at random, biases and norms included, but for what makes outputs end.

    Untrained models repeat themselves forever; in this one the logit of the end of sentence rises with the position.

    Args:
        config: the model's.
        seed: of the draws.
        gain: matrices have this over the square root of their inner width as their standard deviation; well above 1,
            the model is sure of itself and says different things of different sources.
        end_at: the position at which that logit passes zero; outputs end near it.
        end_slope: how steeply it rises there; the more, the less their lengths differ.
        end_bias: added to it: a slow rise and a large bias let lengths differ the most.
        follow_source: whether it passes zero later the longer the source is, at `end_at` where the source is as long.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if leaf.ndim == 1:
            return rng.normal(float(path[-1].key == "scale"), 0.1, leaf.shape).astype("float32")
        inner = leaf.shape[1] if path[-1].key == "embedding" else leaf.shape[0]
        return rng.normal(0.0, gain * inner**-0.5, leaf.shape).astype("float32")

    params = jax.tree_util.tree_map_with_path(draw, param_shapes(config))
    clock = _slow_coordinates(config, np.pi / 4 / end_at)
    source, target, output = embeddings(config, params)
    target[:, clock] = output[:, clock] = output[config.eos_id] = 0.0
    # The difference of a sine and its cosine: no mean that a norm takes off changes it.
    output[config.eos_id, clock] = end_slope, -end_slope
    _let_pass(params["decoder"], clock, gain)
    if follow_source:
        # The mean position of a source is half its length, so its clock runs twice as fast.
        source_clock = _slow_coordinates(config, np.pi / 2 / end_at)
        source[:, source_clock] = 0.0
        _let_pass(params["encoder"], source_clock, gain)
        _put_back(_layers(params["decoder"])[0]["cross_attention"], clock, source_clock, config)
    params["output_bias"][config.eos_id] = end_bias
    # A banned token keeps its probability in some engines and loses it in others: here it has none.
    params["output_bias"][config.pad_id] = -1e4
    return jax.tree.map(jnp.asarray, params)


def _slow_coordinates(config: TransformerConfig, radians: float) -> list[int]:
    """Where the positions have the sine that is nearest to so many radians a position, and its cosine."""
    available = 10000.0 ** (-2 * np.arange(config.d_model // 2) / config.d_model)
    sine = int(np.argmin(np.abs(available - radians)))
    return [sine, sine + config.d_model // 2]


def _let_pass(stack: PyTree, clock: list[int], gain: float) -> None:
    """Lets coordinates through a stack: nothing is added to them, and norms give back what they take, about."""
    for layer in _layers(stack):
        for name, part in layer.items():
            if name.endswith("_norm"):
                part["scale"][clock], part["bias"][clock] = (1 + 0.9 * gain**4) ** 0.5, 0.0
            else:
                last = part["outer" if name == "feed_forward" else "out"]
                last["kernel"][:, clock] = last["bias"][clock] = 0.0


def _put_back(attention: PyTree, clock: list[int], source_clock: list[int], config: TransformerConfig) -> None:
    """Takes the mean of the source's clock off the target's: a head that looks at all of the source alike."""
    head = slice(0, config.d_model // config.num_heads)
    attention["query"]["kernel"][:, head] = attention["query"]["bias"][head] = 0.0
    attention["value"]["kernel"][:, 0] = attention["value"]["bias"][0] = attention["out"]["kernel"][0] = 0.0
    attention["value"]["kernel"][source_clock, 0] = 1.0, -1.0
    # So much makes outputs of 6+6 layers as long as their sources; it was tried, as norms give back only about enough.
    attention["out"]["kernel"][0, clock] = -3.0, 3.0


def marian_model(config: TransformerConfig, params: PyTree) -> transformers.MarianMTModel:
    """The model in transformers, float32 and in evaluation mode; ValueError for what Marian cannot express."""
    _check(config)
    tensors, sharing = to_tensors(config, params)
    fields, _ = write_fields(config)
    model = transformers.MarianMTModel(transformers.MarianConfig(**fields | sharing | {"forced_eos_token_id": None}))
    if sharing["tie_word_embeddings"]:  # a state has every name
        tensors |= dict(zip((SOURCE, TARGET, OUTPUT), embeddings(config, params), strict=True))
    missing, unexpected = model.load_state_dict(
        {name: torch.tensor(each) for name, each in tensors.items()}, strict=False
    )
    # transformers works its positions out; whatever else was left over would stay as it was initialised.
    assert not unexpected and all("embed_positions" in name for name in missing), (missing, unexpected)
    return model.eval()


def ctranslate2_model(
    config: TransformerConfig, params: PyTree, directory: str, *, threads: int, compute_type: str = "float32"
) -> ctranslate2.Translator:
    """The model in CTranslate2 on a CPU, written to a directory that it may delete first.

    Its `compute_type` is "float32", or another that CTranslate2 knows, such as "int8".

    Raises:
        ValueError: for what Marian cannot express.
    """
    _check(config)
    pieces = [[str(token) for token in range(size)] for size in (config.source_vocab_size, config.target_vocab_size)]
    write_model(epath.Path(directory), config, params, *pieces, unk_id=config.pad_id)
    return ctranslate2.Translator(
        directory, device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=threads
    )


def spell(rows: Iterable[Sequence[int]]) -> list[list[str]]:
    """Sources as CTranslate2 reads them here: each token's id, but for the end, which it adds itself."""
    return [[str(int(token)) for token in row[:-1]] for row in rows]


def _check(config: TransformerConfig) -> None:
    for name, value in REQUIRED.items():
        if getattr(config, name) != value:
            raise ValueError(f"model.{name} is {getattr(config, name)!r}: the peers have {value!r}")


def _layers(stack: PyTree) -> list[PyTree]:
    return [stack[f"layers_{number}"] for number in range(sum(name.startswith("layers_") for name in stack))]

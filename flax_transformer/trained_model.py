"""A trained model (its config, parameters and vocabularies), which can be loaded from and saved to a work directory."""

import dataclasses
import functools

import jax
from etils import epath
from jaxtyping import PyTree

from flax_transformer.config import TransformerConfig
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.shortlist import Shortlist
from flax_transformer.interop.marian_shortlist import read_shortlist, write_shortlist
from flax_transformer.model import Transformer
from flax_transformer.workdir import WorkDirectory

SHORTLIST_FILE = "shortlist.bin"


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A trained model and its vocabularies.

    Attributes:
        config: the model's config.
        params: its parameters, float32.
        vocabularies: the vocabularies of both sides.
        shortlist: the target tokens that a source may be translated with; `None` allows all of them.
    """

    config: TransformerConfig
    params: PyTree
    vocabularies: VocabularyPair
    shortlist: Shortlist | None = None

    def __post_init__(self):
        """Raises ValueError if the vocabularies, or the shortlist, do not have the sizes that the config gives."""
        config, vocabularies = self.config, self.vocabularies
        sizes = (vocabularies.source.size, vocabularies.target.size)
        if sizes != (config.source_vocab_size, config.target_vocab_size):
            raise ValueError(
                f"the vocabulary has {sizes[0]} source and {sizes[1]} target pieces, but the model has "
                f"{config.source_vocab_size} and {config.target_vocab_size}: use the model's own vocabulary"
            )
        if self.shortlist is not None:
            self.shortlist.check_fits(config)

    @classmethod
    def load(cls, path: epath.PathLike, *, step: str | int = "chosen") -> "TrainedModel":
        """Loads a model from a work directory, its parameters to this process's first device.

        Args:
            path: the work directory.
            step: which checkpoint, as in `WorkDirectory.restore_params`.

        Raises:
            ValueError: the folder is not a work directory, has no such checkpoint, or has another vocabulary than the
                model; its shortlist is damaged.
        """
        workdir = WorkDirectory(path)
        config = workdir.read_model_config()
        params = workdir.restore_params(step, param_shapes(config))
        vocabularies, file = workdir.read_vocabularies(), workdir.path / SHORTLIST_FILE
        shortlist = read_shortlist(file, joint=vocabularies.shares_ids) if file.exists() else None
        return cls(config, params, vocabularies, shortlist)

    def save(self, path: epath.PathLike) -> None:
        """Writes a work directory with this model as checkpoint 0; writes config.json last, so that it marks success.

        Args:
            path: the folder to write; must be empty or not exist.

        Raises:
            ValueError: the folder is not empty.
        """
        workdir = WorkDirectory(path)
        if workdir.path.exists() and any(workdir.path.iterdir()):
            raise ValueError(f"{workdir.path} is not empty: name a new folder, or remove what is in it")
        workdir.write_vocabularies(self.vocabularies)
        workdir.write_fingerprints({"vocabulary": self.vocabularies.fingerprint()})
        if self.shortlist is not None:
            write_shortlist(workdir.path / SHORTLIST_FILE, self.shortlist)
        with workdir.open_checkpoints() as checkpoints:
            checkpoints.save(0, {"params": self.params}, {})
        workdir.write_config({"model": dataclasses.asdict(self.config)})


def param_shapes(config: TransformerConfig) -> PyTree:
    """The shapes and types of a model's parameters."""
    # All layers of a stack have the same shapes, so one is traced and stands for the others: loading starts sooner.
    shallow = dataclasses.replace(config, num_encoder_layers=1, num_decoder_layers=1)
    tokens = jax.ShapeDtypeStruct((1, 2), "int32")
    init = functools.partial(Transformer(shallow).init, deterministic=True)
    shapes = jax.eval_shape(init, jax.random.key(0), tokens, tokens)["params"]
    for stack, depth in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        shapes[stack] |= {f"layers_{number}": shapes[stack]["layers_0"] for number in range(depth)}
    return shapes

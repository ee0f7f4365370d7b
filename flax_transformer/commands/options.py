"""Takes the options that several verbs share and leaves a loaded translator and the settings of its search.

They are declared and checked without jax, so that --help and a mistake answer at once; the model loads last.
"""

import argparse
import contextlib
import dataclasses
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from flax_transformer.commands.process import is_device_error, start_devices
from flax_transformer.decoding.settings import LENGTH_PENALTIES, STOPPING, BeamSearch, Sampling, SearchSettings
from flax_transformer.files import expand
from flax_transformer.ranges import COUNT, INT32, Range, check_value, whole_number

# A work directory, and which of its checkpoints.
Model = tuple[str, str | int]
CHECKPOINTS = ("chosen", "best", "latest", "averaged")
BEAM, SAMPLING = BeamSearch(), Sampling()
BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
SEEDS = Range(at_least=0, at_most=2**32 - 1)


def checkpoint(text: str) -> str | int:
    """The type of --checkpoint: one of the names, or the number of a step."""
    if text in CHECKPOINTS:
        return text
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: choose {', '.join(CHECKPOINTS)} or the number of a step")


def path(text: str) -> str:
    """The type of an option that names a file or a folder; `~` becomes the home folder."""
    return expand(filled(text))


def filled(text: str) -> str:
    """The type of an option that must not be empty, as it is where a shell's variable is not set."""
    if text.strip():
        return text
    raise argparse.ArgumentTypeError("the name is empty (a shell variable that is not set?): give one, or leave it out")


def whole(text: str) -> int:
    """The type of a number that the settings of a search check: a whole number."""
    try:
        return whole_number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number") from error


def positive(text: str) -> int:
    """The type of a count: a whole number above 0, of at most 32 bits, since a count may be the size of an array."""
    try:
        return check_value("it", whole_number(text), int, Range(at_least=1, within=INT32))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number above 0 and {INT32}") from error


def seed(text: str) -> int:
    """The type of --seed: a whole number of 32 bits, which are all that jax takes of a seed."""
    try:
        return check_value("it", whole_number(text), int, SEEDS)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, {SEEDS}") from error


def process_number(text: str) -> int:
    """The type of --process_id: a whole number, at least 0."""
    try:
        return check_value("it", whole_number(text), int, COUNT)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, at least 0") from error


def true_or_false(text: str) -> bool:
    """The type of an option that is on or off and may be followed by =true or =false."""
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"{text!r}: give true or false")
    return BOOLEANS[text.lower()]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Declares which trained model translates, or which several together."""
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--workdir",
        nargs="+",
        type=path,
        required=True,
        metavar="FOLDER",
        help="the work directory that training left; several make an ensemble, which averages their probabilities",
    )
    group.add_argument(
        "--checkpoint",
        nargs="+",
        type=checkpoint,
        default=["chosen"],
        metavar="STEP",
        help="chosen (default: averaged where training.weights of the config is that and there is an average, else "
        "best), best, latest, averaged (what was averaged last) or the number of a step; of a checkpoint the moving "
        "average, where training.weights is ema; one for all work directories or one for each; several of one work "
        "directory make an ensemble, too",
    )
    group.add_argument(
        "--batch_tokens",
        type=positive,
        default=4096,
        metavar="N",
        help="source tokens translated side by side; fewer need less memory (default 4096)",
    )


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Declares how a translation is found; an option that is not given does not appear among the parsed ones."""
    beam = parser.add_argument_group("beam search", argument_default=argparse.SUPPRESS)
    beam.add_argument(
        "--beam_size",
        type=whole,
        metavar="N",
        help=f"beginnings kept for each sentence; 1 is greedy search (default {BEAM.beam_size})",
    )
    beam.add_argument(
        "--stopping",
        choices=STOPPING,
        help="optimal (default): when nothing better can come; first: when beam_size translations have ended",
    )
    add_length_penalty(beam)

    sampling = parser.add_argument_group("sampling", argument_default=argparse.SUPPRESS)
    sampling.add_argument(
        "--sample", action="store_true", default=False, help="draw translations at random instead of searching"
    )
    sampling.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        help=f"below 1 surer, above 1 more varied (default {SAMPLING.temperature:g})",
    )
    sampling.add_argument(
        "--top_k",
        type=whole,
        metavar="N",
        help=f"draw only among the N most probable tokens (default {SAMPLING.top_k}: among all)",
    )
    sampling.add_argument(
        "--top_p",
        type=float,
        metavar="P",
        help="draw only among the most probable tokens that together have probability P "
        f"(default {SAMPLING.top_p:g}: among all)",
    )
    sampling.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="equal seeds draw equal translations (default 0)"
    )

    limits = parser.add_argument_group("limits, in tokens", argument_default=argparse.SUPPRESS)
    limits.add_argument(
        "--min_length", type=whole, metavar="N", help=f"shortest translation (default {BEAM.min_length})"
    )
    limits.add_argument("--max_length", type=whole, metavar="N", help="longest translation (default: no such limit)")
    limits.add_argument(
        "--extra_length",
        type=whole,
        metavar="N",
        help=f"longest translation, beyond the length of its source (default {BEAM.extra_length}, the paper's)",
    )
    limits.add_argument(
        "--no_repeat_ngram",
        type=whole,
        metavar="N",
        help=f"no N tokens in a row come twice in a translation (default {BEAM.no_repeat_ngram}: they may)",
    )


def add_length_penalty(group: Any) -> None:
    """Declares what a score divides a log-probability by."""
    group.add_argument(
        "--length_penalty",
        choices=LENGTH_PENALTIES,
        help="a log-probability is divided by ((5 + length) / 6) ^ alpha (paper, the default) or by length ^ alpha "
        "(length)",
    )
    group.add_argument(
        "--alpha", type=float, metavar="X", help=f"that exponent; 0 does not divide (default {BEAM.alpha})"
    )


def search_settings(options: argparse.Namespace) -> SearchSettings:
    """What the options say of the search; raises ValueError naming the option that is wrong."""
    sample = getattr(options, "sample", False)
    own, other = (Sampling, BeamSearch) if sample else (BeamSearch, Sampling)
    names = {field.name for field in dataclasses.fields(own)}
    for field in dataclasses.fields(other):
        if field.name in options and field.name not in names:
            mend = "leave it or --sample out" if sample else "add --sample"
            raise ValueError(f"--{field.name} is for {'beam search' if sample else 'sampling'}: {mend}")
    try:
        return own(**{name: value for name, value in vars(options).items() if name in names})
    except ValueError as error:
        raise ValueError(f"--{str(error).replace('num_return', 'nbest')}") from error


def pair_checkpoints(workdirs: Sequence[str], checkpoints: Sequence[str | int]) -> list[Model]:
    """Each model's work directory and checkpoint; raises ValueError where they do not go together."""
    if len(workdirs) == 1:
        workdirs = [*workdirs] * len(checkpoints)
    elif len(checkpoints) == 1:
        checkpoints = [*checkpoints] * len(workdirs)
    if len(workdirs) != len(checkpoints):
        raise ValueError(
            f"--checkpoint names {len(checkpoints)}, --workdir {len(workdirs)}: give one for all, or one for each"
        )
    return list(zip(workdirs, checkpoints, strict=True))


def load_translator(models: Sequence[Model], batch_tokens: int) -> Any:
    """A model's translator, or an ensemble of several models; raises ValueError with the mend."""
    # jax loads here, so that --help answers at once.
    start_devices()
    from flax_transformer.decoding.translator import Translator
    from flax_transformer.trained_model import TrainedModel

    loaded = []
    for workdir, step in models:
        with explain_damage(workdir):
            loaded.append(TrainedModel.load(workdir, step=step))
    return Translator(loaded, batch_tokens=batch_tokens)


@contextlib.contextmanager
def explain_damage(workdir: str) -> Iterator[None]:
    """Makes one ValueError that names the folder of whatever reading a work directory raises.

    Errors of the device are not the folder's; `start_devices` must come before.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # Orbax and what it reads with raise many kinds; whatever it is, the mend is the same.
        if is_device_error(error):
            raise
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if isinstance(error, ValueError) and frame.f_globals["__name__"].startswith("flax_transformer."):
            # One of this library's own, which names its mend, if not always the folder.
            raise ValueError(str(error) if workdir.rstrip("/") in str(error) else f"{workdir}: {error}") from error
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" …")
        raise ValueError(f"{workdir} is damaged ({reason}): copy it again, or choose another --checkpoint") from error

"""Declares the options that several verbs share, and makes the settings of a search and a translator from them.

Options are declared and checked without jax, so that --help and mistakes are answered at once; the model loads last.
"""

import argparse
import contextlib
import dataclasses
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flax_transformer.commands.process import is_device_error, start_devices
from flax_transformer.decoding.settings import LENGTH_PENALTIES, STOPPING, BeamSearch, Sampling, SearchSettings
from flax_transformer.errors import is_own
from flax_transformer.files import expand
from flax_transformer.ranges import (
    AT_LEAST_NONE,
    COUNT,
    INT32,
    SEED_OF_SAMPLES,
    SIZE,
    Range,
    check_value,
    whole_number,
)

# A work directory, and which of its checkpoints.
Model = tuple[str, str | int]
CHECKPOINTS = ("chosen", "best", "latest", "averaged")
BEAM, SAMPLING = BeamSearch(), Sampling()
BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
# Of models that a token before the source, such as ">>kan<<", tells what to write.
LANGUAGE_NOTES = {
    "source": "Models with tokens such as >>kan<< do without it",
    "target": "With tokens such as >>kan<<, that of this language is put before sources that have none",
}


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


def number(kind: type[int] | type[float], allowed: Range, wanted: str) -> Callable[[str], Any]:
    """The type of an option for numbers of a kind and a range; an error says that one is `wanted`."""

    def read(text: str) -> int | float:
        try:
            return check_value("it", whole_number(text) if kind is int else float(text), kind, allowed)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: give {wanted}") from error

    return read


whole = number(int, Range(), "a whole number")  # its range is checked where it is used
# A count is a whole number of at most 32 bits, since it may be the size of an array.
positive = number(int, SIZE, f"a whole number above 0 and {INT32}")
count = number(int, COUNT, f"a whole number, {AT_LEAST_NONE} and {INT32}")
seed = number(int, SEED_OF_SAMPLES, f"a whole number, {SEED_OF_SAMPLES}")


def true_or_false(text: str) -> bool:
    """The type of an option that is on or off and may be followed by =true or =false."""
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"{text!r}: give true or false")
    return BOOLEANS[text.lower()]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options that choose the trained model, or the models of an ensemble."""
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--workdir",
        nargs="+",
        action="extend",
        type=path,
        required=True,
        metavar="FOLDER",
        help="the work directory of a training; several make an ensemble, which averages their probabilities",
    )
    group.add_argument(
        "--checkpoint",
        nargs="+",
        action="extend",
        type=checkpoint,
        metavar="STEP",
        help="which checkpoint to load: chosen (the default: the average if training.weights of the config is averaged "
        "and an average was made, otherwise best), best, latest, averaged (the latest average) or the number of a "
        "step. If training.weights is ema, the checkpoint's moving average is loaded. Give one checkpoint for all work "
        "directories or one for each; several of one work directory also make an ensemble",
    )
    group.add_argument(
        "--batch_tokens",
        type=positive,
        default=4096,
        metavar="N",
        help="source tokens in a batch; smaller batches need less memory (default 4096)",
    )
    for side in ("source", "target"):
        group.add_argument(
            f"--{side}_language",
            type=filled,
            metavar="CODE",
            help=f"the language of {side}s that do not begin with the token of one, e.g. kan_Knda for NLLB, kn for "
            "M2M100; only for models with tokens of languages (default: that of the work directory, if it has one). "
            + LANGUAGE_NOTES[side],
        )


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Declares the settings of the search; those that are not given are missing from the parsed options."""
    beam = parser.add_argument_group("beam search", argument_default=argparse.SUPPRESS)
    beam.add_argument(
        "--beam_size",
        type=whole,
        metavar="N",
        help=f"hypotheses kept for each sentence; 1 is greedy search (default {BEAM.beam_size})",
    )
    beam.add_argument(
        "--stopping",
        choices=STOPPING,
        help="when the search ends: optimal (default), when no better translation can follow; first, when beam_size "
        "translations are complete",
    )
    add_length_penalty(beam)

    sampling = parser.add_argument_group("sampling", argument_default=argparse.SUPPRESS)
    sampling.add_argument(
        "--sample",
        action="store_true",
        default=False,
        help="sample translations at random instead of searching for the best",
    )
    sampling.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        help=f"below 1 samples are more predictable, above 1 more varied (default {SAMPLING.temperature:g})",
    )
    sampling.add_argument(
        "--top_k",
        type=whole,
        metavar="N",
        help=f"sample only from the N most probable tokens (default {SAMPLING.top_k}: from all)",
    )
    sampling.add_argument(
        "--top_p",
        type=float,
        metavar="P",
        help="sample only from the most probable tokens that together have probability P "
        f"(default {SAMPLING.top_p:g}: from all)",
    )
    sampling.add_argument(
        "--mbr",
        type=positive,
        metavar="N",
        help="draw N samples and choose the one that is most like the others by chrF (minimum Bayes risk decoding)",
    )
    sampling.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="the same seed gives the same samples (default 0)"
    )

    shortlist = parser.add_argument_group("shortlist").add_mutually_exclusive_group()
    shortlist.add_argument(
        "--shortlist",
        type=path,
        metavar="FILE",
        help="a binary lexical shortlist of Marian (lex.*.bin) made for this vocabulary: translations are searched "
        "among the target tokens that it lists for the source tokens (default: the one in the work directory, if any)",
    )
    shortlist.add_argument(
        "--no_shortlist",
        action="store_true",
        help="search among all tokens, even if the work directory has a shortlist",
    )

    limits = parser.add_argument_group("limits, in tokens", argument_default=argparse.SUPPRESS)
    limits.add_argument("--min_length", type=whole, metavar="N", help=f"minimum length (default {BEAM.min_length})")
    limits.add_argument("--max_length", type=whole, metavar="N", help="maximum length (default: no fixed limit)")
    limits.add_argument(
        "--extra_length",
        type=whole,
        metavar="N",
        help=f"by how much a translation may be longer than its source (default {BEAM.extra_length}, as in the paper)",
    )
    limits.add_argument(
        "--no_repeat_ngram",
        type=whole,
        metavar="N",
        help=f"never repeat a sequence of N tokens within a translation (default {BEAM.no_repeat_ngram}: allow it)",
    )


def add_length_penalty(group: Any) -> None:
    """Declares the length penalty, by which a score divides a log-probability."""
    group.add_argument(
        "--length_penalty",
        choices=LENGTH_PENALTIES,
        help="a score is the log-probability divided by ((5 + length) / 6) ^ alpha (paper, the default) or by "
        "length ^ alpha (length)",
    )
    group.add_argument(
        "--alpha",
        type=float,
        metavar="X",
        help=f"exponent of the length penalty; 0 switches it off (default {BEAM.alpha})",
    )


def search_settings(options: argparse.Namespace) -> SearchSettings:
    """The settings of the search that the options ask for; raises ValueError naming the option that is wrong."""
    sample = getattr(options, "sample", False) or "mbr" in options
    own, other = (Sampling, BeamSearch) if sample else (BeamSearch, Sampling)
    names = {field.name for field in dataclasses.fields(own)}
    for field in dataclasses.fields(other):
        if field.name in options and field.name not in names:
            wanted, remedy = (
                ("beam search", "remove it, or --sample and --mbr") if sample else ("sampling", "add --sample")
            )
            raise ValueError(f"--{field.name} applies to {wanted} only: {remedy}")
    try:
        return own(**{name: value for name, value in vars(options).items() if name in names})
    except ValueError as error:
        raise ValueError(f"--{str(error).replace('num_return', 'nbest')}") from error


def pair_checkpoints(workdirs: Sequence[str], checkpoints: Sequence[str | int] | None) -> list[Model]:
    """Each model's work directory and checkpoint; raises ValueError where they do not go together."""
    checkpoints = checkpoints or ["chosen"]
    if len(workdirs) == 1:
        workdirs = [*workdirs] * len(checkpoints)
    elif len(checkpoints) == 1:
        checkpoints = [*checkpoints] * len(workdirs)
    if len(workdirs) != len(checkpoints):
        raise ValueError(
            f"there are {len(checkpoints)} values of --checkpoint for {len(workdirs)} of --workdir: give one for all "
            "work directories, or one for each"
        )
    return list(zip(workdirs, checkpoints, strict=True))


def load_translator(models: Sequence[Model], options: argparse.Namespace) -> Any:
    """Loads the models; several translate as an ensemble.

    Args:
        models: the work directory and the checkpoint of each.
        options: those of `add_model_options`, and of `add_search_options` if the verb searches.

    Raises:
        ValueError: a folder or the shortlist cannot be read.
    """
    # jax loads here, so that --help answers at once.
    start_devices()
    from flax_transformer.decoding.translator import Translator
    from flax_transformer.interop.marian_shortlist import read_shortlist
    from flax_transformer.trained_model import TrainedModel

    loaded = []
    for workdir, step in models:
        with explain_damage(workdir):
            loaded.append(TrainedModel.load(workdir, step=step))
    # Commands that do not search have no --no_shortlist, and need no shortlist.
    shortlist: Any = getattr(options, "no_shortlist", True) is False
    if name := getattr(options, "shortlist", None):
        shortlist = read_shortlist(name, joint=loaded[0].vocabularies.shares_ids)
    # Models that know languages by code have one vocabulary only once the languages are named.
    languages = {}
    if loaded[0].vocabularies.target.language_ids:
        languages = {name: getattr(options, name, "") or "" for name in ("source_language", "target_language")}
    return Translator(loaded, batch_tokens=options.batch_tokens, shortlist=shortlist, **languages)


def in_languages(translators: Sequence[Any], options: argparse.Namespace) -> list[Any]:
    """Lets translators whose models have tokens of languages translate between those that the options name.

    Raises:
        ValueError: the options name languages and no translator knows any, or one does not know these.
    """
    languages = options.source_language or "", options.target_language or ""
    knowing = [translator.vocabularies.names_languages for translator in translators]
    return [
        translator.speaking(*languages) if knows or not any(knowing) else translator
        for translator, knows in zip(translators, knowing, strict=True)
    ]


@contextlib.contextmanager
def explain_damage(workdir: str) -> Iterator[None]:
    """Turns any error in reading a work directory into a ValueError that names the folder.

    Errors of a device are passed on; call `start_devices` first, so that they show there.
    """
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:  # Orbax and what it reads with raise many kinds; the remedy is the same.
        if is_device_error(error):
            raise
        if is_own(error):  # It says what to do, but not always for which folder.
            raise ValueError(str(error) if workdir.rstrip("/") in str(error) else f"{workdir}: {error}") from error
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" …")
        raise ValueError(f"{workdir} is damaged ({reason}): copy it again, or choose another --checkpoint") from error

"""Draws where the model looks while it translates a sentence: for each token of the
translation, how much it attends to each token of the source (cross-attention).
"""

import argparse
import os

from flax_transformer.commands.options import (
    add_model_options,
    add_search_options,
    filled,
    in_languages,
    load_translator,
    pair_checkpoints,
    path,
    search_settings,
    whole,
)
from flax_transformer.files import check_output

USAGE = "--workdir FOLDER --output FILE [OPTIONS] SENTENCE"
EXAMPLES = """\
The picture's format is that of the file's name: png, svg, pdf and others. Numbers instead
of a picture: translate --format=jsonl --alignment.

examples:
  flax-transformer align --workdir=runs/mine --output=picture.png "A dog runs."
  flax-transformer align --workdir=runs/mine --output=picture.svg --layer=0 "A dog runs."
  flax-transformer align --workdir=runs/mine --output=picture.png --translation="Ein Hund rennt." "A dog runs."
"""
MEMORY_REMEDY = "lower --beam_size, or give a shorter sentence"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `align`."""
    add_model_options(parser)
    text = parser.add_argument_group("the sentence and the picture")
    text.add_argument("sentence", type=filled, metavar="SENTENCE", help="the source sentence, in quotes")
    text.add_argument(
        "--output", type=path, required=True, metavar="FILE", help="the picture to write, e.g. picture.png"
    )
    text.add_argument(
        "--translation",
        type=filled,
        metavar="TEXT",
        help="show the attention for this translation instead of the one that the model finds",
    )
    text.add_argument(
        "--layer",
        type=whole,
        default=-1,
        metavar="N",
        help="the decoder layer, counted from 0, whose attention is averaged over its heads; the last is the default",
    )
    add_search_options(parser)


def run(options: argparse.Namespace) -> None:
    """Translates, draws and prints the translation; raises ValueError or OSError that says what to do."""
    search = search_settings(options)
    models = pair_checkpoints(options.workdir, options.checkpoint)
    check_output("--output", options.output, [], options.workdir)
    try:
        # jax and matplotlib load here, so that --help answers at once.
        from flax_transformer.decoding.results import in_parts
        from flax_transformer.plots import picture_formats, plot_attention
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error
    if os.path.splitext(options.output)[1].removeprefix(".").lower() not in (formats := picture_formats()):
        raise ValueError(f"--output is {options.output}, whose name has no known ending: choose {', '.join(formats)}")
    (translator,) = in_languages([load_translator(models, options)], options)
    translator.align([], [], layer=options.layer)  # reports a layer that does not exist
    translation = options.translation or translator.hypotheses([options.sentence], search, seed=options.seed)[0][0]
    if not options.translation and in_parts(translation, translator.vocabularies.target.eos_id):
        longest = translator.config.max_length
        raise ValueError(f"the sentence has more than {longest} tokens and was translated in parts: align each part")
    (alignment,) = translator.align([options.sentence], [translation], layer=options.layer)
    figure = plot_attention(
        alignment.weights, alignment.source_tokens, alignment.target_tokens, title="Cross-attention"
    )
    figure.savefig(options.output)
    print(options.translation or translation.text)

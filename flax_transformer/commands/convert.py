"""Converts models of Marian (OPUS-MT, Firefox Translations), M2M100 and NLLB into work
directories, and work directories into folders for CTranslate2, for transformers (Marian,
NLLB), for Marian itself and for jax alone (StableHLO). FROM may be the name of a model on
the Hugging Face hub. The target folder must be new, and a conversion that fails does not
create it.
"""

import argparse
import os
import re
import shlex
import time
from typing import Any

from flax_transformer.commands.options import checkpoint, explain_damage, filled, path
from flax_transformer.commands.process import start_devices

IMPORTS = ("from-marian", "from-nllb")
# The exports, and how to use the folder that each of them writes.
EXPORTS = {
    "to-marian": "transformers.MarianMTModel.from_pretrained({folder!r}), MarianTokenizer likewise",
    "to-marian-native": "marian-decoder --config {quoted}/decoder.yml    # with Marian itself",
    "to-nllb": "transformers.AutoModelForSeq2SeqLM.from_pretrained({folder!r}), AutoTokenizer likewise",
    "to-ctranslate2": "{folder}/README.md shows how CTranslate2 translates with it",
    "to-stablehlo": 'python {quoted}/translate.py "A sentence."    # with jax alone',
}
WAYS = (*IMPORTS, *EXPORTS)
USAGE = f"{{{','.join(WAYS)}}} FROM TO [OPTIONS]"
EXAMPLES = """\
examples:
  flax-transformer convert from-marian downloads/opus-mt-en-de runs/opus
  flax-transformer convert from-marian firefox/enpt runs/enpt
  flax-transformer convert from-marian Helsinki-NLP/opus-mt-dra-en runs/dra-en
  flax-transformer convert from-nllb facebook/nllb-200-distilled-600M runs/nllb
  flax-transformer convert to-ctranslate2 runs/mine deployed --quantization=int8
  flax-transformer convert to-marian runs/mine for-transformers
  flax-transformer convert to-stablehlo runs/mine exported
"""
# What a name on the Hugging Face hub looks like: OWNER/MODEL.
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
MEMORY_REMEDY = "convert on a machine that has more"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `convert`."""
    parser.add_argument("way", choices=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument(
        "source",
        type=path,
        metavar="FROM",
        help="what to read: the folder of a downloaded model, the .npz or .bin file of one, or a work directory "
        "(to-marian: none whose model has language tokens); where there is none, the name of a model to download from "
        "the Hugging Face hub, e.g. facebook/nllb-200-distilled-600M",
    )
    parser.add_argument("target", type=path, metavar="TO", help="the folder to write")
    parser.add_argument(
        "--checkpoint",
        type=checkpoint,
        metavar="STEP",
        help="checkpoint of the work directory: best, latest, averaged or the number of a step (default: the one that "
        "training.weights of the config selects, as in translate)",
    )
    parser.add_argument(
        "--quantization",
        metavar="TYPE",
        help="type of CTranslate2's weights: int8, int8_float16, int8_bfloat16, int16, float16 or bfloat16 "
        "(default float32)",
    )
    parser.add_argument(
        "--trained_positions",
        action="store_true",
        help="with from-marian and transformers' format: compute the positions with which Marian trained the model; "
        "those of transformers have other wavelengths",
    )
    parser.add_argument(
        "--revision", type=filled, metavar="NAME", help="branch, tag or commit of the model on the hub (default main)"
    )


def run(options: argparse.Namespace) -> None:
    """Converts and prints how to use the result; raises ValueError or OSError that says what to do."""
    way = options.way
    if options.quantization and way != "to-ctranslate2":
        raise ValueError(f"--quantization applies to to-ctranslate2 only, not to {way}: remove it")
    if options.checkpoint and way in IMPORTS:
        raise ValueError(f"--checkpoint applies to work directories, not to {way}: remove it")
    if options.trained_positions and way != "from-marian":
        raise ValueError(f"--trained_positions applies to from-marian only, not to {way}: remove it")
    is_download = way in IMPORTS and not os.path.exists(options.source) and HUB_NAME.fullmatch(options.source)
    if options.revision and not is_download:
        raise ValueError("--revision applies to models that are downloaded from the hub by name: remove it")
    # jax loads here, so that --help answers at once.
    start_devices()
    import jax

    from flax_transformer.interop.folders import check_new_folder

    check_new_folder(options.target)
    source = options.source
    if is_download:
        from flax_transformer.interop.hub import download

        source = download(source, options.revision or "")
    begun = time.monotonic()
    model = _import(source, options) if way in IMPORTS else _export(options)
    print(_describe(model, options))
    if way in IMPORTS:
        count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        print(f"{count:,} parameters, converted in {time.monotonic() - begun:.1f} s")


def _import(source: str, options: argparse.Namespace) -> Any:
    """Converts a downloaded model to a work directory; returns it."""
    if options.way == "from-marian":
        from flax_transformer.interop.marian import from_marian

        return from_marian(source, options.target, trained_positions=options.trained_positions)
    from flax_transformer.interop.nllb import from_nllb

    return from_nllb(source, options.target)


def _export(options: argparse.Namespace) -> Any:
    """Converts the model of a work directory; returns it."""
    from flax_transformer.trained_model import TrainedModel

    with explain_damage(options.source):
        model = TrainedModel.load(options.source, step=options.checkpoint or "chosen")
    if options.way == "to-marian":
        from flax_transformer.interop.marian import to_marian

        to_marian(model, options.target)
    elif options.way == "to-marian-native":
        from flax_transformer.interop.marian_native import to_marian_native

        to_marian_native(model, options.target)
    elif options.way == "to-nllb":
        from flax_transformer.interop.nllb import to_nllb

        to_nllb(model, options.target)
    elif options.way == "to-ctranslate2":
        from flax_transformer.interop.ctranslate2 import to_ctranslate2

        to_ctranslate2(model, options.target, quantization=options.quantization or "none")
    else:
        from flax_transformer.interop.stablehlo import to_stablehlo

        to_stablehlo(model, options.target)
    return model


def _describe(model: Any, options: argparse.Namespace) -> str:
    config, target = model.config, shlex.quote(options.target)
    sizes = sorted({config.source_vocab_size, config.target_vocab_size})
    lines = [
        f"{options.target}: {config.num_encoder_layers}+{config.num_decoder_layers} layers, d_model {config.d_model}, "
        f"{config.activation}, {' and '.join(f'{size:,}' for size in sizes)} pieces"
    ]
    if options.way in IMPORTS:
        vocabulary = model.vocabularies.source
        sides = ("source", "target") if vocabulary.language_ids else ("target",) if vocabulary.languages else ()
        by_code = "".join(f" --{side}_language=CODE" for side in sides)
        lines += [
            f"  flax-transformer translate --workdir={target}{by_code} --input=FILE",
            f"  flax-transformer train --config=finetune:{target} --workdir=runs/finetuned  # on your text",
        ]
        if vocabulary.language_ids:
            few = ", ".join(code.strip("_") for code in vocabulary.languages[:4])
            lines.append(f"it knows {len(vocabulary.languages)} languages: {few}, …")
        elif vocabulary.languages:
            lines.append(
                f"it writes {len(vocabulary.languages)} languages: give --target_language, or begin each source "
                f"sentence with one of {', '.join(vocabulary.languages)}"
            )
    else:
        lines.append("  " + EXPORTS[options.way].format(folder=options.target, quoted=target))
    return "\n".join(lines)

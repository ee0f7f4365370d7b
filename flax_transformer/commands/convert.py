"""Converts models of Marian (OPUS-MT, Firefox Translations), M2M100 and NLLB into work
directories, and work directories into folders for CTranslate2, for transformers (Marian,
NLLB), for Marian itself and for jax alone (StableHLO). FROM may be the name of a model on
the Hugging Face hub. The target folder must be new, and a conversion that fails does not
create it.
"""

import argparse
import os
import shlex
import time
from typing import Any

from flax_transformer.commands.options import checkpoint, explain_damage, filled, path
from flax_transformer.commands.process import start_devices
from flax_transformer.interop.hub import download, is_name

USAGE = "{from-marian,from-nllb,to-marian,to-marian-native,to-nllb,to-ctranslate2,to-stablehlo} FROM TO [OPTIONS]"
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
IMPORTS = ("from-marian", "from-nllb")
WAYS = (*IMPORTS, "to-marian", "to-marian-native", "to-nllb", "to-ctranslate2", "to-stablehlo")
MEMORY_REMEDY = "convert on a machine that has more"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `convert`."""
    parser.add_argument("way", choices=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument(
        "source",
        type=path,
        metavar="FROM",
        help="what to read: the folder of a downloaded model, the .npz or .bin file of one, or a work directory; where "
        "there is none, the name of a model to download from the Hugging Face hub, e.g. "
        "facebook/nllb-200-distilled-600M",
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
    downloads = way in IMPORTS and not os.path.exists(options.source) and is_name(options.source)
    if options.revision and not downloads:
        raise ValueError("--revision applies to models that are downloaded from the hub by name: remove it")
    # jax loads here, so that --help answers at once.
    start_devices()
    import jax

    from flax_transformer.interop.folders import check_new_folder
    from flax_transformer.trained_model import TrainedModel

    check_new_folder(options.target)
    folder = download(options.source, options.revision or "") if downloads else options.source
    begun = time.monotonic()
    if way == "from-marian":
        from flax_transformer.interop.marian import from_marian

        model = from_marian(folder, options.target, trained_positions=options.trained_positions)
    elif way == "from-nllb":
        from flax_transformer.interop.nllb import from_nllb

        model = from_nllb(folder, options.target)
    else:
        with explain_damage(options.source):
            model = TrainedModel.load(options.source, step=options.checkpoint or "chosen")
        if way == "to-marian":
            from flax_transformer.interop.marian import to_marian

            to_marian(model, options.target)
        elif way == "to-marian-native":
            from flax_transformer.interop.marian_native import to_marian_native

            to_marian_native(model, options.target)
        elif way == "to-nllb":
            from flax_transformer.interop.nllb import to_nllb

            to_nllb(model, options.target)
        elif way == "to-ctranslate2":
            from flax_transformer.interop.ctranslate2 import to_ctranslate2

            to_ctranslate2(model, options.target, quantization=options.quantization or "none")
        else:
            from flax_transformer.interop.stablehlo import to_stablehlo

            to_stablehlo(model, options.target)
    print(_describe(model, options))
    if way in IMPORTS:
        count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        print(f"{count:,} parameters, converted in {time.monotonic() - begun:.1f} s")


def _describe(model: Any, options: argparse.Namespace) -> str:
    config, target = model.config, shlex.quote(options.target)
    sizes = sorted({config.source_vocab_size, config.target_vocab_size})
    lines = [
        f"{options.target}: {config.num_encoder_layers}+{config.num_decoder_layers} layers, d_model {config.d_model}, "
        f"{config.activation}, {' and '.join(f'{size:,}' for size in sizes)} pieces"
    ]
    if options.way in IMPORTS:
        vocabulary = model.vocabularies.source
        by_code = " --source_language=CODE --target_language=CODE" if vocabulary.language_ids else ""
        lines += [
            f"  flax-transformer translate --workdir={target}{by_code} --input=FILE",
            f"  flax-transformer train --config=finetune:{target} --workdir=runs/finetuned  # on your text",
        ]
        if vocabulary.language_ids:
            few = ", ".join(code.strip("_") for code in vocabulary.languages[:4])
            lines.append(f"it knows {len(vocabulary.languages)} languages: {few}, …")
        elif vocabulary.languages:
            lines.append(f"each source sentence must begin with the target language: {', '.join(vocabulary.languages)}")
    elif options.way == "to-marian":
        lines.append(f"  transformers.MarianMTModel.from_pretrained({options.target!r}), MarianTokenizer likewise")
    elif options.way == "to-marian-native":
        lines.append(f"  marian-decoder --config {target}/decoder.yml    # with Marian itself")
    elif options.way == "to-nllb":
        lines.append(
            f"  transformers.AutoModelForSeq2SeqLM.from_pretrained({options.target!r}), AutoTokenizer likewise"
        )
    elif options.way == "to-ctranslate2":
        lines.append(f"  {options.target}/README.md shows how CTranslate2 translates with it")
    else:
        lines.append(f'  python {target}/translate.py "A sentence."    # with jax alone')
    return "\n".join(lines)

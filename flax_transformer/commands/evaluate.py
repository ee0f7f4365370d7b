"""Translates a test set and scores the translations: BLEU, chrF and TER with sacrebleu,
and COMET. With --compare or --compare_translations, tests whether the difference to a
second system is significant.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

from sacrebleu.metrics import BLEU

from flax_transformer.commands.corpus_scores import METRICS, Judge, System, report
from flax_transformer.commands.lines import count_lines, open_output, progress_bar, read_all
from flax_transformer.commands.options import (
    Model,
    add_model_options,
    add_search_options,
    checkpoint,
    explain_damage,
    filled,
    in_languages,
    load_translator,
    pair_checkpoints,
    path,
    search_settings,
    whole,
)
from flax_transformer.data.corpus import corpus_files, load_corpus
from flax_transformer.decoding.settings import SearchSettings, in_words
from flax_transformer.decoding.unreadable import UnreadableSentences
from flax_transformer.files import STANDARD, Named, check_inputs, check_output
from flax_transformer.text.spelling import in_one_line

EXAMPLES = """\
Training tests with the search of training.evaluation, by default greedy search, which is
--beam_size=1 here, where the default is a beam of 4: so the scores of both differ.

length is the number of tokens in the translations divided by that in the references, as
BLEU counts them; sentences/s includes the time for compiling.

examples:
  flax-transformer evaluate --workdir=runs/mine --source=test.en --reference=test.de
  flax-transformer evaluate --workdir=runs/mine --corpus=tfds:wmt14_translate/de-en:test
  flax-transformer evaluate --workdir=runs/a --compare=runs/b --source=test.en --reference=test.de
  flax-transformer evaluate --workdir=runs/mine --compare_translations=other.de \\
      --source=test.en --reference test.de test.2.de --chrf_word_order=2
"""
# Sentences that are translated together between two updates of the progress bar; enough to sort by length.
CHUNK = 2000
MEMORY_REMEDY = "lower --batch_tokens or --beam_size"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `evaluate`."""
    add_model_options(parser)

    text = parser.add_argument_group("the test set")
    text.add_argument("--source", type=path, metavar="FILE", help="UTF-8 text, one sentence per line")
    text.add_argument(
        "--reference",
        nargs="+",
        action="extend",
        type=path,
        metavar="FILE",
        help="file whose line i translates line i of the source; several are the work of several translators, and a "
        "translation need only be like one of them",
    )
    text.add_argument(
        "--corpus",
        type=filled,
        metavar="CORPUS",
        help="instead of both files: files:SOURCE,REFERENCE, tsv:FILE or tfds:NAME:SPLIT?source=en&target=de, as in "
        "training; put it in quotes in a shell",
    )

    shown = parser.add_argument_group("the report")
    shown.add_argument("--output", choices=("text", "json"), default="text", help="format of the report (default text)")
    shown.add_argument(
        "--translations",
        type=path,
        metavar="FILE",
        help="also write the translations of --workdir to this file, one per line",
    )
    shown.add_argument(
        "--metrics",
        nargs="+",
        action="extend",
        choices=METRICS,
        help="what is computed (default bleu chrf ter); comet needs the command comet-score of the package "
        "unbabel-comet, which downloads a model",
    )
    shown.add_argument(
        "--chrf_word_order",
        type=whole,
        choices=range(3),
        default=0,
        metavar="N",
        help="sequences of up to N words count in chrF, too, not only those of characters; 1 is chrF+, 2 is chrF++ "
        "(default 0)",
    )
    shown.add_argument(
        "--tokenize",
        choices=list(BLEU.TOKENIZERS),
        metavar="NAME",
        help="sacrebleu's tokeniser for BLEU, e.g. 13a, zh, ja-mecab or char (default: the one that training used; "
        "if training chose none, or the models differ, the one that suits the script of the references)",
    )
    shown.add_argument(
        "--compare",
        nargs="+",
        action="extend",
        type=path,
        metavar="FOLDER",
        help="a second work directory or ensemble, whose scores are shown and compared by paired bootstrap resampling",
    )
    shown.add_argument(
        "--compare_checkpoint",
        nargs="+",
        action="extend",
        type=checkpoint,
        metavar="STEP",
        help="the checkpoint of --compare (default: the same as for --workdir)",
    )
    shown.add_argument(
        "--compare_translations",
        type=path,
        metavar="FILE",
        help="instead of --compare: a file whose line i is the translation of line i by any other system",
    )

    add_search_options(parser)


def run(options: argparse.Namespace) -> None:
    """Translates, scores and prints; raises ValueError or OSError that says what to do."""
    search = search_settings(options)
    if options.compare_checkpoint and not options.compare:
        raise ValueError("--compare_checkpoint needs --compare: name the work directory of that checkpoint with it")
    if options.compare and options.compare_translations:
        raise ValueError("--compare and --compare_translations both name a second system: remove one of them")
    metrics = options.metrics or ["bleu", "chrf", "ter"]
    for option, metric in (("tokenize", "bleu"), ("chrf_word_order", "chrf")):
        if getattr(options, option) and metric not in metrics:
            raise ValueError(
                f"--{option} is for {metric}, which --metrics leaves out: add it there, or remove --{option}"
            )
    models = [pair_checkpoints(options.workdir, options.checkpoint)]
    if options.compare:
        models.append(pair_checkpoints(options.compare, options.compare_checkpoint or options.checkpoint))
    inputs = _inputs(options)
    check_inputs(
        inputs, instead=", or give --corpus=tsv:- and pairs on standard input, a tab between source and target"
    )
    workdirs = [*options.workdir, *(options.compare or [])]
    check_output("the report", STANDARD, inputs, workdirs)
    if options.translations:
        also_read = [("--shortlist", options.shortlist)] if options.shortlist else []
        check_output("--translations", options.translations, inputs + also_read, workdirs)
    sources, references, others = _read(options)
    languages, references = _split_languages([several[0][0] for several in models], references)
    judge = Judge(
        sources,
        references,
        metrics,
        tokenize=options.tokenize or _tokenizer_of_training(workdirs),
        chrf_word_order=options.chrf_word_order,
    )
    # All models are loaded before any translates, so that a wrong path is found now and not after hours.
    translators = in_languages([load_translator(each, options) for each in models], options)
    for each, translator in zip(models, translators, strict=True):
        _check_languages(translator, languages, references, each[0][0])
    systems: list[System] = []
    for each, translator in zip(models, translators, strict=True):
        named = _languages_for(translator, languages, references)
        translations, seconds = _translate(translator, sources, named, search, options.seed)
        if options.translations and not systems:
            with open_output(options.translations) as file:
                file.writelines(f"{in_one_line(translation)}\n".encode() for translation in translations)
        systems.append(_system(each, translations, seconds))
    if options.compare_translations:
        name = options.compare_translations
        systems.append(System(name, {"translations": name}, others))
    print(report(judge, systems, in_words(search), as_json=options.output == "json"))


def _system(models: Sequence[Model], translations: list[str], seconds: float) -> System:
    name = " + ".join(f"{workdir} ({step})" for workdir, step in models)
    described = {"models": [{"workdir": workdir, "checkpoint": step} for workdir, step in models]}
    return System(name, described, translations, seconds)


def _tokenizer_of_training(workdirs: Sequence[str]) -> str:
    """The tokeniser that all trainings used; "" where they differ, or chose none."""
    # jax loads here, so that a mistake in the options is reported at once.
    from flax_transformer.workdir import WorkDirectory

    chosen = set()
    for workdir in workdirs:
        with explain_damage(workdir):
            config = WorkDirectory(workdir).read_config()
        # A converted model has no training section, and an older training chose none.
        chosen.add(config.get("training", {}).get("evaluation", {}).get("tokenize", "auto"))
    return chosen.pop() if len(chosen) == 1 and "auto" not in chosen else ""


def _inputs(options: argparse.Namespace) -> list[Named]:
    """All files that are read, with the options that name them."""
    others = [("--compare_translations", options.compare_translations)] if options.compare_translations else []
    if options.corpus and not (options.source or options.reference):
        return [("--corpus", file) for file in corpus_files(options.corpus)] + others
    if options.corpus or not (options.source and options.reference):
        raise ValueError("there must be one test set: give --source and --reference, or --corpus alone")
    return [("--source", options.source), *(("--reference", file) for file in options.reference), *others]


def _read(options: argparse.Namespace) -> tuple[list[str], list[list[str]], list[str]]:
    """The source sentences, each translator's references, and another system's translations."""
    others = [options.compare_translations] if options.compare_translations else []
    if options.corpus:
        corpus = load_corpus(options.corpus)
        translations = [line for name in others for (line,) in read_all(name)]
        if others and len(translations) != len(corpus.source):
            raise ValueError(
                f"{others[0]} has {len(translations)} lines, the corpus {len(corpus.source)} pairs: line i must "
                "translate pair i"
            )
        return corpus.source, [corpus.target], translations
    count_lines(options.source, *options.reference, *others)
    rows = list(read_all(options.source, *options.reference, *others))
    if not rows:
        raise ValueError(f"{options.source} is empty: give a test set that has sentences")
    sources, *columns = map(list, zip(*rows, strict=True))
    translations = columns.pop() if others else []
    return sources, columns, translations


def _split_languages(workdirs: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The tokens with which references name the language of their sentence, and all references without such tokens."""
    # jax loads here, so that a mistake in the options is reported at once.
    from flax_transformer.workdir import WorkDirectory

    targets = []
    for workdir in workdirs:
        with explain_damage(workdir):
            WorkDirectory(workdir).read_config()  # says so if it is no work directory
            targets.append(WorkDirectory(workdir).read_vocabularies().target)
    target = next((each for each in targets if each.language_ids), targets[0])
    split = [target.split_languages(column) for column in references]
    named = zip(*(languages for languages, _ in split), strict=True)
    return [next(filter(None, row), "") for row in named], [texts for _, texts in split]


def _languages_for(translator: Any, languages: Sequence[str], references: Sequence[Sequence[str]]) -> list[str]:
    """The tokens with which the translations of a model are to begin."""
    target = translator.vocabularies.target
    if not target.language_ids:
        return [""] * len(languages)
    # A sentence whose references are all blank names no language.
    texts = ["".join(column) for column in zip(*references, strict=True)]
    return target.fill_languages(languages, texts)


def _check_languages(
    translator: Any, languages: Sequence[str], references: Sequence[Sequence[str]], workdir: str
) -> None:
    """Raises ValueError if a model needs a language that is not named, or does not know one that references name."""
    target = translator.vocabularies.target
    for language in dict.fromkeys(_languages_for(translator, languages, references) if target.language_ids else ()):
        target.encode([language])
        if language and not target.split_language(language)[0]:
            raise ValueError(
                f"references name the language {language.strip()}, and {workdir} names its languages in another way: "
                "leave the names out of the references, and give --target_language"
            )


def _translate(
    translator: Any, sources: list[str], languages: list[str], search: SearchSettings, seed: int
) -> tuple[list[str], float]:
    """The translations, which begin with these tokens, and the seconds that they took."""
    translations: list[str] = []
    begun, unreadable = time.perf_counter(), UnreadableSentences(translator.vocabularies.source)
    with progress_bar(len(sources)) as bar, unreadable.warning_once():
        for start in range(0, len(sources), CHUNK):
            chunk = sources[start : start + CHUNK]
            unreadable.add(chunk)
            named = languages[start : start + CHUNK]
            translations += translator.translate(chunk, search, prefixes=named, seed=(seed + start) % 2**32)
            bar.update(len(chunk))
    return translations, time.perf_counter() - begun

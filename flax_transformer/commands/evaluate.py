"""Translates a test set and scores the translations with sacrebleu: BLEU, chrF and
TER. With --compare, tests whether the difference to a second model is significant.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.metrics.base import Metric, Score
from sacrebleu.metrics.bleu import BLEUScore
from sacrebleu.significance import PairedTest, Result

from flax_transformer.bleu import choose_tokenizer, make_bleu, warn_of_missing_spaces
from flax_transformer.commands.lines import count_lines, in_chunks, open_output, progress_bar, read_pairs
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
)
from flax_transformer.data.corpus import corpus_files, load_corpus
from flax_transformer.decoding.settings import SearchSettings, in_words
from flax_transformer.decoding.unreadable import UnreadableSentences
from flax_transformer.files import STANDARD, Named, check_inputs, check_output
from flax_transformer.text.spelling import comparable, in_one_line

EXAMPLES = """\
Training tests with the search of training.evaluation, by default greedy search, which is
--beam_size=1 here, where the default is a beam of 4: so the scores of both differ.

length is the number of tokens in the translations divided by that in the references, as
BLEU counts them; sentences/s includes the time for compiling.

examples:
  flax-transformer evaluate --workdir=runs/mine --source=test.en --reference=test.de
  flax-transformer evaluate --workdir=runs/mine --corpus=tfds:wmt14_translate/de-en:test
  flax-transformer evaluate --workdir=runs/a --compare=runs/b --source=test.en --reference=test.de
"""
# A difference with a smaller p-value is called significant, as is usual.
SIGNIFICANT = 0.05
LESS_IS_BETTER = ("TER",)
# Sentences that are translated together between two updates of the progress bar; enough to sort by length.
CHUNK = 2000
MEMORY_REMEDY = "lower --batch_tokens or --beam_size"


@dataclasses.dataclass(frozen=True)
class System:
    """The translations of the test set by one model or ensemble, and their scores.

    Attributes:
        models: each model's work directory and checkpoint.
        translations: of each sentence.
        seconds: how long translating took, compiling included.
        scores: sacrebleu's, by metric.
    """

    models: Sequence[Model]
    translations: Sequence[str]
    seconds: float
    scores: Mapping[str, Score]

    @property
    def name(self) -> str:
        """Which it is, for a person."""
        return " + ".join(f"{workdir} ({step})" for workdir, step in self.models)

    @property
    def length(self) -> float:
        """The translations' tokens divided by the references', as BLEU counts them."""
        return cast(BLEUScore, self.scores["BLEU"]).ratio

    @property
    def speed(self) -> float:
        """Sentences a second."""
        return len(self.translations) / self.seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `evaluate`."""
    add_model_options(parser)

    text = parser.add_argument_group("the test set")
    text.add_argument("--source", type=path, metavar="FILE", help="UTF-8 text, one sentence per line")
    text.add_argument(
        "--reference", type=path, metavar="FILE", help="file whose line i translates line i of the source"
    )
    text.add_argument(
        "--corpus",
        type=filled,
        metavar="CORPUS",
        help="instead of both files: files:SOURCE,REFERENCE, tsv:FILE or tfds:NAME:SPLIT?source=en&target=de, as in "
        "training; put it in quotes in a shell",
    )

    report = parser.add_argument_group("the report")
    report.add_argument(
        "--output", choices=("text", "json"), default="text", help="format of the report (default text)"
    )
    report.add_argument(
        "--translations",
        type=path,
        metavar="FILE",
        help="also write the translations of --workdir to this file, one per line",
    )
    report.add_argument(
        "--tokenize",
        choices=list(BLEU.TOKENIZERS),
        metavar="NAME",
        help="sacrebleu's tokeniser for BLEU, e.g. 13a, zh, ja-mecab or char (default: the one that training used; "
        "if training chose none, or the models differ, the one that suits the script of the references)",
    )
    report.add_argument(
        "--compare",
        nargs="+",
        type=path,
        metavar="FOLDER",
        help="a second work directory or ensemble, whose scores are shown and compared by paired bootstrap resampling",
    )
    report.add_argument(
        "--compare_checkpoint",
        nargs="+",
        type=checkpoint,
        metavar="STEP",
        help="the checkpoint of --compare (default: the same as for --workdir)",
    )

    add_search_options(parser)


def run(options: argparse.Namespace) -> None:
    """Translates, scores and prints; raises ValueError or OSError that says what to do."""
    search = search_settings(options)
    if options.compare_checkpoint and not options.compare:
        raise ValueError("--compare_checkpoint needs --compare: name the work directory of that checkpoint with it")
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
        check_output("--translations", options.translations, inputs, workdirs)
    sources, references = _read(options)
    metrics = _metrics(options.tokenize or _default_tokenizer(options, references), references)
    # All models are loaded before any translates, so that a wrong path is found now and not after hours.
    translators = in_languages([load_translator(each, options) for each in models], options)
    for translator in translators:
        translator.vocabularies.target.encode([""])  # reports a language that lacks before a file is written
    systems: list[System] = []
    for each, translator in zip(models, translators, strict=True):
        translations, seconds = _translate(translator, sources, search, options.seed)
        if options.translations and not systems:
            with open_output(options.translations) as file:
                file.writelines(f"{in_one_line(translation)}\n".encode() for translation in translations)
        translations = list(map(comparable, translations))
        scores = {name: metric.corpus_score(translations, [references]) for name, metric in metrics.items()}
        systems.append(System(each, translations, seconds, scores))
    p_values: dict[str, float] = {}
    signatures = {name: str(metric.get_signature()) for name, metric in metrics.items()}
    if len(systems) == 2:
        p_values, signatures = _compare(systems, references, metrics)
    show = _print_json if options.output == "json" else _print_text
    show(systems, p_values, signatures, in_words(search))


def _metrics(tokenize: str, references: list[str]) -> dict[str, Metric]:
    bleu = make_bleu(tokenize, "--tokenize")
    warn_of_missing_spaces(tokenize, references, "--tokenize")
    return {"BLEU": bleu, "chrF": CHRF(), "TER": TER()}


def _default_tokenizer(options: argparse.Namespace, references: list[str]) -> str:
    """The tokeniser that all trainings used, or one for the script of the references where they differ."""
    # jax loads here, so that a mistake in the options is reported at once.
    from flax_transformer.workdir import WorkDirectory

    chosen = set()
    for workdir in [*options.workdir, *(options.compare or [])]:
        with explain_damage(workdir):
            config = WorkDirectory(workdir).read_config()
        # A converted model has no training section, and an older training chose none.
        chosen.add(config.get("training", {}).get("evaluation", {}).get("tokenize", "auto"))
    return chosen.pop() if len(chosen) == 1 and "auto" not in chosen else choose_tokenizer(references)


def _inputs(options: argparse.Namespace) -> list[Named]:
    """All files of the test set, with the options that name them."""
    if options.corpus and not (options.source or options.reference):
        return [("--corpus", file) for file in corpus_files(options.corpus)]
    if options.corpus or not (options.source and options.reference):
        raise ValueError("there must be one test set: give --source and --reference, or --corpus alone")
    return [("--source", options.source), ("--reference", options.reference)]


def _read(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The source sentences and their references."""
    if options.corpus:
        corpus = load_corpus(options.corpus)
        return corpus.source, list(map(comparable, corpus.target))
    files = (options.source, options.reference)
    count_lines(*files)
    pairs = list(read_pairs(*files))
    if not pairs:
        raise ValueError(f"{options.source} is empty: give a test set that has sentences")
    return [source for source, _ in pairs], [comparable(reference) for _, reference in pairs]


def _translate(translator: Any, sources: list[str], search: SearchSettings, seed: int) -> tuple[list[str], float]:
    """The translations, and the seconds that they took."""
    translations: list[str] = []
    begun, unreadable = time.perf_counter(), UnreadableSentences(translator.vocabularies.source)
    with progress_bar(len(sources)) as bar, unreadable.warning_once():
        for chunk in in_chunks(sources, CHUNK):
            unreadable.add(chunk)
            translations += translator.translate(chunk, search, seed=(seed + len(translations)) % 2**32)
            bar.update(len(chunk))
    return translations, time.perf_counter() - begun


def _compare(
    systems: Sequence[System], references: list[str], metrics: dict[str, Metric]
) -> tuple[dict[str, float], dict[str, str]]:
    """For each metric the probability that equally good systems differ this much, and the signature of that test.

    It is sacrebleu's paired bootstrap; but where two systems do not differ it is 1, not sacrebleu's "never by chance".
    """
    named = [(str(number), system.translations) for number, system in enumerate(systems)]
    signatures, results = PairedTest(named, metrics, [references], test_type="bs")()
    p_values = {}
    for name, score in systems[0].scores.items():
        differ = score.score != systems[1].scores[name].score
        p_values[name] = cast(float, cast(Result, results[score.name][1]).p_value) if differ else 1.0
    return p_values, {name: str(signatures[score.name]) for name, score in systems[0].scores.items()}


def _print_text(
    systems: Sequence[System], p_values: Mapping[str, float], signatures: Mapping[str, str], search: str
) -> None:
    print("".join(f"{name:>8}" for name in signatures) + f"{'length':>8}{'sentences/s':>13}")
    for system in systems:
        scores = "".join(f"{score.score:8.2f}" for score in system.scores.values())
        print(f"{scores}{system.length:8.3f}{system.speed:13.1f}   {system.name}")
    if p_values:
        print("".join(f"{p_value:8.3f}" for p_value in p_values.values()) + f"{'':21}   p-value, paired bootstrap")
    print()
    for name, p_value in p_values.items():
        print(_verdict(name, systems, p_value))
    if p_values:
        print()
    for name, signature in signatures.items():
        print(f"{name:<6}{signature}")
    print(f"translated with {search}")


def _verdict(name: str, systems: Sequence[System], p_value: float) -> str:
    """A sentence that says what a p-value means."""
    difference = systems[1].scores[name].score - systems[0].scores[name].score
    if difference == 0:
        return f"{name}: both score the same."
    better = systems[(difference > 0) != (name in LESS_IS_BETTER)].name
    if p_value < SIGNIFICANT:
        standing, how_often = "better by {:.2f}, significantly", "would rarely"
    else:
        standing, how_often = "ahead by {:.2f}, not significantly", "could easily"
    standing = standing.format(abs(difference))
    by_chance = f"equally good models {how_often} differ this much by chance (p = {p_value:.3f})"
    return f"{name}: {better} is {standing}: {by_chance}."


def _print_json(
    systems: Sequence[System], p_values: Mapping[str, float], signatures: Mapping[str, str], search: str
) -> None:
    """One object: the first system's scores, and under "compare" the second's with the p-values."""
    described = [
        {
            "models": [{"workdir": workdir, "checkpoint": step} for workdir, step in system.models],
            **{name.lower(): score.score for name, score in system.scores.items()},
            "length_ratio": system.length,
            "sentences": len(system.translations),
            "seconds": system.seconds,
            "sentences_per_second": system.speed,
        }
        for system in systems
    ]
    report = described[0] | {
        "search": search,
        "signatures": {name.lower(): signature for name, signature in signatures.items()},
    }
    if p_values:
        report["compare"] = described[1] | {"p_values": {name.lower(): p_value for name, p_value in p_values.items()}}
    print(json.dumps(report, indent=2))  # ASCII alone, which is JSON in every terminal's encoding

"""Scores the translations of a test set by one system or two, compares them, and prints the report of `evaluate`.

A system is a model, an ensemble, or a file of translations that something else has made.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from sacrebleu.metrics import CHRF, TER
from sacrebleu.metrics.base import Metric, Score
from sacrebleu.metrics.bleu import BLEUScore
from sacrebleu.significance import PairedTest, Result

from flax_transformer.bleu import choose_tokenizer, has_han_or_kana, make_bleu, warn_of_missing_spaces
from flax_transformer.text.spelling import comparable, in_one_line, is_blank

METRICS = ("bleu", "chrf", "ter", "comet")
COMET_MODEL = "Unbabel/wmt22-comet-da"
# A difference with a smaller p-value is called significant, as is usual.
SIGNIFICANT = 0.05
# With fewer sentences, how much systems differ depends on which sentences were chosen.
FEW = 50
LESS_IS_BETTER = ("TER",)


@dataclasses.dataclass(frozen=True)
class System:
    """The translations of the test set by one system.

    Attributes:
        name: what it is, for a person.
        described: the same for a program: its models, or its file.
        translations: of each sentence.
        seconds: how long translating took, compiling included; `None` for a file.
    """

    name: str
    described: Mapping[str, Any]
    translations: Sequence[str]
    seconds: float | None = None


class Comet:
    """COMET (Rei et al., 2022), computed by the command comet-score of the package unbabel-comet; a percentage here.

    The package needs NumPy 1 and jax needs NumPy 2, so it is in an environment of its own.
    """

    def __init__(self) -> None:
        """Scores a sentence; raises ValueError if the command is not there, or cannot have its model."""
        command = shutil.which("comet-score")
        if command is None:
            raise ValueError(
                "--metrics comet needs the command comet-score of the package unbabel-comet, which does not fit into "
                "one environment with jax: install it as docs/quality.md says, or leave comet out"
            )
        self._command = command
        self.score([("a", "a", "a")])  # before hours of translating

    def score(self, triples: Iterable[tuple[str, str, str]]) -> float:
        """The mean over sources, translations and references, from 0 to about 100; raises ValueError if it fails."""
        with tempfile.TemporaryDirectory() as folder:
            command = [self._command, f"--model={COMET_MODEL}", "--gpus=0", "--quiet", "--only_system"]
            for name, texts in zip(("sources", "translations", "references"), zip(*triples, strict=True), strict=True):
                file = Path(folder) / name
                file.write_text("".join(f"{in_one_line(text)}\n" for text in texts), "utf-8", errors="replace")
                command.append(f"--{name}={file}")
            done = subprocess.run(command, capture_output=True, text=True)
        found = re.search(r"score: (\S+)\s*\Z", done.stdout)
        if done.returncode or not found:
            *_, reason = done.stderr.strip().rsplit("\n", 1)
            raise ValueError(
                f"comet-score failed ({reason or 'without a message'}): see whether it is installed as docs/quality.md "
                f"says, has memory, and can download {COMET_MODEL} when it is first used, or leave comet out"
            )
        return 100 * float(found[1])


class Judge:
    """The metrics, and the test set that they judge by.

    Attributes:
        names: of the metrics, as in the report.
    """

    def __init__(
        self,
        sources: Sequence[str],
        references: Sequence[Sequence[str]],
        metrics: Sequence[str] = ("bleu", "chrf", "ter"),
        *,
        tokenize: str = "",
        chrf_word_order: int = 0,
    ):
        """Makes the metrics.

        Args:
            sources: the N sentences.
            references: for each of several translators, the N translations; a blank one counts for nothing where
                another translator has one.
            metrics: which of `METRICS`.
            tokenize: sacrebleu's tokeniser for BLEU; "" chooses it by the script of the references.
            chrf_word_order: n-grams of words up to this length count too in chrF: 0, 1 (chrF+) or 2 (chrF++).

        Raises:
            ValueError: the tokeniser or COMET lacks a package or data.
        """
        self._sources = sources
        self._references = _without_blanks([list(map(comparable, each)) for each in references])
        self._sacrebleu: dict[str, Metric] = {}
        there = [text for text in self._references[0] if text is not None]
        if "bleu" in metrics:
            tokenize = tokenize or choose_tokenizer(there)
            self._sacrebleu["BLEU"] = make_bleu(tokenize, "--tokenize")
            warn_of_missing_spaces(tokenize, there, "--tokenize")
        if "chrf" in metrics:
            self._sacrebleu["chrF" + chrf_word_order * "+"] = CHRF(word_order=chrf_word_order)
        if "ter" in metrics:
            self._sacrebleu["TER"] = _make_ter(there)
        self._comet = Comet() if "comet" in metrics else None
        self.names = [*self._sacrebleu, *(["COMET"] if self._comet else [])]

    def scores(self, system: System) -> dict[str, Score]:
        """A system's scores, by metric."""
        translations = list(map(comparable, system.translations))
        found: dict[str, Score] = {
            name: metric.corpus_score(translations, self._references) for name, metric in self._sacrebleu.items()
        }
        if self._comet:
            found["COMET"] = Score(
                "COMET",
                self._comet.score(
                    (source, translation, reference)
                    for references in self._references
                    for source, translation, reference in zip(self._sources, translations, references, strict=True)
                    if reference is not None
                ),
            )
        return found

    def signatures(self) -> dict[str, str]:
        """What the metrics computed, for others who repeat it; there is one after `scores` has been called."""
        found = {name: str(metric.get_signature()) for name, metric in self._sacrebleu.items()}
        return found | ({"COMET": f"{COMET_MODEL}, half precision"} if self._comet else {})

    def compare(
        self, systems: Sequence[System], scores: Sequence[Mapping[str, Score]]
    ) -> tuple[dict[str, float], dict[str, str]]:
        """For each of sacrebleu's metrics the probability that equally good systems differ this much.

        It is sacrebleu's paired bootstrap; but where two systems do not differ, and for a single sentence, it is 1, not
        sacrebleu's "never by chance".

        Returns:
            The probabilities, and the signatures of the tests.
        """
        if not self._sacrebleu:
            return {}, self.signatures()
        named: list[tuple[str, Sequence[str]]] = [
            (str(number), list(map(comparable, each.translations))) for number, each in enumerate(systems)
        ]
        if len(self._sources) < FEW:
            warnings.warn(
                f"{len(self._sources)} sentences are too few to say which system is better: give at least {FEW}, and "
                "better some hundreds",
                stacklevel=3,
            )
        signatures, results = PairedTest(named, self._sacrebleu, self._references, test_type="bs")()
        p_values, tested = {}, self.signatures()
        for name in self._sacrebleu:
            score = scores[0][name]
            differ = score.score != scores[1][name].score and len(self._sources) > 1
            p_values[name] = cast(float, cast(Result, results[score.name][1]).p_value) if differ else 1.0
            tested[name] = str(signatures[score.name])
        return p_values, tested


def _without_blanks(references: Sequence[Sequence[str]]) -> list[list[Any]]:  # sacrebleu's types do not have None
    """The references with `None`, which sacrebleu leaves out, for each that is blank if another one is not."""
    rows = [
        [None if is_blank(text) and not all(map(is_blank, texts)) else text for text in texts]
        for texts in zip(*references, strict=True)
    ]
    return [list(column) for column in zip(*rows, strict=True)]


def _make_ter(references: Sequence[str]) -> TER:
    """TER, which counts characters as words in Chinese and Japanese; warns of other scripts without spaces."""
    if choose_tokenizer(references) in ("zh", "ja-mecab", "char"):
        if has_han_or_kana(references):
            return TER(normalized=True, asian_support=True)
        warnings.warn(
            "TER divides words at spaces, and the script of the references has none between words: TER says little; "
            "look at chrF",
            stacklevel=3,
        )
    return TER()


def report(judge: Judge, systems: Sequence[System], search: str, *, as_json: bool) -> str:
    """What `evaluate` prints of one system, or of two and their difference."""
    scores = [judge.scores(system) for system in systems]
    p_values, signatures = judge.compare(systems, scores) if len(systems) == 2 else ({}, judge.signatures())
    show = _json if as_json else _text
    return show(systems, scores, p_values, signatures, search)


def _length_ratio(scores: Mapping[str, Score]) -> float | None:
    """The translations' tokens divided by the references', as BLEU counts them."""
    return cast(BLEUScore, scores["BLEU"]).ratio if "BLEU" in scores else None


def _speed(system: System) -> float | None:
    return len(system.translations) / system.seconds if system.seconds else None


def _text(
    systems: Sequence[System],
    scores: Sequence[Mapping[str, Score]],
    p_values: Mapping[str, float],
    signatures: Mapping[str, str],
    search: str,
) -> str:
    lines = ["".join(f"{name:>8}" for name in scores[0]) + f"{'length':>8}{'sentences/s':>13}"]
    for system, found in zip(systems, scores, strict=True):
        ratio, speed = _length_ratio(found), _speed(system)
        columns = "".join(f"{score.score:8.2f}" for score in found.values())
        columns += f"{'' if ratio is None else f'{ratio:.3f}':>8}{'' if speed is None else f'{speed:.1f}':>13}"
        lines.append(f"{columns}   {system.name}")
    if p_values:
        columns = "".join(f"{p_values[name]:8.3f}" if name in p_values else " " * 8 for name in scores[0])
        lines += [columns + f"{'':21}   p-value, paired bootstrap", ""]
        lines += [_verdict(name, systems, scores, p_value) for name, p_value in p_values.items()]
    lines += ["", *(f"{name:<7}{signature}" for name, signature in signatures.items())]
    if any(system.seconds for system in systems):
        lines.append(f"translated with {search}")
    return "\n".join(lines)


def _verdict(name: str, systems: Sequence[System], scores: Sequence[Mapping[str, Score]], p_value: float) -> str:
    """A sentence that says what a p-value means."""
    difference = scores[1][name].score - scores[0][name].score
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


def _json(
    systems: Sequence[System],
    scores: Sequence[Mapping[str, Score]],
    p_values: Mapping[str, float],
    signatures: Mapping[str, str],
    search: str,
) -> str:
    """One object: the first system's scores, and under "compare" the second's with the p-values."""
    entries: list[dict[str, Any]] = []
    for system, found in zip(systems, scores, strict=True):
        entry = {**system.described, **{name.lower(): score.score for name, score in found.items()}}
        entry |= {"length_ratio": _length_ratio(found), "sentences": len(system.translations)}
        if system.seconds:
            entry |= {"seconds": system.seconds, "sentences_per_second": _speed(system)}
        entries.append(entry)
    first, *others = entries
    first |= {"search": search, "signatures": {name.lower(): signature for name, signature in signatures.items()}}
    for other in others:
        first["compare"] = other | {"p_values": {name.lower(): p_value for name, p_value in p_values.items()}}
    return json.dumps(first, indent=2)  # ASCII alone, which is JSON in every terminal's encoding

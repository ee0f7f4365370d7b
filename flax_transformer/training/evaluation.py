"""Scores a model on a held-out corpus, by loss, BLEU, chrF and exact matches, and prints the results."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Sequence

import jax
import sacrebleu
from jaxtyping import PyTree

from flax_transformer.bleu import choose_tokenizer, make_bleu
from flax_transformer.config import TransformerConfig
from flax_transformer.data.batch import Batch
from flax_transformer.data.corpus import ParallelText
from flax_transformer.data.pipeline import PackedCorpus
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.settings import BeamSearch, in_words
from flax_transformer.decoding.translator import Translator
from flax_transformer.decoding.unreadable import UnreadableSentences, UnreadableWarning
from flax_transformer.experiment import EvaluationConfig
from flax_transformer.monitoring.report import TITLES, format_score
from flax_transformer.processes import hosts
from flax_transformer.text.spelling import comparable
from flax_transformer.trained_model import TrainedModel
from flax_transformer.training.loss import LossSums


@dataclasses.dataclass(frozen=True)
class Scores:
    """How well a corpus was translated.

    Attributes:
        loss: cross-entropy in nats per target token.
        bleu: cased, detokenised BLEU, from 0 to 100.
        chrf: chrF2, from 0 to 100.
        exact_match: percentage of translations that equal the reference exactly.
        sentences: how many sentences were translated.
        signature: sacrebleu's signature of the BLEU score.
    """

    loss: float
    bleu: float
    chrf: float
    exact_match: float
    sentences: int
    signature: str


def score_translations(
    translations: Sequence[str], references: Sequence[str], loss: float, *, tokenize: str = "auto"
) -> Scores:
    """Compares each translation with its reference.

    Args:
        translations: by a model.
        references: one for each translation.
        loss: copied to the result.
        tokenize: as in `EvaluationConfig`.
    """
    translations, references = list(map(comparable, translations)), list(map(comparable, references))
    tokenize = choose_tokenizer(references) if tokenize == "auto" else tokenize
    bleu = make_bleu(tokenize, "training.evaluation.tokenize")
    bleu_score = bleu.corpus_score(translations, [references]).score
    exact = sum(ours == theirs for ours, theirs in zip(translations, references, strict=True))
    return Scores(
        loss=loss,
        bleu=bleu_score,
        chrf=sacrebleu.CHRF().corpus_score(translations, [references]).score,
        exact_match=100 * exact / len(references),
        sentences=len(references),
        signature=str(bleu.get_signature()),
    )


class Evaluation:
    """One held-out corpus, prepared to be scored several times during training."""

    def __init__(
        self,
        text: ParallelText,
        packed: PackedCorpus,
        vocabularies: VocabularyPair,
        model_config: TransformerConfig,
        config: EvaluationConfig,
        eval_step: Callable[[PyTree, Batch], LossSums],
        as_whole: Callable[[PyTree], PyTree] = lambda params: params,
        *,
        sentences: int = 0,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Prepares the corpus.

        Args:
            text: the corpus.
            packed: the same corpus, tokenised and packed.
            vocabularies: of both sides.
            model_config: the model's config.
            config: has the beam size, alpha and BLEU's tokeniser.
            eval_step: the compiled function from parameters and a batch to summed losses.
            as_whole: gathers the parameters that `eval_step` takes on one device of this process.
            sentences: how many sentences to translate; 0 means all.
            devices: which of this process's devices translate; all if not given.
        """
        count = sentences or len(text)
        self.source = text.source[:count]
        languages, self.references = vocabularies.target.split_languages(text.target[:count])
        self._languages = vocabularies.target.fill_languages(languages, self.references)
        self._packed, self._vocabularies = packed, vocabularies
        if hosts.is_first():
            unreadable = UnreadableSentences(vocabularies.source)
            unreadable.add(self.source)
            unreadable.warn()
        self._model_config, self._config = model_config, config
        self._eval_step, self._as_whole, self._devices = eval_step, as_whole, devices
        self.search = BeamSearch(beam_size=config.beam_size, alpha=config.alpha)

    def score(self, params: PyTree, *, after_each: Callable[[], None] = lambda: None) -> tuple[Scores, list[str]]:
        """Returns the scores of these parameters, and the translations; with several processes, the same on each.

        Args:
            params: the model's parameters.
            after_each: called after each batch that was scored and each sentence that was translated; an exception in
                it ends the evaluation.
        """
        parts = []
        for batch in self._packed.one_epoch():
            parts.append(jax.device_get(self._eval_step(params, batch)))
            after_each()
        sums = jax.tree.map(lambda *values: float(sum(values)), *parts)
        translations = self._translate(self._as_whole(params), after_each)
        loss = sums.cross_entropy / sums.tokens
        scores = score_translations(translations, self.references, loss, tokenize=self._config.tokenize)
        return scores, translations

    def _translate(self, params: PyTree, after_each: Callable[[], None]) -> list[str]:
        """Translates the source sentences; each process translates its share."""
        translator = Translator(TrainedModel(self._model_config, params, self._vocabularies), devices=self._devices)
        mine, languages = (each[hosts.index() :: hosts.count()] for each in (self.source, self._languages))
        # Closed at once, it gives the memory of its slots back to training.
        with contextlib.closing(translator), warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreadableWarning)  # __init__ has warned once
            share = translator.translate(mine, self.search, prefixes=languages, after_each=after_each)
        translations = [""] * len(self.source)
        for number, made in enumerate(hosts.gather(share)):
            translations[number :: hosts.count()] = made
        return translations


def show_samples(source: Sequence[str], references: Sequence[str], translations: Sequence[str], count: int) -> None:
    """Prints the first `count` sources, each with its reference and its translation."""
    for triple in list(zip(source, references, translations, strict=True))[:count]:
        print()
        for name, text in zip(("source", "reference", "translation"), triple, strict=True):
            print(f"  {name:>11}  {text}")


def show_test(weights: str, scores: Scores, *, search: BeamSearch, metric: str, seconds: float) -> None:
    """Prints the scores of the test corpus; the last line has the score that chose the checkpoint.

    Args:
        weights: which weights were tested, in words.
        scores: the scores of the test corpus.
        search: with which it was translated.
        metric: `training.evaluation.best_metric`.
        seconds: how long training took.
    """
    found = f"BLEU {scores.bleu:.1f}, chrF {scores.chrf:.1f}, loss {scores.loss:.3f}"
    print(f"\ntest corpus, {weights}, {in_words(search)}: {found}")
    print(f"BLEU signature: {scores.signature}")
    corpus = (
        f"of {scores.sentences} held-out phrases" if metric == "exact_match" else f"on {scores.sentences} sentences"
    )
    value = format_score(metric, getattr(scores, metric))
    print(f"{TITLES[metric]}: {value} {corpus}, trained in {seconds:.0f} s", flush=True)

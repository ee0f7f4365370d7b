"""Takes parameters and a held-out corpus and leaves its scores and a few translations to look at."""

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
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.decoding.unreadable import UnreadableSentences, UnreadableWarning
from flax_transformer.experiment import TrainingConfig
from flax_transformer.positions import check_length
from flax_transformer.text.spelling import comparable
from flax_transformer.trained_model import TrainedModel
from flax_transformer.training import hosts
from flax_transformer.training.loss import LossSums


@dataclasses.dataclass(frozen=True)
class Scores:
    """How well a corpus was translated.

    Attributes:
        loss: cross-entropy, nats a target token.
        bleu: cased, detokenised BLEU, 0 to 100.
        chrf: chrF2, 0 to 100.
        exact_match: translations equal to the reference to the letter, percent.
        sentences: how many were translated.
        signature: sacrebleu's, of the BLEU.
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
    """Compares translations with references, one each.

    Args:
        translations: what a model said.
        references: what it should have said.
        loss: handed on.
        tokenize: as in `TrainingConfig`.
    """
    translations, references = list(map(comparable, translations)), list(map(comparable, references))
    tokenize = choose_tokenizer(references) if tokenize == "auto" else tokenize
    bleu = make_bleu(tokenize, "training.tokenize")
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
    """One held-out corpus, ready to be scored again and again."""

    def __init__(
        self,
        text: ParallelText,
        packed: PackedCorpus,
        vocabularies: VocabularyPair,
        model_config: TransformerConfig,
        config: TrainingConfig,
        eval_step: Callable[[PyTree, Batch], LossSums],
        as_whole: Callable[[PyTree], PyTree] = lambda params: params,
        *,
        sentences: int = 0,
    ):
        """Takes the corpus and the ways to score it.

        Args:
            text: the corpus.
            packed: the same, tokenised and packed.
            vocabularies: of both sides.
            model_config: the model's.
            config: beam, alpha and the tokeniser of BLEU.
            eval_step: compiled, from parameters and a batch to summed losses.
            as_whole: from parameters as `eval_step` takes them to the same, whole on a device of this process.
            sentences: how many of the corpus are translated; 0 is all.

        Raises:
            ValueError: positions are learned and a source sentence has more of them.
        """
        if model_config.positions == "learned":
            # Now, not when the first evaluation comes: translating has no way around a sentence that does not fit.
            check_length(int(packed.source.lengths.max()), model_config.max_length)
        count = sentences or len(text)
        self.source, self.references = text.source[:count], text.target[:count]
        self._packed, self._vocabularies = packed, vocabularies
        if hosts.is_first():
            unreadable = UnreadableSentences(vocabularies.source)
            unreadable.add(self.source)
            unreadable.warn()
        self._model_config, self._config = model_config, config
        self._eval_step, self._as_whole = eval_step, as_whole

    def score(self, params: PyTree, *, after_batch: Callable[[], None] = lambda: None) -> tuple[Scores, list[str]]:
        """The scores under these parameters, and the translations; on several processes the same on each.

        Args:
            params: of the model.
            after_batch: called after each batch that was scored or translated; what it raises ends the evaluation.
        """
        parts = []
        for batch in self._packed.one_epoch():
            parts.append(jax.device_get(self._eval_step(params, batch)))
            after_batch()
        sums = jax.tree.map(lambda *values: float(sum(values)), *parts)
        translations = self._translate(self._as_whole(params), after_batch)
        loss = sums.cross_entropy / sums.tokens
        scores = score_translations(translations, self.references, loss, tokenize=self._config.tokenize)
        return scores, translations

    def _translate(self, params: PyTree, after_batch: Callable[[], None]) -> list[str]:
        """The translations of the source; each process makes its share."""
        translator = Translator(TrainedModel(self._model_config, params, self._vocabularies))
        search = BeamSearch(beam_size=self._config.beam_size, alpha=self._config.alpha)
        mine = self.source[hosts.index() :: hosts.count()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreadableWarning)  # said once, when the evaluation was made
            share = translator.translate(mine, search, after_batch=after_batch)
        translations = [""] * len(self.source)
        for number, made in enumerate(hosts.gather(share)):
            translations[number :: hosts.count()] = made
        return translations

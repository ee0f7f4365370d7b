"""`Translator`, which translates, scores and aligns sentences with trained models and their vocabulary."""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence

import jax
from etils import epath
from jaxtyping import PyTree

from flax_transformer.config import TransformerConfig
from flax_transformer.data.sentencepiece_vocabulary import INCOMPLETE
from flax_transformer.decoding.drafts import Draft, given_tokens
from flax_transformer.decoding.engine import Engine, check_streaming
from flax_transformer.decoding.ensemble import Ensemble
from flax_transformer.decoding.inspection import Inspector
from flax_transformer.decoding.mbr import rank_by_agreement
from flax_transformer.decoding.requests import Output
from flax_transformer.decoding.results import Alignment, Translation
from flax_transformer.decoding.scoring import Scorer
from flax_transformer.decoding.settings import BeamSearch, Sampling, SearchSettings
from flax_transformer.decoding.shortlist import Shortlist
from flax_transformer.decoding.texts import Texts, as_list
from flax_transformer.decoding.unknown import Align, find_copies
from flax_transformer.decoding.writing import write_translation
from flax_transformer.text.splitting import join_parts
from flax_transformer.trained_model import TrainedModel

BEAM = BeamSearch()
GREEDY = BeamSearch(beam_size=1)


class Translator:
    """Translates sentences with a model, or with an ensemble that averages the probabilities of several models.

    A model for many languages, such as NLLB, needs to know the language of each text. A text that begins with the token
    of a language ("kan_Knda ನಮಸ್ಕಾರ") is in that language; any other text is in the language that the constructor or
    `speaking` names, or in that of the work directory. This is so of sources, of targets, and of `prefixes`, in which
    a language alone may stand. The target's language counts as a token of the translation with log-probability 0.

    Models with tokens such as ">>kan<<" need one before each source, which names the language of the translation. A
    source that begins with none gets that of the target language that the constructor or `speaking` names.

    Attributes:
        vocabularies: the vocabularies of both sides.
        engine: decodes, for callers that have token ids and want to submit sentences one by one.
        inspector: shows the probabilities of other tokens and all attention weights, for callers that have token ids.
    """

    def __init__(
        self,
        models: TrainedModel | Sequence[TrainedModel],
        *,
        batch_tokens: int = 4096,
        devices: Sequence[jax.Device] | None = None,
        shortlist: Shortlist | bool = True,
        source_language: str = "",
        target_language: str = "",
    ):
        """Copies the parameters to the devices; nothing is compiled until the first sentences come.

        Args:
            models: one model, or several with the same vocabularies.
            batch_tokens: source tokens of the sentences that are translated at once, including padding.
            devices: the devices that share them; all devices of this process if not given.
            shortlist: the target tokens among which translations are searched: true for the models' own shortlist if
                they have one, false for all tokens, or another shortlist. Scores and alignments of given translations
                do not depend on it.
            source_language: the language of sources, e.g. "kan_Knda"; only for models with tokens of languages.
            target_language: the language of translations.

        Raises:
            ValueError: there is no model, their vocabularies or shortlists differ, the shortlist was made for another
                vocabulary, or they do not know a language.
        """
        models = [models] if isinstance(models, TrainedModel) else list(models)
        if not models:
            raise ValueError("a translator needs at least one model, and the list of models is empty: add one")
        self.vocabularies = models[0].vocabularies.translating(source_language, target_language)
        for number, model in enumerate(models[1:], 2):
            others = model.vocabularies.translating(source_language, target_language)
            if others.fingerprint() != self.vocabularies.fingerprint():
                raise ValueError(
                    f"model {number} has a different vocabulary from model 1: an ensemble averages the probabilities "
                    "of the same pieces, so train its models with one vocabulary"
                )
        self._ensemble = Ensemble.on_devices(
            [model.config for model in models],
            [model.params for model in models],
            jax.local_devices() if devices is None else devices,
        )
        self.engine = Engine(self._ensemble, batch_tokens=batch_tokens, shortlist=_shortlist(models, shortlist))
        self.inspector = Inspector(self._ensemble)
        self._scorer = Scorer(self._ensemble, batch_tokens=batch_tokens)

    @property
    def config(self) -> TransformerConfig:
        """The configuration of the model, or of the first model of an ensemble."""
        return self._ensemble.configs[0]

    @property
    def params(self) -> PyTree:
        """The parameters of the model, or of the first model of an ensemble."""
        return self._ensemble.params(0)

    @classmethod
    def from_workdir(
        cls,
        path: epath.PathLike,
        *,
        step: str | int = "chosen",
        batch_tokens: int = 4096,
        devices: Sequence[jax.Device] | None = None,
        shortlist: Shortlist | bool = True,
        source_language: str = "",
        target_language: str = "",
    ) -> "Translator":
        """Loads the model of a work directory; for an ensemble pass several `TrainedModel.load(path)` to `Translator`.

        Args:
            path: the work directory.
            step: "chosen" ("averaged" if the config's `training.weights` is "averaged" and there is an average, else
                "best"), "best" (the newest if none was scored), "latest", "averaged" or the number of a checkpoint. If
                `training.weights` is "ema", the checkpoint's moving average is loaded.
            batch_tokens: as in the constructor.
            devices: as in the constructor.
            shortlist: as in the constructor.
            source_language: as in the constructor.
            target_language: as in the constructor.

        Raises:
            ValueError: the folder is not a work directory, has no such checkpoint, or has another vocabulary than the
                model; its shortlist is damaged, or another one was made for another vocabulary.
        """
        return cls(
            TrainedModel.load(path, step=step),
            batch_tokens=batch_tokens,
            devices=devices,
            shortlist=shortlist,
            source_language=source_language,
            target_language=target_language,
        )

    def speaking(self, source_language: str = "", target_language: str = "") -> "Translator":
        """A translator between these languages, which shares all else with this one; "" changes nothing.

        Where a token before the source, such as ">>kan<<", tells what to write, the source's language is not needed.

        Raises:
            ValueError: the model does not know a language, or has no tokens of languages.
        """
        other = copy.copy(self)
        other.vocabularies = self.vocabularies.translating(source_language, target_language)
        return other

    def translate(
        self,
        sentences: Texts,
        search: BeamSearch | Sampling = BEAM,
        *,
        prefixes: Texts | None = None,
        seed: int = 0,
        replace_unknown: bool = False,
        after_each: Callable[[], None] = lambda: None,
    ) -> list[str]:
        """Returns each sentence's best translation, or first sample, in order; arguments as in `hypotheses`."""
        found = self.hypotheses(
            sentences, search, prefixes=prefixes, seed=seed, replace_unknown=replace_unknown, after_each=after_each
        )
        return [translations[0].text for translations in found]

    def hypotheses(
        self,
        sentences: Texts,
        search: BeamSearch | Sampling = BEAM,
        *,
        prefixes: Texts | None = None,
        seed: int = 0,
        replace_unknown: bool = False,
        after_each: Callable[[], None] = lambda: None,
    ) -> list[list[Translation]]:
        """Returns the translations of each sentence, in order: the best first, or samples in the order they were drawn.

        A blank sentence has one empty translation. A sentence that is longer than the model's `max_length` is split at
        sentence ends, and the i-th best translations of its parts are joined, with a warning. Sentences that the
        vocabulary can hardly read, as in another script, are translated with an `UnreadableWarning`. Where the logits
        are not finite, as when float16 overflows, a translation ends, with a warning.

        Args:
            sentences: sentences of the source language, in any ordered iterable.
            search: how to search for translations, and how many to return.
            prefixes: the text with which each translation must begin; an empty one means any.
            seed: the seed of sampling; equal seeds draw equal translations, however the sentences are batched.
            replace_unknown: whether to copy into the text, in place of each unknown piece, the characters of the source
                at which the model looked when it wrote that piece; `tokens` keep the piece.
            after_each: called after each sentence; an exception from it ends the search.

        Raises:
            ValueError: `sentences` is a single string, is not ordered or contains something other than a str, or
                prefixes are too many, too few or too long.
        """
        if isinstance(search, Sampling) and search.mbr:
            samples = self.hypotheses(
                sentences,
                search.drawn,
                prefixes=prefixes,
                seed=seed,
                replace_unknown=replace_unknown,
                after_each=after_each,
            )
            return [rank_by_agreement(each)[: search.num_return] for each in samples]
        draft = self.draft(sentences, search, prefixes=prefixes, seed=seed)
        found = self.engine.search(
            draft.sources,
            search,
            prefixes=draft.prefixes,
            given=draft.given,
            rngs=draft.rngs,
            after_each=after_each,
        )
        if broken := draft.broken(found):
            warnings.warn(
                f"translations of {broken} of {len(draft)} sentences end early, because the model's logits "
                f"are not finite there: set model.dtype, which is {self.config.dtype}, to float32 in config.json; if "
                "it is float32, the parameters are damaged",
                stacklevel=2,
            )
        return self.write(draft, found, replace_unknown=replace_unknown)

    def draft(
        self,
        sentences: Texts,
        search: BeamSearch | Sampling = BEAM,
        *,
        prefixes: Texts | None = None,
        seed: int = 0,
    ) -> Draft:
        """What the engine is to decode, for callers that submit it themselves; arguments as in `hypotheses`.

        `hypotheses` is this, a search by `engine`, and `write`. It needs no device.
        """
        return Draft(self.vocabularies, self._ensemble.longest, sentences, search, prefixes=prefixes, seed=seed)

    def write(
        self,
        draft: Draft,
        found: Sequence[Sequence[Output]],
        *,
        replace_unknown: bool = False,
        align: Align | None = None,
    ) -> list[list[Translation]]:
        """The translations of each sentence of a draft.

        Args:
            draft: the draft.
            found: the outputs that the engine found for each of its sources.
            replace_unknown: as in `hypotheses`.
            align: aligns outputs that have unknown pieces, if not with this translator's own batches.
        """
        copies = None
        if replace_unknown:
            align = align or (lambda sources, targets: self._scorer.align(sources, targets, None))
            copies = find_copies(self.vocabularies, align, draft.sentences, draft.parts, draft.by_part(found))
        return draft.translations(found, copies)

    def score(self, sources: Texts, targets: Texts, search: SearchSettings = BEAM) -> list[Translation]:
        """Scores given translations by forced decoding.

        `hypotheses` gives its own the same scores, unless it split the source or chose among the tokens of a shortlist.

        Args:
            sources: sentences of the source language.
            targets: a translation of each. The vocabulary tokenises a str; a `Translation` already has token ids.
            search: supplies the length penalty of the scores.

        Raises:
            ValueError: the numbers of sources and targets differ, or one has more tokens than there are learned
                positions.
        """
        source, target = self._encode_pairs(sources, targets)
        outputs = self._scorer.score(source, target, given_tokens(self.vocabularies.target, target))
        return [write_translation(self.vocabularies.target, [output], search) for output in outputs]

    def align(self, sources: Texts, targets: Texts, *, layer: int | None = -1) -> list[Alignment]:
        """Returns how much each token of given translations attends to each source token.

        Args:
            sources: sentences of the source language.
            targets: a translation of each, as in `score`.
            layer: the decoder layer; -1 is the last. `None` chooses for each pair the layer whose heads agree most, and
                gives heads that are sure more weight, which aligns words better than their mean.

        Raises:
            ValueError: as in `score`, or there is no such layer.
        """
        layers = min(config.num_decoder_layers for config in self._ensemble.configs)
        if layer is not None and not -layers <= layer < layers:
            raise ValueError(f"layer is {layer}, the decoder has {layers}: choose one from {-layers} to {layers - 1}")
        source, target = self._encode_pairs(sources, targets)
        return [
            Alignment(
                tuple(self.vocabularies.source.pieces(source_ids)),
                tuple(self.vocabularies.target.pieces(target_ids)),
                weights,
            )
            for source_ids, target_ids, weights in zip(
                source, target, self._scorer.align(source, target, layer), strict=True
            )
        ]

    def stream(self, sentence: str, search: BeamSearch | Sampling = GREEDY, *, seed: int = 0) -> Iterator[str]:
        """Yields the translation of one sentence piece by piece, as its tokens are chosen.

        Args:
            sentence: a sentence of the source language.
            search: greedy search, or sampling of one translation.
            seed: the seed of sampling.

        Raises:
            ValueError: the search has several hypotheses, so no token is certain before its end.
        """
        check_streaming(search)
        (sentence,) = as_list("sentence", [sentence])
        return self._stream(sentence, search, seed)

    def compile(self, search: BeamSearch | Sampling = BEAM, *, longest: int = 64, sentences: int | None = None) -> None:
        """Compiles in advance what translating will need; a persistent compilation cache keeps it for later processes.

        An output that is much longer than its source may still require a program to be compiled.

        Args:
            search: the search that `translate` will be called with.
            longest: the maximum length of a source, in tokens.
            sentences: how many sentences of each length one call will have; enough to fill batches if not given.
        """
        self.engine.compile(search, longest=longest, sentences=sentences)

    def close(self) -> None:
        """Ends the thread that translates; calls that still wait get an error, and so does every later search.

        A translator that is not closed lets its thread end, and the memory of the search go, a few seconds after its
        last sentence.
        """
        self.engine.close()

    def _stream(self, sentence: str, search: BeamSearch | Sampling, seed: int) -> Iterator[str]:
        done: list[str] = []
        told = ""
        draft = self.draft([sentence], search, seed=seed)
        for number in range(len(draft.sources)):
            (request,) = draft.submit(self.engine, [number], streams=True)
            try:
                text = ""
                for ids in request:
                    (text,) = self.vocabularies.target.decode([ids])
                    # The first bytes of a character that is spelled in bytes are not text yet.
                    whole = join_parts([*done, text.rstrip(INCOMPLETE)])
                    yield whole[len(told) :]
                    told = whole
            finally:
                request.cancel()
            done.append(text)
            if rest := join_parts(done)[len(told) :]:
                yield rest
                told += rest

    def _encode_pairs(self, sources: Texts, targets: Texts) -> tuple[list[list[int]], list[list[int]]]:
        sources, targets = as_list("sources", sources), as_list("targets", targets, also=Translation)
        if len(sources) != len(targets):
            raise ValueError(f"there are {len(targets)} targets for {len(sources)} sources: give one for each")
        encode = self.vocabularies.target.encode
        return self.vocabularies.source.encode(sources), [
            encode([target])[0] if isinstance(target, str) else list(target.ids) for target in targets
        ]


def _shortlist(models: Sequence[TrainedModel], wanted: Shortlist | bool) -> Shortlist | None:
    """The shortlist to search with, if any; raises ValueError if the models have different ones, or it does not fit."""
    if isinstance(wanted, Shortlist):
        wanted.check_fits(models[0].config)
        return wanted
    if not isinstance(wanted, bool):
        raise ValueError(f"shortlist is {wanted!r}: give one from read_shortlist, True or False")
    if not wanted:
        return None
    own = {model.shortlist and model.shortlist.fingerprint(): model.shortlist for model in models}
    if len(own) > 1:
        raise ValueError(
            "the models have different shortlists, or only some have one: choose one for all (shortlist=..., or "
            "--shortlist=FILE), or none (shortlist=False, or --no_shortlist)"
        )
    return models[0].shortlist

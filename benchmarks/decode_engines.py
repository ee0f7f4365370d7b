"""The engines that `decode.py` times: this library, transformers and CTranslate2, each with the same three methods."""

import tempfile
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import torch
import transformers

from benchmarks import peers
from benchmarks.report import THREADS
from flax_transformer.config import TransformerConfig
from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding import moving, slots
from flax_transformer.decoding.engine import Engine as SlotEngine
from flax_transformer.decoding.ensemble import Ensemble
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.trained_model import TrainedModel

TARGET_LENGTH = 24
ALPHA, EXTRA_LENGTH = 0.6, 50

Rows = Sequence[Sequence[int]]
Tokens = list[list[int]]
Texts = list[tuple[str, int]]


class Engine(Protocol):
    """One way to decode."""

    def decode(self, source: Rows, beam: int) -> Tokens:
        """The best outputs of a batch of `TARGET_LENGTH` tokens at most, each up to its end of sentence."""
        ...

    def translate(self, sentences: Sequence[str], beam: int) -> Texts:
        """The best translation of each sentence, and how many tokens it had."""
        ...

    def report(self) -> dict[str, Any]:
        """What else it tells of itself."""
        ...


class Ours:
    """This library: `Translator` for text, its engine for token ids."""

    def __init__(self, config: TransformerConfig, params: Any, vocabulary: Vocabulary | None, batch_tokens: int):
        self._compiled: list[float] = []
        jax.monitoring.register_event_duration_secs_listener(self._note_compilation)
        if vocabulary is None:
            ensemble = Ensemble.on_devices([config], [params], jax.local_devices())
            self._engine = SlotEngine(ensemble, batch_tokens=batch_tokens)
        else:
            pair = VocabularyPair(vocabulary, vocabulary)
            self._translator = Translator(TrainedModel(config, params, pair), batch_tokens=batch_tokens)
            self._engine = self._translator.engine

    def _note_compilation(self, event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._compiled.append(seconds)

    def decode(self, source: Rows, beam: int) -> Tokens:
        found = self._engine.search(source, _settings(beam).replace(max_length=TARGET_LENGTH))
        return [best.ids.tolist() for best, *_ in found]

    def translate(self, sentences: Sequence[str], beam: int) -> Texts:
        found = self._translator.hypotheses(sentences, _settings(beam))
        return [(best.text, len(best.ids)) for best, *_ in found]

    def report(self) -> dict[str, Any]:
        programs = (slots.encode, slots.advance, moving.move)
        return {
            "slots_filled_while_sentences_wait": self._engine.occupancy,
            "programs": sum(program._cache_size() for program in programs),  # type: ignore[attr-defined]
            "compile_s": sum(self._compiled),
        }


class InTransformers:
    """`MarianMTModel.generate`; for text on batches of sentences of like length, as its users would."""

    def __init__(self, config: TransformerConfig, params: Any, vocabulary: Vocabulary | None, batch_tokens: int):
        torch.set_num_threads(THREADS)
        transformers.logging.set_verbosity_error()
        self._config, self._vocabulary, self._batch_tokens = config, vocabulary, batch_tokens
        self._device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self._model = peers.marian_model(config, params).to(self._device, getattr(torch, config.dtype))

    def decode(self, source: Rows, beam: int, limit: int = TARGET_LENGTH) -> Tokens:
        rows = [torch.tensor(row) for row in source]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._config.pad_id)
        padded = padded.to(self._device)
        options = {"early_stopping": True, "length_penalty": ALPHA} if beam > 1 else {}
        with torch.inference_mode():
            found = self._model.generate(
                padded,
                attention_mask=(padded != self._config.pad_id).long(),
                num_beams=beam,
                max_new_tokens=limit,
                **options,
            )
        return [_up_to_end(row, self._config.eos_id) for row in found[:, 1:].tolist()]

    def translate(self, sentences: Sequence[str], beam: int) -> Texts:
        assert self._vocabulary is not None
        encoded = self._vocabulary.encode(sentences)
        outputs: Tokens = [[] for _ in sentences]
        for numbers in _batches(encoded, self._batch_tokens):
            limit = len(encoded[numbers[0]]) + EXTRA_LENGTH
            found = self.decode([encoded[number] for number in numbers], beam, limit)
            for number, row in zip(numbers, found, strict=True):
                outputs[number] = row
        return list(zip(self._vocabulary.decode(outputs), map(len, outputs), strict=True))

    def report(self) -> dict[str, Any]:
        return {}


class InCTranslate2:
    """`translate_batch`; for text it makes the batches itself."""

    compute_type = "float32"

    def __init__(self, config: TransformerConfig, params: Any, vocabulary: Vocabulary | None, batch_tokens: int):
        self._vocabulary, self._batch_tokens = vocabulary, batch_tokens
        with tempfile.TemporaryDirectory() as folder:
            self._model = peers.ctranslate2_model(
                config, params, f"{folder}/model", threads=THREADS, compute_type=self.compute_type
            )

    def decode(self, source: Rows, beam: int, limit: int = TARGET_LENGTH, batch_tokens: int = 0) -> Tokens:
        found = self._model.translate_batch(
            peers.spell(source),
            max_batch_size=batch_tokens,
            batch_type="tokens" if batch_tokens else "examples",
            beam_size=beam,
            length_penalty=ALPHA,
            min_decoding_length=0,
            max_decoding_length=limit,
            return_end_token=True,
        )
        return [[int(token) for token in each.hypotheses[0]] for each in found]

    def translate(self, sentences: Sequence[str], beam: int) -> Texts:
        assert self._vocabulary is not None
        encoded = self._vocabulary.encode(sentences)
        limit = max(map(len, encoded)) + EXTRA_LENGTH
        outputs = self.decode(encoded, beam, limit, self._batch_tokens)
        return list(zip(self._vocabulary.decode(outputs), map(len, outputs), strict=True))

    def report(self) -> dict[str, Any]:
        return {}


class InCTranslate2Int8(InCTranslate2):
    """The same with weights of eight bits, as it is usually deployed."""

    compute_type = "int8"


def _settings(beam: int) -> BeamSearch:
    """The search that the peers know: see tests/decoding/test_peer_search.py."""
    return BeamSearch(beam_size=beam, stopping="first", length_penalty="length", alpha=ALPHA, extra_length=EXTRA_LENGTH)


def _up_to_end(row: list[int], eos_id: int) -> list[int]:
    return row[: row.index(eos_id) + 1] if eos_id in row else row


def _batches(encoded: Rows, batch_tokens: int) -> list[list[int]]:
    """Sentence numbers of each batch, the longest first; a batch has so many tokens, padding included."""
    batches: list[list[int]] = []
    for number in sorted(range(len(encoded)), key=lambda number: len(encoded[number]), reverse=True):
        if not batches or (len(batches[-1]) + 1) * len(encoded[batches[-1][0]]) > batch_tokens:
            batches.append([])
        batches[-1].append(number)
    return batches


ENGINES: dict[str, Any] = {
    "flax_transformer": Ours,
    "transformers": InTransformers,
    "ctranslate2": InCTranslate2,
    "ctranslate2_int8": InCTranslate2Int8,
}

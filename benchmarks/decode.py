"""Measures how fast three engines decode with the same random weights, and reports it as JSON and as a table.

    python -m benchmarks.decode                    # 32 sentences of 20 tokens, exactly 24 tokens out
    python -m benchmarks.decode --text test.en     # real sentences, text in and text out

The engines are this library, transformers and CTranslate2. Each has its own process, because the idle threads of some
keep cores busy for a while, and they take turns, so that anything else that slows the machine down affects all of them.
The first call, which compiles, is timed separately. Run it on a machine that does nothing else.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import ctranslate2
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks import peers, report
from benchmarks.report import RESULTS, SEED, THREADS
from flax_transformer.config import TransformerConfig
from flax_transformer.data.lines import read_lines
from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.jitted import search_translations
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.trained_model import TrainedModel

ENGINES = ("flax_transformer", "transformers", "ctranslate2")
SENTENCES, SOURCE_LENGTH, TARGET_LENGTH = 32, 20, 24
ALPHA, EXTRA_LENGTH = 0.6, 50

Rows = Sequence[Sequence[int]]
Tokens = list[list[int]]
Texts = list[tuple[str, int]]


class Engine(Protocol):
    """One way to decode."""

    def decode(self, source: Rows, beam: int) -> Tokens:
        """The best outputs of a batch, each of at most `TARGET_LENGTH` tokens, up to its end of sentence."""
        ...

    def translate(self, sentences: Sequence[str], beam: int) -> Texts:
        """The best translation of each sentence, and how many tokens it had."""
        ...


class Ours:
    """This library: one compiled program for a batch, `Translator` for text."""

    def __init__(self, config: TransformerConfig, params: Any, vocabulary: Vocabulary | None, batch_tokens: int):
        self._config = config
        self._models = (jax.device_put(params),)
        if vocabulary is not None:
            pair = VocabularyPair(vocabulary, vocabulary)
            self._translator = Translator(TrainedModel(config, params, pair), batch_tokens=batch_tokens)

    def decode(self, source: Rows, beam: int) -> Tokens:
        found, _ = search_translations(
            self._models,
            jnp.asarray(source, jnp.int32),
            jnp.full(len(source), TARGET_LENGTH, jnp.int32),
            configs=(self._config,),
            settings=_settings(beam),
            max_length=TARGET_LENGTH,
        )
        return [_up_to_end(row, self._config.eos_id) for row in np.asarray(found.tokens[:, 0]).tolist()]

    def translate(self, sentences: Sequence[str], beam: int) -> Texts:
        found = self._translator.hypotheses(sentences, _settings(beam))
        return [(best.text, len(best.ids)) for best, *_ in found]


class InTransformers:
    """`MarianMTModel.generate`; text is put into batches of sentences of similar length, as its users would do."""

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


class InCTranslate2:
    """`translate_batch` in float32; it makes batches of text itself."""

    def __init__(self, config: TransformerConfig, params: Any, vocabulary: Vocabulary | None, batch_tokens: int):
        self._vocabulary, self._batch_tokens = vocabulary, batch_tokens
        with tempfile.TemporaryDirectory() as folder:
            self._model = peers.ctranslate2_model(config, params, f"{folder}/model", threads=THREADS)

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


def _settings(beam: int) -> BeamSearch:
    """The search that the peers also have; see tests/decoding/test_peer_search.py."""
    return BeamSearch(beam_size=beam, stopping="first", length_penalty="length", alpha=ALPHA, extra_length=EXTRA_LENGTH)


def _up_to_end(row: list[int], eos_id: int) -> list[int]:
    return row[: row.index(eos_id) + 1] if eos_id in row else row


def _batches(encoded: Rows, batch_tokens: int) -> list[list[int]]:
    """The sentence numbers of each batch, the longest first; a batch has at most `batch_tokens`, including padding."""
    batches: list[list[int]] = []
    for number in sorted(range(len(encoded)), key=lambda number: len(encoded[number]), reverse=True):
        if not batches or (len(batches[-1]) + 1) * len(encoded[batches[-1][0]]) > batch_tokens:
            batches.append([])
        batches[-1].append(number)
    return batches


@dataclasses.dataclass(frozen=True)
class Workload:
    """The work that every engine does.

    Attributes:
        run: returns the outputs of one engine with one beam size.
        sentences: number of sentences.
        tokens: number of tokens of an output.
    """

    run: Callable[[Engine, int], list[Any]]
    sentences: int
    tokens: Callable[[Any], int]


_in_this_process: list[Any] = []  # an engine, and its workload


def _build(name: str, config: TransformerConfig, text: "Text | None", batch_tokens: int) -> None:
    """Makes one engine, in its own process."""
    params, workload = fixed_workload(config) if text is None else text_workload(config, text)
    maker = dict(zip(ENGINES, (Ours, InTransformers, InCTranslate2), strict=True))[name]
    _in_this_process[:] = [maker(config, params, text and text.vocabulary, batch_tokens), workload]


def _run(beam: int) -> tuple[float, list[Any]]:
    """The seconds that this process's engine takes, and its outputs."""
    engine, workload = _in_this_process
    start = time.perf_counter()
    outputs = workload.run(engine, beam)
    return time.perf_counter() - start, outputs


def measure(engines: dict[str, Executor], workload: Workload, beam: int, repeats: int) -> list[dict[str, Any]]:
    """Times the engines in turn, and returns a record for each."""
    outputs, first_calls = {}, {}
    for name, engine in engines.items():
        first_calls[name], outputs[name] = engine.submit(_run, beam).result()
    reference = outputs[next(iter(engines))]
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(repeats):
        for name, engine in engines.items():
            time.sleep(0.5)  # The idle threads of the previous engine keep cores busy for a while.
            seconds[name].append(engine.submit(_run, beam).result()[0])
            print(f"beam {beam}, {name}, run {number + 1}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    records = []
    for name in engines:
        median, tokens = statistics.median(seconds[name]), sum(map(workload.tokens, outputs[name]))
        records.append(
            {
                "engine": name,
                "beam": beam,
                "sentences": workload.sentences,
                "target_tokens": tokens,
                "sentences_unlike_first_engine": sum(
                    mine != theirs for mine, theirs in zip(outputs[name], reference, strict=True)
                ),
                "first_call_s": first_calls[name],
                "seconds": seconds[name],
                "median_s": median,
                "sentences_per_s": workload.sentences / median,
                "target_tokens_per_s": tokens / median,
            }
        )
    return records


def fixed_workload(config: TransformerConfig) -> tuple[Any, Workload]:
    """Parameters whose outputs all have exactly `TARGET_LENGTH` tokens, and random sentences."""
    # Steep enough that the end of sentence is impossible before its position, and certain there.
    params = peers.random_params(config, SEED, gain=1.0, end_at=TARGET_LENGTH - 1.5, end_slope=1e5)
    rng = np.random.default_rng(SEED)
    words = rng.integers(4, config.source_vocab_size, (SENTENCES, SOURCE_LENGTH - 1))
    source = [[*map(int, row), config.eos_id] for row in words]

    def run(engine: Engine, beam: int) -> Tokens:
        outputs = engine.decode(source, beam)
        assert all(len(row) == TARGET_LENGTH for row in outputs), [len(row) for row in outputs]
        return outputs

    return params, Workload(run=run, sentences=SENTENCES, tokens=len)


@dataclasses.dataclass(frozen=True)
class Text:
    """Sentences, and the vocabulary that divides them into tokens."""

    sentences: list[str]
    vocabulary: Vocabulary


def text_workload(config: TransformerConfig, text: Text) -> tuple[Any, Workload]:
    """Parameters whose outputs are about as long as the sentences on average, and those sentences."""
    sentences, vocabulary = text.sentences, text.vocabulary
    mean = sum(map(len, vocabulary.encode(sentences))) / len(sentences)
    params = peers.random_params(config, SEED, gain=1.0, end_at=mean, end_slope=20.0, end_bias=3.0, follow_source=True)
    return params, Workload(
        run=lambda engine, beam: engine.translate(sentences, beam),
        sentences=len(sentences),
        tokens=lambda text: text[1],
    )


def table(records: list[dict[str, Any]]) -> str:
    """The records as Markdown."""
    lines = [
        "| engine | beam | first call, s | median, s | sentences/s | target tokens/s | unlike the first |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        lines.append(
            "| {engine} | {beam} | {first_call_s:.1f} | {median_s:.2f} | {sentences_per_s:.1f} "
            "| {target_tokens_per_s:.0f} | {sentences_unlike_first_engine} of {sentences} |".format(**record)
        )
    return "\n".join(lines)


def main() -> None:
    """Reads the command line, measures, writes and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.split("\n")[0])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each engine (default 5)")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="sentences, one a line, to translate end to end")
    parser.add_argument("--batch_tokens", type=int, default=2048, help="source tokens in a batch of text (2048)")
    parser.add_argument("--vocabulary_size", type=int, default=8000, help="target tokens to choose from (8000)")
    parser.add_argument("--output", type=Path, help="where the JSON goes (default benchmarks/results/...)")
    options = parser.parse_args()

    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and "ctranslate2" in options.engines and not ctranslate2.get_cuda_device_count():
        print("this CTranslate2 was built without CUDA: it is left out", file=sys.stderr)
        options.engines.remove("ctranslate2")
    config = TransformerConfig(
        source_vocab_size=options.vocabulary_size,
        target_vocab_size=options.vocabulary_size,
        positions="sinusoidal_concatenated",
        output_bias=True,
        start_id=Vocabulary.pad_id,
        dtype="bfloat16" if on_gpu else "float32",
    )
    text = None
    if options.text:
        sentences = [line for path in options.text for line in read_lines(path) if line.strip()]
        try:
            vocabulary = Vocabulary.train(sentences, VocabularyConfig(size=options.vocabulary_size))
            text = Text(sentences, vocabulary)
        except ValueError as error:
            parser.error(f"{error} (here --vocabulary_size)")
    _, workload = fixed_workload(config) if text is None else text_workload(config, text)
    machine = report.machine()
    engines = {
        name: ProcessPoolExecutor(
            1,
            mp_context=get_context("spawn"),
            initializer=_build,
            initargs=(name, config, text, options.batch_tokens),
        )
        for name in options.engines
    }
    records = [record for beam in options.beams for record in measure(engines, workload, beam, options.repeats)]
    kind = "text" if options.text else "fixed"
    path = options.output or RESULTS / f"decode_{kind}_{jax.default_backend()}.json"
    packages = ("jax", "flax", "torch", "transformers", "ctranslate2", "sentencepiece")
    measured = {"machine": machine, "model": dataclasses.asdict(config), "results": records}
    print(table(records))
    report.write(path, "benchmarks.decode", packages, measured)


if __name__ == "__main__":
    main()

"""Compares the translations of a trained model with those of its exports in CTranslate2 and transformers.

    python -m benchmarks.exports --workdir runs/multi30k --data data/multi30k/raw --test test_2016_flickr

All of them search with a beam of 4, divide scores by the length, and stop at the same length. If translations differ,
this library scores both, so that you can distinguish a tie or rounding from a mistake. An end of sentence that the
limit forces has its own probability here, but probability 1 in transformers.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import sacrebleu
import torch
import transformers
from tqdm import tqdm

from benchmarks import report
from benchmarks.report import RESULTS
from flax_transformer.commands.process import prepare_libraries
from flax_transformer.data.lines import read_lines
from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.interop.ctranslate2 import to_ctranslate2
from flax_transformer.interop.marian import to_marian
from flax_transformer.trained_model import TrainedModel

LIMIT = 64  # tokens, whatever the source
SEARCH = BeamSearch(
    beam_size=4, stopping="first", length_penalty="length", alpha=1.0, max_length=LIMIT, extra_length=LIMIT
)
PAIRS = 500
BATCH = 64


def pieces(vocabularies: VocabularyPair, side: str, lines: list[str]) -> list[list[str]]:
    """The pieces of each line of one side, without ends of sentence."""
    vocabulary = getattr(vocabularies, side)
    return [vocabulary.pieces(ids[:-1]) for ids in vocabulary.encode(lines)]


def in_ctranslate2(model: TrainedModel, folder: str, sources: list[str]) -> list[str]:
    """Its translations."""
    banned = [[piece] for piece in model.vocabularies.target.pieces(model.config.never_chosen)]
    found = ctranslate2.Translator(folder, device="cpu").translate_batch(
        pieces(model.vocabularies, "source", sources),
        beam_size=SEARCH.beam_size,
        length_penalty=SEARCH.alpha,
        min_decoding_length=0,
        max_decoding_length=LIMIT,
        suppress_sequences=banned,
        max_batch_size=BATCH,
    )
    vocabulary = model.vocabularies.target
    ids = {piece: number for number, piece in enumerate(vocabulary.all_pieces())}
    return vocabulary.decode([[ids[piece] for piece in each.hypotheses[0]] for each in found])


def in_transformers(folder: str, sources: list[str]) -> list[str]:
    """The translations of transformers' `generate`."""
    tokenizer = transformers.MarianTokenizer.from_pretrained(folder)
    model = transformers.MarianMTModel.from_pretrained(folder).eval()
    texts = []
    for begin in tqdm(range(0, len(sources), BATCH)):
        batch = tokenizer(sources[begin : begin + BATCH], return_tensors="pt", padding=True)
        with torch.inference_mode():
            options = {"num_beams": SEARCH.beam_size, "length_penalty": SEARCH.alpha, "early_stopping": True}
            options["max_new_tokens"] = LIMIT
            texts += tokenizer.batch_decode(model.generate(**batch, **options), skip_special_tokens=True)
    return texts


def differences(translator: Translator, sources: list[str], ours: list[str], theirs: list[str]) -> list[dict[str, Any]]:
    """The translations that differ, with this library's score of each."""
    places = [place for place, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]]
    if not places:
        return []
    chosen = [sources[place] for place in places]
    scores = [translator.score(chosen, [texts[place] for place in places], SEARCH) for texts in (ours, theirs)]
    return [
        {
            "line": place + 1,
            "ours": ours[place],
            "theirs": theirs[place],
            "our_score": mine.score,
            "their_score": other.score,
        }
        for place, mine, other in zip(places, *scores, strict=True)
    ]


def main() -> None:
    """Reads the command line, converts, compares, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exports", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--data", type=Path, required=True, help="a folder of TEST.en and TEST.de")
    parser.add_argument("--test", default="test_2016_flickr", help="the test set (default test_2016_flickr)")
    parser.add_argument("--output", type=Path, default=RESULTS / "exports.json")
    options = parser.parse_args()
    prepare_libraries()
    sources, references = (list(read_lines(str(options.data / f"{options.test}.{side}"))) for side in ("en", "de"))
    model = TrainedModel.load(options.workdir)
    translator = Translator(model)
    ours = translator.translate(sources, SEARCH)
    systems, found = {"flax_transformer": ours}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, quantization in (("CTranslate2, float32", "none"), ("CTranslate2, int8", "int8")):
            place = f"{folder}/{quantization}"
            to_ctranslate2(model, place, quantization=quantization)
            systems[name] = in_ctranslate2(model, place, sources)
        theirs = ctranslate2.Translator(f"{folder}/none", device="cpu").score_batch(
            pieces(model.vocabularies, "source", sources[:PAIRS]),
            pieces(model.vocabularies, "target", references[:PAIRS]),
            max_batch_size=BATCH,
        )
        mine = translator.score(sources[:PAIRS], references[:PAIRS], SEARCH)
        gaps = [
            np.abs(np.array(one.log_probs) - np.array(other.token_log_probs)).max()
            for one, other in zip(theirs, mine, strict=True)
        ]
        found["largest_difference_of_a_token_log_prob"] = float(max(gaps))
        print(f"score_batch, {len(gaps)} pairs: tokens' log-probabilities differ by {max(gaps):.1e} at most")
        to_marian(model, f"{folder}/marian")
        systems["transformers, float32"] = in_transformers(f"{folder}/marian", sources)
    records = []
    for name, texts in systems.items():
        unlike = differences(translator, sources, ours, texts)
        records.append(
            {"system": name, "bleu": sacrebleu.corpus_bleu(texts, [references]).score, "differences": unlike}
        )
        print(f"{name}: BLEU {records[-1]['bleu']:.2f}, {len(unlike)} of {len(sources)} translations differ")
        for each in unlike if "int8" not in name else ():
            print(f"  line {each['line']}: {each['our_score']:.6f} {each['ours']}")
            print(f"    {each['their_score']:.6f} {each['theirs']}")
    packages = ("jax", "flax", "ctranslate2", "torch", "transformers", "sacrebleu")
    measured = {"machine": report.machine(), "pairs_scored": len(gaps), **found, "results": records}
    report.write(options.output, "benchmarks.exports", packages, measured)


if __name__ == "__main__":
    main()

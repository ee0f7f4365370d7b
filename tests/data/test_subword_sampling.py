"""Random segmentations of words: as probable as SentencePiece makes them, and the same in every process."""

import functools
import hashlib
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import sentencepiece

from flax_transformer.data.locale_phrases import locale_phrases
from flax_transformer.data.pipeline import TokenSide
from flax_transformer.data.sentencepiece_vocabulary import Vocabulary
from flax_transformer.data.subword_sampling import SubwordSampler
from flax_transformer.experiment import VocabularyConfig

SIZES = {"bpe": 600, "unigram": 470}  # 256 of them are bytes
KINDS = list(SIZES)
DRAWS = 2000
PROGRAM = f"import runpy; print(runpy.run_path({__file__!r})['digest']())"


@functools.cache
def sentences():
    return locale_phrases("kn", "en", "train", pairs=150, seed=0)[0]


def make(kind, texts, **options):
    """A vocabulary of these texts, and what segments them, by the strength."""
    size = SIZES[kind] if options.get("byte_fallback", True) else SIZES[kind] - 256
    vocabulary = Vocabulary.train(sentences(), VocabularyConfig(size=size, model_type=kind, **options))
    fixed = TokenSide.encode(vocabulary, texts)
    return vocabulary, fixed, lambda strength: SubwordSampler(vocabulary, fixed, strength)


def rows(side):
    return [side[number].tolist() for number in range(len(side.lengths))]


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_stays_the_same(kind):
    texts = sentences()
    vocabulary, fixed, sampler = make(kind, texts)
    found = sampler(0.3).sample(np.random.default_rng(0))
    assert (
        vocabulary.decode(rows(found)) == vocabulary.decode(rows(fixed)) == [" ".join(text.split()) for text in texts]
    )
    changed = np.mean([one != other for one, other in zip(rows(found), rows(fixed), strict=True)])
    assert changed > 0.4


@pytest.mark.parametrize("strength", [1e-9, 1.0])
def test_with_no_merge_left_out_bpe_segments_as_sentencepiece_and_with_all_into_characters(strength):
    vocabulary, fixed, sampler = make("bpe", sentences())
    found = sampler(strength).sample(np.random.default_rng(0))
    if strength < 1:
        assert rows(found) == rows(fixed)
    else:
        pieces = {piece for row in rows(found) for piece in vocabulary.pieces(row[:-1])}
        assert {len(piece) for piece in pieces} == {1}
    # Without a merge left out, our merging alone gives SentencePiece's segmentation of every word.
    segmenter = sampler(0.5)
    assert [segmenter._segmenter._merge(word, ())[0] for word in segmenter._words if word] == [
        segmentation for word, segmentation in zip(segmenter._words, segmenter._segmentations, strict=True) if word
    ]


@pytest.mark.parametrize(("kind", "strength"), [("bpe", 0.1), ("bpe", 0.5), ("unigram", 0.2), ("unigram", 1.0)])
def test_each_segmentation_is_as_frequent_as_sentencepiece_draws_it(kind, strength):
    text = sorted(sentences(), key=len)[40]
    vocabulary, _, sampler = make(kind, [text] * DRAWS)
    words = text.split()
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.to_bytes())
    theirs = processor.encode([text] * DRAWS, enable_sampling=True, alpha=strength, nbest_size=-1)
    ours = [row[:-1] for row in rows(sampler(strength).sample(np.random.default_rng(1)))]

    def by_word(segmented):
        found = [Counter() for _ in words]
        for row in segmented:
            pieces = vocabulary.pieces(row)
            begins = [place for place, piece in enumerate(pieces) if piece.startswith("▁")]
            for number, (begin, end) in enumerate(zip(begins, [*begins[1:], len(pieces)], strict=True)):
                found[number][tuple(pieces[begin:end])] += 1
        return found

    assert max(map(len, by_word(ours))) > 2
    for one, other in zip(by_word(ours), by_word(theirs), strict=True):
        common = [segmentation for segmentation in one | other if one[segmentation] + other[segmentation] > DRAWS / 50]
        for segmentation in common:
            share = (one[segmentation] + other[segmentation]) / (2 * DRAWS)
            error = (2 * share * (1 - share) / DRAWS) ** 0.5
            assert abs(one[segmentation] - other[segmentation]) / DRAWS < 5 * error + 1e-9, segmentation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_what_is_no_ordinary_piece_stays(kind, byte_fallback):
    vocabulary, fixed, sampler = make(
        kind, ["<br>ಕನ್ನಡ ಭಾಷೆ☂ಸೋಮವಾರ<br>"], byte_fallback=byte_fallback, user_symbols=("<br>",)
    )
    sample, rng = sampler(0.5), np.random.default_rng(0)
    found = [rows(sample.sample(rng))[0] for _ in range(30)]
    kept = {
        tuple(
            piece
            for token, piece in zip(row, vocabulary.pieces(row), strict=True)
            if piece == "<br>" or piece.startswith("<0x") or token in (vocabulary.unk_id, vocabulary.eos_id)
        )
        for row in found
    }
    assert len(kept) == 1 and len({tuple(row) for row in found}) > 1
    assert set(vocabulary.decode(found)) == set(vocabulary.decode(rows(fixed)))


def digest():
    found = []
    for kind in KINDS:
        _, _, sampler = make(kind, sentences())
        sample = sampler(0.2)
        found += [sample.sample(np.random.default_rng([seed, 1])).tokens.tobytes() for seed in (0, 1, 0)]
    assert found[0] == found[2] != found[1]
    return hashlib.sha256(b"".join(found)).hexdigest()


def test_the_same_generator_gives_the_same_segmentations_in_every_process():
    environment = os.environ | {"PYTHONHASHSEED": "5", "PYTHONPATH": os.pathsep.join(sys.path)}
    there = subprocess.check_output([sys.executable, "-c", PROGRAM], env=environment, text=True).strip()
    assert there == digest()

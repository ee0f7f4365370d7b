"""Compares models in Marian's own format with CTranslate2, whose MarianConverter reads the same files.

No expected number is copied into this file.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.interop.ctranslate2 import to_ctranslate2
from flax_transformer.interop.marian import read_marian
from flax_transformer.interop.marian_native import to_marian_native
from flax_transformer.positions import sinusoidal_positions
from tests.interop.marian_reference import pieces_model
from tests.interop.test_marian_native import KINDS, LINES, compute, make

ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed: `make peers` installs it")
pytestmark = pytest.mark.peers

LIMIT = 20


def load(folder):
    return ctranslate2.Translator(str(folder), device="cpu", intra_threads=1, compute_type="float32")


# With these seeds outputs end by themselves, after different numbers of tokens. Each commit needs no more than two.
SEEDS = dict(zip(KINDS, (10, 9, 0, 6), strict=False))


@pytest.fixture(
    scope="module",
    params=[*list(SEEDS)[:2], *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(SEEDS)[2:])],
)
def both(request, tmp_path_factory):
    """Our model, CTranslate2's of the same file, and CTranslate2's of the file that we export."""
    path = tmp_path_factory.mktemp("peer")
    vocabularies = {"60": pieces_model(60), "52": pieces_model(52, reverse=True)}
    folder, _, options = make(path / "downloaded", vocabularies, KINDS[request.param], seed=SEEDS[request.param])
    model = read_marian(folder)
    to_marian_native(model, path / "exported")
    # CTranslate2 either chooses the unknown token, as here, or gives its probability to others; its converter does not
    # set the epsilon of the norms.
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, suppressed_ids=(), norm_epsilon=1e-5))
    lists = [str(path / "exported" / f"{side}.vocab.yml") for side in ("source", "target")]
    loaded = [model]
    for name, file in (("theirs", folder / "model.npz"), ("ours", path / "exported" / "model.npz")):
        with np.load(file) as content:
            tensors = dict(content)
        # Without a table it would compute waves that Marian does not have.
        waves = sinusoidal_positions(jnp.arange(64), options["dim-emb"], interleaved=False, endpoint=True)
        np.savez(path / f"{name}.npz", Wpos=np.asarray(waves), **tensors)
        ctranslate2.converters.MarianConverter(str(path / f"{name}.npz"), lists).convert(str(path / name))
        loaded.append(load(path / name))
    return loaded


def pieces(model, side, lines):
    vocabulary = getattr(model.vocabularies, side)
    return [vocabulary.pieces(row[:-1]) for row in vocabulary.encode(lines)]


@pytest.mark.slow
def test_logits_equal_those_of_ctranslate2(both):
    model, peer, _ = both
    source = pieces(model, "source", LINES[:2])
    vocabulary = model.vocabularies.target.pieces(range(model.vocabularies.target.size))
    found = peer.translate_batch(
        source, beam_size=1, max_decoding_length=LIMIT, min_decoding_length=0, return_logits_vocab=True
    )
    for line, result in zip(LINES[:2], found, strict=True):
        chosen = [vocabulary.index(piece) for piece in result.hypotheses[0]]
        logits = np.stack([np.array(each).reshape(-1) for each in result.logits[0]])
        target = [*chosen, 0][: len(logits)]
        (ids,) = model.vocabularies.source.encode([line])
        _, ours = compute(model, ids, target)
        np.testing.assert_allclose(ours[:, : logits.shape[1]], logits, atol=1e-4)


def test_beams_find_the_translations_of_ctranslate2(both):
    model, peer, _ = both
    search = BeamSearch(
        beam_size=4, length_penalty="length", alpha=1.0, stopping="first", max_length=LIMIT, extra_length=LIMIT
    )
    ours = Translator(model).hypotheses(LINES, search)
    theirs = peer.translate_batch(
        pieces(model, "source", LINES),
        beam_size=4,
        length_penalty=1,
        max_decoding_length=LIMIT,
        min_decoding_length=0,
    )
    # Each library has its own rule for outputs that reach the limit.
    lengths = [(len(best.ids), len(found.hypotheses[0])) for (best, *_), found in zip(ours, theirs, strict=True)]
    ended = [number for number, both_lengths in enumerate(lengths) if max(both_lengths) < LIMIT]
    assert len({len(ours[number][0].ids) for number in ended}) > 2  # otherwise equality would prove little
    for number in ended:
        assert theirs[number].hypotheses[0] == list(ours[number][0].tokens[:-1])


def test_what_we_export_is_the_same_model_to_ctranslate2(both, tmp_path):
    model, peer, exported = both
    to_ctranslate2(model, tmp_path / "exported")
    source, target = pieces(model, "source", LINES), pieces(model, "target", LINES[::-1])
    wanted = peer.score_batch(source, target)
    for again in (exported, load(tmp_path / "exported")):
        for found, result in zip(again.score_batch(source, target), wanted, strict=True):
            np.testing.assert_allclose(found.log_probs, result.log_probs, atol=1e-4)

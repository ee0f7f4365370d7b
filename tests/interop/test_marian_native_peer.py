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


@pytest.fixture(scope="module", params=[kind for kind in KINDS if "recurrent" not in kind])
def both(request, tmp_path_factory):
    """Our model, CTranslate2's of the same file, and CTranslate2's of the file that we export."""
    path = tmp_path_factory.mktemp("peer")
    vocabularies = {"60": pieces_model(60), "52": pieces_model(52, reverse=True)}
    folder, _, options = make(path / "downloaded", vocabularies, KINDS[request.param], seed=7)
    model = read_marian(folder)
    # CTranslate2 gives the unknown token's probability to others, or chooses it; here it is chosen.
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, suppressed_ids=()))
    to_marian_native(model, path / "exported")
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


def test_scores_equal_those_of_ctranslate2(both):
    model, *peers = both
    source, target = pieces(model, "source", LINES), pieces(model, "target", LINES[::-1])
    ours = Translator(model).score(LINES, LINES[::-1])
    for peer in peers:
        for found, wanted in zip(peer.score_batch(source, target), ours, strict=True):
            np.testing.assert_allclose(found.log_probs, wanted.token_log_probs, atol=1e-4)


def test_logits_equal_those_of_ctranslate2(both):
    model, peer, _ = both
    source = pieces(model, "source", LINES[:4])
    found = peer.translate_batch(source, beam_size=1, max_decoding_length=LIMIT, return_logits_vocab=True)
    for line, result in zip(LINES[:4], found, strict=True):
        chosen = [model.vocabularies.target.pieces(range(60)).index(piece) for piece in result.hypotheses[0]]
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
        pieces(model, "source", LINES), beam_size=4, length_penalty=1, max_decoding_length=LIMIT, return_scores=True
    )
    ended = [number for number, (best, *_) in enumerate(ours) if len(best.ids) < LIMIT]
    assert len(ended) > 12
    for number in ended:
        assert theirs[number].hypotheses[0] == list(ours[number][0].tokens[:-1])


def test_an_imported_model_can_be_exported_to_ctranslate2(both, tmp_path):
    model, peer, _ = both
    to_ctranslate2(model, tmp_path / "exported")
    source, target = pieces(model, "source", LINES), pieces(model, "target", LINES[::-1])
    again = load(tmp_path / "exported").score_batch(source, target)
    for found, wanted in zip(again, peer.score_batch(source, target), strict=True):
        np.testing.assert_allclose(found.log_probs, wanted.log_probs, atol=1e-4)

"""Searches with equal weights in transformers, CTranslate2 and this library, and compares what they find.

No output is cut off by a limit on its length, because each library treats that case in its own way.
"""

import functools
import importlib
import warnings

import jax
import numpy as np
import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.decoding.engine import Engine
from flax_transformer.decoding.ensemble import Ensemble
from flax_transformer.decoding.settings import BeamSearch

torch = pytest.importorskip("torch", reason="PyTorch is not installed: `make peers` installs it")
for name in ("transformers", "ctranslate2"):
    pytest.importorskip(name, reason=f"{name} is not installed: `make peers` installs it")
peers = importlib.import_module("benchmarks.peers")
pytestmark = pytest.mark.peers

PAD, EOS, SOURCE_SIZE, SIZE, LIMIT = 0, 2, 29, 31, 48
LENGTHS = [4, 10, 6, 18, 2, 8, 5, 9]
SEEDS = [0, 1, 2]
TYINGS = ["three_way", "decoder", "none"]
BEAMS = [1, 4, 6]
ALPHAS = [0.0, 0.6, 1.0]
TIE = 1e-5


def batch():
    rng = np.random.default_rng(7)
    source = np.full((len(LENGTHS), max(LENGTHS)), PAD, np.int32)
    for row, length in zip(source, LENGTHS, strict=True):
        row[:length] = [*rng.integers(3, SOURCE_SIZE, length - 1), EOS]
    return source


SOURCE = batch()


@functools.cache
def weights(tying, seed):
    config = TransformerConfig(
        source_vocab_size=SIZE if tying == "three_way" else SOURCE_SIZE,
        target_vocab_size=SIZE,
        d_model=32,
        num_heads=4,
        d_ff=48,
        num_encoder_layers=2,
        num_decoder_layers=2,
        positions="sinusoidal_concatenated",
        max_length=64,
        tie_embeddings=tying,
        output_bias=True,
        pad_id=PAD,
        start_id=PAD,
        eos_id=EOS,
    )
    return config, peers.random_params(config, seed, gain=1.5, end_at=25, end_slope=8.0, end_bias=5.0)


def settings(beam, alpha):
    return BeamSearch(
        beam_size=beam, num_return=beam, stopping="first", length_penalty="length", alpha=alpha, banned=(PAD,)
    )


def ours(config, params, beam, alpha):
    engine = Engine(Ensemble.on_devices([config], [params], jax.local_devices()[:1]), batch_tokens=64)
    search = settings(beam, alpha).replace(max_length=LIMIT, extra_length=LIMIT)
    found = engine.search([up_to_end(row) for row in SOURCE.tolist()], search)
    engine.close()
    tokens = [[output.ids.tolist() for output in outputs] for outputs in found]
    scores = [[output.log_probs.sum() / search.penalty(len(output.ids)) for output in outputs] for outputs in found]
    return tokens, np.array(scores)


def in_transformers(model, beam, alpha):
    source = torch.tensor(SOURCE).long()
    options = {"early_stopping": True, "length_penalty": alpha} if beam > 1 else {}
    with torch.inference_mode():
        found = model.generate(
            source,
            attention_mask=(source != PAD).long(),
            num_beams=beam,
            num_return_sequences=beam,
            max_new_tokens=LIMIT,
            suppress_tokens=[PAD],
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=beam == 1,
            **options,
        )
    tokens = found.sequences[:, 1:].reshape(len(SOURCE), beam, -1).tolist()
    if beam > 1:
        return tokens, found.sequences_scores.reshape(len(SOURCE), beam).numpy()
    log_probs = torch.stack(found.logits, dim=1).log_softmax(-1).numpy()  # its greedy search returns no scores
    ended = [up_to_end(row[0]) for row in tokens]
    totals = [rows[range(len(row)), row].sum() for rows, row in zip(log_probs, ended, strict=True)]
    return tokens, np.array([[total / len(row) ** alpha] for total, row in zip(totals, ended, strict=True)])


def in_ctranslate2(model, beam, alpha):
    found = model.translate_batch(
        peers.spell(up_to_end(row) for row in SOURCE.tolist()),
        beam_size=beam,
        num_hypotheses=beam,
        # It has another rule for exactly 0: it continues until the best continuation of a step is an end.
        length_penalty=alpha or 1e-30,
        min_decoding_length=0,
        max_decoding_length=LIMIT,
        return_scores=True,
        return_end_token=True,
    )
    tokens = [[[int(token) for token in hypothesis] for hypothesis in each.hypotheses] for each in found]
    return tokens, np.array([each.scores for each in found])


def up_to_end(tokens):
    assert EOS in tokens, "every hypothesis is to end by itself"
    return tokens[: tokens.index(EOS) + 1]


def assert_same(found, expected, beam):
    tokens, scores = ([[up_to_end(row) for row in rows] for rows in found[0]], found[1])
    expected_tokens, expected_scores = ([[up_to_end(row) for row in rows] for rows in expected[0]], expected[1])
    np.testing.assert_allclose(scores, expected_scores, rtol=TIE, atol=TIE)
    assert scores.shape == (len(SOURCE), beam)
    for sentence in range(len(SOURCE)):
        assert len({tuple(row) for row in tokens[sentence]}) == beam
        for rank in range(beam):
            if tokens[sentence][rank] != expected_tokens[sentence][rank]:
                gaps = np.abs(np.delete(expected_scores[sentence], rank) - expected_scores[sentence, rank])
                assert gaps.min(initial=np.inf) < TIE, (sentence, rank)
                warnings.warn(f"sentence {sentence}, hypothesis {rank}: a tie, only scores compared", stacklevel=2)


# Each pair of two options comes once.
@pytest.mark.parametrize(
    ("tying", "beam", "alpha"),
    [
        pytest.param(tying, beam, ALPHAS[(i + j) % 3], marks=[pytest.mark.slow] if i != j else [])
        for i, tying in enumerate(TYINGS)
        for j, beam in enumerate(BEAMS)
    ],
)
def test_all_hypotheses_and_scores_equal_those_of_transformers_and_ctranslate2(tying, beam, alpha, tmp_path):
    lengths = set()
    for seed in SEEDS:
        config, params = weights(tying, seed)
        found = ours(config, params, beam, alpha)
        assert_same(found, in_transformers(peers.marian_model(config, params), beam, alpha), beam)
        model = peers.ctranslate2_model(config, params, str(tmp_path / "model"), threads=1)
        assert_same(found, in_ctranslate2(model, beam, alpha), beam)
        lengths |= {len(up_to_end(row)) for rows in found[0] for row in rows}
    assert len(lengths) > 5  # otherwise equality would prove little


@pytest.mark.parametrize("beam", [1, 4])
def test_a_banned_token_keeps_its_probability_as_in_transformers(beam):
    config, params = weights("none", SEEDS[0])
    params = {**params, "output_bias": params["output_bias"].at[PAD].set(4.0)}
    found = ours(config, params, beam, 0.6)
    assert not any(PAD in up_to_end(row) for rows in found[0] for row in rows)
    assert_same(found, in_transformers(peers.marian_model(config, params), beam, 0.6), beam)
    without = ours(*weights("none", SEEDS[0]), beam, 0.6)
    assert np.all(found[1][:, 0] < without[1][:, 0] - 0.1)

"""What the tests of the engine and of its scheduler share: sources, settings, and comparisons."""

import jax
import numpy as np

from flax_transformer.decoding.settings import BeamSearch, Sampling

V, PAD, START, EOS = 12, 0, 1, 2
# With so little extra length few outputs need more room than their sources.
GREEDY = BeamSearch(beam_size=1, extra_length=4)
BEAM = BeamSearch(beam_size=3, num_return=2, extra_length=4)
SAMPLING = Sampling(num_return=2, extra_length=4)


def make_sources(count, longest=16):
    rng = np.random.default_rng(0)
    return [[*rng.integers(3, V, rng.integers(0, longest)).tolist(), EOS] for _ in range(count)]


SOURCES = make_sources(40)


def keys(count, seed=0):
    return np.asarray(jax.random.key_data(jax.random.split(jax.random.key(seed), count)))


def search(engine, sources, settings, prefixes=None, rngs=None):
    if isinstance(settings, Sampling) and rngs is None:
        rngs = keys(len(sources))
    return engine.search(sources, settings, prefixes=prefixes, rngs=rngs)


def check_same(found, expected):
    """Equal tokens, and log-probabilities up to what a batch's shape moves them."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert [output.ids.tolist() for output in ours] == [output.ids.tolist() for output in theirs]
        for output, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(output.log_probs, other.log_probs, rtol=1e-3, atol=1e-4)

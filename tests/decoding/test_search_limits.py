"""A search keeps to the limit in its settings and does not choose the start token again."""

import numpy as np

from flax_transformer.decoding.settings import BeamSearch
from tests.decoding.test_search import START, B, L, Language, greedy_and_beam, outputs, search


@greedy_and_beam
def test_the_settings_may_limit_the_length_of_all_sentences(beam_size):
    language, most = Language(31), 3
    limits = [5, 1, 5, 3, 2, 4, 5]
    found = search(language, limits, beam_size=beam_size, max_length=L)
    settings = BeamSearch(beam_size=beam_size or 1, max_length=most)
    limited = search(language, limits, settings, max_length=L)
    least = search(language, np.minimum(limits, most), beam_size=beam_size, max_length=L)
    for sentence in range(B):
        assert outputs(limited, sentence) == outputs(least, sentence)
    assert limited.lengths.max() <= most < found.lengths.max()


@greedy_and_beam
def test_the_start_token_does_not_come_again(beam_size):
    language = Language(32)
    language.logits[..., START] = 30  # by far the most probable
    found = search(language, [5] * B, beam_size=beam_size)
    assert all(START not in tokens for sentence in range(B) for tokens in outputs(found, sentence))

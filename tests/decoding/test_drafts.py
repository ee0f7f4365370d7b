from unittest import mock

import numpy as np

from flax_transformer.decoding.engine import Engine
from flax_transformer.decoding.requests import Output
from flax_transformer.decoding.search import BROKEN
from flax_transformer.decoding.settings import Sampling


def test_a_draft_submits_each_source_with_its_own_prefix_and_random_key(make_translator):
    search = Sampling(num_return=2)
    sentences = ["the cat", "a brown dog runs up", "", "it sat on the mouse"]
    draft = make_translator().draft(sentences, search, prefixes=["cat", "dog", "", "mouse up"], seed=3)
    assert len(draft.sources) == 3 and len({*map(tuple, draft.prefixes)}) == 3
    engine = mock.create_autospec(Engine, instance=True)
    engine.submit.return_value = []
    assert draft.submit(engine, [2, 0], streams=True) == []
    (sources, settings), options = engine.submit.call_args
    assert sources == [draft.sources[2], draft.sources[0]] and settings == search
    assert options["prefixes"] == [draft.prefixes[2], draft.prefixes[0]]
    assert options["given"] == [draft.given[2], draft.given[0]] and options["streams"]
    assert np.array_equal(options["rngs"], draft.rngs[[2, 0]])
    assert not np.array_equal(draft.rngs[2], draft.rngs[0])


def test_a_sentence_counts_as_broken_by_any_of_its_outputs(make_translator):
    draft = make_translator().draft(["the cat", "up", "a dog"], Sampling(num_return=2))
    good, broken = (Output(np.array([5, 2], np.int32), np.array([-1.0, last])) for last in (-2.0, BROKEN))
    assert draft.broken([[good, broken], [good, good], [broken, broken]]) == 2

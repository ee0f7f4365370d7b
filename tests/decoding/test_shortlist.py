"""Compares searches among listed tokens with searches among all tokens, in which the others are banned or none is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.decoding import ensemble
from flax_transformer.decoding.engine import Engine
from flax_transformer.decoding.ensemble import Ensemble, step_function
from flax_transformer.decoding.inspection import Inspector
from flax_transformer.decoding.settings import BeamSearch, Sampling
from flax_transformer.decoding.shortlist import Shortlist
from flax_transformer.decoding.sizes import slot_size
from flax_transformer.decoding.translator import Translator
from flax_transformer.model import Transformer
from flax_transformer.trained_model import TrainedModel

V, PAD, START, EOS = 40, 0, 1, 2
SOURCES = [[4, 9, 5, EOS], [6, 3, 7, 8, 10, 11, 17, EOS], [5, EOS], [21, 22, 9, EOS], [5, 5, 5, 30, EOS]]
GREEDY = BeamSearch(beam_size=1, extra_length=5)
BEAM = BeamSearch(beam_size=4, num_return=3, extra_length=5)
FIRST = BeamSearch(beam_size=3, stopping="first", extra_length=5, no_repeat_ngram=2, min_length=3)
SAMPLING = Sampling(num_return=2, extra_length=5, top_k=7)
SLOW = pytest.mark.slow


def shortlist(lists, first=3, joint=False):
    """A shortlist with these words for each source id."""
    offsets = np.cumsum([0, *map(len, lists)])
    return Shortlist(first, offsets, np.array([word for words in lists for word in words], np.int32), joint)


def random_lists(seed, size=V, most=4):
    rng = np.random.default_rng(seed)
    return [sorted(rng.choice(size, rng.integers(0, most + 1), replace=False).tolist()) for _ in range(size)]


RANDOM = shortlist(random_lists(0))
EVERYTHING = shortlist([range(V)] * V)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(V, 5)


@pytest.fixture(scope="module")
def find(model):
    """Searches, and returns the ids and log-probabilities of each output of each source."""

    def run(chosen, settings, sources=SOURCES, models=(model,), devices=1, prefixes=None, banned=()):
        configs = [dataclasses.replace(config, banned_ids=banned) for config, _ in models]
        several = Ensemble.on_devices(configs, [params for _, params in models], jax.local_devices()[:devices])
        engine = Engine(several, batch_tokens=64, shortlist=chosen)
        keys = jax.random.split(jax.random.key(1), len(SOURCES))[: len(sources)]
        rngs = np.asarray(jax.random.key_data(keys)) if isinstance(settings, Sampling) else None
        found = engine.search(sources, settings, prefixes=prefixes, rngs=rngs)
        engine.close()
        return [[(output.ids.tolist(), output.log_probs) for output in outputs] for outputs in found]

    return run


def check_same(found, expected, atol=1e-5):
    assert [[ids for ids, _ in outputs] for outputs in found] == [[ids for ids, _ in outputs] for outputs in expected]
    for outputs, others in zip(found, expected, strict=True):
        for (_, log_probs), (_, other) in zip(outputs, others, strict=True):
            np.testing.assert_allclose(log_probs, other, atol=1e-5)


def test_a_sentence_may_contain_the_first_ids_the_words_of_its_tokens_and_the_next_ids_up_to_a_multiple_of_eight():
    lists = [[], [], [20], [4, 30], [4, 5, 33], [39]]
    assert shortlist(lists).allowed([3, 4, 3, 2], V).tolist() == [0, 1, 2, 4, 5, 20, 30, 33]
    assert shortlist(lists).allowed([3, 2], V).tolist() == [0, 1, 2, 3, 4, 5, 20, 30]
    # The source's own ids count if they are target ids too.
    assert shortlist(lists, joint=True).allowed([3, 5, 2], V).tolist() == [*range(13), 20, 30, 39]
    # A small vocabulary ends before that, and an id without words, such as padding behind all others, adds none.
    assert shortlist(lists[:2]).allowed([1, 9], 6).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("joint", [False, True])
def test_the_bound_on_the_number_of_ids_holds_for_every_sentence(joint):
    chosen = shortlist(random_lists(3, 200, 12), joint=joint)
    rng = np.random.default_rng(4)
    for length in (1, 3, 9):
        sizes = [len(chosen.allowed(rng.choice(200, length).tolist(), 200)) for _ in range(50)]
        assert max(sizes) <= chosen.most(length, 200) <= 200
    size = slot_size(1, 16, None, chosen, 200)
    assert size.listed % 64 == 0 and size.listed >= min(200, chosen.most(16, 200) + size.target)


@pytest.mark.parametrize("settings", [FIRST, pytest.param(BEAM, marks=SLOW), pytest.param(SAMPLING, marks=SLOW)])
def test_a_list_of_all_tokens_changes_nothing(find, settings):
    check_same(find(EVERYTHING, settings), find(None, settings))


@pytest.mark.parametrize("settings", [GREEDY, BEAM, SAMPLING, pytest.param(FIRST, marks=SLOW)])
def test_a_search_among_listed_tokens_equals_one_in_which_all_others_are_banned(find, settings):
    source = [SOURCES[3]]
    found = find(RANDOM, settings, source)
    assert found[0][0][0] != find(None, settings, source)[0][0][0]
    banned = tuple(sorted(set(range(V)) - set(RANDOM.allowed(source[0], V).tolist())))
    check_same(found, find(None, settings, source, banned=banned))


def test_inspected_tokens_have_the_probabilities_of_the_search(model):
    several = Ensemble.on_devices([model[0]], [model[1]], jax.local_devices()[:1])
    engine, source = Engine(several, batch_tokens=64, shortlist=RANDOM), SOURCES[3]
    ((output,),) = engine.search([source], GREEDY)
    engine.close()
    inspector, ids = Inspector(several), output.ids.tolist()
    free, listed = inspector.inspect(source, ids), inspector.inspect(source, ids, engine.listed(source, ids))
    best, log_probs = listed.candidates()
    # All but the last, which may be the end because there is no room for more.
    assert best[:-1, 0].tolist() == ids[:-1] and len(ids) > 3
    np.testing.assert_allclose(log_probs[:-1, 0], output.log_probs[:-1], atol=1e-4)
    assert free.candidates()[0][:-1, 0].tolist() != ids[:-1]
    np.testing.assert_array_equal(free.alignment(), listed.alignment())


@pytest.mark.parametrize("settings", [BEAM, pytest.param(GREEDY, marks=SLOW), pytest.param(FIRST, marks=SLOW)])
def test_neither_neighbours_nor_devices_change_a_result(find, settings):
    together = find(RANDOM, settings)
    check_same([find(RANDOM, settings, [source])[0] for source in SOURCES], together)
    check_same(find(RANDOM, settings, devices=2), together)


@pytest.fixture
def first_logits(monkeypatch):
    """The logits after the start of two hypotheses for each of two sources: of all tokens, and of listed ones.

    The latter are computed in both ways: from copied rows of the output matrix, and as a choice from all logits.
    """

    def run(model, listed):
        config, params = model
        source = jnp.array([[4, 9, 5, EOS], [6, 3, EOS, PAD]])
        transformer = Transformer(config)

        def compute(params):
            state = transformer.apply({"params": params}, source, max_length=3, hypotheses=2, method="start_decoding")
            for ids, most in ((None, 0), (listed, 10**6), (listed, 0)):
                monkeypatch.setattr(ensemble, "LISTED_ROWS", most)
                step = step_function((params,), (config,), ids)
                yield step((state,), jnp.full(4, START))[1].reshape(2, 2, -1)

        return map(np.asarray, jax.jit(lambda params: tuple(compute(params)))(params))

    return run


@pytest.mark.parametrize(
    "changes", [{"banned_ids": (7,)}, {"tie_embeddings": "three_way", "output_bias": True, "dtype": "bfloat16"}]
)
def test_logits_of_listed_tokens_are_those_of_all_tokens_whichever_way_they_are_computed(
    make_model, first_logits, changes
):
    every, copied, chosen = first_logits(make_model(V, 5, **changes), jnp.array([[2, 7, 8, 39], [2, 5, -1, -1]]))
    for found in (copied, chosen):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found[0], every[0][:, [2, 7, 8, 39]], atol=1e-5)
        np.testing.assert_allclose(found[1, :, :2], every[1][:, [2, 5]], atol=1e-5)
        assert (found[1, :, 2:] == -np.inf).all()


def test_an_ensemble_of_untied_and_tied_models_averages_over_the_listed_tokens(find, model, make_model):
    models = (model, make_model(V, 6, tie_embeddings="three_way", output_bias=True))
    banned = tuple(sorted(set(range(V)) - set(RANDOM.allowed(SOURCES[0], V).tolist())))
    expected = find(None, BEAM, SOURCES[:1], models=models, banned=banned)
    check_same(find(RANDOM, BEAM, SOURCES[:1], models=models), expected)


def test_a_prefix_may_have_tokens_that_are_not_listed(find):
    prefixes = [[token for token in range(3, V) if token not in RANDOM.allowed(source, V)][:2] for source in SOURCES]
    assert all(prefixes)
    found = find(RANDOM, BEAM, prefixes=prefixes)
    for prefix, source, outputs in zip(prefixes, SOURCES, found, strict=True):
        for ids, _ in outputs:
            assert ids[: len(prefix)] == prefix
            assert set(ids[len(prefix) :]) <= {*RANDOM.allowed(source, V).tolist(), *prefix, EOS}


def test_a_sentence_that_outgrows_its_slot_keeps_its_list(find):
    settings = GREEDY.replace(min_length=30, extra_length=40)
    found = find(RANDOM, settings, SOURCES[:2])
    assert all(len(ids) >= 30 for ((ids, _),) in found)
    for source, ((ids, _),) in zip(SOURCES, found, strict=False):
        assert set(ids) <= {*RANDOM.allowed(source, V).tolist(), EOS}


@pytest.fixture
def trained(make_model, vocabularies):
    size = vocabularies.target.size
    config, params = make_model(size, 3)
    chosen = shortlist(random_lists(1, size), joint=vocabularies.shares_ids)
    return TrainedModel(config, params, vocabularies, chosen)


def test_a_work_directory_keeps_the_shortlist_and_a_translator_may_ignore_it(trained, sentences, tmp_path):
    trained.save(tmp_path / "work")
    loaded = TrainedModel.load(tmp_path / "work")
    assert loaded.shortlist.fingerprint() == trained.shortlist.fingerprint()
    devices = jax.local_devices()[:1]
    with_list = Translator.from_workdir(tmp_path / "work", devices=devices)
    without = Translator.from_workdir(tmp_path / "work", devices=devices, shortlist=False)
    plain = Translator(dataclasses.replace(trained, shortlist=None), devices=devices)
    given = Translator(dataclasses.replace(trained, shortlist=None), devices=devices, shortlist=trained.shortlist)
    sentences = sentences[:2]
    texts = with_list.translate(sentences, GREEDY)
    assert texts != plain.translate(sentences, GREEDY) == without.translate(sentences, GREEDY)
    assert given.translate(sentences, GREEDY) == texts
    assert "".join(with_list.stream(sentences[1], GREEDY)) == texts[1]
    # Given translations are scored over all tokens, whatever the search may choose.
    scores = [each.score(sentences[:1], [texts[0]])[0].log_prob for each in (with_list, plain)]
    assert scores[0] == scores[1]


def test_a_shortlist_for_another_vocabulary_and_different_ones_in_an_ensemble_are_errors(trained):
    with pytest.raises(ValueError, match=r"has words for 40 source ids .* use the shortlist that was made for it"):
        Translator(trained, shortlist=RANDOM)
    with pytest.raises(ValueError, match="the shortlist has words for 40"):
        dataclasses.replace(trained, shortlist=RANDOM)
    with pytest.raises(ValueError, match="different shortlists, or only some have one: choose one"):
        Translator([trained, dataclasses.replace(trained, shortlist=None)])
    Translator([trained, dataclasses.replace(trained)])


def test_padding_behind_all_other_ids_needs_no_words():
    config = TransformerConfig(source_vocab_size=V + 1, target_vocab_size=V + 1, pad_id=V, start_id=V, eos_id=0)
    EVERYTHING.check_fits(config)
    with pytest.raises(ValueError, match="the model 42 source and 41 target ids"):
        EVERYTHING.check_fits(dataclasses.replace(config, source_vocab_size=V + 2, tie_embeddings="decoder"))
    with pytest.raises(ValueError, match="target ids up to 41"):
        shortlist([[V + 1]] * V).check_fits(config)


@pytest.mark.parametrize("offsets", [[0], [0, 2, 1, 3], [1, 3], [0, 4], [0, 2]])
def test_offsets_that_do_not_divide_the_words_are_an_error(offsets):
    with pytest.raises(ValueError, match="do not rise from 0 to 3"):
        Shortlist(2, np.array(offsets), np.array([5, 6, 7], np.int32), joint=False)

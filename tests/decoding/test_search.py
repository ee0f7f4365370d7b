"""Takes tables of log-probabilities and leaves a verdict: the searches find what trying every sequence finds.

The tables are made-up languages: what may follow depends on the whole beginning, which the step function knows from
its state alone. So a state that strays from its hypothesis shows as a wrong log-probability.
"""

import itertools
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.decoding.search import Hypotheses, beam_search, greedy_search, length_penalty

PAD, START, EOS = 0, 1, 2
ALPHAS = [0, 0.6, 1]


class Language:
    """Random logits for whatever follows each beginning, for each of B sentences.

    A beginning's number is its tokens, the start token first, read as digits to the base V.
    """

    def __init__(self, vocabulary, longest, sentences=2, spread=1.5, seed=0):
        rng = np.random.default_rng(seed)
        self.vocabulary, self.longest = vocabulary, longest
        self.logits = rng.normal(scale=spread, size=(sentences, vocabulary**longest, vocabulary)).astype("float32")
        # Added at each step: what the scalar in the state, which counts them, is there for.
        self.shifts = rng.normal(size=(longest, vocabulary)).astype("float32")

    def start(self, beam_size):
        """The state before the first step: which sentence, which beginning, how many steps."""
        sentence = jnp.repeat(jnp.arange(len(self.logits)), beam_size)
        return {"sentence": sentence, "beginning": jnp.zeros_like(sentence), "steps": jnp.zeros((), jnp.int32)}

    def step(self, state, tokens):
        beginning = state["beginning"] * self.vocabulary + tokens
        logits = jnp.asarray(self.logits)[state["sentence"], beginning] + jnp.asarray(self.shifts)[state["steps"]]
        return {**state, "beginning": beginning, "steps": state["steps"] + 1}, logits

    def log_probs(self, sentence, tokens):
        """In float64, of each token of the vocabulary after these."""
        number = 0
        for token in (START, *tokens):
            number = number * self.vocabulary + token
        logits = (self.logits[sentence, number] + self.shifts[len(tokens)]).astype(float)
        return logits - np.log(np.exp(logits).sum())

    def log_prob(self, sentence, tokens):
        return sum(self.log_probs(sentence, tokens[:place])[token] for place, token in enumerate(tokens))

    def every_output(self, limit):
        """Whatever ends with the end of sentence within the limit."""
        others = [token for token in range(self.vocabulary) if token != EOS]
        for length in range(limit):
            for tokens in itertools.product(others, repeat=length):
                yield (*tokens, EOS)


def paper_score(log_prob, length, alpha):
    return log_prob / ((5 + length) / 6) ** alpha


def search(language, limits, *, beam_size=None, max_length=None, step=None, jit=True, **options):
    """Greedy, or beam search where a beam is given; as numpy arrays."""
    options |= {"max_length": max_length or max(limits), "start_id": START, "eos_id": EOS, "pad_id": PAD}
    run = partial(greedy_search if beam_size is None else partial(beam_search, beam_size=beam_size), **options)
    run = partial(run, step or language.step)
    found = (jax.jit(run) if jit else run)(language.start(beam_size or 1), jnp.array(limits))
    assert isinstance(found, Hypotheses)
    return SimpleNamespace(**jax.device_get(vars(found)))


def outputs(found, sentence):
    """The hypotheses of one sentence, each as a tuple of its tokens."""
    rows = zip(found.tokens[sentence].tolist(), found.lengths[sentence].tolist(), strict=True)
    return [tuple(tokens[:length]) for tokens, length in rows]


@pytest.mark.parametrize("alpha", [*ALPHAS, -0.5])
@pytest.mark.parametrize("vocabulary, limits", [(5, [4, 3]), (4, [2, 5])])
def test_a_beam_as_wide_as_the_language_finds_what_trying_everything_finds(vocabulary, limits, alpha):
    language = Language(vocabulary, max(limits))
    beam_size = (vocabulary - 1) ** (max(limits) - 1)
    found = search(language, limits, beam_size=beam_size, alpha=alpha, num_return=beam_size)
    for sentence, limit in enumerate(limits):
        log_probs = {tokens: language.log_prob(sentence, tokens) for tokens in language.every_output(limit)}
        scores = {tokens: paper_score(log_prob, len(tokens), alpha) for tokens, log_prob in log_probs.items()}
        best = sorted(scores, key=scores.get, reverse=True)[:beam_size]
        count = len(best)
        assert outputs(found, sentence)[:count] == best
        np.testing.assert_allclose(found.log_probs[sentence, :count], [log_probs[tokens] for tokens in best], rtol=1e-5)
        np.testing.assert_allclose(found.scores[sentence, :count], [scores[tokens] for tokens in best], rtol=1e-5)
        # Where the limit leaves fewer outputs than were asked for, the rest are empty.
        assert (found.scores[sentence, count:] == -np.inf).all()
        assert (found.log_probs[sentence, count:] == -np.inf).all()
        assert not found.lengths[sentence, count:].any() and (found.tokens[sentence, count:] == PAD).all()


def plain_beam_search(language, sentence, limit, beam_size, alpha):
    """Beam search as one would write it on paper: no state, no arrays, and no stopping early."""
    live, finished = [((), 0.0)], []
    for length in range(1, limit + 1):
        grown = [
            ((*tokens, token), total + log_prob)
            for tokens, total in live
            for token, log_prob in enumerate(language.log_probs(sentence, tokens))
        ]
        finished += [(paper_score(total, length, alpha), tokens) for tokens, total in grown if tokens[-1] == EOS]
        going_on = [(tokens, total) for tokens, total in grown if tokens[-1] != EOS]
        live = sorted(going_on, key=lambda hypothesis: hypothesis[1], reverse=True)[:beam_size]
    return sorted(finished, reverse=True)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("beam_size, num_return", [(1, 1), (3, 1), (3, 3), (4, 2)])
def test_a_narrow_beam_finds_what_it_finds_on_paper_without_stopping_early(beam_size, num_return, alpha):
    limits = [5, 2, 4]
    language = Language(5, 5, len(limits), seed=1)
    found = search(language, limits, beam_size=beam_size, alpha=alpha, num_return=num_return)
    for sentence, limit in enumerate(limits):
        expected = plain_beam_search(language, sentence, limit, beam_size, alpha)[:num_return]
        assert outputs(found, sentence) == [tokens for _, tokens in expected]
        np.testing.assert_allclose(found.scores[sentence], [score for score, _ in expected], rtol=1e-5)


def test_what_is_returned_has_the_log_probability_that_the_language_gives_it():
    language = Language(5, 5, seed=2)
    for found in (search(language, [5, 4]), search(language, [5, 4], beam_size=3, alpha=0.6, num_return=3)):
        for sentence in range(2):
            expected = [language.log_prob(sentence, tokens) for tokens in outputs(found, sentence)]
            np.testing.assert_allclose(found.log_probs[sentence], expected, rtol=1e-5)
            assert all(tokens[-1] == EOS and EOS not in tokens[:-1] for tokens in outputs(found, sentence))
        behind = np.arange(found.tokens.shape[-1]) >= found.lengths[..., None]
        assert (found.tokens[behind] == PAD).all()


def test_greedy_takes_the_most_probable_token_each_time():
    limits = [5, 1, 3]
    language = Language(5, 5, len(limits), seed=3)
    found = search(language, limits, alpha=0.6)
    for sentence, limit in enumerate(limits):
        tokens = ()
        while EOS not in tokens:
            log_probs = language.log_probs(sentence, tokens)
            tokens += (EOS if len(tokens) == limit - 1 else int(log_probs.argmax()),)
        assert outputs(found, sentence) == [tokens]
        expected = paper_score(language.log_prob(sentence, tokens), len(tokens), 0.6)
        np.testing.assert_allclose(found.scores[sentence], [expected], rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_a_beam_of_one_ends_on_the_greedy_path_or_does_better(seed):
    """It passes the same beginnings, but weighs ending at each of them, where greedy ends at the first chance."""
    language = Language(5, 5, 7, seed=seed)
    greedy, beam = search(language, [5] * 7), search(language, [5] * 7, beam_size=1, alpha=0.0)
    assert (beam.scores >= greedy.scores - 1e-6).all()
    for sentence in range(7):
        (taken,), (chosen,) = outputs(greedy, sentence), outputs(beam, sentence)
        assert chosen == taken or beam.scores[sentence] > greedy.scores[sentence]
        shared = min(len(chosen), len(taken)) - 1
        assert chosen[:shared] == taken[:shared]


def test_the_widest_beam_is_never_beaten_by_a_narrower_one():
    language = Language(5, 4, 7, seed=4)
    widest, *narrower = (search(language, [4] * 7, beam_size=size, alpha=0.6).scores for size in (64, 1, 2, 4, 8))
    assert all((widest >= scores - 1e-6).all() for scores in narrower)


@pytest.mark.parametrize("beam_size", [None, 3], ids=["greedy", "beam"])
def test_each_sentence_ends_at_its_own_limit_and_not_sooner_for_its_neighbours(beam_size):
    limits = [1, 2, 5, 3]
    language = Language(5, 5, len(limits), seed=5)
    language.logits[:, :, EOS] -= 20  # Nobody ends who is not made to.
    found = search(language, limits, beam_size=beam_size)
    assert found.lengths[:, 0].tolist() == limits
    assert found.tokens[:, 0][np.arange(4), np.array(limits) - 1].tolist() == [EOS] * 4
    for sentence, limit in enumerate(limits):
        alone = Language(5, 5, seed=5)
        alone.logits, alone.shifts = language.logits[sentence : sentence + 1], language.shifts
        assert outputs(search(alone, [limit], beam_size=beam_size), 0) == outputs(found, sentence)


@pytest.mark.parametrize("beam_size", [None, 3], ids=["greedy", "beam"])
def test_more_room_than_the_limits_allow_is_only_padding(beam_size):
    language = Language(5, 5, seed=6)
    exact, roomy = (search(language, [5, 4], beam_size=beam_size, max_length=room) for room in (5, 11))
    assert np.array_equal(roomy.tokens[:, :, :5], exact.tokens) and (roomy.tokens[:, :, 5:] == PAD).all()
    assert np.array_equal(roomy.scores, exact.scores) and np.array_equal(roomy.lengths, exact.lengths)


@pytest.mark.parametrize("beam_size", [None, 3], ids=["greedy", "beam"])
def test_a_search_that_has_its_answer_asks_no_further(beam_size):
    language = Language(5, 6, seed=7)
    certain = jnp.where(jnp.arange(5) == EOS, 50.0, 0.0)

    def step(state, tokens):
        state, logits = language.step(state, tokens)
        logits = jnp.where(state["steps"] == 3, certain, logits)
        return state, jnp.where(state["steps"] > 3, jnp.nan, logits)  # The fourth step would spoil everything.

    found = search(language, [6, 6], beam_size=beam_size, step=step)
    assert np.isfinite(found.scores).all()
    assert (found.lengths <= 3).all()


@pytest.mark.parametrize("beam_size", [None, 3], ids=["greedy", "beam"])
def test_under_jit_and_without_it_the_result_is_the_same(beam_size):
    language = Language(5, 3, seed=8)
    eager, jitted = (search(language, [3, 2], beam_size=beam_size, jit=jit) for jit in (False, True))
    assert np.array_equal(eager.tokens, jitted.tokens)
    np.testing.assert_allclose(eager.scores, jitted.scores, rtol=1e-6)


@pytest.mark.parametrize("beam_size", [None, 3], ids=["greedy", "beam"])
def test_tokens_of_no_probability_are_never_chosen_and_make_no_nan(beam_size):
    language = Language(5, 5, 7, seed=9)
    language.logits[:, :, [PAD, START]] = -np.inf
    language.logits[0, :, :EOS] = language.logits[0, :, EOS + 1 :] = -np.inf  # Here only ending is possible.
    found = search(language, [5] * 7, beam_size=beam_size, **{"num_return": beam_size} if beam_size else {})
    assert not np.isnan(found.scores).any() and not np.isnan(found.log_probs).any()
    for sentence in range(7):
        assert all(not {PAD, START} & set(tokens) for tokens in outputs(found, sentence))
    assert outputs(found, 0) == [(EOS,)] + [()] * ((beam_size or 1) - 1)
    assert found.scores[0].tolist() == [0.0] + [-np.inf] * ((beam_size or 1) - 1)


def test_the_length_penalty_is_wus():
    lengths = jnp.array([1, 7, 19])
    np.testing.assert_allclose(length_penalty(lengths, 0), [1, 1, 1])
    np.testing.assert_allclose(length_penalty(lengths, 1), [1, 2, 4])
    np.testing.assert_allclose(length_penalty(lengths, 0.5), [1, 2**0.5, 2], rtol=1e-6)


def test_more_to_return_than_the_beam_holds_is_an_error():
    with pytest.raises(ValueError, match="num_return is 4, beam_size is 3: raise the beam"):
        search(Language(5, 2), [2, 2], beam_size=3, num_return=4)


def test_hypotheses_have_the_shapes_and_types_they_name():
    for found, returned in (
        (search(Language(5, 4), [4, 3]), 1),
        (search(Language(5, 4), [4, 3], beam_size=3, num_return=2), 2),
    ):
        assert found.tokens.shape == (2, returned, 4)
        assert {leaf.shape for leaf in (found.lengths, found.log_probs, found.scores)} == {(2, returned)}
        assert found.tokens.dtype == found.lengths.dtype == np.int32
        assert found.log_probs.dtype == found.scores.dtype == np.float32

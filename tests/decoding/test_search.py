"""Compares searches with an exhaustive search of every sequence, over made-up tables of log-probabilities.

The next token of these languages depends on the whole beginning of the sequence, which the step function knows only
from its state. If a state ever belonged to another hypothesis, a wrong log-probability would show it.
"""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.decoding.search import Hypotheses, Search
from flax_transformer.decoding.settings import BeamSearch, Sampling

PAD, START, EOS = 0, 1, 2
B, V, L = 7, 5, 5
greedy_and_beam = pytest.mark.parametrize("beam_size", [None, 3], ids=["greedy", "beam"])


class Language:
    """Random logits for whatever follows each beginning, for each of B sentences.

    A beginning's number is its tokens, the start token first, read as digits to the base V.
    """

    def __init__(self, seed, vocabulary=V, longest=L):
        rng = np.random.default_rng(seed)
        self.logits = rng.normal(scale=1.5, size=(B, vocabulary**longest, vocabulary)).astype("float32")
        # Added at each step: what the scalar in the state, which counts them, is there for.
        self.shifts = rng.normal(size=(longest, vocabulary)).astype("float32")

    def log_probs(self, sentence, tokens):
        """The log-probability, in float64, of each token of the vocabulary after these."""
        number = 0
        for token in (START, *tokens):
            number = number * self.logits.shape[-1] + token
        logits = (self.logits[sentence, number] + self.shifts[len(tokens)]).astype(float)
        return logits - np.log(np.exp(logits).sum())

    def log_prob(self, sentence, tokens):
        return sum(self.log_probs(sentence, tokens[:place])[token] for place, token in enumerate(tokens))

    def every_output(self, limit):
        """All sequences that end with the end of sentence within the limit."""
        others = [token for token in range(self.logits.shape[-1]) if token not in (START, EOS)]
        for length in range(limit):
            for tokens in itertools.product(others, repeat=length):
                yield (*tokens, EOS)


def search_tables(logits, shifts, limits, prefix=None, rngs=None, *, settings, max_length):
    """Searches a language."""

    def step(state, tokens):
        beginning = state["beginning"] * logits.shape[-1] + tokens
        next_logits = logits[state["sentence"], beginning] + shifts[state["steps"]]
        return {**state, "beginning": beginning, "steps": state["steps"] + 1}, next_logits

    sentence = jnp.repeat(jnp.arange(B), settings.hypotheses)
    state = {"sentence": sentence, "beginning": jnp.zeros_like(sentence), "steps": jnp.zeros((), jnp.int32)}
    ids = {"start_id": START, "eos_id": EOS, "pad_id": PAD}
    options = {"settings": settings, "max_length": max_length, "prefix": prefix, "rngs": rngs, **ids}
    search = Search(step_fn=step, limits=limits, **options)
    progress = search.run(state)
    return search.result(progress), search.open(progress)


# One program for all languages of one size.
search_jitted = jax.jit(search_tables, static_argnames=("settings", "max_length"))


def search(language, limits, settings=None, *, prefix=None, rngs=None, max_length=L, run=search_jitted, **wishes):
    """The hypotheses as NumPy arrays, and `is_open`, of a beam, or of greedy search if no beam is given."""
    if settings is None:
        settings = BeamSearch(beam_size=wishes.pop("beam_size", None) or 1, **wishes)
    arrays = map(jnp.asarray, (language.logits, language.shifts, limits))
    prefix = None if prefix is None else jnp.asarray(prefix)
    found, is_open = run(*arrays, prefix, rngs, settings=settings, max_length=max_length)
    assert isinstance(found, Hypotheses)
    return SimpleNamespace(**jax.device_get(vars(found)), is_open=np.asarray(is_open))


def outputs(found, sentence):
    """The hypotheses of one sentence, each as a tuple of its tokens."""
    rows = zip(found.tokens[sentence].tolist(), found.lengths[sentence].tolist(), strict=True)
    return [tuple(tokens[:length]) for tokens, length in rows]


def paper_score(log_prob, length, alpha=0.6):
    return log_prob / ((5 + length) / 6) ** alpha


def length_score(log_prob, length, alpha=0.6):
    return log_prob / length**alpha


SCORES = {"paper": paper_score, "length": length_score}


@pytest.mark.parametrize(
    "vocabulary, limits, penalty, alpha",
    [
        (5, [4, 1, 3, 2, 4, 4, 3], "paper", 0),
        (5, [4, 1, 3, 2, 4, 4, 3], "paper", 0.6),
        (5, [4, 1, 3, 2, 4, 4, 3], "paper", 1),
        (4, [5, 1, 3, 2, 4, 5, 3], "paper", -0.5),
        (5, [4, 1, 3, 2, 4, 4, 3], "length", 0.6),
        (4, [5, 1, 3, 2, 4, 5, 3], "length", 1),
        (4, [5, 1, 3, 2, 4, 5, 3], "length", -0.5),
    ],
)
def test_a_beam_as_wide_as_the_language_equals_exhaustive_search(vocabulary, limits, penalty, alpha):
    language = Language(0, vocabulary)
    beam_size = (vocabulary - 1) ** (max(limits) - 1)
    options = {"beam_size": beam_size, "num_return": beam_size, "alpha": alpha, "length_penalty": penalty}
    found = search(language, limits, **options)
    for sentence, limit in enumerate(limits):
        log_probs = {tokens: language.log_prob(sentence, tokens) for tokens in language.every_output(limit)}
        scores = {tokens: SCORES[penalty](log_prob, len(tokens), alpha) for tokens, log_prob in log_probs.items()}
        best = sorted(scores, key=scores.get, reverse=True)[:beam_size]
        count = len(best)
        assert outputs(found, sentence)[:count] == best
        np.testing.assert_allclose(found.log_probs[sentence, :count], [log_probs[tokens] for tokens in best], rtol=1e-5)
        np.testing.assert_allclose(found.scores[sentence, :count], [scores[tokens] for tokens in best], rtol=1e-5)
        # If the limit allows fewer outputs than requested, the rest are empty.
        assert (found.scores[sentence, count:] == -np.inf).all()
        assert (found.log_probs[sentence, count:] == -np.inf).all()
        assert not found.lengths[sentence, count:].any() and (found.tokens[sentence, count:] == PAD).all()


def may_come(tokens, limit, settings, prefix, vocabulary):
    """A direct definition: the first constraint that applies decides."""
    if len(tokens) == limit - 1:
        return {EOS}
    if len(tokens) < len(prefix):
        return {prefix[len(tokens)]}
    allowed = set(range(vocabulary)) - {START} - set(settings.banned)
    if len(tokens) + 1 < settings.min_length:
        allowed -= {EOS}
    if size := settings.no_repeat_ngram:
        seen = {tokens[start : start + size] for start in range(len(tokens) - size + 1)}
        allowed = {token for token in allowed if (*tokens, token)[-size:] not in seen}
    return allowed or {EOS}


def plain_beam_search(language, sentence, limit, settings, prefix=()):
    """Beam search as one would write it on paper: no state and no arrays, and the optimal one does not stop early.

    "first" is the rule of transformers' `early_stopping=True`.
    """
    size, first, live, ended = settings.beam_size, settings.stopping == "first", [((), 0.0)], []
    for length in range(1, limit + 1):
        grown = []
        for tokens, total in live:
            log_probs = language.log_probs(sentence, tokens)
            allowed = may_come(tokens, limit, settings, prefix, len(log_probs))
            grown += [((*tokens, token), total + log_probs[token]) for token in allowed]
        grown = sorted(grown, key=lambda hypothesis: hypothesis[1], reverse=True)[: 2 * size if first else None]
        ends = [hypothesis for hypothesis in grown[: size if first else None] if hypothesis[0][-1] == EOS]
        scored = [(SCORES[settings.length_penalty](total, length, settings.alpha), tokens) for tokens, total in ends]
        ended = sorted([*ended, *scored], reverse=True)[:size]
        if first and len(ended) == size:
            break
        live = [hypothesis for hypothesis in grown if hypothesis[0][-1] != EOS][:size]
    return ended[: settings.num_return]


def check_against_paper(language, limits, settings, prefixes=((),) * B):
    """The outputs and their scores equal those of the simple search."""
    longest = max(map(len, prefixes))
    prefix = np.array([[*row, *[PAD] * (longest - len(row))] for row in prefixes], "int32") if longest else None
    found = search(language, limits, settings, prefix=prefix, max_length=max(limits))
    for sentence, limit in enumerate(limits):
        expected = plain_beam_search(language, sentence, limit, settings, prefixes[sentence])
        places = settings.num_return - len(expected)
        assert outputs(found, sentence) == [tokens for _, tokens in expected] + [()] * places
        scores = [score for score, _ in expected] + [-np.inf] * places
        np.testing.assert_allclose(found.scores[sentence], scores, rtol=1e-5)
    return found


@pytest.mark.parametrize(
    "beam_size, num_return, alpha", [(2, 1, 0.6), (3, 1, 0), (3, 1, 0.6), (3, 1, 1), (3, 1, -0.5), (3, 3, 0.6)]
)
def test_a_narrow_beam_without_early_stopping_equals_the_hand_calculation(beam_size, num_return, alpha):
    settings = BeamSearch(beam_size=beam_size, alpha=alpha, num_return=num_return)
    check_against_paper(Language(1), [5, 2, 5, 4, 5, 3, 5], settings)


@pytest.mark.parametrize(
    "beam_size, num_return, penalty, alpha",
    [(2, 2, "length", 0), (3, 3, "length", 0.6), (4, 1, "paper", 1)],
)
def test_a_search_that_stops_first_equals_the_hand_calculation(beam_size, num_return, penalty, alpha):
    settings = BeamSearch(
        beam_size=beam_size, num_return=num_return, length_penalty=penalty, alpha=alpha, stopping="first"
    )
    others = 0
    for seed in range(20, 23):
        found = check_against_paper(Language(seed), [5, 2, 5, 4, 5, 3, 5], settings)
        patient = search(Language(seed), [5, 2, 5, 4, 5, 3, 5], settings.replace(stopping="optimal"))
        others += sum(outputs(found, sentence) != outputs(patient, sentence) for sentence in range(B))
    assert others > 0  # otherwise the two rules would not have been distinguished


WISHES = {
    "all banned": {"banned": (0, 1, 3)},
    "longer": {"min_length": 4},
    "longer than the limit": {"min_length": 9},
    "no word twice": {"no_repeat_ngram": 1},
    "no two words twice": {"no_repeat_ngram": 2},
    "no three words twice": {"no_repeat_ngram": 3},
    "all together": {"banned": (1,), "min_length": 5, "no_repeat_ngram": 2},
    "all together, first": {"banned": (1,), "min_length": 5, "no_repeat_ngram": 2, "stopping": "first"},
}


@pytest.mark.parametrize("name", WISHES)
def test_constraints_give_the_results_of_the_hand_calculation(name):
    settings = BeamSearch(beam_size=3, num_return=2, **WISHES[name])
    language = Language(30, vocabulary=4, longest=7)
    language.shifts[:, [EOS, 3]] += [-3, 3]  # longer outputs that repeat themselves
    limits = [7, 2, 7, 4, 6, 1, 7]
    # Some have none, another one is as long as possible; a prefix overrides the other constraints.
    prefixes = [(3, 3, 3), (1,), (), (3, 1, 3), (), (), (3, 3, 1, 1, 3, 3)]
    check_against_paper(language, limits, settings, prefixes)
    kept, free = (
        [plain_beam_search(language, sentence, limit, wished)[0] for sentence, limit in enumerate(limits)]
        for wished in (settings, BeamSearch(beam_size=3))
    )
    assert kept != free


@pytest.mark.parametrize("settings", [BeamSearch(beam_size=1), BeamSearch(beam_size=3, num_return=3), Sampling()])
def test_token_log_probabilities_are_the_languages_own_and_sum_to_the_outputs(settings):
    """Constraints and the limit do not change the probability of a chosen token."""
    language = Language(31)
    settings = settings.replace(banned=(1,), min_length=3, no_repeat_ngram=2)
    found = search(language, [5, 4, 5, 3, 5, 2, 1], settings, prefix=[[4]] * 6 + [[PAD]], rngs=keys(0))
    for sentence in range(B):
        for rank, tokens in enumerate(outputs(found, sentence)):
            expected = [language.log_probs(sentence, tokens[:place])[token] for place, token in enumerate(tokens)]
            each = found.token_log_probs[sentence, rank]
            np.testing.assert_allclose(each[: len(tokens)], expected, atol=1e-5)
            assert not each[len(tokens) :].any()
            if tokens:
                np.testing.assert_allclose(found.log_probs[sentence, rank], sum(expected), atol=1e-5)


def keys(seed):
    return jax.random.split(jax.random.key(seed), B)


@pytest.mark.parametrize(
    "alpha, end, go_on, length, score",
    [
        (0, 0.4, 0.3, 1, np.log(0.4)),
        (1, 0.4, 0.3, 5, np.log(0.3) / (10 / 6)),
        (-1, 0.3, 0.4, 2, np.log(0.4) * (7 / 6)),
    ],
)
def test_search_continues_while_a_longer_output_can_become_the_best(alpha, end, go_on, length, score):
    language = Language(20)
    language.logits[:], language.shifts[:] = 0, 0
    language.logits[:, START] = np.log([0.05, 0.05, end, go_on, 0.2])
    language.shifts[1:, 3] = 50  # If it does not end at once, it certainly continues with 3.
    language.shifts[max(length, 2) - 1, EOS] = 100
    found = search(language, [5] * B, beam_size=3, alpha=alpha, num_return=1)
    for sentence in range(B):
        assert outputs(found, sentence) == [(3,) * (length - 1) + (EOS,)]
    np.testing.assert_allclose(found.scores, score, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"beam_size": 3, "num_return": 3}], ids=["greedy", "beam"])
def test_outputs_end_once_and_have_the_languages_log_probability(options):
    language = Language(2)
    found = search(language, [5] * B, **options)
    for sentence in range(B):
        expected = [language.log_prob(sentence, tokens) for tokens in outputs(found, sentence)]
        np.testing.assert_allclose(found.log_probs[sentence], expected, rtol=1e-5)
        assert all(tokens.index(EOS) == len(tokens) - 1 for tokens in outputs(found, sentence))
    behind = np.arange(L) >= found.lengths[..., None]
    assert (found.tokens[behind] == PAD).all()
    assert (np.diff(found.scores, axis=1) <= 0).all()


def test_greedy_takes_the_most_probable_token_each_time():
    limits = [5, 1, 3, 4, 5, 5, 2]
    language = Language(3)
    found = search(language, limits)
    for sentence, limit in enumerate(limits):
        tokens = ()
        while EOS not in tokens:
            log_probs = language.log_probs(sentence, tokens)
            log_probs[START] = -np.inf
            tokens += (EOS if len(tokens) == limit - 1 else int(log_probs.argmax()),)
        assert outputs(found, sentence) == [tokens]
        expected = paper_score(language.log_prob(sentence, tokens), len(tokens))
        np.testing.assert_allclose(found.scores[sentence], [expected], rtol=1e-5)


def test_no_beam_beats_the_widest():
    language, limits = Language(10), [4] * B
    widest = search(language, limits, beam_size=64, num_return=64).scores[:, :1]
    for beam_size in (1, 3):
        assert (widest >= search(language, limits, beam_size=beam_size, num_return=1).scores - 1e-6).all()


@greedy_and_beam
def test_each_sentence_ends_at_its_own_limit(beam_size):
    limits = [1, 2, 5, 3, 4, 5, 1]
    language = Language(11)
    language.shifts[:, EOS] = [-50, -40, -30, -20, -10]  # The longer, the better.
    found = search(language, limits, beam_size=beam_size)
    assert found.lengths[:, 0].tolist() == limits
    assert found.tokens[np.arange(B), 0, np.array(limits) - 1].tolist() == [EOS] * B


@greedy_and_beam
def test_the_other_sentences_of_a_batch_do_not_change_a_result(beam_size):
    language, others = Language(12), Language(13)
    language.shifts = others.shifts
    language.logits[[0, 2, 3]] = others.logits[[0, 2, 3]]
    found = search(language, [5, 4, 5, 3, 5, 5, 5], beam_size=beam_size)
    elsewhere = search(others, [5, 1, 5, 3, 1, 2, 1], beam_size=beam_size)
    for name in ("tokens", "lengths", "log_probs", "scores"):
        assert np.array_equal(getattr(found, name)[[0, 2, 3]], getattr(elsewhere, name)[[0, 2, 3]])


@greedy_and_beam
def test_room_beyond_the_limits_is_only_padding(beam_size):
    exact, roomy = (search(Language(14), [5] * B, beam_size=beam_size, max_length=room) for room in (L, 11))
    assert np.array_equal(roomy.tokens[..., :L], exact.tokens) and (roomy.tokens[..., L:] == PAD).all()
    for name in ("lengths", "log_probs", "scores"):
        assert np.array_equal(getattr(roomy, name), getattr(exact, name))


@pytest.mark.parametrize("wishes", [{}, {"beam_size": 3, "num_return": 2}, {"beam_size": 3, "stopping": "first"}])
def test_a_result_that_is_final_when_the_room_is_full_equals_that_with_more_room(wishes):
    open_ones = 0
    for seed in range(40, 43):
        limits = [5, 3, 5, 4, 5, 2, 5]
        cramped, roomy = (search(Language(seed), limits, max_length=room, **wishes) for room in (3, L))
        assert not roomy.is_open.any()
        for sentence in np.flatnonzero(~cramped.is_open):
            assert outputs(cramped, sentence) == outputs(roomy, sentence)
            assert np.array_equal(cramped.scores[sentence], roomy.scores[sentence])
        assert not cramped.is_open[[1, 5]].any()  # whose limits there is room for
        open_ones += cramped.is_open.sum()
        assert not cramped.is_open.all()
    assert open_ones


@greedy_and_beam
def test_a_finished_search_makes_no_more_steps(beam_size):
    language = Language(15)
    language.logits[:, V**2 : V**3, EOS] += 50  # After two tokens everything ends.
    finite = search(language, [5] * B, beam_size=beam_size)
    language.shifts[3:] = np.nan  # The fourth step would spoil everything.
    found = search(language, [5] * B, beam_size=beam_size)
    assert np.isfinite(found.scores).all()
    assert np.array_equal(found.scores, finite.scores) and np.array_equal(found.tokens, finite.tokens)


@greedy_and_beam
def test_jit_and_64_bits_do_not_change_the_result(beam_size):
    limits = [3, 1, 2, 3, 3, 2, 1]
    runs = (search_tables, search_jitted)
    eager, jitted = (search(Language(16), limits, beam_size=beam_size, run=run) for run in runs)
    with jax.enable_x64(True):
        wide = search(Language(16), limits, beam_size=beam_size)
    for other in (jitted, wide):
        assert np.array_equal(eager.tokens, other.tokens)
        np.testing.assert_allclose(eager.scores, other.scores, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"beam_size": 3, "num_return": 3}], ids=["greedy", "beam"])
def test_tokens_of_zero_probability_are_never_chosen_and_give_no_nan(options):
    language = Language(17)
    language.logits[:, :, [PAD, START]] = -np.inf
    language.logits[0, :, np.arange(V) != EOS] = -np.inf  # Here only the end is possible.
    found = search(language, [5] * B, **options)
    assert not np.isnan(found.scores).any() and not np.isnan(found.log_probs).any()
    for sentence in range(B):
        assert all(not {PAD, START} & set(tokens) for tokens in outputs(found, sentence))
    nothing = options.get("num_return", 1) - 1
    assert outputs(found, 0) == [(EOS,)] + [()] * nothing
    assert found.scores[0].tolist() == [0.0] + [-np.inf] * nothing


@pytest.mark.parametrize("options", [{}, {"beam_size": 3, "num_return": 3}], ids=["greedy", "beam"])
def test_hypotheses_have_the_annotated_shapes_and_types(options):
    found, returned = search(Language(19), [5] * B, **options), options.get("num_return", 1)
    assert found.tokens.shape == (B, returned, L)
    assert {leaf.shape for leaf in (found.lengths, found.log_probs, found.scores)} == {(B, returned)}
    assert found.tokens.dtype == found.lengths.dtype == np.int32
    assert found.log_probs.dtype == found.scores.dtype == np.float32

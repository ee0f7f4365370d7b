import subprocess
import sys

import jax
import numpy as np
import pytest

from flax_transformer.decoding.settings import LENGTH_PENALTIES, STOPPING, BeamSearch, Sampling

both = pytest.mark.parametrize("kind", [BeamSearch, Sampling])


def test_a_beam_of_four_under_the_papers_penalty_is_the_default():
    settings = BeamSearch()
    assert (settings.beam_size, settings.alpha, settings.extra_length) == (4, 0.6, 50)  # section 6.1
    assert (settings.length_penalty, settings.stopping, settings.num_return) == ("paper", "optimal", 1)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"length_penalty": "wu"}, "length_penalty is 'wu': choose one of paper, length"),
        ({"num_return": 0}, "num_return is 0: it must be at least 1"),
        ({"max_length": 0}, "max_length is 0: it must be at least 1"),
        ({"extra_length": -1}, "extra_length is -1: it must be at least 0"),
        ({"min_length": -3}, "min_length is -3: it must be at least 0"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram is -1: it must be at least 0"),
    ],
)
@both
def test_values_that_make_no_sense_are_errors_with_a_remedy(kind, wish, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        kind(**wish)
    with pytest.raises(ValueError, match=f"^{message}$"):
        kind().replace(**wish)


@pytest.mark.parametrize(
    ("kind", "wish", "message"),
    [
        (BeamSearch, {"beam_size": 0}, "beam_size is 0: it must be at least 1"),
        (BeamSearch, {"stopping": "never"}, "stopping is 'never': choose one of optimal, first"),
        (BeamSearch, {"beam_size": 3, "num_return": 4}, "num_return is 4, but beam_size is 3.*"),
        (Sampling, {"temperature": 0.0}, "temperature is 0.0: it must be above 0; a beam of 1 is the limit at 0"),
        (Sampling, {"temperature": -1.0}, "temperature is -1.0: .*"),
        (Sampling, {"temperature": float("nan")}, "temperature is nan: .*"),
        (Sampling, {"top_k": -1}, "top_k is -1: it must be at least 0"),
        (Sampling, {"top_p": 0.0}, "top_p is 0.0: it must be above 0 and at most 1"),
        (Sampling, {"top_p": 1.5}, "top_p is 1.5: it must be above 0 and at most 1"),
    ],
)
def test_values_that_make_no_sense_for_one_kind_of_search_are_errors(kind, wish, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        kind(**wish)


def test_the_smallest_and_largest_allowed_values_are_accepted():
    common = {"num_return": 1, "max_length": 1, "extra_length": 0, "min_length": 0, "no_repeat_ngram": 0, "alpha": 0.0}
    for penalty in LENGTH_PENALTIES:
        for stopping in STOPPING:
            BeamSearch(beam_size=1, length_penalty=penalty, stopping=stopping, **common)
    Sampling(temperature=1e-3, top_k=0, top_p=1.0, **common)
    assert BeamSearch(beam_size=3, num_return=3).num_return == 3


@pytest.mark.parametrize(
    ("wish", "source", "limit"),
    [
        ({}, 7, 57),
        ({"extra_length": 0}, 7, 7),
        ({"max_length": 20}, 7, 20),
        ({"max_length": 20, "extra_length": 5}, 7, 12),
        ({"max_length": 1}, 7, 1),
    ],
)
@both
def test_the_limit_follows_the_source_up_to_the_longest(kind, wish, source, limit):
    assert kind(**wish).limit(source) == limit


@pytest.mark.parametrize(
    ("name", "alpha", "expected"),
    [
        ("paper", 0, [1, 1, 1]),
        ("paper", 1, [1, 2, 4]),  # equation 14 of Wu et al. by hand: (5 + 1) / 6, (5 + 7) / 6, (5 + 19) / 6
        ("paper", -1, [1, 1 / 2, 1 / 4]),
        ("length", 0, [1, 1, 1]),
        ("length", 1, [1, 7, 19]),
        ("length", 0.5, [1, 7**0.5, 19**0.5]),
    ],
)
@both
def test_the_penalty_takes_a_number_or_an_array(kind, name, alpha, expected):
    settings = kind(length_penalty=name, alpha=alpha)
    np.testing.assert_allclose([settings.penalty(length) for length in (1, 7, 19)], expected, rtol=1e-6)
    np.testing.assert_allclose(settings.penalty(np.array([1, 7, 19])), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(settings.penalty)(np.array([1, 7, 19])), expected, rtol=1e-6)


@both
def test_settings_can_be_static_arguments_and_are_equal_if_their_fields_are(kind):
    from_json = kind(banned=[5, 7], alpha=1.0)
    assert from_json == kind(banned=(5, 7), alpha=1.0) and hash(from_json) == hash(kind(banned=(5, 7), alpha=1.0))
    assert from_json != kind(banned=(5,), alpha=1.0)
    assert from_json.replace(alpha=0.6, banned=()) == kind()


def test_the_number_of_hypotheses_is_the_beam_size_or_the_number_of_samples():
    assert BeamSearch(beam_size=5, num_return=2).hypotheses == 5
    assert Sampling(num_return=3).hypotheses == 3


def test_settings_do_not_import_jax():
    program = "import sys; import flax_transformer.decoding.settings; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0

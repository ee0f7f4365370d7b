"""Minimum Bayes risk decoding: the sample that is most like the others comes first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sacrebleu.metrics import CHRF

from flax_transformer.decoding.mbr import agreement, rank_by_agreement
from flax_transformer.decoding.results import Translation
from flax_transformer.decoding.search import Search
from flax_transformer.decoding.settings import BeamSearch, Sampling, in_words

TEXTS = ["the black cat sat", "the black cat sits", "a black cat sat there", "zebra", "the black cat sat", ""]


def test_the_first_has_the_highest_mean_chrf_against_all_samples():
    means = {text: np.mean([CHRF().sentence_score(text, [other]).score for other in TEXTS]) for text in TEXTS}
    found = [translation.text for translation in rank_by_agreement([Translation(text) for text in TEXTS])]
    assert sorted(found) == sorted(TEXTS)
    assert found[:2] == ["the black cat sat"] * 2 and found[-1] in ("", "zebra")
    assert [means[text] for text in found[:4]] == sorted([means[text] for text in found[:4]], reverse=True)


def test_a_text_agrees_with_itself_and_with_nothing_else_that_shares_no_character():
    found = agreement(["abc def", "xyz", ""])
    assert np.diag(found).tolist() == [1, 1, 1]
    assert found[0, 1] == found[1, 0] == 0


def test_agreement_is_sacrebleu_s_chrf():
    rng = np.random.default_rng(0)
    words = "the black cat sat ಬೆಕ್ಕು ಕುಳಿತಿತು a ab abc 12 12,5 !".split()
    texts = [" ".join(rng.choice(words, rng.integers(0, 9))) for _ in range(24)] + ["a", "ab", " \u200b ", "x  y\tz"]
    texts = sorted(set(texts))
    metric = CHRF()
    expected = [[metric.sentence_score(text, [other]).score / 100 for other in texts] for text in texts]
    found = agreement(texts)
    different = [[text != other for other in texts] for text in texts]
    np.testing.assert_allclose(found, np.where(different, expected, 1.0), atol=1e-12)


def test_the_translator_returns_the_samples_that_agree_most(translator):
    sentences = ["the cat sat", "", "a dog runs up"]
    search = Sampling(temperature=0.8, extra_length=4)
    drawn = translator.hypotheses(sentences, search.replace(num_return=9), seed=3)
    best = [rank_by_agreement(samples) for samples in drawn]
    found = translator.hypotheses(sentences, search.replace(mbr=9, num_return=2), seed=3)
    assert found == [samples[:2] for samples in best]
    assert translator.translate(sentences, search.replace(mbr=9), seed=3) == [samples[0].text for samples in best]
    assert any(samples[0] != kept[0] for samples, kept in zip(drawn, best, strict=True))


def test_settings_that_contradict_each_other_are_refused():
    assert in_words(BeamSearch(beam_size=5, alpha=1.4, length_penalty="length")) == "a beam of 5, length^1.4"
    assert in_words(Sampling(mbr=8)) == "sampling, temperature 1, the one most like the others of 8"
    assert in_words(Sampling(top_k=5, top_p=0.9)) == "sampling, temperature 1, top_k 5, top_p 0.9"
    with pytest.raises(ValueError, match="num_return is 9, but mbr is 8: lower the first or raise the second"):
        Sampling(mbr=8, num_return=9)


def test_a_search_of_token_ids_has_no_texts_to_compare(translator):
    settings, rngs = Sampling(mbr=8, num_return=2), np.zeros((1, 2), "uint32")
    message = r"mbr is 8: it compares texts.*Translator\.hypotheses, or .*num_return=8"
    with pytest.raises(ValueError, match=message):
        translator.engine.submit([[5, translator.config.eos_id]], settings, rngs=rngs)
    limits = {"limits": jnp.array([3]), "max_length": 3, "start_id": 1, "eos_id": 2, "pad_id": 0}
    with pytest.raises(ValueError, match=message):
        Search(
            step_fn=lambda state, tokens: (state, tokens),
            settings=settings,
            rngs=jax.random.split(jax.random.key(0), 1),
            **limits,
        )

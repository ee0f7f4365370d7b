import re
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformer.data.vocabulary import VocabularyPair
from flax_transformer.decoding.documents import align_texts, translate_documents
from flax_transformer.decoding.requests import Output
from flax_transformer.decoding.scoring import best_aligned
from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator
from flax_transformer.decoding.unknown import find_copies
from flax_transformer.decoding.writing import write_translations
from flax_transformer.experiment import VocabularyConfig
from flax_transformer.trained_model import TrainedModel

GREEDY = BeamSearch(beam_size=1, max_length=9)


@pytest.fixture(scope="module")
def translator(make_model, say):
    lines = [say(100 + number, 6) for number in range(40)]
    vocabularies = VocabularyPair.train(lines, lines, VocabularyConfig(size=110, byte_fallback=False))
    config, params = make_model(vocabularies.source.size, seed=3, num_decoder_layers=2, max_length=40)
    return Translator(TrainedModel(config=config, params=params, vocabularies=vocabularies))


def test_a_text_has_the_translations_of_its_sentences_and_all_else(translator):
    assert translate_documents(translator, ["", "42"], GREEDY) == ["", "42"]
    (found,) = translate_documents(translator, ["- A cat runs. \t The dog sat!\n\n42\n  it is fast  \n"], GREEDY)
    own = translator.translate(["A cat runs.", "The dog sat!", "it is fast"], GREEDY, replace_unknown=True)
    assert found == f"- {own[0]} \t {own[1]}\n\n42\n  {own[2]}  \n"


def test_a_single_text_is_not_taken_for_a_list_of_letters(translator):
    with pytest.raises(ValueError, match="texts is one string: give a list of them"):
        translate_documents(translator, "A cat runs. The dog sat!", GREEDY)


def test_markup_keeps_its_tags_and_gets_the_words_of_the_translation(translator):
    page = "<ul><li>the <b>old dog</b> runs</li><li>a <i>red <u>mouse</u></i></li></ul>"
    (found,) = translate_documents(translator, [page], GREEDY, markup=True, replace_unknown=False)
    assert sorted(re.findall("<[^>]+>", found)) == sorted(re.findall("<[^>]+>", page))
    said = translator.translate(["the old dog runs", "a red mouse"], GREEDY)
    assert [re.sub("<[^>]+>", "", item) for item in found.split("</li>")[:2]] == said


def test_texts_are_aligned_by_the_characters_of_their_pieces(translator):
    sources = ["the old dog", "", "cat"]
    found = [hypotheses[0] for hypotheses in translator.hypotheses(sources, GREEDY)]
    aligned = align_texts(translator, sources, found, [True] * 3)
    assert aligned[1] is None  # nothing was translated
    for source, translation, alignment in zip(sources, found, aligned, strict=True):
        if alignment is not None:
            assert alignment.weights.shape == (len(alignment.target_spans), len(alignment.source_spans))
            assert "".join(source[start:stop] for start, stop in alignment.source_spans) == source.replace(" ", "")
            assert len(alignment.target_spans) == len(translation.tokens)
    assert align_texts(translator, sources, found, [False] * 3) == [None] * 3


def test_the_layer_whose_heads_agree_aligns_and_its_sharp_heads_count_most():
    rng = np.random.default_rng(0)
    target, source = 5, 7
    shifted = np.eye(target, source)[:, ::-1]
    right = np.eye(target, source)
    blurred = np.full((target, source), 1 / source)
    # Layer 0 has sharp heads that disagree, layer 1 heads that agree more or less.
    weights = np.stack([[shifted, right[::-1]], [right, 0.8 * right + 0.2 * blurred]])[:, None]
    all_words = np.ones((1, source), bool), np.ones((1, target), bool)
    found = np.asarray(best_aligned(jnp.asarray(weights), *map(jnp.asarray, all_words)))[0]
    assert (found.argmax(axis=1) == np.arange(target)).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    assert found[0, 0] > 0.95  # the mean of the heads has 0.91
    # What is at the end of the source and behind does not count.
    noise = weights.copy()
    noise[1, :, :, :, -1] += rng.random((1, 2, target))
    words = np.arange(source)[None] < source - 1
    again = np.asarray(best_aligned(jnp.asarray(noise), jnp.asarray(words), jnp.asarray(all_words[1])))[0]
    assert (again[:, :-1].argmax(axis=1) == np.arange(target)).all()


def outputs(translator, *texts):
    rows = translator.vocabularies.target.encode(texts)
    return [[[Output(np.array(ids, np.int32), np.zeros(len(ids)))]] for ids in rows]


def test_unknown_pieces_are_replaced_by_the_unknown_characters_of_the_source(translator):
    sources = ["a ☃☃ cat", "the dog", "it \U0001f600 is"]
    decoded = outputs(translator, "the ♛ cat", "a dog", "♛")
    parts = [[ids] for ids in translator.vocabularies.source.encode(sources)]
    copies = find_copies(
        translator.vocabularies, partial(translator._scorer.align, layer=None), sources, parts, decoded
    )
    assert copies == [[[["☃☃"]]], [[[]]], [[["\U0001f600"]]]]
    target = translator.vocabularies.target
    said = [write_translations(target, one, GREEDY, "", own)[0] for one, own in zip(decoded, copies, strict=True)]
    assert [one.text for one in said] == ["the ☃☃ cat", "a dog", "\U0001f600"]
    assert "<unk>" in said[0].tokens and "⁇" in write_translations(target, decoded[0], GREEDY)[0].text


def test_unknown_characters_of_a_prefix_are_the_prefix_s_own(translator):
    found = translator.translate(["a ☃ cat"], GREEDY, prefixes=["the ♛"], replace_unknown=True)
    assert found[0].startswith("the ♛") and "☃" not in found[0].removeprefix("the ♛").partition("⁇")[0]


def test_replacing_changes_nothing_where_nothing_is_unknown(translator, say):
    sentences = [say(number, 5) for number in range(5)]
    plain = translator.hypotheses(sentences, GREEDY)
    replaced = translator.hypotheses(sentences, GREEDY, replace_unknown=True)
    unknown = translator.vocabularies.target.unk_id
    for several, others in zip(plain, replaced, strict=True):
        assert [one.ids for one in several] == [one.ids for one in others]
        for one, other in zip(several, others, strict=True):
            assert unknown in one.ids or one.text == other.text

"""A sentence has one translation however it is spelled, and characters that a vocabulary lacks are reported."""

import unicodedata
import warnings

import pytest

from flax_transformer.decoding.settings import BeamSearch, Sampling
from flax_transformer.decoding.translator import Translation
from flax_transformer.decoding.unreadable import UnreadableSentences, UnreadableWarning

GREEDY = BeamSearch(beam_size=1, extra_length=4)
BEAM = BeamSearch(beam_size=3, num_return=3, extra_length=4)
SENTENCE = "the old cat sat"


@pytest.mark.parametrize(
    "respell",
    [
        lambda text: text.replace(" ", "\t"),
        lambda text: text.replace(" ", "\xa0"),
        lambda text: text.replace(" ", " \u2003 "),
        lambda text: f"\ufeff{text}",
        lambda text: f"{text}\u200b",
        lambda text: f"{text}\n",
        lambda text: f"\n{text}\r\n",
        lambda text: "\xad".join(text),
        lambda text: unicodedata.normalize("NFD", text),
    ],
    ids="tabs no-break em-space BOM ZWSP LF CRLF soft-hyphens NFD".split(),
)
def test_a_sentence_has_one_translation_however_it_is_spelled(translator, respell):
    (plain,) = translator.hypotheses([SENTENCE], BEAM)
    (other,) = translator.hypotheses([respell(SENTENCE)], BEAM)
    assert other == plain
    assert "".join(translator.stream(respell(SENTENCE), GREEDY)) == "".join(translator.stream(SENTENCE, GREEDY))
    first, second = translator.score([SENTENCE, respell(SENTENCE)], ["a red mouse", respell("a red mouse")])
    assert first.ids == second.ids and first.log_prob == pytest.approx(second.log_prob, abs=1e-4)


@pytest.mark.parametrize("blank", [*"\u200b\u200c\ufeff\u2060\xad\u2028\0\u2800", "\u200b \u200b"], ids=ascii)
def test_an_invisible_line_has_an_empty_translation(translator, blank):
    for settings in (GREEDY, BEAM, Sampling(extra_length=4)):
        assert translator.hypotheses([blank], settings) == [[Translation()]]
    assert list(translator.stream(blank, GREEDY)) == []


def test_a_prefix_keeps_characters_that_the_vocabulary_lacks(translator):
    prefixes = ["Ünï 😀", "the ☃", "☃", "☃ cat ", "the cat", ""]
    target = translator.vocabularies.target
    found = translator.hypotheses([SENTENCE] * len(prefixes), BEAM, prefixes=prefixes)
    for hypotheses, prefix in zip(found, prefixes, strict=True):
        begun = len(target.encode([prefix])[0]) - 1
        for each in hypotheses:
            assert each.text.startswith(prefix.strip())
            assert each.text.count("⁇") == list(each.ids[begun:]).count(target.unk_id)
    (free,), (begun,) = translator.hypotheses([SENTENCE] * 2, GREEDY, prefixes=["", "the ☃"])
    assert begun.text != free.text and begun.text.count("☃") == 1 and "⁇" not in begun.text


@pytest.mark.parametrize("prefix", ["the  cat", "the\xa0cat", "the\u200bcat", "cafe\u0301"])
def test_a_prefix_keeps_its_own_spelling(translator, prefix):
    for settings in (BEAM, Sampling(extra_length=4)):
        (hypotheses,) = translator.hypotheses([SENTENCE], settings, prefixes=[prefix])
        assert all(each.text.startswith(prefix) for each in hypotheses)


def test_sentences_in_another_script_give_one_warning_with_a_count(translator):
    lines = [SENTENCE, "日本語のテキスト", "ಕನ್ನಡ", "the cat ☃", "日 cat sat on"]
    with pytest.warns(UnreadableWarning, match="^2 of 5 sentences .*日本語のテキスト") as told:
        translator.translate(lines, GREEDY)
    assert len(told) == 1
    with pytest.warns(UnreadableWarning, match="^1 of 1 sentences"):
        list(translator.stream("日本語", GREEDY))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        translator.translate([SENTENCE, "the cat ☃", "", "\u200b"], GREEDY)


def test_warnings_quote_half_a_character_so_that_any_stream_can_write_it(translator):
    for sentence in ("日本\ud800語", "the \ud800 cat " * 200):
        with pytest.warns(UserWarning, match=r"\?") as told:
            translator.translate([sentence], GREEDY)
        assert all(str(warning.message).encode() for warning in told)


def test_unreadable_characters_are_listed_with_their_share(translator):
    counted = UnreadableSentences(translator.vocabularies.source)
    found = [*counted.add(["the\xa0cat ☃", "日本"]), *counted.add(["", "日本 cat sat"])]
    assert [one.characters for one in found] == ["☃", "日本", "", "日本"]
    assert [one.share for one in found] == pytest.approx([1 / 7, 1, 0, 2 / 8])
    assert (counted.count, counted.total, counted.example) == (1, 4, "日本")
    # Decomposed, each unknown letter is three characters, but their share is the same.
    text = "각각 the cat"
    composed, decomposed = counted.add([text, unicodedata.normalize("NFD", text)])
    assert composed == decomposed and composed.share == pytest.approx(2 / 8)
